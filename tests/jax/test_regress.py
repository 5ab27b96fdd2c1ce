"""Sides timed in turn, and the comparison of two commits, without timing a step."""

import functools
import io
import os
import pathlib
import subprocess

import pytest
from rich.console import Console

from benchmarks import regress
from benchmarks.harness import Apart, take_turns
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


def test_rounds_alternate_and_a_ratio_is_that_of_neighbours(repository):
    """The machine gets slower by a second a call; the second commit takes half the time of the first."""
    seen, trees = [], set()

    def measure(tree: pathlib.Path, num_envs: int, args: Args) -> Timing:
        seen.append((num_envs, "second" if "second" in read(tree) else "first"))
        trees.add(tree)
        slow = 1.0 + (len(seen) - 1) % 6 + 1
        return Timing("", 3.0, [slow / 2 if seen[-1][1] == "second" else slow] * 2 + [1000.0 * slow])

    args = Args("first", "second", num_envs=(64, 4096), rounds=3)
    rounds = list(compare(args, measure))
    assert seen == [(64, "first"), (64, "second")] * 3 + [(4096, "first"), (4096, "second")] * 3
    # 2 / (3 / 2), 4 / (5 / 2), 6 / (7 / 2); one outlier of three calls changes nothing.
    assert [speedup(pair) for _, pair in rounds] == pytest.approx([4 / 3, 8 / 5, 12 / 7] * 2)
    assert not any(tree.exists() for tree in trees)


def test_the_mean_is_geometric_over_the_medians_of_the_sizes():
    def pair(ratio: float) -> tuple[Timing, Timing]:
        return Timing("", 2.0, [ratio]), Timing("", 1.0, [1.0])

    told = io.StringIO()
    rounds = [(64, pair(x)) for x in (0.5, 4.0, 9.0)] + [(4096, pair(x)) for x in (1.0, 1.0, 7.0)]
    show(Args("first", "second", rounds=3), iter(rounds), Console(file=told, width=90))
    lines = [line.split() for line in told.getvalue().splitlines()]
    assert ["64", "4.000", "2.250", "..", "6.500", "0.500", "..", "9.000", "2.000"] in lines
    assert "second over first" in told.getvalue() and told.getvalue().strip().endswith("medians: 2.000")


def test_a_process_that_imports_another_package_is_an_error(tmp_path, monkeypatch):
    """Such as the installed one, because the commit has none."""
    program = (
        'def time_rollout(**_):\n    print(\'{"package": "/elsewhere.py", "compile_seconds": 1, "seconds": [1]}\')'
    )
    monkeypatch.setattr(regress.inspect, "getsource", lambda _: program)
    with pytest.raises(RuntimeError, match=r"imported /elsewhere\.py"):
        run_timed(tmp_path, 2, Args("a", "b"))


def test_a_process_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(regress.inspect, "getsource", lambda _: "raise OSError('no such dataset')")
    with pytest.raises(RuntimeError, match="no such dataset"):
        run_timed(tmp_path, 2, Args("a", "b"))


def test_the_timed_program_runs_on_this_tree_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles for longer than it runs
    monkeypatch.chdir(regress.ROOT)  # whose package must not be imported instead
    tree = export(".", tmp_path / "tree")
    timing = run_timed(tree, 2, Args(".", ".", steps=1, calls=3))
    assert pathlib.Path(timing.package) == tree / "perpjax" / "__init__.py"
    assert len(timing.seconds) == 3 and timing.compile_seconds > 0


def test_the_first_turn_does_not_count():
    calls = []

    def read_clock(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds * len(calls)

    seconds = take_turns({"a": lambda: read_clock("a", 1.0), "b": lambda: read_clock("b", 10.0)}, 2)
    assert "".join(calls) == "ababab"
    assert seconds == {"a": [3.0, 5.0], "b": [40.0, 60.0]}


def refuse() -> float:
    raise ValueError("nothing to time")


def make_clocks(name: str) -> dict:
    """Clocks that tell a variable of their process, refuse, and end it."""
    return {"variable": lambda: float(os.environ[name]), "refuse": refuse, "end": lambda: os._exit(3)}


def test_a_process_apart_has_its_own_environment_and_hands_on_its_errors():
    make = functools.partial(make_clocks, "PERPJAX_TEST")
    with Apart(make, PERPJAX_TEST="7") as clocks, pytest.raises(ValueError, match="nothing to time"):
        assert clocks["variable"]() == 7.0 and "PERPJAX_TEST" not in os.environ
        clocks["refuse"]()
    with Apart(make) as clocks, pytest.raises(OSError, match="ended with status 3"):
        clocks["end"]()
