"""From tables to a market: the grid, the ticks, the mark, the funding, the features."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from perpjax import EnvConfig, EnvParams, PerpEnv
from perpjax._describe import format_time
from perpjax.data import Scaler, build_market, fit_scaler, read_table
from perpjax.data import grid as gr
from perpjax.data.builder import build, known_atr
from perpjax.data.contract import BAR_MS, CANDLES, DataError
from perpjax.features import CORE_FEATURES
from perpjax.instrument import Instrument

T0 = 1_704_067_200_000  # 2024-01-01 00:00 UTC, a bar's open
HOUR = 3_600_000
BTC = Instrument()
FREE = EnvParams(taker_fee=0.0, slippage_base=0.0, slippage_atr=0.0)
PRICES = ("open", "high", "low", "close")


def walk(bars=680, minutes=3, seed=0, start=T0, tick=0.1, price=1000.0) -> dict[str, np.ndarray]:
    """Candles of a random walk in whole ticks, all valid, as columns."""
    rng = np.random.default_rng(seed)
    n = bars * 15 // minutes
    close = round(price / tick) + rng.integers(-20, 21, n).cumsum()
    open_ = np.concatenate([[round(price / tick)], close[:-1]])
    ticks = {
        "open": open_,
        "high": np.maximum(open_, close) + rng.integers(0, 10, n),
        "low": np.minimum(open_, close) - rng.integers(0, 10, n),
        "close": close,
    }
    columns = {"open_time_ms": start + minutes * 60_000 * np.arange(n)}
    # Through decimal text, as exchanges write prices: 1000.1 and not 10001 * 0.1.
    columns |= {name: np.round(x * tick, 8) for name, x in ticks.items()}
    return columns | {"volume": rng.uniform(1.0, 9.0, n)}


def keep(columns, rows) -> dict[str, np.ndarray]:
    return {name: x[rows] for name, x in columns.items()}


def table(columns) -> pa.Table:
    return pa.table(columns)


def funding_table(hours, rates=None, late_ms=7) -> pa.Table:
    stamps = T0 + (np.asarray(hours, float) * HOUR).astype(np.int64) + late_ms
    return pa.table({"time_ms": stamps, "funding_rate": np.full(len(stamps), 1e-4) if rates is None else rates})


EIGHT_HOURS = np.arange(0, 7 * 24 + 1, 8)  # 680 bars are 170 hours


def all_bars(market):
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(market.bar))(jnp.arange(market.num_bars)))


# --- candles on the grid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "k"), [(1, 15), (3, 5), (5, 3), (15, 1)])
def test_rows_kt_to_kt_plus_k_are_bar_t_for_every_bar(minutes, k):
    columns = walk(minutes=minutes)
    market = build_market(table(columns), instrument=BTC, features=None)
    assert (market.candles_per_bar, market.num_bars, market.start_ms) == (k, 680, T0)
    bars = all_bars(market)
    for name in PRICES:
        ticks = np.rint(columns[name] * 10).reshape(680, k)
        np.testing.assert_array_equal(getattr(bars, name), ticks)
        np.testing.assert_array_equal(getattr(bars, f"mark_{name}"), ticks)
    assert bars.valid.all()
    for t in (0, 1, 679):
        assert market.open_time_ms(t) == columns["open_time_ms"][k * t] == T0 + BAR_MS * t


@pytest.mark.parametrize("minutes", [7, 30])
def test_candles_that_do_not_divide_a_bar_are_refused(minutes):
    columns = walk(minutes=3) | {"open_time_ms": minutes * 60_000 * (T0 // (minutes * 60_000) + np.arange(3400))}
    with pytest.raises(DataError, match=f"candle length {minutes * 60_000} ms does not fit"):
        build_market(table(columns))


def lay_by_loop(columns, k, step_ms):
    """The same rules, candle by candle, in plain Python: prices [N K, 4], volume, valid."""
    rows = {int(t): i for i, t in enumerate(columns["open_time_ms"])}
    stamps = sorted(rows)
    first = next(t for t in stamps if columns["volume"][rows[t]] > 0)
    start, end = -(-first // BAR_MS) * BAR_MS, (stamps[-1] + step_ms) // BAR_MS * BAR_MS
    out, last = [], None
    for t in range(first, end, step_ms):
        i = rows.get(t)
        if i is not None and columns["volume"][i] > 0:
            last = columns["close"][i]
            row = (*(columns[name][i] for name in PRICES), columns["volume"][i], True)
        else:
            row = (last, last, last, last, 0.0, False)
        if t >= start:
            out.append(row)
    out = np.array(out)
    return start, out[:, :4].reshape(-1, k, 4), out[:, 4].reshape(-1, k), out[:, 5].reshape(-1, k) > 0


@pytest.mark.parametrize("seed", range(5))
def test_gaps_and_quiet_candles_as_a_plain_loop_has_them(seed):
    rng = np.random.default_rng(seed)
    columns = walk(bars=60, seed=seed, start=T0 + 60_000 * 3 * int(rng.integers(0, 5)))
    columns["volume"][rng.random(300) < 0.3] = 0.0
    columns["volume"][:4] = 0.0
    columns["volume"][100:125] = 0.0
    kept = rng.random(300) > 0.2
    kept[150:190] = False
    columns = keep(columns, kept)
    grid = gr.lay_candles(table(columns), 180_000)
    start, prices, volume, valid = lay_by_loop(columns, 5, 180_000)
    assert grid.start_ms == start
    np.testing.assert_array_equal(grid.prices, prices)
    np.testing.assert_array_equal(grid.volume, volume)
    np.testing.assert_array_equal(grid.valid, valid)

    bars = gr.make_bars(grid)
    assert bars.schema.equals(CANDLES)
    for t in range(len(valid)):
        traded = prices[t][valid[t]]
        bar = bars.slice(t, 1).to_pylist()[0]
        assert bar["open_time_ms"] == start + BAR_MS * t
        assert bar["volume"] == pytest.approx(volume[t].sum())
        if len(traded):
            expected = (traded[0, 0], traded[:, 1].max(), traded[:, 2].min(), traded[-1, 3])
        else:
            expected = (prices[t, 0, 3],) * 4
        assert tuple(bar[name] for name in PRICES) == expected


def test_gaps_are_counted_and_dated():
    columns = walk()
    built = build(table(keep(columns, np.r_[0:50, 53:1000, 1001:3400])), instrument=BTC, features=None)
    # Rows 50 to 52 are three candles from 02:30, row 1000 is the candle 50 hours after the start.
    assert built.report.gaps == ((T0 + 150 * 60_000, 3), (T0 + 50 * HOUR, 1))
    assert (built.report.missing, built.report.untraded) == (4, 0)
    assert all_bars(built.market).valid.sum() == 3396


def test_ends_that_do_not_fill_a_bar_are_cut_and_said():
    # The first row is at 00:09, so 00:09 and 00:12 are cut. So are 3 at the end. The first traded row is row 3 at
    # 00:18, after which 00:21, 00:24 and 00:27 are cut: bar 0 is the one of 00:30.
    columns = keep(walk(bars=682), slice(3, -2))
    columns["volume"][:3] = 0.0
    columns["volume"][7] = 0.0  # 00:30: invalid, so it repeats the close of the cut 00:27
    built = build(table(columns), instrument=BTC, features=None)
    assert built.market.start_ms == T0 + 30 * 60_000
    assert built.market.num_bars == 679
    assert built.report.notes[1:4] == (
        "3 candle(s) before the first trade dropped",
        "4 candle(s) at the start that do not fill a 15-minute bar cut",
        "3 candle(s) at the end that do not fill a 15-minute bar cut",
    )
    bar = built.market.bar(jnp.int32(0))
    assert bar.valid.tolist() == [False, True, True, True, True]
    assert [float(getattr(bar, name)[0]) for name in PRICES] == [round(columns["close"][6] * 10)] * 4


def test_what_cannot_be_a_series_is_refused():
    columns = walk(bars=10)
    with pytest.raises(DataError, match=r"volume = 0.0 everywhere; nothing ever traded"):
        build_market(table(columns | {"volume": np.zeros(50)}))
    with pytest.raises(DataError, match=r"row 3 .. 5: .* do not fill one 15-minute bar"):
        part = keep(columns, slice(0, 6))
        part["volume"][:3] = 0.0
        build_market(table(part), instrument=BTC)
    columns["open_time_ms"][49] += 180_000 * 10_000
    with pytest.raises(DataError, match=r"row 49: .* 50 rows would have to span 1004\d candles"):
        build_market(table(columns), instrument=BTC)
    with pytest.raises(DataError, match=r"there are only 673 bars.*673 bars of 15 minutes are needed"):
        build_market(table(walk(bars=673)), instrument=BTC)
    assert build_market(table(walk(bars=674)), instrument=BTC).segments.first.tolist() == [673]


# --- ticks and instruments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prices", "tick"),
    [
        (np.arange(9_000, 9_300) / 10, 0.1),  # 900.0, 900.1, ...
        (np.arange(9_000, 9_300) / 2, 0.5),  # multiples of 0.5: not 0.1
        (np.arange(9_000, 9_300) / 5, 0.2),
        (np.arange(9_000, 9_300) / 40, 0.025),
        (np.arange(2_000, 2_300) / 1e6, 1e-6),
        (np.arange(2_000, 2_300) * 10.0, 10.0),
        (np.arange(50_000, 50_030) / 5, 0.1),  # 30 prices happen to be even: too few to believe in 0.2
        (np.array([100.0, 200.0]), 1.0),  # no coarser than a hundredth of the price
        (np.array([1677.7215, 1000.0]), 1e-4),
    ],
)
def test_tick_of_the_prices(prices, tick):
    columns = {name: prices for name in PRICES} | {"open_time_ms": T0 + BAR_MS * np.arange(len(prices))}
    found, distinct = gr.infer_tick(table(columns))
    assert (found, distinct) == (tick, len(prices))


def test_prices_on_no_grid_name_the_row():
    columns = walk(bars=10)
    columns["low"][7] = 99.123456789  # 2^24 ticks to 1000 are 0.0001 at the finest
    with pytest.raises(DataError, match=r"row 7: low = 99.123456789 is not a multiple of the tick 0.0001"):
        build_market(table(columns))


@pytest.mark.parametrize(
    ("column", "row", "value", "words"),
    [
        ("high", 11, 1200.05, "row 11: high = 1200.05 is not a multiple of the tick 0.1"),
        ("high", 12, 1_677_721.6, "row 12: high = 1677721.6 reaches 2\\^24 ticks of 0.1"),
        ("low", 13, 1e-9, "row 13: low = 1e-09 is less than one tick of 0.1"),
    ],
)
def test_prices_off_the_tick_or_out_of_range_are_refused(column, row, value, words):
    columns = walk()
    columns[column][row] = value
    with pytest.raises(DataError, match=f"^candles: {words}"):
        build_market(table(columns), instrument=BTC)


def test_the_largest_exact_price_is_accepted():
    columns = walk()
    columns["high"][12] = 1_677_721.5
    market = build_market(table(columns), instrument=BTC, features=None)
    assert float(market.bar(jnp.int32(2)).high[2]) == 2**24 - 1


def test_the_instrument_is_found_said_or_taken_as_given(caplog):
    candles = table(walk())
    with caplog.at_level(logging.INFO, logger="perpjax"):
        market = build_market(candles, symbol="ABCUSDT", features=None)
    assert market.symbols == ("ABCUSDT",)
    # The median close is about 1000, so the step is 10^-3; 2^24 - 1 steps are the most there can be.
    assert float(market.instrument.step_size) == np.float32(1e-3)
    assert float(market.instrument.max_steps) == 2**24 - 1
    assert "ABCUSDT: not a known contract" in caplog.text and "funding rate is 0" in caplog.text
    assert build_market(candles, features=None).symbols == ("UNKNOWN",)

    built = build(candles, symbol="BTCUSDT", features=None)
    assert (built.instrument.tick_size, built.instrument.max_quantity) == (0.1, 120.0)
    finer = build(table(walk(tick=0.01)), symbol="BTCUSDT", features=None)
    assert (finer.instrument.tick_size, finer.instrument.step_size) == (0.01, 0.001)
    given = build(candles, symbol="ABCUSDT", features=None, tick_size=0.05, step_size=10.0, min_notional=None)
    assert (given.instrument.tick_size, given.instrument.max_steps) == (0.05, 2**24 - 1)
    with pytest.raises(ValueError, match="'ETHUSDT' and the instrument's 'BTCUSDT' differ"):
        build_market(candles, instrument=BTC, symbol="ETHUSDT")


# --- mark ------------------------------------------------------------------------------------------------------


def test_mark_candles_are_rounded_outwards_and_missing_ones_are_last_prices():
    columns = walk()
    mark = {name: columns[name].copy() for name in ("open_time_ms", *PRICES)}
    # Ticks: opens and closes as they are, the high up, the low down, and 1000.3 / 0.1 = 10002.999... is 10003.
    for name, value in zip(PRICES, (1000.05, 1000.41, 999.99, 1000.15), strict=True):
        mark[name][6] = value
    for name in PRICES:
        mark[name][7] = 1000.3
    market = build_market(table(columns), table(keep(mark, np.r_[0:8, 9:3400])), instrument=BTC, features=None)
    assert market.has_mark
    bars = all_bars(market)
    marks = np.stack([getattr(bars, f"mark_{name}") for name in PRICES], -1).reshape(-1, 4)
    last = np.stack([getattr(bars, name) for name in PRICES], -1).reshape(-1, 4)
    assert marks[6].tolist() == [10_000.5, 10_005, 9_999, 10_001.5]
    assert marks[7].tolist() == [10_003] * 4
    np.testing.assert_array_equal(np.delete(marks, [6, 7], 0), np.delete(last, [6, 7], 0))


def test_a_mark_candle_stands_where_the_last_price_is_invalid():
    columns = walk()
    mark = table({name: columns[name] for name in ("open_time_ms", *PRICES)})
    columns["volume"][[6, 8]] = 0.0
    bars = all_bars(build_market(table(columns), mark.filter(np.arange(3400) != 8), instrument=BTC, features=None))
    assert bars.valid[1].tolist() == [True, False, True, False, True]
    assert bars.mark_high[1, 1] == round(columns["high"][6] * 10)
    assert bars.mark_high[1, 3] == bars.high[1, 3] == round(columns["close"][7] * 10)


def hourly_mark(hours) -> pa.Table:
    opens = 1000.04 + np.asarray(hours)
    return table({"open_time_ms": T0 + HOUR * np.asarray(hours), **{name: opens for name in PRICES}})


def test_a_coarser_mark_only_prices_the_funding():
    columns = walk()
    hours = np.delete(np.arange(170), 16)
    built = build(table(columns), hourly_mark(hours), funding_table(EIGHT_HOURS), BTC, None)
    bars = all_bars(built.market)
    assert not built.market.has_mark
    np.testing.assert_array_equal(bars.mark_low, bars.low)
    assert bars.funding_price[32 * 3] == np.float32(10_240.4)  # hour 24: 1024.04 in ticks
    assert bars.funding_price[32 * 2] == bars.open[32 * 2, 0]  # hour 16 has no mark candle
    assert "1 of 22 settlements have no mark candle at their open: priced at the last price" in built.report.notes


@pytest.mark.parametrize("fine", [True, False], ids=["traded against", "for funding only"])
def test_a_settlement_is_priced_at_the_mark_as_published(fine):
    # 1000 units, tick 0.01, mark 1.0049, rate 1 %: the venue takes 1000 * 1.0049 * 0.01 = 10.049.
    columns = {name: x if name in ("open_time_ms", "volume") else np.full_like(x, 1.0) for name, x in walk().items()}
    mark = {name: np.full(3400, 1.0049) for name in PRICES} | {"open_time_ms": columns["open_time_ms"]}
    mark = table(mark) if fine else table(mark).filter(np.arange(3400) % 20 == 0)
    instrument = Instrument("PENNY", 0.01, 1.0, 5.0, 1e6)
    funding = funding_table(EIGHT_HOURS + 1, np.where(EIGHT_HOURS == 168, 0.01, 0.0))  # the last one at bar 676
    market = build_market(table(columns), mark, funding, instrument, None)
    env = PerpEnv(market, FREE, EnvConfig(episode_length=7))
    state = env.reset(jax.random.key(0), start=675)
    for action in ([1, 3, 0, 3, 4], [0, 0, 0, 0, 0]):
        state = env.step(state, action)
    assert float(state.account.lots.quantity[0]) == 1000
    np.testing.assert_allclose(float(state.account.ledger.funding), 10.049, rtol=1e-6)
    # Equity is marked to the mark's close, as it is: 1000 * 0.0049 above the entry, if the mark is traded against.
    np.testing.assert_allclose(float(state.equity), 10_000 - 10.049 + (4.9 if fine else 0), rtol=1e-7)


@pytest.mark.parametrize("low, gone", [(91.0, 0), (90.99, 1), (90.9, 1)])
def test_a_liquidation_on_a_finer_mark_is_early_by_less_than_a_tick(low, gone):
    # Long at 1000 ticks of 0.1 with 10x: (100 - 10) / 0.99 = 90.9, so L = 909. A low of 909.9 ticks counts as 909.
    columns = {name: x if name in ("open_time_ms", "volume") else np.full_like(x, 100.0) for name, x in walk().items()}
    mark = {name: columns[name].copy() for name in ("open_time_ms", *PRICES)}
    mark["low"][5 * 676] = low
    instrument = Instrument("ALT", 0.1, 0.1, 5.0, 1e6, brackets=((0, 1e9, 20, 0.01, 0),))
    market = build_market(table(columns), table(mark), instrument=instrument, features=None)
    env = PerpEnv(market, FREE, EnvConfig(episode_length=7))
    state = env.reset(jax.random.key(0), start=675)
    for action in ([1, 3, 4, 3, 4], [0, 0, 0, 0, 0]):
        state = env.step(state, action)
    assert (int(state.account.ledger.opened), int(state.account.ledger.liquidated)) == (1, gone)


def test_mark_series_that_cannot_be_used_are_refused():
    candles = table(walk(minutes=5))
    with pytest.raises(DataError, match=r"mark candles of 180000 ms are finer than the candles of 300000 ms"):
        build_market(candles, table(walk(minutes=3)), instrument=BTC)
    with pytest.raises(DataError, match=r"mark: row 0 .. 9: .* all lie outside the candles'"):
        build_market(candles, hourly_mark(np.arange(1000, 1010)), instrument=BTC)
    small = {name: np.full(170, 0.05) for name in PRICES}
    with pytest.raises(DataError, match=r"mark: row 0: open = 0.05 is less than one tick of 0.1"):
        build_market(candles, table({"open_time_ms": T0 + HOUR * np.arange(170), **small}), instrument=BTC)


# --- funding ---------------------------------------------------------------------------------------------------


def test_settlements_are_dated_once_at_their_bars_open():
    hours = np.concatenate([[-16, -8], EIGHT_HOURS, [169, 176]])
    rates = np.arange(1, len(hours) + 1) * 1e-5
    built = build(table(walk()), funding=funding_table(hours, rates, late_ms=60_000), instrument=BTC, features=None)
    bars = all_bars(built.market)
    expected = np.zeros(680)
    expected[32 * np.arange(22)] = np.arange(3, 25) * 1e-5  # the first two lie before the candles
    expected[4 * 169] = 25e-5
    np.testing.assert_array_equal(bars.funding_rate, expected.astype(np.float32))
    np.testing.assert_array_equal(bars.funding_price, bars.open[:, 0])
    assert (built.report.settlements, built.report.funding_hours) == (23, {1.0: 1, 8.0: 21})


def test_without_funding_the_rate_is_zero():
    built = build(table(walk()), instrument=BTC, features=None)
    assert not all_bars(built.market).funding_rate.any()
    assert "no funding file: the funding rate is 0" in built.report.notes


@pytest.mark.parametrize(
    ("hours", "late_ms", "words"),
    [
        (EIGHT_HOURS, 60_001, "row 0: time_ms = 1704067260001: is more than 60 s after the open"),
        (np.sort(np.append(EIGHT_HOURS, 8.005)), 0, "row 2: .* is the second settlement in one 15-minute bar"),
        (
            np.delete(EIGHT_HOURS, 3),
            7,
            "row 3: time_ms = 1704182400007 comes more than 8 h after the settlement before",
        ),
        (EIGHT_HOURS[2:], 7, r"row 0: .* lies 16 h after the candles begin \(1704067200000\), more than 8 h"),
        (EIGHT_HOURS[:-1], 7, "row 20: .* lies 10 h before the candles end"),
    ],
)
def test_funding_that_does_not_cover_the_candles_is_refused(hours, late_ms, words):
    with pytest.raises(DataError, match=f"^funding: {words}"):
        build_market(table(walk()), funding=funding_table(hours, late_ms=late_ms), instrument=BTC, features=None)


def test_eight_hours_at_either_end_are_enough():
    # 704 bars end 176 h after the start: 8 h after the last settlement, and the first one is 8 h after the start.
    build_market(
        table(walk(bars=704)), funding=funding_table(EIGHT_HOURS[1:], late_ms=0), instrument=BTC, features=None
    )
    with pytest.raises(DataError, match=r"row 20: .* lies 8.25 h before the candles end"):
        build_market(table(walk(bars=705)), funding=funding_table(EIGHT_HOURS[1:]), instrument=BTC, features=None)


# --- ATR and features ------------------------------------------------------------------------------------------


def test_atr_is_of_the_bars_before_in_whole_ticks():
    # Ticks. Bar 0: range 10, so the ATR is 10. Bar 1: true range 30 - 7 = 23 -> 10 + 13/14 = 10.93. Bar 2: gap from
    # 8 up to 9..15: 15 - 8 = 7 -> 10.93 - 3.93/14 = 10.648.
    rows = dict(high=[10.0, 30.0, 15.0], low=[0.0001, 7.0, 9.0], close=[9.0, 8.0, 9.0])
    rows["low"][0] = 0.0
    assert known_atr(table(rows), 1.0).tolist() == [1, 10, 11, 11]
    half = dict(high=[13.5, 6.0], low=[1.0, 6.0], close=[6.0, 6.0])
    # In ticks of 1 the high 13.5 counts as 14 (half to even): the ATR is 13, then 13 - 13/14 = 12.07.
    assert known_atr(table(half), 1.0).tolist() == [1, 13, 12]
    # 7, then 7 - 7/14 = 6.5: half up is 7.
    assert known_atr(table(dict(high=[8.0, 4.0], low=[1.0, 4.0], close=[4.0, 4.0])), 1.0).tolist() == [1, 7, 7]
    still = {name: np.full(5, 7.0) for name in ("high", "low", "close")}
    assert known_atr(table(still), 1.0).tolist() == [1] * 6


def test_nothing_known_at_t_comes_from_bar_t_or_later():
    columns = walk(bars=700)
    changed = {name: x.copy() for name, x in columns.items()}
    t = 690
    for name in (*PRICES, "volume"):
        changed[name][5 * t :] = np.round(changed[name][5 * t :] * 1.5, 1)
    one, two = (build_market(table(c), instrument=BTC) for c in (columns, changed))
    np.testing.assert_array_equal(one.atr[: t + 1], two.atr[: t + 1])
    np.testing.assert_array_equal(one.features[: t + 1], two.features[: t + 1])
    assert (one.features[t + 1] != two.features[t + 1]).any()
    assert one.feature_names == CORE_FEATURES and one.features.shape == (701, 31)


def constant_features(bars, warm_up=0, extra=None, **columns) -> pa.Table:
    x = np.arange(bars.num_rows, dtype=np.float64)
    x[:warm_up] = np.nan
    return pa.table({"x": x} | columns)


def test_a_feature_function_gets_the_bars_and_may_need_longer():
    seen = SimpleNamespace()

    def features(bars, funding):
        seen.bars, seen.funding = bars, funding
        return constant_features(bars, warm_up=675)

    settlements = funding_table(EIGHT_HOURS)
    market = build_market(table(walk()), funding=settlements, instrument=BTC, features=features)
    assert seen.bars.schema.equals(CANDLES) and seen.bars.num_rows == 681  # with the one about to open
    assert seen.bars["close"][-2:].to_pylist() == [seen.bars["close"][679].as_py()] * 2
    assert seen.funding.equals(settlements)
    assert market.segments.first.tolist() == [675] and market.segments.last.tolist() == [679]
    assert market.feature_names == ("x",) and market.features[680, 0] == 680
    assert build_market(table(walk()), instrument=BTC, features=None).features.shape == (681, 0)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (lambda b, f: constant_features(b).slice(1), "has 680 rows for 680 bars and the one about to open, not 681"),
        (lambda b, f: {"x": 1}, "is a dict, not a pyarrow.Table"),
        (lambda b, f: constant_features(b, i=np.arange(681)), "column 'i' has type int64"),
        (lambda b, f: constant_features(b, y=np.where(np.arange(681) == 677, np.nan, 1)), "row 677: y = nan"),
        (lambda b, f: constant_features(b, y=np.where(np.arange(681) == 680, 1e39, 1)), "row 680: y = inf"),
        (lambda b, f: constant_features(b, y=np.full(681, np.nan)), "column 'y' is never finite"),
        (lambda b, f: constant_features(b, warm_up=680), "row 680 would be the first decision bar"),
        (
            lambda b, f: pa.table([pa.array(np.ones(681))] * 2, names=["x", "x"]),
            "column 'x' occurs 2 times",
        ),
    ],
)
def test_feature_tables_that_break_the_rules_are_refused(features, words):
    with pytest.raises(DataError, match=words):
        build_market(table(walk()), instrument=BTC, features=features)


def test_features_of_no_known_kind_are_refused():
    with pytest.raises(ValueError, match="features = 'fancy' is none of"):
        build_market(table(walk()), instrument=BTC, features="fancy")


# --- scaler ----------------------------------------------------------------------------------------------------


def test_the_scaler_is_fitted_in_float64_and_attached():
    def features(bars, funding):
        n = bars.num_rows
        return pa.table({"ramp": np.arange(n) / 1.0, "flat": np.full(n, 0.1), "big": 1e6 + np.arange(n) % 2})

    market = build_market(table(walk()), instrument=BTC, features=features)
    assert market.scaler_mean.tolist() == [0, 0, 0] and market.scaler_scale.tolist() == [1, 1, 1]
    scaler = fit_scaler(market, range(673, 678))
    # 673 .. 677: mean 675, population variance (4 + 1 + 0 + 1 + 4) / 5 = 2. Of 1, 0, 1, 0, 1: 0.6 and 0.24.
    np.testing.assert_allclose(scaler.mean, [675, np.float32(0.1), 1e6 + 0.6], rtol=1e-14)
    np.testing.assert_allclose(scaler.scale, [2**0.5, 1, 0.24**0.5], rtol=1e-9)
    scaled = build_market(table(walk()), instrument=BTC, features=features, scaler=scaler)
    np.testing.assert_array_equal(scaled.features, market.features)
    np.testing.assert_array_equal(scaled.scaler_scale, scaler.scale.astype(np.float32))
    with pytest.raises(ValueError, match="cannot be fitted on rows"):
        fit_scaler(market, range(673, 900))


@pytest.mark.parametrize(
    ("scaler", "words"),
    [
        (Scaler(("y",), np.zeros(1), np.ones(1)), "the first that differ: 'y' and 'x'"),
        (Scaler(("x", "y"), np.zeros(2), np.ones(2)), "fitted on 2 features, the market has 1"),
        (Scaler(("x",), np.zeros(2), np.ones(2)), r"shapes \(2,\) and \(2,\)"),
        (Scaler(("x",), np.zeros(1), np.zeros(1)), "scale 0.0 of 'x'"),
        (Scaler(("x",), np.array([np.nan]), np.ones(1)), "mean nan"),
    ],
)
def test_a_scaler_of_something_else_is_refused(scaler, words):
    with pytest.raises(ValueError, match=words):
        build_market(table(walk()), instrument=BTC, features=lambda b, f: constant_features(b), scaler=scaler)


def test_a_scaler_is_not_fitted_on_the_warm_up():
    market = build_market(table(walk()), instrument=BTC)
    with pytest.raises(ValueError, match="before the first decision bar are NaN"):
        fit_scaler(market, range(0, 675))


# --- real data -------------------------------------------------------------------------------------------------


def real(folder, kind):
    return read_table(folder / f"binance-um_{kind}.parquet")


@pytest.mark.parametrize(
    ("name", "mark", "funding", "tick", "k", "bars"),
    [
        # 39841 bars end at 2026-02-19 00:15; 4 candles after that are cut.
        ("ORCAUSDT_perp_3m_20241231_20260219", "ORCAUSDT_mark_1h_20241231_20260219",
         "ORCAUSDT_funding_20241231_20260219", 0.001, 5, 39_841),
        ("NEARUSDT_perp_3m_20250704_20251231", None, None, 0.001, 5, 17_279),
        ("NEARUSDT_perp_1m_202308_202310", None, None, 0.001, 15, 8_832),
        ("BTCUSDT_perp_5m_20230101_20241231", "BTCUSDT_mark_1h_20221201_20241231",
         "BTCUSDT_funding_20221201_20241231", 0.1, 3, 70_176),
    ],
)  # fmt: skip
def test_real_series_build(shared_data, name, mark, funding, tick, k, bars):
    candles = real(shared_data, name)
    assert gr.infer_tick(candles)[0] == tick
    built = build(
        candles,
        mark and real(shared_data, mark),
        funding and real(shared_data, funding),
        symbol=name.split("_")[0],
    )
    market = built.market
    assert (market.candles_per_bar, market.num_bars, market.has_mark) == (k, bars, False)
    assert np.isfinite(market.features[673:]).all() and (market.atr >= 1).all()
    assert built.report.missing == 0
    candle = candles.slice(int(np.searchsorted(candles["open_time_ms"].to_numpy(), market.open_time_ms(5_000))), k)
    bar = market.bar(jnp.int32(5_000))
    for column in PRICES:
        np.testing.assert_array_equal(getattr(bar, column), np.rint(candle[column].to_numpy() / tick))
    if funding:
        bars_ = all_bars(market)
        paid = bars_.funding_rate != 0
        opens = market.start_ms + BAR_MS * paid.nonzero()[0]
        marks = real(shared_data, mark)
        row = np.searchsorted(marks["open_time_ms"].to_numpy(), opens)
        expected = np.float32(np.round(marks["open"].to_numpy()[np.minimum(row, marks.num_rows - 1)] / tick, 6))
        priced = opens <= marks["open_time_ms"][-1].as_py()
        np.testing.assert_array_equal(bars_.funding_price[paid][priced], expected[priced])
        total = real(shared_data, funding)
        times = total["time_ms"].to_numpy()
        inside = (times >= market.start_ms) & (times < market.open_time_ms(bars))
        assert bars_.funding_rate.sum(dtype=np.float64) == pytest.approx(
            total["funding_rate"].to_numpy()[inside].sum(), rel=1e-6
        )


@pytest.mark.parametrize(
    ("fine", "native", "odd_volume"),
    [
        ("BTCUSDT_perp_5m_20230101_20241231", "BTCUSDT_perp_15m-native_20230101_20241231", ["2023-11-14 11:30"]),
        ("NEARUSDT_perp_3m_20250704_20251231", "NEARUSDT_perp_15m-native_20250704_20251231", []),
    ],
)
def test_bars_equal_the_exchanges_own(shared_data, fine, native, odd_volume):
    """Also in the outages, where candles are flat with volume 0: there they only repeat the close before."""
    candles = real(shared_data, fine)
    grid = gr.lay_candles(candles, int(np.diff(candles["open_time_ms"].to_numpy()[:2])[0]))
    bars, own = gr.make_bars(grid), real(shared_data, native)
    start = int(np.searchsorted(own["open_time_ms"].to_numpy(), grid.start_ms))
    own = own.slice(start, bars.num_rows)
    assert own["open_time_ms"].equals(bars["open_time_ms"])
    for name in PRICES:
        np.testing.assert_array_equal(bars[name].to_numpy(), own[name].to_numpy())
    differs = ~np.isclose(bars["volume"].to_numpy(), own["volume"].to_numpy(), rtol=1e-9)
    # One candle of the source, 2023-11-14 11:35, was downloaded before it was complete.
    assert [format_time(t) for t in grid.opens[differs]] == odd_volume
