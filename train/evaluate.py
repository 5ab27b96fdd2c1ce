"""How a policy does on a market: whole episodes from evenly spaced first bars."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax import PerpEnv
from perpjax.orders import hold_action, sample_action
from perpjax.rollout import Act, play_windows, window_starts


class Result(NamedTuple):
    """One number an episode, each [windows]; fractions of initial equity where not said otherwise."""

    returns: Float[np.ndarray, "windows"]
    max_drawdown: Float[np.ndarray, "windows"]
    """Fraction of the peak."""
    trades: Float[np.ndarray, "windows"]
    fees: Float[np.ndarray, "windows"]
    liquidations: Float[np.ndarray, "windows"]

    def t_stat(self) -> float:
        """Mean return over its standard error; 0 for no spread (a policy that never trades)."""
        return t_statistic(self.returns)


def t_statistic(x: Float[np.ndarray, "n"]) -> float:
    """Student's t of the mean against zero; 0 with fewer than two values or no spread."""
    if len(x) < 2 or np.std(x) == 0:
        return 0.0
    return float(np.mean(x) / (np.std(x, ddof=1) / np.sqrt(len(x))))


def hold(env: PerpEnv) -> Act:
    """Never trades."""
    action = hold_action(env.config)
    return lambda key, state: action


def random(env: PerpEnv) -> Act:
    """Uniform over actions."""
    return lambda key, state: sample_action(key, env.config)


def evaluate(env: PerpEnv, act: Act, key: Array, starts: Int[np.ndarray, "windows"] | None = None) -> Result:
    """Play one episode from each first bar, by default every window that fits without overlap.

    Args:
      env: the market, parameters and choices to evaluate on.
      act: the policy; a pytree of arrays (`jax.tree_util.Partial`) avoids a second compilation.
      starts: first bars.
    """
    starts = window_starts(env) if starts is None else starts
    episode = play_windows(env, act, key, starts)
    episode = jax.tree.map(lambda x: np.asarray(x, np.float64), episode)
    initial = float(env.params.initial_equity)
    ledger = episode.ledger
    return Result(
        returns=episode.equity / initial - 1,
        max_drawdown=episode.max_drawdown,
        trades=ledger.opened,
        fees=ledger.fees / initial,
        liquidations=ledger.liquidated,
    )
