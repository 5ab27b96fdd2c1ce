"""Intervals of statistics of daily returns, by the stationary bootstrap."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

DRAWS = 2000
COVERAGE = 0.9


def resample_days(days: int, draws: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "draws days"]:
    """Return resampled days: blocks of random length from random days, around the end (Politis and Romano, 1994).

    A block has `block_days(days)` days on average, with a geometric distribution. Each call with the same numbers
    returns the same days, so that two curves are compared on the same draws.
    """
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, days, (draws, days))
    begins = rng.random((draws, days)) < 1 / block_days(days)
    begins[:, 0] = True
    since = np.maximum.accumulate(np.where(begins, np.arange(days), 0), axis=1)
    return (np.take_along_axis(starts, since, axis=1) + np.arange(days) - since) % days


def block_days(days: int) -> float:
    """Return the mean length of a block: the cube root of the days, at least 2."""
    return max(2.0, days ** (1 / 3))


def find_interval(
    statistic: Callable[[Float[np.ndarray, "draws days *rest"]], Float[np.ndarray, "draws"]],
    returns: Float[np.ndarray, "days *rest"],
    seed: int = 0,
) -> list[float] | None:
    """Return the 5 % and the 95 % quantile of a statistic of resampled returns; None with fewer than 10 days."""
    if len(returns) < 10:
        return None
    values = statistic(returns[resample_days(len(returns), seed=seed)])
    values = values[np.isfinite(values)]
    tail = (1 - COVERAGE) / 2
    return [float(x) for x in np.quantile(values, [tail, 1 - tail])] if len(values) > DRAWS // 2 else None


def compare(ours: Float[np.ndarray, "days"], theirs: Float[np.ndarray, "days"]) -> list[float] | None:
    """Return the interval of the difference of two whole returns, on the same resampled days."""
    paired = np.stack([ours, theirs], axis=-1)
    return find_interval(lambda rows: compound(rows[..., 0]) - compound(rows[..., 1]), paired)


def compound(returns: Float[np.ndarray, "draws days"]) -> Float[np.ndarray, "draws"]:
    """Return the whole return."""
    return np.prod(1 + returns, axis=1) - 1


def sharpe_ratios(returns: Float[np.ndarray, "draws days"]) -> Float[np.ndarray, "draws"]:
    """Return the Sharpe ratios a year."""
    std = returns.std(axis=1, ddof=1)
    return np.divide(returns.mean(axis=1), std, out=np.full(len(std), np.nan), where=std > 0) * np.sqrt(365)


def deepest_falls(returns: Float[np.ndarray, "draws days"]) -> Float[np.ndarray, "draws"]:
    """Return the deepest falls from a peak, day by day."""
    curve = np.cumprod(np.concatenate([np.ones((len(returns), 1)), 1 + returns], axis=1), axis=1)
    return np.max(1 - curve / np.maximum.accumulate(curve, axis=1), axis=1)
