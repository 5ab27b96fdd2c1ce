"""What the README promises: its commands, its example, and the files that it names."""

import atexit
import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@functools.cache
def make_run() -> pathlib.Path:
    """A folder in which somebody has trained."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="perpjax-readme-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    size = ("--num-envs", "16", "--num-steps", "8", "--total-steps", "256", "--hidden", "8")
    done = subprocess.run(
        [sys.executable, "-m", "train.ppo", *size], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@functools.cache
def run_page(page: pathlib.Path) -> str:
    """The output of a page's Python: all of its blocks in order, pasted into a file, in a folder with a run."""
    source = "\n".join(blocks("python", page.read_text()))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", source], capture_output=True, text=True, cwd=make_run(), timeout=300
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
    example, life, network, _ = blocks("python")
    assert len([line for line in network.splitlines() if line.strip()]) <= 25
    assert len([line for line in example.splitlines() if line.strip()]) <= 16
    assert len([line for line in life.splitlines() if line.strip()]) <= 8
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
    assert len(README.splitlines()) < 170
    for word in ("/work/", "/tmp/", "/root/"):
        assert word not in README
