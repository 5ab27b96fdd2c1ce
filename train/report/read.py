"""Read the files of an evaluation, described in docs/evaluation.md."""

import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from train.run_folder import clean

Json = dict[str, Any]

FORMAT = 1
EVALUATION = "evaluation.json"
FLOATS = (
    "entry_price", "exit_price", "quantity", "notional", "leverage", "margin", "stop", "target", "liquidation",
    "liquidation_at_exit", "gross", "slippage", "gap_losses", "fees", "funding", "forfeited", "forgiven", "net",
    "worst", "best", "first_move",
)  # fmt: skip
"""Columns of trades.parquet that hold numbers with a fraction."""
_COLUMNS = {
    "equity": ("account", "time", "symbol", "equity", "wallet", "lots", "notional"),
    "trades": ("id", "account", "symbol", "side", "entry_time", "exit_time", "reason", "bars", *FLOATS),
    "candles": ("account", "time", "open", "high", "low", "close"),
}


class Evaluation(NamedTuple):
    """The content of an evaluation folder."""

    folder: pathlib.Path
    record: Json
    equity: pa.Table
    trades: pa.Table
    candles: pa.Table

    @property
    def title(self) -> str:
        """Name of the run, or of the policy without one, and the split."""
        parts = (self.record.get(name) for name in ("policy", "data"))
        policy, data = (x if isinstance(x, dict) else {} for x in parts)
        name = str(policy.get("run") or policy.get("name") or self.folder.name)
        return f"{name}, {data['split']}" if data.get("split") else name


def read_evaluation(folder: pathlib.Path) -> Evaluation:
    """Return the four files of an evaluation folder.

    Raises:
      ValueError: a file is missing, damaged or of another format. The message names it.
    """
    record = _read_record(folder / EVALUATION)
    return Evaluation(folder, record, *(_read_table(folder / f"{n}.parquet", c) for n, c in _COLUMNS.items()))


def milliseconds(column: pa.ChunkedArray) -> np.ndarray:
    """Return times as float64 milliseconds, NaN where missing."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", column.type.tz), safe=False).cast(pa.int64())
    return floats(column)


def floats(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as float64, NaN where missing."""
    return column.cast(pa.float64(), safe=False).to_numpy()


def _read_record(path: pathlib.Path) -> Json:
    if not path.is_file():
        raise ValueError(f"{clean(path)}: missing; `perpjax evaluate` makes it")
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{clean(path)}: not JSON") from None
    if not isinstance(record, dict):
        raise ValueError(f"{clean(path)}: not a JSON object")
    if record.get("format") != FORMAT:
        found = clean(json.dumps(record.get("format")))[:40]
        raise ValueError(f"{clean(path)}: format is {found}; this version of perpjax reads format {FORMAT}")
    return record


def _read_table(path: pathlib.Path, columns: tuple[str, ...]) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"{clean(path)}: missing; `perpjax evaluate` makes it")
    try:
        table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{clean(path)}: damaged: {clean(error)[:100]}") from None
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(f"{clean(path)}: it has no column {missing[0]}")
    return table.select(columns)
