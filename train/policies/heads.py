"""Distributions over the environment's actions."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perpjax.rules.orders import CLOSE, DIRECTIONS, HOLD, MULTI_DISCRETE

_OPENS = tuple(d not in (HOLD, CLOSE) for d in DIRECTIONS)
_COLUMNS = sum(MULTI_DISCRETE)

Column = Float[Array, "*batch"]


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
