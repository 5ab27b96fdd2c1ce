"""Whole episodes of one policy from given first bars, in one batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from perpjax.state import State
from perpjax.vec import AutoReset, Env, Episode, VecEnv, unwrapped

Carry = Any
"""A policy's memory, a pytree of arrays; `()` if it has none."""
Act = Callable[[Array, State, Carry], tuple[Array, Carry]]
"""A policy in play: `(key, state, carry)` to `(action, carry)`, of one environment."""


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


def play_windows(
    env: Env, act: Act, key: Array, starts: Int[np.ndarray, "windows"], carry: Carry | None = None
) -> Episode:
    """Play one episode from each first bar.

    Args:
      env: the market, parameters and choices to play on. An `AutoReset` or a `VecEnv` around it is ignored. Any
        other wrapper is a pytree and stays in place.
      act: the policy. A pytree, such as a loaded policy or a `jax.tree_util.Partial`, avoids a second compilation.
      key: source of all random numbers; windows do not share them.
      starts: first bars; see `window_starts`.
      carry: the policy's memory at the start of a window. Every window begins with it and has its own afterwards.
        None: `act.initial_carry()` if there is such a method, else `()`.

    Returns:
      The statistics of the episodes, [windows], each up to its own end.

    Raises:
      ValueError: a first bar that may not be traded.
    """
    unwrapped(env).check_start(starts)
    env = unwrapped(env, AutoReset, VecEnv)
    act, carry = as_pytree(act, carry)
    return _play(env, act, key, jnp.asarray(starts), carry)


def as_pytree(act: Act, carry: Carry | None = None) -> tuple[Act, Carry]:
    """The policy as an argument of `jit`, and its first memory: `carry`, its own `initial_carry()`, or none."""
    if carry is None:
        carry = act.initial_carry() if hasattr(act, "initial_carry") else ()
    if jax.tree_util.all_leaves([act]):  # a plain function
        act = jax.tree_util.Partial(act)
    return act, carry


@jax.jit
def _play(env: Env, act: Act, key: Array, starts: Int[Array, "windows"], carry: Carry) -> Episode:
    envs = VecEnv(AutoReset(env))
    state = envs.reset(jax.random.split(key, starts.shape[0]), starts)

    def step(loop: tuple, key: Array) -> tuple:
        state, carry, done, kept = loop
        keys = jax.random.split(key, starts.shape[0])
        action, carry = jax.vmap(act, (0, envs.axes(state), 0))(keys, state, carry)
        state = envs.step(state, action)
        # In an episode of a VecEnv the windows are the last axis of everything.
        kept = jax.tree.map(lambda old, new: jnp.where(done, old, new), kept, state.episode)
        return (state, carry, done | state.terminated | state.truncated, kept), None

    carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (*starts.shape, *jnp.shape(x))), carry)
    loop = state, carry, jnp.zeros(starts.shape, bool), state.episode
    (*_, episode), _ = jax.lax.scan(step, loop, jax.random.split(key, unwrapped(env).config.episode_length))
    return envs.by_row(episode)
