"""Events of the `crash` market: gaps, frozen and missing candles, wicks, a mark of its own, wild funding."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from perpjax.data.synthetic_noise import (
    CANDLE_MS,
    CANDLES_PER_BAR,
    DAY_CANDLES,
    HOUR_MS,
    MartingaleParameters,
    autoregress,
)

WICK = (0.03, 0.25)
"""Range of the size of wicks and mark spikes, fraction of price."""


@dataclasses.dataclass(frozen=True)
class CrashParameters(MartingaleParameters):
    """The noise, and counts of events per 30 days (Poisson)."""

    gaps: float = 6.0
    """Jumps of the price by `smallest_gap` to `largest_gap`, up or down; three in ten at the open of a bar."""
    smallest_gap: float = 0.10
    largest_gap: float = 0.50
    frozen: float = 12.0
    """Runs of 1 to 30 candles in which nothing trades: flat prices, volume 0."""
    missing_candles: float = 30.0
    """Single candles without a row."""
    missing_runs: float = 20.0
    """Runs of 2 to 4 candles without rows, inside one bar."""
    missing_bars: float = 10.0
    """Whole bars without rows."""
    outages: float = 1.5
    """2 to 8 hours without rows."""
    wicks: float = 20.0
    """Candles with an extreme 3 to 25 % away, on the last price only: the mark does not follow."""
    mark_spikes: float = 4.0
    """Candles with such an extreme on the mark only."""
    missing_marks: float = 20.0
    """Single mark candles without a row."""
    funding_cap: float = 0.02
    """On a day at the cap all settlements are plus this rate, or all are minus this rate."""
    capped_days: float = 0.3
    """Share of days at the cap."""

    def __post_init__(self):
        super().__post_init__()
        self.require(self.largest_gap < 1, "largest_gap", "below 1: a price cannot fall by all of itself")
        self.require(self.smallest_gap <= self.largest_gap, "smallest_gap", f"at most largest_gap {self.largest_gap}")
        self.require(self.funding_cap < 1, "funding_cap", "a fraction below 1")
        self.require(self.capped_days <= 1, "capped_days", "a fraction")


def draw_events(rng: np.random.Generator, p: CrashParameters, n: int) -> dict[str, Bool[np.ndarray, "n"]]:
    """Draw the candles of each kind of event. The first and the last bar have none."""
    months, k = n / (30 * DAY_CANDLES), CANDLES_PER_BAR

    def runs(rate: float, shortest: int, longest: int, within_bar: bool = False, grid: int = 1) -> np.ndarray:
        starts = rng.integers(0, n, rng.poisson(rate * months)) // grid * grid
        lengths = rng.integers(shortest, longest + 1, len(starts)) * grid
        if within_bar:  # a run of 2 .. 4 candles is moved so that it fits into its bar
            starts = starts // k * k + (starts % k) % (k + 1 - lengths)
        edges = np.zeros(n + 1, np.int64)
        np.add.at(edges, starts, 1)
        np.add.at(edges, np.minimum(starts + lengths, n), -1)
        hit = np.cumsum(edges[:-1]) > 0
        hit[:k] = hit[-k:] = False
        return hit

    gap = runs(0.7 * p.gaps, 1, 1) | _first_of_run(runs(0.3 * p.gaps, 1, 1, grid=k))
    missing = (
        runs(p.missing_candles, 1, 1)
        | runs(p.missing_runs, 2, 4, within_bar=True)
        | runs(p.missing_bars, 1, 1, grid=k)
        | runs(p.outages, 8, 32, grid=k)
    )
    frozen = runs(p.frozen, 1, 30) & ~missing
    traded = ~missing & ~frozen
    spike = runs(p.mark_spikes, 1, 1)
    return {
        "gap": gap,
        "missing": missing,
        "frozen": frozen,
        "wick": runs(p.wicks, 1, 1) & traded,
        "mark_spike": spike,
        "missing_mark": runs(p.missing_marks, 1, 1) & ~spike,
    }


def _first_of_run(mask: Bool[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    return mask & ~np.concatenate([[False], mask[:-1]])


def draw_gaps(
    rng: np.random.Generator, p: CrashParameters, path: np.ndarray, gap: np.ndarray
) -> Float[np.ndarray, "n"]:
    """Return the sum of the gaps so far in the log price. Directions lean towards the first price.

    Without this lean the price would end a year of such gaps at a thousandth or a thousandfold of the first price.
    """
    added, at = np.zeros(len(gap)), np.flatnonzero(gap)
    total = 0.0
    for i, size, draw in zip(at, rng.uniform(p.smallest_gap, p.largest_gap, len(at)), rng.random(len(at)), strict=True):
        up = draw < 1 / (1 + np.exp(2 * (path[i, 0] + total)))
        jump = np.log1p(size if up else -size)
        added[i], total = jump, total + jump
    return np.cumsum(added)


def add_spikes(rng: np.random.Generator, path: np.ndarray, where: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """Move one extreme of the given candles 3 to 25 % outwards; the close stays."""
    path, at = path.copy(), np.flatnonzero(where)
    size, up = rng.uniform(*WICK, len(at)), rng.random(len(at)) < 0.5
    path[at, 1] += np.where(up, np.log1p(size), 0.0)
    path[at, 2] += np.where(up, 0.0, np.log1p(-size))
    return path


def draw_mark(rng: np.random.Generator, path: np.ndarray, spikes: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """Draw the mark: the path shifted by a few basis points, with shorter wicks, and spikes of its own.

    Call it before the last price freezes: the mark keeps moving while nothing trades.
    """
    basis = autoregress(rng, len(path) + 1, 5e-4, 20.0)
    opens, close = path[:, 0] + basis[:-1], path[:, 3] + basis[1:]
    wick = rng.uniform(0.2, 1.0, len(path))
    body_high, body_low = np.maximum(opens, close), np.minimum(opens, close)
    high = body_high + wick * (path[:, 1] - np.maximum(path[:, 0], path[:, 3]))
    low = body_low + wick * (path[:, 2] - np.minimum(path[:, 0], path[:, 3]))
    return add_spikes(rng, np.stack([opens, high, low, close], axis=1), spikes)


def freeze(path: np.ndarray, frozen: np.ndarray, missing: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """Let frozen candles repeat the last traded close; the hidden path continues behind them."""
    last = np.maximum.accumulate(np.where(frozen | missing, 0, np.arange(len(path))))
    return np.where(frozen[:, None], path[last, 3][:, None], path)


def draw_wild_funding(rng: np.random.Generator, p: CrashParameters, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw stamps and rates of settlements every 8, 4 or 1 hours. The interval changes every few days."""
    hours = np.arange(times[0], times[-1] + CANDLE_MS, HOUR_MS)
    day = (hours - hours[0]) // (24 * HOUR_MS)
    days = int(day[-1]) + 1
    interval = np.repeat(rng.choice([8, 4, 1], days), rng.integers(1, 6, days))[:days]
    capped = np.where(rng.random(days) < p.capped_days, rng.choice([-1.0, 1.0], days), 0.0)
    usual = autoregress(rng, len(hours), 4 * p.funding_spread, 24.0).clip(-p.funding_cap, p.funding_cap)
    rates = np.where(capped[day] != 0, p.funding_cap * capped[day], usual)
    due = (hours // HOUR_MS) % interval[day] == 0
    # The exchange stamps a settlement a little after the hour.
    return hours[due] + rng.integers(0, 15_000, due.sum()), rates[due]
