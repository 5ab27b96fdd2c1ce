"""Distributions over the environment's actions, one for each codec of `perpjax.rules.orders`.

A log probability and an entropy count each outcome once that the environment tells apart, and nothing else.
Otherwise differences that change no order would move the probability ratio of PPO.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax import EnvConfig
from perpjax._pytree import pytree
from perpjax.rules.orders import CLOSE, DIRECTIONS, HOLD, LONG, MULTI_DISCRETE, SHORT, THRESHOLD
from train.policies.policy import Distribution

_OPENS = tuple(d not in (HOLD, CLOSE) for d in DIRECTIONS)
_COLUMNS = sum(MULTI_DISCRETE)

Column = Float[Array, "*batch"]


class Head(Protocol):
    """The way from a network's last layer to a distribution. It compares by value, as a policy does."""

    def num_logits(self) -> int:
        """Return the width of the last layer."""

    def from_logits(self, logits: Float[Array, "*batch logits"]) -> Distribution:
        """Return the distribution; with logits of 0 it is wide."""


def make_head(env: EnvConfig, max_leverage: float) -> Head:
    """Return the head of an environment's actions."""
    return Box5Head(float(max_leverage)) if env.actions == "box5" else MultiDiscrete


class MultiDiscrete(NamedTuple):
    """A distribution over actions (direction, size, leverage, stop, target), each entry a categorical.

    Size, leverage, stop and target count in the probability and in the entropy only if the order opens a lot.
    Otherwise the environment ignores these entries, and they must not move the probability ratio of PPO.

    Every choice is a column of its own, so that XLA makes one kernel of sampling and one of the loss. Reductions over
    an axis of four or five choices would be kernels of their own.
    """

    log_probs: tuple[tuple[Column, ...], ...]
    """By entry and choice, nats."""

    @staticmethod
    def num_logits() -> int:
        """Return the number of logits, over all entries."""
        return _COLUMNS

    @classmethod
    def from_logits(cls, logits: Float[Array, "*batch logits"]) -> "MultiDiscrete":
        """Make one categorical for each entry of an action."""
        columns = iter(jnp.squeeze(x, -1) for x in jax.lax.split(logits, (1,) * _COLUMNS, axis=logits.ndim - 1))
        return cls(tuple(_normalise([next(columns) for _ in range(n)]) for n in MULTI_DISCRETE))

    def sample(self, key: Array) -> Int[Array, "*batch 5"]:
        """Draw one action for each row: one uniform number an entry, through the inverse distribution function."""
        uniform = jax.random.uniform(key, (len(self.log_probs), *self.log_probs[0][0].shape))

        def invert(log_probs: tuple[Column, ...], u: Column) -> Int[Array, "*batch"]:
            below, choice = jnp.zeros_like(u), jnp.zeros_like(u, jnp.int32)
            for log_prob in log_probs[:-1]:
                below = below + jnp.exp(log_prob)
                choice = choice + (below <= u)
            return choice

        return jnp.stack([invert(p, u) for p, u in zip(self.log_probs, uniform, strict=True)], axis=-1)

    def mode(self) -> Int[Array, "*batch 5"]:
        """Return the most probable choice of each entry, the first of equals."""

        def find(log_probs: tuple[Column, ...]) -> Int[Array, "*batch"]:
            best, choice = log_probs[0], jnp.zeros_like(log_probs[0], jnp.int32)
            for i, log_prob in enumerate(log_probs[1:], 1):
                choice = jnp.where(log_prob > best, i, choice)
                best = jnp.maximum(log_prob, best)
            return choice

        return jnp.stack([find(p) for p in self.log_probs], axis=-1)

    def log_prob(self, action: Int[Array, "*batch 5"]) -> Column:
        """Return the log probability of the entries that the environment reads, nats."""

        def choose(values: Sequence[Any], index: Int[Array, "*batch"]) -> Array:
            chosen = jnp.zeros_like(index, jnp.result_type(values[0]))
            for i, value in enumerate(values):
                chosen = jnp.where(index == i, value, chosen)
            return chosen

        direction, *rest = (choose(p, action[..., i]) for i, p in enumerate(self.log_probs))
        return direction + jnp.where(choose(_OPENS, action[..., 0]), sum(rest), 0)

    def entropy(self) -> Column:
        """Return the entropy, nats. The entries after the direction count by the probability of opening."""
        direction, *rest = (-sum(jnp.exp(x) * x for x in p) for p in self.log_probs)
        opens = sum(jnp.exp(x) for x, does in zip(self.log_probs[0], _OPENS, strict=True) if does)
        return direction + opens * sum(rest)


def _normalise(logits: Sequence[Column]) -> tuple[Column, ...]:
    """The log probabilities of one categorical, a column for each choice."""
    largest = jax.lax.stop_gradient(functools.reduce(jnp.maximum, logits))
    shifted = [x - largest for x in logits]
    total = jnp.log(sum(jnp.exp(x) for x in shifted))
    return tuple(x - total for x in shifted)


_SIDES = (HOLD, LONG, SHORT)
_NEAREST = 1 - 1e-6
"""A drawn entry has at most this modulus: at 1 a density would be infinite."""
_FAR = 40.0
"""Stands for infinity on the logistic scale; a derivative there is 0 and not NaN."""
_ROUNDS = 16
"""Of the iteration that finds a mode."""
_NODES, _WEIGHTS = ((x + 1) / 2 if i == 0 else x / 2 for i, x in enumerate(np.polynomial.legendre.leggauss(16)))
"""Quadrature over the distribution function of a logistic variable."""


@dataclasses.dataclass(frozen=True)
class Box5Head:
    """The head of `box5`: three logits of the direction, then four locations and four scales.

    Attributes:
      max_leverage: of the environment; it says where leverage is rounded.
    """

    max_leverage: float

    def num_logits(self) -> int:
        """Return the width of the last layer."""
        return len(_SIDES) + 8

    def from_logits(self, logits: Float[Array, "*batch logits"]) -> "Box5":
        """Return the distribution. Locations lie within 5 of 0, and scales between e^-4 and 1.

        A location moves 5 times as far as its logit, so that it is learnt about as fast as a choice of few.
        """
        sides, location, scale = jnp.split(logits, (len(_SIDES), len(_SIDES) + 4), axis=-1)
        log_scale = 2 * jnp.tanh(1 + scale / 2) - 2
        return Box5(nn.log_softmax(sides), 5 * jnp.tanh(location), log_scale, self.max_leverage)


@pytree(static=("max_leverage",))
class Box5:
    """A distribution over actions (direction, size, leverage, stop, target), each entry in [-1, 1].

    The environment reads the direction by two thresholds, so it is a categorical over hold, long and short. An action
    has the middle of the interval. Each other entry is `tanh(x / 2)` of a logistic variable `x`. With location 0 and
    scale 1 that is uniform. Its distribution function has a closed form, unlike that of a Beta distribution.

    Size, stop and target count as densities over [-1, 1]. The environment rounds leverage to whole numbers, so leverage
    counts as the probability of its interval. The four entries count only if the direction opens a lot. With
    `opposite="close"` an order against the lots held closes them. That is the account's matter and not the action's:
    the distribution does not know the account, and such an order counts as one that opens.

    Attributes:
      sides: log probabilities of hold, long and short.
      location, log_scale: of `x` for size, leverage, stop and target.
      max_leverage: of the environment.
    """

    sides: Float[Array, "*batch 3"]
    location: Float[Array, "*batch 4"]
    log_scale: Float[Array, "*batch 4"]
    max_leverage: float

    def sample(self, key: Array) -> Float[Array, "*batch 5"]:
        """Draw one action for each row: one uniform number an entry, through the inverse distribution function."""
        uniform = jax.random.uniform(key, (*self.sides.shape[:-1], 5))
        below = jnp.cumsum(jnp.exp(self.sides), axis=-1)[..., :-1] <= uniform[..., :1]
        p = uniform[..., 1:]
        x = self.location + jnp.exp(self.log_scale) * (jnp.log(p) - jnp.log1p(-p))
        return _join(jnp.sum(below, axis=-1, dtype=jnp.int32), x)

    def mode(self) -> Float[Array, "*batch 5"]:
        """Return the most probable direction and leverage, and the mode of each other entry's density."""
        scale, x = jnp.exp(self.log_scale), self.location
        for _ in range(_ROUNDS):  # the slope of the log density is 0 there; a contraction, since the scale is below 1
            x = self.location + 2 * scale * jnp.arctanh(scale * jnp.tanh(x / 2))
        action = _join(jnp.argmax(self.sides, axis=-1), x)
        level = jnp.argmax(self._log_levels(), axis=-1) / max(self.max_leverage - 1, 1e-6)
        return action.at[..., 2].set(jnp.clip(2 * level - 1, -_NEAREST, _NEAREST))

    def log_prob(self, action: Float[Array, "*batch 5"]) -> Float[Array, "*batch"]:
        """Return the log probability (of size, stop and target the density) of the entries that are read, nats."""
        side = (action[..., 0] > THRESHOLD) * 1 - (action[..., 0] < -THRESHOLD) * 1
        chosen = jnp.sum(jnp.where(side[..., None] == jnp.asarray(_SIDES), self.sides, 0), axis=-1)
        entry = jnp.clip(action[..., 1:], -_NEAREST, _NEAREST)
        z = (2 * jnp.arctanh(entry) - self.location) * jnp.exp(-self.log_scale)
        # The derivative of x by the entry is 2 / (1 - entry^2).
        density = nn.log_sigmoid(z) + nn.log_sigmoid(-z) - self.log_scale + math.log(2) - jnp.log1p(-(entry**2))
        level = jnp.round(1 + (entry[..., 1] + 1) / 2 * (self.max_leverage - 1))
        level = jnp.minimum(level, self.num_levels)
        leverage = self._log_interval(self._edge(level - 1), self._edge(level))
        rest = density[..., 0] + leverage + density[..., 2] + density[..., 3]
        return chosen + jnp.where(side != HOLD, rest, 0)

    def entropy(self) -> Float[Array, "*batch"]:
        """Return the entropy, nats. The entries after the direction count by the probability of opening.

        That of size, stop and target is differential and a quadrature, to about 0.01.
        """
        p = jnp.exp(self.sides)
        x = self.location[..., None] + jnp.exp(self.log_scale)[..., None] * np.log(_NODES / (1 - _NODES))
        inside = jnp.sum(_WEIGHTS * (nn.log_sigmoid(x) + nn.log_sigmoid(-x)), axis=-1)
        density = 2 + self.log_scale + math.log(2) + inside
        log_p = self._log_levels()
        leverage = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        rest = density[..., 0] + leverage + density[..., 2] + density[..., 3]
        return -jnp.sum(p * self.sides, axis=-1) + (p[..., 1] + p[..., 2]) * rest

    @property
    def num_levels(self) -> int:
        """Whole leverages that an action can mean."""
        return math.ceil(self.max_leverage - 0.5)

    def _log_levels(self) -> Float[Array, "*batch levels"]:
        """The log probability of each whole leverage."""
        levels = jnp.arange(1.0, self.num_levels + 1)
        return self._log_interval(self._edge(levels - 1), self._edge(levels), (..., None))

    def _edge(self, level: Array) -> Array:
        """The `x` between a level of leverage and the next one, such as 2.5 between 2 and 3."""
        share = (level - 0.5) / max(self.max_leverage - 1, 1e-6)
        inside = (level >= 1) & (level < self.num_levels)
        share = jnp.where(inside, share, 0.5)
        x = jnp.log(share) - jnp.log1p(-share)
        return jnp.where(inside, x, jnp.where(level < 1, -_FAR, _FAR))

    def _log_interval(self, low: Array, high: Array, index: tuple = (...,)) -> Array:
        """The log probability that the `x` of leverage lies between; exact in the tails, too."""
        location, scale = self.location[..., 1][index], jnp.exp(self.log_scale[..., 1][index])
        low, high = (low - location) / scale, (high - location) / scale
        return nn.log_sigmoid(high) + nn.log_sigmoid(-low) + jnp.log(-jnp.expm1(low - high))


def _join(side: Int[Array, "*batch"], x: Float[Array, "*batch 4"]) -> Float[Array, "*batch 5"]:
    """An action from the index of its direction and the logistic variables of its other entries."""
    middle = (1 + THRESHOLD) / 2
    direction = jnp.where(side == 1, middle, jnp.where(side == 2, -middle, 0.0))
    return jnp.concatenate([direction[..., None], jnp.clip(jnp.tanh(x / 2), -_NEAREST, _NEAREST)], axis=-1)
