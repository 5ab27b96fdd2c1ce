"""An environment that compiles in no time, for tests of the trainer."""

import jax
import jax.numpy as jnp
import numpy as np

from perpjax import AutoReset, VecEnv
from perpjax._pytree import pytree
from perpjax.rules.observation import ACCOUNT_FEATURES
from perpjax.rules.orders import DIRECTIONS
from perpjax.state import State, open_account

LENGTH = 16
"""Bars of an episode."""


@pytree(static=("length",))
class Toy:
    """A long earns `move[t]`, a short loses it; `ruin[t]` ends the episode."""

    move: jax.Array
    ruin: jax.Array
    factor: jax.Array
    """Unit of the reward."""
    length: int = LENGTH

    num_market_features = 2

    def observe(self, t):
        return jnp.concatenate([jnp.stack([jnp.sign(self.move[t]), jnp.sin(t * 1.0)]), jnp.ones(len(ACCOUNT_FEATURES))])

    def reset(self, key, start=None):
        key, draw = jax.random.split(key)
        t = jax.random.randint(draw, (), 0, self.move.shape[0] - self.length) if start is None else jnp.asarray(start)
        no, one = jnp.zeros((), bool), jnp.ones((), jnp.float32)
        end, row = t + self.length, jnp.zeros((), jnp.int32)
        return State(t, self.observe(t), one * 0, no, no, one, open_account(one, 1), key, end, row)

    def step(self, state, action):
        side = (action[0] == DIRECTIONS.index(1)) * 1.0 - (action[0] == DIRECTIONS.index(-1)) * 1.0
        reward, ruin = side * self.move[state.t], self.ruin[state.t]
        return state.replace(
            t=state.t + 1, obs=self.observe(state.t + 1), reward=reward * self.factor, terminated=ruin,
            truncated=~ruin & (state.t + 1 >= state.end), equity=state.equity * jnp.exp(reward),
        )  # fmt: skip


def toy(ruin: tuple[int, ...] = (), factor: float = 1.0, bars: int = 400) -> VecEnv:
    """Many of them, with auto-reset, on a random series."""
    move = np.random.default_rng(0).choice([-1e-4, 1e-4], bars + 1)
    ends = np.isin(np.arange(bars + 1), ruin)
    return VecEnv(AutoReset(Toy(jnp.asarray(move, jnp.float32), jnp.asarray(ends), jnp.float32(factor))))


@pytree(static=("length",))
class Recall(Toy):
    """`move` has a sign for each episode. The first observation shows it, and the last step pays for a side like it.

    Nothing tells the time but a mark at the last step.
    """

    def observe(self, t):
        place, cue = t % self.length, self.move[t // self.length]
        seen = jnp.stack([jnp.where(place == 0, cue, 0.0), jnp.where(place == self.length - 1, 1.0, 0.0)])
        return jnp.concatenate([seen, jnp.zeros(len(ACCOUNT_FEATURES))])

    def reset(self, key, start=None):
        key, draw = jax.random.split(key)
        return super().reset(key, self.length * jax.random.randint(draw, (), 0, self.move.shape[0] - 1))

    def step(self, state, action):
        side = (action[0] == DIRECTIONS.index(1)) * 1.0 - (action[0] == DIRECTIONS.index(-1)) * 1.0
        is_last = state.t % self.length == self.length - 1
        reward = jnp.where(is_last, side * self.move[state.t // self.length], 0.0)
        no = jnp.zeros((), bool)
        return state.replace(
            t=state.t + 1, obs=self.observe(state.t + 1), reward=reward, terminated=no,
            truncated=state.t + 1 >= state.end,
        )  # fmt: skip


def recall(length: int, episodes: int = 64) -> VecEnv:
    """Many of them, with auto-reset."""
    cue = jnp.asarray(np.random.default_rng(0).choice([-1.0, 1.0], episodes + 1), jnp.float32)
    return VecEnv(AutoReset(Recall(cue, jnp.zeros(episodes + 1, bool), jnp.float32(1), length)))
