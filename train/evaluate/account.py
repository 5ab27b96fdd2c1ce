"""One account over each whole segment of a market: its states, its equity and its actions."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax import PerpEnv
from perpjax.rollout import Act, as_pytree
from perpjax.state import State


class Played(NamedTuple):
    """One account from the first to the last bar of a segment, or to its ruin."""

    env: PerpEnv
    """With episodes as long as the segment."""
    states: State
    """[steps + 1, ...] NumPy arrays, without key."""
    actions: Int[np.ndarray, "steps 5"] | Float[np.ndarray, "steps 5"]
    symbol: str

    @property
    def steps(self) -> int:
        """Bars that were played."""
        return len(self.actions)

    def times(self) -> Int[np.ndarray, "rows"]:
        """Return the time of each state, UTC ms: the open of its bar."""
        first = int(self.states.t[0])
        return self.env.market.open_time_ms(first) + 900_000 * (self.states.t - first).astype(np.int64)


def play_account(env: PerpEnv, act: Act, key: Array) -> list[Played]:
    """Play one account over each segment of the environment's market.

    Args:
      env: the market, parameters and choices; its episode length is not used.
      act: the policy. Each account begins with `act.initial_carry()`, if there is such a method.
      key: of all random numbers.
    """
    function, carry = as_pytree(act)
    segments = jax.tree.map(np.asarray, env.market.segments)
    names = [origin.symbol for origin in env.market.origins]
    rows = [origin.row for origin in env.market.origins]
    played = []
    for i, (first, last) in enumerate(zip(segments.first.tolist(), segments.last.tolist(), strict=True)):
        whole = dataclasses.replace(env, config=dataclasses.replace(env.config, episode_length=last - first + 1))
        states, actions = _play(whole, function, jax.random.fold_in(key, i), jnp.int32(first), carry)
        over = np.asarray(states.terminated | states.truncated)
        steps = int(np.argmax(over)) if over.any() else len(over) - 1
        states = jax.tree.map(lambda x, n=steps: np.asarray(x)[: n + 1], states)
        symbol = names[max(k for k, row in enumerate(rows) if row <= first)]
        played.append(Played(whole, states, np.asarray(actions)[:steps], symbol))
    return played


@jax.jit
def _play(env: PerpEnv, act: Act, key: Array, start: Array, carry: object) -> tuple[State, Array]:
    """All states of the longest episode, the first included, and its actions."""
    first = env.reset(key, start)

    def step(loop: tuple, key: Array) -> tuple:
        state, carry = loop
        action, carry = act(key, state, carry)
        state = env.step(state, action)
        return (state, carry), (state.replace(key=None), action)

    keys = jax.random.split(key, env.config.episode_length)
    _, (states, actions) = jax.lax.scan(step, (first, carry), keys)
    states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first.replace(key=None), states)
    return states, actions
