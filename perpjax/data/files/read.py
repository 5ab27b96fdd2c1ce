"""Open files by their content: Parquet, Feather, CSV and JSON, alone, compressed, zipped or in folders."""

import bz2
import collections
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

from perpjax._describe import show
from perpjax.data.contract import DataError
from perpjax.data.files.names import read_path
from perpjax.data.files.records import RawTable

LARGEST = 4 * 2**30
"""Bytes of a file after decompression, at most."""
LARGEST_RATIO = 1000
"""An archive that grows by more than this, beyond 100 MB, is refused."""

_IGNORED = re.compile(
    r"(?i)^(readme|licen[cs]e|notice|provenance|checksum|manifest|changelog|_success|_metadata)\b"
    r"|\.(md|rst|py|pyc|ipynb|sh|toml|ya?ml|ini|cfg|png|jpe?g|svg|pdf|html|checksum|sha256|md5|asc|sig|lock|log)$"
)
_OTHERS = (
    (b"SQLite format 3", "an SQLite database", "export its table as CSV"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it"),
    (b"\x93NUMPY", "a numpy array", "save it as Parquet or CSV with named columns"),
    (b"Obj\x01", "an Avro file", "save it as Parquet"),
    (b"%PDF", "a PDF document", "give the table as CSV"),
)
"""Formats that are known and not read: the first bytes, the name, a remedy."""
_SKIPPED_LINE = re.compile(r"(?i)^\s*(https?://|www\.|#|sep=)")
_NUMBER = re.compile(r"^[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?%?$")
_DATE = re.compile(r"^\d{1,4}[-./]\d{1,2}[-./]\d{1,4}([T ].*)?$")
_LISTS = ("list", "candles", "data", "result", "rows", "klines", "ticks", "history", "records")
_FACTS = {
    "symbol": "symbol", "s": "symbol", "instrument_name": "symbol", "instId": "symbol", "coin": "symbol", "asset":
    "symbol",
    "contract": "symbol", "interval": "interval", "i": "interval", "category": "category", "exchange": "venue",
}  # fmt: skip


def read_files(paths: Sequence[Path]) -> list[RawTable]:
    """Return every table in some files, folders and globs, in the order of their names.

    Raises:
      DataError: a file is missing, holds no table, or is damaged. The message names it and a remedy.
    """
    files = [file for path in paths for file in _expand(Path(path))]
    tables, pages = [], []
    for file in files:
        try:
            tables += _read_file(file)
        except ErrorPage as error:
            pages.append(error)
    if pages:
        count = f" ({len(pages)} of {len(files)} files are such pages: remove them)" if len(files) > 1 else ""
        raise DataError(f"{pages[0]}{count}")
    return tables


class ErrorPage(DataError):
    """A server's error page under the name of a file: the days before a listing come so."""


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_passed_over(p, path)]
        if not found:
            raise DataError(f"{show(path)}: no file of data in this folder; name the folder of the files")
        return found
    if path.exists():
        return [path]
    if any(c in str(path) for c in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if found:
            return found
    raise DataError(f"{show(path)}: no such file or folder; check the path")


def _is_passed_over(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return any(part.startswith((".", "__")) for part in parts) or bool(_IGNORED.search(path.name))


def _read_file(path: Path) -> list[RawTable]:
    source = show(path)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise DataError(f"{source}: has {size / 2**30:.1f} GiB; split it into files of at most 4 GiB")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}; check the path and its rights") from None
    return list(_read_bytes(data, source, read_path(path), depth=0))


def _read_bytes(data: bytes, source: str, hints: Mapping[str, str], depth: int) -> Iterator[RawTable]:
    """The tables in some bytes, whatever their name says."""
    head = data[:64]
    if not data.strip():
        raise DataError(f"{source}: is empty; download it again")
    if head.startswith(b"PK\x03\x04"):
        yield from _read_zip(data, source, hints, depth)
    elif (unpacked := _decompress(data, source)) is not None:
        if depth > 2:
            raise DataError(f"{source}: is packed more than three times; unpack it")
        yield from _read_bytes(unpacked, source, hints, depth + 1)
    elif head.startswith(b"PAR1"):
        yield _of_arrow(_call(_read_parquet, data, source), source, hints)
    elif head.startswith((b"ARROW1", b"FEA1")):
        yield _of_arrow(_call(pa.feather.read_table, data, source), source, hints)
    elif head.startswith(b"\xff\xff\xff\xff"):
        yield _of_arrow(_call(lambda file: pa.ipc.open_stream(file).read_all(), data, source), source, hints)
    else:
        _refuse_binary(head, source)
        yield from _read_text(_decode(data, source), source, hints)


def _read_parquet(file: pa.NativeFile) -> pa.Table:
    return pa.parquet.read_table(file)


def _call(reader: Any, data: bytes, source: str) -> Any:
    try:
        table = reader(pa.BufferReader(data))
        str((table.column_names, table.schema.types))  # damaged names of columns and zones are found when they are read
        return table
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{source}: is damaged or cut short ({_first_line(error)}); download it again") from None


def _of_arrow(table: pa.Table, source: str, hints: Mapping[str, str]) -> RawTable:
    found = dict(hints)
    for name, value in (table.schema.metadata or {}).items():
        key = name.decode(errors="replace")
        if key in ("instrument_id", "bar_type", "price_precision", "size_precision"):
            found[key] = show(value.decode(errors="replace"))
    if "instrument_id" in found:
        found |= {"symbol": found["instrument_id"].partition(".")[0], "kind": "nautilus"}
    if table.num_rows == 0:
        raise DataError(f"{source}: has no rows; check the download or the date range")
    return RawTable(source, _distinct(table), True, found, ())


def _distinct(table: pa.Table) -> pa.Table:
    names, seen = [], collections.Counter()
    for name in table.column_names:
        names.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return table.rename_columns(names)


def _decompress(data: bytes, source: str) -> bytes | None:
    """The bytes inside; None if they are not compressed."""
    openers = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\x00", lzma.open))
    for magic, opener in openers:
        if data.startswith(magic):
            file = opener(io.BytesIO(data))
            break
    else:
        if not data.startswith(b"\x28\xb5\x2f\xfd"):
            return None
        file = pa.CompressedInputStream(pa.BufferReader(data), "zstd")
    try:
        unpacked = file.read(LARGEST + 1)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        raise DataError(f"{source}: is damaged or cut short ({_first_line(error)}); download it again") from None
    _check_growth(len(unpacked), len(data), source)
    return bytes(unpacked)


def _check_growth(unpacked: int, packed: int, source: str) -> None:
    if unpacked > LARGEST or (unpacked > 100 * 2**20 and unpacked > LARGEST_RATIO * max(packed, 1)):
        raise DataError(f"{source}: grows to more than {unpacked / 2**20:.0f} MiB; unpack it yourself if you trust it")


def _read_zip(data: bytes, source: str, hints: Mapping[str, str], depth: int) -> Iterator[RawTable]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = [m for m in archive.infolist() if not m.is_dir()]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise DataError(f"{source}: is a damaged zip ({_first_line(error)}); download it again") from None
    if any(m.filename.startswith("xl/") for m in members):
        raise DataError(f"{source}: is an Excel workbook; save its sheet as CSV")
    members = [m for m in members if not _IGNORED.search(Path(m.filename).name) and "__MACOSX" not in m.filename]
    if not members:
        raise DataError(f"{source}: holds no file of data; download it again")
    if depth > 1:
        raise DataError(f"{source}: is a zip in a zip in a zip; unpack it")
    _check_growth(sum(m.file_size for m in members), len(data), source)
    for member in members:
        name = f"{source}!{show(member.filename)}"
        try:
            content = archive.read(member)
        except (zipfile.BadZipFile, RuntimeError, ValueError, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{name}: is damaged ({_first_line(error)}); download it again") from None
        # The archive's own path says more than the name of its member.
        yield from _read_bytes(content, name, read_path(Path(member.filename)) | dict(hints), depth + 1)


def _refuse_binary(head: bytes, source: str) -> None:
    if head.startswith(b"\x89HDF"):
        raise DataError(
            f"{source}: is HDF5, which is not read here; convert it: import pandas; "
            "pandas.read_hdf('FILE').reset_index().to_feather('FILE.feather')"
        )
    if re.match(rb"\x80[\x02-\x05]", head):
        raise DataError(f"{source}: is a pickle, which may run any program and is never opened; save it as Parquet")
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise DataError(f"{source}: is an Excel workbook; save its sheet as CSV")
    for magic, what, remedy in _OTHERS:
        if head.startswith(magic):
            raise DataError(f"{source}: is {what}; {remedy}")


def _decode(data: bytes, source: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ("utf-16",)
    elif b"\x00" in data[:65536]:
        raise DataError(f"{source}: is no known format; it begins with the bytes {data[:16]!r}")
    else:
        encodings = ("utf-8-sig", "latin-1")
    for encoding in encodings:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            pass
    raise DataError(f"{source}: is not text in UTF-8 or UTF-16; it begins with the bytes {data[:16]!r}")


def _read_text(text: str, source: str, hints: Mapping[str, str]) -> Iterator[RawTable]:
    start = text.lstrip()
    if start.startswith("version https://git-lfs"):
        raise DataError(f"{source}: is a Git LFS pointer and not the file; run `git lfs pull` in its repository")
    if start.startswith("<") and not start[:6].upper().startswith("<DATE>"):  # the titles of MetaTrader
        code = re.search(r"<Code>(\w+)</Code>", start) or re.search(r"(?i)<title>([^<]{1,80})", start)
        reason = f" ({show(code.group(1))})" if code else ""
        raise ErrorPage(
            f"{source}: is an error page of the server{reason} and not the file; the file may not exist there: "
            "check its date and symbol, and download it again"
        )
    yield _read_json(text, source, hints) if start.startswith(("{", "[")) else _read_csv(text, source, hints)


# CSV.


def _read_csv(text: str, source: str, hints: Mapping[str, str]) -> RawTable:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    notes, skipped = [], 0
    lines = text.split("\n", 30)
    while skipped < len(lines) - 1 and (not lines[skipped].strip() or _SKIPPED_LINE.match(lines[skipped])):
        if lines[skipped].strip():
            first = lines[skipped].strip()
            what = "a URL" if "://" in first or first.startswith("www") else "a comment"
            notes.append(f"line {skipped + 1}, {what}, skipped")
            if "cryptodatadownload" in first.lower():
                hints = dict(hints) | {"exporter": "cryptodatadownload"}
        skipped += 1
    sample = [line.rstrip("\r") for line in lines[skipped : skipped + 20] if line.strip()]
    separator = _find_separator(sample, source)
    first = _split_line(sample[0], separator)
    has_header = not all(_NUMBER.match(f) or _DATE.match(f) for f in first if f) and any(first)
    names = first if has_header else [str(i) for i in range(len(first))]
    header = skipped + has_header
    bad: list[tuple[int | None, int]] = []

    def note_bad(row: Any) -> str:
        bad.append((row.number, row.actual_columns))
        return "skip"

    unique = [f"{i}" for i in range(len(names))]
    body = text.split("\n", header)[-1] if header else text
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(body.encode()),
            read_options=pa.csv.ReadOptions(column_names=unique, use_threads=False, block_size=2**24),
            parse_options=pa.csv.ParseOptions(delimiter=separator, invalid_row_handler=note_bad),
            convert_options=pa.csv.ConvertOptions(
                column_types=dict.fromkeys(unique, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{source}: is no table of text ({_first_line(error)}); check the file") from None
    if bad:
        number, fields = bad[0]
        line = f"line {number + header}" if number is not None else "a line"
        raise DataError(
            f"{source}: {line} has {fields} fields, and the first has {len(names)}; the download may be cut; repeat it"
        )
    if table.num_rows == 0:
        raise DataError(f"{source}: has no rows (row 0 is missing); check the download or the date range")
    if separator != ",":
        notes.append(f"separator {'tab' if separator == chr(9) else separator}")
    if not has_header:
        notes.append("no header")
    hints = dict(hints) | {"separator": separator}
    return RawTable(source, _distinct(table.rename_columns(names)), has_header, hints, tuple(notes))


def _find_separator(sample: Sequence[str], source: str) -> str:
    """The separator that cuts all first lines into equally many fields, the most."""
    if not sample:
        raise DataError(f"{source}: has no rows; check the download")
    found = []
    for separator in (",", ";", "\t", "|"):
        counts = [len(_split_line(line, separator)) for line in sample[:10]]
        usual, times = collections.Counter(counts).most_common(1)[0]
        if usual >= 2:
            found.append((times, usual, separator))
    if not found:
        begin = show(sample[0][:60])
        raise DataError(
            f"{source}: no separator (comma, semicolon, tab or |) in its first line {begin!r}; is it a table?"
        )
    # Decimal commas cut, too, but not into equally many fields beside text.
    if any(s == ";" for *_, s in found):
        return ";"
    return max(found)[2]


def _split_line(line: str, separator: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=separator), [])]


# JSON.


def _read_json(text: str, source: str, hints: Mapping[str, str]) -> RawTable:
    found = dict(hints)
    value = _parse_json(text, source)
    rows = _find_rows(value, found, depth=0)
    if rows is None:
        if isinstance(value, Mapping):
            for key in ("msg", "retMsg", "message", "error", "label"):
                if value.get(key):
                    raise DataError(
                        f"{source}: is an error answer of the server: {show(value[key])[:200]}; ask it again"
                    )
        raise DataError(
            f"{source}: no list of candles or settlements in this JSON; give the answer of the server as it is"
        )
    if isinstance(rows, Mapping):
        columns = {show(k): list(v) for k, v in rows.items()}
    elif isinstance(rows[0], Mapping):
        names = list(dict.fromkeys(k for row in rows if isinstance(row, Mapping) for k in row))
        _check_rows(rows, lambda row: isinstance(row, Mapping), source)
        columns = {show(name): [row.get(name) for row in rows] for name in names}
    else:
        width = len(rows[0])
        _check_rows(rows, lambda row: isinstance(row, list) and len(row) == width, source)
        columns = {str(i): [row[i] for row in rows] for i in range(width)}
    table = pa.table({name: pa.array(list(map(_as_text, column)), pa.string()) for name, column in columns.items()})
    return RawTable(source, table, not isinstance(rows, list) or isinstance(rows[0], Mapping), found, ())


def _parse_json(text: str, source: str) -> Any:
    def load(part: str) -> Any:
        return json.loads(part, parse_float=str, parse_int=str, parse_constant=str)

    try:
        return load(text)
    except RecursionError:
        raise DataError(f"{source}: JSON nested too deep; give the answer of the server as it is") from None
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            if len(lines) > 1:
                return [load(line) for line in lines]
        except (ValueError, RecursionError):
            pass
        raise DataError(f"{source}: is JSON that is cut or damaged ({show(error)}); download it again") from None


def _find_rows(value: Any, hints: dict[str, str], depth: int) -> Any:
    """The list of rows, or the dictionary of columns, in an answer; facts beside it go to the hints."""
    if isinstance(value, list):
        good = value and isinstance(value[0], list | Mapping) and len(value[0]) >= 2
        if good and isinstance(value[0], Mapping) and len(value) == 1 and depth < 3:
            inner = _find_rows(value[0], hints, depth + 1)
            if isinstance(inner, list):
                return inner
        return value if good else None
    if not isinstance(value, Mapping) or depth > 3:
        return None
    for key, name in _FACTS.items():
        if isinstance(value.get(key), str) and value[key]:
            hints.setdefault(f"json_{name}", show(value[key]))
            if name != "symbol" or "symbol" not in hints:
                hints.setdefault(name, show(value[key]))
    lists = [v for v in value.values() if isinstance(v, list)]
    if (
        len(lists) >= 5
        and len({len(v) for v in lists}) == 1
        and lists[0]
        and not isinstance(lists[0][0], list | Mapping)
    ):
        return {k: v for k, v in value.items() if isinstance(v, list)}
    keys = [k for k in _LISTS if k in value] + [k for k in value if k not in _LISTS]
    for key in keys:
        if isinstance(value[key], list | Mapping) and (rows := _find_rows(value[key], hints, depth + 1)) is not None:
            return rows
    return None


def _check_rows(rows: Sequence[Any], is_good: Any, source: str) -> None:
    for i, row in enumerate(rows):
        if not is_good(row):
            raise DataError(f"{source}: row {i}: {show(row)[:80]} has another form than row 0; download it again")


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


def _first_line(error: Exception) -> str:
    lines = show(str(error).split("\n")[0])
    return lines[:160] or type(error).__name__
