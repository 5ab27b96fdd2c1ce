"""The wheel in a virtual environment of its own, used from another folder; and what an import may and may not do."""

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("perpjax", "train")
SOURCES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built as pip builds it. Without hatchling beside us pip fetches it, as it does for any user."""
    out = tmp_path_factory.mktemp("wheel")
    here = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *here, "-w", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("perpjax-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> pathlib.Path:
    """The Python of a fresh environment that holds the wheel, and borrows only the dependencies of this one.

    A path in a .pth file is searched, but the .pth files inside it are not read: this environment's editable
    install does not come along.
    """
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (python,) = [p for p in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if p.exists()]
    site = pathlib.Path(ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))", folder))
    borrowed = [p for p in sys.path if pathlib.Path(p).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed))
    find = "from importlib.util import find_spec; print([find_spec(n) is None for n in ('jax', 'perpjax', 'train')])"
    assert ask(python, find, folder) == "[False, True, True]"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return python


def ask(python: pathlib.Path | str, code: str, where: pathlib.Path) -> str:
    """What a program prints, run from `where` with nothing of the caller's on its path; a warning is an error."""
    done = subprocess.run([python, "-I", "-W", "error", "-c", code], capture_output=True, text=True, cwd=where)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == set(PACKAGES)
    assert {"perpjax/py.typed", "train/py.typed"} <= set(names)
    assert any(n.endswith("LICENSE") for n in names)
    static = {p.relative_to(ROOT).as_posix() for p in (ROOT / "train" / "report" / "static").iterdir()}
    assert len(static) >= 6 and static <= set(names)
    held = {n for n in names if n.endswith(".py")}
    assert held == {str(p.relative_to(ROOT)) for p in SOURCES}
    assert "Requires-Python: >=3.11" in metadata and "License-Expression: MIT" in metadata


def test_wheel_imports_from_another_folder(installed, tmp_path):
    """Every module of both packages, from the wheel and not from the repository."""
    code = """
import importlib, json, pkgutil, perpjax, train
names = [m.name for p in (perpjax, train) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
files = [importlib.import_module(n).__file__ for n in names]
print(json.dumps([perpjax.__file__, train.__file__, *files]))
"""
    files = json.loads(ask(installed, code, tmp_path))
    prefix = str(installed.parents[2])
    assert len(files) == len(SOURCES)
    assert all(f.startswith(prefix) for f in files), files


def test_wheel_runs_from_another_folder(installed, tmp_path):
    code = """
import jax, perpjax
market = perpjax.load_market("synthetic:martingale?bars=12000", split="train")
env = perpjax.PerpEnv(market)
state = env.reset(jax.random.key(0))
print(state.obs.shape, float(state.equity), perpjax.__version__)
"""
    assert ask(installed, code, tmp_path).startswith("(40,) 10000.0 ")
    for module in ("train.ppo", "perpjax.data.build"):
        done = subprocess.run([installed, "-m", module, "--help"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, (module, done.stderr)


@pytest.mark.parametrize("where", [".", "notebooks", "tests"])
def test_editable_imports_from_the_repository(where):
    """With the environment that runs the tests: from the root, from notebooks/ and from tests/ alike."""
    found = ask(sys.executable, "import perpjax, train; print(perpjax.__file__, train.__file__)", ROOT / where)
    assert found.split() == [str(ROOT / name / "__init__.py") for name in PACKAGES]


# What an import does.


def test_import_starts_no_backend_and_needs_no_matplotlib(tmp_path):
    """Nothing is put on a device, and nothing optional is needed, until something is called."""
    code = """
import importlib, pkgutil, sys
for name in ("matplotlib", "pandas", "talib", "hypothesis", "nbclient", "IPython", "beartype", "scipy.stats"):
    sys.modules[name] = None                      # an import of it is an ImportError
import perpjax, train
for p in (perpjax, train):
    for m in pkgutil.walk_packages(p.__path__, p.__name__ + "."):
        importlib.import_module(m.name)
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
"""
    ask(sys.executable, code, tmp_path)


def test_import_is_quick(tmp_path):
    """Most of it is JAX; what perpjax and train add to their dependencies is little."""
    code = """
import time, jax, flax.linen, optax, chex, pyarrow.parquet, jaxtyping, orbax.checkpoint, tyro, rich.live
began = time.process_time()
import perpjax, train.ppo.run
print(time.process_time() - began)
"""
    assert float(ask(sys.executable, code, tmp_path)) < 3


# What the sources say.


def imported(path: pathlib.Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add((node.module or "").split(".")[0])
    return names


def test_perpjax_does_not_know_the_trainer():
    for path in SOURCES:
        if path.is_relative_to(ROOT / "perpjax"):
            assert not imported(path) & {"train", "tests", "benchmarks"}, path


def test_every_import_is_a_dependency():
    """Of the core; the plots and the hook of an extra may name theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {d.split(">")[0].split("[")[0].strip() for d in project["dependencies"]}
    modules = {"orbax" if d == "orbax-checkpoint" else d for d in declared} | set(PACKAGES)
    for path in SOURCES:
        foreign = imported(path) - set(sys.stdlib_module_names) - modules
        extra = {"plotting.py": {"matplotlib"}, "tensorboard.py": {"tensorboardX"}}.get(path.name, set())
        assert foreign <= extra, (path, foreign)
    used = set().union(*map(imported, SOURCES))
    assert modules - used <= {"jaxlib", "chex"}, "declared, never imported"


def test_no_import_has_a_fallback():
    """No import statement inside a `try` that survives its failure."""
    for path in [*SOURCES, *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                inside = [n for statement in node.body for n in ast.walk(statement)]
                assert not any(isinstance(n, ast.Import | ast.ImportFrom) for n in inside), f"{path}:{node.lineno}"


def test_no_path_of_a_machine_is_in_the_sources():
    for path in [*SOURCES, ROOT / "pyproject.toml", *(ROOT / "benchmarks").rglob("*.py")]:
        # One module searches the user's current folder, for `--policy module:function`.
        for word in ("/work/", "/root/", "/home/", *["sys.path"] * (path.name != "_importing.py")):
            assert word not in path.read_text(), (path, word)
