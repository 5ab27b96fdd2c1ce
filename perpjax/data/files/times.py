"""Stamps of files to UTC milliseconds: unix numbers of any unit, timestamps of Arrow, text with or without a zone."""

import datetime
import re
import zoneinfo
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from perpjax._describe import show
from perpjax.data.contract import DataError

_UNITS = ((1e8, 1e11, "seconds", 1000.0), (1e11, 1e14, "milliseconds", 1.0), (1e14, 1e17, "microseconds", 1e-3),
          (1e17, 1e20, "nanoseconds", 1e-6))  # fmt: skip
_ZONE = r"\s*(?P<zone>Z|UTC|GMT|(?:GMT|UTC)?[+-]\d{2}:?\d{2}|[+-]\d{2})?$"
_HALF = r"(?:\s*(?P<half>[AaPp][Mm]))?"
_CLOCK = r"(?:[T ]+(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<part>\d{1,9}))?)?" + _HALF + r")?"
_FORMS = {
    "ISO": r"^(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",
    "day.month.year": r"^(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>\d{4})",
    "month-day-year": r"^(?P<month>\d{1,2})[-/](?P<day>\d{1,2})[-/](?P<year>\d{4})",
    "day-month-year": r"^(?P<day>\d{1,2})[-/](?P<month>\d{1,2})[-/](?P<year>\d{4})",
}


class Stamps(NamedTuple):
    """Times of a column."""

    ms: np.ndarray
    """[rows] int64, UTC."""
    words: str
    """Such as "seconds, UTC"."""


def is_unix(column: pa.ChunkedArray) -> bool:
    """Whether a column holds unix times as numbers."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return bool(pc.all(pc.match_substring_regex(column.drop_null(), r"^\d{9,19}(\.\d+)?$")).as_py())
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return False
    sizes = pc.cast(column, pa.float64(), safe=False)
    return bool(pc.any(pc.greater_equal(sizes, _UNITS[0][0])).as_py())  # rows counted from 0 are no times


def read_stamps(column: pa.ChunkedArray, source: str, name: str, timezone: str | None, known_utc: str | None) -> Stamps:
    """Return the times of a column.

    Args:
      timezone: zone of text without one.
      known_utc: the reason why text without a zone is UTC, or None.

    Raises:
      DataError: a value is no time, or the zone or the order of day and month is not clear.
    """
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise DataError(f"{source}: row {row}: {name} is empty; drop the row, or download the file again")
    kind = column.type
    if pa.types.is_dictionary(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.string())
        kind = column.type
    if pa.types.is_timestamp(kind):
        ms = column.cast(pa.timestamp("ms", kind.tz), safe=False).cast(pa.int64()).to_numpy()
        return Stamps(ms, "UTC" if kind.tz else "without a zone, taken as UTC")
    if pa.types.is_date(kind):
        raise DataError(f"{source}: {name} holds dates without a clock; candles of 15 minutes or less are needed")
    if is_unix(column):
        return _read_unix(column, source, name)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        raise DataError(
            f"{source}: row 0: {name} = {column[0].as_py()} is no unix time of 1973 or later; name the column of the "
            "times with --columns time=..."
        )
    if pa.types.is_string(kind):
        return _read_text(column, source, name, timezone, known_utc)
    raise DataError(f"{source}: {name} has type {kind}, which is no time; name the column with --columns time=...")


def _read_unix(column: pa.ChunkedArray, source: str, name: str) -> Stamps:
    if pa.types.is_string(column.type):
        whole = pc.all(pc.match_substring_regex(column, r"^\d+$")).as_py()
        column = column.cast(pa.int64() if whole else pa.float64())
    values = column.to_numpy()
    if not np.isfinite(values.astype(np.float64)).all():
        raise DataError(f"{source}: row {int(np.argmin(np.isfinite(values)))}: {name} is not a number; drop the row")
    sizes, ms, words = np.abs(values.astype(np.float64)), np.zeros(len(values), np.int64), []
    known = np.zeros(len(values), bool)
    for low, high, word, factor in _UNITS:
        inside = (sizes >= low) & (sizes < high)
        if inside.any():
            words.append(word)
            if values.dtype.kind == "f":
                ms[inside] = np.round(values[inside] * factor).astype(np.int64)
            else:
                x = values[inside].astype(np.int64)
                ms[inside] = x * int(factor) if factor >= 1 else x // round(1 / factor)
            known |= inside
    if not known.all():
        row = int(np.argmin(known))
        raise DataError(
            f"{source}: row {row}: {name} = {values[row]} is no unix time of 1973 or later; check the column"
        )
    return Stamps(ms, f"{' and '.join(words)}, UTC")


def _read_text(column: pa.ChunkedArray, source: str, name: str, timezone: str | None, known_utc: str | None) -> Stamps:
    column = pc.utf8_trim_whitespace(column)
    parts, form = None, ""
    for form, pattern in _FORMS.items():
        found = pc.extract_regex(column, pattern + _CLOCK + _ZONE)
        if found.null_count == 0:
            fields = found.combine_chunks().flatten()
            parts = dict(zip([found.type.field(i).name for i in range(found.type.num_fields)], fields, strict=True))
            month, day = (_to_int(parts[x]) for x in ("month", "day"))
            if form.startswith(("month", "day-")):
                if (month > 12).any():
                    parts = None
                    continue
                if (day <= 12).all():
                    raise DataError(
                        f"{source}: row 0: {name} = {column[0].as_py()!r}: the order of day and month is not clear: "
                        "no day is above 12; give a file with unix or ISO times"
                    )
            break
    if parts is None:
        bad = pc.is_null(pc.extract_regex(column, _FORMS["ISO"] + _CLOCK + _ZONE)).to_numpy(zero_copy_only=False)
        row = int(np.argmax(bad))
        value = show(column[row].as_py())[:60]
        if re.match(r"^\d[.,]\d+[eE]\+\d+$", value):
            raise DataError(
                f"{source}: row {row}: {name} = {value!r} was shortened by a spreadsheet; give the file as it was "
                "before"
            )
        raise DataError(
            f"{source}: row {row}: {name} = {value!r} is no time; name the right column with --columns time=..."
        )
    year, month, day, hour, minute, second = (
        _to_int(parts[x]) for x in ("year", "month", "day", "hour", "minute", "second")
    )
    wrong = (month < 1) | (month > 12) | (day < 1) | (day > 31) | (hour > 23) | (minute > 59) | (second > 59)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(f"{source}: row {row}: {name} = {column[row].as_py()!r} is no time; correct the row")
    half = pc.utf8_lower(pc.fill_null(parts["half"], "")).to_numpy(zero_copy_only=False).astype(str)
    if (half != "").any():
        odd = (half != "") & ((hour < 1) | (hour > 12))
        if odd.any():
            row = int(odd.argmax())
            raise DataError(f"{source}: row {row}: {name} = {column[row].as_py()!r} is no time; correct the row")
        hour = np.where(half == "", hour, hour % 12 + 12 * (half == "pm"))
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    if (days.astype("datetime64[M]") != months).any():
        row = int((days.astype("datetime64[M]") != months).argmax())
        raise DataError(f"{source}: row {row}: {name} = {column[row].as_py()!r} is no day; correct the row")
    part = pc.utf8_rpad(pc.fill_null(parts["part"], ""), 9, "0")
    ms = days.astype(np.int64) * 86_400_000 + (hour * 3600 + minute * 60 + second) * 1000 + _to_int(part) // 1_000_000
    zone = pc.fill_null(parts["zone"], "").to_numpy(zero_copy_only=False).astype(str)
    words = "" if form == "ISO" else f"{form}, "
    naive = zone == ""
    offsets = {z: _offset(z) for z in np.unique(zone) if z}
    ms = ms - np.array([offsets.get(z, 0) for z in zone]) if offsets else ms
    if not naive.any():
        return Stamps(ms, f"{words}text with a zone, UTC")
    if timezone is not None:
        ms[naive] = _to_utc(ms[naive], timezone, source, name)
        return Stamps(ms, f"{words}text, zone {timezone} as given")
    if known_utc is not None:
        return Stamps(ms, f"{words}text, UTC ({known_utc})")
    row = int(naive.argmax())
    raise DataError(
        f"{source}: row {row}: {name} = {column[row].as_py()!r} has no time zone, and local time moves candles by "
        "hours; give --timezone UTC, or the zone of the file such as Europe/Berlin"
    )


def _to_int(column: pa.Array) -> np.ndarray:
    text = pc.fill_null(column, "0")
    return pc.if_else(pc.equal(text, ""), "0", text).cast(pa.int64()).to_numpy(zero_copy_only=False)


def _offset(zone: str) -> int:
    zone = re.sub("^(UTC|GMT)", "", zone)
    if zone in ("Z", ""):
        return 0
    digits = re.sub(r"\D", "", zone).ljust(4, "0")
    return (1 if zone[0] == "+" else -1) * (int(digits[:2]) * 60 + int(digits[2:])) * 60_000


def _to_utc(local: np.ndarray, timezone: str, source: str, name: str) -> np.ndarray:
    """Local times to UTC; each hour is converted once."""
    try:
        zone = zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise DataError(f"--timezone {timezone!r} is unknown; give UTC or a name such as Europe/Berlin") from None
    quarters, which = np.unique(local // 900_000, return_inverse=True)
    early, late = np.zeros(len(quarters), np.int64), np.zeros(len(quarters), np.int64)
    for i, quarter in enumerate(quarters.tolist()):
        naive = datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=quarter * 900_000)
        for fold, shifts in enumerate((early, late)):
            shifts[i] = round(naive.replace(tzinfo=zone, fold=fold).utcoffset().total_seconds() * 1000)
    first, second, single = local - early[which], local - late[which], (early == late)[which]
    if single.all():
        return first
    origin = first[single][0] // 60_000 if single.any() else 0
    # Settlements come every 8 hours: of two readings, one of them is on the grid of the other stamps.
    grid = np.gcd.reduce(np.diff(np.unique(first[single] // 60_000)), initial=0)
    on_grid = [(x // 60_000 - origin) % max(grid, 1) == 0 for x in (first, second)]
    repeated = (early > late)[which]
    proven = single | (repeated & (grid > 0) & (on_grid[0] != on_grid[1]))
    if not proven.all():
        row = int((~proven).argmax())
        why = "occurs twice" if repeated[row] else "does not exist"
        when = datetime.datetime(1970, 1, 1) + datetime.timedelta(milliseconds=int(local[row]))
        raise DataError(
            f"{source}: row {row}: {name} = {when} {why} in {timezone}, for the clocks change; give a file in UTC"
        )
    return np.where(single | on_grid[0], first, second)
