"""Evaluation: windows, the two baselines, and statistics equal to those of a plain Python loop."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, crash_market, hand_market, order
from rich.console import Console

from perpjax import AutoReset, EnvConfig, EnvParams, PerpEnv, State, VecEnv, concatenate_markets
from perpjax.rollout import play_windows
from perpjax.rules.orders import MULTI_DISCRETE, hold_action
from train.evaluate import Result, flat, measure_windows, random, t_statistic, window_starts
from train.table import make_table

LENGTH = 24
CONFIG = EnvConfig(max_lots=3, episode_length=LENGTH)
WILD = EnvParams(max_exposure=0.8, max_leverage=30.0, ruin_fraction=0.8)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def env() -> PerpEnv:
    """Wild enough that random trading is ruined in some windows."""
    return PerpEnv(crash_market(bars=673 + 10 * LENGTH + 7), WILD, CONFIG)


def test_flat_is_exactly_nothing(env):
    result = measure_windows(env, flat(env), jax.random.key(0))
    assert set(map(len, result)) == {10}
    for name, x in result._asdict().items():
        np.testing.assert_array_equal(x, 0.0, err_msg=name)
    assert math.isnan(result.t_stat())


def test_windows_are_rows(env):
    episodes = play_windows(env, random(env), jax.random.key(0), window_starts(env))
    third = jax.tree.map(lambda x: x[2], episodes)
    assert third.ledger.opened == episodes.ledger.opened[2] > 0 and third.ledger.verdicts.sum() == third.length


def test_random_is_seeded(env):
    act = jax.tree_util.Partial(random(env))
    first, again, other = (measure_windows(env, act, jax.random.key(seed)) for seed in (3, 3, 4))
    for name, a, b, c in zip(Result._fields, first, again, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        assert name == "liquidations" or not np.array_equal(a, c), name
    assert (first.trades > 0).all() and (first.fees > 0).all()
    # Windows of one call do not share their random numbers.
    assert len(np.unique(first.returns)) == len(first.returns)


def test_each_window_has_its_own_memory(env):
    """The policy opens a lot where the bar that it remembers is even, and remembers the sum of the bars so far."""

    def act(key, state, carry):
        chosen = jnp.where(carry % 2 == 0, jnp.asarray(order(1, stop=3.0)), hold_action(CONFIG))
        return chosen, carry + state.t

    starts = np.array([700, 801])
    table = np.zeros((env.market.num_bars + 1, 5), np.int32)
    episodes = play_windows(env, act, jax.random.key(0), starts, jnp.int32(1))
    for i, start in enumerate(starts):
        remembered = 1 + np.cumsum(np.r_[0, np.arange(start, start + LENGTH - 1)])
        table[start : start + LENGTH] = np.where(remembered[:, None] % 2 == 0, order(1, stop=3.0), hold_action(CONFIG))
        expected = follow_by_hand(env, table[start : start + LENGTH], int(start))
        assert float(episodes.ledger.opened[i]) == expected["trades"] > 0
        assert float(episodes.equity[i]) == pytest.approx(float(env.params.initial_equity) * (1 + expected["returns"]))
    assert episodes.ledger.opened[0] != episodes.ledger.opened[1] or episodes.equity[0] != episodes.equity[1]


def test_wrappers_are_left_out(env):
    act = jax.tree_util.Partial(random(env))
    plain = measure_windows(env, act, jax.random.key(3))
    for wrapped in (AutoReset(env), VecEnv(AutoReset(env))):
        np.testing.assert_array_equal(window_starts(wrapped), window_starts(env))
        for a, b in zip(plain, measure_windows(wrapped, act, jax.random.key(3)), strict=True):
            np.testing.assert_array_equal(a, b)
        drawn, same = (random(e)(jax.random.key(1), None, ())[0] for e in (wrapped, env))
        assert drawn.tolist() == same.tolist()
        assert flat(wrapped)(None, None, ())[0].tolist() == flat(env)(None, None, ())[0].tolist()
        with pytest.raises(ValueError, match="start = 3 is not a bar"):
            measure_windows(wrapped, act, jax.random.key(3), np.array([3]))


# Windows.


def starts_of(spans: list[tuple[int, int]], length: int) -> list[list[int]]:
    """Windows of each (first, last) span, from a market of several segments."""
    markets = [hand_market(bars=last + 1, first=first) for first, last in spans]
    env = PerpEnv(concatenate_markets(markets), FREE, EnvConfig(episode_length=length))
    starts, rows, out = window_starts(env), np.cumsum([0] + [last + 2 for _, last in spans]), []
    for row, following in itertools.pairwise(rows):
        out.append([int(s - row) for s in starts if row <= s < following])
    assert sum(map(len, out)) == len(starts)
    return out


def test_windows_fit_and_do_not_overlap():
    # Bars 1 .. 12: 12 bars are three windows of 4 at 1, 5, 9; the last one trades bars 9, 10, 11, 12.
    assert starts_of([(1, 12)], 4) == [[1, 5, 9]]
    # One bar less and the third does not fit; one more changes nothing.
    assert starts_of([(1, 11)], 4) == [[1, 5]]
    assert starts_of([(1, 13)], 4) == [[1, 5, 9]]
    assert starts_of([(3, 6)], 4) == [[3]]
    # Segments are cut each for itself; one without room for an episode has no window.
    assert starts_of([(1, 9), (2, 4), (5, 12)], 4) == [[1, 5], [], [5, 9]]


def test_windows_of_a_real_market(env):
    starts, (first,), (last,) = window_starts(env), env.market.segments.first, env.market.segments.last
    assert starts[0] == first and (np.diff(starts) == LENGTH).all()
    assert last - LENGTH < starts[-1] + LENGTH - 1 <= last


# Statistics.


def test_t_statistic_by_hand():
    # 1, 2, 3, 6: mean 3, deviations 2 1 0 3, variance (4 + 1 + 0 + 9) / 3 = 14/3, s.e. sqrt(14/3 / 4) = sqrt(7/6)
    assert t_statistic(np.array([1.0, 2.0, 3.0, 6.0])) == pytest.approx(3 / math.sqrt(7 / 6))
    assert t_statistic(-np.array([1.0, 2.0, 3.0, 6.0])) == pytest.approx(-3 / math.sqrt(7 / 6))
    # No spread, or nothing to have one: no value, without a warning. (0.1 is not the mean of three in float64.)
    for x in ([], [5.0], [0.0, 0.0], [1.0, 1.0], [0.1, 0.1, 0.1]):
        assert math.isnan(t_statistic(np.array(x)))


def result_of(*returns: float) -> Result:
    return Result(np.array(returns), np.array(returns), *[np.zeros(len(returns))] * 6)


@pytest.mark.parametrize(
    "returns, cells, against",
    [((0.02,), ["+2.000", "-", "-"], "-"), ((0.02, 0.04), ["+3.000", "1.000", "+3.0"], "+3.0")],
)
def test_the_table_shows_a_dash_for_a_t_without_a_value(returns, cells, against, capsys):
    nothing = [0.0] * len(returns)
    results = {"final": result_of(*returns), "flat": result_of(*nothing), "random": result_of(*nothing)}
    Console(width=100).print(make_table(results, "title"))
    out = capsys.readouterr().out
    rows = {
        row[0]: row[1:4] for row in ([x.strip() for x in line.split("│")[1:-1]] for line in out.splitlines()) if row
    }
    assert rows["final"] == cells
    assert rows["flat"][2] == rows["random"][2] == "-"
    assert f"final against random: {against}." in " ".join(out.split()) and "nan" not in out
    assert "chosen on this split" not in out
    Console(width=100).print(make_table({"best": result_of(*returns)} | results, "title"))
    assert "chosen on this split" in " ".join(capsys.readouterr().out.split())


def follow_by_hand(env: PerpEnv, actions: np.ndarray, start: int) -> dict[str, float]:
    """One episode with `env.step` and nothing else: what the windows' statistics should be."""
    state = env.reset(jax.random.key(0), start)
    peak = initial = float(env.params.initial_equity)
    drawdown = 0.0
    for action in actions:
        state = step(env, state, action)
        peak = max(peak, float(state.equity))
        drawdown = max(drawdown, 1 - float(state.equity) / peak)
        if state.terminated or state.truncated:
            break
    ledger = state.account.ledger
    return dict(
        returns=float(state.equity) / initial - 1,
        closed_returns=close_by_hand(env, state) / initial - 1,
        max_drawdown=drawdown,
        trades=float(ledger.opened),
        fees=float(ledger.fees) / initial,
        slippage=float(ledger.slippage) / initial,
        funding=float(ledger.funding) / initial,
        liquidations=float(ledger.liquidated),
        terminated=bool(state.terminated),
    )


def close_by_hand(env: PerpEnv, state: State) -> float:
    """The wallet after closing every lot at the last valid close, with slippage and fee."""
    bar, lots, p = env.market.bar(state.t - 1), jax.tree.map(np.asarray, state.account.lots), env.params
    close, wallet, tick_value = (
        float(bar.close[-1]),
        float(state.account.wallet),
        float(env.market.instrument.tick_value),
    )
    slip = math.ceil(float(p.slippage_base) * close + float(p.slippage_atr) * float(bar.atr))
    for i in np.flatnonzero(lots.quantity):
        fill = max(close - lots.side[i] * slip, 1.0)
        gain = max(lots.side[i] * lots.quantity[i] * (fill - lots.entry[i]) * tick_value, -lots.margin[i])
        wallet += gain - min(float(p.taker_fee) * lots.quantity[i] * fill * tick_value, lots.margin[i] + gain)
    return float(wallet)


step = jax.jit(PerpEnv.step)


def scripted(env: PerpEnv, seed: int) -> tuple[np.ndarray, jax.tree_util.Partial]:
    """Wild actions for every bar, and the policy that plays them: it reads the bar off the state."""
    rng = np.random.default_rng(seed)
    table = rng.integers(0, MULTI_DISCRETE, (env.market.num_bars + 1, 5)).astype(np.int32)
    table[:, 0] = rng.choice([0, 1, 1, 1, 2, 3], len(table), p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    table[:, 2] = 4
    return table, jax.tree_util.Partial(lambda table, key, state, carry: (table[state.t], carry), jnp.asarray(table))


def test_statistics_equal_a_plain_loop(env):
    """Also where an episode is ruined early: what it had then is kept, whatever the next episode in its place does."""
    table, act = scripted(env, 0)
    starts = window_starts(env)
    result = measure_windows(env, act, jax.random.key(0))
    expected = [follow_by_hand(env, table[s : s + LENGTH], int(s)) for s in starts]
    for name, x in result._asdict().items():
        np.testing.assert_allclose(x, [e[name] for e in expected], rtol=1e-5, atol=1e-6, err_msg=name)
    ruined = [e["terminated"] for e in expected]
    assert any(ruined) and not all(ruined)
    assert result.liquidations.sum() > 0
    np.testing.assert_array_equal(result.returns <= 0.8 - 1 + 1e-6, ruined)


def test_given_starts_are_played_as_given(env):
    """Explicit first bars, overlapping and in any order; one too close to the end is cut there."""
    table, act = scripted(env, 1)
    last = int(env.market.segments.last[0])
    starts = np.array([900, 674, 675, last - 3, last])
    result = measure_windows(env, act, jax.random.key(0), starts)
    expected = [follow_by_hand(env, table[s : s + LENGTH], int(s)) for s in starts]
    for name, x in result._asdict().items():
        np.testing.assert_allclose(x, [e[name] for e in expected], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_start_outside_the_market_is_an_error(env):
    """`reset` says so of a concrete bar; inside the compiled evaluation it could only clip it, and play another one."""
    for start in (0, 672, env.market.num_bars, 10**6):
        with pytest.raises(ValueError, match=str(start)):
            measure_windows(env, flat(env), jax.random.key(0), np.array([700, start]))


def test_ruin_in_the_first_bar_is_not_forgotten():
    """Hand-made: ruined in bar 1 of a window of 6; the five bars that follow belong to nobody."""
    # 1000 steps at 1000 ticks, 10x, margin 1000 of 10 000 (markets.HAND): liquidated by a mark low of 900.
    market = hand_market(both={(1, 1): (1000, 1000, 850, 1000)}, atr=100, bars=13)
    env = PerpEnv(market, EnvParams(**{k: 0.0 for k in ("taker_fee", "slippage_base", "slippage_atr", "stop_depth")},
                                    ruin_fraction=0.95), EnvConfig(max_lots=3, episode_length=6))  # fmt: skip
    act = jax.tree_util.Partial(lambda key, state, carry: (jnp.asarray(order(1, stop=3.0)), carry))
    result = measure_windows(env, act, jax.random.key(0))
    # The first window loses its one margin: 9000 / 10 000 - 1 = -10 %, at or below 95 %: over. The other one opens a
    # lot in each of its first bars (an exposure of 10 % has room for one only) and moves nowhere.
    np.testing.assert_allclose(result.returns, [-0.1, 0], atol=1e-7)
    np.testing.assert_allclose(result.max_drawdown, [0.1, 0], atol=1e-7)
    np.testing.assert_array_equal(result.trades, [1, 1])
    np.testing.assert_array_equal(result.liquidations, [1, 0])
