"""Rules 2 and 7: the first level that is reached, and its fill price.

Cases are written as offsets from the entry of 1000 ticks, negative being adverse, and run for a long and, mirrored,
for a short. The lot has 1000 steps (10 quote a tick) and a margin of 1000; L lies at -91 (long) or +90 (short).
The levels, by the ATR and the multiples of the order:
    near   ATR 100, stop -50, target +50      the stop is reached before L
    far    ATR 100, stop -100, target +100    the stop is beyond L
    equal  ATR 91 (long), 90 (short): the stop is exactly L, the target +91 or +90
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import CONFIG, FREE, HOLD, expect, hand_market, order, play, step, verdicts

from perpjax.env import PerpEnv
from perpjax.instrument import Instrument
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.bar import Bar
from perpjax.rules.execution import fill_entry, fill_exit, fill_stop, slip
from perpjax.rules.intrabar import ExitReason, Touch, resolve
from perpjax.state import Lots

PRICES = ("open", "high", "low", "close")
RULES = ("nearest", "pessimistic", "optimistic")
CONFIGS = {rule: EnvConfig(intrabar=rule, max_lots=3, episode_length=6) for rule in RULES}
MULTIPLES = {"near": (0.5, 0.5), "far": (1.0, 1.0), "equal": (1.0, 1.0)}
FLAT = (0, 0, 0, 0)

# levels, last and mark candle as (open, worst, best, close), outcome by rule (one for all, or in the order of RULES):
# S stopped, L liquidated, T target, - still open, followed by the fill's offset; and whether it was ambiguous.
CASES = {
    "nothing": ("near", (0, -49, 49, 0), (0, -89, 300, 0), "-", 0),
    "stop touched": ("near", (0, -50, 0, 0), FLAT, "S-50", 0),
    "stop, mark calm": ("near", (0, -120, 0, 0), FLAT, "S-50", 0),
    "L on the mark only": ("near", FLAT, (0, -95, 0, 0), "L", 0),
    "L on the last price only, stop beyond": ("far", (0, -99, 0, 0), FLAT, "-", 0),
    "L on the last price only, stop reached": ("far", (0, -120, 0, -95), FLAT, "S-100", 0),
    "target touched": ("near", (0, 0, 50, 0), FLAT, "-", 0),
    "target, one tick beyond": ("near", (0, 0, 51, 0), FLAT, "T", 0),
    "target on the mark only": ("near", FLAT, (0, 0, 80, 0), "-", 0),
    "open beyond the target": ("near", (70, 60, 90, 80), FLAT, "T", 0),
    "open at the target": ("near", (50, 0, 50, 0), FLAT, "-", 0),
    "wick that recovers": ("near", (0, -300, 40, 40), (0, -300, 40, 40), "S-50 L S-50", 1),
    "open past the stop": ("near", (-60, -60, -60, -60), FLAT, "S-60", 0),
    "open on the stop": ("near", (-50, -120, 0, 0), FLAT, "S-50", 0),
    "open past the stop, L inside": ("near", (-60, -120, 0, 0), (0, -120, 0, 0), "S-60", 0),
    "open past the far stop, L inside": ("far", (-120, -130, 0, 0), (0, -130, 0, 0), "S-120", 0),
    "mark open past L": ("near", (0, -49, 0, 0), (-95, -95, 0, 0), "L", 0),
    "mark and last open past both": ("near", (-120, -120, 0, 0), (-95, -120, 0, 0), "L", 0),
    "mark open past L, open beyond the target": ("near", (70, 0, 70, 0), (-95, -95, 0, 0), "L", 0),
    "open past the stop, then the target": ("near", (-60, -60, 60, 60), FLAT, "S-60", 0),
    "open beyond the target, then all": ("near", (70, -120, 90, 0), (0, -120, 0, 0), "T", 0),
    "stop and L": ("near", (0, -120, 0, 0), (0, -120, 0, 0), "S-50 L S-50", 1),
    "L and a stop beyond it": ("far", (0, -120, 0, 0), (0, -120, 0, 0), "L L S-100", 1),
    "stop equal to L": ("equal", (0, -95, 0, 0), (0, -95, 0, 0), "S-level L S-level", 1),
    "stop and target": ("near", (0, -60, 60, 0), FLAT, "S-50 S-50 T", 1),
    "L and target": ("far", (0, 0, 110, 0), (0, -95, 0, 0), "L L T", 1),
    "far stop and target": ("far", (0, -110, 110, 0), FLAT, "S-100 S-100 T", 1),
    "all three": ("near", (0, -120, 60, 0), (0, -120, 0, 0), "S-50 L T", 1),
    "all three, far": ("far", (0, -120, 110, 0), (0, -120, 0, 0), "L L T", 1),
}


def mirrored(offsets: tuple[float, ...], side: int) -> tuple[float, ...]:
    """(open, worst, best, close) offsets as open, high, low, close prices."""
    o, worst, best, c = (1000 + side * x for x in offsets)
    return (o, max(worst, best), min(worst, best), c)


def open_order(levels: str, side: int) -> tuple[np.ndarray, float]:
    stop, target = MULTIPLES[levels]
    atr = {"equal": 91.0 if side > 0 else 90.0}.get(levels, 100.0)
    return order(side, stop=stop, target=target), atr


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
@pytest.mark.parametrize("case", CASES)
def test_one_candle(case, side, rule):
    levels, last, mark, outcomes, ambiguous = CASES[case]
    action, atr = open_order(levels, side)
    at = (2, 1)
    market = hand_market(last={at: mirrored(last, side)}, mark={at: mirrored(mark, side)}, atr=atr)
    state = play(market, action, HOLD, config=CONFIGS[rule])[-1]
    outcome = (outcomes.split() * 3)[RULES.index(rule)]
    kind, fill = outcome[0], outcome[1:]
    level = {"near": 50, "far": 100, "equal": atr}[levels]
    # 1000 steps: 10 quote a tick. A liquidation costs the margin, 1000; a stop no more; a target brings its distance.
    lost = min(10 * (level if fill == "-level" else -float(fill or 0)), 1000)
    profit = {"S": -lost, "T": 10 * level}.get(kind, 0)
    expect(
        state,
        stopped=kind == "S",
        liquidated=kind == "L",
        targets=kind == "T",
        open_lots=kind == "-",
        ambiguous=ambiguous,
        realised=profit,
        liquidation_losses=1000.0 * (kind == "L"),
        wallet=10_000 + profit - 1000 * (kind == "L"),
    )


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_liquidation_is_at_the_level_and_not_one_tick_before(side):
    distance = 91 if side > 0 else 90
    for off, gone in ((distance, 1), (distance - 1, 0)):
        market = hand_market(mark={(2, 1): mirrored((0, -off, 0, 0), side)}, atr=100)
        expect(play(market, open_order("far", side)[0], HOLD)[-1], liquidated=gone, open_lots=1 - gone)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
@pytest.mark.parametrize("rule", RULES)
def test_the_first_candle_decides_whatever_the_rule(rule, side):
    near, _ = open_order("near", side)
    up, down = mirrored((0, 0, 60, 0), side), mirrored((0, -120, 0, 0), side)
    # Target in candle 0, stop and L in candle 1: the target. And the other way round: not the target.
    market = hand_market(last={(2, 0): up}, both={(2, 1): down}, atr=100)
    expect(play(market, near, HOLD, config=CONFIGS[rule])[-1], targets=1, ambiguous=0, wallet=10_500)
    market = hand_market(last={(2, 1): up}, both={(2, 0): down}, atr=100)
    expect(play(market, near, HOLD, config=CONFIGS[rule])[-1], targets=0, open_lots=0)
    # The last candle of a bar is looked at like the first, and so is the next bar's.
    market = hand_market(last={(2, 2): up}, atr=100)
    states = play(market, near, HOLD, config=CONFIGS[rule])
    expect(states[-2], open_lots=1)
    expect(states[-1], targets=1)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_the_entry_bar_is_checked(side):
    # The lot opens at the open of bar 1, and candle 1 of the same bar reaches its stop at -50: 10 * 50 lost.
    near, _ = open_order("near", side)
    market = hand_market(last={(1, 1): mirrored((0, -60, 0, 0), side)}, atr=100)
    expect(play(market, near)[-1], opened=1, stopped=1, open_lots=0, wallet=9_500, reward=np.log(0.95))
    # So does the very candle it opened in,
    market = hand_market(last={(1, 0): mirrored((0, -60, 0, 0), side)}, atr=100)
    expect(play(market, near)[-1], opened=1, stopped=1, wallet=9_500)
    # and its mark: opened at 1000, it is liquidated when the mark has fallen past L.
    market = hand_market(mark={(1, 0): mirrored((0, -95, 0, -95), side)}, atr=100)
    expect(play(market, open_order("far", side)[0])[-1], opened=1, liquidated=1, wallet=9_000)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_an_order_that_would_be_liquidated_at_once_is_refused(side):
    # L is 909 for a long and 1090 for a short; candle 0 opens with the mark on it, then one tick before it.
    far, _ = open_order("far", side)
    off = 91 if side > 0 else 90
    for distance, opened in ((off + 4, 0), (off, 0), (off - 1, 1)):
        market = hand_market(mark={(1, 0): mirrored((-distance, -distance, 0, 0), side)}, atr=100)
        state = play(market, far)[-1]
        expect(state, opened=opened, open_lots=opened, liquidated=0, wallet=10_000, traded_notional=10_000 * opened)
        assert verdicts(state) == {"ACCEPTED": 1} if opened else {"IMMEDIATE_LIQUIDATION": 1}
    # Slippage can do it, too. At 32x the margin is 31 ticks of 1000, and slip(1000) = 63: L = E - d 23 is beyond 1000.
    wide = FREE.replace(slippage_base=1 / 16, max_leverage=32.0)
    action = np.array([1 if side > 0 else 2, 3, 4, 3, 4], np.int32)
    state = play(hand_market(atr=100), action, params=wide)[-1]
    assert verdicts(state) == {"IMMEDIATE_LIQUIDATION": 1}
    expect(state, opened=0, wallet=10_000, slippage=0)
    # BELOW_MINIMUM comes first.
    small = np.array([1 if side > 0 else 2, 0, 4, 3, 4], np.int32)
    poor = wide.replace(initial_equity=1.0)
    assert verdicts(play(hand_market(atr=100), small, params=poor)[-1]) == {"BELOW_MINIMUM": 1}


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_invalid_candles_fill_and_trigger_nothing(side):
    near, _ = open_order("near", side)
    wild = mirrored((-500, -600, 600, 0), side)
    for k in range(3):
        market = hand_market(both={(2, k): wild}, invalid=[(2, k)], atr=100)
        expect(play(market, near, HOLD)[-1], open_lots=1, wallet=10_000)
    # A valid candle beside it works: the stop at -50 in candle 2, filled at the trigger.
    market = hand_market(both={(2, 1): wild}, last={(2, 2): mirrored((0, -55, 0, 0), side)}, invalid=[(2, 1)], atr=100)
    expect(play(market, near, HOLD)[-1], stopped=1, wallet=9_500)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_opening_check_comes_before_the_order(side):
    # Rule 2. The mark opens bar 2 past L while the last price does not move: LIQUIDATED before any order is looked at.
    far, _ = open_order("far", side)
    market = hand_market(mark={(2, 0): mirrored((-95, -95, -95, -95), side)}, atr=100)
    opened, closed = play(market, far, order(2))[-2:]
    expect(opened, open_lots=1)
    expect(closed, liquidated=1, closed=0, wallet=9_000, traded_notional=10_000)
    assert closed.account.ledger.verdicts.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]  # CLOSE found no lot: HOLD
    # An opposite order is no hedge any more; its lot is sized from what is left: 0.1 * 9000 = 900 of margin.
    # It is opened at 1000, and at -95 against the first lot the mark is +95 for it.
    expect(play(market, far, order(-side, stop=3.0, target=6.0))[-1], opened=2, liquidated=1, lot_margin=900.0)
    # Not while candle 0 is invalid; then the next valid candle does it.
    past = mirrored((-95, -95, -95, -95), side)
    market = hand_market(mark={(2, 0): past}, invalid=[(2, 0)], atr=100)
    expect(play(market, far, HOLD)[-1], open_lots=1)
    market = hand_market(mark={(2, 0): past, (2, 1): past}, invalid=[(2, 0)], atr=100)
    expect(play(market, far, HOLD)[-1], liquidated=1)
    # Last price past L, mark not: no liquidation. One tick before L: none.
    market = hand_market(last={(2, 0): mirrored((-95, -95, -95, -95), side)}, atr=100)
    expect(play(market, far, HOLD)[-1], open_lots=1)
    off = -90 if side > 0 else -89
    market = hand_market(mark={(2, 0): mirrored((off, off, off, off), side)}, atr=100)
    expect(play(market, far, HOLD)[-1], open_lots=1)
    off -= 1
    market = hand_market(mark={(2, 0): mirrored((off, off, 0, 0), side)}, atr=100)
    expect(play(market, far, HOLD)[-1], liquidated=1)
    # At L itself a CLOSE comes too late; one tick before, it is in time.
    expect(play(market, far, order(2))[-1], liquidated=1, closed=0)
    market = hand_market(mark={(2, 0): mirrored((off + 1, off + 1, 0, 0), side)}, atr=100)
    expect(play(market, far, order(2))[-1], liquidated=0, closed=1)


@pytest.mark.parametrize("invalid", [[(2, 1)], [(2, 2)], [(2, 1), (2, 2)]], ids=str)
def test_the_opening_check_asks_the_first_candle_alone(invalid):
    market = hand_market(mark={(2, 0): (905, 905, 905, 905)}, invalid=invalid, atr=100)
    expect(play(market, order(1), order(2))[-1], liquidated=1, closed=0)


def test_a_lot_entered_at_one_tick_is_lost_like_any_other():
    market = hand_market(mark={(2, 0): (1090, 1090, 1090, 1090)}, atr=100)
    state = play(market, order(-1, stop=3.0))[-1]
    lots = state.account.lots
    state = state.replace(account=state.account.replace(lots=lots.replace(entry=jnp.minimum(lots.entry, 1.0))))
    expect(state, lot_entry=1, lot_liquidation=1090, lot_margin=1000)
    expect(step(PerpEnv(market, FREE, CONFIG), state, jnp.asarray(HOLD)), liquidated=1, liquidation_losses=1000)


def test_slots_freed_by_the_opening_check_are_used_in_the_same_bar():
    # Three lots fill three slots: 0.25 * 1000 = 250 steps and M = 250; 0.25 * 750 -> 187; 0.25 * 563 = 140.75 -> 140.
    # Bar 5 opens with the mark at 905 <= L = 909: 577 lost. Then SHORT, 0.1 * 9423 = 942.3 -> 942 steps, in slot 0.
    small = order(1, size=0.25, stop=3.0)
    market = hand_market(mark={(4, 0): (905, 905, 905, 905)}, atr=100)
    state = play(market, small, small, small, order(-1, stop=3.0))[-1]
    expect(state, opened=4, liquidated=3, liquidation_losses=577, wallet=9_423, open_lots=1)
    expect(state, lot_side=-1, lot_quantity=942, lot_age=1, lot_liquidation=1090)
    # A long is refused: candle 0 opens on that mark for it, too.
    state = play(market, small, small, small, order(1, stop=3.0))[-1]
    expect(state, opened=3, liquidated=3, wallet=9_423, open_lots=0, verdicts=[0, 0, 0, 0, 0, 0, 0, 1, 3])
    # Without the gap the fourth order is refused MAX_LOTS.
    state = play(hand_market(atr=100), small, small, small, order(1, stop=3.0))[-1]
    expect(state, opened=3, verdicts=[0, 0, 1, 0, 0, 0, 0, 0, 3])


def test_the_last_candle_of_the_longest_bar():
    # 10 units from 100, stop at 97; the last candle of a bar opens at 90: 100 lost. With 300 candles of 3 s a bar the
    # packed index of candle 291 once read as 35, and 9 970 were left.
    instrument = Instrument("TENTH", 0.1, 0.01, 5.0, 1e5)
    for candles in (1, 15):
        last = {(2, candles - 1): (900, 900, 900, 900)}
        market = hand_market(last=last, candles=candles, atr=10, instrument=instrument)
        state = play(market, order(1, leverage=1.0, stop=3.0), HOLD)[-1]
        expect(state, stopped=1, opened=1, open_lots=0, wallet=9_900, gap_losses=70)
    for candles in (16, 300, 600, 900):
        with pytest.raises(ValueError, match=f"candles_per_bar is {candles}; it must be 1 to 15"):
            hand_market(candles=candles)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_stop_fill_with_slippage_and_depth(side):
    # slip(p) = ceil(p / 64 + 0.5 * 16); stop_depth 1/4; no fees. Long: open 1000, slip ceil(15.625 + 8) = 24, E = 1024;
    # q = floor(10 000 / 10.24) = 976. Stop 3 * 16 = 48 (> slip + 1 = 25): 976. Candle 900 .. 960 opens at 960 (past the
    # stop): x = 960, slip(960) = 23, depth ceil(60 / 4) = 15: fill 922, loss 976 * 102 * 0.01 = 995.52.
    # From inside (opens at 990, low 901): x = 976, slip = ceil(15.25 + 8) = 24, depth ceil(75 / 4) = 19: fill 933,
    # loss 976 * 91 * 0.01 = 888.16.
    # Short: E = 976, q = floor(10 000 / 9.76) = 1024, stop 1024. Opens at 1040, high 1100: x = 1040, slip ceil(16.25
    # + 8) = 25, depth 15: fill 1080, loss 1024 * 104 * 0.01 = 1064.96, but no more than M = 1024 * 9.76 / 10 = 999.424.
    # From inside (1010, high 1099): x = 1024, slip 24, depth ceil(75 / 4) = 19: fill 1067, 1024 * 91 * 0.01 = 931.84.
    # Slippage in ticks, entry and exit: 24 + 38 and 24 + 43; 24 + 40 and 24 + 43. The gap is 16 ticks, both ways.
    params = EnvParams(taker_fee=0.0, slippage_base=1 / 64, slippage_atr=0.5, stop_depth=0.25)
    candles = {
        1: ((960, 970, 900, 950), (990, 990, 901, 950)),
        -1: ((1040, 1100, 1030, 1050), (1010, 1099, 1010, 1050)),
    }
    losses = {1: (995.52, 888.16), -1: (999.424, 931.84)}
    for ohlc, loss in zip(candles[side], losses[side], strict=True):
        market = hand_market(last={(2, 1): ohlc}, atr=16)
        state = play(market, order(side, stop=3.0), HOLD, params=params)[-1]
        expect(state, stopped=1, realised=-loss, wallet=10_000 - loss)
        tick, gapped = (9.76 if side > 0 else 10.24), ohlc[0] in (960, 1040)
        exit = (38 if side > 0 else 40) if gapped else 43
        expect(state, slippage=tick * (24 + exit), gap_losses=tick * 16 * gapped)
        expect(state, forgiven=1064.96 - 999.424 if side < 0 and gapped else 0, rtol=1e-5)


def test_fill_prices():
    params, atr = EnvParams(slippage_base=1 / 64, slippage_atr=0.5, stop_depth=0.25), jnp.float32(10)
    # 1000 / 64 + 5 = 20.625 -> 21; 64 / 64 + 5 = 6 exactly.
    np.testing.assert_array_equal(slip(jnp.array([1000.0, 64.0]), atr, params), [21, 6])
    assert float(fill_entry(jnp.float32(1.0), jnp.float32(1000.0), atr, params)) == 1021
    assert float(fill_entry(jnp.float32(-1.0), jnp.float32(1000.0), atr, params)) == 979
    assert float(fill_exit(jnp.float32(1.0), jnp.float32(1000.0), atr, params)) == 979
    assert float(fill_exit(jnp.float32(-1.0), jnp.float32(1000.0), atr, params)) == 1021
    # At least one tick: 3 - ceil(3 / 64 + 5) = -3.
    assert float(fill_exit(jnp.float32(1.0), jnp.float32(3.0), atr, params)) == 1
    sides, stops = jnp.array([1.0, 1.0, -1.0, -1.0, 1.0]), jnp.array([960.0, 960.0, 1024.0, 1024.0, 6.0])
    opens, extremes = jnp.array([970.0, 896.0, 1000.0, 1088.0, 6.0]), jnp.array([896.0, 832.0, 1088.0, 1090.0, 2.0])
    # 960: 15 + 5 = 20, depth 64 / 4 = 16 -> 924.  896: 14 + 5 = 19, 16 -> 861.
    # 1024: 16 + 5 = 21, 16 -> 1061.  1088: 17 + 5 = 22, ceil(0.5) = 1 -> 1111.  6: ceil(5.09) = 6, 1 -> -1 -> 1.
    triggers = sides * jnp.minimum(sides * stops, sides * opens)
    fills = fill_stop(sides, triggers, extremes, atr, params)
    np.testing.assert_array_equal(fills, [924, 861, 1061, 1111, 1])


def by_hand(bar: dict[str, np.ndarray], lot: dict[str, float], side: int, rule: str) -> tuple[int, int, int]:
    """Rule 7 in plain Python: how, candle and ambiguous of one lot."""
    k = len(bar["open"])
    stop, target, level = lot["stop"], lot["target"], lot["liquidation"]
    worst, best = ("low", "high") if side > 0 else ("high", "low")

    def past(price: float, limit: float) -> bool:
        return price <= limit if side > 0 else price >= limit

    def beyond(price: float) -> bool:
        return price >= target + 1 if side > 0 else price <= target - 1

    for i in range(k):
        if not bar["valid"][i]:
            continue
        reached = {
            ExitReason.LIQUIDATED: level > 0 and past(bar["mark_" + worst][i], level),
            ExitReason.STOPPED: past(bar[worst][i], stop),
            ExitReason.TARGET: beyond(bar[best][i]),
        }
        if not any(reached.values()):
            continue
        if level > 0 and past(bar["mark_open"][i], level):
            return ExitReason.LIQUIDATED, i, 0
        if past(bar["open"][i], stop):
            return ExitReason.STOPPED, i, 0
        if beyond(bar["open"][i]):
            return ExitReason.TARGET, i, 0
        liquidation_first = level > 0 and (level > stop if side > 0 else level < stop)
        first = {
            "nearest": (ExitReason.LIQUIDATED, ExitReason.STOPPED)
            if liquidation_first
            else (ExitReason.STOPPED, ExitReason.LIQUIDATED),
            "pessimistic": (ExitReason.LIQUIDATED, ExitReason.STOPPED),
            "optimistic": (ExitReason.TARGET, ExitReason.STOPPED, ExitReason.LIQUIDATED),
        }[rule]
        how = next(e for e in (*first, ExitReason.TARGET) if reached[e])
        return how, i, int(sum(reached.values()) >= 2)
    return ExitReason.NONE, k, 0


@pytest.mark.parametrize("rule", RULES)
def test_counting_equals_a_loop_over_candles(rule):
    rng, n, k, slots = np.random.default_rng(1), 400, 4, 5
    prices = rng.integers(5, 40, (n, k, 2))
    extremes = np.sort(np.concatenate([prices, rng.integers(5, 40, (n, k, 2))], -1), -1)
    shift = rng.integers(-3, 4, (n, k))
    bar = dict(open=prices[..., 0], high=extremes[..., -1], low=extremes[..., 0], close=prices[..., 1])
    bar |= {"mark_" + name: x + shift for name, x in bar.items()}
    bar["valid"] = rng.random((n, k)) > 0.2
    side = rng.choice([-1, 1], n)
    held = rng.random((n, slots)) > 0.2
    stop, target = (20 + side[:, None] * s * rng.integers(0, 20, (n, slots)) for s in (-1, 1))
    level = 20 - side[:, None] * rng.integers(-2, 22, (n, slots))
    level = np.where(rng.random((n, slots)) < 0.1, 0, np.maximum(level, 0))
    lots = {name: np.where(held, x, 0) for name, x in dict(stop=stop, target=target, liquidation=level).items()}
    zeros = np.zeros((n, slots))

    def on_device(b: dict, x: dict, side: jax.Array, quantity: jax.Array, zero: jax.Array) -> Touch:
        rest = dict(entry=zero, margin=zero, leverage=zero, age=zero)
        lots = Lots(side=side * (quantity > 0), quantity=quantity, **x, **rest)
        order = (*PRICES, *("mark_" + name for name in PRICES), "valid")  # as in `pack_rows`
        columns = jnp.concatenate([*(b[name] for name in order), jnp.zeros(5)])
        return resolve(Bar(columns, jnp.bool_(False), k, has_mark=True), lots, side, rule)

    floats = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (bar, lots, side, held * 1.0))
    touch = jax.jit(jax.vmap(on_device))(*floats, jnp.asarray(zeros, jnp.float32))
    seen = np.zeros(4, int)
    for i in range(n):
        row = {name: x[i] for name, x in bar.items()}
        for j in range(slots):
            lot = {name: x[i, j] for name, x in lots.items()}
            expected = by_hand(row, lot, side[i], rule) if held[i, j] else (ExitReason.NONE, k, 0)
            assert (touch.reason[i, j], touch.candle[i, j], touch.ambiguous[i, j]) == expected, (
                i,
                j,
                row,
                lot,
                side[i],
            )
            seen[expected[0]] += 1
    assert (seen > 50).all(), seen


def test_without_mark_candles_the_last_price_liquidates():
    market = hand_market(last={(2, 1): (1000, 1000, 905, 1000)}, has_mark=False, atr=100)
    state = play(market, order(1, stop=3.0), HOLD, config=CONFIG, params=FREE)[-1]
    expect(state, liquidated=1, wallet=9_000)
