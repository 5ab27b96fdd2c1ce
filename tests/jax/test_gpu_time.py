"""The timing of programs on a GPU, on this machine's CPU: what it measures, and what it makes of that."""

import itertools
import time

import pytest

from benchmarks import gpu_time
from benchmarks.gpu_ahead import CASES, Kernel
from benchmarks.gpu_time import Timed, fit, measure, show
from perpjax import EnvConfig, PerpEnv, load_market


def timed(kernels, bytes_, *samples, num_envs=100):
    listing = [Kernel("k", "fusion", bytes_, 0, "")] + [Kernel("k", "fusion", 0, 0, "")] * (kernels - 1)
    return Timed("rollout", num_envs, 0.0, listing, list(samples))


def test_constants_are_those_that_the_times_were_made_of():
    # 2 us a kernel, 4 TB/s; of three samples the median counts.
    rows = [(10, 4e6, 21e-6), (12, 40e6, 34e-6), (16, 400e6, 132e-6)]
    launch, bandwidth, error = fit([timed(k, b, s, 9.0, 0.0) for k, b, s in rows])
    assert launch == pytest.approx(2e-6)
    assert bandwidth == pytest.approx(4e12)
    assert error == pytest.approx(0, abs=1e-9)


def test_an_error_is_relative_to_what_was_measured():
    # The same program twice as slow once: no constants fit both, and the best are off by a half and a quarter or so.
    constants = fit([timed(10, 1e6, 1e-5), timed(10, 1e6, 2e-5), timed(10, 1e9, 1e-3)])
    assert 0.1 < constants.error < 0.5


@pytest.mark.parametrize("rows", [[], [(10, 1e6)], [(10, 1e6), (20, 2e6)]])
def test_too_little_fits_nothing(rows):
    assert fit([timed(k, b, 1e-5) for k, b in rows]) is None


@pytest.mark.parametrize(("program", "steps"), [("step", 300), ("rollout", 384)])
def test_a_sample_is_the_time_of_a_step(program, steps, monkeypatch):
    env = PerpEnv(load_market("synthetic:signal"), config=EnvConfig(max_lots=2))
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    result = measure(program, CASES[program](env, 8), 8, samples=2, steps=300)
    # Asked for twice, the clock has gone on by one.
    assert result.samples == [1 / steps] * 2
    assert result.compile_seconds == 1
    assert result.kernels
    assert result.rates == [8 * steps / 1e6] * 2


def test_a_line_for_every_program(capsys):
    from rich.console import Console

    Console(width=200).print(show([timed(10, 4e6, 20e-6, num_envs=1000)], "a device"))
    line = next(x for x in capsys.readouterr().out.splitlines() if "rollout" in x)
    # 1000 environments in 20 us are 50 million a second, of 4000 bytes each.
    assert [x for x in ("1000", "10", "4000", "20.0", "50.0") if x not in line.split()] == []


def test_without_a_gpu_it_says_what_to_do(capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_time.main([])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "jax[cuda13]" in error and "benchmarks.gpu_ahead" in error


def test_a_size_that_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_time.main(["--num-envs", "0"])
    assert "num_envs is (0,)" in capsys.readouterr().err
