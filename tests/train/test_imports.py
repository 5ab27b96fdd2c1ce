"""Nothing in `train` imports upwards: its modules form no cycle, and `perpjax.data` knows no features."""

import ast
import graphlib
import pathlib

import train

ROOT = pathlib.Path(train.__file__).parents[1]


def read_modules(package: str) -> dict[str, pathlib.Path]:
    """The modules of a package by name; a package by its `__init__`."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def find_imports(path: pathlib.Path) -> set[str]:
    """Every dotted name that a file imports, anywhere in it: `a.b` and `a.b.c` of `from a.b import c`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def build_graph(modules: dict[str, pathlib.Path]) -> dict[str, set[str]]:
    return {name: (find_imports(path) & modules.keys()) - {name} for name, path in modules.items()}


def test_the_modules_of_train_form_no_cycle():
    modules = read_modules("train")
    assert {"train.ppo.algorithm", "train.loop", "train.ladder.climb", "train.policies"} <= modules.keys()
    order = list(graphlib.TopologicalSorter(build_graph(modules)).static_order())
    assert len(order) == len(modules)


def test_a_cycle_would_be_found(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.py").write_text(f"def later():\n    from {other} import x\n")
    graph = build_graph({name: tmp_path / f"{name}.py" for name in "ab"})
    assert graph == {"a": {"b"}, "b": {"a"}}


def test_who_may_import_whom():
    """The general does not know the special: the loop, checkpoints and policies know no algorithm."""
    modules = read_modules("train")
    graph = build_graph(modules)

    def reach(name: str) -> set[str]:
        return graph[name].union(*map(reach, graph[name]))

    for name in modules:
        layer = name.split(".")[1] if "." in name else ""
        # `runs` shows the defaults of PPO, the package re-exports, and a command loads a run.
        if layer not in ("", "ppo", "ladder", "runs") and not name.endswith(".__main__"):
            assert not any(x.startswith(("train.ppo", "train.ladder")) for x in reach(name)), name
        if layer != "ladder":
            assert not any(x.startswith("train.ladder") for x in reach(name)), name
    assert reach("train.checkpoint") == {"train.run_folder"}
    assert not find_imports(modules["train.checkpoint"]) & {"perpjax"}
    # The algorithm names no network; the run chooses one.
    assert not any(x.endswith((".mlp", ".heads")) or x == "train.policies" for x in reach("train.ppo.algorithm"))


def test_data_imports_no_features():
    for name, path in read_modules("perpjax/data").items():
        assert not any(x.startswith("perpjax.features") for x in find_imports(path)), name
