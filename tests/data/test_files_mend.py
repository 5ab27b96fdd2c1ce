"""Does `mend` mend only what changes no number, say so, and show the rows of every refusal?"""

import re

import numpy as np
import pytest
from series import SCHEMAS, make_series, read_series

from perpjax.data.contract import DataError, validate
from perpjax.data.files.mend import aggregate_mark, mend
from perpjax.data.files.records import Choices

MINUTE, HOUR = 60_000, 3_600_000
START = 1_700_006_400_000  # 2023-11-15 00:00 UTC
PLAIN = Choices()


def walk(count=60, minutes=5, seed=0, start=START):
    """Candles of a random walk with a tick of 0.1: every candle opens at the last close."""
    rng = np.random.default_rng(seed)
    close = 1000 + np.cumsum(rng.integers(-9, 10, count)) / 10
    open_ = np.concatenate([[1000.0], close[:-1]])
    high, low = np.maximum(open_, close) + 0.2, np.minimum(open_, close) - 0.1
    stamp = start + np.arange(count) * int(minutes * MINUTE)
    return {"open_time_ms": stamp, "open": open_, "high": high, "low": low, "close": close,
            "volume": rng.integers(10, 99, count).astype(float)}  # fmt: skip


def pick(columns, index):
    return {name: np.asarray(x)[index] for name, x in columns.items()}


def join(*several):
    return {name: np.concatenate([c[name] for c in several]) for name in several[0]}


def candles(columns, source="f.csv"):
    return make_series("candles", columns, "XYZUSDT", source)


def rates(stamps, values=1e-4, source="r.csv"):
    stamps = np.asarray(stamps)
    return make_series("funding", {"time_ms": stamps, "funding_rate": np.broadcast_to(values, stamps.shape)},
                       "XYZUSDT", source)  # fmt: skip


def refuse(parts, *words, choices=PLAIN):
    with pytest.raises(DataError) as caught:
        mend(parts, choices)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"


def test_good_candles_stay_as_they_are():
    mended = mend([candles(walk())], PLAIN)
    assert mended.words == () and mended.interval_ms == 5 * MINUTE
    assert mended.table.schema.equals(SCHEMAS["candles"])
    for name, x in walk().items():
        np.testing.assert_array_equal(mended.table[name].to_numpy(), x)


@pytest.mark.parametrize("order, word", [(slice(None, None, -1), "newest row first: sorted"), (
    np.random.default_rng(1).permutation(60), "rows not in order of time: sorted")])  # fmt: skip
def test_order_is_mended_and_said(order, word):
    mended = mend([candles(pick(walk(), order))], PLAIN)
    assert mended.words == (word,)
    assert mended.table.equals(mend([candles(walk())], PLAIN).table)


def test_equal_duplicates_are_dropped_within_and_between_files():
    columns = walk()
    parts = [candles(pick(columns, np.r_[0:30, 3, 3]), "a"), candles(pick(columns, np.r_[28:60]), "b")]
    mended = mend(parts, PLAIN)
    assert "4 equal duplicates dropped" in mended.words
    assert mended.table.equals(mend([candles(columns)], PLAIN).table)
    assert mended.place(45) == "b: row 17 (2023-11-15 03:45 UTC)"


def test_conflicting_duplicates_show_both_rows():
    columns = walk()
    other = pick(columns, [7])
    other["volume"] = other["volume"] + 1
    parts = [candles(columns, "a"), candles(other, "b")]
    refuse(parts, "b: row 0", "a row 7", "00:35", "--keep first or --keep last")
    for keep, volume in (("first", columns["volume"][7]), ("last", other["volume"][0])):
        mended = mend(parts, Choices(keep=keep))
        assert mended.table["volume"][7].as_py() == volume
        assert any(f"--keep {keep}" in word for word in mended.words)


def test_a_last_candle_that_grows_is_unfinished():
    columns = walk()
    seen = pick(columns, [59])
    seen["volume"] = seen["volume"] / 2
    mended = mend([candles(join(columns, seen))], PLAIN)
    assert mended.table.num_rows == 59 and "unfinished: 2 rows show it growing" in mended.words[0]
    seen["open"] = seen["open"] + 0.1  # another open is another candle
    refuse([candles(join(columns, seen))], "two different rows")


def test_an_unfinished_last_candle_is_dropped_by_flag_or_close_time():
    columns = walk()
    flagged = columns | {"closed": np.arange(60) != 59}
    timed = columns | {"close_time_ms": columns["open_time_ms"] + 5 * MINUTE - 1}
    timed["close_time_ms"][-1] -= 2 * MINUTE
    for series, cause in ((flagged, "flag"), (timed, "close time")):
        mended = mend([candles(pick(series, slice(None, None, -1)))], PLAIN)
        assert mended.table.num_rows == 59
        assert f"last candle 2023-11-15 04:55 UTC dropped (unfinished by its {cause})" in mended.words
    # The next file has the same candle whole.
    mended = mend([candles(flagged, "a"), candles(pick(columns, [58, 59]) | {"closed": [True, True]}, "b")], PLAIN)
    assert mended.table.num_rows == 60
    refuse([candles(columns | {"closed": np.arange(60) != 5})], "row 5", "not closed")


def test_close_times_as_open_times_are_refused():
    columns = walk()
    columns["open_time_ms"] = columns["open_time_ms"] + 5 * MINUTE - 1
    refuse([candles(columns)], "row 0", "they are close times")
    columns = walk()
    refuse([candles(columns | {"close_time_ms": columns["open_time_ms"]})], "stamps are close times")


def test_seconds_become_minutes():
    columns = walk(300, 1 / 60)
    columns["volume"][25] = 0  # so untraded seconds stand in this file, and a missing one is unknown
    mended = mend([candles(pick(columns, np.r_[20:130, 131:300]))], PLAIN)
    assert mended.interval_ms == MINUTE
    assert mended.words == ("279 candles of 1 second aggregated to 3 minutes",
                            "2 minutes left out: not all of their candles are there")  # fmt: skip
    assert mended.table["open_time_ms"].to_pylist() == [START + k * MINUTE for k in (1, 3, 4)]
    minute = slice(180, 240)
    row = mended.table.slice(1, 1).to_pylist()[0]
    assert row["open"] == columns["open"][180] and row["close"] == columns["close"][239]
    assert row["high"] == columns["high"][minute].max() and row["low"] == columns["low"][minute].min()
    assert row["volume"] == columns["volume"][minute].sum()
    columns["volume"][25] = 1  # without any, seconds that are not there had no trade
    assert mend([candles(pick(columns, np.r_[20:130, 131:300]))], PLAIN).table.num_rows == 4


@pytest.mark.parametrize("minutes", [2, 4, 6, 60])
def test_lengths_that_do_not_fit_are_refused(minutes):
    start = START // (minutes * MINUTE) * minutes * MINUTE
    refuse([candles(walk(40, minutes, start=start))], f"{minutes} minutes", "1, 3, 5 or 15 minutes")


def test_mark_may_be_coarser_and_finer_mark_is_aggregated():
    columns = walk(48, 60)
    mended = mend([make_series("mark", columns)], PLAIN)
    assert mended.interval_ms == HOUR and mended.table.schema.equals(SCHEMAS["mark"])
    fine = mend([make_series("mark", walk(60, 1))], PLAIN)
    coarse = aggregate_mark(fine.table.slice(2), 5 * MINUTE)
    assert coarse.num_rows == 11 and coarse["open"][0].as_py() == fine.table["open"][5].as_py()
    assert coarse["high"][0].as_py() == fine.table["high"].to_numpy()[5:10].max()


def test_two_lengths_are_refused_where_they_change():
    first, second = walk(30, 5), walk(40, 1, start=START + 30 * 5 * MINUTE)
    refuse([candles(join(first, second))], "row 30", "02:30", "from 5 minutes to 1 minute")
    few = walk(20, 1, start=START + 30 * 5 * MINUTE)
    refuse([candles(join(first, few))], "row 30", "02:30", "from 5 minutes to 1 minute")
    third = walk(30, 5, start=START + 40 * MINUTE)
    refuse([candles(join(walk(40, 1), third))], "row 40", "from 1 minute to 5 minutes")
    refuse([candles(first, "a"), candles(second, "b")], "a has candles of 5 minutes", "b .row 0", "1 minute")
    assert mend([candles(first), candles(walk(30, 5, start=START + 150 * MINUTE))], PLAIN).table.num_rows == 60


def test_holes_are_no_second_length():
    assert mend([candles(pick(walk(100), np.r_[0:40, 43:50, 60:99]))], PLAIN).table.num_rows == 86


def test_stamps_off_the_grid_are_refused():
    columns = walk()
    columns["open_time_ms"][7] += 1234
    refuse([candles(columns)], "row 7", "not a multiple of the candle length, 5 minutes")
    columns = walk()
    columns["open_time_ms"] = columns["open_time_ms"] + 2 * MINUTE
    refuse([candles(columns)], "all stamps lie 2 minutes after it")


@pytest.mark.parametrize("name, value, word", [("high", 1.0, "high is below low"), ("open", np.nan, "open = nan"),
    ("close", -1.0, "close = -1"), ("volume", -5.0, "negative volume"), ("open_time_ms", 1_700_006_400, "milliseconds"),
])  # fmt: skip
def test_bad_values_name_the_row_of_the_file(name, value, word):
    columns = pick(walk(), slice(None, None, -1))
    columns[name][11] = value
    refuse([candles(columns)], "row 11", word)


def test_settlements_are_snapped():
    stamps = START + np.arange(9) * 8 * HOUR
    off = np.array([0, 5, 60_000, -120_000, -1, 0, 0, 0, 0])
    mended = mend([rates(stamps + off)], PLAIN)
    assert mended.interval_ms is None
    assert (mended.table["time_ms"].to_numpy() == stamps + np.maximum(off, 0)).all()
    assert mended.words == ("2 settlements up to 2 minutes early moved to their hour",
                            "2 settlements up to 60 s late, dated at their bar")  # fmt: skip
    validate(mended.table, SCHEMAS["funding"])
    for wrong in (60_001, -120_001):
        refuse([rates(stamps + wrong * (np.arange(9) == 4))], "row 4", "more than 60 s")


def test_settlements_of_one_hour_are_duplicates():
    stamps = START + np.arange(9) * 8 * HOUR
    assert mend([rates(stamps), rates(stamps + 3)], PLAIN).table.num_rows == 9
    refuse([rates(stamps, source="a"), rates(stamps + 3, 2e-4, "b")], "b: row 0", "a row 0")


def test_a_rate_on_every_candle_is_refused():
    refuse([rates(START + np.arange(90) * MINUTE)], "a rate every 1 minute")


def test_real_odd_files(shared_data):
    odd = shared_data / "odd_inputs"
    refuse([read_series(odd / "M09_BTCUSDT_5m_then_1m.csv")], "row 29", "from 5 minutes to 1 minute")
    refuse([read_series(odd / "M13_BTCUSDT_conflicting_duplicates.csv")], "row 1 .open 73038.2", "row 2 .open 72897.7")
    assert mend([read_series(odd / "M14_BTCUSDT_no_header.csv")], PLAIN).words == ()
    okx = mend([read_series(shared_data / "raw_samples/odd/okx_BTCUSDT_3m_10000_candles.csv")], PLAIN)
    assert okx.table.num_rows == 299 and "9665 equal duplicates dropped" in okx.words
    path = shared_data / "raw_samples/futures-um-klines-BTCUSDT-1h-2024-10-28.zip"
    refuse([read_series(path)], "60 minutes")
    # Monthly Binance files join without a word.
    assert mend([read_series(shared_data / "formats/F05_BTCUSDT-5m-2025-01.csv")], PLAIN).words == ()
