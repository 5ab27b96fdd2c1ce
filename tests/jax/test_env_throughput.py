"""What the comparison with the limit and the rival counts and judges, without timing anything."""

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from benchmarks.env_throughput import Figure, Speeds, compare_sides, count_bytes_accessed, show_figures


def test_what_is_gathered_counts_as_gathered():
    table, index = jnp.zeros((1000, 8)), jnp.arange(10)
    compiled = jax.jit(lambda table, index: 2 * table[index]).lower(table, index).compile()
    # Ten indices, ten rows of eight floats, as much written; not the 32 000 bytes of the table.
    assert count_bytes_accessed(compiled) == 10 * 4 + 2 * 10 * 8 * 4


@pytest.mark.parametrize(
    ("figure", "met"),
    [
        (Figure("a", [1.0, 2.0, 9.0], 2.0), True),
        (Figure("a", [1.0, 3.0, 9.0], 2.0), False),
        (Figure("a", [1.0, 3.0, 9.0], 3.0, at_least=True), True),
        (Figure("a", [1.0, 2.0, 9.0], 3.0, at_least=True), False),
        (Figure("a", [], 3.0), None),
        (Figure("a", [1.0]), None),
    ],
)
def test_the_median_meets_a_goal(figure, met):
    assert figure.met is met


def test_a_line_says_what_the_goal_was(capsys):
    Console(width=100).print(show_figures([Figure("bytes", [8000.0], 6000, 4000), Figure("by XLA", [9000.0])]))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "bytes 8000 <= 6000 (4000) NO" in lines
    assert "by XLA 9000 - -" in lines


def test_a_ratio_is_that_of_neighbours():
    # Seconds of bare and limit in four turns; 2, 1, 0.5 and 0.5 times as fast.
    speeds = Speeds(64, 512, {"bare": [1.0, 2.0, 4.0, 2.0], "limit": [2.0, 2.0, 2.0, 1.0]}, {})
    at_64, *others = compare_sides([speeds])
    assert at_64.samples == [2.0, 1.0, 0.5, 0.5] and at_64.met
    assert [(x.samples, x.met) for x in others] == [([], None)] * 3


def test_a_limit_has_as_many_threads_as_are_fastest():
    speeds = Speeds(1_000_000, 1, {"limit on 1": [4.0, 4.0, 9.0], "limit on 2": [5.0, 5.0, 1.0], "bare": [8.0] * 3}, {})
    assert speeds.rate("limit") == 0.25
    assert speeds.ratios("bare / limit") == [0.5, 0.5, 9 / 8]
    assert speeds.rate("spinning") is None and speeds.ratios("bare / spinning") == []
