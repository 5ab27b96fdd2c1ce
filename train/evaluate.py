"""How a policy does on a market: whole episodes from evenly spaced first bars."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax import AutoReset, PerpEnv, State
from perpjax.orders import hold_action, sample_action
from perpjax.wrappers import Episode

Act = Callable[[Array, State], Array]
"""(key, state) to an action."""


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


def window_starts(env: PerpEnv) -> Int[np.ndarray, "windows"]:
    """First bars of the whole episodes that fit into the market's segments without overlap."""
    length, segments = env.config.episode_length, env.market.segments
    return np.concatenate(
        [
            np.arange(first, last + 2 - length, length)
            for first, last in zip(np.asarray(segments.first), np.asarray(segments.last), strict=True)
        ]
    )


def evaluate(env: PerpEnv, act: Act, key: Array, starts: Int[np.ndarray, "windows"] | None = None) -> Result:
    """Play one episode from each first bar, by default every window that fits without overlap.

    Args:
      env: the market, parameters and choices to evaluate on.
      act: the policy; a pytree of arrays (`jax.tree_util.Partial`) avoids a second compilation.
      starts: first bars.
    """
    starts = window_starts(env) if starts is None else starts
    env.check_start(starts)
    if not isinstance(act, jax.tree_util.Partial):
        act = jax.tree_util.Partial(act)
    episode = _play(env, act, key, jnp.asarray(starts))
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


@jax.jit
def _play(env: PerpEnv, act: Act, key: Array, starts: Int[Array, "windows"]) -> Episode:
    """The episodes' statistics, [windows]."""
    wrapped = AutoReset(env)

    def step(carry: tuple, key: Array) -> tuple:
        state, done, kept = carry
        keys = jax.random.split(key, starts.shape[0])
        state = jax.vmap(wrapped.step)(state, jax.vmap(act)(keys, state))
        kept = jax.tree.map(lambda old, new: jnp.where(_like(done, new), old, new), kept, state.episode)
        return (state, done | state.terminated | state.truncated, kept), None

    keys = jax.random.split(key, starts.shape[0])
    state = jax.vmap(wrapped.reset)(keys, starts)
    done = jnp.zeros(starts.shape[0], bool)
    carry = (state, done, state.episode)
    (_, _, episode), _ = jax.lax.scan(step, carry, jax.random.split(key, env.config.episode_length))
    return episode


def _like(mask: Array, x: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
