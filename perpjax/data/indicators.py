"""Technical indicators on whole series, float64.

Every function maps series of length N to series of length N; entry i uses only bars <= i. Nothing is shifted here:
`perpjax.features.core` shifts by one bar, once. Entries that are not defined yet are NaN.

Recursive indicators start from the first bar (`adjust=False`, as in `pandas.ewm`), without a simple-average seed. A
value is defined at once and forgets its start geometrically. Window indicators are computed from each window alone,
never from a running sum over the whole series. Their rounding does not depend on the beginning of the series, so a
live runner with only the last bars gets the same number.
"""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
from jaxtyping import Float

Series = Float[np.ndarray, "N"]

# Windows reduced at once: [256, 672] float64 is 1.4 MB, which stays in the cache.
_CHUNK = 256


def ratio(numerator: Series, denominator: Series, empty: float = 0.0) -> Series:
    """Return `numerator / denominator`, and `empty` where the denominator is 0 (here always 0/0)."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, empty), where=denominator != 0)


def log_return(close: Series, bars: int) -> Series:
    """Return `log(close_i / close_{i-bars})`, a fraction; the first `bars` entries are NaN."""
    returns = np.full_like(close, np.nan)
    returns[bars:] = np.log(close[bars:] / close[:-bars])
    return returns


def smooth(values: Series, weight: float) -> Series:
    """Smooth exponentially: `y_0 = x_0`, `y_i = y_{i-1} + weight (x_i - y_{i-1})`, in the units of `values`.

    The increment form keeps a constant series exactly constant.
    """
    steps = accumulate(values.tolist(), lambda y, x: y + weight * (x - y))
    return np.fromiter(steps, dtype=np.float64, count=len(values))


def ema(values: Series, span: int) -> Series:
    """Return the exponential moving average with weight `2 / (span + 1)`, from the first value (`adjust=False`)."""
    return smooth(values, 2.0 / (span + 1))


def wilder(values: Series, period: int) -> Series:
    """Return Wilder's average, weight `1 / period`, from the first value (Wilder 1978, New Concepts)."""
    return smooth(values, 1.0 / period)


def true_range(high: Series, low: Series, close: Series) -> Series:
    """Return the true range, price units: `max(high, previous close) - min(low, previous close)` (Wilder 1978).

    Bar 0 has no previous close. Its range is high - low.
    """
    previous = np.concatenate([close[:1], close[:-1]])  # within bar 0: its range is high - low
    return np.maximum(high, previous) - np.minimum(low, previous)


def atr(high: Series, low: Series, close: Series, period: int = 14) -> Series:
    """Return the average true range, price units: Wilder's average of `true_range` from the first bar (Wilder 1978)."""
    return wilder(true_range(high, low, close), period)


def rsi(close: Series, period: int = 14) -> Series:
    """Return the relative strength index, 0 .. 100: `100 G / (G + L)`; 50 before the first movement (Wilder 1978).

    G and L are Wilder's averages of the rises and falls of the close. They start from the first change (bar
    1), not from a simple average over `period` bars. Bar 0 has no change and is NaN.
    """
    change = np.diff(close)
    gain, loss = wilder(change.clip(min=0.0), period), wilder((-change).clip(min=0.0), period)
    return np.concatenate([np.full(1, np.nan), 100.0 * ratio(gain, gain + loss, empty=0.5)])


def adx(high: Series, low: Series, period: int = 14) -> Series:
    """Return the average directional index, 0 .. 100 (Wilder 1978).

    With `up = high_i - high_{i-1}` and `down = low_{i-1} - low_i`, +DM is `up` if it is larger than `down` and
    positive, else 0. -DM is `down` if it is larger than `up` and positive, else 0. Both are 0 at bar 0.
    With P and M their Wilder averages from bar 0, `DX = 100 |P - M| / (P + M)`, and 0 where both are 0.
    ADX is Wilder's average of DX from bar 0. The average true range, the divisor of +DI and -DI, cancels in DX, so
    the close is not needed.
    """
    up, down = np.diff(high, prepend=high[:1]), -np.diff(low, prepend=low[:1])
    plus = wilder(np.where((up > down) & (up > 0), up, 0.0), period)
    minus = wilder(np.where((down > up) & (down > 0), down, 0.0), period)
    return wilder(100.0 * ratio(np.abs(plus - minus), plus + minus), period)


def macd(close: Series, fast: int = 12, slow: int = 26, signal: int = 9) -> tuple[Series, Series, Series]:
    """Return the MACD line `ema(fast) - ema(slow)`, its EMA (the signal), and line - signal, price units (Appel)."""
    line = ema(close, fast) - ema(close, slow)
    average = ema(line, signal)
    return line, average, line - average


def rolling_mean(values: Series, window: int) -> Series:
    """Return the mean of the last `window` values; NaN until the window is full."""
    return values + _reduce_windows(values, window, lambda from_last: from_last.mean(axis=1))


def rolling_std(values: Series, window: int) -> Series:
    """Return the population standard deviation (divided by `window`) of the last `window` values; NaN until full."""
    return _reduce_windows(values, window, _std)


def rolling_zscore(values: Series, window: int) -> Series:
    """Return `(value - mean) / std`, both over the last `window` values, its own included; 0 where std is 0."""
    return _reduce_windows(values, window, lambda from_last: ratio(-from_last.mean(axis=1), _std(from_last)))


def _std(from_last: np.ndarray) -> np.ndarray:
    """Return the standard deviation, [rows, window] -> [rows], in two passes: a large mean costs no digits."""
    centred = from_last - from_last.mean(axis=1, keepdims=True)
    return np.sqrt((centred * centred).mean(axis=1))


def _reduce_windows(values: Series, window: int, reduce: Callable[[np.ndarray], np.ndarray]) -> Series:
    """Apply `reduce` ([rows, window] -> [rows]) to each window, as differences from its last value.

    The differences are exactly 0 in a constant window. A mean of the values themselves might not equal the constant.
    """
    reduced = np.full_like(values, np.nan)
    if len(values) < window:
        return reduced
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    for start in range(0, len(windows), _CHUNK):
        chunk = windows[start : start + _CHUNK]
        first = start + window - 1
        reduced[first : first + len(chunk)] = reduce(chunk - chunk[:, -1:])
    return reduced
