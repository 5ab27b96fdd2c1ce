"""Tables to host arrays on the strict grid: candles, ticks, bars, mark and funding, all in numpy float64.

No array is on a device. N is the number of whole 15-minute bars, K the candles of a bar. Row k of bar t
opens at `start_ms + t * 900_000 + k * interval_ms`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax.data.contract import BAR_MS, CANDLES, PRICES, DataError, settlement_opens
from perpjax.instrument import EXACT

FUNDING_REACH_MS = 8 * 3_600_000
"""The longest time between settlements, and from either end of the funding file to the end of the candles."""

_ON_TICK = 1e-6  # ticks: a larger distance means another grid, a smaller one the decimal rounding of the file
_MIN_EVIDENCE = 64  # distinct prices: a grid of twice the true tick fits them by chance once in 2^64
_COARSEST = 0.01  # of the median price


class Grid(NamedTuple):
    """Candles of N whole bars. Prices in quote currency."""

    start_ms: int
    interval_ms: int
    prices: np.ndarray
    """[N, K, 4] open, high, low, close. All four are the last valid close where `valid` is False."""
    volume: np.ndarray
    """[N, K] base currency."""
    valid: np.ndarray
    """[N, K] bool: the candle exists and its volume is positive."""
    gaps: tuple[tuple[int, int], ...]
    """Open time (ms) of the first missing candle, and the number of missing candles in a row."""
    notes: tuple[str, ...]
    """Rows dropped at either end."""

    @property
    def end_ms(self) -> int:
        """Return the close time of the last bar, ms."""
        return self.start_ms + BAR_MS * len(self.valid)

    @property
    def opens(self) -> np.ndarray:
        """Return the open time of every bar, [N], ms."""
        return self.start_ms + BAR_MS * np.arange(len(self.valid))


def lay_candles(candles: pa.Table, interval_ms: int, source: str = "candles") -> Grid:
    """Put validated candles on the grid.

    Rows before the first traded candle are dropped, and then the rows at either end that do not fill a bar.

    Raises:
      DataError: nothing traded, there is no whole bar, or the span has more than ten times as many candles as rows.
    """
    stamps, volume = candles["open_time_ms"].to_numpy(), candles["volume"].to_numpy()
    traded = volume > 0
    if not traded.any():
        raise DataError(f"{source}: row 0 .. {len(stamps) - 1}: volume = 0.0 everywhere; nothing ever traded")
    first = int(traded.argmax())
    start = -(-int(stamps[first]) // BAR_MS) * BAR_MS
    end = (int(stamps[-1]) + interval_ms) // BAR_MS * BAR_MS
    slots = (end - start) // interval_ms
    if slots <= 0:
        raise DataError(
            f"{source}: row {first} .. {len(stamps) - 1}: open_time_ms = {stamps[first]} .. {stamps[-1]} do not "
            f"fill one 15-minute bar; give more candles"
        )
    if slots > 10 * len(stamps):
        row = int(np.diff(stamps).argmax()) + 1
        raise DataError(
            f"{source}: row {row}: open_time_ms = {stamps[row]} comes {stamps[row] - stamps[row - 1]} ms after the "
            f"row before: {len(stamps)} rows would have to span {slots} candles; correct the stamp or split the file"
        )
    low, high = np.searchsorted(stamps, [start, end])
    slot = (stamps[low:high] - start) // interval_ms
    on_grid = np.zeros(slots)
    on_grid[slot] = volume[low:high]
    valid = on_grid > 0
    prices = np.empty((slots, 4))
    for i, name in enumerate(PRICES):
        prices[slot, i] = candles[name].to_numpy()[low:high]
    # A bar may begin with an invalid candle only after a valid one. That one may be among the dropped rows.
    seen = traded[:low].nonzero()[0]
    before = candles["close"][int(seen[-1])].as_py() if len(seen) else np.nan
    last_valid = np.maximum.accumulate(np.where(valid, np.arange(slots), -1))
    last_close = np.where(last_valid >= 0, prices[last_valid, 3], before)
    prices[~valid] = last_close[~valid, None]
    k = BAR_MS // interval_ms
    return Grid(
        start_ms=start,
        interval_ms=interval_ms,
        prices=prices.reshape(-1, k, 4),
        volume=on_grid.reshape(-1, k),
        valid=valid.reshape(-1, k),
        gaps=_find_gaps(slot, slots, start, interval_ms),
        notes=_cut_notes(first, int(low) - first, len(stamps) - int(high)),
    )


def _find_gaps(slot: np.ndarray, slots: int, start: int, interval_ms: int) -> tuple[tuple[int, int], ...]:
    edges = np.concatenate([[-1], slot, [slots]])
    holes = np.diff(edges) - 1
    return tuple((start + interval_ms * (int(edges[i]) + 1), int(holes[i])) for i in holes.nonzero()[0])


def _cut_notes(untraded: int, leading: int, trailing: int) -> tuple[str, ...]:
    words = (
        (untraded, "before the first trade dropped"),
        (leading, "at the start that do not fill a 15-minute bar cut"),
        (trailing, "at the end that do not fill a 15-minute bar cut"),
    )
    return tuple(f"{count} candle(s) {what}" for count, what in words if count)


def make_bars(grid: Grid) -> pa.Table:
    """Return the 15-minute bars [N] of the valid candles. A bar without any repeats the last close, with volume 0."""
    valid, prices, bar = grid.valid, grid.prices, np.arange(len(grid.valid))
    first = valid.argmax(axis=1)
    close, empty = prices[:, -1, 3], ~valid.any(axis=1)  # an invalid candle repeats the last valid close
    high = np.where(valid, prices[..., 1], -np.inf).max(axis=1)
    low = np.where(valid, prices[..., 2], np.inf).min(axis=1)
    columns = {
        "open": prices[bar, first, 0],
        "high": np.where(empty, close, high),
        "low": np.where(empty, close, low),
        "close": close,
        "volume": grid.volume.sum(axis=1),
    }
    return pa.table({"open_time_ms": grid.opens, **columns})


def append_next_bar(bars: pa.Table) -> pa.Table:
    """Append the bar about to open to the bars: flat at the last close with volume 0, like an empty bar.

    A feature function returns one row a bar, from the bars before. The row of the appended bar uses all of `bars`.
    """
    last = {name: bars[name][-1].as_py() for name in ("open_time_ms", "close")}
    following = {name: [last["close"]] for name in ("open", "high", "low", "close")}
    following |= {"open_time_ms": [last["open_time_ms"] + BAR_MS], "volume": [0.0]}
    return pa.concat_tables([bars.select(CANDLES.names), pa.table(following, schema=CANDLES)])


def infer_tick(candles: pa.Table, source: str = "candles") -> tuple[float, int]:
    """Return the price grid of validated candles, and the number of distinct prices.

    The tick is the coarsest power of ten, at most 1 % of the median price, of which every price is a multiple. It may
    also be 25, 5 or 2 times that power (Bybit's 0.5, for example), unless ten times the power fits all prices too.
    Real ticks are nearly always powers of ten, so a multiple needs 64 distinct prices: n prices are all even by
    chance with probability 2^-n. With fewer prices the power of ten is taken. Every price lies on this finer grid too.

    Raises:
      DataError: no grid with fewer than 2^24 ticks to the highest price fits all prices.
    """
    prices = np.unique(np.concatenate([candles[name].to_numpy() for name in PRICES]))
    coarsest = math.floor(math.log10(_COARSEST * float(np.median(prices))) + 1e-9)
    finest = math.ceil(math.log10(prices[-1] / (EXACT + 1)) + 1e-9)
    for exponent in range(max(coarsest, finest), finest - 1, -1):
        tick = _decimal(1, exponent)
        if not _on_grid(prices, tick):
            continue
        if len(prices) < _MIN_EVIDENCE or _on_grid(prices, _decimal(10, exponent)):
            return tick, len(prices)
        for multiple in (25, 5, 2):
            coarser = _decimal(multiple, exponent)
            if coarser <= _COARSEST * np.median(prices) and _on_grid(prices, coarser):
                return coarser, len(prices)
        return tick, len(prices)
    smallest = _decimal(1, finest)
    check_ticks(
        candles, smallest, source, hint="no coarser tick fits and a finer one has 2^24 ticks to the highest price"
    )
    raise DataError(f"{source}: row 0: open = {prices[0]}: no tick fits; pass an Instrument")


def _decimal(multiple: int, exponent: int) -> float:
    """Return the float nearest to `multiple * 10^exponent`."""
    return float(f"{multiple}e{exponent}")


def _on_grid(prices: np.ndarray, tick: float) -> bool:
    ticks = prices / tick
    return bool((np.abs(ticks - np.rint(ticks)) <= _ON_TICK).all())


def fits_tick(candles: pa.Table, tick: float) -> bool:
    """Return whether every price is a whole number of ticks."""
    return all(_on_grid(candles[name].to_numpy(), tick) for name in PRICES)


def check_ticks(
    candles: pa.Table, tick: float, source: str = "candles", hint: str = "pass the venue's tick size"
) -> None:
    """Raise unless every price is a whole number of ticks, from 1 to 2^24 - 1 (docs/semantics.md, section "Units").

    Raises:
      DataError: a price is off the grid. The message names row and value.
    """
    for name in PRICES:
        prices = candles[name].to_numpy()
        ticks = prices / tick
        _refuse(
            np.abs(ticks - np.rint(ticks)) > _ON_TICK,
            prices,
            name,
            source,
            f"is not a multiple of the tick {tick:g}; {hint}",
        )
    _check_range(candles, tick, source)


def _check_range(table: pa.Table, tick: float, source: str) -> None:
    for name in PRICES:
        prices = table[name].to_numpy()
        _refuse(
            prices / tick > EXACT, prices, name, source, f"reaches 2^24 ticks of {tick:g}; give a coarser tick size"
        )
        _refuse(
            prices / tick < 1 - _ON_TICK,
            prices,
            name,
            source,
            f"is less than one tick of {tick:g}; give a finer tick size",
        )


def _refuse(bad: np.ndarray, values: np.ndarray, name: str, source: str, problem: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"{source}: row {row}: {name} = {values[row].item()!r} {problem}")


def to_ticks(prices: np.ndarray, tick: float, rounding: Callable[[np.ndarray], np.ndarray] = np.rint) -> np.ndarray:
    """Return prices in ticks, whole by default. A price within 1e-6 ticks of a multiple (or a half) counts as on it."""
    return rounding(np.round(prices / tick, 6))


def lay_mark(mark: pa.Table, grid: Grid, tick: float, source: str = "mark") -> tuple[np.ndarray, int]:
    """Return mark candles [N, K, 4] in ticks on the grid of the candles, and the number of missing ones.

    Opens and closes keep their fractions of a tick. Lows are floored and highs ceiled. The last-price candle replaces a
    missing one.
    """
    stamps = mark["open_time_ms"].to_numpy()
    inside = (stamps >= grid.start_ms) & (stamps < grid.end_ms)
    slot = (stamps[inside] - grid.start_ms) // grid.interval_ms
    marks = to_ticks(grid.prices, tick)
    flat = marks.reshape(-1, 4)
    for i, (name, rounding) in enumerate(zip(PRICES, (np.asarray, np.ceil, np.floor, np.asarray), strict=True)):
        flat[slot, i] = to_ticks(mark[name].to_numpy()[inside], tick, rounding)
    return marks, len(flat) - len(slot)


def check_mark(mark: pa.Table, interval_ms: int, grid: Grid, tick: float, source: str = "mark") -> None:
    """Raise for a mark series that cannot belong to these candles.

    Raises:
      DataError: the mark is finer than the candles, nowhere in their span, or not from 1 to 2^24 - 1 ticks.
    """
    stamps = mark["open_time_ms"].to_numpy()
    if interval_ms < grid.interval_ms:
        raise DataError(
            f"{source}: row 1: open_time_ms = {stamps[1]}: mark candles of {interval_ms} ms are finer than the "
            f"candles of {grid.interval_ms} ms; give mark candles of the candles' length, or coarser ones"
        )
    if not ((stamps >= grid.start_ms) & (stamps < grid.end_ms)).any():
        raise DataError(
            f"{source}: row 0 .. {len(stamps) - 1}: open_time_ms = {stamps[0]} .. {stamps[-1]} all lie outside the "
            f"candles' {grid.start_ms} .. {grid.end_ms}; give the mark series of the same dates"
        )
    _check_range(mark, tick, source)


def lay_funding(
    funding: pa.Table | None, mark: pa.Table | None, grid: Grid, tick: float, source: str = "funding"
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the settlement at every bar's open.

    The price is the open of a mark candle, of any length, that opens at the bar. Without one it is the last-price open.

    Returns:
      [N, 2] rate (fraction; 0 without settlement) and price (ticks, not rounded).
      [M] the dated opens of all settlements of the file, ms.
      The number of settlements inside the candles without a mark price.

    Raises:
      DataError: a settlement lies deep inside a bar, or two lie in one. Also if two are more than 8 h apart, or the
        candles reach more than 8 h beyond either end.
    """
    rate, price = np.zeros(len(grid.valid)), to_ticks(grid.prices[:, 0, 0], tick)
    priced = np.zeros(len(rate), bool)
    if mark is not None:
        bar, row = _match(grid, mark["open_time_ms"].to_numpy())
        price[bar], priced[bar] = to_ticks(mark["open"].to_numpy()[row], tick, np.asarray), True
    if funding is None:
        return np.column_stack([rate, price]), np.empty(0, np.int64), 0
    opens = settlement_opens(funding, source)
    _check_reach(funding["time_ms"].to_numpy(), opens, grid, source)
    bar, row = _match(grid, opens)
    rate[bar] = funding["funding_rate"].to_numpy()[row]
    return np.column_stack([rate, price]), opens, int((~priced[bar]).sum())


def _match(grid: Grid, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bars that open at a stamp, and the row of that stamp."""
    row = ((stamps >= grid.start_ms) & (stamps < grid.end_ms) & (stamps % BAR_MS == 0)).nonzero()[0]
    return (stamps[row] - grid.start_ms) // BAR_MS, row


def _check_reach(stamps: np.ndarray, opens: np.ndarray, grid: Grid, source: str) -> None:
    late = np.diff(opens, prepend=opens[0]) > FUNDING_REACH_MS
    problem = "comes more than 8 h after the settlement before; add the missing ones"
    _refuse(late, stamps, "time_ms", source, problem)
    ends = (
        (0, opens[0] - grid.start_ms, f"after the candles begin ({grid.start_ms})"),
        (len(opens) - 1, grid.end_ms - opens[-1], f"before the candles end ({grid.end_ms})"),
    )
    for row, reach, where in ends:
        if reach > FUNDING_REACH_MS:
            raise DataError(
                f"{source}: row {row}: time_ms = {stamps[row]} lies {reach / 3_600_000:g} h {where}, more than 8 h; "
                "add the missing settlements or cut the candles"
            )
