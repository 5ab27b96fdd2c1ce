"""The kind, columns, units and symbol of a table, in words. A guess that could change a number is refused."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from perpjax._describe import show
from perpjax.data.contract import PRICES, DataError
from perpjax.data.files.names import normalise_symbol
from perpjax.data.files.numbers import mend_float32, read_numbers
from perpjax.data.files.records import CLOSE_TIME, CLOSED, QUOTE_VOLUME, ROW, Choices, Kind, RawTable, Series
from perpjax.data.files.times import is_unix, read_stamps

_TIME = (
    "opentimems", "opentime", "klineopentime", "opentimestamp", "starttime", "start", "candlebegintime",
    "calctime", "fundingtime",
    "fundingratetimestamp", "tsevent", "timestampms", "unix", "unixtime", "ts", "timestamp", "time", "timems",
    "t", "datetime", "date",
    "timestamputc", "dateutc", "gmttime", "localtime", "zeit", "datumzeit", "datum", "ticks", "indexlevel0", "index",
    "unnamed0", "",
)  # fmt: skip
_PRICES = {
    "open": ("open", "o", "openprice", "eröffnung", "eroeffnung"),
    "high": ("high", "h", "highprice", "max", "hoch"),
    "low": ("low", "l", "lowprice", "min", "tief"),
    "close": ("close", "c", "closeprice", "schluss", "schlusskurs", "last"),
}
_BASE = (
    "volccy",
    "volumebase",
    "basevolume",
    "volumebaseasset",
    "volume",
    "volumen",
    "vol",
    "v",
    "amount",
)
_TICKS = ("tickvolume", "tickvol")
"""Counts of changes of the price: no volume."""
_QUOTE = (
    "volccyquote", "volumequote", "quotevolume", "quoteassetvolume", "quotevol", "turnover", "volumequoteasset",
    "q", "usdtvolume",
)  # fmt: skip
_CONTRACTS = ("volumecontracts", "contracts", "volcontracts", "size")
_CLOSE_TIMES = ("closetime", "klineclosetime", "closetimems", "closetimestamp", "endtime")
_COUNTS = ("count", "n", "trades", "tradecount", "numberoftrades")
_SYMBOLS = ("symbol", "instid", "instrument", "instrumentname", "pair", "ticker", "contract", "contracts")
_COINS = ("coin", "asset")
_CLOSED = ("confirm", "closed", "isclosed", "isfinal")
_RATES = (
    "lastfundingrate", "relativefundingrate", "realizedrate", "fundingrate", "r", "rate",
    "fundingratevalue", "funding", "settledrate", "interest1h",
)  # fmt: skip
_BINANCE = (
    "open_time", "open", "high", "low", "close", "volume", "close_time", "quote_volume", "count", "taker_buy_volume",
    "taker_buy_quote_volume", "ignore",
)  # fmt: skip
_ORDERS = {
    "okx": ("time", "open", "high", "low", "close", "contracts", "base", "quote", "closed"),
    "bybit": ("time", "open", "high", "low", "close", "base", "quote"),
    "bitget": ("time", "open", "high", "low", "close", "base", "quote"),
    "gateio": ("time", "quote", "close", "high", "low", "open", "base", "closed"),
    "": ("time", "open", "high", "low", "close", "base"),
}


class Columns(NamedTuple):
    """Names of the columns of a table by their meaning; None where there is none."""

    time: str
    open: str | None = None
    high: str | None = None
    low: str | None = None
    close: str | None = None
    base: str | None = None
    quote: str | None = None
    contracts: str | None = None
    close_time: str | None = None
    closed: str | None = None
    rate: str | None = None
    count: str | None = None


def recognise(raw: RawTable, choices: Choices = Choices()) -> Series:  # noqa: B008
    """Return the series of a table.

    Raises:
      DataError: the kind, a column, a unit or a zone is not clear, or a value is wrong. The message names the option
        that settles it.
    """
    try:
        return _recognise(raw, choices)
    except DataError as error:  # names and values of the file may hold anything
        raise DataError(show(error)) from None


def _recognise(raw: RawTable, choices: Choices) -> Series:
    hints = raw.hints
    kind_hint = hints.get("kind", "")
    if kind_hint in ("premium", "index"):
        raise DataError(
            f"{raw.source}: holds candles of the {kind_hint} price, at which nobody trades; give the last price"
        )
    if not choices.columns:
        raw = _join_clock(raw)
    columns = _by_hand(raw, choices.columns) if choices.columns else _find_columns(raw)
    kind = _find_kind(raw, columns, kind_hint)
    taken = list(raw.notes)
    symbol = _find_symbol(raw)
    venue = hints.get("venue", "").lower() or None
    stamps = read_stamps(raw.table[columns.time], raw.source, columns.time, choices.timezone, _known_utc(raw, columns))
    taken.append(f"time: {_name(columns.time, raw)}, {stamps.words}")
    if _key(columns.time) in _CLOSE_TIMES:
        stamps = stamps._replace(ms=_open_times(stamps.ms, raw.source, columns.time, taken))
    rows = {ROW: pa.array(np.arange(raw.table.num_rows))}
    if kind == "funding":
        rate = columns.rate or columns.open
        values = read_numbers(raw.table[rate], raw.source, rate, comma=_uses_comma(raw))
        settled = _key(rate) == "realizedrate" and any(_key(name) == "fundingrate" for name in raw.table.column_names)
        taken.append(f"rate: {_name(rate, raw)}" + (", the settled one beside the funding rate" if settled else ""))
        _refuse_missing(values, raw.source, rate)
        used = {columns.time, rate}
        data = {"time_ms": pa.array(stamps.ms), "funding_rate": pa.array(values)}
    else:
        data, used = _read_candles(raw, columns, kind, stamps.ms, choices, taken)
    if kind_hint == "spot":
        taken.append("spot market, not a perpetual")
    ignored = raw.table.num_columns - len(used & set(raw.table.column_names))
    if ignored:
        taken.append(f"{ignored} other column{'s' if ignored > 1 else ''} ignored")
    return Series(kind, symbol, venue, raw.source, pa.table(data | rows), tuple(map(show, taken)))


def _find_columns(raw: RawTable) -> Columns:
    if not raw.has_header:
        return _find_positions(raw)
    keys: dict[str, str] = {}
    for name in raw.table.column_names:
        keys.setdefault(_key(name), name)
    if {"t", "T"} <= set(raw.table.column_names):  # Hyperliquid: open and close time
        keys |= {"t": "t", "closetime": "T"}

    def find(known: tuple[str, ...]) -> str | None:
        return next((keys[key] for key in known if key in keys), None)

    symbol = _key(_find_symbol(raw) or "")
    base, quote, contracts = find(_BASE), find(_QUOTE), find(_CONTRACTS)
    for key, name in keys.items():  # CryptoDataDownload: "Volume BTC", "Volume USDT"
        asset = key.removeprefix("volume")
        if asset != key and asset and symbol.startswith(asset):
            base = name
        elif asset != key and asset in ("usdt", "usdc", "usd", "busd"):
            quote = name
        elif (
            asset != key
            and re.fullmatch("[a-z]{2,8}", asset)
            and f"volume{asset}" not in (*_BASE, *_QUOTE)
            and any(f"volume{unit}" in keys for unit in ("usdt", "usdc", "usd", "busd"))
        ):
            base = base or name
    if "vol" in keys and ("volccy" in keys or _is_okx(raw)):  # OKX counts contracts, and the base currency as volCcy
        base, contracts = keys.get("volccy"), keys["vol"]
    if "sum" in keys and "v" in keys:  # Gate counts contracts, and their turnover as sum
        base, contracts, quote = None, keys["v"], keys["sum"]
    if raw.hints.get("venue") == "ftx" and base is not None and quote is None:  # FTX published turnover alone
        base, quote = None, base
    prices = {name: find(known) for name, known in _PRICES.items()}
    times = [keys[key] for key in _TIME if key in keys and keys[key] not in prices.values()]
    times = times or [name for name in [find(_CLOSE_TIMES)] if name is not None]
    if not times:
        raise DataError(
            f"{raw.source}: no column of times among {_list(raw)}; name it with --columns time=...,open=...,high=...,"
            "low=...,close=...,volume=..."
        )
    # A unix column needs no zone; among the others the first known name counts.
    time = next((name for name in times if is_unix(raw.table[name])), times[0])
    return Columns(
        time, **prices, base=base, quote=quote, contracts=contracts, close_time=find(_CLOSE_TIMES),
        closed=find(_CLOSED), rate=find(_RATES), count=find(_COUNTS),
    )  # fmt: skip


def _find_positions(raw: RawTable) -> Columns:
    """Columns of a table without a header: by the venue's order, checked against the prices."""
    width, venue = raw.table.num_columns, "okx" if _is_okx(raw) else raw.hints.get("venue", "").lower()
    if width == 12 or (width == 11 and venue == "binance"):
        names = {name: str(i) for i, name in enumerate(_BINANCE)}
        beside = {
            what: names[name] for what, name in (("base", "volume"), ("quote", "quote_volume"), ("count", "count"))
        }
        return Columns("0", "1", "2", "3", "4", close_time=names["close_time"], **beside)
    is_funding = width == 6 and all(_is_zero(raw, str(i)) for i in (2, 3, 4))
    if is_funding or (raw.hints.get("kind") == "funding" and width <= 6):
        return Columns("0", rate="1")
    if width < 5:
        raise DataError(
            f"{raw.source}: {width} columns without names; name them with --columns time=0,open=1,high=2,low=3,close=4,"
            "volume=5"
        )
    fitting = []
    for name, order in _ORDERS.items():
        if venue in (name, "") or name in ("", venue):
            places = {what: str(i) for i, what in enumerate(order) if i < width}
            if name == "okx" and width == 6:  # as ccxt gives it, with the base currency
                continue
            if name == "gateio" and width == 6:  # a dump of Gate, with contracts
                places["contracts"] = places.pop("quote")
            if all(p in places for p in PRICES) and _fits(raw, places):
                fitting.append((name, places))
    distinct = {tuple(places[p] for p in PRICES) for _, places in fitting}
    if len(distinct) != 1:
        why = "no known order of open, high, low and close fits" if not distinct else "several orders of the prices fit"
        raise DataError(
            f"{raw.source}: {why} the {width} columns without names; name them with --columns "
            "time=0,open=1,high=2,low=3,close=4,volume=5"
        )
    named = [one for one in fitting if one[0] == venue and venue]
    named = named or [one for one in fitting if len(_ORDERS[one[0]]) == width] or [one for one in fitting if not one[0]]
    places = (named or fitting)[0][1]
    if not venue and width == 7 and not _is_turnover(raw, places):
        places.pop("quote", None)
    return Columns(
        "0", *(places[p] for p in PRICES), base=places.get("base"), quote=places.get("quote"),
        contracts=places.get("contracts"), closed=places.get("closed"),
    )  # fmt: skip


def _is_okx(raw: RawTable) -> bool:
    return raw.hints.get("venue", "").lower() == "okx" or "-SWAP" in raw.hints.get("symbol", "")


def _is_turnover(raw: RawTable, places: Mapping[str, str]) -> bool:
    """Whether the quote volume is the base volume times a price: a count of trades may stand there instead."""
    try:
        base, quote, close = (
            read_numbers(raw.table[places[what]], raw.source, what, comma=_uses_comma(raw))
            for what in ("base", "quote", "close")
        )
    except (DataError, KeyError):
        return False
    traded = base > 0
    return bool(traded.any() and abs(np.median(quote[traded] / base[traded] / close[traded]) - 1) < 0.1)


def _is_zero(raw: RawTable, name: str) -> bool:
    try:
        return not read_numbers(raw.table[name], raw.source, name, comma=_uses_comma(raw)).any()
    except DataError:
        return False


def _fits(raw: RawTable, places: Mapping[str, str]) -> bool:
    try:
        o, h, l, c = (read_numbers(raw.table[places[p]], raw.source, p, comma=_uses_comma(raw)) for p in PRICES)  # noqa: E741
    except DataError:
        return False
    return bool(((h >= np.maximum(o, c)) & (l <= np.minimum(o, c)) & (l > 0)).all())


def _by_hand(raw: RawTable, text: str) -> Columns:
    """The columns that the user has named."""
    given = {}
    for part in text.split(","):
        what, equals, name = part.partition("=")
        what = {"volume": "base", "quote_volume": "quote"}.get(what.strip(), what.strip())
        if not equals or what not in Columns._fields:
            raise DataError(f"--columns {part!r} is not one of time=, open=, high=, low=, close=, volume=, rate=")
        if name.strip() not in raw.table.column_names:
            raise DataError(f"{raw.source}: --columns: no column {name.strip()!r} among {_list(raw)}")
        given[what] = name.strip()
    if "time" not in given:
        raise DataError("--columns names no time; give time=NAME")
    return Columns(**given)


def _find_kind(raw: RawTable, columns: Columns, hint: str) -> Kind:
    has_prices = all(getattr(columns, p) is not None for p in PRICES)
    if columns.rate is not None and not has_prices:
        return "funding"
    if hint == "funding" and (columns.rate or columns.open):
        return "funding"
    if not has_prices:
        missing = next(p for p in PRICES if getattr(columns, p) is None)
        raise DataError(
            f"{raw.source}: no column {missing!r} among {_list(raw)}, and no funding rate; name the columns with "
            "--columns time=...,open=...,high=...,low=...,close=...,volume=..., or time=...,rate=..."
        )
    if all(_is_zero(raw, name) for name in (columns.high, columns.low, columns.close)):
        return "funding"  # freqtrade's form: the rate stands in `open`
    beside = [name for name in (columns.base, columns.quote) if name is not None]
    if columns.count is not None and beside and all(_is_zero(raw, name) for name in beside):
        return "candles" if _is_zero(raw, columns.count) else "mark"  # Binance counts the prices of a mark candle
    if columns.base is not None and raw.table[columns.base].null_count == raw.table.num_rows and not columns.quote:
        return "mark"
    return "mark" if hint == "mark" else "candles"


def _read_candles(
    raw: RawTable, columns: Columns, kind: Kind, ms: np.ndarray, choices: Choices, taken: list[str]
) -> tuple[dict[str, pa.Array], set[str]]:
    comma = _uses_comma(raw)

    def numbers(name: str) -> np.ndarray:
        return read_numbers(raw.table[name], raw.source, name, comma=comma)

    prices = {p: numbers(getattr(columns, p)) for p in PRICES}
    for p, values in prices.items():
        _refuse_missing(values, raw.source, p)
    if comma:
        taken.append("decimal commas")
    prices, changed = mend_float32(prices)
    if changed or any(pa.types.is_float32(raw.table[getattr(columns, p)].type) for p in PRICES):
        taken.append("float32 prices rounded to the nearest decimal")
    used = {columns.time, *(getattr(columns, p) for p in PRICES)}
    data: dict[str, pa.Array] = {"open_time_ms": pa.array(ms), **{p: pa.array(x) for p, x in prices.items()}}
    if kind == "candles":
        data["volume"] = pa.array(
            _read_volume(raw, columns, choices, numbers, taken, used), pa.float64(), from_pandas=True
        )
    if columns.close_time is not None and columns.close_time != columns.time:
        close = read_stamps(raw.table[columns.close_time], raw.source, columns.close_time, choices.timezone, "beside")
        data[CLOSE_TIME] = pa.array(close.ms)
        used.add(columns.close_time)
    if columns.quote is not None and kind == "candles":
        quote = numbers(columns.quote)
        if np.isfinite(quote).any():
            data[QUOTE_VOLUME] = pa.array(quote)
            used.add(columns.quote)
    if columns.closed is not None:
        flags = raw.table[columns.closed].cast(pa.string()).to_numpy()
        data[CLOSED] = pa.array([str(x).lower() in ("1", "1.0", "true") for x in flags])
        used.add(columns.closed)
    elif raw.hints.get("exporter") == "tradingview":
        data[CLOSED] = pa.array(np.arange(len(ms)) != np.argmax(ms))
        taken.append("exported by TradingView, whose last candle is unfinished")
    return data, used


def _read_volume(
    raw: RawTable, columns: Columns, choices: Choices, numbers: object, taken: list[str], used: set[str]
) -> np.ndarray:
    if columns.base is not None and columns.base != columns.contracts:
        used.add(columns.base)
        values = numbers(columns.base)
        if np.isfinite(values).any():
            taken.append(f"volume: {_name(columns.base, raw)}, base currency")
            return values
    if columns.contracts is not None:
        used.add(columns.contracts)
        if choices.contract_size is None:
            raise DataError(
                f"{raw.source}: its volume ({_name(columns.contracts, raw)}) is in contracts; give the base currency "
                "of one contract with --contract-size, such as 0.01"
            )
        taken.append(f"volume: {_name(columns.contracts, raw)}, contracts of {choices.contract_size:g}")
        return numbers(columns.contracts) * choices.contract_size
    ticks = [name for name in raw.table.column_names if _key(name) in _TICKS]
    if ticks:
        taken.append(f"volume: none; {_name(ticks[0], raw)} counts changes of the price")
    elif columns.quote is not None:
        taken.append(f"volume: none; {_name(columns.quote, raw)} is in quote currency")
    return np.full(raw.table.num_rows, np.nan)


def _find_symbol(raw: RawTable) -> str | None:
    """The symbol of a column, a wrapper or the name of the file."""
    found, is_coin = None, raw.hints.get("json_symbol") == raw.hints.get("symbol")
    for name in raw.table.column_names:
        column = raw.table[name]
        if _key(name) not in (*_SYMBOLS, *_COINS):
            continue
        if pa.types.is_dictionary(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.string())
        if pa.types.is_string(column.type):
            values = column.unique().to_pylist()
            if len(values) == 1 and re.search("[A-Za-z]", str(values[0])):
                is_coin = _key(name) in _COINS
                found = re.sub(r"(?i)[ _-]*perpetual$", "", str(values[0]).strip())
            elif len(values) > 1 and re.search("[A-Za-z]{2}", str(values[0])):
                shown = ", ".join(map(str, values[:3]))
                raise DataError(
                    f"{raw.source}: {name} holds several symbols ({shown}, ...); split it into a file for each"
                )
    text = found or raw.hints.get("symbol")
    if text is None:
        return None
    symbol = normalise_symbol(text, raw.source, is_inverse=raw.hints.get("category") == "inverse")
    return f"{symbol}USD" if is_coin and not re.search("USD", symbol) else symbol


def _known_utc(raw: RawTable, columns: Columns) -> str | None:
    if raw.hints.get("exporter") == "cryptodatadownload":
        return "CryptoDataDownload writes UTC"
    if re.search("utc$|gmt$|^utc|^gmt", _key(columns.time)):
        return "as its name says"
    name = columns.close_time
    if name is not None and name != columns.time and is_unix(raw.table[name]):
        # Text and unix times are in one zone if each candle closes one length after its open.
        opens = read_stamps(raw.table[columns.time], raw.source, columns.time, None, "not yet known").ms
        lengths = np.unique(read_stamps(raw.table[name], raw.source, name, None, None).ms - opens)
        steps, counts = np.unique(np.abs(np.diff(opens)), return_counts=True)
        if len(lengths) == 1 and len(steps) and steps[counts.argmax()] in (lengths[0], lengths[0] + 1):
            return f"as column {name} beside it shows"
    return None


def _open_times(ms: np.ndarray, source: str, name: str, taken: list[str]) -> np.ndarray:
    """The open times of candles of which only the close times are given."""
    steps, counts = np.unique(np.abs(np.diff(ms)), return_counts=True)
    steps, counts = steps[steps > 0], counts[steps > 0]
    if len(steps) == 0:
        raise DataError(
            f"{source}: row 0: {name} = {ms[0]} is a close time, and one stamp does not show the length of the candle; "
            "give more rows, or a column of open times"
        )
    step = int(steps[counts.argmax()])
    taken.append(f"close times, less {step / 60_000:g} minutes")
    return ms - step + (ms % 1000 == 999)


def _join_clock(raw: RawTable) -> RawTable:
    """Join a column of days and one of clocks, as MetaTrader and spreadsheets write them."""
    keys = {_key(name): name for name in reversed(raw.table.column_names)} if raw.has_header else {}
    for day, clock in (("date", "time"), ("datum", "zeit")):
        columns = [raw.table[keys[key]] for key in (day, clock) if key in keys]
        if len(columns) < 2 or not all(pa.types.is_string(column.type) for column in columns):
            continue
        days, clocks = (pc.utf8_trim_whitespace(column) for column in columns)
        is_clock = pc.all(pc.match_substring_regex(clocks, r"^\d{1,2}:\d{2}")).as_py()
        if is_clock and not pc.any(pc.match_substring(days, ":")).as_py():
            joined = pc.binary_join_element_wise(days, clocks, " ")
            table = raw.table.drop_columns([keys[clock]])
            index = table.column_names.index(keys[day])
            name = f"{keys[day]} {keys[clock]}"
            return raw._replace(table=table.set_column(index, name, joined))
    return raw


def _refuse_missing(values: np.ndarray, source: str, name: str) -> None:
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise DataError(f"{source}: row {row}: {name} is empty or no number; drop the row: a missing row is a gap")


def _uses_comma(raw: RawTable) -> bool:
    if raw.hints.get("separator") not in (";", "\t"):
        return False
    return any(
        "," in (value or "")
        for name in raw.table.column_names[1:6]
        for value in raw.table[name].slice(0, 50).to_pylist()
    )


def _name(column: str, raw: RawTable) -> str:
    if not raw.has_header and column.isdecimal():
        return f"column {int(column) + 1}"
    return f"column {column}" if column else "the column without a name"


def _list(raw: RawTable) -> str:
    names = raw.table.column_names
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _key(name: str) -> str:
    return re.sub(r"[\s_\-./()%<>:]+", "", name).lower()
