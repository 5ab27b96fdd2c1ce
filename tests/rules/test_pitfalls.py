"""PITFALLS 1 to 12: the published bugs of other trading environments, each with the test that would have caught it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HOLD, crash_market, expect, hand_market, order, play

from perpjax.data.markets import slice_market
from perpjax.env import PerpEnv
from perpjax.instrument import Instrument
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.orders import CLOSE
from perpjax.state import State

BAR, CANDLES = 690, 5
LOOSE = EnvParams(max_exposure=0.5, ruin_fraction=0.0)
PLAIN = EnvConfig(max_lots=5, episode_length=20)


@jax.jit
def rollout(env: PerpEnv, actions: jax.Array) -> State:
    """[22] states from bar 680: the first, and those after each of 21 actions."""
    first = env.reset(jax.random.key(0), jnp.int32(680))

    def advance(state: State, action: jax.Array) -> tuple[State, State]:
        state = env.step(state, action)
        return state, state

    states = jax.lax.scan(advance, first, actions)[1]
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, states)


ACTIONS = np.random.default_rng(2).integers(0, [3, 4, 5, 4, 5], (21, 5)).astype(np.int32)


def test_1_nothing_after_the_clock_is_seen():
    market = crash_market(bars=720)
    true = jax.device_get(rollout(PerpEnv(market, LOOSE, PLAIN), ACTIONS))
    assert int(true.account.ledger.opened[-1]) > 3
    i = BAR - 680  # the state at decision BAR
    columns = np.asarray(market.candles)
    k, noise = CANDLES, np.random.default_rng(3)

    # Candle rows >= BAR, feature and ATR rows > BAR: the state at decision BAR, its reward and all before are the
    # same bits.
    changed = columns.copy()
    mark_before = changed[BAR, -1]
    changed[BAR:, : 8 * k] = np.round(changed[BAR:, : 8 * k] * noise.uniform(0.2, 3, (len(changed) - BAR, 8 * k)))
    changed[BAR:, 8 * k :] = noise.random((len(changed) - BAR, k + 3))
    changed[BAR, -1] = mark_before  # the mark close of bar BAR - 1
    future = market.with_columns(changed, market.atr.at[BAR + 1 :].mul(7), market.features.at[BAR + 1 :].add(5))
    other = jax.device_get(rollout(PerpEnv(future, LOOSE, PLAIN), ACTIONS))

    def until_bar(states: State) -> State:
        return jax.tree.map(lambda x: x[: i + 1], states.replace(key=np.zeros(22)))

    chex.assert_trees_all_equal(until_bar(true), until_bar(other))
    assert not np.array_equal(true.equity[i + 1 :], other.equity[i + 1 :])

    # The rest of bar BAR cannot move what was filled at its open: entry, quantity, levels and fee of an order
    # placed there.
    actions = ACTIONS.copy()
    actions[:i] = HOLD
    actions[i] = order(1)
    flat = columns.copy()
    flat[BAR, 8 * k : 9 * k] = 1
    calm = jax.device_get(rollout(PerpEnv(market.with_columns(flat), LOOSE, PLAIN), actions))
    late = flat.copy()
    opens = late[BAR, [0, 4 * k]]
    late[BAR, : 8 * k] = np.round(late[BAR, : 8 * k] * noise.uniform(0.99, 1.01, 8 * k))
    late[BAR, [0, 4 * k]] = opens
    late[BAR, 8 * k + 1 : 9 * k] = 0  # and all later candles of the bar are missing
    moved = jax.device_get(rollout(PerpEnv(market.with_columns(late), LOOSE, PLAIN), actions))
    for name in ("opened", "verdicts", "fees"):
        a, b = (getattr(s.account.ledger, name)[i + 1] for s in (calm, moved))
        if name != "fees" or (calm.account.lots.quantity[i + 1] > 0).any():
            chex.assert_trees_all_equal(a, b)
    for name in ("entry", "quantity", "margin", "stop", "target", "liquidation"):
        a, b = (getattr(s.account.lots, name)[i + 1] for s in (calm, moved))
        chex.assert_trees_all_equal(a, b)


def test_1_a_shorter_market_is_the_same_until_it_ends():
    market = crash_market(bars=720)
    whole = jax.device_get(rollout(PerpEnv(market, LOOSE, PLAIN), ACTIONS))
    cut = jax.device_get(rollout(PerpEnv(slice_market(market, 0, 695), LOOSE, PLAIN), ACTIONS))
    i = 695 - 680
    for name in ("obs", "reward", "equity"):
        chex.assert_trees_all_equal(getattr(whole, name)[: i + 1], getattr(cut, name)[: i + 1])
    assert bool(cut.truncated[i]) and not bool(whole.truncated[i])


def test_2_order_inside_step():
    # The action is not dropped when a lot ends in the same bar: the stop of lot 1 (candle 1) and a second entry.
    market = hand_market(last={(2, 1): (1000, 1000, 945, 1000)}, atr=100)
    state = play(market, order(1, size=0.25, stop=0.5), order(1, size=0.25, stop=1.0))[-1]
    expect(state, opened=2, stopped=1, open_lots=1)
    # The entry bar is checked, and a bar that liquidated is not shown as healthy: equity, reward and observation.
    market = hand_market(mark={(1, 1): (1000, 1000, 900, 1000)}, atr=100)
    state = play(market, order(1, stop=3.0))[-1]
    expect(state, liquidated=1, equity=9_000, reward=np.log(0.9), open_lots=0)
    chex.assert_trees_all_close(np.asarray(state.obs[1:]), np.float32([0, 0, 0, 0, 0, 0, 0, 1, 0.1]), rtol=1e-6)
    # A level set at entry is never moved by the bars after it.
    market = hand_market(both={(2, 2): (1000, 1040, 1000, 1040)}, atr=[100, 100, 7, 9, 200, 1, 1, 1, 1])
    levels = [s.account.lots.stop[0] for s in play(market, order(1, stop=1.0), HOLD, HOLD)[1:]]
    assert [float(x) for x in levels] == [900, 900, 900]


def test_3_a_stop_nearer_than_liquidation_comes_first():
    # At 10x the stop is at -50, L at -91; a candle falls through both: 500 are lost, not 1000.
    market = hand_market(both={(2, 1): (1000, 1000, 880, 890)}, atr=100)
    expect(play(market, order(1, stop=0.5), HOLD)[-1], stopped=1, liquidated=0, wallet=9_500)
    # With an opening gap on the mark past L there was no stop in between.
    market = hand_market(both={(2, 1): (900, 900, 880, 890)}, atr=100)
    expect(play(market, order(1, stop=0.5), HOLD)[-1], stopped=0, liquidated=1, wallet=9_000)


def test_4_gaps_are_not_filled_at_the_trigger():
    # Stop at 950; the candle opens at 930: the fill is 930, and with depth 1/2 of the way to 910, 920.
    for depth, fill in ((0.0, 930), (0.5, 920)):
        market = hand_market(last={(2, 1): (930, 960, 910, 950)}, atr=100)
        state = play(market, order(1, stop=0.5), HOLD, params=FREE.replace(stop_depth=depth))[-1]
        expect(state, stopped=1, realised=10 * (fill - 1000))


def test_5_liquidation_by_a_wick_that_recovers():
    # Mark 1000 -> 909 -> 1000 inside one candle: gone. Equity is never negative and never comes back.
    market = hand_market(mark={(2, 1): (1000, 1000, 909, 1000)}, atr=100)
    states = play(market, order(1, stop=3.0), HOLD, HOLD, HOLD)
    expect(states[2], liquidated=1, equity=9_000)
    assert all(float(s.equity) == 9_000 for s in states[2:])


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_6_funding_over_k_settlements(side):
    # Opened in bar 1; settlements at bars 1, 2, 4, 5 (prices 1000, 990, 1020, 1010) of changing rate and interval,
    # none at bar 3: pays rate * price * 10 for those of bars 2, 4, 5, and nothing for the bar it opened in.
    rates = {1: (0.01, 1000), 2: (0.001, 990), 4: (-0.002, 1020), 5: (0.0005, 1010)}
    states = play(hand_market(funding=rates, atr=100), order(side), *[HOLD] * 5)
    expected = np.cumsum([0, 0, 10 * 0.99, 0, -20 * 1.02, 5 * 1.01]) * side
    for state, paid in zip(states[1:], expected[[0, 2, 3, 4, 5, 5]], strict=True):
        expect(state, funding=paid, wallet=10_000 - paid, rtol=1e-5)
    # Closed at the open of the settlement's bar: it was held at that open and pays; the bar after: nothing more.
    states = play(hand_market(funding=rates, atr=100), order(side), order(CLOSE), HOLD, HOLD, HOLD)
    for state in states[2:]:
        expect(state, funding=9.9 * side, rtol=1e-5)


def test_7_money_at_the_edge():
    # 99.9997 < 100: a wallet of exactly the minimum is enough, and one step of 50.0 meets min_notional 50.
    edge = Instrument("EDGE", 1.0, 0.05, 50.0, 1e5, brackets=((0, 1e6, 50, 0.01, 0),))
    params = FREE.replace(initial_equity=50.0, max_exposure=1.0)
    state = play(hand_market(instrument=edge), order(1, leverage=1.0), params=params)[-1]
    expect(state, opened=1, lot_quantity=1, lot_margin=50)
    # A tick of 0.1 times a step of 0.001 is not a float32: still exactly 1000 steps of notional 10 000.
    cents = Instrument("CENT", 0.1, 0.1, 5.0, 1e5, brackets=((0, 1e6, 50, 0.01, 0),))
    expect(play(hand_market(instrument=cents), order(1))[-1], lot_quantity=1000, lot_margin=1000)
    # Every price is a whole number of ticks: a stop at 950 is met by a low of 950, at any size of price.
    for price in (1000, 2**23 - 1000):
        market = hand_market(price=price, last={(2, 1): (price, price, price - 51, price)}, atr=102)
        params = FREE.replace(initial_equity=1e7)
        expect(play(market, order(1, leverage=1.0, stop=0.5), HOLD, params=params)[-1], stopped=1)
        market = hand_market(price=price, last={(2, 1): (price, price, price - 50, price)}, atr=102)
        expect(play(market, order(1, leverage=1.0, stop=0.5), HOLD, params=params)[-1], stopped=0, open_lots=1)


def test_8_the_reward_is_the_account():
    # Open and close at a flat price costs the two fees and twice the slippage, exactly, in the reward as in the
    # wallet. Slip 21: E = 1021, out at 979, q = 979: P = -979 * 42 * 0.01 = -411.18; fees (9995.59 + 9584.41) / 1024.
    params = EnvParams(taker_fee=1 / 1024, slippage_base=1 / 64, slippage_atr=0.5)
    states = play(hand_market(), order(1, stop=3.0), order(CLOSE), params=params)
    wallet = 10_000 - 411.18 - 19.121094
    expect(states[-1], wallet=wallet, equity=wallet, realised=-411.18, fees=19.121094)
    total = float(states[1].reward) + float(states[2].reward)
    np.testing.assert_allclose(total, np.log(wallet / 10_000), rtol=1e-5)
    # Fees never make money: dearer is worse.
    rewards = []
    for fee in (0.0, 1 / 1024, 1 / 64):
        states = play(hand_market(), order(1, stop=3.0), order(CLOSE), params=params.replace(taker_fee=fee))
        rewards.append(sum(float(s.reward) for s in states))
    assert rewards[0] > rewards[1] > rewards[2]
    # At a liquidation margin and loss are not both subtracted.
    market = hand_market(mark={(2, 2): (1000, 1000, 905, 905)}, atr=100)
    expect(play(market, order(1, stop=3.0), HOLD)[-1], equity=9_000, reward=np.log(0.9), wallet=9_000)


def test_9_truncation_is_not_death():
    states = play(hand_market(atr=100), order(1), *[HOLD] * 5)
    expect(states[-1], truncated=True, terminated=False, open_lots=1)
    # Its observation is that of the state it ended in, lot and all: the value to bootstrap from.
    chex.assert_trees_all_close(np.asarray(states[-1].obs[:3]), np.float32([7, 1 / 3, 1]))


def test_10_no_silent_defaults():
    # The distance to liquidation is not pinned at 1 while a lot has one.
    state = play(hand_market(atr=100), order(1))[-1]
    np.testing.assert_allclose(state.obs[-2], 0.091, rtol=1e-5)
    # Candles in which nothing traded fill nothing: a CLOSE waits for the next valid open, and the policy is told.
    market = hand_market(invalid=[(2, k) for k in range(3)], atr=100)
    states = play(market, order(1), order(CLOSE), order(CLOSE))
    expect(states[2], closed=0, open_lots=1, verdicts=[0, 1, 0, 0, 0, 0, 0, 0, 1])
    expect(states[3], closed=1, open_lots=0)
    # The seed reaches the generator.
    env = PerpEnv(hand_market(bars=30), FREE, EnvConfig(episode_length=2))
    assert len({int(env.reset(jax.random.key(i)).t) for i in range(12)}) > 4
    assert int(env.reset(jax.random.key(4)).t) == int(env.reset(jax.random.key(4)).t)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_11_a_round_trip_at_a_flat_price_always_loses(side):
    for base, atr, fee in ((0.0002, 0.0, 0.0), (0.0, 0.01, 0.0), (0.0, 0.0, 0.0006), (0.0002, 0.1, 0.0006)):
        params = EnvParams(slippage_base=base, slippage_atr=atr, taker_fee=fee)
        states = play(hand_market(), order(side, stop=3.0), order(CLOSE), params=params)
        assert float(states[-1].account.wallet) < 10_000 - 5, (base, atr, fee)


def test_12_maintenance_is_of_the_notional_at_the_price_reached():
    # Equity 1e6: M = 50 000 at 5x, notional 250 000 (bracket 2). Looked up with the stake (50 000) it is bracket 1:
    # (200 - 10) / 0.99 = 191.9; bracket 2: (51 000 / 250 - 20) / 0.98 = 187.8 -> L = 812, not 808.
    params = FREE.replace(initial_equity=1e6, max_exposure=0.05)
    state = play(hand_market(atr=100), order(1, leverage=5.0), params=params)[-1]
    expect(state, lot_margin=50_000, lot_quantity=25_000, lot_liquidation=812)
    # Frozen at the entry notional it would be 200 - (0.02 * 1000 - 4) = 184 ticks: 816.
    margin = 50_000 + (812 - 1000) * 250
    assert margin <= 0.02 * 812 * 250 - 1000 < margin + 250
    # A short's maintenance grows: (204 - 20) / 1.02 = 180.4 -> 1181; frozen, 184: 1184.
    state = play(hand_market(atr=100), order(-1, leverage=5.0), params=params)[-1]
    expect(state, lot_liquidation=1181)
