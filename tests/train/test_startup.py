"""The benchmark of a run's start."""

import pytest

from benchmarks.startup import Args, Times, summarise, time_run


def test_a_start_is_timed(tmp_path):
    times = time_run(Args(num_envs=16, total_steps=512), tmp_path / "run", tmp_path / "cache")
    assert 0 < times.first_update < times.end
    assert (tmp_path / "run" / "evaluation.json").exists() and any((tmp_path / "cache").iterdir())


def test_a_failed_run_is_told(tmp_path, capfd):
    with pytest.raises(OSError, match="status 2"):
        time_run(Args(num_envs=16, total_steps=100), tmp_path / "run", tmp_path / "cache")
    assert "less than one update" in capfd.readouterr().err


def test_a_row_has_the_median_and_the_slowest():
    row = summarise("empty", [Times(1.0, 2.0), Times(3.0, 5.0), Times(2.0, 9.0)])
    assert row == {"cache": "empty", "first_update": 2.0, "first_update_slowest": 3.0, "end": 5.0, "end_slowest": 9.0}
