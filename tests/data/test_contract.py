"""Every refusal of the data contract names the source, the row and the value."""

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from perpjax.data.contract import (
    BAR_MS,
    CANDLES,
    FUNDING,
    MARK,
    DataError,
    infer_interval_ms,
    read_table,
    settlement_opens,
    validate,
)

T0 = 1_704_067_200_000  # 2024-01-01 00:00 UTC
MINUTE = 60_000
HOUR = 60 * MINUTE


def candles(rows=8, interval=3 * MINUTE, **changes) -> pa.Table:
    """Clean candles; a change is a whole new column, or {row: value}."""
    columns = {
        "open_time_ms": T0 + interval * np.arange(rows),
        "open": np.full(rows, 100.0),
        "high": np.full(rows, 103.0),
        "low": np.full(rows, 98.0),
        "close": np.full(rows, 101.0),
        "volume": np.full(rows, 5.0),
    }
    return _changed(columns, changes)


def funding(rows=4, **changes) -> pa.Table:
    columns = {"time_ms": T0 + 8 * HOUR * np.arange(rows), "funding_rate": np.full(rows, 1e-4)}
    return _changed(columns, changes)


def _changed(columns, changes) -> pa.Table:
    for name, change in changes.items():
        if isinstance(change, dict):
            column = columns[name].tolist()
            for row, value in change.items():
                column[row] = value
            columns[name] = pa.array(column, type=pa.from_numpy_dtype(columns[name].dtype))
        else:
            columns[name] = change
    return pa.table(columns)


def test_clean_tables_come_back_unchanged():
    for table, schema in [(candles(), CANDLES), (candles().drop(["volume"]), MARK), (funding(), FUNDING)]:
        assert validate(table, schema).equals(table)


def test_columns_beyond_the_schema_are_dropped_and_the_order_is_the_schemas():
    table = candles().append_column("trades", pa.array(range(8)))
    shuffled = table.select(table.column_names[::-1])
    assert validate(shuffled, CANDLES).equals(candles())
    assert validate(shuffled, MARK).schema == MARK


def test_metadata_chunks_and_nullability_do_not_matter():
    chunked = pa.concat_tables([candles().slice(0, 3), candles().slice(3)])
    fields = [field.with_nullable(False) for field in CANDLES]
    dressed = chunked.cast(pa.schema(fields, metadata={"pandas": "{}"}))
    result = validate(dressed, CANDLES)
    assert result.schema.equals(CANDLES, check_metadata=True)
    assert result.equals(candles())


REFUSED_CANDLES = {
    # name: (changes to the clean table, words the message must hold)
    "null": ({"close": {3: None}}, ["row 3", "close = null"]),
    "null stamp": ({"open_time_ms": {2: None}}, ["row 2", "open_time_ms = null"]),
    "NaN": ({"low": {4: np.nan}}, ["row 4", "low = nan"]),
    "infinite": ({"high": {4: np.inf}}, ["row 4", "high = inf"]),
    "zero price": ({"low": {1: 0.0}}, ["row 1", "low = 0.0", "positive"]),
    "negative price": ({"open": {1: -2.5}}, ["row 1", "open = -2.5", "positive"]),
    "high below low": ({"high": {5: 97.0}}, ["row 5", "high = 97.0, low = 98.0"]),
    "high below open": ({"high": {5: 101.5}, "open": {5: 102.0}}, ["row 5", "high = 101.5, open = 102.0"]),
    "high below close": ({"high": {5: 100.5}}, ["row 5", "high = 100.5", "close = 101.0"]),
    "low above open": ({"low": {6: 100.5}}, ["row 6", "low = 100.5, open = 100.0"]),
    "low above close": ({"low": {6: 99.5}, "close": {6: 99.0}}, ["row 6", "low = 99.5", "close = 99.0"]),
    "negative volume": ({"volume": {7: -1.0}}, ["row 7", "volume = -1.0"]),
    "NaN volume": ({"volume": {7: np.nan}}, ["row 7", "volume = nan"]),
    "infinite volume": ({"volume": {0: np.inf}}, ["row 0", "volume = inf"]),
    "duplicate": ({"open_time_ms": {3: T0 + 6 * MINUTE}}, ["row 3", f"{T0 + 6 * MINUTE}", "duplicate"]),
    "unsorted": ({"open_time_ms": {3: T0 + MINUTE}}, ["row 3", f"{T0 + MINUTE}", "earlier", "sort"]),
    "seconds": (
        {"open_time_ms": T0 // 1000 + 180 * np.arange(8)},
        ["row 0", "open_time_ms = 1704067200:", "seconds by 1000", "7 more rows"],
    ),
    "microseconds": (
        {"open_time_ms": 1000 * (T0 + 180_000 * np.arange(8))},
        ["row 0", f"{T0}000", "microseconds"],
    ),
    "nanoseconds": ({"open_time_ms": {7: T0 * 10**6}}, ["row 7", f"{T0}000000", "nanoseconds"]),
    "close times": (
        {"open_time_ms": T0 - 1 + 180_000 * np.arange(1, 9)},
        ["row 0", f"{T0 + 179_999}", "multiple of the candle length 180000 ms"],
    ),
    "off the grid": (
        {"open_time_ms": {4: T0 + 12 * MINUTE + 1}},
        ["row 5", f"{T0 + 15 * MINUTE} comes 179999 ms", "stray"],
    ),
    "integer prices": ({"open": np.full(8, 100)}, ["'open'", "int64, not double", "100", "cast"]),
    "float32": ({"close": np.full(8, 101, np.float32)}, ["'close'", "float, not double", "101.0"]),
    "text": ({"volume": ["5"] * 8}, ["'volume'", "string, not double", "'5'"]),
    "dates": (
        {"open_time_ms": np.arange(8).astype("datetime64[ms]")},
        ["'open_time_ms'", "timestamp[ms], not int64"],
    ),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED_CANDLES.values(), ids=REFUSED_CANDLES)
def test_refused_candles(changes, words):
    with pytest.raises(DataError) as error:
        validate(candles(**changes), CANDLES, "some/file.parquet")
    assert str(error.value).startswith("some/file.parquet: ")
    for word in words:
        assert word in str(error.value)
    if "volume" not in changes:  # one code path: the mark series refuses the same rows in the same words
        with pytest.raises(DataError) as of_mark:
            validate(candles(**changes), MARK, "some/file.parquet")
        assert str(of_mark.value).split(" fit: ")[0] == str(error.value).split(" fit: ")[0]


REFUSED_FUNDING = {
    "NaN": ({"funding_rate": {1: np.nan}}, ["row 1", "funding_rate = nan"]),
    "infinite": ({"funding_rate": {1: -np.inf}}, ["row 1", "funding_rate = -inf"]),
    "one": ({"funding_rate": {2: 1.0}}, ["row 2", "funding_rate = 1.0", "percent"]),
    "percent": ({"funding_rate": {2: -1.5}}, ["row 2", "funding_rate = -1.5", "percent"]),
    "null": ({"funding_rate": {0: None}}, ["row 0", "funding_rate = null"]),
    "duplicate": ({"time_ms": {2: T0 + 8 * HOUR}}, ["row 2", f"{T0 + 8 * HOUR}", "duplicate"]),
    "unsorted": ({"time_ms": {2: T0 + HOUR}}, ["row 2", f"{T0 + HOUR}", "earlier"]),
    "seconds": ({"time_ms": T0 // 1000 + 28_800 * np.arange(4)}, ["row 0", "1704067200", "seconds"]),
    "microseconds": ({"time_ms": {3: T0 * 1000}}, ["row 3", f"{T0}000", "microseconds"]),
}


@pytest.mark.parametrize(("changes", "words"), REFUSED_FUNDING.values(), ids=REFUSED_FUNDING)
def test_refused_funding(changes, words):
    with pytest.raises(DataError) as error:
        validate(funding(**changes), FUNDING, "funding.csv")
    assert str(error.value).startswith("funding.csv: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("table", "schema", "words"),
    [
        (candles().drop(["volume"]), CANDLES, ["'volume' is missing", "'close'"]),
        (candles(), FUNDING, ["'time_ms' is missing"]),
        (candles().append_column("low", pa.array(np.ones(8))), CANDLES, ["'low' occurs 2 times"]),
        (candles(rows=0), CANDLES, ["no rows"]),
        (funding(rows=0), FUNDING, ["no rows"]),
        ({"open": [1.0]}, CANDLES, ["dict", "pyarrow.Table"]),
        (candles(rows=1), CANDLES, ["cannot be inferred", f"row 0: open_time_ms = [{T0}]", "interval_ms"]),
    ],
    ids=["missing", "wrong kind", "twice", "empty candles", "empty funding", "no table", "one row"],
)
def test_refused_tables(table, schema, words):
    with pytest.raises(DataError) as error:
        validate(table, schema, "x.arrow")
    assert str(error.value).startswith("x.arrow: ")
    for word in words:
        assert word in str(error.value)


def test_the_first_bad_row_is_named_and_the_others_are_counted():
    with pytest.raises(DataError, match=r"row 2: low = -1\.0: .*\(and 2 more rows\)"):
        validate(candles(low={2: -1.0, 4: -1.0, 7: -3.0}), CANDLES)


def test_the_edges_that_are_allowed():
    flat = candles(open=np.full(8, 7.0), high=np.full(8, 7.0), low=np.full(8, 7.0), close=np.full(8, 7.0))
    validate(flat, CANDLES)  # high == low
    validate(candles(volume={3: 0.0}), CANDLES)
    validate(funding(funding_rate={0: 0.999, 1: -0.999}), FUNDING)
    validate(candles(rows=1), CANDLES, interval_ms=3 * MINUTE)
    validate(candles().take([0, 1, 5, 6, 7]), CANDLES)  # a gap


@pytest.mark.parametrize("minutes", [1, 3, 5, 15])
def test_interval_inferred_through_gaps(minutes):
    keep = np.array([0, 3, 4, 7])  # steps of 3, 1, 3 intervals: the smallest is the length
    table = candles(interval=minutes * MINUTE).take(keep)
    assert infer_interval_ms(table) == minutes * MINUTE


@pytest.mark.parametrize(
    ("minutes", "schema", "fits"),
    [
        (2, CANDLES, False),
        (30, CANDLES, False),
        (60, CANDLES, False),
        (2, MARK, False),
        (20, MARK, False),
        (3, MARK, True),
        (60, MARK, True),
        (480, MARK, True),
    ],
)
def test_interval_must_fit_the_bar(minutes, schema, fits):
    table = candles(interval=minutes * MINUTE)
    for given in (None, minutes * MINUTE):
        if fits:
            validate(table, schema, "a", given)
            continue
        with pytest.raises(DataError, match=f"^a: .*{minutes * MINUTE} ms does not fit"):
            validate(table, schema, "a", given)
    if not fits:
        with pytest.raises(DataError, match=f"^a: row 1: .*{minutes * MINUTE} ms"):
            infer_interval_ms(table, "a", schema)


def test_candles_shorter_than_a_minute_are_refused():
    # 60 s is the last good length, 45 s the first bad one that divides 15 minutes; 3 s once overflowed a packed index.
    validate(candles(interval=MINUTE), CANDLES, "a")
    for seconds in (45, 3, 1):
        table = candles(interval=seconds * 1000)
        for check in (lambda t: validate(t, CANDLES, "a"), lambda t: infer_interval_ms(t, "a")):
            with pytest.raises(DataError, match=f"^a: row 1: .*{seconds * 1000} ms is shorter than a minute"):
                check(table)


def test_a_given_interval_is_the_grid():
    with pytest.raises(DataError, match=f"^a: row 1: open_time_ms = {T0 + 3 * MINUTE}: .*300000 ms"):
        validate(candles(), CANDLES, "a", 5 * MINUTE)
    for interval in (0, -3 * MINUTE):
        with pytest.raises(DataError, match="does not fit"):
            validate(candles(), CANDLES, "a", interval)
    with pytest.raises(DataError, match="interval_ms = 180000 given"):
        validate(funding(), FUNDING, "a", 3 * MINUTE)


def test_one_stray_row_is_not_taken_for_a_finer_grid():
    # Row 200 of a 3-minute file is 2 minutes late: steps of 5 and 1 minutes. All stamps fit a 1-minute grid,
    # on which two thirds of the rows would be missing.
    table = candles(rows=400, open_time_ms={200: T0 + 602 * MINUTE})
    for check in (validate, lambda table, schema, source: infer_interval_ms(table, source, schema)):
        with pytest.raises(DataError, match="most rows come 180000 ms after") as error:
            check(table, CANDLES, "a")
        assert f"a: row 201: open_time_ms = {T0 + 603 * MINUTE} comes 60000 ms" in str(error.value)
    with pytest.raises(DataError, match=f"^a: row 200: open_time_ms = {T0 + 602 * MINUTE}: .*180000"):
        validate(table, CANDLES, "a", 3 * MINUTE)
    assert validate(table, CANDLES, "a", MINUTE).equals(table)  # the caller may know better


def test_settlements_are_dated_at_the_open_of_their_bar():
    stamps = T0 + np.array([3, 4 * HOUR + 60_000, 5 * HOUR])  # 3 ms late, 60 s late, on time
    opens = settlement_opens(funding(rows=3, time_ms=stamps))
    assert opens.tolist() == [T0, T0 + 4 * HOUR, T0 + 5 * HOUR]


@pytest.mark.parametrize(
    ("second", "problem"),
    [(4 * HOUR + 60_001, "more than 60 s"), (4 * HOUR - 1, "more than 60 s"), (50_000, "second settlement")],
)
def test_settlements_that_fit_no_bar(second, problem):
    table = validate(funding(rows=2, time_ms=T0 + np.array([0, second])), FUNDING)
    with pytest.raises(DataError, match=f"^f.csv: row 1: time_ms = {T0 + second}: .*{problem}"):
        settlement_opens(table, "f.csv")


@pytest.mark.parametrize("suffix", [".parquet", ".feather", ".arrow", ".csv"])
def test_read_table(tmp_path, suffix):
    writers = {".parquet": pyarrow.parquet.write_table, ".csv": pyarrow.csv.write_csv}
    path = tmp_path / f"file{suffix}"
    writers.get(suffix, pyarrow.feather.write_feather)(candles(), path)
    assert validate(read_table(path), CANDLES).equals(candles())
    assert validate(read_table(str(path)), MARK).equals(candles().drop(["volume"]))


def test_csv_prices_without_a_decimal_point_are_prices(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"open_time_ms,open,high,low,close,volume,trades\n{T0},100,103,98,101,0,7\n")
    table = validate(read_table(path), CANDLES, str(path), interval_ms=BAR_MS)
    assert table["open"].to_pylist() == [100.0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "x", ["'.txt'", ".parquet, .feather, .arrow, .csv"]),
        ("a.csv.gz", "x", ["'.gz'"]),
        ("a.parquet", "not parquet", ["cannot be read"]),
        ("a.feather", "not feather", ["cannot be read"]),
        ("a.csv", "time_ms,funding_rate\n2024-01-01,0.1\n", ["cannot be read", "2024-01-01"]),
        ("a.csv", "", ["cannot be read"]),
        ("missing.parquet", None, ["cannot be read"]),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: ")
    for word in words:
        assert word in str(error.value)


def test_real_files_are_clean(shared_data):
    kinds = {"perp": CANDLES, "spot": CANDLES, "mark": MARK, "funding": FUNDING}
    paths = sorted(shared_data.glob("*.parquet"))
    assert paths
    for path in paths:
        kind = next(schema for word, schema in kinds.items() if word in path.name)
        table = read_table(path)
        assert validate(table, kind, path.name).equals(table)
        if kind == FUNDING:
            assert len(settlement_opens(table, path.name)) == table.num_rows


def test_odd_real_files_are_refused_by_name(shared_data):
    odd = shared_data / "raw_samples" / "odd"
    for path in sorted(odd.glob("*.csv")):
        with pytest.raises(DataError, match=path.name):
            validate(read_table(path), CANDLES, path.name)
