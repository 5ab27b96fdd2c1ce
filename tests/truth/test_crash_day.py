"""10 October 2025, 21:12 to 21:24 UTC, in ORCAUSDT and NEARUSDT: what a long lot at 10x suffers, candle by candle.

Real 3-minute candles; everything expected is worked out here, from the raw files, in plain Python (`worked_out`), and
the cases below say in numbers what happens. ORCA has hourly mark candles, NEAR none: liquidation is judged on the
last price in both. Prices in ticks of 0.001:

            ORCA   open high  low  close        NEAR   open high  low  close
    21:00          1735 1749 1694  1745                2787 2810 2745  2804
    21:03          1744 1755 1741  1747                2805 2819 2780  2788
    21:06          1747 1752 1738  1741                2787 2801 2764  2769
    21:09          1742 1753 1727  1730                2769 2798 2752  2753
    21:12          1729 1736 1534  1596                2753 2761 2530  2623
    21:15          1605 1632 1303  1306                2623 2647 2278  2319
    21:18          1307 1312  741   743                2315 2325 1543  1679
    21:21           743  824  675   821                1679 2215 1646  2203
    21:24           821  971  820   944                2204 2344 2172  2299
    21:30          1018 1125 1017  1092                2270 2452 2234  2303

An order of size 1 at 10x on 10 000 quote has a margin of 1000: E = open + ceil(0.0002 open + 0.1 ATR);
q = floor(10 000 / (E x 0.001)) units; L = E - ceil((0.1 - 0.004) E / (1 - 0.004)); the stop is round(multiple x ATR)
below E.
"""

import dataclasses
import datetime
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from markets import HOLD, order, verdicts

from perpjax import EnvConfig, Lots, Market, PerpEnv, build_market
from perpjax.rules.intrabar import ExitReason, resolve

FILES = {
    "ORCA": "binance-um_ORCAUSDT_perp_3m_20241231_20260219.parquet",
    "NEAR": "binance-um_NEARUSDT_perp_3m_20250704_20251231.parquet",
}
RULES = ("nearest", "pessimistic", "optimistic")
TICK, FEE, K = 0.001, 0.0006, 5


def utc(clock: str, day: int = 10) -> int:
    """Milliseconds of a time of day, October 2025."""
    hour, minute = map(int, clock.split(":"))
    return int(datetime.datetime(2025, 10, day, hour, minute, tzinfo=datetime.UTC).timestamp()) * 1000


FIRST, LAST = utc("00:00", day=1), utc("00:00", day=11)


@functools.cache
def candles(folder: pathlib.Path, symbol: str, lost: tuple[str, ...]) -> pa.Table:
    """The ten days up to the crash and the day of it, some of its candles lost."""
    table = pq.read_table(folder / FILES[symbol])
    stamps = table["open_time_ms"]
    keep = pc.and_(pc.greater_equal(stamps, FIRST), pc.less(stamps, LAST))
    gone = pc.is_in(stamps, pa.array([utc(clock) for clock in lost], pa.int64()))
    return table.filter(pc.and_(keep, pc.invert(gone)))


@functools.cache
def market_of(folder: pathlib.Path, symbol: str, lost: tuple[str, ...] = ()) -> Market:
    extra = {}
    if symbol == "ORCA":
        names = {"mark": "mark_1h", "funding": "funding"}
        extra = {
            k: pq.read_table(folder / f"binance-um_ORCAUSDT_{v}_20241231_20260219.parquet") for k, v in names.items()
        }
    return build_market(candles(folder, symbol, lost), symbol=f"{symbol}USDT", features=None, **extra)


@functools.cache
def rows_of(folder: pathlib.Path, symbol: str, lost: tuple[str, ...] = ()) -> dict[int, tuple[int, int, int, int]]:
    """Open time to open, high, low, close in ticks, straight from the file; volume 0 would be no candle."""
    table = candles(folder, symbol, lost)
    columns = [table[c].to_numpy() for c in ("open", "high", "low", "close")]
    prices = np.round(np.stack(columns, -1) / TICK).astype(int)
    traded = table["volume"].to_numpy() > 0
    return {
        int(t): tuple(map(int, p))
        for t, p, v in zip(table["open_time_ms"].to_numpy(), prices, traded, strict=True)
        if v
    }


def atr_at(rows: dict, at_ms: int) -> int:
    """Wilder ATR(14) of the 15-minute bars that have closed at `at_ms`, whole ticks."""
    atr, before = None, None
    for bar in range(FIRST, at_ms, 900_000):
        inside = [rows[t] for t in range(bar, bar + 900_000, 180_000) if t in rows]
        high, low, close = (before,) * 3 if not inside else (
            max(c[1] for c in inside), min(c[2] for c in inside), inside[-1][3],
        )  # fmt: skip
        move = high - low if before is None else max(high - low, abs(high - before), abs(low - before))
        atr = move if atr is None else (13 * atr + move) / 14
        before = close
    return max(math.floor(atr + 0.5), 1)


@dataclasses.dataclass(frozen=True)
class Lot:
    """A long lot, and its end, worked out here."""

    entry: int
    quantity: int
    margin: float
    stop: int
    target: int
    liquidation: int
    how: str
    """S stopped, L liquidated."""
    when: str
    """Of the candle that ended it."""
    fill: int
    """Of a stop; 0 if liquidated."""
    ambiguous: bool


def worked_out(rows: dict, entry_clock: str, multiple: float, rule: str) -> Lot:
    """Open at a bar's open, and follow the candles until a level is reached."""
    start = utc(entry_clock)
    atr, price = atr_at(rows, start), rows[start][0]
    slip = math.ceil(0.0002 * price + 0.1 * atr)
    entry = price + slip
    quantity = math.floor(10_000 / (entry * TICK))
    margin = quantity * entry * TICK / 10
    stop = entry - max(slip + 1, round(multiple * atr))
    target = entry + max(entry - stop, 6 * atr)
    liquidation = entry - math.ceil((0.1 - 0.004) * entry / (1 - 0.004))
    for t in range(start, LAST, 180_000):
        if t not in rows:
            continue
        open_, high, low, _ = rows[t]
        assert high <= target, "no target is reached on this day"
        if low > max(stop, liquidation):
            continue
        ambiguous = False
        if open_ <= liquidation:
            how = "L"
        elif open_ <= stop or low > liquidation:
            how = "S"
        else:
            how, ambiguous = ("L" if rule == "pessimistic" else "S"), True
        x = min(stop, open_)
        atr = atr_at(rows, t - (t - FIRST) % 900_000)
        fill = x - math.ceil(0.0002 * x + 0.1 * atr) - math.ceil(0.1 * (x - low)) if how == "S" else 0
        clock = datetime.datetime.fromtimestamp(t / 1000, datetime.UTC).strftime("%H:%M")
        return Lot(entry, quantity, margin, stop, target, liquidation, how, clock, fill, ambiguous)
    raise AssertionError("nothing happened to this lot")


# symbol, candles lost, opened at, stop multiple; then E, stop, L and, for each rule, what ended it in which candle.
CASES = {
    # ATR 29: E = 1735 + ceil(0.347 + 2.9) = 1739; L = 1739 - ceil(167.6) = 1571.
    # Stop 14 below (round(14.5) = 14, half to even) = 1725: the first candle's low of 1694 takes it, far from L.
    "ORCA 21:00, narrow": (("ORCA", (), "21:00", 0.5), (1739, 1725, 1571), ("S 21:00",) * 3),
    # Stop 87 below = 1652. 21:00 to 21:09 stay above it; 21:12 opens at 1729 and falls to 1534, through both
    # 1652 and 1571: the stop came first on the way down, but nobody can prove it.
    "ORCA 21:00, wide": (("ORCA", (), "21:00", 3.0), (1739, 1652, 1571), ("S 21:12", "L 21:12", "S 21:12")),
    # ATR 42: E = 1605 + ceil(0.321 + 4.2) = 1610; L = 1610 - ceil(155.2) = 1454. Stops 1589 and 1484; the candle
    # 21:15 itself falls from 1605 to 1303, through all of them.
    "ORCA 21:15, narrow": (("ORCA", (), "21:15", 0.5), (1610, 1589, 1454), ("S 21:15", "L 21:15", "S 21:15")),
    "ORCA 21:15, wide": (("ORCA", (), "21:15", 3.0), (1610, 1484, 1454), ("S 21:15", "L 21:15", "S 21:15")),
    # ATR 52: E = 2787 + ceil(0.557 + 5.2) = 2793; L = 2793 - ceil(269.2) = 2523; stop 26 below: 21:00 has 2745.
    "NEAR 21:00, narrow": (("NEAR", (), "21:00", 0.5), (2793, 2767, 2523), ("S 21:00",) * 3),
    # Stop 156 below = 2637. 21:12 falls to 2530: seven ticks above L. The stop, whatever the rule.
    "NEAR 21:00, wide": (("NEAR", (), "21:00", 3.0), (2793, 2637, 2523), ("S 21:12",) * 3),
    # ATR 69: E = 2623 + ceil(0.525 + 6.9) = 2631; L = 2631 - ceil(253.6) = 2377. Stops 2597 (round(34.5) = 34) and
    # 2424; the candle 21:15 falls to 2278.
    "NEAR 21:15, narrow": (("NEAR", (), "21:15", 0.5), (2631, 2597, 2377), ("S 21:15", "L 21:15", "S 21:15")),
    "NEAR 21:15, wide": (("NEAR", (), "21:15", 3.0), (2631, 2424, 2377), ("S 21:15", "L 21:15", "S 21:15")),
    # Gaps: the same crash through a feed that lost candles. Without 21:12 the next price is the open of 21:15, 1605:
    # below the stop of 1652 and above L = 1571. What the open decides comes first, so it is stopped under every
    # rule, though the candle goes on to 1303; and it fills from 1605, not from 1652.
    "ORCA gap past the stop": (("ORCA", ("21:12",), "21:00", 3.0), (1739, 1652, 1571), ("S 21:15",) * 3),
    "NEAR gap past the stop": (("NEAR", ("21:12",), "21:00", 3.0), (2793, 2637, 2523), ("S 21:15",) * 3),
    # Without 21:15 as well the next price is 1307 (2315 in NEAR), below L: liquidated under every rule.
    "ORCA gap past L": (("ORCA", ("21:12", "21:15"), "21:00", 3.0), (1739, 1652, 1571), ("L 21:18",) * 3),
    "NEAR gap past L": (("NEAR", ("21:12", "21:15"), "21:00", 3.0), (2793, 2637, 2523), ("L 21:18",) * 3),
}

step = jax.jit(PerpEnv.step)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_a_long_lot_at_10x(shared_data, case, rule):
    (symbol, lost, opened, multiple), levels, outcomes = CASES[case]
    lot = worked_out(rows_of(shared_data, symbol, lost), opened, multiple, rule)
    # The arithmetic of the table above is that of this file.
    assert (lot.entry, lot.stop, lot.liquidation) == levels
    assert f"{lot.how} {lot.when}" == outcomes[RULES.index(rule)]

    market = market_of(shared_data, symbol, lost)
    bars = [(utc(clock) - market.start_ms) // 900_000 for clock in (opened, lot.when)]
    assert not market.has_mark and market.candles_per_bar == K
    # The candle: `resolve` on the bar of the end, with the lot worked out here.
    fields = dict(side=1, quantity=lot.quantity, entry=lot.entry, margin=lot.margin, leverage=10, stop=lot.stop,
                  target=lot.target, liquidation=lot.liquidation)  # fmt: skip
    lots = Lots(**{k: jnp.float32([v]) for k, v in fields.items()}, age=jnp.zeros(1, jnp.int32))
    hit = resolve(market.bar(jnp.int32(bars[1])), lots, jnp.float32(1), rule)
    assert ExitReason(int(hit.reason[0])) == (ExitReason.STOPPED if lot.how == "S" else ExitReason.LIQUIDATED)
    assert int(hit.candle[0]) == (utc(lot.when) - market.start_ms) // 180_000 % K
    assert bool(hit.ambiguous[0]) == lot.ambiguous

    # The account: open at the bar's open, then hold until that bar.
    env = PerpEnv(market, config=EnvConfig(intrabar=rule, max_lots=2, episode_length=8))
    state = env.reset(jax.random.key(0), bars[0])
    for bar in range(bars[0], bars[1] + 1):
        ledger = state.account.ledger
        assert int(ledger.stopped + ledger.liquidated) == 0
        if bar > bars[0]:
            held = state.account.lots
            assert [float(getattr(held, k)[0]) for k in fields] == pytest.approx(list(fields.values()), rel=1e-6)
        state = step(env, state, jnp.asarray(order(1, stop=multiple) if bar == bars[0] else HOLD))
    ledger = state.account.ledger
    entry_fee = FEE * 10 * lot.margin
    if lot.how == "L":
        # The margin, once: nothing is filled, no fee on top.
        realised, fees, lost_margin = 0.0, entry_fee, lot.margin
    else:
        realised = lot.quantity * (lot.fill - lot.entry) * TICK
        assert realised > -lot.margin
        fees, lost_margin = entry_fee + FEE * lot.quantity * lot.fill * TICK, 0.0
    assert (int(ledger.opened), int(ledger.stopped), int(ledger.liquidated)) == (1, lot.how == "S", lot.how == "L")
    assert int(ledger.ambiguous) == lot.ambiguous
    assert float(ledger.realised) == pytest.approx(realised, rel=1e-5)
    assert float(ledger.fees) == pytest.approx(fees, rel=1e-5)
    assert float(ledger.funding) == 0
    assert float(ledger.liquidation_losses) == pytest.approx(lost_margin, rel=1e-6)
    assert float(state.account.wallet) == pytest.approx(10_000 + realised - fees - lost_margin, rel=1e-6)
    assert float(state.equity) == float(state.account.wallet)


def test_what_the_rule_is_worth(shared_data):
    """ORCA, opened at 21:00 with the wide stop: 1739 x 5750 units, margin 999.925.

    Stopped at 21:12: 1652 - ceil(0.33 + 2.9) - ceil(0.1 x (1652 - 1534)) = 1652 - 16 = 1636: 103 ticks, 592.25 quote.
    Liquidated: 999.925: 40 % of the margin more, for whoever was not filled on the way.
    """
    lots = {rule: worked_out(rows_of(shared_data, "ORCA"), "21:00", 3.0, rule) for rule in RULES}
    assert lots["nearest"].fill == lots["optimistic"].fill == 1636
    assert lots["pessimistic"].how == "L" and lots["pessimistic"].margin == pytest.approx(999.925)


def test_gap_fills_are_worse_than_the_trigger(shared_data):
    """Without the candle 21:12 in ORCA: 1605 - ceil(0.321 + 0.1 ATR) - ceil(0.1 x (1605 - 1303)), far below 1652."""
    rows = rows_of(shared_data, "ORCA", ("21:12",))
    lot = worked_out(rows, "21:00", 3.0, "nearest")
    # The lost candle is not in the ATR either: 31 ticks at 21:15, 42 with it.
    assert (atr_at(rows, utc("21:15")), atr_at(rows_of(shared_data, "ORCA"), utc("21:15"))) == (31, 42)
    assert lot.fill == 1605 - 4 - 31


def test_a_dead_feed_is_settled_at_the_next_open(shared_data):
    """Nothing from 21:12 to 21:27: the mark open of 21:30 (1018) is past L = 1571, before any order is looked at."""
    lost = ("21:12", "21:15", "21:18", "21:21", "21:24", "21:27")
    market = market_of(shared_data, "ORCA", lost)
    start = (utc("21:00") - market.start_ms) // 900_000
    for rule in RULES:
        env = PerpEnv(market, config=EnvConfig(intrabar=rule, max_lots=2, episode_length=8))
        state = env.reset(jax.random.key(0), start)
        for action, lots in ((order(1, stop=3.0), 1), (order(2), 1), (order(2), 0)):
            state = step(env, state, jnp.asarray(action))
            assert int((state.account.lots.quantity > 0).sum()) == lots
        # To close was refused in the dead bar (DATA_GAP), and came too late in the next one.
        assert verdicts(state) == {"ACCEPTED": 1, "DATA_GAP": 1, "HOLD": 1}
        ledger = state.account.ledger
        assert (int(ledger.liquidated), int(ledger.closed), int(ledger.ambiguous)) == (1, 0, 0)
        assert float(ledger.liquidation_losses) == pytest.approx(999.925)


def test_the_atr_of_the_day(shared_data):
    """The whole ticks that the cases rest on, from the raw candles here and from the builder."""
    expected = {"ORCA": {"21:00": 29, "21:15": 42}, "NEAR": {"21:00": 52, "21:15": 69}}
    for symbol, by_clock in expected.items():
        market, rows = market_of(shared_data, symbol), rows_of(shared_data, symbol)
        for clock, atr in by_clock.items():
            assert atr_at(rows, utc(clock)) == atr
            assert float(market.atr[(utc(clock) - market.start_ms) // 900_000]) == atr
