"""One kind of one symbol from many files: sorted, without duplicates, on one grid. Every change is said in words.

A mending cannot change a number. Where it could, the rows are shown and refused.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax.data.contract import (
    _FIRST_MS,
    _LAST_MS,
    _VALUE_CHECKS,
    BAR_MS,
    CANDLES,
    FUNDING,
    MARK,
    PRICES,
    SETTLEMENT_SLACK_MS,
    DataError,
)
from perpjax.data.files.records import CLOSE_TIME, CLOSED, QUOTE_VOLUME, ROW, Choices, Kind, Series

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
EARLY_MS = 120_000
"""A settlement up to this long before an hour belongs to that hour."""

_SCHEMAS = {"candles": CANDLES, "mark": MARK, "funding": FUNDING}
_FEW_STEPS = 3  # fewer smaller steps come from stray rows, not from a second candle length
_LONG_RUN = 10  # equal larger steps in a row are candles of that length: holes do not repeat so


class Mended(NamedTuple):
    """One table of the contract, strictly increasing in time."""

    table: pa.Table
    """Exactly CANDLES, MARK or FUNDING. `volume` is null where the file has none."""
    words: tuple[str, ...]
    """The mendings, each with its count."""
    source: str
    interval_ms: int | None
    """Candle length; None for funding."""
    quote_volume: np.ndarray | None = None
    """[rows] float64 in quote currency, NaN where unknown; None without such a column."""
    venue: str | None = None
    files: tuple[str, ...] = ()
    file_of: np.ndarray | None = None
    """[rows] index into `files`."""
    rows: np.ndarray | None = None
    """[rows] 0-based data row in its file."""

    def place(self, index: int) -> str:
        """Return file, row and time of a row of the table, for a message."""
        stamp = utc(int(self.table.column(0)[index].as_py()))
        if self.rows is None or self.file_of is None:
            return f"{self.source}: row {index} ({stamp})"
        return f"{self.files[self.file_of[index]]}: row {self.rows[index]} ({stamp})"


class _Rows(NamedTuple):
    """All rows of all files, as arrays of one length."""

    stamp: np.ndarray
    values: dict[str, np.ndarray]
    file_of: np.ndarray
    row: np.ndarray
    closed: np.ndarray
    close_time: np.ndarray
    quote: np.ndarray

    def take(self, index: np.ndarray) -> "_Rows":
        return _Rows(*({n: c[index] for n, c in x.items()} if isinstance(x, dict) else x[index] for x in self))


def utc(stamp_ms: int) -> str:
    """Return "2024-01-01 00:00 UTC"; seconds and milliseconds follow where they are not 0."""
    if not _FIRST_MS <= stamp_ms <= _LAST_MS:
        return f"{stamp_ms} ms"
    unit = "m" if stamp_ms % MINUTE_MS == 0 else "s" if stamp_ms % 1000 == 0 else "ms"
    return f"{np.datetime_as_string(np.datetime64(stamp_ms, 'ms'), unit=unit).replace('T', ' ')} UTC"


def length_words(interval_ms: int) -> str:
    """Return "5 minutes", "1 minute" or "30 seconds"."""
    count, unit = (interval_ms / 1000, "second") if interval_ms % MINUTE_MS else (interval_ms // MINUTE_MS, "minute")
    return f"{count:g} {unit}{'' if count == 1 else 's'}"


def mend(parts: Sequence[Series], choices: Choices) -> Mended:
    """Join the files of one kind of one symbol.

    Args:
      parts: one or more series of the same kind, in the order of the command line.
      choices: `keep` decides between conflicting rows; no other choice is used.

    Returns:
      The table, and the mendings in words.

    Raises:
      DataError: a row breaks the contract, two rows conflict, or the stamps do not fit one candle length.
    """
    if not parts:
        raise ValueError("no series given")
    kinds = sorted({part.kind for part in parts})
    if len(kinds) > 1:
        raise ValueError(f"series of several kinds given: {', '.join(kinds)}")
    kind: Kind = parts[0].kind
    files = tuple(part.source for part in parts)
    rows = _gather(parts, kind)
    words: list[str] = []
    if kind == "funding":
        rows, interval_ms = _snap(rows, files, words), None
    else:
        rows = _drop_unfinished(rows, files, words)
    _say_order(rows, words)
    order = np.lexsort((rows.row, rows.file_of, rows.stamp))
    rows = rows.take(order)
    if kind != "funding":
        interval_ms = _find_interval(rows, files)
    rows = _drop_duplicates(rows, files, kind, choices, words)
    if kind != "funding":
        if interval_ms < MINUTE_MS and MINUTE_MS % interval_ms == 0:
            rows, interval_ms = _aggregate_to_minutes(rows, interval_ms, files, words), MINUTE_MS
        _check_length(interval_ms, kind, files)
    known = np.isfinite(rows.quote)
    arrays = [pa.array(rows.stamp), *(pa.array(x, from_pandas=name == "volume") for name, x in rows.values.items())]
    return Mended(
        table=pa.table(arrays, schema=_SCHEMAS[kind]),
        words=tuple(words),
        source=files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more",
        interval_ms=interval_ms,
        quote_volume=rows.quote if known.any() else None,
        venue=next((part.venue for part in parts if part.venue), None),
        files=files,
        file_of=rows.file_of,
        rows=rows.row,
    )


def _gather(parts: Sequence[Series], kind: Kind) -> _Rows:
    names = _SCHEMAS[kind].names
    gathered = []
    for number, part in enumerate(parts):
        table, source = part.table, part.source
        if table.num_rows == 0:
            raise DataError(f"{source}: row 0: has no rows; check the download")
        row = table[ROW].to_numpy()
        columns = {name: _to_numpy(table, name, row, source) for name in names}
        _check_rows(columns, row, source)
        count = table.num_rows
        extra = set(table.column_names)
        closed = table[CLOSED].fill_null(True).to_numpy() if CLOSED in extra else np.ones(count, bool)
        close_time = table[CLOSE_TIME].fill_null(-1).to_numpy() if CLOSE_TIME in extra else np.full(count, -1)
        quote = table[QUOTE_VOLUME].to_numpy() if QUOTE_VOLUME in extra else np.full(count, np.nan)
        gathered.append((columns, np.full(count, number), row, closed, close_time, quote))
    columns, *others = zip(*gathered, strict=True)
    joined = {name: np.concatenate([c[name] for c in columns]) for name in names}
    return _Rows(joined.pop(names[0]), joined, *(np.concatenate(x) for x in others))


def _to_numpy(table: pa.Table, name: str, row: np.ndarray, source: str) -> np.ndarray:
    column = table[name]
    if column.null_count and name != "volume":
        first = int(np.argmax(column.is_null().to_numpy()))
        raise DataError(f"{source}: row {row[first]}: {name} is empty; drop the row: a missing row is a gap")
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan)
    return column.to_numpy()


def _check_rows(columns: dict[str, np.ndarray], row: np.ndarray, source: str) -> None:
    stamp_name = next(iter(columns))
    stamp = columns[stamp_name]
    off = (stamp < _FIRST_MS) | (stamp > _LAST_MS)
    if off.any():
        i = int(off.argmax())
        raise DataError(f"{source}: row {row[i]}: {stamp_name} = {stamp[i]} is not in milliseconds; name the unit")
    for check in _VALUE_CHECKS:
        # The size of rates is judged later, when their unit is known.
        if not set(check.columns) <= columns.keys() or check.problem.startswith("is not a fraction"):
            continue
        values = [columns[name] for name in check.columns]
        bad = check.bad(*values)
        if check.columns == ("volume",):
            bad = bad & ~np.isnan(values[0])
        if bad.any():
            i = int(bad.argmax())
            shown = ", ".join(f"{name} = {columns[name][i].item()!r}" for name in check.columns)
            more = f" (and {int(bad.sum()) - 1} more rows)" if bad.sum() > 1 else ""
            raise DataError(f"{source}: row {row[i]} ({utc(int(stamp[i]))}): {shown}: {check.problem}; "
                            f"{check.remedy}{more}")  # fmt: skip


def _split_files(rows: _Rows) -> list[np.ndarray]:
    """Return the rows of each file, in their order."""
    order = np.argsort(rows.file_of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(rows.file_of[order])) + 1)


def _say_order(rows: _Rows, words: list[str]) -> None:
    backward, shuffled = 0, 0
    for part in _split_files(rows):
        steps = np.diff(rows.stamp[part])
        if (steps < 0).any():
            backward, shuffled = (backward + 1, shuffled) if (steps <= 0).all() else (backward, shuffled + 1)
    for count, order in ((backward, "newest row first"), (shuffled, "rows not in order of time")):
        if count:
            words.append(f"{order}: sorted" if rows.file_of.max() == 0 else f"{order} in {count} file(s): sorted")


def _drop_unfinished(rows: _Rows, files: tuple[str, ...], words: list[str]) -> _Rows:
    """Drop the last candle of each file where flag or close time shows that it had not closed."""
    last = np.full(len(files), -1)
    np.maximum.at(last, rows.file_of, rows.stamp)
    at_end = rows.stamp == last[rows.file_of]
    inside = ~rows.closed & ~at_end
    if inside.any():
        i = int(inside.argmax())
        raise DataError(
            f"{files[rows.file_of[i]]}: row {rows.row[i]} ({utc(int(rows.stamp[i]))}): the candle is flagged as not "
            "closed, and later candles follow; download the span again"
        )
    open_ = at_end & ~rows.closed
    known = rows.close_time >= 0
    if known.any():
        length = rows.close_time - rows.stamp
        if np.median(length[known]) <= 0:
            i = int(known.argmax())
            raise DataError(
                f"{files[rows.file_of[i]]}: row {rows.row[i]}: the candle of {utc(int(rows.stamp[i]))} closes at "
                f"{utc(int(rows.close_time[i]))}: the stamps are close times; take the open time (--columns time=...)"
            )
        for part in _split_files(rows):
            mine = part[known[part]]
            if len(mine):
                open_[mine] |= at_end[mine] & (np.abs(length[mine] - np.median(length[mine])) > 1000)
    if not open_.any():
        return rows
    stamps = sorted({utc(int(x)) for x in rows.stamp[open_]})
    cause = "flag" if (~rows.closed).any() else "close time"
    if len(stamps) == 1:
        words.append(f"last candle {stamps[0]} dropped (unfinished by its {cause})")
    else:
        words.append(f"{len(stamps)} last candles of files dropped (unfinished by their {cause}): {', '.join(stamps)}")
    kept = rows.take(np.flatnonzero(~open_))
    if not len(kept.stamp):
        raise DataError(f"{files[0]}: row 0: the only candle is unfinished; give more candles")
    return kept


def _find_interval(rows: _Rows, files: tuple[str, ...]) -> int:
    """Return the one candle length of all files. Rows are sorted by time."""
    found: dict[int, int] = {}
    for part in _split_files(rows):
        i = int(rows.file_of[part[0]])
        length = _find_length(rows.take(part), files[i])
        if length is not None:
            found[i] = length
    if not found:
        length = _find_length(rows, files[0])
        if length is None:
            raise DataError(
                f"{files[0]}: row {rows.row[0]}: one stamp only ({utc(int(rows.stamp[0]))}): the candle length cannot "
                "be told; give more candles"
            )
        return length
    (first, length), *others = found.items()
    for i, other in others:
        if other != length:
            mine = int((rows.file_of == i).argmax())
            raise DataError(
                f"two candle lengths in one series: {files[first]} has candles of {length_words(length)}, {files[i]} "
                f"(row {rows.row[mine]}, {utc(int(rows.stamp[mine]))}) of {length_words(other)}; give files of one "
                "length"
            )
    _check_grid(rows, length, files)
    return length


def _find_length(rows: _Rows, source: str) -> int | None:
    """Return the usual step of one file, None for a single stamp."""
    keep = np.flatnonzero(np.diff(rows.stamp, prepend=-1) > 0)
    stamps = rows.stamp[keep]
    if len(stamps) < 2:
        return None
    steps = np.diff(stamps)
    sizes, counts = np.unique(steps, return_counts=True)
    length = int(sizes[counts.argmax()])
    change = None
    smaller = steps < length
    if smaller.sum() >= _FEW_STEPS:
        other = int(steps[smaller.argmax()])
        change = int(smaller.argmax()) if smaller.argmax() > (steps == length).argmax() else int(
            (steps == length).argmax())  # fmt: skip
    elif (runs := _find_runs(steps, length)) is not None:
        change, other = runs
    if change is not None:
        i = int(keep[max(change, 0)])
        before, after = int(steps[max(change - 1, 0)]), int(steps[change])
        raise DataError(
            f"{source}: row {rows.row[i]} ({utc(int(stamps[change]))}): two candle lengths in one file: the step "
            f"changes here from {length_words(before)} to {length_words(after)} ({int((steps == length).sum())} steps "
            f"of {length_words(length)}, {int((steps == other).sum())} of {length_words(other)}); split the file"
        )
    _check_grid(rows, length, (source,) * (int(rows.file_of.max()) + 1))
    return length


def _find_runs(steps: np.ndarray, length: int) -> tuple[int, int] | None:
    """Return the position where a long run of a larger step begins or ends, and that step."""
    edges = np.flatnonzero(np.diff(steps, prepend=-1, append=-1) != 0)
    sizes = np.diff(edges)
    long_ = (sizes >= _LONG_RUN) & (steps[edges[:-1]] > length) & (steps[edges[:-1]] % length == 0)
    if not long_.any():
        return None
    k = int(long_.argmax())
    begin, end = int(edges[k]), int(edges[k + 1])
    return (begin or end), int(steps[begin])


def _check_grid(rows: _Rows, length: int, files: tuple[str, ...]) -> None:
    offset = rows.stamp % length
    off = offset != 0
    if not off.any():
        return
    i = int(off.argmax())
    place = f"{files[rows.file_of[i]]}: row {rows.row[i]}: {utc(int(rows.stamp[i]))}"
    grid = f"is not a multiple of the candle length, {length_words(length)}"
    if off.all() and length - offset[i] <= 1000 and (offset == offset[i]).all():
        raise DataError(
            f"{place} {grid}: the stamps lie {length - offset[i]} ms before it, so they are close times; "
            "take the open time (--columns time=...)"
        )
    if off.all() and (offset == offset[i]).all():
        raise DataError(
            f"{place} {grid}: all stamps lie {length_words(int(offset[i]))} after it; give the candles' UTC open times"
        )
    raise DataError(f"{place} {grid} ({int(off.sum())} of {len(off)} rows); drop the stray rows, or correct them")


def _show(rows: _Rows, i: int, files: tuple[str, ...]) -> str:
    values = ", ".join(f"{name} {x[i].item()!r}" for name, x in rows.values.items())
    return f"{files[rows.file_of[i]]} row {rows.row[i]} ({values})"


def _drop_duplicates(rows: _Rows, files: tuple[str, ...], kind: Kind, choices: Choices, words: list[str]) -> _Rows:
    """Keep one row a stamp. Rows are sorted by time; of funding, two rows in one bar are one settlement."""
    key = rows.stamp // BAR_MS if kind == "funding" else rows.stamp
    group = np.cumsum(np.diff(key, prepend=key[0] - 1) != 0) - 1
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    if len(starts) == len(key):
        return rows
    equal = np.ones(len(key), bool)
    for x in rows.values.values():
        first = x[starts[group]]
        equal &= (x == first) | (np.isnan(x) & np.isnan(first))
    conflicting = np.unique(group[~equal])
    last = int(group[-1])
    if conflicting.tolist() == [last] and kind != "funding" and choices.keep is None:
        mine = np.flatnonzero(group == last)
        if last > 0 and _grows(rows, mine):
            words.append(
                f"last candle {utc(int(rows.stamp[-1]))} dropped (unfinished: {len(mine)} rows show it growing)"
            )
            kept = np.flatnonzero(group < last)
            return _drop_duplicates(rows.take(kept), files, kind, choices, words)
    if len(conflicting) and choices.keep is None:
        i = int((~equal).argmax())
        more = f" (and {len(conflicting) - 1} more stamps)" if len(conflicting) > 1 else ""
        raise DataError(
            f"{files[rows.file_of[i]]}: row {rows.row[i]}: two different rows at {utc(int(rows.stamp[i]))}: "
            f"{_show(rows, int(starts[group[i]]), files)} and {_show(rows, i, files)}{more}; "
            "--keep first or --keep last decides"
        )
    dropped = len(key) - len(starts)
    # A stamp with a conflict counts as such, even if it has equal rows too.
    conflict_rows = int(np.isin(group, conflicting).sum()) - len(conflicting)
    if dropped > conflict_rows:
        words.append(f"{dropped - conflict_rows} equal duplicates dropped")
    if conflict_rows:
        words.append(f"{conflict_rows} conflicting duplicates dropped at {len(conflicting)} stamps: the "
                     f"{choices.keep} row of each is kept (--keep {choices.keep})")  # fmt: skip
    ends = np.append(starts[1:], len(key)) - 1
    return rows.take(ends if choices.keep == "last" else starts)


def _grows(rows: _Rows, mine: np.ndarray) -> bool:
    """Return whether rows of one stamp are one candle seen several times before its close."""
    if "volume" not in rows.values:
        return False
    volume = rows.values["volume"][mine]
    order = mine[np.argsort(volume, kind="stable")]
    return bool(
        (np.diff(rows.values["open"][order]) == 0).all()
        and (np.diff(rows.values["high"][order]) >= 0).all()
        and (np.diff(rows.values["low"][order]) <= 0).all()
        and np.ptp(volume) > 0
    )


def _aggregate_to_minutes(rows: _Rows, interval_ms: int, files: tuple[str, ...], words: list[str]) -> _Rows:
    """Aggregate candles under a minute. A minute with rows missing is left out, unless untraded rows never stand."""
    per_minute = MINUTE_MS // interval_ms
    minute = rows.stamp // MINUTE_MS
    starts = np.flatnonzero(np.diff(minute, prepend=-1))
    counts = np.diff(np.append(starts, len(minute)))
    ends = starts + counts - 1
    values = dict(rows.values)
    sparse = "volume" in values and bool((values["volume"] > 0).all())
    whole = counts == per_minute
    if sparse:  # seconds without a trade are left out of such files; only the ends may be cut
        whole = np.ones(len(counts), bool)
        whole[0] = rows.stamp[0] % MINUTE_MS == 0
        whole[-1] &= rows.stamp[-1] % MINUTE_MS == MINUTE_MS - interval_ms
    if not whole.any():
        raise DataError(
            f"{files[0]}: row {rows.row[0]}: no minute has all of its {per_minute} candles; give a whole minute"
        )
    reduced = {
        "open": values["open"][starts],
        "high": np.maximum.reduceat(values["high"], starts),
        "low": np.minimum.reduceat(values["low"], starts),
        "close": values["close"][ends],
    }
    if "volume" in values:
        reduced["volume"] = np.add.reduceat(values["volume"], starts)
    quote = np.add.reduceat(rows.quote, starts)
    words.append(f"{len(rows.stamp)} candles of {length_words(interval_ms)} aggregated to {int(whole.sum())} minutes")
    if not whole.all():
        words.append(f"{int((~whole).sum())} minutes left out: not all of their candles are there")
    at = starts[whole]
    base = rows.take(at)
    return base._replace(
        stamp=minute[at] * MINUTE_MS, values={n: x[whole] for n, x in reduced.items()}, quote=quote[whole]
    )


def aggregate_mark(table: pa.Table, interval_ms: int) -> pa.Table:
    """Return mark candles of the given length from finer ones. Only candles with all of their parts are kept."""
    stamps = table["open_time_ms"].to_numpy()
    per_candle = interval_ms // int(np.diff(stamps).min())
    candle = stamps // interval_ms
    starts = np.flatnonzero(np.diff(candle, prepend=-1))
    counts = np.diff(np.append(starts, len(candle)))
    whole = counts == per_candle
    prices = {name: table[name].to_numpy() for name in PRICES}
    columns = [
        candle[starts] * interval_ms,
        prices["open"][starts],
        np.maximum.reduceat(prices["high"], starts),
        np.minimum.reduceat(prices["low"], starts),
        prices["close"][starts + counts - 1],
    ]
    return pa.table([pa.array(x[whole]) for x in columns], schema=MARK)


def _check_length(interval_ms: int, kind: Kind, files: tuple[str, ...]) -> None:
    if interval_ms % MINUTE_MS == 0 and BAR_MS % interval_ms == 0:
        return
    if kind == "mark" and interval_ms % BAR_MS == 0:
        return
    allowed = "1, 3, 5 or 15 minutes" + (", or a multiple of 15" if kind == "mark" else "")
    raise DataError(
        f"{files[0]}: row 1: {kind} of {length_words(interval_ms)}: their length must be {allowed}; "
        "download candles of such a length"
    )


def _snap(rows: _Rows, files: tuple[str, ...], words: list[str]) -> _Rows:
    """Move settlements up to two minutes early to their hour; those up to 60 s late stay."""
    distinct = np.unique(rows.stamp)
    usual = int(np.median(np.diff(distinct))) if len(distinct) > 2 else HOUR_MS
    on_hour = (rows.stamp + EARLY_MS) % HOUR_MS <= EARLY_MS + SETTLEMENT_SLACK_MS
    if usual < HOUR_MS // 2 and on_hour.mean() < 0.5:
        raise DataError(
            f"{files[0]}: row {rows.row[min(1, len(rows.row) - 1)]}: a rate every {length_words(usual)}: the rate is "
            "repeated on every row (forward-filled, or predicted); keep one row a settlement, the usual step is 8 hours"
        )
    early = rows.stamp % HOUR_MS >= HOUR_MS - EARLY_MS
    late = rows.stamp % BAR_MS
    deep = ~early & (late > SETTLEMENT_SLACK_MS)
    if deep.any():
        i = int(deep.argmax())
        raise DataError(
            f"{files[rows.file_of[i]]}: row {rows.row[i]}: the settlement at {utc(int(rows.stamp[i]))} lies "
            f"{late[i] / 1000:g} s after the open of its bar, more than 60 s; settlements happen on the hour: "
            "correct the stamp"
        )
    if early.any():
        words.append(f"{int(early.sum())} settlements up to 2 minutes early moved to their hour")
    if tardy := int(((late > 0) & ~early).sum()):
        words.append(f"{tardy} settlements up to {np.max(late[~early]) / 1000:g} s late, dated at their bar")
    stamp = np.where(early, rows.stamp - rows.stamp % HOUR_MS + HOUR_MS, rows.stamp)
    return rows._replace(stamp=stamp)
