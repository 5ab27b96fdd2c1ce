"""The comparison of two commits, without timing anything."""

import io
import os
import pathlib
import subprocess

import pytest
from rich.console import Console

from benchmarks import regress
from benchmarks.regress import Args, Timing, compare, export, run_timed, show, speedup


@pytest.fixture
def repository(tmp_path, monkeypatch) -> pathlib.Path:
    """One whose package says in which commit it is: "first" (tagged), "second" (HEAD), and "edited" on disk."""
    root = tmp_path / "repository"
    (root / "perpjax").mkdir(parents=True)
    anybody = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    nothing_inherited = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", root, *words], check=True, capture_output=True, env=nothing_inherited | anybody)

    git("init", "--quiet")
    for says in ("first", "second", "edited"):
        (root / "perpjax" / "__init__.py").write_text(f"SAYS = {says!r}\n")
        if says != "edited":
            git("add", "perpjax")
            git("commit", "--quiet", "--message", says)
            git("tag", says)
    monkeypatch.setattr(regress, "ROOT", root)
    return root


def read(tree: pathlib.Path) -> str:
    return (tree / "perpjax" / "__init__.py").read_text()


@pytest.mark.parametrize(
    ("commit", "says"), [("first", "first"), ("HEAD", "second"), ("HEAD~1", "first"), (".", "edited")]
)
def test_what_is_timed_is_the_commit(repository, tmp_path, commit, says):
    assert read(export(commit, tmp_path / "tree")) == f"SAYS = {says!r}\n"


@pytest.mark.parametrize("commit", ["nonsense", "HEAD:perpjax"])
def test_an_unknown_commit_is_one_line(repository, capsys, commit):
    with pytest.raises(SystemExit) as ended:
        regress.main(["HEAD", commit])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and commit in error


def test_rounds_alternate_and_the_ratio_is_that_of_neighbours(repository):
    """The machine gets slower by a second a call; the second commit takes half of what the first would."""
    seen, trees = [], set()

    def measure(tree: pathlib.Path, args: Args) -> Timing:
        seen.append("second" if "second" in read(tree) else "first")
        trees.add(tree)
        slow = 1.0 + len(seen)
        return Timing("", 3.0, [slow / 2 if seen[-1] == "second" else slow] * 2 + [1000.0 * slow])

    args = Args("first", "second", rounds=3)
    pairs = list(compare(args, measure))
    assert seen == ["first", "second"] * 3
    # 2 / (3 / 2), 4 / (5 / 2), 6 / (7 / 2); one outlier of three calls changes nothing.
    assert [speedup(p) for p in pairs] == pytest.approx([4 / 3, 8 / 5, 12 / 7])
    assert not any(tree.exists() for tree in trees)
    told = io.StringIO()
    show(args, iter(pairs), Console(file=told, width=80))
    assert "second over first" in told.getvalue() and "1.600" in told.getvalue()
    assert "1.333 .. 1.714" in told.getvalue()


def test_a_process_that_imports_another_package_is_an_error(tmp_path, monkeypatch):
    """Such as the installed one, because the commit has none."""
    program = (
        'def time_rollout(**_):\n    print(\'{"package": "/elsewhere.py", "compile_seconds": 1, "seconds": [1]}\')'
    )
    monkeypatch.setattr(regress.inspect, "getsource", lambda _: program)
    with pytest.raises(RuntimeError, match=r"imported /elsewhere\.py"):
        run_timed(tmp_path, Args("a", "b"))


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(regress.inspect, "getsource", lambda _: "raise OSError('no such dataset')")
    with pytest.raises(RuntimeError, match="no such dataset"):
        run_timed(tmp_path, Args("a", "b"))


def test_the_timed_program_runs_on_this_tree_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles for longer than it runs
    monkeypatch.chdir(regress.ROOT)  # whose package must not be imported instead
    tree = export(".", tmp_path / "tree")
    timing = run_timed(tree, Args(".", ".", num_envs=2, steps=1, calls=3))
    assert pathlib.Path(timing.package) == tree / "perpjax" / "__init__.py"
    assert len(timing.seconds) == 3 and timing.compile_seconds > 0
