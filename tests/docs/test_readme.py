"""What the README promises: its commands, its example, and the files that it names."""

import functools
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@functools.cache
def run_page(page: pathlib.Path) -> str:
    """What a page's Python prints: all of its blocks in order, pasted into a file, elsewhere."""
    source = "\n".join(blocks("python", page.read_text()))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, cwd=ROOT / "tests", timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_two_commands():
    first, second = blocks("bash")[0].splitlines()
    assert first.split("  #")[0].strip() == "pip install -e . && python -m train.ppo --num-envs 4096"
    assert second.split("  #")[0].strip() == "pip install -e '.[test]' && pytest -n logical"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks("python", p.read_text())], ids=lambda p: p.name)
def test_the_python_of_a_page_runs(page):
    run_page(page)


def test_the_example_runs():
    example, _ = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    equity, fees, shape = run_page(ROOT / "README.md").splitlines()[0].split(maxsplit=2)
    # 100 bars of random trading from 10 000: poorer, by fees among other things; 31 features and 9 of the account.
    assert 5_000 < float(equity) < 10_000 and 0 < float(fees) < 5_000
    assert shape.strip() == "(1024, 40)"


def test_the_trial_runs():
    out = run_page(ROOT / "README.md")
    assert "0 of 44 accused" in out and "pessimistic" in out


def test_the_modules_of_the_trial_are_there():
    names = re.findall(r"python -m ([\w.]+)", "".join(blocks("bash")))
    assert {"perpjax.audit", "perpjax.audit.parity", "perpjax.audit.fuzz", "train.ladder"} <= set(names)
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


def paths_of_table() -> list[str]:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    paths = []
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            # "`perpjax/risk.py`, `margin.py`": a bare name lies beside the one before it.
            folder = name.rpartition("/")[0] if "/" in name.rstrip("/") or name.endswith("/") else folder
            paths.append(name if "/" in name else f"{folder}/{name}")
    return paths


def test_every_file_of_the_table_is_there():
    paths = paths_of_table()
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", re.findall(r"`((?:docs|notebooks|benchmarks|perpjax|train|tests)/[\w./]*)`", README))
def test_every_file_of_the_text_is_there(name):
    assert (ROOT / name).exists()


def test_modules_of_the_commands_explain_themselves():
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert {"train.ppo", "perpjax.data.build"} <= modules
    for module in modules:
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "usage" in done.stdout.lower(), (module, done.stderr)


def test_every_flag_of_the_commands_exists():
    for command in re.findall(r"python -m ((?:.|\\\n)+?)(?:`|#|\n(?!\s+--)|$)", "\n".join(blocks("bash"))):
        module, *rest = command.replace("\\\n", " ").split()
        flags = [x for x in rest if x.startswith("--")]
        done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
        for flag in flags:
            assert flag in done.stdout, (module, flag)


def test_it_is_finished():
    assert not re.findall(r"@\w+@|TODO|TBD|FIXME|\bXXX\b", README)
    assert len(README.splitlines()) < 130
    for word in ("/work/", "/tmp/", "/root/"):
        assert word not in README
