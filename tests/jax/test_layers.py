"""What a bar means is apart from how it is compiled, and from files."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def imported(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, anywhere in it; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reach(module: str, seen: set[str] | None = None) -> set[str]:
    """All modules of perpjax that a module imports, and those that these import."""
    seen = set() if seen is None else seen
    path = ROOT / f"{module.replace('.', '/')}.py"
    for name in imported(path) if path.exists() else ():
        if name.startswith("perpjax.") and name not in seen:
            seen.add(name)
            reach(name, seen)
    return seen


RULES = sorted(p.stem for p in (ROOT / "perpjax" / "rules").glob("*.py"))


@pytest.mark.parametrize("module", RULES)
def test_a_rule_never_imports_how_it_is_compiled(module):
    assert len(RULES) > 8
    names = {module} | reach(f"perpjax.rules.{module}")
    assert not [name for name in names if "xla" in name.split(".")]


def test_the_search_would_find_it():
    assert "perpjax.xla.kernels" in reach("perpjax.env") and "perpjax.rules.risk" in reach("perpjax.env")


@pytest.mark.parametrize("path", sorted((ROOT / "perpjax" / "data").glob("*.py")), ids=lambda p: p.name)
def test_data_imports_no_features(path):
    assert not [name for name in imported(path) if name.startswith("perpjax.features")]


def test_the_reference_shares_no_code_with_the_simulator():
    for path in (ROOT / "perpjax" / "reference").glob("*.py"):
        names = {name for name in imported(path) if name.startswith("perpjax")}
        assert all(name.startswith("perpjax.reference") for name in names), path
