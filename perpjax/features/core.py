"""The 31 core features, known at T_t, the open of bar t.

The shift by one bar happens here and nowhere else. Row t is computed from bars <= t-1, from funding settled
at or before T_t and from the clock at T_t. The builder appends the bar that is about to open, so the state
after the last bar has an observation too.
"""

import numpy as np
import pyarrow as pa

from perpjax._grid import BAR_MS, FIRST_DECISION
from perpjax.data import indicators as ind
from perpjax.data.contract import CANDLES, FUNDING, DataError, settlement_opens, validate
from perpjax.data.grid import append_next_bar

CORE_FEATURES: tuple[str, ...] = (
    "ret_1", "ret_4", "ret_16", "ret_48",
    "hl_range_pct", "oc_range_pct",
    "vol_16", "vol_96", "vol_672",
    "atr_14",
    "ema_20_dist", "ema_50_dist", "ema_200_dist",
    "ema_20_slope", "ema_50_slope",
    "adx_14", "rsi_14",
    "macd", "macd_signal", "macd_hist",
    "vol_log", "vol_z_96",
    "hour_sin", "hour_cos", "dow_sin", "dow_cos",
    "session_asia", "session_europe", "session_us",
    "funding_rate_now", "time_to_next_funding",
)  # fmt: skip
"""Names and order of the columns."""

WARMUP_BARS = FIRST_DECISION
"""First row in which every feature is defined: vol_672 needs 672 returns, that is 673 closes."""

LIVE_BARS = 800
"""Bars that a live runner keeps; `core_features_live` needs at least as many."""

LIVE_TOLERANCE: dict[str, float] = {name: 1e-9 for name in CORE_FEATURES} | {"ema_200_dist": 3e-4}
"""Bound on the absolute difference of `core_features_live` on 800 bars from the full history.

Only EMA 200 has a memory longer than 800 bars: `(1 - 2/201)^799 = 3.4e-4` of the distance between price
and EMA at the start of the buffer is left. Measured at every bar of BTC 2023-24, ORCA 2025-26 and NEAR 2025, the
differences are at most 5.3e-5, 2.2e-4 and 1.1e-4. All other features differ by at most 1e-14 (window features: by 0).
"""

_HOUR_MS = 3_600_000
_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday
_SESSIONS = {"session_asia": (0, 9), "session_europe": (7, 16), "session_us": (13, 22)}
_BARS_IN_8_HOURS = 32


def core_features(bars: pa.Table, funding: pa.Table | None = None) -> pa.Table:
    """Compute the core features of a series of 15-minute bars, float64, unscaled.

    The formulas, with their sources, stand in `perpjax.data.indicators`. These points complete them:

    - `vol_z_96` is `(volume - mean) / std` of the last bar's volume over the last 96 bars, itself included
      (population std). It is 0 where the volume is constant.
    - EMA and Wilder averages start from the first bar, so they are defined early and forget this start geometrically.
      In the first bar ADX has no directional movement. RSI starts from the first change.
    - Hour, day and session are those of T_t itself.
    - `funding_rate_now` is 0 before the first settlement. At a settlement's own T_t its rate is already the current
      one, because settlements are dated at the open of their bar (`settlement_opens`).
    - `time_to_next_funding` is 0 before the second settlement, which completes the first observed interval. It is also
      0 once the expected settlement is overdue.

    A column is NaN before its own warm-up. Its first defined row is k + 1 for ret_k, n + 1 for vol_n and 96 for
    vol_z_96. It is 2 for the EMA slopes and rsi_14, 0 for clock and funding, and 1 for all others. Row 673 is the first
    without any NaN.

    Args:
        bars: `CANDLES` table [N], stamps exactly 900_000 ms apart. An empty bar repeats the last
            close, with volume 0.
        funding: `FUNDING` table [M], or None for no funding (both funding columns 0).

    Returns:
        Table [N] of the 31 float64 columns `CORE_FEATURES`. Row t comes from bars <= t-1, so no row uses the last bar.
        For the features after it, append the bar that is about to open: `append_next_bar`.

    Raises:
        DataError: bars or funding break the contract, or bars have a hole. The message names the row and the value.
    """
    bars = validate(bars, CANDLES, "bars", interval_ms=BAR_MS)
    opens = bars["open_time_ms"].to_numpy()
    _require_no_hole(opens)
    after_bar = _bar_columns({name: bars[name].to_numpy() for name in CANDLES.names[1:]})
    columns = {name: np.concatenate([np.full(1, np.nan), values[:-1]]) for name, values in after_bar.items()}
    columns |= _clock_columns(opens) | _funding_columns(opens, funding)
    return pa.table({name: columns[name] for name in CORE_FEATURES})


VOLUME_FEATURES = ("vol_log", "vol_z_96")
"""The core features that read the volume."""


def price_features(bars: pa.Table, funding: pa.Table | None = None) -> pa.Table:
    """Compute the core features without those of volume, for candles of unknown volume; as `core_features`."""
    return core_features(bars, funding).drop_columns(list(VOLUME_FEATURES))


def core_features_live(bars_tail: pa.Table, funding: pa.Table | None = None) -> pa.Table:
    """Compute the current features from the last bars only, as a live runner does.

    Args:
        bars_tail: the last `LIVE_BARS` closed bars or more, as in `core_features`.
        funding: the settlements so far; only the last two matter.

    Returns:
        Table of one row and the columns `CORE_FEATURES`, known at the close of the last bar. `LIVE_TOLERANCE` bounds
        the difference, with 800 bars, from the full history.

    Raises:
        DataError: there are fewer than `LIVE_BARS` bars, or as in `core_features`.
    """
    if bars_tail.num_rows < LIVE_BARS:
        raise DataError(
            f"bars: {bars_tail.num_rows} rows are too few for live features (row {bars_tail.num_rows} is "
            f"missing); give the last {LIVE_BARS} bars or more"
        )
    return core_features(append_next_bar(bars_tail), funding).slice(bars_tail.num_rows)


def _bar_columns(bar: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the features known after each bar, [N]: row i from bars <= i."""
    open_, high, low, close, volume = (bar[name] for name in ("open", "high", "low", "close", "volume"))
    ret_1 = ind.log_return(close, 1)
    averages = {span: ind.ema(close, span) for span in (20, 50, 200)}
    macd, macd_signal, macd_hist = ind.macd(close)
    return {
        "ret_1": ret_1,
        **{f"ret_{k}": ind.log_return(close, k) for k in (4, 16, 48)},
        "hl_range_pct": (high - low) / close,
        "oc_range_pct": (close - open_) / open_,
        **{f"vol_{n}": ind.rolling_std(ret_1, n) for n in (16, 96, 672)},
        "atr_14": ind.atr(high, low, close, 14) / close,
        **{f"ema_{span}_dist": (close - average) / average for span, average in averages.items()},
        **{f"ema_{span}_slope": _slope(averages[span]) for span in (20, 50)},
        "adx_14": ind.adx(high, low, 14) / 100,
        "rsi_14": ind.rsi(close, 14) / 100,
        "macd": macd / close,
        "macd_signal": macd_signal / close,
        "macd_hist": macd_hist / close,
        "vol_log": np.log1p(volume),
        "vol_z_96": ind.rolling_zscore(volume, 96),
    }


def _slope(average: np.ndarray) -> np.ndarray:
    return np.concatenate([np.full(1, np.nan), average[1:] / average[:-1] - 1])


def _clock_columns(times: np.ndarray) -> dict[str, np.ndarray]:
    """Return the clock at each T_t, [N]: integer UTC hour over 24, weekday (Monday = 0) over 7, sessions 0 or 1."""
    hour = times // _HOUR_MS % 24
    weekday = (times // (24 * _HOUR_MS) + _MONDAY_OFFSET) % 7
    hour_angle, week_angle = 2 * np.pi * hour / 24, 2 * np.pi * weekday / 7
    return {
        "hour_sin": np.sin(hour_angle),
        "hour_cos": np.cos(hour_angle),
        "dow_sin": np.sin(week_angle),
        "dow_cos": np.cos(week_angle),
        **{name: ((hour >= first) & (hour < end)).astype(np.float64) for name, (first, end) in _SESSIONS.items()},
    }


def _funding_columns(times: np.ndarray, funding: pa.Table | None) -> dict[str, np.ndarray]:
    """Return the last settled rate and the expected time to the next settlement (8 hours = 1) at each T_t, [N]."""
    rate_now, to_next = np.zeros(len(times)), np.zeros(len(times))
    if funding is not None:
        funding = validate(funding, FUNDING, "funding")
        rates, settled = funding["funding_rate"].to_numpy(), settlement_opens(funding)
        last = np.searchsorted(settled, times, side="right") - 1
        has_rate, has_interval = last >= 0, last >= 1
        rate_now[has_rate] = rates[last[has_rate]]
        known, at = last[has_interval], times[has_interval]
        expected = settled[known] + (settled[known] - settled[known - 1])
        to_next[has_interval] = np.maximum(0, expected - at) / BAR_MS / _BARS_IN_8_HOURS
    return {"funding_rate_now": rate_now, "time_to_next_funding": to_next}


def _require_no_hole(opens: np.ndarray) -> None:
    hole = np.diff(opens) != BAR_MS
    if hole.any():
        row = int(np.argmax(hole)) + 1
        raise DataError(
            f"bars: row {row}: open_time_ms = {opens[row]} comes {opens[row] - opens[row - 1]} ms after the "
            f"row before, not {BAR_MS}; fill the hole with bars that repeat the last close with volume 0"
        )
