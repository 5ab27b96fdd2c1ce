"""Sides that are timed in turn, each in a process of its own.

Libraries that share a process share its pools of threads and its environment variables, which is how some of them are
told about threads; a process of its own has its own.

    with ExitStack() as processes:
        clocks = processes.enter_context(Apart(make_this)) | processes.enter_context(Apart(make_that, NPROC="1"))
        seconds = take_turns(clocks, repeats=11)
"""

import functools
import multiprocessing
import os
import time
import unittest.mock
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax

Clock = Callable[[], float]
"""Does something once and says how many seconds it took."""
Seconds = dict[str, list[float]]
"""Of every timed turn, by side."""

REST_SECONDS = 0.02
"""Before everything that is timed: the threads of another side may still be spinning."""


def clock(prepare: Callable[[], Any], run: Callable[[Any], Any]) -> Clock:
    """Times `run` of what `prepare` returns, to the end of what JAX does in the background."""

    def elapsed() -> float:
        ready = jax.block_until_ready(prepare())
        time.sleep(REST_SECONDS)
        began = time.perf_counter()
        jax.block_until_ready(run(ready))
        return time.perf_counter() - began

    return elapsed


def take_turns(clocks: dict[str, Clock], repeats: int) -> Seconds:
    """Read every clock `repeats` times, one after the other; the first turn compiles and does not count."""
    turns = [{name: read() for name, read in clocks.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in clocks}


class Apart:
    """Clocks that run in a process of their own. A context, whose process ends with it.

    Args:
      make: makes the clocks, over there; it is pickled, so a function of a module or a `functools.partial` of one.
      environment: of the process, beside that of this one.

    Raises:
      ValueError: as raised over there.
      OSError: the process ended; what it said is on its standard error, which is this one's.
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
        return {name: functools.partial(self._hear, name) for name in self._hear()}

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.join()

    def _hear(self, *asked: str) -> Any:
        """The answer to what is asked, if anything is."""
        try:
            for name in asked:
                self.pipe.send(name)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise OSError(f"a timed process ended with status {self.process.exitcode}; see above") from None
        if isinstance(answer, ValueError):
            raise answer
        return answer


def _serve(pipe: Connection, make: Callable[[], dict[str, Clock]]) -> None:
    """What `Apart` starts: says which clocks there are, then reads the one that it is asked for."""
    try:
        clocks = make()
        pipe.send(list(clocks))
        while True:
            pipe.send(clocks[pipe.recv()]())
    except ValueError as error:
        pipe.send(error)
