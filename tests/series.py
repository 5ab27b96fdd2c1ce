"""Series of the door by hand: the tests of `mend` and `judge` need no reader."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

from perpjax.data.contract import CANDLES, FUNDING, MARK
from perpjax.data.files.records import CLOSE_TIME, CLOSED, QUOTE_VOLUME, ROW, Series

SCHEMAS = {"candles": CANDLES, "mark": MARK, "funding": FUNDING}
_KLINES = ["open_time_ms", "open", "high", "low", "close", "volume", CLOSE_TIME, QUOTE_VOLUME]
_RENAMED = {
    "open_time": "open_time_ms", "timestamp": "open_time_ms", "timestamp_ms": "open_time_ms", "time": "open_time_ms",
    "datetime": "open_time_ms", "date": "open_time_ms", "close_time": CLOSE_TIME, "quote_asset_volume": QUOTE_VOLUME,
    "volume_base": "volume", "volume_quote": QUOTE_VOLUME, "quote_volume": QUOTE_VOLUME, "turnover": QUOTE_VOLUME,
    "calc_time": "time_ms", "last_funding_rate": "funding_rate",
}  # fmt: skip


def make_series(kind, columns, symbol=None, source="file", venue=None):
    """A series of arrays, one row a stamp in the order given."""
    schema = SCHEMAS[kind]
    names = [n for n in (*schema.names, CLOSED, CLOSE_TIME, QUOTE_VOLUME) if n in columns or n in schema.names]
    count = len(columns[schema.names[0]])
    extra = {CLOSED: pa.bool_(), CLOSE_TIME: pa.int64(), QUOTE_VOLUME: pa.float64()}
    table = pa.table({n: pa.array(columns[n], extra[n] if n in extra else schema.field(n).type)
                      if n in columns else pa.nulls(count, pa.float64()) for n in names})  # fmt: skip
    return Series(kind, symbol, venue, source, table.append_column(ROW, pa.array(np.arange(count))), ())


def read_series(path, kind="candles", symbol=None):
    """A file of ../shared/data as the reader and the recogniser would give it."""
    path = Path(path)
    if symbol is None and (found := re.search(r"[A-Z]+(?:USDT|USD)\b", path.stem.replace("_", " "))):
        symbol = found.group()
    return make_series(kind, _read_columns(path, kind), symbol, path.name)


def _read_columns(path, kind):
    if path.suffix == ".json":
        rows = json.loads(path.read_text())
        if isinstance(rows, dict):
            rows = [[r[k] for k in "tohlcvT"] for r in rows["candles"]]
        if kind == "funding":
            return {"time_ms": [r[0] for r in rows], "funding_rate": [r[1] for r in rows]}
        return {n: [float(r[i]) if 0 < i < 6 else int(r[i]) for r in rows] for i, n in enumerate(_KLINES[:6])}
    if path.suffix in (".parquet", ".feather"):
        table = (pa.parquet if path.suffix == ".parquet" else pa.feather).read_table(path)
    else:
        data = path.read_bytes()
        if path.suffix == ".zip":
            archive = zipfile.ZipFile(path)
            data = archive.read(archive.namelist()[0])
        headless = data[:1].isdigit()
        options = pa.csv.ReadOptions(autogenerate_column_names=headless)
        table = pa.csv.read_csv(io.BytesIO(data.removeprefix(b"\xef\xbb\xbf")), read_options=options)
        if headless:
            table = table.select(range(min(table.num_columns, 8))).rename_columns(_KLINES[: min(table.num_columns, 8)])
    names = [_RENAMED.get(n.lower(), n.lower()) for n in table.column_names]
    columns = {n: table.column(i) for i, n in reversed(list(enumerate(names)))}
    if kind == "funding" and "time_ms" not in columns:
        columns["time_ms"] = columns["open_time_ms"]
        columns.setdefault("funding_rate", columns.get("open"))
    wanted = [n for n in (*SCHEMAS[kind].names, CLOSE_TIME, QUOTE_VOLUME) if n in columns]
    return {n: _to_array(columns[n], n) for n in wanted}


def _to_array(column, name):
    if name not in ("open_time_ms", "time_ms", CLOSE_TIME):
        return column.to_numpy().astype(float)
    if pa.types.is_timestamp(column.type):
        return column.to_numpy().astype("datetime64[ms]").astype(np.int64)
    if pa.types.is_string(column.type):
        texts = [re.sub(r"^(\d\d)-(\d\d)-(\d{4})", r"\3-\1-\2", x)[:19] for x in column.to_pylist()]
        return np.array(texts, "datetime64[ms]").astype(np.int64)
    stamps = column.to_numpy().astype(np.int64)
    return stamps * 1000 if stamps[0] < 10**11 else stamps // 1000 if stamps[0] > 10**14 else stamps
