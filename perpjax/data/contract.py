"""The schemas and rules of tables of market data, checked once, on entry.

There are three tables: `CANDLES` (last-price candles), `MARK` (mark-price candles, no volume) and `FUNDING`
(settlements). Only `validate` checks them. Every refusal is a `DataError` that names the source, the 0-based row, the
value and a remedy. Nothing is repaired: a silently repaired candle is a fill that never happened.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

from perpjax._grid import BAR_MS, MAX_CANDLES

SETTLEMENT_SLACK_MS = 60_000
"""Longest delay of a settlement's stamp after the bar open to which it belongs."""

PRICES = ("open", "high", "low", "close")
_MARK_FIELDS = [("open_time_ms", pa.int64()), *((price, pa.float64()) for price in PRICES)]

MARK = pa.schema(_MARK_FIELDS)
"""Mark-price candles: UTC open stamp in ms; prices in quote currency."""

CANDLES = pa.schema([*_MARK_FIELDS, ("volume", pa.float64())])
"""Last-price candles: the columns of `MARK`, and the volume in base currency."""

FUNDING = pa.schema([("time_ms", pa.int64()), ("funding_rate", pa.float64())])
"""Settlements: UTC stamp in ms; fraction of notional per settlement, positive if longs pay."""

# 1e11 ms is March 1973, 1e14 ms is the year 5138: a stamp outside is not in milliseconds.
_FIRST_MS, _LAST_MS = 10**11, 10**14

# A rarer step between stamps comes from a stray row and is not the grid of the file.
_RARE_STEP = 0.01

_DROP = "correct the row at its source, or drop it: a missing row is a gap"
_FIX = "correct the row at its source, and check that no columns are swapped"


class DataError(ValueError):
    """Market data that breaks the contract. The message names source, row, value and a remedy."""


class _Check(NamedTuple):
    """One rule on rows: `bad(*columns)` is the mask of the rows that break it."""

    columns: tuple[str, ...]
    bad: Callable[..., np.ndarray]
    problem: str
    remedy: str


def _not_finite(column: str) -> _Check:
    return _Check((column,), lambda x: ~np.isfinite(x), "is NaN or infinite", _DROP)


_VALUE_CHECKS: tuple[_Check, ...] = (
    *(_not_finite(price) for price in PRICES),
    *(_Check((price,), lambda x: x <= 0, "is not a positive price", _DROP) for price in PRICES),
    _Check(("high", "low"), lambda high, low: high < low, "high is below low", _FIX),
    _Check(
        ("high", "open", "close"),
        lambda high, open_, close: high < np.maximum(open_, close),
        "high is below open or close",
        _FIX,
    ),
    _Check(
        ("low", "open", "close"),
        lambda low, open_, close: low > np.minimum(open_, close),
        "low is above open or close",
        _FIX,
    ),
    _not_finite("volume"),
    _Check(("volume",), lambda x: x < 0, "is a negative volume", _DROP),
    _not_finite("funding_rate"),
    _Check(
        ("funding_rate",),
        lambda x: np.abs(x) >= 1,
        "is not a fraction per settlement (0.0001 is one basis point)",
        "divide percent by 100",
    ),
)


def validate(table: pa.Table, schema: pa.Schema, source: str = "candles", interval_ms: int | None = None) -> pa.Table:
    """Check a table against `CANDLES`, `MARK` or `FUNDING` and return exactly the schema's columns.

    The checks, in this order:

    - every column exists, once, with the exact type; columns beyond the schema are dropped;
    - there is at least one row, and there are no nulls;
    - stamps are in milliseconds and strictly increasing;
    - stamps lie on the grid of whole multiples of the candle length, with or without gaps. Funding has no grid (see
      `settlement_opens`);
    - prices are finite and positive, with `low <= open, close <= high`;
    - volume is finite and not negative;
    - `|rate| < 1`.

    Args:
        table: the data, any number of chunks, [rows].
        schema: `CANDLES`, `MARK` or `FUNDING`.
        source: the file's name, for the messages.
        interval_ms: candle length. By default it is inferred from the stamps, which needs two rows.

    Returns:
        Table with the schema's columns in the schema's order and unchanged values.

    Raises:
        DataError: a rule is broken. The message names source, row and value of the first bad row of the first such
            rule.
    """
    table = _select_columns(table, schema, source)
    if table.num_rows == 0:
        raise DataError(f"{source}: has no rows (row 0 is missing); check the download or the date range")
    for name in schema.names:
        if table[name].null_count:
            row = int(np.argmax(table[name].is_null().to_numpy()))
            raise DataError(f"{source}: row {row}: {name} = null; {_DROP}")
    columns = {name: table[name].to_numpy() for name in schema.names}

    stamp = schema.names[0]
    _apply(_stamp_checks(stamp), columns, source)
    if schema == FUNDING:
        if interval_ms is not None:
            raise DataError(f"{source}: interval_ms = {interval_ms} given, but funding has no grid; leave it out")
    else:
        length = _candle_length(columns[stamp], schema, source, interval_ms)
        _apply((_grid_check(stamp, length),), columns, source)
    _apply(_VALUE_CHECKS, columns, source)
    return table


def infer_interval_ms(table: pa.Table, source: str = "candles", schema: pa.Schema = CANDLES) -> int:
    """Return the candle length in ms: the smallest positive difference between consecutive stamps.

    Args:
        table: a table with `open_time_ms`, strictly increasing, of two rows or more.
        source: the file's name, for the messages.
        schema: `CANDLES` (the length must divide 15 minutes) or `MARK` (or be a multiple of 15 minutes).

    Raises:
        DataError: there are fewer than two stamps, or the length does not fit 15-minute bars or is under a minute.
            Also if the smallest step is rare (under 1 % of all steps): it then comes from a stray row.
    """
    stamp_only = pa.schema([schema.field("open_time_ms")])
    stamps = _select_columns(table, stamp_only, source)["open_time_ms"].to_numpy()
    return _candle_length(stamps, schema, source)


def settlement_opens(funding: pa.Table, source: str = "funding") -> np.ndarray:
    """Return the bar open at which each settlement is dated: its stamp floored to the 15-minute grid.

    The exchange stamps a settlement a few ms to seconds after the bar's open. Up to 60 s (inclusive) are
    allowed.

    Args:
        funding: validated `FUNDING` table, [M].
        source: the file's name, for the messages.

    Returns:
        int64 [M], ms, strictly increasing.

    Raises:
        DataError: a settlement is deeper inside a bar, or two are in one bar.
    """
    stamps = funding["time_ms"].to_numpy()
    opens = stamps - stamps % BAR_MS
    checks = (
        _Check(
            ("time_ms",),
            lambda x: x % BAR_MS > SETTLEMENT_SLACK_MS,
            "is more than 60 s after the open of its 15-minute bar",
            "correct the stamp: settlements happen at a bar's open",
        ),
        _Check(
            ("time_ms",),
            lambda x: np.diff(x - x % BAR_MS, prepend=-BAR_MS) == 0,
            "is the second settlement in one 15-minute bar",
            "remove one of the two",
        ),
    )
    _apply(checks, {"time_ms": stamps}, source)
    return opens


def read_table(path: str | Path) -> pa.Table:
    """Read a table from a .parquet, .feather, .arrow or .csv file, unchecked.

    CSV columns of the schemas are read with the schemas' types, so `25000` is a price.

    Raises:
        DataError: the file's type is unknown, or it cannot be read. The message names the file.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: files of type {path.suffix!r} cannot be read; convert to {', '.join(_READERS)}")
    try:
        return reader(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the path and the format") from error


def _read_csv(path: Path) -> pa.Table:
    known = {field.name: field.type for schema in (CANDLES, FUNDING) for field in schema}
    return pyarrow.csv.read_csv(path, convert_options=pyarrow.csv.ConvertOptions(column_types=known))


_READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".parquet": lambda path: pyarrow.parquet.read_table(path, partitioning=None),
    ".feather": pyarrow.feather.read_table,
    ".arrow": pyarrow.feather.read_table,
    ".csv": _read_csv,
}


def _select_columns(table: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    if not isinstance(table, pa.Table):
        raise DataError(f"{source}: is a {type(table).__name__}, not a pyarrow.Table; use read_table")
    for field in schema:
        found = table.schema.get_all_field_indices(field.name)
        if len(found) != 1:
            trouble = "is missing" if not found else f"occurs {len(found)} times"
            raise DataError(
                f"{source}: column {field.name!r} {trouble}; the table has {table.column_names}, "
                f"rename its columns to {schema.names}"
            )
        actual = table.schema.field(found[0]).type
        if actual != field.type:
            value = table.column(found[0])[0].as_py() if table.num_rows else "no value"
            raise DataError(
                f"{source}: column {field.name!r} has type {actual}, not {field.type} (row 0: {value!r}); "
                f"cast it to {field.type}"
            )
    return pa.table([table[name] for name in schema.names], schema=schema)


def _apply(checks: tuple[_Check, ...], columns: dict[str, np.ndarray], source: str) -> None:
    """Raise for the first bad row of the first broken check. Checks on absent columns do not apply."""
    for check in checks:
        if not set(check.columns) <= columns.keys():
            continue
        bad = check.bad(*(columns[name] for name in check.columns))
        if not bad.any():
            continue
        row, others = int(np.argmax(bad)), int(bad.sum()) - 1
        values = ", ".join(f"{name} = {columns[name][row].item()!r}" for name in check.columns)
        more = f" (and {others} more rows)" if others else ""
        raise DataError(f"{source}: row {row}: {values}: {check.problem}; {check.remedy}{more}")


def _stamp_checks(stamp: str) -> tuple[_Check, ...]:
    return (
        _Check((stamp,), lambda x: x < _FIRST_MS, "is not in milliseconds", "multiply seconds by 1000"),
        _Check(
            (stamp,),
            lambda x: x > _LAST_MS,
            "is not in milliseconds",
            "divide microseconds by 1000, nanoseconds by 1000000",
        ),
        _Check(
            (stamp,),
            lambda x: np.diff(x, prepend=x[0] - 1) == 0,
            "is a duplicate of the row before",
            "remove duplicate rows",
        ),
        _Check(
            (stamp,),
            lambda x: np.diff(x, prepend=x[0] - 1) < 0,
            "is earlier than the row before",
            f"sort the table by {stamp} and remove duplicates",
        ),
    )


def _grid_check(stamp: str, interval_ms: int) -> _Check:
    return _Check(
        (stamp,),
        lambda x: x % interval_ms != 0,
        f"is not a multiple of the candle length {interval_ms} ms",
        "stamps are UTC open times: shift close times, correct the time zone, or remove the stray row",
    )


def _candle_length(stamps: np.ndarray, schema: pa.Schema, source: str, given: int | None = None) -> int:
    """Return the given candle length, or the smallest step between stamps. Raise unless it fits 15-minute bars."""
    length, origin = _smallest_step(stamps, source) if given is None else (given, "")
    divides = length > 0 and BAR_MS % length == 0
    coarser = length > 0 and length % BAR_MS == 0 and schema == MARK
    if not (divides or coarser):
        allowed = "divide 15 minutes" + (" or be a multiple of them" if schema == MARK else "")
        raise DataError(
            f"{source}: {origin}candle length {length} ms does not fit: it must {allowed} ({BAR_MS} ms); "
            "use finer candles, or remove the stray row"
        )
    if BAR_MS // length > MAX_CANDLES:
        raise DataError(
            f"{source}: {origin}candle length {length} ms is shorter than a minute; a bar has at most {MAX_CANDLES} "
            "candles; aggregate the candles to candles of a minute"
        )
    return length


def _smallest_step(stamps: np.ndarray, source: str) -> tuple[int, str]:
    """Return the smallest positive difference in ms, and its place for messages."""
    differences = np.diff(stamps)
    steps, counts = np.unique(differences[differences > 0], return_counts=True)
    if len(steps) == 0:
        raise DataError(
            f"{source}: the candle length cannot be inferred from {len(stamps)} row(s) "
            f"(row 0: open_time_ms = {stamps[:1].tolist()}); pass interval_ms"
        )
    step, usual = steps[0], steps[np.argmax(counts)]
    row = int(np.argmax(differences == step)) + 1
    origin = f"row {row}: open_time_ms = {stamps[row]} comes {step} ms after the row before: "
    if counts[0] < _RARE_STEP * counts.sum():
        raise DataError(
            f"{source}: {origin}most rows come {usual} ms after; remove the stray row (this one or the one "
            "before), or pass interval_ms"
        )
    return int(step), origin
