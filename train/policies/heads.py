"""Distributions over the environment's actions."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax.rules.orders import CLOSE, DIRECTIONS, HOLD, MULTI_DISCRETE

_OFFSETS = tuple(int(x) for x in np.cumsum(MULTI_DISCRETE)[:-1])
_OPENS = tuple(d not in (HOLD, CLOSE) for d in DIRECTIONS)


class MultiDiscrete(NamedTuple):
    """A distribution over actions (direction, size, leverage, stop, target), each entry a categorical.

    Size, leverage, stop and target count in the probability and in the entropy only if the order opens a lot.
    Otherwise the environment ignores these entries, and they must not move the probability ratio of PPO.
    """

    log_probs: tuple[Float[Array, "*batch choices"], ...]

    @staticmethod
    def num_logits() -> int:
        """Return the number of logits, over all entries."""
        return sum(MULTI_DISCRETE)

    @classmethod
    def from_logits(cls, logits: Float[Array, "*batch logits"]) -> "MultiDiscrete":
        """Make one categorical for each entry of an action."""
        return cls(tuple(nn.log_softmax(x) for x in jnp.split(logits, _OFFSETS, axis=-1)))

    def sample(self, key: Array) -> Int[Array, "*batch 5"]:
        """Draw one action for each row: one uniform number an entry, through the inverse distribution function."""
        uniform = jax.random.uniform(key, (*self.log_probs[0].shape[:-1], len(self.log_probs)))

        def invert(log_prob: Array, u: Array) -> Array:
            below = jnp.cumsum(jnp.exp(log_prob), axis=-1)[..., :-1] <= u[..., None]
            return jnp.sum(below, axis=-1, dtype=jnp.int32)

        return jnp.stack([invert(p, uniform[..., i]) for i, p in enumerate(self.log_probs)], axis=-1)

    def mode(self) -> Int[Array, "*batch 5"]:
        """Return the most probable choice of each entry."""
        return jnp.stack([jnp.argmax(p, axis=-1).astype(jnp.int32) for p in self.log_probs], axis=-1)

    def log_prob(self, action: Int[Array, "*batch 5"]) -> Float[Array, "*batch"]:
        """Return the log probability of the entries that the environment reads, nats."""
        chosen = [
            jnp.sum(jnp.where(action[..., i, None] == jnp.arange(p.shape[-1]), p, 0), axis=-1)
            for i, p in enumerate(self.log_probs)
        ]
        opens = jnp.asarray(_OPENS)[action[..., 0]]
        return chosen[0] + jnp.where(opens, sum(chosen[1:]), 0)

    def entropy(self) -> Float[Array, "*batch"]:
        """Return the entropy, nats. The entries after the direction count by the probability of opening."""
        each = [-jnp.sum(jnp.exp(p) * p, axis=-1) for p in self.log_probs]
        opens = jnp.sum(jnp.exp(self.log_probs[0]) * jnp.asarray(_OPENS), axis=-1)
        return each[0] + opens * sum(each[1:])
