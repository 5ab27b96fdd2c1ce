"""Baselines: buy and hold by hand, schedules that know no future, and draws that trade as the policy does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.compute as pc
import pytest
from markets import FREE, crash_market, hand_market, order, stacked

from perpjax import EnvConfig, EnvParams, PerpEnv
from perpjax.data.markets import concatenate_markets
from perpjax.instrument import Instrument
from perpjax.market import Market, Origin, Segments
from train.evaluate import lots as lot_rows
from train.evaluate.account import Played, play_account
from train.evaluate.baselines import (
    END,
    NEVER,
    POLICY_RUIN,
    RUIN,
    Baseline,
    Habits,
    draw_schedules,
    find_habits,
    find_place,
    hold_position,
    play_baselines,
    schedule_carry,
    schedule_trend,
)
from train.evaluate.measures import daily_returns
from train.evaluate.windows import flat


def find_lots(played):
    return lot_rows.find_lots(played)[0]


pytestmark = pytest.mark.usefixtures("quick_compilation")

ENTER = np.stack([order(side, 1.0, 10.0, 3.0, 6.0) for side in (1, -1)])


def often(key, state, carry):
    """Enter in one bar of 20, long in three cases of four, and close in one of ten."""
    enters, closes, side = jax.random.uniform(key, (3,))
    long_or_short = jnp.where(side < 0.75, ENTER[0], ENTER[1])
    held = (state.account.lots.quantity > 0).any()
    close = jnp.asarray(order(2))
    action = jnp.where(held, jnp.where(closes < 0.1, close, 0), jnp.where(enters < 0.05, long_or_short, 0))
    return action.astype(jnp.int32), carry


OFTEN = jax.tree_util.Partial(often)


def play(market: Market, params: EnvParams | None = None, act=OFTEN, key: int = 0, max_lots: int = 1) -> list[Played]:
    env = PerpEnv(market, params or EnvParams(), EnvConfig(max_lots=max_lots, episode_length=1))
    return play_account(env, act or jax.tree_util.Partial(flat(env)), jax.random.key(key))


def named(baselines: list[Baseline]) -> dict[str, Baseline]:
    return {baseline.name: baseline for baseline in baselines}


@pytest.fixture(scope="module")
def crash():
    """A policy that trades often, through a crash."""
    played = play(crash_market(bars=1700, seed=2), EnvParams(taker_fee=0.0002, slippage_atr=0.02))
    return played, find_lots(played)


# Buy and hold.


def test_buy_and_hold_by_hand():
    """A long at 1 x: slippage is ceil(0.2 + 1) = 2 ticks, so the entry is 1002 and the quantity 998 steps."""
    market = hand_market(
        both={(5, 2): (1000, 1100, 1000, 1100), (7, 2): (1000, 1050, 1000, 1050)},
        funding={1: (1 / 128, 1000), 3: (1 / 1024, 1000), 5: (-1 / 512, 1010)},  # exact in float32
    )
    (account,) = play(market, act=None)
    equity, opened, ruined = hold_position(account, 1.0)
    fee = 0.0006 * 9.98 * 1002
    entered = 10_000 - fee - 9.98 * 2  # the settlement at the entry's open is not paid
    settled = entered - 9.98 * 1000 / 1024
    received = settled + 9.98 * 1010 / 512
    # Bar 7 ends at 1050: 2 ticks of slippage again.
    last = received + 9.98 * (1048 - 1000) - 0.0006 * 9.98 * 1048
    wanted = [10_000, entered, entered, settled, settled, received + 998, received, last]
    np.testing.assert_allclose(equity, wanted, rtol=0, atol=1e-9)
    assert (opened, ruined) == (1, False)

    # The other way round.
    equity, _, _ = hold_position(account, -0.5)
    worth = np.floor(5_000 / (998 * 0.01)) * 0.01
    paid = worth * (1000 / 1024 - 1010 / 512)
    fees = 0.0006 * worth * (998 + 1052)
    assert equity[-1] == pytest.approx(10_000 + worth * (998 - 1052) + paid - fees, abs=1e-9)

    baselines, random = play_baselines([account], find_lots([account]))
    market_curve, held = (named(baselines)[name].curves[0] for name in ("market", "buy and hold"))
    np.testing.assert_allclose(market_curve, [1e4] * 5 + [1.1e4, 1e4, 1.05e4], rtol=1e-15)
    assert held[-1] == pytest.approx(last, abs=1e-9) and random == NEVER


def test_buy_and_hold_as_a_plain_loop_has_it(crash):
    (account,), _ = crash
    equity, _, _ = hold_position(account, 1.0)
    market, params = account.env.market, account.env.params
    k, first, steps = market.candles_per_bar, int(account.states.t[0]), account.steps
    candles, atr = np.asarray(market.candles, np.float64), np.asarray(market.atr, np.float64)
    quantity = wallet = entry = 0.0
    wanted = [1e4]
    for t in range(first, first + steps):
        if quantity:
            wallet -= quantity * 1e-4 * candles[t, -2] * candles[t, -3]
        elif candles[t, 8 * k] > 0:
            entry = candles[t, 0] + np.ceil(0.0002 * candles[t, 0] + 0.02 * atr[t])
            quantity = np.floor(1e4 / (entry * 1e-4))
            wallet = 1e4 - 0.0002 * quantity * entry * 1e-4
        wanted.append(wallet + quantity * 1e-4 * (candles[t, 8 * k - 1] - entry))
    assert float(params.slippage_atr) == pytest.approx(0.02) and quantity > 0
    np.testing.assert_allclose(equity[:-1], wanted[:-1], rtol=1e-12)


@pytest.mark.parametrize(
    "candle, left",
    [
        ((1000, 1000, 965, 1000), None),
        # 10 000 + 200 (p - 1000) = 0.02 * 200 p - 1000 at p = 189000 / 196
        ((1000, 1000, 964, 1000), 4 * 189_000 / 196 - 1000),
        ((955, 1000, 955, 1000), 1_000),
        ((940, 1000, 940, 1000), 0),
    ],
)
def test_ruin_at_twenty_times_equity(candle, left):
    """Without costs the notional is 200 000, in the second bracket: a rate of 2 % less 1 000."""
    (account,) = play(hand_market(mark={(4, 1): candle}), FREE, act=None)
    equity, opened, ruined = hold_position(account, 20.0)
    assert opened == 1 and ruined == (left is not None)
    np.testing.assert_allclose(equity, [1e4] * 8 if left is None else [1e4] * 4 + [left] * 4, atol=1e-9)


def test_a_short_is_ruined_by_a_rise_and_funding_moves_the_price():
    # A short of 50 000: 10 000 + 50 (1000 - p) = 0.01 * 50 p at p = 60000 / 50.5 = 1188.1
    rise = {(4, 1): (1000, 1188, 1000, 1000)}
    (account,) = play(hand_market(mark=rise), FREE, act=None)
    assert not hold_position(account, -5.0)[2]
    (account,) = play(hand_market(mark=rise, funding={3: (-1 / 1000, 1000)}), FREE, act=None)  # pays 50
    equity, _, ruined = hold_position(account, -5.0)
    assert ruined and equity[-1] == pytest.approx(0.5 * 59_950 / 50.5, abs=1e-5)


def test_the_entry_waits_for_a_trade():
    (account,) = play(hand_market(invalid=[(1, 0), (2, 0)], both={(2, 2): (1000, 1010, 1000, 1010)}), FREE, act=None)
    equity, opened, _ = hold_position(account, 1.0)
    assert opened == 1 and (equity[:3] == 1e4).all()


# Schedules.


def test_a_trend_closes_at_once_and_opens_a_bar_later():
    """Prices rise in bar 400: the open of bar 401 knows it, and the lot opens in bar 402."""
    higher = {(t, k): (1001, 1001, 1001, 1001) for t in range(400, 420) for k in range(3)}
    (account,) = play(hand_market(both=higher, bars=420), act=None)
    schedule = schedule_trend(account)
    assert np.flatnonzero(schedule).tolist() == [401] and schedule[401] == account.steps  # bar 1 is the first
    trend = named(play_baselines([account], find_lots([account])).baselines)["EMA trend"]
    assert trend.lots == 1 and (trend.curves[0][:402] == 1e4).all() and trend.curves[0][402] < 1e4
    assert trend.title == "EMA 96/384 trend at 1.00 x equity"


def test_a_carry_holds_the_side_that_receives():
    """A round trip costs 2 (0.0006 + 0.0002 + 0.001); the second settlement does not pay for it."""
    funding = {100: (0.01, 1000), 132: (-0.0001, 1000), 164: (-0.0037, 1000), 196: (-0.0037, 1000)}
    (account,) = play(hand_market(funding=funding, bars=300), act=None)
    schedule = schedule_carry(account)
    # From the second bar after a settlement until the side changes, one bar after a settlement.
    wanted = {102: -133, 166: 300, 198: 300}
    assert {int(i) + 1: int(schedule[i] + np.sign(schedule[i])) for i in np.flatnonzero(schedule)} == wanted
    carry = named(play_baselines([account], find_lots([account])).baselines)["funding carry"]
    # The short pays at bar 132, and the long receives at bar 196: 9.98 or so of either.
    assert carry.lots == 2
    moves = np.diff(carry.curves[0])
    assert moves[131] == pytest.approx(-0.0001 * 1e4, rel=0.01) and moves[195] == pytest.approx(0.0037 * 1e4, rel=0.01)


def test_nothing_after_the_clock_is_seen(crash):
    (account,), lots = crash
    market, cut = account.env.market, 900
    rng = np.random.default_rng(3)
    candles, atr = np.asarray(market.candles).copy(), np.asarray(market.atr).copy()
    width = 8 * market.candles_per_bar
    candles[cut:, :width] = np.round(candles[cut:, :width] * rng.uniform(0.5, 2, (len(candles) - cut, 1)))
    candles[cut:, -3] = rng.normal(0, 0.01, len(candles) - cut)
    atr[cut + 1 :] = np.round(atr[cut + 1 :] * 1.5)
    env = dataclasses.replace(account.env, market=market.with_columns(candles, atr))
    rows = cut - int(account.states.t[0]) + 1
    one, other = (play_baselines([a], lots, draws=50) for a in (account, account._replace(env=env)))
    assert [b.name for b in one.baselines] == [b.name for b in other.baselines]
    for a, b in zip(one.baselines, other.baselines, strict=True):
        np.testing.assert_array_equal(a.curves[0][:rows], b.curves[0][:rows], err_msg=a.name)
        assert a.name == "flat" or not np.array_equal(a.curves[0], b.curves[0])
    days = int(np.sum(one.random.times[0] <= account.times()[rows - 1]))
    np.testing.assert_array_equal(one.random.closes[0][:, :days], other.random.closes[0][:, :days])
    assert 1 < days < len(one.random.times[0])


# Random draws.


def test_habits_are_those_of_the_policy(crash):
    (account,), lots = crash
    habits = find_habits([account], lots)
    assert len(habits.bars) == lots.num_rows  # it holds one lot at a time
    np.testing.assert_array_equal(habits.bars, lots["bars"].to_numpy())
    assert habits.entry_rate == pytest.approx(0.05, rel=0.3) and np.mean(habits.sides == 1) == pytest.approx(
        0.75, abs=0.15
    )
    held = account.states.account.lots.quantity[:-1].any(axis=1)
    assert habits.entry_rate == pytest.approx(lots.num_rows / np.sum(~held))
    assert habits.notional == pytest.approx(1.0, rel=0.05) and habits.leverage == pytest.approx(10)
    assert habits.exposure == pytest.approx(np.mean(account.states.account.lots.side[1:].sum(axis=1)), rel=0.05)


def test_lots_at_the_same_time_are_one_spell():
    """Three longs, opened in bars 2 to 4 and closed in bar 9, and a short from bar 12 on."""

    quarters = [jnp.asarray(order(side, 0.25, 10.0, 3.0, 6.0)) for side in (1, -1)]

    def act(key, state, carry):
        chosen = jnp.where((state.t >= 2) & (state.t <= 4), quarters[0], jnp.where(state.t == 12, quarters[1], 0))
        return jnp.where(state.t == 9, order(2), chosen).astype(jnp.int32), carry

    played = play(hand_market(bars=20), FREE, act=jax.tree_util.Partial(act), max_lots=3)
    lots = find_lots(played)
    habits = find_habits(played, lots)
    # Bars 2 to 9, and 12 to 19; flat at the opens of 1, 2, 10, 11 and 12.
    assert lots.num_rows == 4 and habits.sides.tolist() == [1, -1] and habits.bars.tolist() == [8, 8]
    assert habits.entry_rate == 2 / 5
    # Of the margin that is left each takes a quarter. After bars 2, 3, 4 to 8 there are one, two and three.
    one, two, three = 0.25, 0.25 + 0.1875, 0.25 + 0.1875 + 0.140625
    longs, shorts = one + two + 5 * three, 8 * one
    assert habits.notional == pytest.approx((longs + shorts) / 15, rel=2e-3)
    assert habits.exposure == pytest.approx((longs - shorts) / 19, rel=1e-2)  # long in the mean


def test_draws_have_the_rate_the_sides_and_the_times():
    habits = Habits(0.04, np.array([1, 1, -1, 1]), np.array([2, 9, 30, 3]), 0.5, 0.5, 1.0)
    schedules = draw_schedules(habits, 5_000, 200, np.random.default_rng(0))
    rows, bars = np.nonzero(schedules)
    # 25 flat bars, the entry's included, and 1, 8, 29 or 2 at whose opens the lot is held.
    assert len(rows) == pytest.approx(200 * 5_000 / (25 + 10), rel=0.02)
    times = np.abs(schedules[rows, bars]) - bars
    for side, wanted in ((1, [1, 2, 8]), (-1, [29])):
        found, counts = np.unique(times[np.sign(schedules[rows, bars]) == side], return_counts=True)
        assert found.tolist() == wanted
        np.testing.assert_allclose(counts / len(rows), 0.25, rtol=0.03)
    ends, follows = np.abs(schedules[rows, bars]), rows[1:] == rows[:-1]
    assert (bars[1:] > ends[:-1])[follows].all()  # a lot that ends early is not replaced before its time
    assert (bars[1:] - ends[:-1])[follows].mean() == pytest.approx(25, rel=0.02)


def test_draws_trade_as_often_as_the_policy():
    """In a market that stands still no stop is reached, so a cycle has 1 / rate + bars - 1 bars."""
    played = play(hand_market(bars=3_000), FREE)
    lots = find_lots(played)
    habits, random = find_habits(played, lots), play_baselines(played, lots).random
    cycle = 1 / habits.entry_rate + np.maximum(habits.bars, 2).mean() - 1
    assert random.lots.mean() == pytest.approx(played[0].steps / cycle, rel=0.02)
    assert random.lots.mean() == pytest.approx(lots.num_rows, rel=0.05)
    assert random.lots.std() > 2 and (random.returns == 0).all() and find_place(random.returns, 0.0) == 0.5


def test_place_counts_ties_half():
    assert find_place(np.array([1.0, 2.0, 2.0, 3.0]), 2.0) == 0.5
    assert find_place(np.array([1.0, 2.0, 2.0, 3.0]), 0.0) == 0 and find_place(np.array([1.0, 2.0]), 3.0) == 1


def test_the_place_of_a_random_policy_is_uniform(crash):
    """The policy itself is a draw of the same law, but for the estimates of its rate and times."""
    market, params = crash[0][0].env.market, crash[0][0].env.params
    places, counts = [], []
    for key in range(16):
        played = play(market, params, key=key + 100)
        lots = find_lots(played)
        random = play_baselines(played, lots, draws=100, seed=key).random
        places.append(find_place(random.returns, float(played[0].states.equity[-1]) / 1e4 - 1))
        counts.append((lots.num_rows, random.lots.mean()))
    # Stops end most lots here. A draw that replaced them at once would pay for more entries than the policy.
    own, drawn = np.mean(counts, axis=0)
    assert drawn == pytest.approx(own, rel=0.05)
    assert np.mean(places) == pytest.approx(0.5, abs=3 * (1 / 12 / 16) ** 0.5)
    assert min(places) < 0.25 and max(places) > 0.75


def test_daily_closes_have_the_returns_of_the_whole_curve(crash):
    (account,), lots = crash
    random = play_baselines([account], lots, draws=3).random
    assert len(random.returns) == 3
    times, closes = random.times[0], random.closes[0]
    assert len(daily_returns(times, closes[0])) == len(daily_returns(account.times(), account.states.equity))
    np.testing.assert_allclose(closes[:, -1] / closes[:, 0] - 1, random.returns)
    np.testing.assert_allclose(np.prod(1 + daily_returns(times, closes[1])) - 1, random.returns[1])


# All of them.


def test_draws_follow_the_seed(crash):
    played, lots = crash
    one, same, other = (play_baselines(played, lots, draws=20, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.random.closes[0], same.random.closes[0])
    assert not np.array_equal(one.random.returns, other.random.returns)
    for a, b in zip(one.baselines, other.baselines, strict=True):  # nothing of them is drawn
        np.testing.assert_array_equal(a.curves[0], b.curves[0])


def test_a_policy_that_never_trades(crash):
    played = play(crash[0][0].env.market, act=None)
    baselines, random = play_baselines(played, find_lots(played))
    assert random == NEVER
    assert [b.name for b in baselines] == ["flat", "market", "buy and hold", "EMA trend", "funding carry"]
    assert all(b.title.endswith("1.00 x equity") for b in baselines[2:])
    assert [b.lots for b in baselines[:3]] == [0, None, 1] and baselines[3].lots > 1
    assert all(len(b.curves[0]) == played[0].steps + 1 and b.curves[0].dtype == np.float64 for b in baselines)


def test_two_symbols_and_two_segments_are_accounts_of_their_own():
    other = crash_market(bars=1600, seed=4).replace(
        instruments=stacked(Instrument("OTHER", tick_size=0.1, step_size=0.001, brackets=((0, 1e9, 20, 0.01, 0),))),
        origins=(Origin("OTHER", 0, 0, 1600),),
    )
    split = Segments(*jnp.asarray([(673, 999, 0, 0), (1200, 1699, 0, 0)], jnp.int32).T)
    market = concatenate_markets([crash_market(bars=1700, seed=2).replace(segments=split), other])
    played = play(market)
    lots = find_lots(played)
    assert [a.symbol for a in played] == ["CRASH", "CRASH", "OTHER"] and [a.steps for a in played] == [327, 500, 927]
    habits = find_habits(played, lots)
    assert len(habits.bars) == lots.num_rows
    baselines, random = play_baselines(played, lots, draws=10)
    assert [len(x) for x in random.closes] == [10] * 3 and [len(x) - 1 for x in baselines[-1].curves] == [327, 500, 927]
    one, two, alone = (c[:, -1] / c[:, 0] for c in random.closes)
    np.testing.assert_allclose(random.returns, (one * two + alone) / 2 - 1)
    # A policy that trades one symbol alone has the flat bars of all.
    some = find_habits(played, lots.filter(pc.equal(lots["symbol"], "OTHER")))
    assert len(some.bars) == pc.sum(pc.equal(lots["symbol"], "OTHER")).as_py() and some.entry_rate < habits.entry_rate
    # Each account is the same alone. (Its habits are those of all accounts: so 1 x equity, as without a lot.)
    idle = play(market, act=None)
    together = named(play_baselines(idle, lots.slice(0, 0)).baselines)
    alone = play(other, act=None)
    for name, baseline in named(play_baselines(alone, lots.slice(0, 0)).baselines).items():
        np.testing.assert_allclose(together[name].curves[2], baseline.curves[0], rtol=1e-6, err_msg=name)
    assert together["EMA trend"].lots > 3 and together["buy and hold"].lots == 3


def test_ends_are_told():
    """A policy at 50 x is ruined; its baselines end where it does, or before."""
    params = EnvParams(max_exposure=1.0, max_leverage=50.0, ruin_fraction=0.5)
    (account,) = play(crash_market(bars=1200, seed=1), params)
    assert account.states.terminated[-1]
    baselines, random = play_baselines([account], find_lots([account]), draws=20)
    assert all(len(b.curves[0]) == account.steps + 1 and b.ended[0] in (POLICY_RUIN, RUIN) for b in baselines)
    assert (
        baselines[0].ended == (POLICY_RUIN,)
        and 0 <= find_place(random.returns, float(account.states.equity[-1]) / 1e4 - 1) <= 1
    )
    (lasting,) = play(crash_market(bars=1200, seed=1), act=None)
    assert {b.ended[0] for b in play_baselines([lasting], find_lots([lasting])).baselines[:3]} == {END}
