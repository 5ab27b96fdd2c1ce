"""How many looks and policies stand behind a Sharpe ratio, from the ledger, and the ratio deflated by them.

The formulas are those of Bailey and Lopez de Prado: "The Sharpe Ratio Efficient Frontier" (2012), and "The Deflated
Sharpe Ratio" (2014). All ratios here are of daily returns and not annualised. The formulas know skew and kurtosis, and
no autocorrelation.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from perpjax.data.ledger import Ledger, same_symbol, spans_match, spans_touch

LEAST_DAYS = 60
"""Days below which no probability is stated."""
LEAST_COMMON_DAYS = 30
"""Days that two trials must share for a correlation; with fewer they count as independent."""
LEAST_CORRELATION = 0.5
"""Mean correlation above which clusters are one."""
_NORMAL = NormalDist()
DIARY = "The ledger is a diary and no proof: it knows no looks on other machines or at the source files."


def sharpe_of_days(returns: Sequence[float] | Float[np.ndarray, "days"]) -> float:
    """Return the Sharpe ratio of daily returns, not annualised; NaN for a curve that never moves."""
    returns = np.asarray(returns, float)
    std = returns.std(ddof=1) if len(returns) > 1 else 0.0
    return float(returns.mean() / std) if std > _least_std(returns) else math.nan


def _least_std(returns: Float[np.ndarray, "days"]) -> float:
    """A standard deviation below this is the rounding of a constant."""
    return 1e-12 * float(np.abs(returns).max(initial=0.0))


def probabilistic_sharpe(returns: Sequence[float] | Float[np.ndarray, "days"], benchmark: float = 0.0) -> float:
    """Return the probability that the true Sharpe ratio is above a benchmark; NaN for a curve that never moves.

    Args:
      returns: daily.
      benchmark: of daily returns, not annualised.
    """
    returns = np.asarray(returns, float)
    ratio = sharpe_of_days(returns)
    if len(returns) < 3 or math.isnan(ratio):
        return math.nan
    z = (returns - returns.mean()) / returns.std()
    return probabilistic_sharpe_of(ratio, len(returns), float(np.mean(z**3)), float(np.mean(z**4)), benchmark)


def probabilistic_sharpe_of(ratio: float, days: int, skew: float, kurtosis: float, benchmark: float = 0.0) -> float:
    """Return the probability from the moments of daily returns; the kurtosis of a normal distribution is 3."""
    variance = 1 - skew * ratio + (kurtosis - 1) / 4 * ratio**2
    if not variance > 0:
        return math.nan  # two values alone, in one ratio: the distribution of the estimate is degenerate
    return _NORMAL.cdf((ratio - benchmark) * math.sqrt((days - 1) / variance))


def expected_maximum_sharpe(trials: int, variance: float) -> float:
    """Return the Sharpe ratio to expect from the best of independent trials without skill.

    Args:
      trials: their number. With one trial nothing was selected, and it is 0.
      variance: of their Sharpe ratios.
    """
    if trials < 2 or not variance > 0:
        return 0.0
    gamma = float(np.euler_gamma)
    first, second = (_NORMAL.inv_cdf(1 - share / trials) for share in (1, 1 / math.e))
    return math.sqrt(variance) * ((1 - gamma) * first + gamma * second)


def deflated_sharpe(returns: Sequence[float] | Float[np.ndarray, "days"], trials: int, variance: float) -> float:
    """Return the probability that the true Sharpe ratio is above the one expected from selection alone.

    Args:
      returns: daily, of the selected trial.
      trials: as in `expected_maximum_sharpe`.
      variance: of the Sharpe ratios of all trials, daily and not annualised.
    """
    return probabilistic_sharpe(returns, expected_maximum_sharpe(trials, variance))


def count_clusters(curves: Sequence[Mapping[str, float]]) -> int:
    """Return the number of clusters of trials by the correlation of their daily returns.

    The method is average linkage (Sokal and Michener, 1958). The two clusters with the highest mean correlation between
    their members become one, as long as it is at least 0.5. Counting clusters in place of trials is the proposal of
    Lopez de Prado and Lewis, "Detection of false investment strategies using unsupervised learning methods" (2019).

    Args:
      curves: daily returns by date, one mapping for each trial. Curves that never move are one cluster.
    """
    moving = [curve for curve in curves if not math.isnan(sharpe_of_days(list(curve.values())))]
    still = int(len(moving) < len(curves))
    if len(moving) < 2:
        return len(moving) + still
    likeness = correlate(moving)
    np.fill_diagonal(likeness, -np.inf)
    sizes = np.ones(len(moving))
    clusters = len(moving)
    while clusters > 1:
        a, b = sorted(np.unravel_index(np.argmax(likeness), likeness.shape))
        if likeness[a, b] < LEAST_CORRELATION:
            break
        merged = (sizes[a] * likeness[a] + sizes[b] * likeness[b]) / (sizes[a] + sizes[b])
        merged[[a, b]] = -np.inf
        likeness[a], likeness[:, a] = merged, merged
        likeness[b], likeness[:, b] = -np.inf, -np.inf
        sizes[a] += sizes[b]
        clusters -= 1
    return clusters + still


def correlate(curves: Sequence[Mapping[str, float]]) -> Float[np.ndarray, "trials trials"]:
    """Return the correlation of every two curves over their common dates; 0 with fewer than 30 of them."""
    dates = {date: i for i, date in enumerate(sorted(set().union(*curves)))}
    values, known = np.zeros((2, len(curves), len(dates)))
    for row, curve in enumerate(curves):
        columns = [dates[date] for date in curve]
        numbers = np.fromiter(curve.values(), float)
        values[row, columns] = (numbers - numbers.mean()) / numbers.std()
        known[row, columns] = 1.0
    days = known @ known.T
    sums, squares = values @ known.T, values**2 @ known.T  # [i, j]: of curve i over the dates that j has, too
    with np.errstate(divide="ignore", invalid="ignore"):
        covariance = values @ values.T - sums * sums.T / days
        spread = np.maximum(squares - sums**2 / days, 0)
        found = covariance / np.sqrt(spread * spread.T)
        moving = np.minimum(spread, spread.T) > 1e-12 * days
    return np.where((days >= LEAST_COMMON_DAYS) & moving, np.clip(found, -1, 1), 0.0)


# The looks in the ledger.


def judge_trials(ledger: Ledger, look: Mapping[str, Any]) -> dict[str, Any]:
    """Enter an evaluation into the ledger, and return the section `trials` of its record; see docs/evaluation.md.

    Args:
      look: `run`, `step`, `split`, `settings` (hash of the settings with the seed, or None), `result` (hash of the
        record), `spans` (see `perpjax.data.dataset.find_spans`), `dates` (ISO) and `returns`, daily.

    Raises:
      ValueError: dates and returns differ in length, or a part is missing.
    """
    if missing := {"run", "step", "split", "settings", "result", "spans", "dates", "returns"} - look.keys():
        raise ValueError(f"a look at data lacks {', '.join(sorted(missing))}")
    if len(look["dates"]) != len(look["returns"]):
        raise ValueError(f"{len(look['dates'])} dates and {len(look['returns'])} daily returns: they must be as many")
    own = ledger.append({"kind": "evaluation"} | dict(look))
    entries = ledger.entries()
    # Another writer may have come between: only those before this look count.
    places = [i for i, entry in enumerate(entries) if entry.get("id") == own["id"]]
    entries = [*entries[: places[0]], own] if places else [*entries, own]
    spans, on_test = own["spans"], own["split"] == "test"

    seen = [entry for entry in entries if _is_evaluation(entry)]
    looks = [x for x in seen if x["split"] == own["split"] and spans_match(x["spans"], spans)]
    validation = [x for x in seen if x["split"] == "val" and _same_symbols(x, own)] if on_test else looks
    trials, judged = _keep_policies(validation), _keep_policies(looks)
    openings = [x for x in entries if x["kind"] == "opened" and x.get("split") == "test"]
    part = [x for x in seen if x not in looks and spans_touch(x["spans"], spans)]

    curves = [_read_curve(x) for x in trials]
    found: dict[str, Any] = {
        "look": len(looks), "trials": len(trials), "effective": count_clusters(curves), "policies": len(judged),
    }  # fmt: skip
    absent: dict[str, str] = {}
    names = ("probabilistic_sharpe", "deflated_sharpe") + ("deflated_sharpe_effective",) * (not on_test)
    returns = np.array([math.nan if x is None else x for x in own["returns"]], float)
    if why := _find_hindrance(returns):
        absent |= dict.fromkeys(names, why)
    else:
        ratios = np.array([sharpe_of_days(list(_read_curve(x).values())) for x in judged])
        ratios = ratios[np.isfinite(ratios)]
        variance = float(ratios.var(ddof=1)) if len(ratios) > 1 else 0.0
        found["probabilistic_sharpe"] = probabilistic_sharpe(returns)
        found["deflated_sharpe"] = deflated_sharpe(returns, len(judged), variance)
        if not on_test:
            found["deflated_sharpe_effective"] = deflated_sharpe(returns, found["effective"], variance)
    found["opened"] = sum(spans_match(x["spans"], spans) for x in openings) if on_test else None
    note = [_describe_look(found, own["split"])]
    if part:
        note.append(f"{_count(len(part), 'other evaluation')} saw some of these days.")
    if not places:
        note.append("This look could not be entered.")
    path = None if ledger.path is None else str(ledger.path)
    return found | {"absent": absent, "ledger": path, "note": " ".join([*note, DIARY])}


def _describe_look(found: Mapping[str, Any], split: str) -> str:
    """The sentence of every report."""
    name = {"val": "validation"}.get(split, split)
    text = f"Look number {found['look']} of this {name} split; {_count(found['trials'], 'trial')} on validation"
    if found["opened"]:
        text += f"; other programs loaded it {_count(found['opened'], 'time')}"
    return f"{text}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _find_hindrance(returns: Float[np.ndarray, "days"]) -> str | None:
    """The reason for which no probability is stated, or None."""
    if not np.isfinite(returns).all():
        return "a daily return is not a number"
    if len(returns) < LEAST_DAYS:
        return f"{len(returns)} days, under {LEAST_DAYS}"
    ratio = sharpe_of_days(returns)
    if math.isnan(ratio):
        return "equity never moved"
    return None if math.isfinite(probabilistic_sharpe(returns)) else "the returns take two values alone"


def _is_evaluation(entry: Mapping[str, Any]) -> bool:
    """Whether an entry is an evaluation with all that is read here."""
    dates, returns = entry.get("dates"), entry.get("returns")
    return (
        entry["kind"] == "evaluation"
        and isinstance(dates, list)
        and isinstance(returns, list)
        and len(dates) == len(returns)
        and all(x is None or isinstance(x, int | float) for x in returns)
        and all(isinstance(x, str) for x in dates)
        and {"split", "settings", "step", "result"} <= entry.keys()
    )


def _same_symbols(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return any(same_symbol(x, y) for x in a["spans"] for y in b["spans"])


def _keep_policies(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest entry of each policy: of one settings' hash and step, or of one result if there are no settings."""
    by_policy: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        known = (entry["settings"], entry["step"]) if entry["settings"] else (None, entry["result"])
        by_policy[repr(known)] = entry
    return list(by_policy.values())


def _read_curve(entry: Mapping[str, Any]) -> dict[str, float]:
    """The daily returns by date; those that are not numbers are left out."""
    pairs = zip(entry["dates"], entry["returns"], strict=True)
    return {date: float(x) for date, x in pairs if x is not None and math.isfinite(x)}
