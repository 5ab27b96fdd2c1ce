"""The float64 twin against hand-worked cases and the identities of the ledger (docs/semantics.md, "Account").

Hand-worked market: every price 1000 ticks, tick_value 0.01, two candles a bar, decisions from bar 1. Unless a
case says otherwise fees and slippage are 0, equity is 10 000 and the order is a long of size 1 at 10x, so
    available = 0.1 * 10 000 = 1000; q = floor(1000 * 10 / (1000 * 0.01)) = 1000 steps; notional 10 000;
    M = 1000; distance = (1000 / 10 - 0.004 * 1000) / (1 - 0.004) = 96 / 0.996 = 96.39; L = 1000 - 97 = 903.
"""

from dataclasses import replace

import numpy as np
import pytest
from markets import crash_market

from perpjax.audit.agreement import twin_market, twin_params
from perpjax.audit.draws import draw_actions
from perpjax.env import PerpEnv
from perpjax.params import EnvConfig, EnvParams
from perpjax.reference import Order, Ties, Twin, TwinMarket, TwinParams, Verdict, step_like
from perpjax.reference.records import CLOSE, HOLD, LONG, SHORT

BRACKETS = np.array(  # Binance BTCUSDT, 2025-06
    [
        [0, 300e3, 150, 0.004, 0],
        [300e3, 800e3, 100, 0.005, 300],
        [800e3, 3e6, 75, 0.0065, 1500],
        [3e6, 12e6, 50, 0.01, 12e3],
        [12e6, 70e6, 25, 0.02, 132e3],
        [70e6, 100e6, 20, 0.025, 482e3],
        [100e6, 230e6, 10, 0.05, 2_982e3],
        [230e6, 480e6, 5, 0.1, 14_482e3],
        [480e6, 600e6, 4, 0.125, 26_482e3],
        [600e6, 800e6, 3, 0.15, 41_482e3],
        [800e6, 1.2e9, 2, 0.25, 121_482e3],
        [1.2e9, 1.8e9, 1, 0.5, 421_482e3],
    ]
)
PRICES = ("open", "high", "low", "close", "mark_open", "mark_high", "mark_low", "mark_close")
FREE = TwinParams(taker_fee=0.0, slippage_base=0.0, slippage_atr=0.0)
LONG_10X, SHORT_10X = Order(LONG, 1.0, 10.0, 1.0, 2.0), Order(SHORT, 1.0, 10.0, 1.0, 2.0)
FAR = Order(LONG, 1.0, 10.0, 3.0, 6.0)  # with ATR 100: stop 700, target 1600, so that L decides
WAIT = Order(HOLD)


def flat_market(bars: int = 8, price: float = 1000.0, atr: float = 10.0, **changes) -> TwinMarket:
    prices = {name: np.full((bars, 2), price) for name in PRICES}
    rest = dict(
        valid=np.ones((bars, 2), bool), funding_rate=np.zeros(bars), funding_price=np.full(bars, price),
        atr=np.full(bars + 1, atr), features=np.zeros((bars + 1, 1)), feature_mean=np.zeros(1),
        feature_scale=np.ones(1), tick_value=0.01, min_notional=50.0, max_steps=120_000.0,
        maintenance_fee_rate=0.0, brackets=BRACKETS, first=1,
    )  # fmt: skip
    return TwinMarket(**{**prices, **rest, **changes})


def candle(market: TwinMarket, t: int, k: int, **prices: float) -> None:
    """Sets named prices of one candle in place."""
    for name, price in prices.items():
        getattr(market, name)[t, k] = price


def opened(market: TwinMarket, order: Order = LONG_10X, params: TwinParams = FREE) -> Twin:
    """A twin that placed `order` in bar 1 and stands at decision 2."""
    twin = Twin(market, params)
    twin.reset(1)
    twin.step(order)
    return twin


def test_levels_of_an_opened_lot():
    for order, stop, target, liquidation in ((LONG_10X, 990, 1020, 903), (SHORT_10X, 1010, 980, 1096)):
        # Short: 96 / 1.004 = 95.62, so 1000 + 96.
        lot = opened(flat_market(), order).state.lots[0]
        assert (lot.entry, lot.quantity, lot.margin, lot.age) == (1000, 1000, 1000, 1)
        assert (lot.stop, lot.target, lot.liquidation) == (stop, target, liquidation)


def test_full_margin_long_has_no_liquidation_price_and_short_always_has_one():
    order = Order(LONG, 1.0, 1.0, 3.0, 6.0)
    assert opened(flat_market(), order).state.lots[0].liquidation == 0
    # 1x short, M = 1000, q = 100: (1000 - 4) / 1.004 = 992.03, L = 1993 (2 E / (1 + m) = 1992.03).
    assert opened(flat_market(), order._replace(direction=SHORT)).state.lots[0].liquidation == 1993


def test_an_exact_distance_is_not_rounded_up_a_tick():
    # M such that distance = n: M / 10 = 0.996 n + 4, which floats miss by a last bit for many n.
    twin = opened(flat_market())
    for n in range(1, 200):
        twin.state.lots[0].margin = (0.996 * n + 4) * 10
        assert twin._liquidation_price(twin.state.lots[0]) == 1000 - n


def test_margin_beyond_the_notional_stores_no_liquidation_price():
    market = flat_market()
    market.funding_rate[2] = -0.01  # a 1x long receives 10: M = 1010, distance = 1006 / 0.996 > E
    state = opened(market, Order(LONG, 1.0, 1.0, 1.0, 2.0)).step(WAIT)
    assert state.lots[0].margin == 1010 and state.lots[0].liquidation == 0 and state.obs[-2] == 1


@pytest.mark.parametrize(
    ("base", "stop", "target", "distances"),
    [
        (0.0, 2.0, 0.5, (20, 20)),  # the target multiple at least the stop multiple
        (0.0, 9.0, 9.0, (30, 60)), (0.0, 0.0, 0.0, (5, 5)),  # clipped
        (0.02, 0.5, 1.0, (21, 21)),  # slip(1000) = 20: at least 21, and the target no nearer
    ],
)  # fmt: skip
def test_distances_of_stop_and_target(base, stop, target, distances):
    order, params = Order(SHORT, 1.0, 10.0, stop, target), replace(FREE, slippage_base=base)
    lot = opened(flat_market(), order, params).state.lots[0]
    assert (lot.stop - lot.entry, lot.entry - lot.target) == distances


def test_fills_are_at_least_one_tick():
    market = flat_market(price=2.0)
    wide = replace(FREE, slippage_atr=0.5)  # slip(2) = 5
    # E = max(2 - 5, 1); distance = (0.1 - 0.004) / 1.004, L = 2: with the mark open at it the order is refused.
    assert opened(market, SHORT_10X, wide).state.events == [("verdict", "IMMEDIATE_LIQUIDATION")]
    low = flat_market(price=2.0)
    candle(low, 1, 0, mark_open=1, mark_high=1, mark_low=1, mark_close=1)
    assert opened(low, SHORT_10X, wide).state.events[:2] == [("opened", 0, 1, 120_000), ("verdict", "ACCEPTED")]
    twin = opened(market, LONG_10X)
    twin.params = wide
    assert twin.step(Order(CLOSE)).events[0] == ("closed", 0, 1)


def test_available_uses_the_mark_close_of_the_bar_before():
    market = flat_market()
    candle(market, 1, 1, mark_close=1010, mark_high=1010)
    twin = opened(market, LONG_10X._replace(size=0.5), replace(FREE, max_exposure=0.2))
    # Equity 10 000 + 1000 * 10 * 0.01 = 10 100: available = 2020 - 1000, so q = 1020 (bar 2 marks at 1000).
    assert twin.step(LONG_10X).events[0] == ("opened", 1, 1000, 1020)


def test_funding_moves_the_liquidation_price_and_the_open_liquidates_before_the_order():
    market = flat_market(atr=100.0)
    market.funding_rate[2] = 0.01  # pays 1000 * 1000 * 0.01 * 0.01 = 100: M = 900
    # distance = (90 - 4) / 0.996 = 86.35, L = 913; the mark opens at 910, past 913 but not past the old 903.
    candle(market, 2, 0, mark_open=910, mark_low=910)
    twin = opened(market, FAR)
    state = twin.step(FAR)
    # 10 000 - 100 - 900 = 9000 before the order, which then gets 0.1 * 9000 of margin: q = 900, in slot 0.
    assert state.events[:3] == [("liquidated", 0), ("opened", 0, 1000, 900), ("verdict", "ACCEPTED")]
    assert (state.ledger.funding, state.ledger.liquidation_losses) == (100, 900)
    # The new lot's own L (903) is not reached by the mark open 910; it paid no funding.
    assert state.wallet == 9000 and state.lots[0].margin == 900 and state.lots[0].liquidation == 903


def test_funding_never_takes_more_than_the_margin_and_is_paid_in_an_invalid_bar():
    market = flat_market(atr=100.0)
    market.funding_rate[2], market.valid[2] = 0.2, False  # 2000 > M = 1000
    state = opened(market, FAR).step(WAIT)
    assert state.wallet == 9000 and state.lots[0].margin == 0 and state.ledger.funding == 1000
    # distance = -4 / 0.996 = -4.016: L = 1000 + 4, reached by the mark open of bar 3.
    assert state.lots[0].liquidation == 1004
    market.funding_rate[3] = -0.01
    state = opened(market, SHORT_10X).state
    assert state.ledger.funding == 0  # settled before the lot was opened


def test_stop_gap_fills_at_the_open_less_depth_and_slippage():
    market = flat_market()
    candle(market, 2, 0, open=985, low=975, close=985)
    # x = 985, depth ceil(0.1 * 10) = 1: fill 984, P = 1000 * (984 - 1000) * 0.01 = -160.
    state = opened(market).step(WAIT)
    assert ("stopped", 0, 984) in state.events and state.wallet == 9840
    # Default slippage: slip(1000) = ceil(0.2 + 1) = 2, E = 1002, stop 992; slip(985) = ceil(1.197) = 2.
    state = opened(market, params=TwinParams()).step(WAIT)
    assert ("stopped", 0, 982) in state.events


def test_stop_in_a_crashing_candle_is_not_filled_at_its_trigger():
    market = flat_market()
    candle(market, 2, 1, low=905)
    # x = 990, depth ceil(0.1 * 85) = 9: fill 981.
    assert ("stopped", 0, 981) in opened(market).step(WAIT).events


def test_target_needs_one_tick_beyond_and_is_never_filled_better():
    for high, events in ((1020, []), (1021, [("target", 0, 1020)]), (1100, [("target", 0, 1020)])):
        market = flat_market()
        candle(market, 2, 0, high=high)
        state = opened(market).step(WAIT)
        assert state.events == [("verdict", "HOLD"), *events]
        assert state.wallet == (10_200 if events else 10_000)
    candle(market, 2, 0, open=1050, low=880)
    assert opened(market).step(WAIT).events[1:] == [("target", 0, 1020)]
    candle(market, 2, 0, open=1020)  # at the target, not beyond it: the open decides nothing
    assert opened(market).step(WAIT).events[1:] == [("ambiguous", 0), ("stopped", 0, 979)]  # 990 - 0.1 * 110


def test_a_mark_wick_liquidates_and_a_last_price_wick_does_not():
    for name, low, gone in (("mark_low", 903, True), ("mark_low", 904, False), ("low", 800, False)):
        market = flat_market(atr=100.0)
        candle(market, 2, 1, **{name: low})
        state = opened(market, FAR).step(WAIT)
        assert (("liquidated", 0) in state.events) == gone
        assert state.wallet == (9000 if gone else 10_000)  # exactly M, no fee


@pytest.mark.parametrize(
    ("stop", "rule", "outcome"),
    [
        # L = 903, target 1020; the candle spans 880 to 1030 and opens at 1000.
        (990, "nearest", "stopped"), (903, "nearest", "stopped"), (902, "nearest", "liquidated"),
        (990, "pessimistic", "liquidated"), (903, "pessimistic", "liquidated"),
        (990, "optimistic", "target"), (902, "optimistic", "target"),
    ],
)  # fmt: skip
def test_all_levels_in_one_candle(stop, rule, outcome):
    market = flat_market()
    candle(market, 2, 0, low=880, mark_low=880, high=1030)
    twin = opened(market, params=replace(FREE, intrabar=rule))
    twin.state.lots[0].stop = stop
    state = twin.step(WAIT)
    assert {event[0] for event in state.events} == {"verdict", "ambiguous", outcome}
    assert state.ledger.ambiguous == 1


@pytest.mark.parametrize("rule", ["nearest", "pessimistic", "optimistic"])
def test_what_the_open_decides_comes_first_and_is_not_ambiguous(rule):
    market = flat_market()
    candle(market, 2, 1, open=950, low=880, mark_low=880, high=1030)
    state = opened(market, params=replace(FREE, intrabar=rule)).step(WAIT)
    # x = 950, depth ceil(0.1 * 70) = 7.
    assert state.events == [("verdict", "HOLD"), ("stopped", 0, 943)]
    candle(market, 2, 1, mark_open=903)
    state = opened(market, params=replace(FREE, intrabar=rule)).step(WAIT)
    assert state.events == [("verdict", "HOLD"), ("liquidated", 0)] and state.ledger.ambiguous == 0


def test_timeout_closes_at_the_last_valid_close_and_waits_for_one():
    market = flat_market()
    params = replace(FREE, max_hold=2)
    market.valid[2, 1] = False
    candle(market, 2, 0, close=1005)
    assert ("timed_out", 0, 1005) in opened(market, params=params).step(WAIT).events
    market.valid[2] = False
    twin = opened(market, params=params)
    assert twin.step(WAIT).lots[0].age == 2
    assert ("timed_out", 0, 1000) in twin.step(WAIT).events


def test_round_trip_at_a_flat_price_costs_fees_and_slippage():
    # E = 1002, q = floor(10 000 / 10.02) = 998, fee 0.0006 * 9999.96 = 5.999976; closed at 998:
    # P = 998 * -4 * 0.01 = -39.92, fee 0.0006 * 9960.04 = 5.976024; 10 000 - 39.92 - 11.976.
    state = opened(flat_market(), params=TwinParams()).step(Order(CLOSE))
    assert state.events == [("closed", 0, 998), ("verdict", "ACCEPTED")]
    assert state.wallet == pytest.approx(9948.104, abs=1e-9)
    assert state.ledger.traded_notional == pytest.approx(19_960.0)


def test_the_exit_of_a_lot_never_costs_more_than_its_margin():
    market = flat_market(atr=100.0)
    candle(market, 2, 0, open=500, low=400, close=500)  # the last price only: no liquidation on the mark
    state = opened(market, FAR, replace(FREE, taker_fee=0.0006)).step(WAIT)
    # The stop (700) fills at 500 - 10; P = max(-5095.9, -M), and no margin is left for a fee.
    assert ("stopped", 0, 490) in state.events
    assert state.ledger.realised == -1000 and state.ledger.fees == pytest.approx(6.0)


def test_max_exposure_1_pays_the_entry_fee_from_free_money():
    # margin = min(10 000, 10 000 / 1.006 = 9940.36); q = floor(9940.36) = 9940; fee 0.0006 * 99 400 = 59.64.
    twin = opened(flat_market(), FAR, replace(FREE, max_exposure=1.0, taker_fee=0.0006))
    assert twin.state.lots[0].margin == 9940 and twin.state.wallet == pytest.approx(9940.36)
    assert twin.step(FAR).events[0] == ("verdict", "BELOW_MINIMUM")  # 0.36 of margin left: no whole step


def test_an_exit_says_what_each_of_its_costs_was():
    # Long, E = 1000, stop 700, M = 1000; candle 0 of bar 2 opens at 880, falls to 800: L = 903 by the mark alone.
    market = flat_market(atr=100.0)
    candle(market, 2, 0, open=880, high=880, low=800, close=880)
    twin = opened(market, LONG_10X)
    twin.params = replace(FREE, taker_fee=1 / 512, slippage_base=1 / 64, stop_depth=0.25)
    twin.step(WAIT)
    # The stop at 900 is gapped by 20. From x = 880: slip 14, depth 20: fill 846. 1540 lost, 1000 of it paid, no fee.
    (exit,) = twin.state.exits
    assert (exit.how, exit.slot, exit.candle, exit.price) == ("stopped", 0, 0, 846)
    assert (exit.realised, exit.fee, exit.slippage, exit.gap_loss) == (-1000, 0, 340, 200)
    assert exit.forgiven == pytest.approx(540 + 10 * 846 / 512)


@pytest.mark.parametrize("d", [1, -1])
def test_what_a_liquidated_margin_still_held_is_forfeited(d):
    # L = 903 (long), 1000 + ceil(96 / 1.004) = 1096 (short): 1000 - 10 * 97 = 30 and 1000 - 10 * 96 = 40 are left,
    # a little less than the maintenance of 0.004 * 9030 and 0.004 * 10 960.
    market = flat_market(atr=100.0)
    candle(market, 2, 1, **({"mark_low": 800} if d > 0 else {"mark_high": 1300}))
    twin = opened(market, FAR._replace(direction=d))
    twin.step(WAIT)
    (exit,) = twin.state.exits
    expected = ("liquidated", 1, 903, 30) if d > 0 else ("liquidated", 1, 1096, 40)
    assert (exit.how, exit.candle, exit.price, exit.forfeited) == expected
    assert twin.state.ledger.forfeited == exit.forfeited and twin.state.ledger.liquidation_losses == 1000
    assert 0.004 * 10 * exit.price - 10 < exit.forfeited <= 0.004 * 10 * exit.price
    # A tick of 400 quote: 800 steps at 25, M = 1000, so the margin is gone 2.5 ticks away and L is 3 ticks away.
    market = flat_market(price=25.0, tick_value=0.5, atr=1000.0)
    candle(market, 2, 1, **({"mark_low": 1} if d > 0 else {"mark_high": 99}))
    twin = opened(market, FAR._replace(direction=d))
    lot = twin.state.lots[0]
    twin.step(WAIT)
    assert (lot.entry, lot.quantity, lot.margin, lot.liquidation) == (25, 800, 1000, 25 - 3 * d)
    assert twin.state.exits[0].forfeited == 0 and twin.state.exits[0].price == 25 - 2.5 * d


ORDINARY, STEEP = {}, {"max_leverage": 20.0, "taker_fee": 0.05}  # a fee as large as the margin is capped


@pytest.mark.parametrize("changes", [ORDINARY, STEEP], ids=["ordinary", "steep"])
def test_costs_add_up_from_untouched_prices_to_the_wallet(changes):
    """Gross profit between the prices that triggered, less each cost, is what the wallet moved by."""
    market, rng = crash_market(seed=3), np.random.default_rng(0)
    params = EnvParams(max_exposure=0.5, max_hold=9, **changes)
    env = PerpEnv(market, params, EnvConfig(max_lots=3, episode_length=400))
    params = twin_params(env.params, env.config)
    twin = Twin(twin_market(market), params)
    tick_value, gross, opens, seen = twin.market.tick_value, 0.0, {}, set()
    twin.reset(700)
    for action in draw_actions(rng, env.config, 400, 1)[:, 0]:
        t = twin.state.t
        twin.step(action)
        for _, slot, *_ in (e for e in twin.state.events if e[0] == "opened"):
            opens[slot] = float(twin.market.open[t, 0])
        for exit in twin.state.exits:
            lot = exit.lot
            level = {
                "closed": twin.market.open[t, 0], "timed_out": twin.market.close[t, exit.candle], "stopped": lot.stop,
                "target": lot.target, "liquidated": exit.price,
            }[exit.how]  # fmt: skip
            gross += lot.side * lot.quantity * (level - opens[exit.slot]) * tick_value
            seen.add(exit.how)
        if twin.state.terminated or twin.state.truncated:
            break
    for slot, lot in enumerate(twin.state.lots):
        if lot:  # its entry's slippage has been counted, its exit has not come
            gross += lot.side * lot.quantity * (lot.entry - opens[slot]) * tick_value
    ledger = twin.state.ledger
    full_fees = params.taker_fee * ledger.traded_notional
    net = gross - ledger.slippage - ledger.gap_losses - full_fees + ledger.forgiven - ledger.funding - ledger.forfeited
    assert net == pytest.approx(twin.state.wallet - params.initial_equity, abs=1e-6)
    if changes is ORDINARY:
        assert seen == {"closed", "timed_out", "stopped", "target", "liquidated"} and ledger.forfeited > 0
    else:
        assert ledger.forgiven > 0
    assert min(ledger.slippage, ledger.gap_losses) > 0


def test_liquidation_value_is_the_wallet_after_closing_everything():
    # Slip(1000) = 16, fee 1/512; long from 1000: closed at 984 it loses 160 and pays 9840 / 512.
    twin = opened(flat_market())
    twin.params = replace(FREE, taker_fee=1 / 512, slippage_base=1 / 64)
    assert twin.liquidation_value() == 10_000 - 160 - 9840 / 512
    twin.step(Order(CLOSE))
    assert twin.liquidation_value() == twin.state.wallet


def test_verdicts_in_order():
    def verdict(twin: Twin, order: Order, **params) -> str:
        twin.params = replace(twin.params, **params)
        return next(event[1] for event in twin.step(order).events if event[0] == "verdict")

    market = flat_market()
    market.valid[3, 0] = False
    assert verdict(opened(market), Order(LONG, float("nan"))) == "HOLD"
    twin = opened(market)
    assert verdict(twin, SHORT_10X, max_lots=1) == "MAX_LOTS"
    assert verdict(twin, Order(CLOSE)) == "DATA_GAP"
    assert verdict(opened(market), SHORT_10X) == "NO_HEDGE"
    assert verdict(opened(market), LONG_10X) == "MAX_EXPOSURE"  # available = 1000 - 1000
    twin = Twin(market, FREE)
    twin.reset(1)
    assert verdict(twin, Order(CLOSE)) == "HOLD"
    # 1000 * 10: above no cap of the table, above the only one of a table ending at 9999.
    small = Twin(replace(market, brackets=np.array([[0, 9999.0, 125, 0.004, 0]])), FREE)
    small.reset(1)
    assert verdict(small, LONG_10X) == "MAX_NOTIONAL"
    assert verdict(twin, Order(LONG, 0.004)) == "BELOW_MINIMUM"  # 4 quote at 1x
    assert twin.state.ledger.verdicts == [1, 0, 0, 0, 0, 0, 1, 0, 0]


def test_leverage_is_clamped_once_to_the_bracket_of_the_requested_notional():
    # 0.1 * 4e6 * 10 = 4 million: bracket 4 (max 50) allows 10; at 125x, 50 million: bracket 5, max 25.
    params = replace(FREE, initial_equity=4e6, max_leverage=125.0)
    twin = opened(flat_market(), FAR._replace(leverage=125.0), params)
    lot = twin.state.lots[0]
    assert lot.leverage == 25 and lot.quantity == 120_000  # the venue's largest order: 1.2 million
    assert lot.margin == 1.2e6 / 25


@pytest.mark.parametrize("d", [LONG, SHORT])
def test_liquidation_price_is_the_first_tick_at_which_the_balance_meets_the_maintenance(d):
    """The brackets' minimum against a look-up of the bracket that holds the notional at the price."""
    rng = np.random.default_rng(0)
    twin = Twin(flat_market(maintenance_fee_rate=0.0006), FREE)

    def excess(lot, price: float) -> float:
        notional = lot.quantity * price * 0.01
        _, _, _, rate, amount = BRACKETS[min(np.sum(notional > BRACKETS[:, 1]), 11)]
        balance = lot.margin + d * (notional - lot.quantity * lot.entry * 0.01)
        return balance - ((rate + 0.0006) * notional - amount)

    lot = opened(flat_market(), LONG_10X._replace(direction=d)).state.lots[0]
    for _ in range(500):
        lot.entry, lot.quantity = float(rng.integers(100, 2**20)), float(rng.integers(1, 120_000))
        notional = lot.quantity * lot.entry * 0.01
        lot.margin = notional / rng.uniform(1, 50) * rng.uniform(0.3, 1)
        level = twin._liquidation_price(lot)
        slack = lot.quantity * 0.01 * lot.entry * 2.0**-22 * 1.51  # 1 + m + f at most
        assert level == 0 or excess(lot, level) <= slack
        assert excess(lot, max(level + d, 0.0)) > 0


def test_broken_tables_are_refused():
    for column, value in ((4, 299.0), (3, 0.003), (0, 200e3)):
        broken = BRACKETS.copy()
        broken[1, column] = value
        with pytest.raises(ValueError, match="brackets"):
            flat_market(brackets=broken)


def test_decoding():
    params = TwinParams()
    twin = Twin(flat_market(), replace(params, opposite="close"))
    twin.reset(1)
    # Size 0.75; leverage round(1 + 0.5 * 9 = 5.5) = 6, half to even; stop 0.5 + 0.75 * 2.5 = 2.375; target 6.
    twin.step([0.34, 0.5, 0.0, 0.5, 7.0])
    lot = twin.state.lots[0]
    assert lot.leverage == 6 and lot.entry - lot.stop == 24 and lot.target - lot.entry == 60  # round(23.75)
    twin.step([-1.0, 0, 0, 0, 0])
    assert twin.state.events[0] == ("closed", 0, 998)
    assert twin.step([-1.0, 0, 0, np.inf, 0]).events == [("verdict", "HOLD")]
    multi = Twin(flat_market(), replace(params, actions="multi_discrete", max_leverage=7.0))
    multi.reset(1)
    assert multi.step([2, 3, 2, 1, 2]).lots[0].leverage == 3  # ceil(3 * 0.7 = 2.1)
    assert multi.state.lots[0].side == SHORT
    assert multi.step([3, 0, 0, 0, 0]).events[-1] == ("verdict", "ACCEPTED")


def test_terminal_states_absorb():
    market = flat_market(atr=100.0)
    candle(market, 2, 1, mark_low=903)
    twin = opened(market, FAR, replace(FREE, ruin_fraction=0.95))
    state = twin.step(WAIT)
    assert (state.terminated, state.truncated, state.t) == (True, False, 3)
    assert state.reward == pytest.approx(np.log(0.9))
    wallet, refused = state.wallet, list(state.ledger.verdicts)
    state = twin.step(FAR)
    assert (state.t, state.wallet, state.ledger.verdicts, state.reward) == (3, wallet, refused, 0)
    last = Twin(market, FREE)
    last.reset(7)
    assert last.step(FAR).truncated and last.state.t == 8 and last.state.lots[0] is not None
    with pytest.raises(ValueError, match="start 8"):
        last.reset(8)


def test_shaped_reward_and_observation():
    market = flat_market(features=np.full((9, 1), 50.0), feature_mean=np.full(1, 20.0))
    candle(market, 1, 1, close=1010, high=1010, mark_close=1010, mark_high=1010)
    market.atr[2] = 20
    state = opened(market, params=replace(FREE, reward="shaped")).state
    # Equity 10 100, notional 10 100: log(1.01) - 0.0002 - 0.1 * 1 * 20 / 1010.
    assert state.reward == pytest.approx(np.log(1.01) - 0.0002 - 2 / 1010)
    # Feature (50 - 20) / 1 clipped to 10; then lots, side, margin, notional, unrealised (each / 10 100), age
    # and time left of 192, (1010 - 903) / 1010, (0.1 * 10 100 - 1000) / 10 100.
    expected = [10, 0.1, 1, 1000 / 10_100, 1, 100 / 10_100, 1 / 192, 191 / 192, 107 / 1010, 10 / 10_100]
    np.testing.assert_allclose(state.obs, expected, rtol=1e-12)


def test_near_ties_are_found_and_flipped_only_when_told():
    ties = Ties({0: 2.0, 2: 0.0})
    assert ties.ceil("a", 1 + 1e-7) == 2 and ties.ceil("b", 1.5) == 2 and ties.round("c", 2.5) == 2
    assert not ties.at_most("d", 99.99999, 100.0) and ties.at_most("e", 99.0, 100.0)
    assert [case.where for case in ties.cases] == ["a", "c", "d"] and ties.flipped == 1
    # float32(0.1) * 10 is 1.00000001 in float64, whose ceiling is 2; in float32 the product is 1.
    market = flat_market()
    candle(market, 2, 0, open=985, low=975, close=985)
    twin = opened(market, params=replace(FREE, stop_depth=float(np.float32(0.1))))
    assert step_like(twin, WAIT, lambda other: ("stopped", 0, 984) in other.state.events)
    assert twin.flipped_ties == 1 and twin.state.t == 3 and twin.state.wallet == 9840
    twin = opened(market, params=replace(FREE, stop_depth=float(np.float32(0.1))))
    assert not step_like(twin, WAIT, lambda other: ("stopped", 0, 970) in other.state.events)
    assert ("stopped", 0, 983) in twin.state.events and twin.flipped_ties == 0


def random_market(seed: int, bars: int = 220, candles: int = 3) -> TwinMarket:
    """A random walk with jumps, its own mark, empty candles and bars, and funding every 8 bars."""
    rng = np.random.default_rng(seed)
    table = {name: np.zeros((bars, candles)) for name in PRICES}
    valid = rng.random((bars, candles)) > 0.1
    valid[rng.random(bars) < 0.05] = False
    valid[0] = True
    last = 20_000.0
    for t in range(bars):
        for k in range(candles):
            gap = rng.choice([0.0, rng.normal(0, 0.06)], p=[0.95, 0.05])
            first = last if not valid[t, k] else max(np.round(last * (1 + gap)), 5000.0)
            close = first if not valid[t, k] else max(np.round(first * np.exp(rng.normal(0, 0.004))), 5000.0)
            wick = rng.integers(0, 80, 2) * rng.choice([1, 20], p=[0.9, 0.1]) * valid[t, k]
            candle_ = [first, max(first, close) + wick[0], min(first, close) - wick[1], close]
            shift = rng.integers(-20, 21)
            for name, price in zip(PRICES, [*candle_, *(np.asarray(candle_) + shift)], strict=True):
                table[name][t, k] = price
            last = close
    rate = np.where(np.arange(bars) % 8 == 0, rng.normal(0, 0.004, bars), 0.0)
    atr = np.round(rng.uniform(50, 900, bars + 1))
    rest = dict(valid=valid, funding_rate=rate, funding_price=table["mark_open"][:, 0].copy(), atr=atr)
    return flat_market(bars, **table, **rest, features=np.zeros((bars + 1, 1)), maintenance_fee_rate=0.0006)


@pytest.mark.parametrize("actions", ["box5", "multi_discrete"])
@pytest.mark.parametrize("intrabar", ["nearest", "pessimistic", "optimistic"])
@pytest.mark.parametrize("exposure", [0.3, 1.0])
def test_ledger_identities_over_random_episodes(actions, intrabar, exposure):
    params = TwinParams(
        actions=actions, intrabar=intrabar, opposite="close" if actions == "box5" else "refuse",
        max_exposure=exposure, max_hold=12, max_leverage=40.0, max_lots=4, ruin_fraction=0.01,
    )  # fmt: skip
    rng = np.random.default_rng(7)
    seen = set()
    for seed in range(5):
        twin = Twin(random_market(seed), params)
        state, total = twin.reset(1), 0.0
        while not (state.terminated or state.truncated):
            action = rng.uniform(-1.2, 1.2, 5) if actions == "box5" else rng.integers(0, [4, 4, 5, 4, 5])
            state = twin.step(action if rng.random() < 0.4 else WAIT)
            total += state.reward
            seen |= {event[:2] if event[0] == "verdict" else event[:1] for event in state.events}
            ledger, lots = state.ledger, [lot for lot in state.lots if lot is not None]
            losses = [ledger.fees, ledger.funding, ledger.liquidation_losses]
            terms = [params.initial_equity, ledger.realised, *(-loss for loss in losses)]
            assert abs(state.wallet - sum(terms)) <= 1e-6 * sum(map(abs, terms))
            margins = [lot.margin for lot in lots]
            assert state.wallet >= sum(margins) - 1e-6 and min(margins, default=0) >= 0
            exits = ledger.stopped + ledger.targets + ledger.timed_out + ledger.closed + ledger.liquidated
            assert ledger.opened == exits + len(lots) and len({lot.side for lot in lots}) <= 1
            assert sum(ledger.verdicts) == state.t - 1
            assert ledger.verdicts[Verdict.ACCEPTED] >= ledger.opened
            assert np.all(np.isfinite(state.obs))
        if state.equity > 1e-3 * params.initial_equity:
            assert total == pytest.approx(np.log(state.equity / params.initial_equity), abs=1e-9)
    kinds = {"opened", "closed", "stopped", "target", "timed_out", "liquidated", "ambiguous"}
    assert {event[0] for event in seen} == kinds | {"verdict"}


def test_a_loaded_state_steps_like_the_one_it_was_taken_from():
    market, rng = random_market(3), np.random.default_rng(1)
    twin, copy = Twin(market, TwinParams()), Twin(market, TwinParams())
    state = twin.reset(1)
    names = ("side", "quantity", "entry", "margin", "leverage", "stop", "target", "liquidation", "age")
    for _ in range(60):
        lots = {n: np.array([getattr(x, n) if x else 0 for x in state.lots], np.float64) for n in names}
        ledger = dict(vars(state.ledger), verdicts=np.array(state.ledger.verdicts))
        loaded = copy.load(t=state.t, end=state.end, wallet=state.wallet, lots=lots, ledger=ledger)
        np.testing.assert_array_equal(loaded.obs, state.obs)
        action = rng.uniform(-1, 1, 5)
        state, loaded = twin.step(action), copy.step(action)
        np.testing.assert_array_equal(loaded.obs, state.obs)
        assert (loaded.events, loaded.ledger, loaded.wallet) == (state.events, state.ledger, state.wallet)


def test_nothing_after_the_open_is_seen_by_the_decision():
    t, rng = 40, np.random.default_rng(2)
    market = random_market(5)
    changed = (*PRICES, "valid", "funding_rate", "funding_price", "atr")
    future = {name: getattr(market, name).copy() for name in changed}
    for name in PRICES:
        future[name][t] = np.where(np.arange(3) == 0, future[name][t], future[name][t] + 7)
        future[name][t + 1 :] += 11
        if name not in ("open", "mark_open"):
            future[name][t, 0] += 7  # of the first candle only the open is known
    future["valid"][t, 1:] ^= True
    future["funding_rate"][t + 1 :] += 0.01
    future["atr"][t + 1 :] += 5
    twins = [Twin(market, TwinParams()), Twin(replace(market, **future), TwinParams())]
    for twin in twins:
        twin.reset(1)
    while twins[0].state.t < t:
        action = rng.uniform(-1, 1, 5)
        states = [twin.step(action) for twin in twins]
        np.testing.assert_array_equal(states[0].obs, states[1].obs)
        assert states[0].reward == states[1].reward and states[0].events == states[1].events
    decided = ("opened", "closed", "verdict")
    events = [[e for e in twin.step(Order(LONG, 0.5, 5.0)).events if e[0] in decided] for twin in twins]
    assert events[0] == events[1]
