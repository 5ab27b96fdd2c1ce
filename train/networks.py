"""The actor-critic, and the distribution over `multi_discrete` actions."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax.orders import CLOSE, DIRECTIONS, HOLD, MULTI_DISCRETE

_OFFSETS = tuple(int(x) for x in np.cumsum(MULTI_DISCRETE)[:-1])
_OPENS = tuple(d not in (HOLD, CLOSE) for d in DIRECTIONS)


class ActorCritic(nn.Module):
    """Two separate trunks, one for the logits and one for the value.

    Attributes:
      hidden: widths of each trunk.
      activation: between layers.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh

    @nn.compact
    def __call__(self, obs: Float[Array, "*batch obs"]) -> tuple[Float[Array, "*batch logits"], Float[Array, "*batch"]]:
        def trunk(width: int, scale: float, name: str) -> Array:
            x = obs
            for i, size in enumerate(self.hidden):
                x = nn.Dense(size, kernel_init=nn.initializers.orthogonal(np.sqrt(2)), name=f"{name}_{i}")(x)
                x = self.activation(x)
            return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale), name=f"{name}_out")(x)

        return trunk(sum(MULTI_DISCRETE), 0.01, "actor"), trunk(1, 1.0, "critic")[..., 0]


class Policy(NamedTuple):
    """A distribution over actions (direction, size, leverage, stop, target), each entry a categorical.

    Size, leverage, stop and target matter only to an order that opens a lot: they count in the probability and in the
    entropy only then. What the environment ignores must not move the ratio of PPO.
    """

    log_probs: tuple[Float[Array, "*batch choices"], ...]

    @classmethod
    def from_logits(cls, logits: Float[Array, "*batch logits"]) -> "Policy":
        """One categorical for each entry of an action."""
        return cls(tuple(nn.log_softmax(x) for x in jnp.split(logits, _OFFSETS, axis=-1)))

    def sample(self, key: Array) -> Int[Array, "*batch 5"]:
        """One action each, by inverting the distribution function: one uniform number an entry."""
        uniform = jax.random.uniform(key, (*self.log_probs[0].shape[:-1], len(self.log_probs)))

        def invert(log_prob: Array, u: Array) -> Array:
            below = jnp.cumsum(jnp.exp(log_prob), axis=-1)[..., :-1] <= u[..., None]
            return jnp.sum(below, axis=-1, dtype=jnp.int32)

        return jnp.stack([invert(p, uniform[..., i]) for i, p in enumerate(self.log_probs)], axis=-1)

    def mode(self) -> Int[Array, "*batch 5"]:
        """The most probable choice of each entry."""
        return jnp.stack([jnp.argmax(p, axis=-1).astype(jnp.int32) for p in self.log_probs], axis=-1)

    def log_prob(self, action: Int[Array, "*batch 5"]) -> Float[Array, "*batch"]:
        """Log probability of what the environment will see of an action."""
        chosen = [
            jnp.sum(jnp.where(action[..., i, None] == jnp.arange(p.shape[-1]), p, 0), axis=-1)
            for i, p in enumerate(self.log_probs)
        ]
        opens = jnp.asarray(_OPENS)[action[..., 0]]
        return chosen[0] + jnp.where(opens, sum(chosen[1:]), 0)

    def entropy(self) -> Float[Array, "*batch"]:
        """Entropy of the direction, and of the rest as far as it matters, nats."""
        each = [-jnp.sum(jnp.exp(p) * p, axis=-1) for p in self.log_probs]
        opens = jnp.sum(jnp.exp(self.log_probs[0]) * jnp.asarray(_OPENS), axis=-1)
        return each[0] + opens * sum(each[1:])
