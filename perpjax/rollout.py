"""Whole episodes of one policy from given first bars, in one batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from perpjax.state import State
from perpjax.vec import AutoReset, Env, Episode, VecEnv, unwrapped

Act = Callable[[Array, State], Array]
"""(key, state) to an action."""


def window_starts(env: Env) -> Int[np.ndarray, "windows"]:
    """Return the first bars of the whole episodes that fit into the market's segments without overlap."""
    env = unwrapped(env)
    length, segments = env.config.episode_length, env.market.segments
    return np.concatenate(
        [
            np.arange(first, last + 2 - length, length)
            for first, last in zip(np.asarray(segments.first), np.asarray(segments.last), strict=True)
        ]
    )


def play_windows(env: Env, act: Act, key: Array, starts: Int[np.ndarray, "windows"]) -> Episode:
    """Play one episode from each first bar.

    Args:
      env: the market, parameters and choices to play on. An `AutoReset` or a `VecEnv` around it is ignored. Any
        other wrapper is a pytree and stays in place.
      act: the policy; a pytree of arrays (`jax.tree_util.Partial`) avoids a second compilation.
      key: source of all random numbers; windows do not share them.
      starts: first bars; see `window_starts`.

    Returns:
      The statistics of the episodes, [windows], each up to its own end.

    Raises:
      ValueError: a first bar that may not be traded.
    """
    unwrapped(env).check_start(starts)
    env = unwrapped(env, AutoReset, VecEnv)
    if not isinstance(act, jax.tree_util.Partial):
        act = jax.tree_util.Partial(act)
    return _play(env, act, key, jnp.asarray(starts))


@jax.jit
def _play(env: Env, act: Act, key: Array, starts: Int[Array, "windows"]) -> Episode:
    envs = VecEnv(AutoReset(env))
    state = envs.reset(jax.random.split(key, starts.shape[0]), starts)

    def step(carry: tuple, key: Array) -> tuple:
        state, done, kept = carry
        keys = jax.random.split(key, starts.shape[0])
        state = envs.step(state, jax.vmap(act, (0, envs.axes(state)))(keys, state))
        # In an episode of a VecEnv the windows are the last axis of everything.
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), kept, state.episode)
        return (state, done | state.terminated | state.truncated, kept), None

    done = jnp.zeros(starts.shape[0], bool)
    carry = (state, done, state.episode)
    (_, _, episode), _ = jax.lax.scan(step, carry, jax.random.split(key, unwrapped(env).config.episode_length))
    return envs.by_row(episode)
