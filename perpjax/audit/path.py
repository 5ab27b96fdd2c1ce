"""Dependence on the path inside a candle: one policy on the same windows under the three intrabar rules."""

import dataclasses
from typing import get_args

import jax
import numpy as np
from jaxtyping import Float, Int
from rich.table import Table

from perpjax.audit.environment import replace_inner
from perpjax.audit.report import render
from perpjax.data.seeds import seed_key
from perpjax.params import Intrabar
from perpjax.rollout import Act, Carry, play_windows, window_starts
from perpjax.vec import Env, unwrapped


@dataclasses.dataclass(frozen=True)
class Play:
    """Results of the policy under one rule, each [windows]."""

    returns: Float[np.ndarray, "windows"]
    """Fractions of the initial equity."""
    liquidations: Float[np.ndarray, "windows"]
    stops: Float[np.ndarray, "windows"]
    targets: Float[np.ndarray, "windows"]
    ambiguous: Float[np.ndarray, "windows"]
    """Lots that ended in a candle that reached two or more of their levels, while its open reached none."""

    @property
    def ambiguous_share(self) -> float:
        """Return `ambiguous` over all lots ended by a price (liquidations + stops + targets), 0 .. 1; 0 without any.

        Lots closed by an order or a timeout, and lots still open, count in neither number.
        """
        ended = float((self.liquidations + self.stops + self.targets).sum())
        return float(self.ambiguous.sum()) / ended if ended else 0.0


@dataclasses.dataclass(frozen=True)
class PathSensitivity:
    """The same policy under `nearest`, `pessimistic` and `optimistic`; `str()` of it is a table."""

    plays: dict[Intrabar, Play]

    @property
    def ambiguous_share(self) -> float:
        """Return the share for `nearest`, the default rule: exits that the candles alone do not determine."""
        return self.plays["nearest"].ambiguous_share

    def mean_return(self, rule: Intrabar) -> tuple[float, float]:
        """Return the mean return of a window and its standard error (NaN with a single window)."""
        return estimate_mean(self.plays[rule].returns)

    def difference(self, rule: Intrabar) -> tuple[float, float]:
        """Return the mean paired difference of the returns from those of `nearest`, and its standard error."""
        return estimate_mean(self.plays[rule].returns - self.plays["nearest"].returns)

    def __str__(self) -> str:
        return render(tabulate(self))


def path_sensitivity(
    env: Env,
    policy: Act,
    *,
    carry: Carry | None = None,
    starts: Int[np.ndarray, "windows"] | None = None,
    seed: int = 0,
) -> PathSensitivity:
    """Play a policy under each intrabar rule, with the same random numbers from the same first bars.

    If the results agree, the candles are fine enough. The three results do not bracket the truth: a different exit
    changes the account, and the policy then trades differently.

    Args:
      env: the environment; its own intrabar rule is ignored. Wrappers as in `play_windows`.
      policy: `(key, state, carry)` to `(action, carry)`, of one environment.
      carry: the policy's memory at the start of a window.
      starts: first bars, by default of every window that fits without overlap.

    Raises:
      ValueError: a first bar that may not be traded, or a seed outside [-2^63, 2^63).
    """
    starts, inner = window_starts(env) if starts is None else starts, unwrapped(env)
    plays = {}
    for rule in get_args(Intrabar):
        ruled = replace_inner(env, config=dataclasses.replace(inner.config, intrabar=rule))
        episode = play_windows(ruled, policy, seed_key(seed), starts, carry)
        episode = jax.tree.map(lambda x: np.asarray(x, np.float64), episode)
        ledger = episode.ledger
        plays[rule] = Play(
            returns=episode.equity / float(inner.params.initial_equity) - 1,
            liquidations=ledger.liquidated,
            stops=ledger.stopped,
            targets=ledger.targets,
            ambiguous=ledger.ambiguous,
        )
    return PathSensitivity(plays)


def estimate_mean(x: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Return the mean and its standard error, NaN for a single value."""
    return float(np.mean(x)), float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def tabulate(found: PathSensitivity) -> Table:
    """Return a table with a row for each rule."""
    windows = len(found.plays["nearest"].returns)
    table = Table(title="Dependence on the path inside a candle", title_justify="left", caption_justify="left")
    table.caption = (
        f"{windows} windows; returns in % of initial equity, ± one standard error; the difference is paired by window. "
        "ambiguous: share of the lots ended by a price, in a candle that reached several of their levels."
    )
    table.add_column("rule", no_wrap=True)
    for head in ("return %", "less nearest", "liquidations", "stops", "targets", "ambiguous %"):
        table.add_column(head, justify="right", no_wrap=True)
    for rule, play in found.plays.items():
        (mean, error), (less, spread) = found.mean_return(rule), found.difference(rule)
        counts = (f"{x.sum():.0f}" for x in (play.liquidations, play.stops, play.targets))
        differs = "-" if rule == "nearest" else f"{100 * less:+.3f} ± {100 * spread:.3f}"
        share = f"{100 * play.ambiguous_share:.2f}"
        table.add_row(rule, f"{100 * mean:+.3f} ± {100 * error:.3f}", differs, *counts, share)
    return table
