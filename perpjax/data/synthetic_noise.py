"""The noise of the synthetic markets: clustered volatility, jumps, and one continuous path through every candle."""

import dataclasses
from itertools import accumulate

import numpy as np
from jaxtyping import Float

from perpjax.data.contract import BAR_MS

CANDLES_PER_BAR = 5
CANDLE_MS = BAR_MS // CANDLES_PER_BAR
HOUR_MS = 3_600_000
DAY_CANDLES = 480
YEAR_BARS = 35_040

_YEAR_CANDLES = YEAR_BARS * CANDLES_PER_BAR
_SUBSTEPS = 4
_LARGEST_JUMP = 0.2


@dataclasses.dataclass(frozen=True)
class MartingaleParameters:
    """Noise of all three markets."""

    volatility: float = 0.65
    """Volatility of the diffusion, per square root of a year: root of the mean variance."""
    slow_spread: float = 0.35
    """Standard deviation of the slow part of log volatility."""
    slow_bars: float = 384.0
    """Its relaxation time (4 days)."""
    fast_spread: float = 0.25
    """Standard deviation of the fast part of log volatility."""
    fast_bars: float = 12.0
    """Its relaxation time (3 hours)."""
    jumps_per_day: float = 1.0
    """Mean number of jumps a day. Jumps fall between two candles."""
    jump_size: float = 0.010
    """Standard deviation of a jump, fraction of price."""
    candle_volume: float = 25.0
    """Median volume of a 3-minute candle at the usual volatility, base currency."""
    funding_spread: float = 5e-5
    """Standard deviation of a settlement's rate (every 8 hours, mean zero)."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self.require(isinstance(value, int | float) and 0 <= value < np.inf, field.name, "a finite number >= 0")
        self.require(self.volatility > 0, "volatility", "above 0")

    def require(self, holds: bool, name: str, what: str) -> None:
        """Raise a ValueError with the parameter's name unless `holds`."""
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name} = {getattr(self, name)!r} is not {what}")


def autoregress(rng: np.random.Generator, n: int, spread: float, relaxation: float) -> Float[np.ndarray, "n"]:
    """Draw a stationary AR(1) of mean zero: standard deviation `spread`, memory e^-1 after `relaxation` steps."""
    keep = np.exp(-1.0 / relaxation) if relaxation > 0 else 0.0
    shocks = rng.standard_normal(n)
    shocks[1:] *= np.sqrt(1 - keep * keep)
    return spread * np.fromiter(accumulate(shocks.tolist(), lambda y, x: keep * y + x), np.float64, n)


def draw_volatility(rng: np.random.Generator, p: MartingaleParameters, n: int) -> Float[np.ndarray, "n"]:
    """Draw the volatility of each candle: the exponential of two autoregressions with the mean variance of `p`."""
    log_volatility = autoregress(rng, n, p.slow_spread, p.slow_bars * CANDLES_PER_BAR)
    log_volatility += autoregress(rng, n, p.fast_spread, p.fast_bars * CANDLES_PER_BAR)
    # E exp(2 h) = exp(2 var h) for a normal h.
    variance = p.slow_spread**2 + p.fast_spread**2
    return p.volatility / np.sqrt(_YEAR_CANDLES) * np.exp(log_volatility - variance)


def draw_jumps(rng: np.random.Generator, p: MartingaleParameters, n: int) -> Float[np.ndarray, "n"]:
    """Draw the log of the jump before each candle, mostly 0. The simple return is symmetric, so its mean is zero."""
    happens = rng.random(n) < p.jumps_per_day / DAY_CANDLES
    # Laplace: fatter tails than a normal; the bound is far out and symmetric too.
    sizes = np.clip(rng.laplace(0.0, p.jump_size / np.sqrt(2), n), -_LARGEST_JUMP, _LARGEST_JUMP)
    return np.log1p(np.where(happens, sizes, 0.0))


def draw_volume(rng: np.random.Generator, p: MartingaleParameters, sigma: np.ndarray) -> np.ndarray:
    """Draw the volume of each candle, log-normal around a multiple of its volatility, never 0."""
    median = p.volatility / np.sqrt(_YEAR_CANDLES) * np.exp(-(p.slow_spread**2) - p.fast_spread**2)
    usual = p.candle_volume * sigma / median
    return np.maximum(np.round(usual * np.exp(0.5 * rng.standard_normal(len(sigma))), 3), 0.001)


def walk(rng: np.random.Generator, sigma: np.ndarray, drift: np.ndarray, jumps: np.ndarray) -> Float[np.ndarray, "n 4"]:
    """Draw log open, high, low, close of each candle of one path that starts at log price 0.

    The mean of the price (not of its log) grows by `drift` in each candle. Extremes are those of a continuous path, by
    the Brownian bridge of each substep. The maximum is `(a + b + sqrt((b - a)^2 + 2 v e)) / 2` with a = start,
    b = end, v = variance and e exponential (reflection principle; e.g. Glasserman 2003, 6.4).
    """
    shape = (len(sigma), _SUBSTEPS)
    variance = (sigma**2 / _SUBSTEPS)[:, None]
    steps = np.sqrt(variance) * rng.standard_normal(shape) + (drift / _SUBSTEPS)[:, None] - variance / 2
    ends = np.cumsum(steps, axis=1)
    starts = ends - steps
    middle, square = starts + ends, steps**2
    high = np.max(middle + np.sqrt(square + 2 * variance * rng.standard_exponential(shape)), axis=1) / 2
    low = np.min(middle - np.sqrt(square + 2 * variance * rng.standard_exponential(shape)), axis=1) / 2
    close = np.cumsum(jumps + ends[:, -1])
    opens = close - ends[:, -1]
    return np.stack([opens, opens + high.clip(min=0), opens + low.clip(max=0), close], axis=1)
