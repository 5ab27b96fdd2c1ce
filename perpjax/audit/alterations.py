"""Three other futures: all data after a cut redrawn, left out, or in another order. All are well-formed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax._grid import BAR_MS
from perpjax.data.contract import CANDLES, FUNDING, PRICES, settlement_opens

_HOUR_MS = 3_600_000


class Series(NamedTuple):
    """The input of a feature function, before the bar about to open is appended."""

    bars: pa.Table
    """15-minute bars on the strict grid, [N]."""
    funding: pa.Table | None
    """Settlements, [M]."""

    def clock(self, t: int) -> int:
        """Return the open of bar t, ms."""
        return self.bars["open_time_ms"][0].as_py() + BAR_MS * t

    def cut_out(self, start: int, stop: int) -> "Series":
        """Return bars start .. stop - 1, with every settlement known at their end."""
        funding = self.funding
        if funding is not None:
            funding = funding.slice(0, self.num_settled(stop))
        return Series(self.bars.slice(start, stop - start), funding)

    def num_settled(self, t: int) -> int:
        """Count the settlements dated at or before the open of bar t."""
        return 0 if self.funding is None else int((settlement_opens(self.funding) <= self.clock(t)).sum())


Alteration = Callable[[Series, int, np.random.Generator], Series]
"""(series, cut, random numbers) to a series with the same bars before the cut and settlements up to its open."""


def perturb(series: Series, cut: int, rng: np.random.Generator) -> Series:
    """Redraw the future: prices up to 4.5 times higher or lower in each bar, other volumes and settlements."""
    columns = _columns(series)
    n = len(columns["close"]) - cut
    opens, closes = columns["close"][cut:] * np.exp(rng.uniform(-1.5, 1.5, (2, n)))
    wicks = np.exp(rng.uniform(0, 0.3, (2, n)))
    future = {
        "open": opens,
        "high": np.maximum(opens, closes) * wicks[0],
        "low": np.minimum(opens, closes) / wicks[1],
        "close": closes,
        "volume": columns["volume"].mean() * np.exp(rng.uniform(-2, 2, n)),
    }
    hours = np.cumsum(rng.choice([1, 2, 4, 8], n)) - 7  # the intervals of the venues; the first ends within 8 hours
    times = series.clock(cut) // _HOUR_MS * _HOUR_MS + _HOUR_MS * hours[hours > 0]
    times = times[times <= series.clock(cut + n)]
    return _with_future(series, cut, future, times, rng.uniform(-0.01, 0.01, len(times)))


def truncate(series: Series, cut: int, rng: np.random.Generator) -> Series:
    """Leave out all data after the cut, as for a live runner."""
    return series.cut_out(0, cut)


def shuffle(series: Series, cut: int, rng: np.random.Generator) -> Series:
    """Put the bars and the funding rates after the cut in another order."""
    columns = _columns(series)
    order = cut + rng.permutation(len(columns["close"]) - cut)
    future = {name: columns[name][order] for name in (*PRICES, "volume")}
    times, rates = np.empty(0, np.int64), np.empty(0)
    if series.funding is not None:
        times, rates = (series.funding[name].to_numpy()[series.num_settled(cut) :] for name in FUNDING.names)
    return _with_future(series, cut, future, times, rates[rng.permutation(len(rates))])


ALTERATIONS: dict[str, Alteration] = {"perturbed": perturb, "truncated": truncate, "shuffled": shuffle}


def make_gaps(series: Series, rng: np.random.Generator) -> tuple[Series, tuple[tuple[int, int], ...]]:
    """Make a gap of 2 to 24 bars in every hundred, in the form that the builder gives it, and a jump of 10 % after it.

    Returns:
      The series, and (first bar, first bar after) of every gap.
    """
    columns, gaps = _columns(series), []
    for begin in range(1, len(columns["close"]) - 100, 100):
        start = begin + int(rng.integers(0, 50))
        stop = start + int(rng.integers(2, 25))
        factor = rng.choice([1.1, 1 / 1.1])
        for name in PRICES:
            columns[name][start:stop] = columns["close"][start - 1]
            columns[name][stop:] *= factor
        columns["volume"][start:stop] = 0.0
        gaps.append((start, stop))
    return Series(pa.table(columns, schema=CANDLES), series.funding), tuple(gaps)


def _columns(series: Series) -> dict[str, np.ndarray]:
    """Return writable copies of the columns."""
    return {name: np.array(series.bars[name].to_numpy()) for name in CANDLES.names}


def _with_future(
    series: Series, cut: int, future: dict[str, np.ndarray], times: np.ndarray, rates: np.ndarray
) -> Series:
    """Return the series with other bars from the cut on, and other settlements after its open."""
    columns = _columns(series)
    for name, values in future.items():
        columns[name][cut:] = values
    funding = series.funding
    if funding is not None:
        later = pa.table({"time_ms": times, "funding_rate": rates}, schema=FUNDING)
        funding = pa.concat_tables([funding.slice(0, series.num_settled(cut)), later])
    return Series(pa.table(columns, schema=CANDLES), funding)
