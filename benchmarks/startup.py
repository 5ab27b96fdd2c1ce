"""Seconds from the shell to the first update and to the end of a short run, with and without stored programs.

    python -m benchmarks.startup      # writes benchmarks/results/startup.json

Each repeat runs `python -m train.ppo` twice: with an empty cache folder of compiled programs, then with the programs
that the first one left there. The first update counts from the start of the process to the first line of metrics.jsonl.
"""

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.harness import RESULTS, run_command, save
from train.compilation import VARIABLE

PROGRAM = "benchmarks.startup"
POLL_SECONDS = 0.02


@dataclasses.dataclass
class Args:
    """The run to time."""

    num_envs: int = 4096
    """Environments of the run."""
    total_steps: int = 1_000_000
    """Environment steps of the run."""
    repeats: int = 3
    """Pairs of runs."""
    out: pathlib.Path = RESULTS / "startup.json"
    """Where the result goes."""

    def __post_init__(self):
        if min(self.num_envs, self.total_steps, self.repeats) < 1:
            raise ValueError("num_envs, total_steps and repeats must be at least 1")


class Times(NamedTuple):
    """Seconds since the start of a process."""

    first_update: float
    end: float


def time_run(args: Args, folder: pathlib.Path, cache: pathlib.Path) -> Times:
    """Run the trainer once, in a process and a folder of its own.

    Raises:
      OSError: the run failed; its standard error is that of this process.
    """
    command = [sys.executable, "-m", "train.ppo", "--num-envs", str(args.num_envs), "--run-dir", str(folder)]
    environment = os.environ | {VARIABLE: str(cache), "PERPJAX_DATA": str(folder.parent / "data")}
    metrics, first_update = folder / "metrics.jsonl", None
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--total-steps", str(args.total_steps)],
        cwd=RESULTS.parents[1], env=environment, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None:
        if first_update is None and metrics.exists() and metrics.stat().st_size > 0:
            first_update = time.perf_counter() - began
        time.sleep(POLL_SECONDS)
    if process.returncode != 0 or first_update is None:
        raise OSError(f"the run ended with status {process.returncode}; see above")
    return Times(first_update, time.perf_counter() - began)


def summarise(cache: str, times: list[Times]) -> dict[str, Any]:
    """Return the row of one kind of start: medians, and the slowest of each."""
    row: dict[str, Any] = {"cache": cache}
    for name in Times._fields:
        seconds = [getattr(x, name) for x in times]
        row |= {name: round(statistics.median(seconds), 1), f"{name}_slowest": round(max(seconds), 1)}
    return row


def run(args: Args) -> None:
    """Time, show and save."""
    times: dict[str, list[Times]] = {"empty": [], "filled": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            for cache in times:
                times[cache].append(time_run(args, folder / cache, folder / "cache"))
    rows = [{"num_envs": args.num_envs, "total_steps": args.total_steps} | summarise(*x) for x in times.items()]
    for row in rows:
        Console().print(row, highlight=False)
    save(args.out, PROGRAM, rows)


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(run, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
