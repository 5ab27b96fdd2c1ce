"""Measures of an equity curve and of its lots. A number without a meaning is absent, with the reason beside it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from train.evaluate.bootstrap import compound, deepest_falls, find_interval, sharpe_ratios
from train.evaluate.lots import COSTS

DAY_MS = 86_400_000
YEAR_DAYS = 365
LEAST_DAYS_OF_SHARPE, LEAST_DAYS_OF_YEAR = 30, 180


def day_closes(times: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "closes"]:
    """Return the first row, and the last one of each UTC day."""
    day = (times[1:] - 1) // DAY_MS  # the value at midnight closes the day before
    return np.concatenate([[0], np.flatnonzero(np.diff(day)) + 1, [len(day)]])


def daily_returns(times: Int[np.ndarray, "rows"], equity: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "days"]:
    """Return the returns between UTC midnights. The parts of days at both ends count as days of their own.

    Args:
      times: of each value, UTC ms, ascending.
      equity: not negative. After 0 the returns are 0.
    """
    closes = equity[day_closes(times)]
    return np.divide(closes[1:], closes[:-1], out=np.ones(len(closes) - 1), where=closes[:-1] > 0) - 1


class Curve(NamedTuple):
    """The equity of one account."""

    symbol: str
    times: Int[np.ndarray, "rows"]
    """UTC ms, ascending."""
    equity: Float[np.ndarray, "rows"]


def combine_curves(curves: Sequence[Curve]) -> tuple[Int[np.ndarray, "times"], Float[np.ndarray, "times"]]:
    """Return one curve of all accounts, from 1: the same money for each symbol, and its segments one after another.

    Between its segments, before the first and after the last one, the money of a symbol lies still.
    """
    times, parts = np.unique(np.concatenate([curve.times for curve in curves])), []
    for symbol in dict.fromkeys(curve.symbol for curve in curves):
        value, known, level = np.ones(len(times)), 0, 1.0
        for curve in (curve for curve in curves if curve.symbol == symbol):
            start, stop = np.searchsorted(times, (curve.times[0], curve.times[-1]))
            value[known:start] = level
            within = np.searchsorted(curve.times, times[start : stop + 1], side="right") - 1
            value[start : stop + 1] = level * curve.equity[within] / curve.equity[0]
            known, level = stop + 1, value[stop]
        value[known:] = level
        parts.append(value)
    return times, np.mean(parts, axis=0)


def utc_days(times: Int[np.ndarray, "rows"]) -> list[str]:
    """Return the dates of `daily_returns`."""
    days = np.unique((times[1:] - 1) // DAY_MS)
    return [str(day) for day in days.astype("datetime64[D]")]


def sharpe(returns: Float[np.ndarray, "days"]) -> tuple[float, float]:
    """Return the Sharpe ratio of daily returns over a rate of 0, times the root of 365, and its standard error.

    The error is that of Lo, "The Statistics of Sharpe Ratios" (2002), by the delta method: the long-run variance of the
    influence of each day, with the weights of Newey and West (1987). So it knows skew, kurtosis and autocorrelation.
    """
    n, mean, std = len(returns), returns.mean(), returns.std(ddof=1)
    if not std > 0:
        return math.nan, math.nan
    ratio, z = mean / std, (returns - mean) / std
    influence = z - ratio / 2 * (z**2 - 1)
    lags = int(4 * (n / 100) ** (2 / 9))
    variance = np.mean(influence**2)
    for lag in range(1, lags + 1):
        variance += 2 * (1 - lag / (lags + 1)) * np.sum(influence[lag:] * influence[:-lag]) / n
    return ratio * math.sqrt(YEAR_DAYS), math.sqrt(max(variance, 0) / n * YEAR_DAYS)


def sortino(returns: Float[np.ndarray, "days"]) -> float:
    """Return the mean over the root mean square of the negative returns, times the root of 365 (Sortino, 1994)."""
    downside = math.sqrt(np.mean(np.minimum(returns, 0) ** 2))
    return float(returns.mean() / downside * math.sqrt(YEAR_DAYS)) if downside > 0 else math.nan


def drawdown(equity: Float[np.ndarray, "rows"]) -> tuple[float, int]:
    """Return the deepest fall from a peak, a fraction, and the most rows below an earlier peak in a row."""
    peak = np.maximum.accumulate(equity)
    under = equity < peak
    edges = np.flatnonzero(np.diff(np.concatenate([[0], under.astype(np.int8), [0]])))
    return float(np.max(1 - equity / peak)), int(max(edges[1::2] - edges[::2], default=0))


def measure_equity(times: Int[np.ndarray, "rows"], equity: Float[np.ndarray, "rows"]) -> dict[str, Any]:
    """Return the measures of one equity curve; `absent` says why a number is missing."""
    returns, days = daily_returns(times, equity), (times[-1] - times[0]) / DAY_MS
    fall, rows = drawdown(equity)
    found: dict[str, Any] = {
        "days": float(days), "return": float(equity[-1] / equity[0] - 1), "max_drawdown": fall,
        "longest_drawdown_days": rows * 900_000 / DAY_MS,
    }  # fmt: skip
    absent: dict[str, str] = {}
    if days >= LEAST_DAYS_OF_SHARPE and returns.std() > 0:
        ratio, error = sharpe(returns)
        found |= {
            "volatility": float(returns.std(ddof=1) * math.sqrt(YEAR_DAYS)),
            "sharpe": ratio,
            "sharpe_error": error,
        }
        if math.isfinite(sortino(returns)):
            found["sortino"] = sortino(returns)
    else:
        why = "equity never moved" if not returns.std() > 0 else f"{days:.0f} days, under {LEAST_DAYS_OF_SHARPE}"
        absent |= dict.fromkeys(("volatility", "sharpe", "sortino"), why)
    if days >= LEAST_DAYS_OF_YEAR and equity[-1] > 0:
        found["annual_return"] = float((equity[-1] / equity[0]) ** (YEAR_DAYS / days) - 1)
        if fall > 0:
            found["calmar"] = found["annual_return"] / fall
    else:
        absent |= dict.fromkeys(("annual_return", "calmar"), f"{days:.0f} days, under {LEAST_DAYS_OF_YEAR}")
    intervals = {
        name: interval
        for name, statistic in (("return", compound), ("sharpe", sharpe_ratios), ("max_drawdown", deepest_falls))
        if (name in found or name == "return") and (interval := find_interval(statistic, returns))
    }
    return found | {"intervals": intervals, "absent": absent}


def measure_lots(lots: pa.Table, days: float) -> dict[str, Any]:
    """Return counts, rates and averages of the lots; empty without one."""
    if lots.num_rows == 0 or not days > 0:
        return {"lots": lots.num_rows}
    net, bars = (lots[name].to_numpy() for name in ("net", "bars"))
    won, lost = net[net > 0].sum(), -net[net < 0].sum()
    ordered = np.sort(net)
    held = np.asarray(lots["reason"]) == "open"
    reasons = pc.value_counts(lots["reason"]).to_pylist()
    found = {
        "lots": lots.num_rows, "lots_a_week": lots.num_rows / days * 7,
        "turnover_a_week": float(pc.sum(lots["notional"]).as_py() * 2 / days * 7),
        "win_rate": float(np.mean(net > 0)), "expectancy": float(net.mean()),
        "tail_loss": float(ordered[: max(1, len(net) // 20)].mean()),
        "mean_bars": float(bars.mean()), "median_bars": float(np.median(bars)),
        "exits": {item["values"]: item["counts"] for item in reasons},
        "best_three_net": float(ordered[-3:].sum()), "open_net": float(net[held].sum()),
        "long": int(pc.sum(pc.equal(lots["side"], "long")).as_py()),
    }  # fmt: skip
    return found | ({"profit_factor": float(won / lost)} if lost > 0 else {})


def measure_round_trips(lots: pa.Table) -> dict[str, float]:
    """Return the way of a mean lot, in basis points of its notional; empty without one.

    `gross` is before everything, `cost` is slippage, gap losses and fees, `funding` is paid if positive, and
    `liquidation` is forfeited less forgiven.
    """
    notional = float(pc.sum(lots["notional"]).as_py() or 0.0)
    if not notional > 0:
        return {}
    total = {name: 1e4 * float(pc.sum(lots[name]).as_py()) / notional for name in ("gross", *COSTS)}
    return {
        "gross": total["gross"], "cost": total["slippage"] + total["gap_losses"] + total["fees"],
        "funding": total["funding"], "liquidation": total["forfeited"] - total["forgiven"],
    }  # fmt: skip


def make_waterfall(lots: pa.Table) -> dict[str, float]:
    """Return the way from gross to net over all lots, quote. It is summed from the lots and never a residual."""
    total = {name: float(pc.sum(lots[name]).as_py() or 0.0) for name in ("gross", *COSTS, "net")}
    signs = {"gross": 1, "forgiven": 1, "net": 1}
    return {name: signs.get(name, -1) * value for name, value in total.items()}


def count_verdicts(ledgers: Sequence[Any], names: Sequence[str]) -> dict[str, int]:
    """Return how many orders met each verdict, over all accounts; those that never occurred are left out."""
    total = np.sum([np.asarray(ledger.verdicts)[-1] for ledger in ledgers], axis=0)
    return {name: int(n) for name, n in zip(names, total, strict=True) if n}
