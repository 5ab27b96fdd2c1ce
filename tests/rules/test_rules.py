"""Golden cases for every rule of the bar (2, 7: test_intrabar.py; 4: test_risk.py; 6: test_margin.py).

The hand-worked market and its numbers are described in markets.py. Slippage, where it is not 0, is
slip(p) = ceil(p / 64 + A / 2): 21 ticks at 1000 with A = 10.
"""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import CONFIG, FREE, HAND, HOLD, expect, hand_market, order, play, reset, step, verdicts

from perpjax.data.markets import concatenate_markets
from perpjax.env import PerpEnv
from perpjax.instrument import Instrument
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.orders import CLOSE, LONG, SHORT, decode, hold_action, sample_action

BOTH = pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
SLIPPING = EnvParams(taker_fee=1 / 1024, slippage_base=1 / 64, slippage_atr=0.5, stop_depth=0.0)
SHAPED = EnvConfig(max_lots=3, episode_length=6, reward="shaped")


# 1. Funding


@BOTH
def test_funding_moves_wallet_margin_and_liquidation_price(side):
    # 1000 steps * 1100 ticks * 0.01 * 0.001 = 11: a long pays, a short receives.
    # Long: M = 989, (98.9 - 10) / 0.99 = 89.80 -> L = 910. Short: M = 1011, (101.1 - 10) / 1.01 = 90.20 -> L = 1091.
    market = hand_market(funding={2: (0.001, 1100)}, atr=100)
    state = play(market, order(side), HOLD)[-1]
    expect(state, funding=11 * side, wallet=10_000 - 11 * side, lot_margin=1000 - 11 * side)
    expect(state, lot_liquidation=910 if side > 0 else 1091, reward=math.log1p(-11 * side / 10_000))
    # Negative rate: the other way round. Long: (101.1 - 10) / 0.99 = 92.02 -> 907; short: (98.9 - 10) / 1.01 -> 1089.
    market = hand_market(funding={2: (-0.001, 1100)}, atr=100)
    state = play(market, order(side), HOLD)[-1]
    expect(state, funding=-11 * side, lot_margin=1000 + 11 * side, lot_liquidation=907 if side > 0 else 1089)


@BOTH
def test_funding_is_paid_once_by_lots_carried_in(side):
    # Settlements at bars 1 and 3. The lot opened in bar 1 pays only the one of bar 3: 1000 * 1000 * 0.01 * 0.001 = 10.
    market = hand_market(funding={1: (0.001, 1000), 3: (0.001, 1000)}, atr=100)
    states = play(market, order(side), HOLD, HOLD, HOLD, HOLD)
    for state, paid in zip(states, (0, 0, 0, 10, 10, 10), strict=True):
        expect(state, funding=paid * side, wallet=10_000 - paid * side)
    # Two lots (1000 steps; 0.25 of the rest first) each pay their own: 250 + 187 steps, 4.37.
    small = order(side, size=0.25)
    expect(play(market, small, small, HOLD)[-1], funding=4.37 * side, lot_margin=250 - 2.5 * side)


def test_funding_is_paid_in_an_invalid_bar_and_before_a_close():
    market = hand_market(funding={2: (0.001, 1000)}, invalid=[(2, 0), (2, 1), (2, 2)], atr=100)
    expect(play(market, order(1), HOLD)[-1], funding=10, lot_margin=990, wallet=9_990)
    market = hand_market(funding={2: (0.001, 1000)}, atr=100)
    expect(play(market, order(1), order(CLOSE))[-1], funding=10, closed=1, wallet=9_990)


def test_funding_at_an_invalid_candle_liquidates_nothing():
    # The settlement is paid, but the opening check waits for a valid candle, wherever the mark stands.
    market = hand_market(funding={2: (0.001, 1000)}, invalid=[(2, 0)], mark={(2, 0): (800, 800, 800, 800)}, atr=100)
    expect(play(market, order(1), HOLD)[-1], funding=10, liquidated=0, open_lots=1)


def test_funding_takes_no_more_than_the_margin():
    # 1000 * 1000 * 0.01 * 0.5 = 5000 > M: 1000 is paid. Nothing is left: (0 - 10) / 0.99 -> L = 1010, reached at
    # once by the opening check, which then takes nothing more.
    state = play(hand_market(funding={2: (0.5, 1000)}, atr=100), order(1), HOLD)[-1]
    expect(state, funding=1000, liquidated=1, liquidation_losses=0, wallet=9_000, open_lots=0)
    # A payment can also be what liquidates: 91 of it leave (90.9 - 10) / 0.99 = 81.7 -> L = 918, and the mark is 915.
    for mark, gone in ((915, 1), (919, 0)):
        market = hand_market(funding={2: (0.0091, 1000)}, mark={(2, 0): (mark,) * 4}, atr=100)
        state = play(market, order(1), HOLD)[-1]
        expect(state, funding=91, liquidated=gone, liquidation_losses=909 * gone)


def test_a_liquidation_price_of_one_tick_is_one():
    # 1x: (1000 - 10) / 0.99 = 1000 ticks away, so none. 100 * 1000 * 0.01 * 0.0015 = 1.5 of funding leaves M = 998.5:
    # (998.5 - 10) / 0.99 = 998.48 -> 999 ticks: L = 1.
    long = order(1, leverage=1.0, stop=3.0)
    for mark, gone in ((1, 1), (2, 0)):
        market = hand_market(funding={2: (0.0015, 1000)}, mark={(3, 1): (1000, 1000, mark, 1000)}, atr=400)
        states = play(market, long, HOLD, HOLD)
        expect(states[1], lot_liquidation=0)
        expect(states[2], lot_liquidation=1, lot_margin=998.5)
        np.testing.assert_allclose(states[2].obs[-2], 0.999, rtol=1e-6)
        expect(states[3], liquidated=gone, open_lots=1 - gone)
        # The same at the opening check: a close order comes too late.
        market = hand_market(funding={2: (0.0015, 1000)}, mark={(3, 0): (mark, mark, mark, mark)}, atr=400)
        expect(play(market, long, HOLD, order(CLOSE))[-1], liquidated=gone, closed=1 - gone)


# 3. Close order


@BOTH
def test_close_fills_at_the_open_with_slippage_and_fee(side):
    # slip(992) = ceil(15.5 + 5) = 21, so a long closes at 971 and a short (opened at 979) at 1013.
    # Long: E = 1021, q = floor(10 000 / 10.21) = 979; notional 9995.59, fee 9995.59 / 1024 = 9.761318.
    #   Exit 979 * 971 * 0.01 = 9506.09, fee 9.283291; P = 979 * -50 * 0.01 = -489.5.
    # Short: E = 979, q = floor(10 000 / 9.79) = 1021, same notional; exit 1021 * 10.13 = 10 342.73, fee 10.100322;
    #   P = -1021 * 34 * 0.01 = -347.14.
    # The candles of the bar, which would stop anything, no longer matter.
    crash = (992, 2000, 1, 992)
    market = hand_market(last={(2, 0): (992, 992, 992, 992), (2, 1): crash}, mark={(2, 1): crash})
    opened, closed = play(market, order(side, stop=3.0), order(CLOSE), params=SLIPPING)[-2:]
    expect(opened, lot_entry=1000 + 21 * side, lot_quantity=1000 - 21 * side, fees=9.761318)
    profit, fee, exit = (-489.5, 9.283291, 9506.09) if side > 0 else (-347.14, 10.100322, 10_342.73)
    expect(closed, closed=1, stopped=0, liquidated=0, realised=profit, fees=9.761318 + fee)
    expect(closed, wallet=10_000 + profit - 9.761318 - fee, traded_notional=9995.59 + exit, open_lots=0)
    expect(closed, equity=10_000 + profit - 9.761318 - fee, ambiguous=0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(closed.account.lots)), "a closed lot leaves something"


def test_close_ends_every_lot():
    small = order(1, size=0.25)
    market = hand_market(last={(3, 0): (1010, 1010, 1010, 1010)}, atr=100)
    # 250 + 187 steps, 10 ticks of profit: 43.7.
    expect(play(market, small, small, order(CLOSE))[-1], closed=2, open_lots=0, realised=43.7, wallet=10_043.7)
    # 140 more in the last free slot, so that every slot is closed.
    market = hand_market(last={(4, 0): (1010, 1010, 1010, 1010)}, atr=100)
    expect(play(market, small, small, small, order(CLOSE))[-1], closed=3, open_lots=0, realised=57.7, wallet=10_057.7)


@BOTH
def test_close_does_not_overtake_a_resting_target(side):
    # Target 80 ticks away, 100 ticks of gap: the limit rests at +80 and fills first, 10 quote a tick: 800 both ways.
    gap = {(2, 0): (1000 + 100 * side,) * 4}
    market = hand_market(last=gap, atr=40)
    held, closed = (play(market, order(side, stop=2.0, target=2.0), action)[-1] for action in (HOLD, order(CLOSE)))
    for state in (held, closed):
        expect(state, targets=1, closed=0, realised=800, wallet=10_800, ambiguous=0)
    assert verdicts(closed) == {"ACCEPTED": 2}  # the review counts the lot as held
    # At the target itself, not one tick beyond it, the limit is not filled, so the close order fills there.
    market = hand_market(last={(2, 0): (1000 + 80 * side,) * 4}, atr=40)
    expect(play(market, order(side, stop=2.0, target=2.0), order(CLOSE))[-1], targets=0, closed=1, realised=800)


@BOTH
def test_close_does_not_escape_a_gapped_stop(side):
    # Stop 20 ticks away; candle 0 opens 60 beyond the entry and falls to 100: with a depth of 1/4 the fill is at -70.
    params = FREE.replace(stop_depth=0.25)
    worst, best = 1000 - 100 * side, 1000 - 60 * side
    candle = (best, max(worst, best), min(worst, best), best)
    market = hand_market(last={(2, 0): candle}, mark={}, atr=10)
    held, closed = (play(market, order(side), action, params=params)[-1] for action in (HOLD, order(CLOSE)))
    for state in (held, closed):
        expect(state, stopped=1, closed=0, realised=-700, gap_losses=400, slippage=100, wallet=9_300)
    # Of two lots the one whose stop (40 ticks) is not reached by the open closes there, at -30.
    market = hand_market(last={(3, 0): (1000 - 30 * side,) * 4}, atr=10)
    far, near = order(side, size=0.25, stop=3.0), order(side, size=0.25, stop=2.0)
    states = play(
        market.with_columns(atr=np.where(np.arange(9) == 1, 20.0, 10.0)), far, near, order(CLOSE), params=params
    )
    # 250 steps stop at 60, 187 steps at 20: 2.5 * 30 and 1.87 * 30.
    expect(states[-1], stopped=1, closed=1, realised=-75 - 56.1, gap_losses=18.7, slippage=0, open_lots=0)


# 5. Open


@BOTH
def test_open_with_slippage_and_fee(side):
    # As above: q = 979 (long), 1021 (short), notional 9995.59, M = 999.559, fee 9.761318.
    # Stop distance max(21 + 1, round(2 * 10)) = 22; target distance max(22, 60) = 60.
    # L: M / (q * 0.01) = E / 10. Long (102.1 - 10.21) / 0.99 = 92.82 -> 928; short (97.9 - 9.79) / 1.01 -> 1067.
    state = play(hand_market(), order(side), params=SLIPPING)[-1]
    entry = 1000 + 21 * side
    expect(state, lot_entry=entry, lot_quantity=1000 - 21 * side, lot_margin=999.559, lot_leverage=10, lot_side=side)
    expect(state, lot_stop=entry - 22 * side, lot_target=entry + 60 * side, lot_liquidation=928 if side > 0 else 1067)
    expect(state, wallet=10_000 - 9.761318, fees=9.761318, traded_notional=9995.59, opened=1, lot_age=1)


def test_an_order_fills_at_the_open_of_the_first_candle():
    # The others open at 1000. q = floor(10 000 / 8) = 1250.
    first = {(1, 0): (800, 1000, 800, 1000)}
    expect(play(hand_market(both=first, atr=100), order(1, stop=3.0))[-1], lot_entry=800, lot_quantity=1250)


@BOTH
def test_distances_are_rounded_half_to_even(side):
    # 0.5 * 25 = 12.5 -> 12; 0.5 * 27 = 13.5 -> 14. The target is at least the stop.
    for atr, distance in ((25, 12), (27, 14)):
        state = play(hand_market(atr=atr), order(side, stop=0.5, target=0.5))[-1]
        expect(state, lot_stop=1000 - distance * side, lot_target=1000 + distance * side)
    # stop multiple 3 > target multiple 0.5: the target multiple is 3 as well.
    state = play(hand_market(), order(side, stop=3.0, target=0.5))[-1]
    expect(state, lot_stop=1000 - 30 * side, lot_target=1000 + 30 * side)
    # No slippage: the stop still lies a tick away. 0.5 * 1 = 0.5 -> 0 < slip + 1 = 1.
    state = play(hand_market(atr=1), order(side, stop=0.5, target=0.5))[-1]
    expect(state, lot_stop=1000 - side, lot_target=1000 + side)


def test_a_fill_is_at_least_one_tick():
    # Price 4, slip = ceil(4 / 64 + 5) = 6: a short opens at max(4 - 6, 1) = 1, q = floor(10 000 / 0.01) = 1e6.
    # (The mark stands at 1, or the short would be liquidated where it opens.)
    params = SLIPPING.replace(taker_fee=0.0)
    market = hand_market(price=4, mark={(1, k): (1, 1, 1, 1) for k in range(3)})
    state = play(market, order(-1), params=params)[-1]
    expect(state, lot_entry=1, lot_quantity=1e6, lot_margin=1000)


def test_an_exit_at_one_tick_is_an_exit():
    # 1x: 100 steps, M = 1000, no liquidation price. Stopped at an open of 1: 100 * 999 * 0.01 = 999 lost.
    market = hand_market(both={(2, 0): (1, 1, 1, 1)}, atr=100)
    state = play(market, order(1, leverage=1.0, stop=3.0), HOLD)[-1]
    expect(state, stopped=1, realised=-999, wallet=9_001)


def test_the_instrument_caps_the_quantity():
    # max_quantity 5 = 500 steps of 0.01: 500 * 10 = 5000 of notional and 500 of margin instead of 10 000 and 1000.
    market = hand_market(instrument=Instrument("CAP", 1.0, 0.01, 5.0, max_quantity=5.0, brackets=HAND.brackets))
    state = play(market, order(1))[-1]
    expect(state, lot_quantity=500, lot_margin=500, traded_notional=5_000)


@BOTH
def test_a_lot_of_one_step_is_a_lot(side):
    # 0.25 * 0.1 * 60 = 1.5 of margin at 10x is one step of 10: M = 1, a tick is 0.01, L as for a thousand steps.
    params, small = FREE.replace(initial_equity=60.0), order(side, size=0.25, stop=0.5)
    dip = (1000, 1000 + 60 * (side < 0), 1000 - 60 * (side > 0), 1000)
    market = hand_market(
        funding={2: (0.001, 1100)}, mark={(2, 2): (1000, 1020, 1000, 1020)}, last={(3, 1): dip}, atr=100
    )
    opened, held, ended = play(market, small, HOLD, HOLD, params=params)[1:]
    expect(opened, lot_quantity=1, lot_margin=1, lot_age=1, lot_liquidation=909 if side > 0 else 1090)
    np.testing.assert_allclose(opened.obs[-2], 0.091 if side > 0 else 0.09, rtol=1e-6)
    # 1100 * 0.01 * 0.001 = 0.011 of funding, and 20 ticks.
    expect(held, lot_age=2, lot_liquidation=910 if side > 0 else 1091, equity=60 + (0.2 - 0.011) * side)
    expect(ended, stopped=1, open_lots=0, realised=-0.5)
    expect(play(market, small, order(CLOSE), params=params)[-1], closed=1, open_lots=0)
    expect(play(market, small, HOLD, params=params.replace(max_hold=2))[-1], timed_out=1, open_lots=0)


# 8. Timeout


@BOTH
def test_timeout_at_the_close_of_its_last_bar(side):
    # max_hold 2: opened in bar 1 (its first), closed at the close of bar 2, 1010, no slippage: +-10 ticks, 100.
    params = FREE.replace(max_hold=2)
    market = hand_market(last={(2, 2): (1000, 1010, 1000, 1010)}, atr=100)
    states = play(market, order(side), HOLD, HOLD, params=params)
    expect(states[1], timed_out=0, lot_age=1)
    expect(states[2], timed_out=1, realised=100 * side, wallet=10_000 + 100 * side, open_lots=0)
    # With slippage: slip(1008) = ceil(15.75 + 5) = 21: 987 for the long (E = 1021), 1029 for the short (E = 979).
    state = play(hand_market(last={(2, 2): (1000, 1008, 1000, 1008)}), order(side, stop=3.0), HOLD,
                 params=SLIPPING.replace(max_hold=2, taker_fee=0.0))[-1]  # fmt: skip
    expect(state, timed_out=1, realised=-9.79 * 34 if side > 0 else -10.21 * 50)
    # max_hold 1: closed in the bar it opened in.
    expect(play(market, HOLD, order(side), params=params.replace(max_hold=1))[-1], timed_out=1, opened=1)


def test_timeout_waits_in_a_bar_without_a_valid_candle():
    params = FREE.replace(max_hold=2)
    empty = [(2, 0), (2, 1), (2, 2)]
    market = hand_market(invalid=[*empty, (3, 2)], last={(3, 1): (1000, 1007, 1000, 1007)}, atr=100)
    states = play(market, order(1), HOLD, HOLD, params=params)
    expect(states[2], timed_out=0, lot_age=2, open_lots=1)
    # Bar 3: the last valid close is that of candle 1, 1007, not what stands in candle 2 (which repeats it).
    expect(states[3], timed_out=1, realised=70)


def test_a_stop_in_the_last_bar_comes_before_the_timeout():
    market = hand_market(last={(2, 2): (1000, 1000, 940, 1000)}, atr=100)
    state = play(market, order(1, stop=0.5), HOLD, params=FREE.replace(max_hold=2))[-1]
    expect(state, stopped=1, timed_out=0, wallet=9_500)
    # And so does a close order.
    state = play(market, order(1, stop=0.5), order(CLOSE), params=FREE.replace(max_hold=2))[-1]
    expect(state, closed=1, timed_out=0, wallet=10_000)


# 9. Exits


@BOTH
def test_slippage_is_summed_over_entries_and_market_exits(side):
    # As in test_close_fills_at_the_open: slip is 21 at 1000, at 992 and at 1008; q = 979 (long), 1021 (short).
    entry = 21 * (9.79 if side > 0 else 10.21)
    params = SLIPPING.replace(max_hold=3)
    opened, held = play(hand_market(), order(side, stop=3.0), HOLD, params=params)[-2:]
    expect(opened, slippage=entry, gap_losses=0, forgiven=0)
    expect(held, slippage=entry)
    market = hand_market(last={(2, 0): (992,) * 4})
    closed = play(market, order(side, stop=3.0), order(CLOSE), params=params)[-1]
    expect(closed, closed=1, slippage=2 * entry, gap_losses=0, forgiven=0)
    market = hand_market(last={(3, 2): (1000, 1008, 1000, 1008)})
    late = play(market, order(side, stop=3.0), HOLD, HOLD, params=params)[-1]
    expect(late, timed_out=1, slippage=2 * entry)
    # A target has none.
    wide = (1000, 1100, 1000, 1100) if side > 0 else (1000, 1000, 900, 900)
    hit = play(hand_market(last={(2, 1): wide}), order(side, stop=3.0), HOLD, params=params)[-1]
    expect(hit, targets=1, slippage=entry, gap_losses=0)


@BOTH
def test_forgiven_is_what_an_exit_would_cost_beyond_the_margin(side):
    # M = 1000, 10 quote a tick, fee 1/512. Stopped by a candle that opens 120 ticks beyond the entry: the loss of 1200
    # is floored at 1000, and the whole fee of 10 * (1000 - 120 d) / 512 is let off.
    params, far = FREE.replace(taker_fee=1 / 512), 1000 - 120 * side
    market = hand_market(last={(2, 0): (far,) * 4}, atr=100)
    state = play(market, order(side, stop=0.5), HOLD, params=params)[-1]
    entry_fee = float(state.account.lots.margin.sum()) + 10_000 / 512
    expect(state, stopped=1, realised=-1000, fees=entry_fee, forgiven=200 + 10 * far / 512, gap_losses=700, slippage=0)
    # 99 ticks: 990 lost, and 10 of the fee of 10 * (1000 - 99 d) / 512 can be paid.
    far = 1000 - 99 * side
    market = hand_market(last={(2, 0): (far,) * 4}, atr=100)
    state = play(market, order(side, stop=0.5), HOLD, params=params)[-1]
    expect(state, realised=-990, fees=entry_fee + 10, forgiven=10 * far / 512 - 10, gap_losses=490)
    # A liquidation costs the margin, by definition: nothing is forgiven.
    market = hand_market(mark={(2, 0): (far,) * 4}, atr=100)
    expect(play(market, order(side, stop=0.5), HOLD, params=params)[-1], liquidated=1, forgiven=0, slippage=0)


@BOTH
def test_no_exit_costs_more_than_the_margin(side):
    # Opened at 1000 without slippage, M = 1000, 10 quote a tick, taker fee 1/512: entry fee 10 000 / 512 = 19.53125.
    # The last price gaps past the stop while the mark stays: 200 ticks, -2000, are cut to P = -M = -1000, fee 0.
    params = FREE.replace(taker_fee=1 / 512)
    gap = 1000 - 200 * side
    state = play(hand_market(last={(2, 1): (gap,) * 4}, atr=100), order(side, stop=0.5), HOLD, params=params)[-1]
    expect(state, stopped=1, realised=-1000, fees=19.53125, wallet=9_000 - 19.53125)
    # 99 ticks: P = -990, M + P = 10 < fee of 9010 (10 990) / 512 = 17.6 (21.5): the fee is 10.
    gap = 1000 - 99 * side
    state = play(hand_market(last={(2, 1): (gap,) * 4}, atr=100), order(side, stop=0.5), HOLD, params=params)[-1]
    expect(state, stopped=1, realised=-990, fees=29.53125, wallet=9_000 - 19.53125)
    # 50 ticks: P = -500, fee 9500 / 512 = 18.5546875 (short: 10 500 / 512 = 20.5078125).
    market = hand_market(last={(2, 1): (1000, 1000 + 60 * (side < 0), 1000 - 60 * (side > 0), 1000)}, atr=100)
    fee = 18.5546875 if side > 0 else 20.5078125
    state = play(market, order(side, stop=0.5), HOLD, params=params)[-1]
    expect(state, stopped=1, realised=-500, fees=19.53125 + fee, wallet=9_500 - 19.53125 - fee)
    # A target pays its fee from the profit, +500: 10 500 / 512 (9500 / 512).
    market = hand_market(last={(2, 1): (1000, 1000 + 60 * (side > 0), 1000 - 60 * (side < 0), 1000)}, atr=100)
    fee = 20.5078125 if side > 0 else 18.5546875
    state = play(market, order(side, stop=0.5, target=0.5), HOLD, params=params)[-1]
    expect(state, targets=1, realised=500, fees=19.53125 + fee, traded_notional=20_000 + 500 * side)
    # A liquidation pays no fee on top of M.
    market = hand_market(mark={(2, 1): (1000 - 95 * side,) * 4}, atr=100)
    state = play(market, order(side, stop=3.0), HOLD, params=params)[-1]
    expect(state, liquidated=1, fees=19.53125, liquidation_losses=1000, realised=0, traded_notional=10_000)


# 10. Mark to market, 11. Reward and flags


@BOTH
def test_equity_is_marked_to_the_mark_close(side):
    # Last closes at 1030, mark at 1020: +-20 ticks of 10 quote. log(1 +- 200 / 10 000).
    market = hand_market(last={(2, 2): (1000, 1030, 1000, 1030)}, mark={(2, 2): (1000, 1025, 1000, 1020)}, atr=100)
    states = play(market, order(side), HOLD, HOLD)
    expect(states[2], equity=10_000 + 200 * side, wallet=10_000, reward=math.log1p(side * 0.02))
    # Back to 1000 in bar 3.
    expect(states[3], equity=10_000, reward=-math.log1p(side * 0.02))


def test_reward_is_the_log_return_of_equity():
    market = hand_market(last={(2, 1): (1000, 1000, 940, 1000)}, atr=100)
    states = play(market, order(1, stop=0.5), HOLD, params=SLIPPING)
    for before, after in itertools.pairwise(states):
        chex.assert_trees_all_close(after.reward, jnp.log(after.equity / before.equity), rtol=1e-4)
    # A hold on a flat account earns exactly nothing.
    assert float(play(market, HOLD)[-1].reward) == 0.0


def test_both_equities_are_floored_inside_the_logarithm():
    # Exposure and ruin fraction 1 and 0, 1x: M = 8000 of 8000 at E = 1000, q = 800; the mark goes to 1 (the lot has no
    # L: (8000 / 8 - 10) / 0.99 = 1000 -> 0): equity 8000 - 800 * 999 * 0.01 = 8. Floor 1e-3 * 8000 = 8: log(1e-3).
    params = EnvParams(initial_equity=8000.0, taker_fee=0.0, slippage_base=0.0, slippage_atr=0.0,
                       max_exposure=1.0, ruin_fraction=0.0)  # fmt: skip
    ruin = {(2, 2): (1000, 1000, 1, 1)}
    states = play(hand_market(mark=ruin, atr=400), order(1, leverage=1.0, stop=3.0), HOLD, HOLD, params=params)
    expect(states[1], lot_liquidation=0, lot_stop=-200)
    # float32(0.01) is 2e-8 too small, and 7992 of it is a loss of 2e-4 less.
    expect(states[2], equity=8, reward=math.log(1e-3), terminated=False, rtol=1e-4)
    expect(states[3], equity=8000, reward=-math.log(1e-3), rtol=1e-5)
    # The observation divides by the equity itself, 8000 / 8, down to 1e-6 of the initial one.
    np.testing.assert_allclose(states[2].obs[3], 1000, rtol=1e-4)
    # A short at 1x, q = 800: at 2100 equity is 8000 - 8800 = -800 < 0 if the mark jumps in a bar that trades nothing.
    market = hand_market(mark={(2, 2): (1000, 2100, 1000, 2100)}, invalid=[(2, 2)], atr=400)
    state = play(market, order(-1, leverage=1.0, stop=3.0), HOLD, params=params)[-1]
    expect(state, equity=-800, reward=math.log(1e-3), terminated=True, rtol=1e-5)
    assert np.isfinite(state.obs).all()
    np.testing.assert_allclose(state.obs[3], 8000 / 8e-3, rtol=1e-5)


def test_ruin_terminates_at_the_limit_itself():
    # 8000, exposure 1/8: M = 1000; liquidated: 7000 = 0.875 * 8000 <= limit.
    params = FREE.replace(initial_equity=8000.0, max_exposure=0.125, ruin_fraction=0.875)
    market = hand_market(mark={(2, 1): (900, 900, 900, 900)}, atr=100)
    state = play(market, order(1, stop=3.0), HOLD, params=params)[-1]
    expect(state, equity=7000, terminated=True, truncated=False)
    state = play(market, order(1, stop=3.0), HOLD, params=params.replace(ruin_fraction=0.874))[-1]
    expect(state, equity=7000, terminated=False)
    # Unrealised losses count too: 1000 steps at 912, mark 88 ticks down, -880: 7120 <= 0.89 * 8000 = 7120.
    market = hand_market(mark={(2, 2): (1000, 1000, 912, 912)}, atr=100)
    state = play(market, order(1, stop=3.0), HOLD, params=params.replace(ruin_fraction=0.890625))[-1]
    expect(state, equity=7120, terminated=True, open_lots=1)


def test_truncation_at_the_end_of_the_episode_and_of_the_market():
    market = hand_market(atr=100)
    states = play(market, order(1), *[HOLD] * 6)
    # Six bars from bar 1: truncated when t reaches 7, with the lot open and marked.
    assert [bool(s.truncated) for s in states] == [False] * 6 + [True] * 2
    assert [int(s.t) for s in states] == [1, 2, 3, 4, 5, 6, 7, 7]
    expect(states[6], open_lots=1, terminated=False)
    # From bar 5 the market ends first: N = 8.
    states = play(market, HOLD, HOLD, HOLD, HOLD, start=5)
    assert [int(s.t) for s in states] == [5, 6, 7, 8, 8]
    assert [bool(s.truncated) for s in states] == [False, False, False, True, True]
    # Ruin in the last bar: terminated, not truncated.
    market = hand_market(mark={(7, 2): (900, 900, 900, 900)}, atr=100)
    state = play(market, order(1, stop=3.0), HOLD, HOLD, params=FREE.replace(ruin_fraction=0.95), start=5)[-1]
    expect(state, t=8, terminated=True, truncated=False)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_ended_states_are_absorbing(end):
    market = hand_market(mark={(2, 1): (900, 900, 900, 900)}, funding={3: (0.01, 1000)}, atr=100)
    params = FREE.replace(ruin_fraction=0.95 if end == "terminated" else 0.1)
    states = play(market, order(1, stop=3.0), HOLD, order(-1), *[HOLD] * 4, order(1), order(CLOSE), params=params)
    ended = next(i for i, s in enumerate(states) if getattr(s, end))
    assert ended == (2 if end == "terminated" else 6)
    for state in states[ended + 1 :]:
        chex.assert_trees_all_equal(state, states[ended].replace(reward=jnp.zeros(())))


def test_shaped_reward():
    # Entry at 1000, flat: log return 0; -0.0002 for the entry; notional 10 000 / equity 10 000 * ATR known after the
    # step (the row of bar 2: 50) / close of bar 1 (1000) * 0.1 = 0.005.
    atr = [100, 100, 50, 20, 20, 20, 20, 20, 20]
    market = hand_market(mark={(3, 1): (905, 905, 905, 905)}, last={(2, 2): (1000, 1000, 800, 800)}, atr=atr)
    states = play(market, order(1, stop=3.0), HOLD, HOLD, config=SHAPED)
    expect(states[1], reward=-0.0002 - 0.005)
    # Bar 2: still 10 000 at the mark; 0.1 * 1 * 20 / 800 (the last close, not the mark).
    expect(states[2], reward=-0.0025)
    # Bar 3: liquidated, log(0.9) - 0.005; nothing is exposed.
    expect(states[3], reward=math.log(0.9) - 0.005)
    # Exposure is at the last mark of the bar: 10 ticks up earn 100, and the notional is 1000 * 1010 * 0.01 = 10 100.
    rising = hand_market(mark={(1, 2): (1000, 1010, 1000, 1010)}, atr=atr)
    expect(play(rising, order(1, stop=3.0), config=SHAPED)[-1], reward=math.log(1.01) - 0.0002 - 0.005)
    # Ruin costs 0.1 more.
    states = play(market, order(1, stop=3.0), HOLD, HOLD, config=SHAPED, params=FREE.replace(ruin_fraction=0.95))
    expect(states[3], reward=math.log(0.9) - 0.005 - 0.1, terminated=True)
    # The opening check's liquidations count too, and weights are parameters.
    market = hand_market(mark={(2, 0): (905, 905, 905, 905)}, atr=100)
    params = FREE.replace(entry_penalty=0.0, risk_penalty=0.0, liquidation_penalty=0.25)
    states = play(market, order(1, stop=3.0), HOLD, config=SHAPED, params=params)
    expect(states[1], reward=0.0)
    expect(states[2], reward=math.log(0.9) - 0.25)


# Section 6. Observation


@BOTH
def test_observation_of_the_account(side):
    # Two lots: 250 and 187 steps at 1000, M = 437. Mark closes bar 2 at 1020: unrealised +-437 * 20 * 0.01 = 87.4,
    # notional 437 * 10.2 = 4457.4. Opened in bars 1 and 2: the oldest is 2 of 192 bars.
    # L = 909: (1020 - 909) / 1020; short L = 1090: 70 / 1020. available = 0.1 * equity - 437.
    market = hand_market(mark={(2, 2): (1000, 1020, 1000, 1020)}, atr=100)
    small = order(side, size=0.25)
    states = play(market, small, small)
    equity = 10_000 + 87.4 * side
    distance = (1020 - 909) / 1020 if side > 0 else (1090 - 1020) / 1020
    expected = [2 / 3, side, 437 / equity, 4457.4 / equity, 87.4 * side / equity, 2 / 192, 190 / 192, distance,
                (0.1 * equity - 437) / equity]  # fmt: skip
    chex.assert_trees_all_close(np.asarray(states[2].obs[-9:]), np.asarray(expected, np.float32), rtol=1e-5)
    # Flat: nothing held, no time left, liquidation 1 away, 0.1 available; after reset and after HOLD alike.
    for state in (states[0], play(market, HOLD)[-1]):
        chex.assert_trees_all_close(np.asarray(state.obs[-9:]), np.float32([0, 0, 0, 0, 0, 0, 0, 1, 0.1]), rtol=1e-6)


def test_observation_of_features_is_scaled_and_clipped():
    market = hand_market()  # features[t] = t
    market = market.replace(scaler_mean=jnp.array([2.0]), scaler_scale=jnp.array([0.25]))
    states = play(market, HOLD, HOLD, HOLD, HOLD)
    # (t - 2) / 0.25 for t = 1 .. 5, clipped to 10.
    assert [float(s.obs[0]) for s in states] == [-4, 0, 4, 8, 10]


def test_observation_time_left_and_no_liquidation_price():
    # 1x long: no L, so the distance is 1. max_hold 2 in two empty bars: the age goes on, the time left stays 0.
    market = hand_market(invalid=[(t, k) for t in (2, 3) for k in range(3)], atr=100)
    states = play(market, order(1, leverage=1.0), HOLD, HOLD, params=FREE.replace(max_hold=2))
    np.testing.assert_allclose([s.obs[-4:-1] for s in states[1:]], [[0.5, 0.5, 1], [1, 0, 1], [1.5, 0, 1]])


# Section 5. Actions and reset


def test_box5_decodes_affinely():
    params, config = EnvParams(max_leverage=10.0), EnvConfig(actions="box5")

    def decoded(*action: float) -> list[float]:
        return [float(x) for x in decode(jnp.array(action, jnp.float32), params, config)]

    assert decoded(1, 1, 1, 1, 1) == [LONG, 1, 10, 3, 6]
    assert decoded(-1, -1, -1, -1, -1) == [SHORT, 0, 1, 0.5, 0.5]
    # Leverage 1 + 0.5 * 9 = 5.5 -> 6 (half to even); stop 1.75; target 3.25.
    assert decoded(0, 0, 0, 0, 0) == [0, 0.5, 6, 1.75, 3.25]
    assert decoded(9, 9, -9, 9, -9) == [LONG, 1, 1, 3, 0.5]
    # 0.33 itself is a hold; the next float is not.
    edge = np.float32(0.33)
    assert [decoded(x, 0, 0, 0, 0)[0] for x in (edge, np.nextafter(edge, np.float32(1)))] == [0, LONG]
    assert [decoded(-x, 0, 0, 0, 0)[0] for x in (edge, np.nextafter(edge, np.float32(1)))] == [0, SHORT]


def test_multi_discrete_decodes_by_table():
    params, config = EnvParams(max_leverage=10.0), EnvConfig()

    def decoded(*action: float, params: EnvParams = params) -> list[float]:
        return [float(x) for x in decode(jnp.array(action), params, config)]

    columns = np.array([decoded(*[i] * 5) for i in range(5)]).T
    np.testing.assert_array_equal(columns[0], [0, LONG, SHORT, CLOSE, CLOSE])  # beyond a table: its last entry
    np.testing.assert_array_equal(columns[1], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_array_equal(columns[2], [1, 2, 3, 5, 10])
    np.testing.assert_array_equal(columns[3], [0.5, 1, 2, 3, 3])
    np.testing.assert_array_equal(columns[4], [0.5, 1, 2, 4, 6])
    assert decoded(-7, -1, -1, -1, -1) == [0, 0.25, 1, 0.5, 0.5]
    # Leverages of a maximum of 25: 2.5, 5, 7.5, 12.5, 25, rounded up.
    cap = EnvParams(max_leverage=25.0)
    assert [decoded(1, 0, i, 0, 0, params=cap)[2] for i in range(5)] == [3, 5, 8, 13, 25]


def test_actions_that_are_not_finite_are_hold():
    params, config = EnvParams(), EnvConfig(actions="box5")
    judge = jax.jit(lambda a: decode(a, params, config))
    for bad in (np.nan, np.inf, -np.inf):
        for i in range(5):
            order = judge(jnp.ones(5).at[i].set(bad))
            assert int(order.direction) == 0
            chex.assert_tree_all_finite(order)
    assert int(judge(jnp.full(5, 3e38)).direction) == LONG
    assert int(judge(hold_action(config)).direction) == 0
    with pytest.raises(ValueError, match=r"\(5,\), not \(2, 5\)"):
        decode(jnp.zeros((2, 5)), params, config)


def test_sampled_actions_cover_their_space():
    keys = jax.random.split(jax.random.key(0), 500)
    discrete = jax.vmap(lambda k: sample_action(k, EnvConfig()))(keys)
    assert [sorted(set(column)) for column in discrete.T.tolist()] == [list(range(n)) for n in (4, 4, 5, 4, 5)]
    box = jax.vmap(lambda k: sample_action(k, EnvConfig(actions="box5")))(keys)
    assert float(box.min()) >= -1 and float(box.max()) <= 1 and float(box.std()) > 0.5
    for config in (EnvConfig(), EnvConfig(actions="box5")):
        assert sample_action(jax.random.key(0), config, (7, 3)).shape == (7, 3, 5)


@BOTH
@pytest.mark.parametrize("opposite", ["refuse", "close"])
@pytest.mark.parametrize("actions", ["box5", "multi_discrete"])
def test_a_direction_against_the_lots(actions, opposite, side):
    config = EnvConfig(actions=actions, opposite=opposite, max_lots=3, episode_length=6)
    box = actions == "box5"
    one_way, other_way = (np.array([d, 1, 1, 1, 1], np.float32) if box else order(d) for d in (side, -side))
    state = play(hand_market(atr=100), one_way, other_way, config=config)[-1]
    closes = opposite == "close"
    expect(state, closed=closes, open_lots=1 - closes, opened=1)
    assert verdicts(state) == ({"ACCEPTED": 2} if closes else {"NO_HEDGE": 1, "ACCEPTED": 1})
    # With nothing held, or in the same direction, it opens.
    expect(play(hand_market(atr=100), other_way, config=config)[-1], opened=1, lot_side=-side)


def test_opposite_is_about_lots_held_at_the_decision():
    # The long is liquidated by the opening check of bar 2; the short direction was against it, so it was a CLOSE and
    # finds nothing: HOLD.
    config = EnvConfig(actions="box5", opposite="close", max_lots=3, episode_length=6)
    market = hand_market(mark={(2, 0): (905,) * 4}, atr=100)
    long, short = (np.array([d, 1, 1, 1, 1], np.float32) for d in (1, -1))
    state = play(market, long, short, config=config)[-1]
    expect(state, liquidated=1, opened=1, verdicts=[1, 0, 0, 0, 0, 0, 0, 0, 1])


def test_explicit_starts():
    env = PerpEnv(hand_market(), FREE, CONFIG)
    key = jax.random.key(0)
    for start in (1, 7, np.int64(4), jnp.int32(3)):
        assert int(env.reset(key, start).t) == int(start)
    for start in (0, 8, -1, 10**6):
        with pytest.raises(ValueError, match=f"start = {start} "):
            env.reset(key, start)
    # Traced: clipped.
    assert [int(reset(env, s).t) for s in (-5, 0, 1, 7, 8, 99)] == [1, 1, 1, 7, 7, 7]


def test_a_concrete_start_is_checked_under_jit():
    env = PerpEnv(hand_market(), FREE, CONFIG)
    with pytest.raises(ValueError, match="start = 99 "):
        jax.jit(lambda key: env.reset(key, 99))(jax.random.key(0))


def test_the_first_start_that_is_wrong_is_named():
    # Rows of two markets of 8 bars: 0 .. 8 and 9 .. 17, of which 1 .. 7 and 10 .. 16 may be traded.
    env = PerpEnv(concatenate_markets([hand_market(), hand_market()]), FREE, CONFIG)
    env.check_start(np.array([1, 7, 10, 16]))
    for starts, wrong in (([3, 8, 9, 12], "8"), ([17], "17"), ([1.0, 2.5], "1.0")):
        with pytest.raises(ValueError, match=rf"start = {wrong} .*1 \.\. 7, 10 \.\. 16"):
            env.check_start(np.array(starts))


def test_drawn_starts_are_uniform_over_all_that_leave_room():
    # Bars 1 .. 7, six of an episode: bars 1 and 2. With an episode of 3: bars 1 .. 5.
    for length, starts in ((6, [1, 2]), (3, [1, 2, 3, 4, 5])):
        env = PerpEnv(hand_market(), FREE, EnvConfig(episode_length=length))
        drawn = jax.jit(jax.vmap(lambda k, env=env: env.reset(k).t))(jax.random.split(jax.random.key(1), 2000))
        values, counts = np.unique(np.asarray(drawn), return_counts=True)
        assert values.tolist() == starts
        assert counts.min() > 2000 / len(starts) * 0.8


def test_reset_is_a_fresh_account():
    state = reset(PerpEnv(hand_market(), FREE.replace(initial_equity=123.0), CONFIG), 2)
    expect(state, t=2, wallet=123, wallet_low=0, equity=123, reward=0, terminated=False, truncated=False, end=8)
    chex.assert_trees_all_equal(state.account.lots, jax.tree.map(jnp.zeros_like, state.account.lots))
    chex.assert_trees_all_equal(state.account.ledger, jax.tree.map(jnp.zeros_like, state.account.ledger))


def test_a_market_without_room_for_an_episode_is_refused():
    with pytest.raises(ValueError, match=r"episode of 8 bars.*1 \.\. 7"):
        PerpEnv(hand_market(), FREE, EnvConfig(episode_length=8))
    assert PerpEnv(hand_market(), FREE, EnvConfig(episode_length=7)).observation_size == 10


def test_step_counts_each_verdict_once():
    state = reset(PerpEnv(hand_market(), FREE, CONFIG), 1)
    env = PerpEnv(hand_market(), FREE, CONFIG)
    for i, action in enumerate((order(1), order(-1), HOLD, order(CLOSE)), 1):
        state = step(env, state, jnp.asarray(action))
        assert int(state.account.ledger.verdicts.sum()) == i
    assert state.account.ledger.verdicts.tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 2]
