"""Shared by the benchmarks: time several sides in turn, write a result, run a command.

    with contextlib.ExitStack() as processes:
        clocks = processes.enter_context(Apart(make_this)) | processes.enter_context(Apart(make_that, NPROC="1"))
        seconds = take_turns(clocks, repeats=11)

Libraries in one process share its threads and its environment variables. `Apart` gives each side a process of its own.
"""

import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import jax
import tyro

Args = TypeVar("Args")
Clock = Callable[[], float]
"""Does something once and returns the seconds that it took."""

RESULTS = pathlib.Path(__file__).parent / "results"
VERSIONS = ("jax", "jaxlib", "numpy", "torch", "torchtrade")
REST_SECONDS = 0.02
"""Before each timed call: the threads of the side before may still be spinning."""


def clock(prepare: Callable[[], Any], run: Callable[[Any], Any]) -> Clock:
    """Return a clock of `run` on the result of `prepare`, to the end of JAX's work in the background."""

    def elapsed() -> float:
        ready = jax.block_until_ready(prepare())
        time.sleep(REST_SECONDS)
        began = time.perf_counter()
        jax.block_until_ready(run(ready))
        return time.perf_counter() - began

    return elapsed


def take_turns(clocks: dict[str, Clock], repeats: int) -> dict[str, list[float]]:
    """Read every clock `repeats` times, one after the other; the first turn compiles and does not count."""
    turns = [{name: read() for name, read in clocks.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in clocks}


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    return tuple(statistics.quantiles(samples, method="inclusive")) if len(samples) > 1 else (samples[0],) * 3


class Apart:
    """Clocks in a process of their own. A context; the process ends with it.

    Args:
      make: makes the clocks in that process. It is pickled: a function of a module, or a `functools.partial` of one.
      environment: variables of the process, beside those of this one.

    Raises:
      ValueError: as raised in the process.
      OSError: the process ended; its standard error is that of this process.
    """

    def __init__(self, make: Callable[[], dict[str, Clock]], **environment: str):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, self.theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(self.theirs, make), daemon=True)
        self.environment = environment

    def __enter__(self) -> dict[str, Clock]:
        with unittest.mock.patch.dict(os.environ, self.environment):
            self.process.start()
        self.theirs.close()  # or its end would not be seen here
        return {name: functools.partial(self._ask, name) for name in self._ask()}

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.join()

    def _ask(self, *names: str) -> Any:
        try:
            for name in names:
                self.pipe.send(name)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise OSError(f"a timed process ended with status {self.process.exitcode}; see above") from None
        if isinstance(answer, ValueError):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[[], dict[str, Clock]]) -> None:
    try:
        clocks = make()
        pipe.send(list(clocks))
        while True:
            pipe.send(clocks[pipe.recv()]())
    except ValueError as error:
        pipe.send(error)


def describe_machine(device: str | None = None) -> str:
    """Return the processor, its number of cores and the device."""
    file = pathlib.Path("/proc/cpuinfo")
    cpu = dict(re.findall(r"(.*?)\s*: (.*)", file.read_text())) if file.exists() else {}
    kind = ", ".join(f"{name} {cpu[name]}" for name in ("cpu family", "model") if name in cpu)
    processor = f"{cpu.get('model name', platform.processor())} ({kind}), {os.cpu_count()} cores"
    device = device or jax.devices()[0].device_kind
    return processor if device == "cpu" else f"{device}; {processor}"


def name_commit() -> str:
    """Return the short name of the checked-out commit, with "+" if the simulator or the trainer differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "../perpjax", "../train")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)


def save(path: pathlib.Path, program: str, rows: list[dict[str, Any]], device: str | None = None) -> None:
    """Write rows, one a line, with command, date, commit, machine and versions."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = {"python": platform.python_version()} | {n: installed[n] for n in VERSIONS if n in installed}
    head = {
        "command": " ".join([f"python -m {program}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": name_commit(),
        "machine": describe_machine(device),
        "versions": versions,
    }
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    path.write_text("\n".join(["{", *lines, ' "rows": [', ",\n".join("  " + json.dumps(r) for r in rows), " ]\n}\n"]))


def run_command(
    run: Callable[[Args], None], args: type[Args], program: str, description: str | None, argv: list[str] | None
) -> None:
    """Parse the arguments of `python -m program` and run it; an error is one line and exit status 2."""
    try:
        run(tyro.cli(args, args=argv, prog=f"python -m {program}", description=description))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
