"""The audit of feature functions: planted leaks of every kind are found, honest columns beside them are not accused."""

import bisect
import itertools
import json
import time

import numpy as np
import pyarrow as pa
import pytest

from perpjax.audit import audit_features
from perpjax.audit.__main__ import main
from perpjax.audit.alterations import ALTERATIONS, Series, make_gaps
from perpjax.audit.features import lay_series
from perpjax.data import CANDLES, FUNDING, DataError, read_table, synthetic_tables, validate
from perpjax.data import build as build_dataset
from perpjax.data.contract import BAR_MS, settlement_opens

DAY, WEEK = 96, 672
PRICES = ("open", "high", "low", "close")


@pytest.fixture(scope="module")
def tables():
    return synthetic_tables("crash", seed=3, bars=2600)


# What functions are made of: columns of the bars [N + 1], the one about to open included, and of funding.


class Known:
    """The columns of bars and settlements; what is not shifted here is known only after the bar of its row."""

    def __init__(self, bars: pa.Table, funding: pa.Table):
        for name in (*PRICES, "volume"):
            setattr(self, name, bars[name].to_numpy())
        self.opens = bars["open_time_ms"].to_numpy()
        self.rates, self.settled = funding["funding_rate"].to_numpy(), settlement_opens(funding)
        self.ret = np.log(self.close / shift(self.close, self.close[0]))
        self.time = self.opens // BAR_MS % DAY


def shift(x: np.ndarray, first: float = np.nan) -> np.ndarray:
    """Row t is x[t - 1]."""
    return np.concatenate([[first], x[:-1]])


def ema(x: np.ndarray, weight: float = 0.1) -> np.ndarray:
    return np.array(list(itertools.accumulate(x, lambda y, v: y + weight * (v - y))))


def rolling_mean(x: np.ndarray, n: int) -> np.ndarray:
    """From running sums over the whole series, as many write it; the first n - 1 are NaN."""
    total = np.concatenate([[0.0], np.cumsum(x)])
    return np.concatenate([np.full(n - 1, np.nan), (total[n:] - total[:-n]) / n])


def back_fill(x: np.ndarray) -> np.ndarray:
    following = np.minimum.accumulate(np.where(np.isnan(x), len(x) - 1, np.arange(len(x)))[::-1])[::-1]
    return x[following]


def forward_fill(x: np.ndarray) -> np.ndarray:
    return x[np.maximum.accumulate(np.where(np.isnan(x), 0, np.arange(len(x))))]


def traded_close(k: Known) -> np.ndarray:
    """Known closes, NaN after bars in which nothing traded."""
    return shift(np.where(k.volume > 0, k.close, np.nan), k.close[0])


def resample(k: Known, bars: int) -> np.ndarray:
    """The close of the hours, days, weeks, written at all bars of the same one: labelled by its start."""
    group = k.opens // (BAR_MS * bars)
    last = np.searchsorted(group, group, side="right") - 1
    return np.log(k.close[last])


def principal_component(k: Known) -> np.ndarray:
    lags = np.stack([shift(np.nan_to_num(k.ret)), np.roll(k.ret, 2), np.roll(k.ret, 3)], 1)
    lags[:3] = 0
    axis = np.linalg.svd(lags, full_matrices=False)[2][0]
    return lags @ axis


def low_pass(k: Known) -> np.ndarray:
    spectrum = np.fft.rfft(shift(k.close, k.close[0]))
    spectrum[len(spectrum) // 10 :] = 0
    return np.fft.irfft(spectrum, len(k.close))


def detrended(k: Known) -> np.ndarray:
    t, y = np.arange(len(k.close)), shift(np.log(k.close), np.log(k.close[0]))
    return y - np.polyval(np.polyfit(t, y, 1), t)


def centred_mean(k: Known) -> np.ndarray:
    return np.convolve(np.log(k.close), np.ones(9) / 9, mode="same")


def fitted(k: Known) -> np.ndarray:
    known = shift(k.ret, 0.0)
    return known * (known @ k.ret) / (known @ known)


def known_rate(k: Known, row: int = 0) -> np.ndarray:
    """The rate settled last, or one after it."""
    last = np.searchsorted(k.settled, k.opens, side="right") - 1 + row
    return np.where((last >= 0) & (last < len(k.rates)), k.rates[np.clip(last, 0, len(k.rates) - 1)], 0.0)


def next_settlement(k: Known) -> np.ndarray:
    following = np.searchsorted(k.settled, k.opens, side="right")
    return np.append(k.settled, k.opens[-1] + 32 * BAR_MS)[following] - k.opens.astype(float)


def rank(x: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(x)) / len(x)


def filtered_both_ways(k: Known) -> np.ndarray:
    return ema(ema(shift(k.close, k.close[0]))[::-1])[::-1]


def clipped(k: Known) -> np.ndarray:
    """Winsorised at quantiles of the whole sample: moves only where it clips."""
    return np.clip(shift(k.ret, 0.0), *np.quantile(k.ret, [0.05, 0.95]))


LEAKS = {
    "bar_itself": lambda k: k.ret,
    "two_bars_ahead": lambda k: np.append(k.close[1:], k.close[-1]) / k.close,
    "volume_of_the_bar": lambda k: np.log1p(k.volume),
    "seam": lambda k: k.open / shift(k.close, k.close[0]) - 1,
    "sign": lambda k: (k.ret > 0).astype(float),
    "tiny_weight": lambda k: shift(k.ret, 0.0) + 1e-6 * k.ret,
    "after_large_moves": lambda k: np.where(np.abs(shift(k.ret, 0.0)) > 0.02, k.ret, 0.0),
    "of_large_moves": lambda k: np.where(np.abs(k.ret) > 0.04, 1.0, 0.0),
    "once_a_day": lambda k: np.where(k.time == 0, k.ret, shift(k.ret, 0.0)),
    "once_a_day_at_noon": lambda k: np.where(k.time == 48, k.high, 0.0),
    "when_the_week_begins": lambda k: np.where((k.opens // BAR_MS - 4 * DAY) % WEEK == 0, k.close, 0.0),
    "next_rate": lambda k: known_rate(k, 1),
    "next_settlement": next_settlement,
    "z_score": lambda k: (shift(k.close, k.close[0]) - k.close.mean()) / k.close.std(),
    "min_max": lambda k: (shift(k.close, k.close[0]) - k.close.min()) / np.ptp(k.close),
    "rank": lambda k: rank(shift(k.volume, 0.0)),
    "quantile_clip": clipped,
    "principal_component": principal_component,
    "regression": fitted,
    "detrended": detrended,
    "mean_filled": lambda k: np.nan_to_num(shift(rolling_mean(k.close, 50)), nan=k.close.mean()),
    "back_filled_warm_up": lambda k: back_fill(shift(rolling_mean(k.close, 50))),
    "back_filled_return": lambda k: back_fill(shift(np.append(np.nan, k.ret[1:]))),
    "back_filled_gaps": lambda k: back_fill(traded_close(k)),
    "interpolated_gaps": lambda k: np.interp(
        np.arange(len(k.close)), np.flatnonzero(~np.isnan(x := traded_close(k))), x[~np.isnan(x)]
    ),
    "centred": centred_mean,
    "zero_phase": filtered_both_ways,
    "low_pass": low_pass,
    "hour_by_start": lambda k: resample(k, 4),
    "four_hours_by_start": lambda k: resample(k, 16),
    "day_by_start": lambda k: resample(k, DAY),
    "week_by_start": lambda k: resample(k, WEEK),
    "share_of_sample": lambda k: np.arange(len(k.close)) / len(k.close),
    "sum_from_the_end": lambda k: k.ret[::-1].cumsum()[::-1],
    "over_last_price": lambda k: shift(k.close, k.close[0]) / k.close[-1],
    "since_the_maximum": lambda k: np.maximum(np.arange(len(k.close)) - k.close.argmax(), 0.0),
    "gone_with_the_future": lambda k: np.where(shift(k.close, 0.0) > k.close.mean(), np.nan, 1.0),
    "infinite_with_the_future": lambda k: np.where(shift(k.close, 0.0) > k.close.mean(), np.inf, 1.0),
    "float32": lambda k: ema(k.close).astype(np.float32),
    "beside_an_outlier": lambda k: np.where(np.arange(len(k.ret)) == 9, 1e12, k.ret),
}


def expanding_rank(x: np.ndarray) -> np.ndarray:
    seen: list[float] = []
    ranks = []
    for i, v in enumerate(x):
        ranks.append(bisect.bisect(seen, v) / max(i, 1))
        bisect.insort(seen, v)
    return np.array(ranks)


def expanding_z(x: np.ndarray) -> np.ndarray:
    n = np.arange(1, len(x) + 1)
    mean = x.cumsum() / n
    spread = np.sqrt(np.maximum((x * x).cumsum() / n - mean**2, 1e-12))
    return (x - mean) / spread


def fast_convolution(k: Known) -> np.ndarray:
    """A causal mean by the Fourier transform of the whole sample, whose rounding mixes past and future."""
    n = 2 * len(k.ret)
    kernel = np.fft.rfft(np.ones(30) / 30, n)
    return shift(np.fft.irfft(np.fft.rfft(k.ret, n) * kernel, n)[: len(k.ret)])


def last_whole_day(k: Known) -> np.ndarray:
    """The close of the day that ended last: resampled, and labelled by its end."""
    start = k.opens // (BAR_MS * DAY) * (BAR_MS * DAY)
    before = np.searchsorted(k.opens, start) - 1
    return np.where(before >= 0, k.close[np.maximum(before, 0)], np.nan)


HONEST = {
    "return": lambda k: shift(k.ret),
    "expanding_z": lambda k: shift(expanding_z(np.log(k.close))),
    "expanding_rank": lambda k: shift(expanding_rank(k.close)),
    "since_the_maximum_so_far": lambda k: shift((k.close - np.maximum.accumulate(k.close)) / k.close),
    "running_sum_mean": lambda k: shift(rolling_mean(k.volume, 50)),
    "convolution": lambda k: shift(np.convolve(k.ret, np.ones(30) / 30)[: len(k.ret)]),
    "fast_convolution": fast_convolution,
    "ema": lambda k: shift(ema(k.close)),
    "ema_float32": lambda k: shift(ema(k.close)).astype(np.float32),
    "forward_filled": lambda k: forward_fill(traded_close(k)),
    "time_of_day": lambda k: np.sin(2 * np.pi * k.time / DAY),
    "day_by_end": last_whole_day,
    "rate_now": known_rate,
    "since_settlement": lambda k: (k.opens - k.settled[np.searchsorted(k.settled, k.opens, side="right") - 1]) / 1e6,
    "seeded_noise": lambda k: np.random.default_rng(0).normal(size=len(k.close)),
    "one": lambda k: np.ones(len(k.close)),
}


def make_all(bars: pa.Table, funding: pa.Table) -> pa.Table:
    k = Known(bars, funding)
    return pa.table({name: make(k) for name, make in (LEAKS | HONEST).items()})


@pytest.fixture(scope="module")
def audit(tables):
    return audit_features(make_all, tables.candles, tables.funding)


@pytest.mark.parametrize("name", LEAKS)
def test_every_planted_leak_is_found(audit, name):
    item = audit[name]
    assert item.verdict == "accused"
    move = item.movement
    assert 0 <= move.bar <= move.cut and move.ahead == move.cut - move.bar + 1 and move.rows > 0
    assert move.amount is None or move.amount > 0


@pytest.mark.parametrize("name", HONEST)
def test_honest_columns_beside_them_are_clean(audit, name):
    assert audit[name].verdict == "clean" and audit[name].movement is None


def test_how_far_they_looked(audit):
    for name in ("bar_itself", "volume_of_the_bar", "seam", "sign", "once_a_day", "once_a_day_at_noon", "float32"):
        assert audit[name].movement.ahead == 1, name
        assert audit[name].movement.bar == audit[name].movement.cut
    # Row t of the second reads close[t + 1]; the centred mean of 9 reads up to close[t + 4]; an hour starts 4 bars
    # before its close is known. A day and a week are met at least three quarters through.
    assert audit["two_bars_ahead"].movement.ahead == 2
    assert audit["centred"].movement.ahead == 5
    assert audit["hour_by_start"].movement.ahead == 4
    assert 72 <= audit["day_by_start"].movement.ahead <= DAY
    assert 96 <= audit["week_by_start"].movement.ahead <= WEEK
    # What is fitted to the sample is known a sample early.
    for name in ("z_score", "min_max", "share_of_sample", "sum_from_the_end", "over_last_price", "low_pass"):
        assert audit[name].movement.ahead > 2000 and audit[name].movement.bar < 2, name
    # The tiny weight is what was added: a millionth of one return.
    assert audit["tiny_weight"].movement.amount < 1e-5
    assert audit["gone_with_the_future"].movement.amount is None
    assert audit["infinite_with_the_future"].movement.amount is None
    bar = audit["once_a_day_at_noon"].movement
    assert bar.time.endswith("12:00")


def test_the_result_is_plain_data_and_a_table(audit):
    plain = json.loads(json.dumps(audit.to_json(), allow_nan=False))
    assert set(plain["accused"]) == set(audit.accused) == set(LEAKS)
    assert [item["name"] for item in plain["items"]] == [*LEAKS, *HONEST]
    assert plain["bars"] == 2600 and plain["comparisons"] > 100
    assert audit["one"].remarks == ("constant: 1",)
    text = str(audit)
    assert all(name in text for name in plain["accused"]) and "constant: 1" in text


def test_the_inputs_are_left_alone(tables):
    before = [t.to_pydict() for t in (tables.candles, tables.funding)]
    audit_features(make_few, tables.candles, tables.funding)
    assert before == [t.to_pydict() for t in (tables.candles, tables.funding)]


def make_few(bars: pa.Table, funding: pa.Table | None) -> pa.Table:
    close = bars["close"].to_numpy()
    return pa.table({"close": shift(close), "next": close})


def test_the_seed_draws_the_alterations(tables):
    first, again, other = (audit_features(make_few, tables.candles, seed=seed) for seed in (1, 1, 2))
    assert first == again and first != other
    assert first.accused == other.accused == ("next",)


def test_cuts_may_be_given(tables):
    found = audit_features(make_few, tables.candles, cuts=[900, 1000])
    assert found.accused == ("next",)
    for wrong in (0, 2600):
        with pytest.raises(ValueError, match=f"cut = {wrong} is not a bar from 1 to 2599"):
            audit_features(make_few, tables.candles, cuts=[900, wrong])


# Remarks, and functions that are not to be audited as they are.


def test_odd_columns_are_remarked(tables):
    def odd(bars, funding):
        rows = np.arange(bars.num_rows)
        holes = np.where((rows > 700) & (rows % 500 == 0), np.nan, rows * 1.0)
        columns = {"holes": holes, "never": np.full(len(rows), np.nan), "huge": np.where(rows < 5, 1e300, 1.0)}
        return pa.table(columns | {"late": np.where(rows < 40, np.nan, rows * 1.0)})

    found = audit_features(odd, tables.candles)
    assert found.accused == ()
    # Rows 1000, 1500, 2000, 2500 of 0 .. 2600. What float32 cannot hold is not finite in the market either.
    assert found["holes"].remarks == ("non-finite: 4 rows after row 0, its first value; the first is row 1000",)
    assert found["never"].remarks == ("non-finite: in every row",)
    assert found["huge"].remarks == ("constant: 1",)
    assert found["late"].remarks == ()


def test_what_changes_by_itself_is_not_accused(tables):
    rng = np.random.default_rng()

    def noisy(bars, funding):
        return pa.table({"noise": rng.normal(size=bars.num_rows), "close": shift(bars["close"].to_numpy())})

    found = audit_features(noisy, tables.candles)
    assert found.accused == () and found.remarks == ("not the same from call to call",)
    assert [item.verdict for item in found.items] == ["undecided", "clean"]
    assert "differ" in found["noise"].remarks[0]


def test_what_remembers_its_calls_is_not_accused(tables):
    calls = []

    def counting(bars, funding):
        calls.append(None)
        return pa.table({"calls": np.full(bars.num_rows, float(len(calls)))})

    assert audit_features(counting, tables.candles)["calls"].verdict == "undecided"


def test_errors_say_on_which_call(tables):
    def needs_all(bars, funding):
        if bars.num_rows < 2601:
            raise KeyError("too short for me")
        return make_few(bars, funding)

    with pytest.raises(DataError, match=r"on the first bars \(\d+ bars\): the function raised KeyError: 'too short"):
        audit_features(needs_all, tables.candles)

    def fickle(bars, funding):
        table = make_few(bars, funding)
        return table if bars["high"].to_numpy().max() < 3e5 else table.rename_columns(["close", "other"])

    with pytest.raises(DataError, match=r"perturbed.*columns are"):
        audit_features(fickle, tables.candles)
    cases = {
        "is a dict, not a pyarrow.Table": lambda bars, funding: {},
        "has 2600 rows for 2600 bars": lambda bars, funding: make_few(bars, funding).slice(1),
        "has type int64": lambda bars, funding: pa.table({"n": np.arange(bars.num_rows)}),
        "no columns": lambda bars, funding: pa.table({}),
    }
    for message, fn in cases.items():
        with pytest.raises(DataError, match=f"on all bars.*{message}"):
            audit_features(fn, tables.candles)
    with pytest.raises(ValueError, match="neither"):
        audit_features("cores", tables.candles)
    with pytest.raises(DataError, match="too few to audit features that warm up for 673; give 865 or more"):
        audit_features("core", tables.candles.slice(0, 800 * 5))
    with pytest.raises(DataError, match="8 h"):
        audit_features("core", tables.candles, tables.funding.slice(0, 20))


def test_long_warm_ups_are_given_their_bars(tables):
    def long_window(bars, funding):
        close = bars["close"].to_numpy()
        means = np.lib.stride_tricks.sliding_window_view(close, 1600).mean(axis=1)  # raises on less
        return pa.table({"mean": shift(np.append(np.full(1599, np.nan), means)), "next": close})

    assert audit_features(long_window, tables.candles).accused == ("next",)
    with pytest.raises(DataError, match="features that warm up for 1600; give 1792 or more"):
        audit_features(long_window, tables.candles.slice(0, 1700 * 5))


def test_one_row_more_is_allowed(tables):
    def longer(bars, funding):
        return make_few(pa.concat_tables([bars, bars.slice(bars.num_rows - 1)]), funding)

    assert audit_features(longer, tables.candles).accused == ("next",)


# The alterations themselves.


@pytest.mark.parametrize("alteration", ALTERATIONS)
@pytest.mark.parametrize("cut", [1, 700, 1599])
def test_alterations_keep_the_past_and_the_contract(tables, alteration, cut):
    series = lay_series(tables.candles, tables.funding)
    series = series.cut_out(0, 1600)
    altered = ALTERATIONS[alteration](series, cut, np.random.default_rng(0))
    assert altered.bars.slice(0, cut).equals(series.bars.slice(0, cut).cast(CANDLES))
    known = series.num_settled(cut)
    assert known == altered.num_settled(cut) > 0
    assert altered.funding.slice(0, known).equals(series.funding.slice(0, known))
    validate(altered.bars, CANDLES, interval_ms=BAR_MS)
    validate(altered.funding, FUNDING)
    settlement_opens(altered.funding)
    if alteration == "truncated":
        assert altered.bars.num_rows == cut and altered.funding.num_rows == known
        return
    assert altered.bars.num_rows == 1600
    assert altered.bars["open_time_ms"].equals(series.bars["open_time_ms"])
    if cut == 1599:  # a single bar has one order only
        return
    for name in (*PRICES, "volume"):
        before, after = (x.bars[name].to_numpy()[cut:] for x in (series, altered))
        assert (before != after).mean() > 0.9
        assert alteration == "perturbed" or sorted(before) == sorted(after)
    rates = altered.funding["funding_rate"].to_numpy()[known:]
    assert not np.array_equal(rates, series.funding["funding_rate"].to_numpy()[known:])


def test_gaps_are_laid_as_the_builder_lays_them(tables):
    series = lay_series(tables.candles, tables.funding)
    gappy, gaps = make_gaps(series, np.random.default_rng(0))
    close, volume = (gappy.bars[name].to_numpy() for name in ("close", "volume"))
    assert len(gaps) > 20 and all(2 <= stop - start <= 24 for start, stop in gaps)
    kept = np.ones(len(close), bool)
    for start, stop in gaps:
        kept[start:stop] = False
        assert (volume[start:stop] == 0).all()
        for name in PRICES:
            assert (gappy.bars[name].to_numpy()[start:stop] == close[start - 1]).all()
    assert (volume[kept] == series.bars["volume"].to_numpy()[kept]).all()
    # Every gap ends with a jump that stays: between gaps all prices are those of the series, times one factor.
    factor = {name: gappy.bars[name].to_numpy() / series.bars[name].to_numpy() for name in PRICES}
    for (start, begin), (end, _) in itertools.pairwise(gaps):
        jump = factor["close"][begin] / factor["close"][start - 1]
        assert jump == pytest.approx(1.1) or jump == pytest.approx(1 / 1.1)
        for name in PRICES:
            np.testing.assert_allclose(factor[name][begin:end], factor["close"][begin])
    assert Series(gappy.bars, None).num_settled(5) == 0


# The core features.


@pytest.mark.parametrize("name", ["signal", "martingale", "crash"])
def test_core_features_are_clean_on_synthetic_markets(name):
    found = audit_features("core", *synthetic_tables(name, bars=3000)[0:3:2])
    assert found.accused == () and found.remarks == () and len(found.items) == 31
    assert not any(item.remarks for item in found.items)


@pytest.mark.parametrize(
    ("candles", "funding"),
    [
        ("binance-um_ORCAUSDT_perp_3m_20241231_20260219", "binance-um_ORCAUSDT_funding_20241231_20260219"),
        ("binance-um_BTCUSDT_perp_5m_20230101_20241231", "binance-um_BTCUSDT_funding_20221201_20241231"),
    ],
)
def test_core_features_are_clean_on_real_data(shared_data, candles, funding):
    candles, funding = (read_table(shared_data / f"{name}.parquet") for name in (candles, funding))
    year = candles.filter(candles["open_time_ms"].to_numpy() < candles["open_time_ms"][0].as_py() + 35_040 * BAR_MS)
    began = time.process_time()
    found = audit_features("core", year, funding)
    assert found.bars == 35_040
    assert found.accused == () and found.remarks == () and len(found.items) == 31
    assert time.process_time() - began < 30


# The command line.

SYNTHETIC = "synthetic:martingale?bars=1500"
SOURCE = """
import numpy as np, pyarrow as pa

def columns(bars):
    close = bars["close"].to_numpy()
    print("a function may talk")
    return np.concatenate([[np.nan], close[:-1]]), close

def honest(bars, funding):
    return pa.table({"close": columns(bars)[0]})

def leaky(bars, funding):
    return pa.table(dict(zip(("close", "next"), columns(bars))))

def broken(bars, funding):
    raise KeyError("volume2")

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_features.py").write_text(SOURCE)
    (tmp_path / "not_python.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)


def test_the_exit_status_says_whether_a_column_is_accused(module, capsys):
    assert main(["my_features:honest", "--dataset", SYNTHETIC]) == 0
    out = capsys.readouterr().out
    assert "my_features:honest: 0 of 1 accused" in out and "may talk" not in out
    assert main(["my_features:leaky", "--dataset", SYNTHETIC, "--seed", "5"]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 accused" in out and "seed 5" in out


def test_json_is_all_there_is_on_standard_output(module, capsys):
    assert main(["my_features:leaky", "--dataset", SYNTHETIC, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["accused"] == ["next"] and found["subject"] == "my_features:leaky" and found["bars"] == 1500


@pytest.mark.parametrize(
    ("function", "dataset", "message"),
    [
        ("my_features", SYNTHETIC, "'my_features' is not core"),
        ("my_features:absent", SYNTHETIC, "no attribute 'absent'"),
        ("my_features:number", SYNTHETIC, "is a int, not a function"),
        ("no_such_module:f", SYNTHETIC, "No module named 'no_such_module'"),
        ("not_python:f", SYNTHETIC, "invalid syntax"),
        ("none", SYNTHETIC, "neither"),
        ("my_features:broken", SYNTHETIC, "on all bars (1500 bars): features my_features:broken: raised KeyError"),
        ("core", "no/such/folder", "is not a dataset"),
        ("core", "synthetic:nonsense", "nonsense"),
        ("core", "synthetic:martingale?bars=700", "too few to audit"),
    ],
)
def test_wrong_usage_is_one_line(module, capsys, function, dataset, message):
    assert main([function, "--dataset", dataset]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_negative_seed_is_one_line(module, capsys):
    assert main(["my_features:honest", "--dataset", SYNTHETIC, "--seed", "-1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: seed is -1; it must be an integer in [0, ") and err.count("\n") == 1


def test_a_missing_option_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["core"])
    assert stopped.value.code == 2


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("module:function", "--dataset", "exit status", "back-fill", "--json"))


def test_a_dataset_folder_is_audited_with_its_funding(tmp_path, capsys, tables):
    files = {"candles": tables.candles, "mark": tables.mark, "funding": tables.funding}
    for name, table in files.items():
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet")
    options = [x for name in files for x in (f"--{name}", str(tmp_path / f"{name}.parquet"))]
    folder = tmp_path / "dataset"
    built = build_dataset.main([*options, "--symbol", "SYNTHETIC", "--episode-length", "96", "--out", str(folder)])
    assert built == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["core", "--dataset", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bars"] == 2600 and len(found["items"]) == 31
    # With funding: without it the two funding columns would be constant.
    assert not any(item["remarks"] for item in found["items"])
