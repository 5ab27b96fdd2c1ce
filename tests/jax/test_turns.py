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


def refuse() -> dict:
    raise ValueError("nothing to time")


def fail(at_once: bool = False) -> dict:
    if at_once:
        raise KeyError("a fault")
    return {"ends": lambda: os._exit(3), "refuses": refuse}


def test_what_is_refused_over_there_is_refused_here():
    with pytest.raises(ValueError, match="nothing to time"), Apart(refuse):
        pass
    with Apart(fail) as clocks, pytest.raises(ValueError, match="nothing to time"):
        clocks["refuses"]()


def test_a_process_that_ends_is_an_error(capfd):
    with pytest.raises(OSError, match="ended with status 1"), Apart(functools.partial(fail, at_once=True)):
        pass
    assert "a fault" in capfd.readouterr().err
    with Apart(fail) as clocks, pytest.raises(OSError, match="ended with status 3"):
        clocks["ends"]()
