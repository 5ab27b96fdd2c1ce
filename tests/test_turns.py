"""Sides that are timed in turn, each in a process of its own."""

import functools
import os
import time

import pytest

from benchmarks.turns import Apart, clock, take_turns


def test_the_first_turn_does_not_count():
    calls = []

    def read(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds * len(calls)

    seconds = take_turns({"a": lambda: read("a", 1.0), "b": lambda: read("b", 10.0)}, 2)
    assert "".join(calls) == "ababab"
    assert seconds == {"a": [3.0, 5.0], "b": [40.0, 60.0]}


def test_a_clock_times_only_what_runs():
    assert 0.05 <= clock(lambda: time.sleep(0.3) or 0.05, time.sleep)() < 0.3


def tell(name: str) -> dict:
    """Clocks that say what a variable is over there, and in which process."""
    return {"variable": lambda: float(os.environ[name]), "process": lambda: float(os.getpid())}


def test_clocks_run_in_a_process_with_an_environment_of_its_own():
    with Apart(functools.partial(tell, "PERPJAX_TEST"), PERPJAX_TEST="7") as clocks:
        seconds = take_turns(clocks, 2)
    assert seconds["variable"] == [7.0, 7.0]
    assert seconds["process"][0] == seconds["process"][1] != os.getpid()
    assert "PERPJAX_TEST" not in os.environ


def fail() -> dict:
    raise ValueError("nothing to time")


def end() -> dict:
    return {"ends": lambda: os._exit(3)}


def test_a_process_that_fails_is_an_error(capfd):
    with pytest.raises(OSError, match="ended with status 1"), Apart(fail):
        pass
    assert "nothing to time" in capfd.readouterr().err
    with Apart(end) as clocks, pytest.raises(OSError, match="ended with status 3"):
        clocks["ends"]()
