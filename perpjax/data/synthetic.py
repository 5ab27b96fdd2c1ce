"""Synthetic markets: seeded, no file needed, three of them.

PLACEHOLDER
"""

import dataclasses
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from perpjax.data.contract import BAR_MS, CANDLES, FUNDING, MARK
from perpjax.instrument import EXACT, Instrument

START_MS = 1_704_067_200_000
"""2024-01-01 00:00 UTC, a Monday."""
CANDLES_PER_BAR = 5
CANDLE_MS = BAR_MS // CANDLES_PER_BAR
YEAR_BARS = 35_040
START_PRICE = 50_000.0
TICK = 0.1

_HOUR_MS = 3_600_000
_YEAR_CANDLES = YEAR_BARS * CANDLES_PER_BAR
_DAY_CANDLES = 480
_SUBSTEPS = 4


class Tables(NamedTuple):
    """A synthetic market, in the tables of `perpjax.data.contract`."""

    candles: pa.Table
    mark: pa.Table | None
    funding: pa.Table | None
    instrument: Instrument
    latent: dict[str, np.ndarray]
    """What no policy can see: see `synthetic_tables`."""


@dataclasses.dataclass(frozen=True)
class MartingaleParameters:
    """Noise of all three markets."""

    volatility: float = 0.65
    """Of the diffusion, per square root of a year: root of the mean variance."""
    slow_spread: float = 0.35
    """Standard deviation of the slow part of log volatility."""
    slow_bars: float = 384.0
    """Its relaxation time (4 days)."""
    fast_spread: float = 0.25
    """Standard deviation of the fast part of log volatility."""
    fast_bars: float = 12.0
    """Its relaxation time (3 hours)."""
    jumps_per_day: float = 1.0
    """Jumps fall between two candles."""
    jump_size: float = 0.010
    """Standard deviation of a jump, fraction of price."""
    candle_volume: float = 25.0
    """Median volume of a 3-minute candle at the usual volatility, base currency."""
    funding_spread: float = 5e-5
    """Standard deviation of a settlement's rate (every 8 hours, mean zero)."""


@dataclasses.dataclass(frozen=True)
class SignalParameters(MartingaleParameters):
    """The noise, quieter than in `martingale`, and the latent drift."""

    volatility: float = 0.45
    slow_spread: float = 0.25
    fast_spread: float = 0.15
    jump_size: float = 0.005
    drift: float = 0.0006
    """Expected return of a bar in a trend, fraction of price; its sign is the trend's."""
    trend_bars: float = 72.0
    """Mean length of a trend (geometric)."""
    quiet_bars: float = 144.0
    """Mean length of the stretch without drift between two trends (geometric)."""


@dataclasses.dataclass(frozen=True)
class CrashParameters(MartingaleParameters):
    """The noise, and counts of events per 30 days (Poisson)."""

    gaps: float = 6.0
    """The price jumps by `smallest_gap` to `largest_gap`, up or down; three in ten at the open of a bar."""
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
    """Candles whose extreme lies 3 to 25 % away, on the last price only: the mark does not follow."""
    mark_spikes: float = 4.0
    """The same on the mark only."""
    missing_marks: float = 20.0
    """Single mark candles without a row."""
    funding_cap: float = 0.02
    """Settlements of a day at the cap are all plus or all minus this."""
    capped_days: float = 0.3
    """Share of days at the cap."""


_PARAMETERS = {"signal": SignalParameters, "martingale": MartingaleParameters, "crash": CrashParameters}

NAMES: tuple[str, ...] = tuple(_PARAMETERS)
"""The markets that `synthetic_tables` knows."""


def synthetic_tables(name: str, seed: int = 0, bars: int = YEAR_BARS, **parameters: float) -> Tables:
    """A synthetic market: 3-minute candles from 2024-01-01 UTC, always the same for the same arguments.

    Args:
      name: one of `NAMES`.
      seed: any non-negative integer.
      bars: number of 15-minute bars, N.
      parameters: instead of the defaults in the market's own dataclass: `SignalParameters`,
        `MartingaleParameters`, `CrashParameters`.

    Returns:
      Tables in the contract's schemas, prices in whole ticks (those of the mark in hundredths), and `latent`:
      `volatility` [N] (fraction of price per bar, at the bar's first candle); for `signal` also `drift` [N],
      the expected return of bar t, known to nobody at T_t; for `crash` also one bool mask [5 N] each for
      `gap`, `frozen`, `missing`, `wick`, `mark_spike` and `missing_mark`, candle by candle.

    Raises:
      ValueError: for an unknown name or parameter, a seed or number of bars out of range, or a price that
        leaves what float32 holds exactly (only for many years or for extreme parameters).
    """
    if name not in _PARAMETERS:
        raise ValueError(f"synthetic market {name!r} is not one of {', '.join(NAMES)}")
    for label, value, least in (("seed", seed, 0), ("bars", bars, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"synthetic market {name}: {label} = {value!r} is not an integer >= {least}")
    known = {field.name for field in dataclasses.fields(_PARAMETERS[name])}
    for key, value in parameters.items():
        if key not in known:
            raise ValueError(f"synthetic market {name}: no parameter {key!r}; it has {', '.join(sorted(known))}")
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"synthetic market {name}: {key} = {value!r} is not a number >= 0")
    p = _PARAMETERS[name](**parameters)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, NAMES.index(name)])))

    sigma = _draw_volatility(rng, p, bars * CANDLES_PER_BAR)
    jumps = _draw_jumps(rng, p, len(sigma))
    volume = _draw_volume(rng, p, sigma)
    times = START_MS + CANDLE_MS * np.arange(len(sigma))
    latent = {"volatility": sigma[::CANDLES_PER_BAR] * np.sqrt(CANDLES_PER_BAR)}
    drift, events = np.zeros(bars), {}
    if isinstance(p, SignalParameters):
        drift = latent["drift"] = _draw_drift(rng, p, bars)
    if isinstance(p, CrashParameters):
        events = _draw_events(rng, p, len(sigma))
        latent |= events
    per_candle = np.repeat(np.log1p(drift) / CANDLES_PER_BAR, CANDLES_PER_BAR)
    path = _walk(rng, sigma, per_candle, jumps)
    if not isinstance(p, CrashParameters):
        funding = _quiet_funding(rng, p, times)
        return Tables(_candle_table(times, path, volume), None, funding, _instrument(), latent)

    path += _draw_gaps(rng, p, path, events["gap"])[:, None]
    mark = _mark_path(rng, path, events["mark_spike"])
    path = _add_spikes(rng, path, events["wick"])
    path = _freeze(path, events["frozen"])
    volume = np.where(events["frozen"], 0.0, volume)
    there, marked = ~events["missing"], ~events["missing_mark"]
    return Tables(
        _candle_table(times[there], path[there], volume[there]),
        _mark_table(times[marked], mark[marked]),
        _wild_funding(rng, p, times),
        _instrument(),
        latent,
    )


def _instrument() -> Instrument:
    return Instrument("SYNTHETIC", tick_size=TICK, step_size=0.001, min_notional=5.0, max_quantity=120.0)


# The noise


def _autoregress(rng: np.random.Generator, n: int, spread: float, relaxation: float) -> Float[np.ndarray, "n"]:
    """Stationary AR(1) of mean zero: standard deviation `spread`, memory e^-1 after `relaxation` steps."""
    keep = np.exp(-1.0 / relaxation) if relaxation > 0 else 0.0
    shocks = rng.standard_normal(n)
    shocks[1:] *= np.sqrt(1 - keep * keep)
    return spread * np.fromiter(accumulate(shocks.tolist(), lambda y, x: keep * y + x), np.float64, n)


def _draw_volatility(rng: np.random.Generator, p: MartingaleParameters, n: int) -> Float[np.ndarray, "n"]:
    """Volatility of each candle: exponential of two autoregressions, their mean variance that of `p`."""
    log_volatility = _autoregress(rng, n, p.slow_spread, p.slow_bars * CANDLES_PER_BAR)
    log_volatility += _autoregress(rng, n, p.fast_spread, p.fast_bars * CANDLES_PER_BAR)
    # E exp(2 h) = exp(2 var h) for a normal h.
    variance = p.slow_spread**2 + p.fast_spread**2
    return p.volatility / np.sqrt(_YEAR_CANDLES) * np.exp(log_volatility - variance)


def _draw_jumps(rng: np.random.Generator, p: MartingaleParameters, n: int) -> Float[np.ndarray, "n"]:
    """Log of the jump before each candle, mostly 0. The simple return is symmetric, so its mean is zero."""
    happens = rng.random(n) < p.jumps_per_day / _DAY_CANDLES
    # Laplace: fatter tails than a normal; the bound is far out and symmetric too.
    sizes = np.clip(rng.laplace(0.0, p.jump_size / np.sqrt(2), n), -0.2, 0.2)
    return np.log1p(np.where(happens, sizes, 0.0))


def _draw_volume(rng: np.random.Generator, p: MartingaleParameters, sigma: np.ndarray) -> np.ndarray:
    """Volume of each candle, proportional to volatility, log-normal around it, never 0."""
    usual = p.candle_volume * sigma / np.median(sigma)
    return np.maximum(np.round(usual * np.exp(0.5 * rng.standard_normal(len(sigma))), 3), 0.001)


def _walk(
    rng: np.random.Generator, sigma: np.ndarray, drift: np.ndarray, jumps: np.ndarray
) -> Float[np.ndarray, "n 4"]:
    """Log open, high, low, close of each candle of one path that starts at log price 0.

    The mean of the price (not of its log) grows by `drift` in each candle. Extremes are those of a continuous
    path, by the Brownian bridge of each substep: with a = start, b = end, v = variance, the maximum is
    (a + b + sqrt((b - a)^2 + 2 v e)) / 2, e exponential (reflection principle; e.g. Glasserman 2003, 6.4).
    """
    n, shape = len(sigma), (len(sigma), _SUBSTEPS)
    variance = (sigma**2 / _SUBSTEPS)[:, None]
    steps = np.sqrt(variance) * rng.standard_normal(shape) + (drift / _SUBSTEPS)[:, None] - variance / 2
    ends = np.cumsum(steps, axis=1)
    starts = ends - steps
    middle, square = starts + ends, steps**2
    high = np.max(middle + np.sqrt(square + 2 * variance * rng.standard_exponential(shape)), axis=1) / 2
    low = np.min(middle - np.sqrt(square + 2 * variance * rng.standard_exponential(shape)), axis=1) / 2
    close = np.cumsum(jumps + ends[:, -1])
    opens = close - ends[:, -1]
    return np.stack([opens, opens + high.clip(min=0), opens + low.clip(max=0), close], axis=1).reshape(n, 4)


def _draw_drift(rng: np.random.Generator, p: SignalParameters, bars: int) -> Float[np.ndarray, "bars"]:
    """Expected return of each bar: quiet stretches (0) and trends (plus or minus `drift`) in turn.

    Signs are shuffled fours of plus and fours of minus, so that every split has both and no year runs away.
    """
    pairs = int(4 * bars / (p.trend_bars + p.quiet_bars)) + 8
    lengths = np.empty(2 * pairs, np.int64)
    lengths[0::2] = rng.geometric(1 / p.quiet_bars, pairs)
    lengths[1::2] = rng.geometric(1 / p.trend_bars, pairs)
    drifts = np.zeros(2 * pairs)
    signs = rng.permuted(np.tile([1.0, -1.0], (pairs // 8 + 1, 4)), axis=1)
    drifts[1::2] = p.drift * signs.ravel()[:pairs]
    return np.repeat(drifts, lengths)[:bars]


def _quiet_funding(rng: np.random.Generator, p: MartingaleParameters, times: np.ndarray) -> pa.Table:
    """A settlement every 8 hours, from the first candle on; mean zero, half forgotten within a day."""
    stamps = np.arange(times[0], times[-1] + CANDLE_MS, 8 * _HOUR_MS)
    rates = _autoregress(rng, len(stamps), p.funding_spread, 4.0)
    return _funding_table(stamps, np.clip(rates, -0.02, 0.02))


# The crash market


def _draw_events(rng: np.random.Generator, p: CrashParameters, n: int) -> dict[str, Bool[np.ndarray, "n"]]:
    """Which candles are struck by what. The first bar and the last are spared."""
    months, k = n / (30 * _DAY_CANDLES), CANDLES_PER_BAR

    def runs(rate: float, shortest: int, longest: int, within_bar: bool = False, grid: int = 1) -> np.ndarray:
        starts = rng.integers(0, n, rng.poisson(rate * months)) // grid * grid
        lengths = rng.integers(shortest, longest + 1, len(starts)) * grid
        if within_bar:  # a run of 2 .. 4 candles starts where it still fits into its bar
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
    return {
        "gap": gap,
        "missing": missing,
        "frozen": frozen,
        "wick": runs(p.wicks, 1, 1) & traded,
        "mark_spike": runs(p.mark_spikes, 1, 1),
        "missing_mark": runs(p.missing_marks, 1, 1),
    }


def _first_of_run(mask: Bool[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    return mask & ~np.concatenate([[False], mask[:-1]])


def _draw_gaps(
    rng: np.random.Generator, p: CrashParameters, path: np.ndarray, gap: np.ndarray
) -> Float[np.ndarray, "n"]:
    """What the gaps so far have added to the log price. Directions lean towards the first price.

    Without that a year of such gaps would end at a thousandth or a thousandfold of it.
    """
    added, at = np.zeros(len(gap)), np.flatnonzero(gap)
    total = 0.0
    for i, size, draw in zip(at, rng.uniform(p.smallest_gap, p.largest_gap, len(at)), rng.random(len(at)), strict=True):
        up = draw < 1 / (1 + np.exp(2 * (path[i, 0] + total)))
        jump = np.log1p(size if up else -size)
        added[i], total = jump, total + jump
    return np.cumsum(added)


def _add_spikes(rng: np.random.Generator, path: np.ndarray, where: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """One extreme of the candles named moves 3 to 25 % out; the close stays."""
    path, at = path.copy(), np.flatnonzero(where)
    size, up = rng.uniform(0.03, 0.25, len(at)), rng.random(len(at)) < 0.5
    path[at, 1] += np.where(up, np.log1p(size), 0.0)
    path[at, 2] += np.where(up, 0.0, np.log1p(-size))
    return path


def _mark_path(rng: np.random.Generator, path: np.ndarray, spikes: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """The mark: the same path a few basis points aside, with shorter wicks, and spikes of its own.

    It is made before the last price freezes: the mark goes on while nothing trades.
    """
    basis = _autoregress(rng, len(path) + 1, 5e-4, 20.0)
    opens, close = path[:, 0] + basis[:-1], path[:, 3] + basis[1:]
    wick = rng.uniform(0.2, 1.0, len(path))
    body_high, body_low = np.maximum(opens, close), np.minimum(opens, close)
    high = body_high + wick * (path[:, 1] - np.maximum(path[:, 0], path[:, 3]))
    low = body_low + wick * (path[:, 2] - np.minimum(path[:, 0], path[:, 3]))
    return _add_spikes(rng, np.stack([opens, high, low, close], axis=1), spikes)


def _freeze(path: np.ndarray, frozen: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """Frozen candles repeat the last close that was traded; the path behind them goes on unseen."""
    last = np.maximum.accumulate(np.where(frozen, 0, np.arange(len(path))))
    return np.where(frozen[:, None], path[last, 3][:, None], path)


def _wild_funding(rng: np.random.Generator, p: CrashParameters, times: np.ndarray) -> pa.Table:
    """Settlements every 8, 4 or 1 hours, the interval changing from day to day; days at the cap."""
    hours = np.arange(times[0], times[-1] + CANDLE_MS, _HOUR_MS)
    day = (hours - hours[0]) // (24 * _HOUR_MS)
    days = int(day[-1]) + 1
    interval = np.repeat(rng.choice([8, 4, 1], days), rng.integers(1, 6, days))[:days]
    capped = np.where(rng.random(days) < p.capped_days, rng.choice([-1.0, 1.0], days), 0.0)
    rates = _autoregress(rng, len(hours), 4 * p.funding_spread, 24.0)
    rates = np.where(capped[day] != 0, p.funding_cap * capped[day], rates)
    due = (hours // _HOUR_MS) % interval[day] == 0
    # The exchange stamps a settlement a little after the hour.
    return _funding_table(hours[due] + rng.integers(0, 15_000, due.sum()), rates[due])


# Tables


def _candle_table(times: np.ndarray, path: np.ndarray, volume: np.ndarray) -> pa.Table:
    """Candles of a log path; prices in whole ticks."""
    ticks = np.round(START_PRICE / TICK * np.exp(path))
    for wrong, what in ((ticks[:, 2] < 1, "reached zero"), (ticks[:, 1] > EXACT, f"exceeded {EXACT} ticks")):
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"synthetic market: the price {what} at candle {row} of {len(ticks)}; "
                "use fewer bars, another seed or milder parameters"
            )
    # Divided by 10, not multiplied by 0.1: the float64 nearest to the decimal price.
    columns = [times, *(ticks / round(1 / TICK)).T, volume]
    return pa.table([pa.array(c) for c in columns], schema=CANDLES)


def _mark_table(times: np.ndarray, path: np.ndarray) -> pa.Table:
    """Mark candles, in hundredths: the venue's mark is finer than its ticks."""
    prices = np.round(START_PRICE * np.exp(path), 2)
    return pa.table([pa.array(c) for c in (times, *prices.T)], schema=MARK)


def _funding_table(stamps: np.ndarray, rates: np.ndarray) -> pa.Table:
    return pa.table([pa.array(stamps), pa.array(np.round(rates, 8))], schema=FUNDING)
