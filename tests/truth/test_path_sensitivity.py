"""How much hangs on the path inside a candle: the three rules on candles worked out by hand, and what is provable."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HOLD, hand_market, order

from perpjax import AutoReset, EnvConfig, EnvParams, Market, PerpEnv, VecEnv
from perpjax._pytree import pytree
from perpjax.audit import PathSensitivity, Play, path_sensitivity
from perpjax.rules.orders import sample_action

pytestmark = pytest.mark.usefixtures("quick_compilation")

RULES = ("nearest", "pessimistic", "optimistic")
CONFIG = EnvConfig(max_lots=3, episode_length=6)
BARS = 601
"""100 windows of 6 bars, from 1, 7, ... All markets have this size, and all plays share three programs."""


def play(buys_once: bool, key: jax.Array, state, carry) -> tuple[jax.Array, tuple]:
    """Random actions; or one order, when nothing was opened since the reset, whatever happens then."""
    bought = state.account.ledger.opened > 0
    once = jnp.where(bought, jnp.asarray(HOLD), jnp.asarray(order(1, stop=0.5, target=0.5)))
    return jnp.where(buys_once, once, sample_action(key, CONFIG)), carry


BUY_ONCE, RANDOM = (jax.tree_util.Partial(play, jnp.asarray(x)) for x in (True, False))


@pytest.fixture(scope="module")
def wild() -> Market:
    """Candles between 840 and 1160 around 1000, every one of them on its own."""
    rng = np.random.default_rng(0)
    ends = rng.integers(900, 1101, (BARS, 3, 2))
    wicks = rng.integers(0, 61, (BARS, 3, 2))
    both = {
        (t, k): (ends[t, k, 0], ends[t, k].max() + wicks[t, k, 0], ends[t, k].min() - wicks[t, k, 1], ends[t, k, 1])
        for t, k in np.ndindex(BARS, 3)
    }
    return hand_market(both=both, atr=100, bars=BARS)


def test_one_ambiguous_candle_by_hand():
    """A lot in each window: 1000 steps, 10 quote a tick, margin 1000, L = 909 (markets.HAND), equity 10 000.

    ATR 100: stop and target 50 ticks away, at 950 and 1050. Bar 2: one candle from 900 to 1060 reaches all three.
    Bar 8: one from 940 to 1000 reaches the stop only. The other windows are flat.
    """
    market = hand_market(both={(2, 1): (1000, 1060, 900, 1000), (8, 1): (1000, 1000, 940, 960)}, atr=100, bars=BARS)
    found = path_sensitivity(PerpEnv(market, FREE, CONFIG), BUY_ONCE)
    # The first lot: nearest, stopped, -50 ticks = -500; pessimistic, liquidated, -1000; optimistic, target, +500.
    # The second lot is stopped under every rule: -500.
    expected = {
        "nearest": ([-0.05, -0.05], [0, 0], [1, 1], [0, 0]),
        "pessimistic": ([-0.10, -0.05], [1, 0], [0, 1], [0, 0]),
        "optimistic": ([0.05, -0.05], [0, 0], [0, 1], [1, 0]),
    }
    assert tuple(found.plays) == RULES
    for rule, (returns, *counts) in expected.items():
        play = found.plays[rule]
        np.testing.assert_allclose(play.returns, returns + [0] * 98, atol=1e-7, err_msg=rule)
        for got, wanted in zip((play.liquidations, play.stops, play.targets), counts, strict=True):
            np.testing.assert_array_equal(got, wanted + [0] * 98, err_msg=rule)
        # Of two lots that a price ended, one in a candle that does not say how.
        np.testing.assert_array_equal(play.ambiguous, [1] + [0] * 99, err_msg=rule)
        assert play.ambiguous_share == 0.5
    assert found.ambiguous_share == 0.5


def test_one_lot_is_never_better_off_under_the_harder_rule(wild):
    """The same lot ends in the same candle under every rule: by its target at best, at the cost of its margin at worst.

    True of one lot in a window, whatever the market; with a second order it need not be.
    """
    found = path_sensitivity(PerpEnv(wild, EnvParams(max_exposure=0.8, max_leverage=30.0), CONFIG), BUY_ONCE)
    returns = {rule: found.plays[rule].returns for rule in RULES}
    assert (returns["pessimistic"] <= returns["nearest"]).all()
    assert (returns["nearest"] <= returns["optimistic"]).all()
    assert found.difference("pessimistic")[0] < 0 < found.difference("optimistic")[0]
    nearest = found.plays["nearest"]
    ended = nearest.liquidations + nearest.stops + nearest.targets
    for play in found.plays.values():
        np.testing.assert_array_equal(ended, play.liquidations + play.stops + play.targets)
        np.testing.assert_array_equal(nearest.ambiguous, play.ambiguous)
    assert (nearest.ambiguous <= ended).all() and 0 < found.ambiguous_share < 1
    # Where no candle was ambiguous the rules agree to the last bit.
    for rule in RULES:
        np.testing.assert_array_equal(returns[rule][nearest.ambiguous == 0], returns["nearest"][nearest.ambiguous == 0])


def test_random_trading_is_seeded_and_its_own_rule_does_not_matter(wild):
    first, again, other = (
        path_sensitivity(PerpEnv(wild, FREE, dataclasses.replace(CONFIG, intrabar=rule)), RANDOM, seed=seed)
        for rule, seed in (("nearest", 0), ("optimistic", 0), ("nearest", 1))
    )
    for rule in RULES:
        np.testing.assert_array_equal(first.plays[rule].returns, again.plays[rule].returns)
        assert 0 < first.plays[rule].ambiguous_share < 1
    assert not np.array_equal(first.plays["nearest"].returns, other.plays["nearest"].returns)


def test_a_start_outside_the_market_is_an_error(wild):
    with pytest.raises(ValueError, match=f"start = {BARS}"):
        path_sensitivity(PerpEnv(wild, FREE, CONFIG), BUY_ONCE, starts=np.array([7, BARS]))


@pytree
class Idle:
    """A user's wrapper: no order reaches the market."""

    env: Any

    def reset(self, key, start=None):
        return self.env.reset(key, start)

    def step(self, state, action):
        return self.env.step(state, jnp.asarray(HOLD))


def test_an_auto_reset_is_left_out_and_a_wrapper_of_the_user_is_not(wild):
    env = PerpEnv(wild, FREE, CONFIG)
    plain, wrapped = path_sensitivity(env, RANDOM), path_sensitivity(VecEnv(AutoReset(env)), RANDOM)
    for rule in RULES:
        assert plain.plays[rule].returns.any()
        np.testing.assert_array_equal(plain.plays[rule].returns, wrapped.plays[rule].returns)
        np.testing.assert_array_equal(plain.plays[rule].ambiguous, wrapped.plays[rule].ambiguous)
    idle = path_sensitivity(AutoReset(Idle(AutoReset(env))), RANDOM)
    assert not any(idle.plays[rule].returns.any() for rule in RULES)


# What is made of the windows.


def returning(*returns: float, liquidations: float = 0, stops: float = 0, ambiguous: float = 0) -> Play:
    counts = (np.full(len(returns), float(x)) for x in (liquidations, stops, 0, ambiguous))
    return Play(np.array(returns), *counts)


BY_HAND = PathSensitivity(
    {
        "nearest": returning(-0.05, -0.05, stops=1, ambiguous=1),
        "pessimistic": returning(-0.10, -0.05, liquidations=1, stops=1, ambiguous=1),
        "optimistic": returning(0.05, -0.05),
    }
)


def test_means_and_paired_differences_by_hand():
    # -5, -5: mean -5, no spread. -10, -5: mean -7.5, deviations 2.5: s.d. sqrt(12.5), over sqrt 2: 2.5.
    assert BY_HAND.mean_return("nearest") == pytest.approx((-0.05, 0))
    assert BY_HAND.mean_return("pessimistic") == pytest.approx((-0.075, 0.025))
    # Less nearest: 0, 0; -5, 0: -2.5 +- 2.5; 10, 0: 5 +- 5.
    assert BY_HAND.difference("nearest") == (0, 0)
    assert BY_HAND.difference("pessimistic") == pytest.approx((-0.025, 0.025))
    assert BY_HAND.difference("optimistic") == pytest.approx((0.05, 0.05))


def test_the_share_is_of_the_lots_that_a_price_ended():
    assert [BY_HAND.plays[rule].ambiguous_share for rule in RULES] == [1.0, 0.5, 0.0]
    assert BY_HAND.ambiguous_share == 1.0


def test_the_table_says_it():
    rows = [" ".join(line.split()) for line in str(BY_HAND).splitlines()]
    assert "│ nearest │ -5.000 ± 0.000 │ - │ 0 │ 2 │ 0 │ 100.00 │" in rows
    assert "│ pessimistic │ -7.500 ± 2.500 │ -2.500 ± 2.500 │ 2 │ 2 │ 0 │ 50.00 │" in rows
    assert any("2 windows" in row for row in rows)


def test_a_single_window_has_no_standard_error():
    found = PathSensitivity(dict.fromkeys(RULES, returning(0.25)))
    assert found.mean_return("nearest")[0] == 0.25 and np.isnan(found.mean_return("nearest")[1])
    assert "nan" in str(found)
