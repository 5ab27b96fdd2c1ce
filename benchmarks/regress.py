"""Is one commit faster than another? Run both in turn on this machine, and print the ratio with its spread.

    python -m benchmarks.regress HEAD~1 HEAD
    python -m benchmarks.regress main . --num-envs 4096 --rounds 15       # "." is the working tree

For each batch size, each round runs a process of the first commit, then one of the second. A process compiles an
auto-reset rollout under random actions, warms up and times it. A round's ratio is that of the medians of these two
neighbours, so a slow minute of the machine slows both. Above 1 the second commit is the faster one. The last line is
the geometric mean, over the batch sizes, of the median ratios.
"""

import dataclasses
import inspect
import io
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import quartiles, run_command

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "perpjax"
"""All that the timed process needs of a commit."""


@dataclasses.dataclass
class Args:
    """The commits to compare, and the sizes."""

    before: tyro.conf.Positional[str]
    """A commit, as git names it, or "." for the working tree."""
    after: tyro.conf.Positional[str]
    """The other one."""
    num_envs: tuple[int, ...] = (64, 1024, 4096, 65536)
    """Batch sizes."""
    rounds: int = 9
    """Processes of each commit at each batch size; one takes about ten seconds."""
    steps: int = 100
    """Steps of each environment in a timed call."""
    calls: int = 9
    """Timed calls in a process."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market; both commits must be able to read it."""

    def __post_init__(self):
        for name in ("num_envs", "rounds", "steps", "calls"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Timing:
    """The measurement of one process."""

    package: str
    """The file that it imported."""
    compile_seconds: float
    seconds: list[float]
    """Of each call."""


def time_rollout(num_envs: int, steps: int, calls: int, dataset: str) -> None:
    """Print a `Timing` as JSON. This is the timed program; it runs by itself, against either commit's package."""
    import json
    import time

    import jax
    import jax.numpy as jnp

    import perpjax
    from perpjax import AutoReset, PerpEnv, VecEnv, load_market

    jax.config.update("jax_enable_compilation_cache", False)
    env = AutoReset(PerpEnv(load_market(dataset)))
    key_reset, key_length, key_actions = jax.random.split(jax.random.key(0), 3)
    # Choices of a `multi_discrete` action: direction, size, leverage, stop, target.
    actions = jax.random.randint(key_actions, (steps, num_envs, 5), 0, jnp.array([4, 4, 5, 4, 5]))
    state = jax.jit(VecEnv(env).reset)(jax.random.split(key_reset, num_envs))
    left = jax.random.randint(key_length, (num_envs,), 1, env.env.config.episode_length + 1)
    state = state.replace(end=jnp.minimum(state.end, state.t + left))

    def rollout(env, state, actions):
        return jax.lax.scan(lambda state, action: (VecEnv(env).step(state, action), None), state, actions)[0]

    def elapsed():
        return time.perf_counter() - began

    began = time.perf_counter()
    run = jax.jit(rollout, donate_argnums=1).lower(env, state, actions).compile()
    compile_seconds, seconds = elapsed(), []
    for _ in range(calls + 2):
        began = time.perf_counter()
        state = jax.block_until_ready(run(env, state, actions))
        seconds.append(elapsed())
    print(json.dumps({"package": perpjax.__file__, "compile_seconds": compile_seconds, "seconds": seconds[2:]}))


def export(commit: str, folder: pathlib.Path) -> pathlib.Path:
    """Put a commit's package into a new folder; the working tree's if `commit` is "."; returns the folder.

    Raises:
      ValueError: git knows no such commit, or it has no such package.
    """
    folder.mkdir()
    if commit == ".":
        shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        return folder
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "--format=tar", f"{commit}^{{commit}}", PACKAGE], capture_output=True
    )
    if archive.returncode:
        raise ValueError(f"no {PACKAGE} of {commit!r}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def run_timed(tree: pathlib.Path, num_envs: int, args: Args) -> Timing:
    """Time the package in `tree`, in a process of its own.

    Raises:
      RuntimeError: the process failed, or imported another package than that.
    """
    settings = {"num_envs": num_envs} | {name: getattr(args, name) for name in ("steps", "calls", "dataset")}
    program = f"{inspect.getsource(time_rollout)}\ntime_rollout(**{settings!r})\n"
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    # -P: the current folder, mostly a checkout of this repository, must not come before the tree.
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the timed process failed:\n{done.stderr.strip()[-2000:]}")
    timing = Timing(**json.loads(done.stdout.splitlines()[-1]))
    if not pathlib.Path(timing.package).resolve().is_relative_to(tree.resolve()):
        raise RuntimeError(f"the timed process imported {timing.package}, not the commit's package")
    return timing


Pair = tuple[Timing, Timing]


def compare(args: Args, measure: Callable[[pathlib.Path, int, Args], Timing] = run_timed) -> Iterator[tuple[int, Pair]]:
    """Yield the batch size and a pair of timings for each round, as it is measured.

    Args:
      measure: times the package in a folder. The folders are gone afterwards.
    """
    with tempfile.TemporaryDirectory() as scratch:
        before = export(args.before, pathlib.Path(scratch) / "before")
        after = export(args.after, pathlib.Path(scratch) / "after")
        for num_envs in args.num_envs:
            for _ in range(args.rounds):
                yield num_envs, (measure(before, num_envs, args), measure(after, num_envs, args))


def speedup(pair: Pair) -> float:
    """Return how many times as fast the second commit is."""
    before, after = (statistics.median(timing.seconds) for timing in pair)
    return before / after


def show(args: Args, rounds: Iterator[tuple[int, Pair]], console: Console) -> None:
    """Print a line for each round, as it comes, then the ratios with their spread, and their geometric mean."""
    done: dict[int, list[Pair]] = {}
    for num_envs, pair in rounds:
        done.setdefault(num_envs, []).append(pair)
        rates = [num_envs * args.steps / statistics.median(t.seconds) / 1e6 for t in pair]
        numbers = f"{rates[0]:8.3f} {rates[1]:8.3f} million steps/s {speedup(pair):8.3f}"
        console.print(f"{num_envs:6} round {len(done[num_envs]):2} of {args.rounds} {numbers}", highlight=False)
    table = Table(title=f"{args.after} over {args.before}", box=SIMPLE_HEAD, pad_edge=False)
    for head in ("envs", "times as fast", "quartiles", "min .. max", "to compile"):
        table.add_column(head, justify="right")
    for num_envs, pairs in done.items():
        ratios = [speedup(p) for p in pairs]
        low, median, high = quartiles(ratios)
        compiling = statistics.median(before.compile_seconds / after.compile_seconds for before, after in pairs)
        spread = (f"{median:.3f}", f"{low:.3f} .. {high:.3f}", f"{min(ratios):.3f} .. {max(ratios):.3f}")
        table.add_row(str(num_envs), *spread, f"{compiling:.3f}")
    mean = statistics.geometric_mean(statistics.median(map(speedup, pairs)) for pairs in done.values())
    console.print(table, f"geometric mean of the medians: {mean:.3f}", highlight=False)


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(lambda args: show(args, compare(args), Console()), Args, "benchmarks.regress", __doc__, argv)


if __name__ == "__main__":
    main()
