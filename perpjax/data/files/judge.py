"""Candles, mark and funding of one symbol against each other, and against the usual sizes.

Each refusal names the number found, the usual number and the option that accepts it. The limits lie far from every
good file known. The tables themselves change only where `Judged.words` says so.
"""

import re
from decimal import Decimal
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax.data.contract import BAR_MS, PRICES, DataError
from perpjax.data.files.mend import HOUR_MS, Mended, aggregate_mark, length_words, utc
from perpjax.data.files.records import Choices
from perpjax.data.grid import FUNDING_REACH_MS

DAY_MS = 24 * HOUR_MS

MISSING = 0.05
"""Share of candles that may be missing."""
MARK_APART = 0.02
"""Median |mark / last - 1| from which the mark is that of another coin."""
MARK_COVER = 0.95
"""Share of the candles' span that the mark must cover."""
WICK = 0.5
"""Share of the price by which a bad print leaves it."""
LARGEST_MOVES = 10

_CONFIRMING_VOLUME = 5.0  # times the median around: a real crash trades more (20 and more on 2025-10-10)
_MOVED = 3  # candles that moved without volume; no good file has one
_TURNOVER = 1e12  # quote currency a day, median candle: no contract of the world comes near (BTCUSDT: 1e10)
_OPEN_FAR = 0.25  # median |open - last close| in median ranges; 0.11 in the worst good file, where prices are sampled
_SAME_RATE_DAYS = 30  # the base rate alone lasted 23 days in ORCAUSDT and BTCUSDT
_BASE_RATES = (1e-4, 5e-5, 2.5e-5, 1.25e-5)  # per settlement: 0.01 % per 8 h, and its share of 4, 2 and 1 h
_LARGEST_RATE = 0.05  # no venue caps a settlement higher than 4 %
_BIG_COINS = ("BTC", "ETH")
_BIG_COIN_MEDIAN = 0.003  # ten times the worst month of BTCUSDT; its cap is 0.3 %

PRICE_RANGES: dict[str, tuple[float, float]] = {
    "BTC": (3_000, 500_000),
    "ETH": (80, 30_000),
    "BNB": (4, 5_000),
    "SOL": (0.5, 2_000),
    "XRP": (0.1, 20),
    "ADA": (0.015, 20),
    "DOGE": (0.001, 5),
    "LTC": (20, 2_000),
    "BCH": (50, 6_000),
    "LINK": (0.5, 300),
    "AVAX": (2, 500),
    "DOT": (0.5, 200),
    "NEAR": (0.3, 100),
    "TRX": (0.005, 5),
}
"""Range of a coin's price in dollars, since its contract began."""

_DOLLARS = ("USDT", "USDC", "USD")
_LAGS_HOURS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


class Judged(NamedTuple):
    """The tables as the builder wants them."""

    candles: pa.Table
    mark: pa.Table | None
    funding: pa.Table | None
    words: tuple[str, ...]
    moves: tuple[tuple[int, float], ...]
    """The ten largest moves, largest first: open time (ms), and the move as a fraction of the close before."""
    has_volume: bool
    """Whether the volume is known; without it (`--no-volume`) every candle has volume 1 and counts as traded."""


class _Candles(NamedTuple):
    """Columns of the candles."""

    stamp: np.ndarray
    open: np.ndarray
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    volume: np.ndarray


def judge(candles: Mended, mark: Mended | None, funding: Mended | None, symbol: str | None, choices: Choices) -> Judged:
    """Check the tables of one symbol against each other, and cut them to their common span.

    Args:
      candles, mark, funding: from `mend`. Mark candles finer than the candles are aggregated.
      symbol: the venue's name of the contract, such as "BTCUSDT"; None skips the check of its price.
      choices: the refusals that the user accepts, and the unit of the rates.

    Returns:
      The tables, the changes in words, and the ten largest moves.

    Raises:
      DataError: the tables look wrong. The message names the number found, the usual number and the option.
    """
    words: list[str] = []
    marks = None if mark is None else _fit_mark(mark, candles, words)
    rates = None if funding is None else _convert_rates(funding, symbol, choices, words)
    candles, cut = _cut(candles, mark, marks, funding)
    words += cut
    candles = _drop_untraded_end(candles, words)
    candles, has_volume = _judge_volume(candles, symbol, choices, words)
    columns = _columns(candles)
    _judge_symbol(columns, candles, symbol, choices)
    _judge_shape(columns, candles, choices)
    _judge_gaps(columns, candles, choices)
    if mark is not None and marks is not None:
        _judge_mark(columns, candles, marks, mark.source, choices)
    _judge_jumps(columns, candles, marks, has_volume, choices)
    if funding is not None and rates is not None:
        _judge_funding(rates, funding, columns, choices)
    return Judged(candles.table, marks, rates, tuple(words), _find_moves(columns), has_volume)


def _columns(candles: Mended) -> _Candles:
    table = candles.table
    return _Candles(*(table[name].to_numpy() for name in ("open_time_ms", *PRICES, "volume")))


def _slice(candles: Mended, begin: int, end: int) -> Mended:
    fields = {name: getattr(candles, name) for name in ("quote_volume", "file_of", "rows")}
    return candles._replace(
        table=candles.table.slice(begin, end - begin),
        **{name: x if x is None else x[begin:end] for name, x in fields.items()},
    )


# Common span


def _fit_mark(mark: Mended, candles: Mended, words: list[str]) -> pa.Table:
    if mark.interval_ms >= candles.interval_ms:
        return mark.table
    if candles.interval_ms % mark.interval_ms:
        raise DataError(
            f"{mark.source}: row 1: mark candles of {length_words(mark.interval_ms)} do not divide the candles' "
            f"{length_words(candles.interval_ms)}; give mark candles of the candles' length, or coarser ones"
        )
    table = aggregate_mark(mark.table, candles.interval_ms)
    if table.num_rows == 0:
        raise DataError(
            f"{mark.source}: row 0: no candle of {length_words(candles.interval_ms)} is whole; give more mark candles"
        )
    words.append(f"mark candles of {length_words(mark.interval_ms)} aggregated to {length_words(candles.interval_ms)}")
    return table


def _cut(
    candles: Mended, mark: Mended | None, marks: pa.Table | None, funding: Mended | None
) -> tuple[Mended, list[str]]:
    """Cut the candles to the span of all files. Coarser mark candles and funding may miss 8 h at either end."""
    stamp = candles.table["open_time_ms"].to_numpy()
    begin, end = int(stamp[0]), int(stamp[-1]) + candles.interval_ms
    spans = []
    if mark is not None and marks is not None:
        length = max(mark.interval_ms, candles.interval_ms)
        times = marks["open_time_ms"]
        reach = FUNDING_REACH_MS if length > candles.interval_ms else 0
        spans.append((mark.source, int(times[0].as_py()), int(times[-1].as_py()) + length, reach))
    if funding is not None:
        times = funding.table["time_ms"].to_numpy() // BAR_MS * BAR_MS
        spans.append((funding.source, int(times[0]), int(times[-1]), FUNDING_REACH_MS))
    first, last = begin, end
    for source, start, stop, reach in spans:
        if start >= end + reach or stop <= begin - reach:
            raise DataError(
                f"{source}: row 0: has {utc(start)} .. {utc(stop)}, the candles {utc(begin)} .. {utc(end)}: no time in "
                "common; give files of the same dates"
            )
        if start > begin + reach:
            first = max(first, start)
        if stop < end - reach:
            last = min(last, stop)
    low, high = np.searchsorted(stamp, [first, last])
    if low >= high:
        raise DataError(f"{candles.source}: row 0: the files have no time in common; give files of the same dates")
    if (low, high) == (0, len(stamp)):
        return candles, []
    files = {1: "both files are", 2: "all three files are"}[len(spans)]
    return _slice(candles, int(low), int(high)), [
        f"cut to {utc(int(stamp[low]))} .. {utc(int(stamp[high - 1]))}, where {files}"
    ]


def _drop_untraded_end(candles: Mended, words: list[str]) -> Mended:
    volume = candles.table["volume"].to_numpy()
    traded = ~(volume == 0)  # an unknown volume is no reason
    if not traded.any():
        raise DataError(
            f"{candles.place(0)}: volume is 0 in all {len(volume)} rows: mark, index and premium klines have no "
            "volume; give the candles of the last price"
        )
    end = len(volume) - int(traded[::-1].argmax())
    if end == len(volume):
        return candles
    _, high, low, close = (candles.table[name].to_numpy() for name in PRICES)
    flat = (high[end:] == low[end:]) & (close[end:] == close[end - 1])
    if not flat.all():  # these moved: the rule for volume speaks of them
        return candles
    words.append(f"{len(volume) - end} candles at the end without a trade dropped")
    return _slice(candles, 0, end)


# Volume


def _judge_volume(candles: Mended, symbol: str | None, choices: Choices, words: list[str]) -> tuple[Mended, bool]:
    table = candles.table
    volume = table["volume"].to_numpy()
    known = ~np.isnan(volume)
    if not known.any():
        if not choices.no_volume:
            raise DataError(
                f"{candles.source}: row 0: there is no volume column, so untraded candles cannot be told; "
                "--no-volume takes every candle as traded, with the features without volume"
            )
        words.append("no volume: every candle counts as traded")
        return _with_volume(candles, np.ones(len(volume))), False
    columns = _columns(candles)
    adjacent = np.diff(columns.stamp, prepend=columns.stamp[0]) == candles.interval_ms
    moved = (columns.high > columns.low) | (adjacent & (np.diff(columns.close, prepend=columns.close[0]) != 0))
    zero = volume == 0
    unknown = ~known
    moving = zero & moved
    if moving.sum() >= _MOVED and moving.sum() > 0.01 * zero.sum():
        unknown = unknown | moving
    if unknown.any():
        if not choices.volume_unknown:
            i = int(unknown.argmax())
            raise DataError(
                f"{candles.place(i)}: {int(unknown.sum())} candles moved without volume (usually none does): volume = "
                f"{volume[i].item()!r}, low {columns.low[i]:g}, high {columns.high[i]:g}; their volume is unknown, "
                "not 0: --volume-unknown takes them as traded"
            )
        small = float(volume[volume > 0].min()) if (volume > 0).any() else 1.0
        volume = np.where(unknown, small, volume)
        words.append(f"{int(unknown.sum())} candles of unknown volume taken as traded, with volume {small:g}")
        candles = _with_volume(candles, volume)
    _judge_turnover(candles, columns._replace(volume=volume), symbol, choices, words)
    return candles, True


def _with_volume(candles: Mended, volume: np.ndarray) -> Mended:
    table = candles.table
    return candles._replace(table=table.set_column(table.schema.get_field_index("volume"), "volume", pa.array(volume)))


def _judge_turnover(candles: Mended, columns: _Candles, symbol: str | None, choices: Choices, words: list[str]) -> None:
    """Refuse a volume in quote currency or contracts where a second column or the size shows it."""
    volume, traded = columns.volume, columns.volume > 0
    if candles.quote_volume is not None:
        known = traded & (candles.quote_volume > 0)
        if known.sum() >= 10:
            price = candles.quote_volume[known] / volume[known]
            outside = (price < columns.low[known] * 0.99) | (price > columns.high[known] * 1.01)
            if outside.mean() > 0.5 and not choices.volume_unknown and choices.contract_size is None:
                i = int(np.flatnonzero(known)[outside.argmax()])
                ratio = float(np.median(price / columns.close[known]))
                raise DataError(
                    f"{candles.place(i)}: quote volume / volume = {price[outside.argmax()]:g}, usually between low "
                    f"{columns.low[i]:g} and high {columns.high[i]:g} ({outside.mean():.0%} of the candles are "
                    f"outside, by {ratio:.3g} times). The volume is turnover or contracts: name the base volume "
                    "(--columns volume=...), give --contract-size, or --volume-unknown"
                )
    daily = float(np.median(volume[traded] * columns.close[traded])) * DAY_MS / candles.interval_ms
    if daily > _TURNOVER:
        found = (
            f"volume x price is {daily:.1e} a day, over {_TURNOVER:.0e} (usually under 1e11): the volume looks like "
            "turnover in quote currency, not base currency"
        )
        if _is_known_swap(symbol) and not choices.volume_unknown:
            raise DataError(
                f"{candles.place(0)}: {found}; name the base volume (--columns volume=...), or --volume-unknown"
            )
        words.append(found)


# Symbol and shape


def _find_coin(symbol: str | None) -> str | None:
    name = re.sub(r"[^A-Z0-9]", "", re.sub(r"[-_.](SWAP|PERP|P)$", "", (symbol or "").upper()))
    for quote in ("", *_DOLLARS):
        if name.endswith(quote) and name.removesuffix(quote) in PRICE_RANGES:
            return name.removesuffix(quote)
    return None


def _is_known_swap(symbol: str | None) -> bool:
    return _find_coin(symbol) is not None and "USDT" in (symbol or "").upper()


def _judge_symbol(columns: _Candles, candles: Mended, symbol: str | None, choices: Choices) -> None:
    coin = _find_coin(symbol)
    if coin is None or choices.accept_symbol:
        return
    low, high = PRICE_RANGES[coin]
    median = float(np.median(columns.close))
    if not low <= median <= high:
        raise DataError(
            f"{candles.place(0)}: the median price {median:g} is not that of {symbol} (usually {low:g} .. {high:g}); "
            "give the right symbol, or --accept-symbol"
        )


def _judge_shape(columns: _Candles, candles: Mended, choices: Choices) -> None:
    """Refuse Heikin-Ashi candles, and candles whose opens do not follow the closes."""
    if choices.accept_candles or len(columns.stamp) < 20:
        return
    adjacent = np.diff(columns.stamp) == candles.interval_ms
    before = slice(0, -1)
    gap = np.abs(columns.open[1:] - columns.close[before])
    body = np.abs(columns.close - columns.open)[before]
    wide = adjacent & (body > 0) & (body >= np.quantile(body, 0.75))
    middle = (columns.open + columns.close)[before] / 2
    if wide.sum() >= 10:
        share = float(np.mean(np.abs(columns.open[1:] - middle)[wide] < 0.1 * body[wide]))
        if share > 0.8:
            i = int(wide.argmax()) + 1
            raise DataError(
                f"{candles.place(i)}: {share:.0%} of the wide candles open in the middle of the candle before (usually "
                "under 25 %): Heikin-Ashi candles are no prices; export plain candles, or --accept-candles"
            )
    if adjacent.sum() < 20:
        return
    usual = float(np.median(columns.high - columns.low))
    ratio = float(np.median(gap[adjacent])) / usual if usual > 0 else 0.0
    same = float(np.mean(gap[adjacent] == 0))
    if ratio > _OPEN_FAR and same < 0.05:
        i = int((adjacent & (gap >= np.median(gap[adjacent]))).argmax()) + 1
        raise DataError(
            f"{candles.place(i)}: candles open {ratio:.2f} ranges away from the last close, and {same:.0%} at it "
            "(usually under 0.2 ranges, and 40 %): index or sampled prices; give traded candles, or --accept-candles"
        )


def _judge_gaps(columns: _Candles, candles: Mended, choices: Choices) -> None:
    if choices.allow_gaps:
        return
    stamp, length = columns.stamp, candles.interval_ms
    steps = np.diff(stamp)
    slots = (int(stamp[-1]) - int(stamp[0])) // length + 1
    missing = slots - len(stamp)
    if not missing:
        return
    widest = int(steps.argmax())
    hole = int(steps[widest]) - length
    if missing <= MISSING * slots and hole <= DAY_MS:
        return
    place = f"{candles.place(widest + 1)}: the widest hole, {hole / HOUR_MS:.1f} h, ends here"
    weekends = _count_empty_weekends(stamp)
    if weekends:
        raise DataError(
            f"{place}; {weekends} weekend(s) have no candle, the other days do: a perpetual trades on weekends, a "
            "broker's file (often in broker time) does not; give the venue's candles, or --allow-gaps"
        )
    raise DataError(
        f"{place}; {missing} of {slots} candles are missing ({missing / slots:.1%}; usually under 5 %, and no hole "
        "over a day); download the rest, or --allow-gaps"
    )


def _count_empty_weekends(stamp: np.ndarray) -> int:
    """Return the number of whole Saturdays inside the span without candles, 0 if any Saturday has one."""
    days = np.unique(stamp // DAY_MS)
    span = np.arange(days[0] + 1, days[-1])
    saturday = span[(span + 3) % 7 == 5]  # 1970-01-01 was a Thursday, weekday 3
    if not len(saturday) or np.isin(saturday, days).any():
        return 0
    workdays = span[(span + 3) % 7 < 5]
    return len(saturday) if np.isin(workdays, days).mean() > 0.8 else 0


# Mark


def _judge_mark(columns: _Candles, candles: Mended, marks: pa.Table, source: str, choices: Choices) -> None:
    if choices.accept_mark:
        return
    times, opens = marks["open_time_ms"].to_numpy(), marks["open"].to_numpy()
    length = int(np.diff(times).min()) if len(times) > 1 else candles.interval_ms
    apart, pairs = _measure(times, opens, columns, 0)
    if pairs and apart > MARK_APART:
        i = int(np.searchsorted(times, columns.stamp[0]))
        i = min(i, len(times) - 1)
        raise DataError(
            f"{source}: {utc(int(times[i]))}: mark {opens[i]:g}: the median distance from the last price is "
            f"{apart:.1%} (usually under 0.1 %): the mark of another coin; give this coin's, or --accept-mark"
        )
    if pairs and apart == 0 and pairs > 20 and all(
        np.array_equal(marks[name].to_numpy()[np.isin(times, columns.stamp)],
                       getattr(columns, name)[np.isin(columns.stamp, times)]) for name in PRICES
    ):  # fmt: skip
        raise DataError(
            f"{source}: row 0: all {pairs} mark candles equal those of the last price (usually under half do): one "
            "series was given twice; give the last price's candles and the mark's, or --accept-mark"
        )
    _judge_lag(times, opens, columns, candles.interval_ms, length, source)
    inside = (times >= columns.stamp[0] // length * length) & (times <= columns.stamp[-1])
    first, last = (times[inside][[0, -1]]) if inside.any() else (0, 0)
    slots = (int(last) - int(first)) // length + 1
    cover = int(inside.sum()) / slots
    if cover < MARK_COVER:
        held = np.flatnonzero(inside)
        i = int(held[np.diff(times[held]).argmax() + 1])
        raise DataError(
            f"{source}: {utc(int(times[i]))}: the mark covers {cover:.1%} of the candles (usually 100 %, at least "
            f"95 %), the widest hole ends here; download the rest, or --accept-mark"
        )


def _measure(times: np.ndarray, opens: np.ndarray, columns: _Candles, lag: int) -> tuple[float, int]:
    """Return the median |mark / last - 1| with the mark's stamps moved by `lag` ms, and the number of pairs."""
    at = np.searchsorted(columns.stamp, times + lag)
    at = np.minimum(at, len(columns.stamp) - 1)
    pairs = columns.stamp[at] == times + lag
    if not pairs.any():
        return np.inf, 0
    return float(np.median(np.abs(opens[pairs] / columns.open[at[pairs]] - 1))), int(pairs.sum())


def _judge_lag(
    times: np.ndarray, opens: np.ndarray, columns: _Candles, interval: int, length: int, source: str
) -> None:
    here, pairs = _measure(times, opens, columns, 0)
    if pairs < 12 or here == 0:
        return
    lags = sorted({s * x for s in (-1, 1) for x in (interval, length, *(h * HOUR_MS for h in _LAGS_HOURS))}, key=abs)
    found = {lag: _measure(times, opens, columns, lag) for lag in lags}
    best = min((lag for lag in lags if found[lag][1] >= max(12, pairs // 2)), key=lambda x: found[x][0], default=0)
    if best and found[best][0] < here / 2:
        moved = length_words(abs(best))
        raise DataError(
            f"{source}: {utc(int(times[0]))}: the mark fits the last price better {moved} "
            f"{'later' if best > 0 else 'earlier'} (median distance {found[best][0]:.2g} instead of {here:.2g}; "
            "usually smallest without a shift). One of the two files has local time, or close times as open times: "
            "correct the stamps, or --accept-mark"
        )


# Jumps


def _judge_jumps(
    columns: _Candles, candles: Mended, marks: pa.Table | None, has_volume: bool, choices: Choices
) -> None:
    if choices.accept_jumps or len(columns.stamp) < 3:
        return
    before, after = columns.close[:-2], columns.open[2:]
    low_side, high_side = np.minimum(before, after), np.maximum(before, after)
    down = columns.low[1:-1] < (1 - WICK) * low_side
    up = columns.high[1:-1] > high_side / (1 - WICK)
    for i in np.flatnonzero(down | up) + 1:
        is_down = bool(down[i - 1])
        reference = float((low_side if is_down else high_side)[i - 1])
        print_ = float((columns.low if is_down else columns.high)[i])
        times = _around(columns.volume, int(i)) if has_volume else 0.0
        if times >= _CONFIRMING_VOLUME or _mark_confirms(marks, int(columns.stamp[i]), reference, print_):
            continue
        raise DataError(
            f"{candles.place(int(i))}: {'low' if is_down else 'high'} = {print_:g} beside {reference:g} is a bad print."
            f" The next candle takes it back, the volume is {times:.1f} times the usual (a real one has over "
            f"{_CONFIRMING_VOLUME:g}), and no mark candle confirms it; correct the row, or --accept-jumps"
        )
    step = np.log10(columns.open[1:] / columns.close[:-1])
    power = np.rint(step)
    for i in np.flatnonzero((power != 0) & (np.abs(step - power) < 0.05)) + 1:
        old, new = np.median(columns.close[max(0, i - 20) : i]), np.median(columns.close[i : i + 20])
        if abs(np.log10(new / old) - power[i - 1]) < 0.1:
            raise DataError(
                f"{candles.place(int(i))}: open = {columns.open[i]:g} after a close of {columns.close[i - 1]:g}, and "
                f"the price stays: a jump by 10^{power[i - 1]:g} is a redenomination (usually a candle opens within "
                "1 % of the last close); split the file there, or --accept-jumps"
            )


def _around(volume: np.ndarray, i: int) -> float:
    near = volume[max(0, i - 50) : i + 51]
    near = near[near > 0]
    return float(volume[i] / np.median(near)) if len(near) else 0.0


def _mark_confirms(marks: pa.Table | None, stamp: int, reference: float, print_: float) -> bool:
    """Return whether the mark candle of that time went half of the way or more."""
    if marks is None:
        return False
    times = marks["open_time_ms"].to_numpy()
    i = int(np.searchsorted(times, stamp, side="right")) - 1
    length = int(np.diff(times).min()) if len(times) > 1 else BAR_MS
    if i < 0 or stamp - times[i] >= length:
        return False
    half = (reference + print_) / 2
    return marks["low"][i].as_py() <= half if print_ < reference else marks["high"][i].as_py() >= half


def _find_moves(columns: _Candles) -> tuple[tuple[int, float], ...]:
    before = np.concatenate([columns.open[:1], columns.close[:-1]])
    up, down = columns.high / before - 1, columns.low / before - 1
    move = np.where(up >= -down, up, down)
    largest = np.argsort(-np.abs(move), kind="stable")[:LARGEST_MOVES]
    return tuple((int(columns.stamp[i]), float(move[i])) for i in largest)


# Funding


def _convert_rates(funding: Mended, symbol: str | None, choices: Choices, words: list[str]) -> pa.Table:
    table = funding.table
    rate = table["funding_rate"].to_numpy()
    if choices.rate_unit is None:
        _judge_unit(rate, funding, symbol)
    places = {"percent": 2, "bp": 4}.get(choices.rate_unit or "", 0)
    if places:
        distinct, inverse = np.unique(rate, return_inverse=True)
        rate = np.array([float(Decimal(repr(x)).scaleb(-places)) for x in distinct.tolist()])[inverse]
        words.append(f"rates divided by {10**places:_}".replace("_", " ") + f" (--rate-unit {choices.rate_unit})")
    if (np.abs(rate) >= 1).any():
        i = int((np.abs(rate) >= 1).argmax())
        raise DataError(f"{funding.place(i)}: funding_rate = {rate[i]:g} is not a fraction; give --rate-unit")
    return table.set_column(1, table.schema.field(1), pa.array(rate))


def _judge_unit(rate: np.ndarray, funding: Mended, symbol: str | None) -> None:
    size = np.abs(rate[rate != 0])
    if not len(size):
        return
    values, counts = np.unique(size, return_counts=True)
    most = float(values[counts.argmax()]) if counts.max() > 1 or len(size) < 3 else 0.0
    median, largest = float(np.median(size)), float(size.max())

    def is_base(scale: float) -> bool:
        return any(abs(most / scale - base) < 1e-6 * base for base in _BASE_RATES) and counts.max() >= 0.05 * len(size)

    coin = _find_coin(symbol)
    unit = None
    if median > 0.2 or is_base(1e4):
        unit = "bp"
    elif is_base(100) or largest > _LARGEST_RATE or (coin in _BIG_COINS and median > _BIG_COIN_MEDIAN):
        unit = "percent"
    elif len(values) >= 10 and median > 5e-4 and _is_on(size, 1e-6) and counts.max() < 0.5 * len(size):
        unit = "percent"  # percent of 6 decimals; fractions have 8 decimals and more
    if unit is None:
        return
    i = int(np.abs(rate).argmax())
    remedy = "divide percent by 100" if unit == "percent" else "divide basis points by 10 000"
    raise DataError(
        f"{funding.place(i)}: funding_rate = {rate[i].item()!r}: the median size is {median:g} and the largest "
        f"{largest:g}, usually 0.0001 and under 0.03: these are "
        f"{'percent' if unit == 'percent' else 'basis points'}: {remedy}, or give --rate-unit {unit} "
        "(--rate-unit fraction if they are right)"
    )


def _is_on(values: np.ndarray, step: float) -> bool:
    return bool((np.abs(values / step - np.rint(values / step)) < 1e-6).all())


def _judge_funding(rates: pa.Table, funding: Mended, columns: _Candles, choices: Choices) -> None:
    if choices.accept_funding:
        return
    time, rate = rates["time_ms"].to_numpy() // BAR_MS * BAR_MS, rates["funding_rate"].to_numpy()
    if len(time) < 3:
        return
    steps = np.diff(time)
    if (steps < HOUR_MS).any():
        i = int((steps < HOUR_MS).argmax()) + 1
        raise DataError(
            f"{funding.place(i)}: comes {length_words(int(steps[i - 1]))} after the settlement before (usually 8, 4 or "
            "1 h): keep one row a settlement, or --accept-funding"
        )
    _judge_repeats(time, rate, funding)
    _judge_hours(time, steps, funding)
    near = (time[1:] > columns.stamp[0] - FUNDING_REACH_MS) & (time[:-1] < columns.stamp[-1] + FUNDING_REACH_MS)
    padded = np.concatenate([[-1], steps, [-1]])
    left, right = padded[:-2], padded[2:]
    usual = np.where(left > 0, left, right)
    hole = near & (((steps >= 2 * left) & (left == right) & (left > 0)) | (steps > FUNDING_REACH_MS))
    if hole.any():
        i = int(hole.argmax())
        expected = min(int(usual[i]), FUNDING_REACH_MS)
        raise DataError(
            f"{funding.place(i + 1)}: comes {steps[i] / HOUR_MS:g} h after the settlement before (usually "
            f"{expected / HOUR_MS:g} h): the settlement at {utc(int(time[i]) + expected)} is missing; add it, or "
            "--accept-funding"
        )


def _judge_repeats(time: np.ndarray, rate: np.ndarray, funding: Mended) -> None:
    days = (int(time[-1]) - int(time[0])) / DAY_MS
    base = any(np.isclose(abs(rate[0]), x, rtol=1e-6) for x in _BASE_RATES) or rate[0] == 0
    if len(rate) > 20 and (rate == rate[0]).all() and (days > _SAME_RATE_DAYS or not base):
        raise DataError(
            f"{funding.place(0)}: the rate {rate[0]:g} is repeated on all {len(rate)} rows ({days:.0f} days; usually "
            "it changes within 23): one rate was copied to every row; download the history, or --accept-funding"
        )
    changes = time[1:][np.diff(rate) != 0]
    for hours in (8, 4):
        if len(changes) < 6 or np.median(np.diff(time)) > hours * HOUR_MS / 2:
            continue
        if (changes % (hours * HOUR_MS) == 0).all():
            raise DataError(
                f"{funding.place(1)}: a rate every {length_words(int(np.median(np.diff(time))))} that changes only "
                f"every {hours} h (all {len(changes)} times): the rate is repeated on every row; keep one row a "
                "settlement, or --accept-funding"
            )


def _judge_hours(time: np.ndarray, steps: np.ndarray, funding: Mended) -> None:
    """Refuse hours of local time: settlements of an interval happen at its multiples since midnight UTC."""
    lengths = np.minimum(np.concatenate([steps, steps[-1:]]), np.concatenate([steps[:1], steps]))
    known = np.isin(lengths, [h * HOUR_MS for h in (1, 2, 4, 8)])
    off = known & (time % np.where(known, lengths, 1) != 0)
    if funding.venue == "bitmex":
        off &= (time + 4 * HOUR_MS) % np.where(known, lengths, 1) != 0
    if off.mean() > 0.02 or (off.any() and len(time) < 50):
        i = int(off.argmax())
        hours = ", ".join(f"{h:g}" for h in np.unique(time[off] % DAY_MS / HOUR_MS)[:6])
        raise DataError(
            f"{funding.place(i)}: {int(off.sum())} settlements are at {hours} h, usually multiples of "
            f"{int(lengths[i]) / HOUR_MS:g} h UTC: local time; give the zone (--timezone), or --accept-funding"
        )
