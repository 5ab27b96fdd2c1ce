"""Indicators against TA-Lib and by hand; the core features against their definitions and the clock."""

import math
import warnings

import numpy as np
import pyarrow as pa
import pytest

from perpjax.data import indicators as ind
from perpjax.data.contract import BAR_MS, DataError, read_table
from perpjax.features import (
    CORE_FEATURES,
    LIVE_BARS,
    LIVE_TOLERANCE,
    WARMUP_BARS,
    append_next_bar,
    core_features,
    core_features_live,
)

T0 = 1_704_067_200_000  # Monday 2024-01-01 00:00 UTC
HOUR_MS = 3_600_000

FIRST_ROW = {
    **{f"ret_{k}": k + 1 for k in (1, 4, 16, 48)},
    **{f"vol_{n}": n + 1 for n in (16, 96, 672)},
    **dict.fromkeys(("hl_range_pct", "oc_range_pct", "atr_14", "adx_14", "vol_log"), 1),
    **dict.fromkeys(("ema_20_dist", "ema_50_dist", "ema_200_dist", "macd", "macd_signal", "macd_hist"), 1),
    **dict.fromkeys(("ema_20_slope", "ema_50_slope", "rsi_14"), 2),
    "vol_z_96": 96,
    **dict.fromkeys(("hour_sin", "hour_cos", "dow_sin", "dow_cos"), 0),
    **dict.fromkeys(("session_asia", "session_europe", "session_us"), 0),
    **dict.fromkeys(("funding_rate_now", "time_to_next_funding"), 0),
}


def random_bars(count: int, seed: int = 0, start_ms: int = T0) -> pa.Table:
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(0.004 * rng.standard_normal(count)))
    open_ = np.concatenate([[100.0], close[:-1]]) * np.exp(0.0005 * rng.standard_normal(count))
    spread = np.exp(0.003 * np.abs(rng.standard_normal((2, count))))
    return pa.table(
        {
            "open_time_ms": start_ms + BAR_MS * np.arange(count),
            "open": open_,
            "high": np.maximum(open_, close) * spread[0],
            "low": np.minimum(open_, close) / spread[1],
            "close": close,
            "volume": rng.lognormal(3.0, 1.0, count) * (rng.random(count) > 0.02),  # one bar in 50 is empty
        }
    )


def flat_bars(count: int, volume: float = 0.1) -> pa.Table:
    price = np.full(count, 0.3)
    prices = dict.fromkeys(("open", "high", "low", "close"), price)
    times = T0 + BAR_MS * np.arange(count)
    return pa.table({"open_time_ms": times, **prices, "volume": np.full(count, volume)})


def settlements(hours: list[float], rates: list[float]) -> pa.Table:
    stamps = [T0 + round(hour * HOUR_MS) for hour in hours]
    return pa.table({"time_ms": pa.array(stamps, pa.int64()), "funding_rate": pa.array(rates, pa.float64())})


def matrix(table: pa.Table) -> np.ndarray:
    return np.stack([table[name].to_numpy() for name in CORE_FEATURES], axis=1)


def columns(table: pa.Table, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]


# ---------------------------------------------------------------------------------------------- TA-Lib


def talib_pairs(talib, bars):
    """name -> (ours, TA-Lib's) on whole series."""
    high, low, close, volume = columns(bars, "high", "low", "close", "volume")
    ours_macd, theirs_macd = ind.macd(close), talib.MACD(close, 12, 26, 9)
    return {
        **{f"ema {span}": (ind.ema(close, span), talib.EMA(close, span)) for span in (20, 50, 200)},
        "true range": (ind.true_range(high, low, close), talib.TRANGE(high, low, close)),
        "atr": (ind.atr(high, low, close, 14), talib.ATR(high, low, close, 14)),
        "rsi": (ind.rsi(close, 14), talib.RSI(close, 14)),
        "adx": (ind.adx(high, low, 14), talib.ADX(high, low, close, 14)),
        **{f"macd {i}": pair for i, pair in enumerate(zip(ours_macd, theirs_macd, strict=True))},
        "mean": (ind.rolling_mean(volume, 96), talib.SMA(volume, 96)),
        "std": (ind.rolling_std(volume, 96), talib.STDDEV(volume, 96, 1.0)),
    }


def assert_equal_to_talib(talib, bars):
    """TA-Lib starts its recursions from simple averages. The slowest one, EMA 200, has forgotten all but
    (199/201)^3500 = 6e-16 of its start after 3500 bars. From there on everything agrees to 1e-8 relative
    (what limits it are the running sums in TA-Lib's SMA and STDDEV), or to 1e-11 of the price (MACD passes
    through 0).
    """
    scale = bars["close"].to_numpy().mean()
    for name, (ours, theirs) in talib_pairs(talib, bars).items():
        assert np.isfinite(theirs[3500:]).all(), name
        np.testing.assert_allclose(ours[3500:], theirs[3500:], rtol=1e-8, atol=1e-11 * scale, err_msg=name)


def test_indicators_equal_talib():
    assert_equal_to_talib(pytest.importorskip("talib"), random_bars(6000))


def test_indicators_equal_talib_on_real_bars(btc_bars):
    assert_equal_to_talib(pytest.importorskip("talib"), btc_bars.slice(0, 8000))


# ----------------------------------------------------------------------------------- hand-worked cases


def test_ema_by_hand():
    # span 3: weight 2/4 = 0.5.  4;  4 + (8-4)/2 = 6;  6 + (2-6)/2 = 4;  4 + (5-4)/2 = 4.5
    assert ind.ema(np.array([4.0, 8.0, 2.0, 5.0]), 3).tolist() == [4.0, 6.0, 4.0, 4.5]


def test_atr_by_hand():
    high, low, close = np.array([12.0, 15.0, 11.0]), np.array([10.0, 13.0, 9.0]), np.array([11.0, 14.0, 10.0])
    # bar 0: 12 - 10 = 2; bar 1 gaps up from 11: 15 - 11 = 4; bar 2 gaps down from 14: 14 - 9 = 5
    assert ind.true_range(high, low, close).tolist() == [2.0, 4.0, 5.0]
    # period 2, weight 1/2: 2;  2 + (4-2)/2 = 3;  3 + (5-3)/2 = 4
    assert ind.atr(high, low, close, 2).tolist() == [2.0, 3.0, 4.0]


def test_rsi_by_hand():
    # changes +2, -1, +3, period 2.  gains 2, 0, 3: 2, 1, 2.   losses 0, 1, 0: 0, 0.5, 0.25
    # RSI: 100*2/2 = 100;  100*1/1.5 = 66.67;  100*2/2.25 = 88.89
    rsi = ind.rsi(np.array([10.0, 12.0, 11.0, 14.0]), 2)
    np.testing.assert_allclose(rsi, [np.nan, 100, 200 / 3, 800 / 9], rtol=1e-15)


def test_adx_by_hand():
    high, low = np.array([10.0, 12.0, 13.0, 11.0]), np.array([8.0, 9.0, 7.0, 6.0])
    # up   0, +2, +1, -2     down 0, -1, +2, +1     +DM 0, 2, 0, 0     -DM 0, 0, 2, 1
    # period 2: P 0, 1, 0.5, 0.25     M 0, 0, 1, 1
    # DX: 0 (0/0);  100*1/1 = 100;  100*0.5/1.5 = 33.33;  100*0.75/1.25 = 60
    # ADX: 0;  50;  50 + (33.33-50)/2 = 41.67;  41.67 + (60-41.67)/2 = 50.83
    np.testing.assert_allclose(ind.adx(high, low, 2), [0, 50, 125 / 3, 305 / 6], rtol=1e-15)


def test_equal_directional_moves_cancel():
    # An outside bar that widens by 1 on both sides moves in no direction (Wilder): DX stays 0.
    assert ind.adx(np.array([10.0, 11.0]), np.array([8.0, 7.0]), 2).tolist() == [0.0, 0.0]


def test_macd_by_hand():
    # close 10, 20; spans 1, 3, signal 3: fast = close, slow = 10, 15; line 0, 5; signal 0, 2.5; hist 0, 2.5
    line, signal, hist = ind.macd(np.array([10.0, 20.0]), 1, 3, 3)
    assert (line.tolist(), signal.tolist(), hist.tolist()) == ([0.0, 5.0], [0.0, 2.5], [0.0, 2.5])


def test_rolling_by_hand():
    values = np.array([2.0, 4.0, 9.0, 9.0])
    # windows of 3: (2,4,9) mean 5, squares (9+1+16)/3 = 26/3;  (4,9,9) mean 22/3, (100+25+25)/9/3 = 50/9
    nan = np.nan
    np.testing.assert_allclose(ind.rolling_mean(values, 3), [nan, nan, 5, 22 / 3], rtol=1e-15)
    std = [nan, nan, math.sqrt(26 / 3), math.sqrt(50 / 9)]
    np.testing.assert_allclose(ind.rolling_std(values, 3), std, rtol=1e-15)
    # z: (9-5)/sqrt(26/3);  (9-22/3)/sqrt(50/9) = (5/3)/(sqrt(50)/3) = 1/sqrt(2)
    z = [nan, nan, 4 / std[2], 1 / math.sqrt(2)]
    np.testing.assert_allclose(ind.rolling_zscore(values, 3), z, rtol=1e-14)


def test_rolling_std_survives_a_large_mean():
    # 1e9 + (0, 1): std 0.5. The textbook E[x^2] - E[x]^2 loses all of it at 1e18.
    values = 1e9 + np.tile([0.0, 1.0], 50)
    np.testing.assert_allclose(ind.rolling_std(values, 10)[9:], 0.5, rtol=1e-15)


def test_windows_across_chunk_borders():
    values = np.random.default_rng(1).standard_normal(1200)
    direct = [values[i - 49 : i + 1].std() for i in range(49, 1200)]
    np.testing.assert_allclose(ind.rolling_std(values, 50)[49:], direct, rtol=1e-12)
    assert np.isnan(ind.rolling_std(values, 50)[:49]).all()
    assert np.isnan(ind.rolling_std(values[:49], 50)).all()


def test_core_by_definition():
    """Every column of one row, written out in plain Python and numpy from its definition."""
    bars = random_bars(900, seed=3)
    row, last = 800, 799  # row 800 is known at T_800: bar 799 is the last one in it
    features = known(bars).slice(row, 1).to_pylist()[0]
    open_, high, low, close, volume = columns(bars.slice(0, row), "open", "high", "low", "close", "volume")
    ret = np.diff(np.log(close))

    def averages(values, weight):
        average = [values[0]]
        for value in values[1:]:
            average.append((1 - weight) * average[-1] + weight * value)
        return np.array(average)

    ema = {span: averages(close, 2 / (span + 1)) for span in (12, 20, 26, 50, 200)}
    macd = ema[12] - ema[26]
    signal = averages(macd, 0.2)
    before = close[:-1]
    ranges = [
        high[0] - low[0],
        *np.max([high[1:] - low[1:], abs(high[1:] - before), abs(low[1:] - before)], axis=0),
    ]
    change = np.diff(close)
    gain, loss = averages(np.maximum(change, 0), 1 / 14)[-1], averages(np.maximum(-change, 0), 1 / 14)[-1]
    moves = [(0.0, 0.0)]
    for i in range(1, row):
        up, down = high[i] - high[i - 1], low[i - 1] - low[i]
        moves.append((up if up > max(down, 0) else 0.0, down if down > max(up, 0) else 0.0))
    plus, minus = averages(np.array(moves), 1 / 14).T
    dx = np.divide(abs(plus - minus), plus + minus, out=np.zeros(row), where=plus + minus > 0)
    day = volume[-96:]
    hour, weekday = 8, 1  # bar 800 opens 200 h after Monday 00:00: day 8 is a Tuesday, 08:00
    expected = {
        **{f"ret_{k}": math.log(close[last] / close[last - k]) for k in (1, 4, 16, 48)},
        "hl_range_pct": (high[last] - low[last]) / close[last],
        "oc_range_pct": (close[last] - open_[last]) / open_[last],
        **{f"vol_{n}": np.std(ret[-n:]) for n in (16, 96, 672)},
        "atr_14": averages(ranges, 1 / 14)[-1] / close[last],
        **{f"ema_{s}_dist": (close[last] - ema[s][-1]) / ema[s][-1] for s in (20, 50, 200)},
        **{f"ema_{s}_slope": ema[s][-1] / ema[s][-2] - 1 for s in (20, 50)},
        "adx_14": averages(dx, 1 / 14)[-1],
        "rsi_14": gain / (gain + loss),
        "macd": macd[-1] / close[last],
        "macd_signal": signal[-1] / close[last],
        "macd_hist": (macd[-1] - signal[-1]) / close[last],
        "vol_log": math.log(1 + volume[last]),
        "vol_z_96": (volume[last] - day.mean()) / day.std(),
        "hour_sin": math.sin(2 * math.pi * hour / 24),
        "hour_cos": math.cos(2 * math.pi * hour / 24),
        "dow_sin": math.sin(2 * math.pi * weekday / 7),
        "dow_cos": math.cos(2 * math.pi * weekday / 7),
        "session_asia": 1.0,
        "session_europe": 1.0,
        "session_us": 0.0,
        "funding_rate_now": 0.0,
        "time_to_next_funding": 0.0,
    }
    assert tuple(expected) == CORE_FEATURES
    for name in CORE_FEATURES:
        assert features[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-13), name


# ------------------------------------------------------------------------------- rows, warm-up, causality


def known(bars: pa.Table, funding: pa.Table | None = None) -> pa.Table:
    """The features at every decision, that after the last bar included: [N + 1]."""
    return core_features(append_next_bar(bars), funding)


def test_one_row_a_bar_and_the_next_bar_says_nothing():
    bars = random_bars(700)
    assert core_features(bars).num_rows == 700
    np.testing.assert_array_equal(matrix(core_features(bars)), matrix(known(bars))[:700])
    following = append_next_bar(bars).slice(700).to_pylist()[0]
    close = bars["close"][-1].as_py()
    assert following["open_time_ms"] == bars["open_time_ms"][-1].as_py() + BAR_MS
    assert [following[n] for n in ("open", "high", "low", "close", "volume")] == [close] * 4 + [0.0]


def test_shape_names_and_types():
    features = known(random_bars(700))
    assert len(CORE_FEATURES) == 31 and tuple(features.column_names) == CORE_FEATURES
    assert features.num_rows == 701
    assert set(features.schema.types) == {pa.float64()}


def test_warm_up():
    features = known(random_bars(700))
    for name in CORE_FEATURES:
        finite = np.isfinite(features[name].to_numpy())
        assert finite.argmax() == FIRST_ROW[name], name
        assert finite[FIRST_ROW[name] :].all(), name
    assert max(FIRST_ROW.values()) == WARMUP_BARS == 673


def test_fewer_bars_than_any_window():
    for count in (1, 2, 5):
        features = known(random_bars(count))
        assert features.num_rows == count + 1
        assert np.isnan(features["vol_16"].to_numpy()).all()


def later_bars_changed(bars: pa.Table, t: int) -> pa.Table:
    """Every value of bars >= t replaced by another market's (stamps stay: the clock is no secret)."""
    other = random_bars(bars.num_rows, seed=99)
    return pa.concat_tables([bars.slice(0, t), other.set_column(0, "open_time_ms", bars["open_time_ms"]).slice(t)])


def assert_causal(bars, t, funding=None):
    full = matrix(known(bars, funding))
    changed = matrix(known(later_bars_changed(bars, t), funding))
    np.testing.assert_array_equal(full[: t + 1], changed[: t + 1])
    moved = changed[t + 1] != full[t + 1]
    assert moved[: CORE_FEATURES.index("hour_sin")].all()  # and the next row sees all of it
    alone = matrix(known(bars.slice(0, t), funding))  # the last row of a series cut before T_t
    np.testing.assert_array_equal(full[: t + 1], alone)


@pytest.mark.parametrize("t", [674, 700, 929, 998])
def test_row_t_sees_no_bar_from_t_on(t):
    assert_causal(random_bars(1000), t)


@pytest.mark.parametrize("t", [750, 1500, 2400])
def test_row_t_sees_no_bar_from_t_on_real(btc_bars, btc_funding, t):
    assert_causal(btc_bars.slice(20_000, 2500), t, btc_funding)


def test_row_t_sees_no_funding_after_t():
    bars, t = random_bars(200), 96  # T_96 is hour 24
    full = known(bars, settlements([0, 8, 16, 24, 32, 40], [1e-4, 2e-4, 3e-4, 4e-4, 5e-4, 6e-4]))
    changed = known(bars, settlements([0, 8, 16, 24, 25, 26], [1e-4, 2e-4, 3e-4, 4e-4, -5e-1, 6e-1]))
    for name in ("funding_rate_now", "time_to_next_funding"):
        assert full[name][: t + 4].equals(changed[name][: t + 4])  # 25:00 is T_100
        assert full[name][t + 4] != changed[name][t + 4]


# --------------------------------------------------------------------------------------- degenerate markets


@pytest.mark.parametrize("volume", [0.0, 0.1, 12345.678])
def test_flat_market(volume):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = known(flat_bars(800, volume)).slice(WARMUP_BARS)
    zero = (*CORE_FEATURES[: CORE_FEATURES.index("vol_log")], "vol_z_96")
    for name in zero:
        expected = 0.5 if name == "rsi_14" else 0.0
        assert set(features[name].to_pylist()) == {expected}, name
    assert set(features["vol_log"].to_pylist()) == {math.log1p(volume)}


def test_empty_bars_in_a_moving_market():
    bars = random_bars(900, seed=5)
    price, times = bars["close"].to_numpy().copy(), bars["open_time_ms"]
    price[700:820] = price[699]  # 120 empty bars: longer than the 96 of the volume window
    volume = bars["volume"].to_numpy().copy()
    volume[700:820] = 0.0
    flat = pa.table({"open_time_ms": times, **dict.fromkeys(("open", "high", "low", "close"), price), "volume": volume})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = known(flat)
    assert np.isfinite(matrix(features)[WARMUP_BARS:]).all()
    for name in ("ret_1", "ret_48", "hl_range_pct", "vol_16", "vol_96", "vol_log", "vol_z_96"):
        assert features[name][810].as_py() == 0.0, name  # all of its window lies in the empty stretch
    assert 0 < features["atr_14"][810].as_py() < features["atr_14"][700].as_py()


# ----------------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize(
    ("hours", "hour", "weekday", "sessions"),
    [
        (0, 0, 0, (1, 0, 0)),
        (6.75, 6, 0, (1, 0, 0)),  # 06:45 is hour 6
        (7, 7, 0, (1, 1, 0)),
        (9, 9, 0, (0, 1, 0)),
        (13, 13, 0, (0, 1, 1)),
        (16, 16, 0, (0, 0, 1)),
        (22, 22, 0, (0, 0, 0)),
        (6 * 24 + 23.75, 23, 6, (0, 0, 0)),  # Sunday 23:45
        (7 * 24, 0, 0, (1, 0, 0)),  # Monday again: the row after the last bar
    ],
)
def test_clock_is_that_of_the_decision(hours, hour, weekday, sessions):
    features = known(random_bars(7 * 96))  # a week from Monday 00:00: T_t is t/4 hours after it
    row = features.slice(int(4 * hours), 1).to_pylist()[0]
    assert row["hour_sin"] == pytest.approx(math.sin(2 * math.pi * hour / 24), abs=1e-15)
    assert row["hour_cos"] == pytest.approx(math.cos(2 * math.pi * hour / 24), abs=1e-15)
    assert row["dow_sin"] == pytest.approx(math.sin(2 * math.pi * weekday / 7), abs=1e-15)
    assert row["dow_cos"] == pytest.approx(math.cos(2 * math.pi * weekday / 7), abs=1e-15)
    assert (row["session_asia"], row["session_europe"], row["session_us"]) == sessions


# ------------------------------------------------------------------------------------------------- funding


def test_funding_with_changing_interval():
    # settled at 2 h, 6 h (interval 4 h), 7 h (1 h; stamped 30 s late), then nothing more
    features = known(random_bars(40), settlements([2, 6, 7 + 30 / 3600], [1e-4, -2e-4, 3e-4]))
    rate, to_next = columns(features, "funding_rate_now", "time_to_next_funding")
    # T_t is t/4 h. Nothing is known before 2 h (row 8); from row 24 (6 h) on an interval of 16 bars is.
    np.testing.assert_array_equal(rate[:8], 0)
    np.testing.assert_array_equal(rate[8:24], 1e-4)
    np.testing.assert_array_equal(rate[24:28], -2e-4)
    np.testing.assert_array_equal(rate[28:], 3e-4)
    np.testing.assert_array_equal(to_next[:24], 0)
    # Row 24 expects the next in 16 bars, row 27 in 13. At row 28 it came early: an interval of 4 bars.
    np.testing.assert_array_equal(32 * to_next[24:28], [16, 15, 14, 13])
    np.testing.assert_array_equal(32 * to_next[28:33], [4, 3, 2, 1, 0])
    np.testing.assert_array_equal(to_next[33:], 0)  # overdue


def test_eight_hourly_funding_counts_down_from_one():
    features = known(random_bars(100), settlements([-16, -8, 0, 8, 16, 24], [1e-4] * 6))
    np.testing.assert_array_equal(features["time_to_next_funding"], 1 - np.arange(101) % 32 / 32)


def test_no_funding_is_zero():
    features = known(random_bars(40))
    for name in ("funding_rate_now", "time_to_next_funding"):
        assert not features[name].to_numpy().any()


# --------------------------------------------------------------------------------------------- live buffer


def assert_live_equals_history(bars, funding, rows):
    full = matrix(known(bars, funding))
    tolerance = np.array([LIVE_TOLERANCE[name] for name in CORE_FEATURES])
    for t in rows:
        live = core_features_live(bars.slice(t - LIVE_BARS, LIVE_BARS), funding)
        assert live.num_rows == 1
        off = np.abs(matrix(live)[0] - full[t]) > tolerance
        assert not off.any(), [name for name, bad in zip(CORE_FEATURES, off, strict=True) if bad]


def test_live_buffer_equals_history():
    bars = random_bars(1500, seed=2)
    assert_live_equals_history(bars, None, [800, 801, 1111, 1500])


def test_live_buffer_equals_history_real(btc_bars, btc_funding):
    # At row 56_697 EMA 200 is worst off in this series: 5.3e-5.
    assert_live_equals_history(btc_bars, btc_funding, [800, 23_000, 56_697, btc_bars.num_rows])


def test_live_buffer_needs_its_bars():
    with pytest.raises(DataError, match="799 rows"):
        core_features_live(random_bars(LIVE_BARS - 1))


# -------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    ("bars", "words"),
    [
        (random_bars(9).drop(["volume"]), "'volume' is missing"),
        (
            random_bars(9).take([0, 1, 2, 4, 5]),
            f"bars: row 3: open_time_ms = {T0 + 4 * BAR_MS} comes 1800000 ms",
        ),
        (random_bars(9, start_ms=T0 + 60_000), f"bars: row 0: open_time_ms = {T0 + 60_000}: .*900000 ms"),
        (random_bars(0), "bars: has no rows"),
        (random_bars(3).set_column(1, "open", pa.array([1, 2, 3])), "'open' has type int64"),
    ],
    ids=["missing", "hole", "off the grid", "empty", "integers"],
)
def test_refused_bars(bars, words):
    with pytest.raises(ValueError, match=words):
        core_features(bars)


def test_refused_funding():
    with pytest.raises(ValueError, match="funding: row 1: funding_rate = nan"):
        core_features(random_bars(9), settlements([0, 8], [1e-4, np.nan]))
    with pytest.raises(ValueError, match=r"funding: row 1: time_ms = \d+: is more than 60 s"):
        core_features(random_bars(9), settlements([0, 8.1], [1e-4, 1e-4]))


@pytest.fixture(scope="module")
def btc_bars(shared_data):
    return read_table(shared_data / "binance-um_BTCUSDT_perp_15m-native_20230101_20241231.parquet")


@pytest.fixture(scope="module")
def btc_funding(shared_data):
    return read_table(shared_data / "binance-um_BTCUSDT_funding_20221201_20241231.parquet")
