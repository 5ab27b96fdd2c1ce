"""Rule 11: the two rewards, called with numbers, against results worked out by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from perpjax.params import EnvParams
from perpjax.rules.rewards import Outcome, log_return, shaped

PARAMS = EnvParams(
    initial_equity=1000.0, entry_penalty=0.25, risk_penalty=0.5, liquidation_penalty=2.0, ruin_penalty=8.0
)


def outcome(change: float, before: float, after: float, **terms: float | bool | int) -> Outcome:
    """Of a step in which nothing else happened but for the terms given."""
    rest = dict(opened=False, liquidated=0, notional=0.0, move=0.0625, ruined=False) | terms
    return Outcome(*(jnp.float32(x) for x in (change, before, after)), **{k: jnp.asarray(x) for k, x in rest.items()})


@pytest.mark.parametrize("delta, before, after, expected", [
    (100, 1000, 1100, math.log(1.1)),
    (-500, 1000, 500, math.log(0.5)),
    # A hundredth of a cent on ten million: after / before would be 1 in float32.
    (1e-4, 1e7, 1e7, 1e-11),
    # The floor is 1e-3 * 1000 = 1; below it delta is not what counts: from 4 to 1, from 1 to 8, from 1 to 1.
    (-3.5, 4, 0.5, math.log(1 / 4)),
    (-34, 4, -30, math.log(1 / 4)),
    (7.5, 0.5, 8, math.log(8)),
    (10, -2, 8, math.log(8)),
    (-0.25, 0.5, 0.25, 0),
    # At the floor itself both say the same.
    (-3, 4, 1, math.log(1 / 4)),
    (3, 1, 4, math.log(4)),
])  # fmt: skip
def test_log_return(delta, before, after, expected):
    np.testing.assert_allclose(log_return(outcome(delta, before, after), PARAMS), expected, rtol=1e-6)


@pytest.mark.parametrize("terms, after, expected", [
    ({}, 400, 0),
    ({"opened": True}, 400, -0.25),
    # 0.5 * 200 / 400 * 0.0625.
    ({"notional": 200.0}, 400, -0.015625),
    ({"notional": 200.0, "move": 0.25}, 400, -0.0625),
    # Equity counts as at least 1: 0.5 * 2 / 1 * 0.0625.
    ({"notional": 2.0}, 0.5, -0.0625),
    ({"notional": 2.0}, -7, -0.0625),
    ({"liquidated": 3}, 400, -6),
    ({"ruined": True}, 400, -8),
    ({"opened": True, "notional": 200.0, "liquidated": 1, "ruined": True}, 400, -0.25 - 0.015625 - 2 - 8),
])  # fmt: skip
def test_each_penalty_of_the_shaped_reward(terms, after, expected):
    # Equity does not move, or lies under the floor of 1 on both sides: the log return is 0.
    assert float(shaped(outcome(0, after, after, **terms), PARAMS)) == expected
