"""The records that pass between the steps, and the options of the user."""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import pyarrow as pa

Kind = Literal["candles", "mark", "funding"]

CLOSED, CLOSE_TIME, QUOTE_VOLUME = "closed", "close_time_ms", "quote_volume"
"""Columns that a candle series may have beside the contract's: bool, int64 ms, float64 quote currency."""
ROW = "row"
"""Column of every series: int64, the 0-based data row of its file, for messages."""


class RawTable(NamedTuple):
    """One table as it is in a file: nothing is renamed, converted or dropped."""

    source: str
    """Name for messages: the path, and "path!member" inside an archive. Already escaped for a terminal."""
    table: pa.Table
    """Columns as read: text, numbers or timestamps. Without a header they are named "0", "1", ..."""
    has_header: bool
    hints: Mapping[str, str]
    """Facts beside the table: "symbol", "interval", "venue", "kind" from a wrapper, a schema's metadata or the path."""
    notes: tuple[str, ...]
    """Parts of the file that were passed over, such as "line 1, a URL, skipped"."""


class Series(NamedTuple):
    """A table with the contract's columns, not yet sorted or checked."""

    kind: Kind
    symbol: str | None
    """As the file or its name says, such as "BTCUSDT"; None if it does not."""
    venue: str | None
    """Lower case, such as "binance", "bybit", "okx"; None if unknown."""
    source: str
    table: pa.Table
    """The columns of CANDLES, MARK or FUNDING with their types, ROW, and any of CLOSED, CLOSE_TIME, QUOTE_VOLUME.
    Without any volume column, `volume` is all null."""
    taken: tuple[str, ...]
    """The choices made, such as "time: column ts, seconds, UTC"."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """The guesses that the user has made or accepts. Each refusal names the option that accepts it."""

    columns: str | None = None
    """Columns by hand: time=ts,open=o,high=h,low=l,close=c,volume=v, or time=t,rate=r for funding."""
    timezone: str | None = None
    """Zone of text stamps without one, such as UTC or Europe/Berlin."""
    keep: Literal["first", "last"] | None = None
    """Of two rows with one stamp and different numbers, the one to keep."""
    allow_gaps: bool = False
    """Accept more than 5 % of candles missing, or a hole over a day; no episode starts in or spans one."""
    accept_jumps: bool = False
    """Accept bad prints and jumps by a power of ten."""
    volume_unknown: bool = False
    """Treat candles that moved without volume as traded: their volume is unknown."""
    no_volume: bool = False
    """Accept candles without a volume column; the features are those without volume."""
    contract_size: float | None = None
    """Base currency of one contract, where the volume is in contracts."""
    rate_unit: Literal["fraction", "percent", "bp"] | None = None
    """Unit of funding rates of an unusual size."""
    accept_funding: bool = False
    """Accept funding with missing settlements, odd hours or one rate repeated."""
    accept_mark: bool = False
    """Accept a mark series that is far from the last price, shifted, or covers under 95 %."""
    accept_candles: bool = False
    """Accept candles with opens that do not fit the closes before (Heikin-Ashi, index or sampled prices)."""
    accept_symbol: bool = False
    """Accept prices that do not fit the symbol."""
