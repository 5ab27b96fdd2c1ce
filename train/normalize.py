"""Running moments, kept in the train state."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

CLIP = 10.0
"""Normalised values are clipped to plus and minus this."""


class Moments(NamedTuple):
    """Mean and variance of all rows seen so far."""

    mean: Float[Array, "*shape"]
    var: Float[Array, "*shape"]
    count: Float[Array, ""]

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Moments":
        """Return mean 0 and variance 1; the first update replaces both."""
        return cls(jnp.zeros(shape), jnp.ones(shape), jnp.float32(0))

    def update(self, rows: Float[Array, "*rows shape"]) -> "Moments":
        """Add a batch; all leading axes are rows (Chan, Golub and LeVeque, 1983)."""
        axes = tuple(range(rows.ndim - self.mean.ndim))
        count = jnp.float32(rows.size // max(self.mean.size, 1))
        delta = jnp.mean(rows, axis=axes) - self.mean
        total = self.count + count
        spread = self.var * self.count + jnp.var(rows, axis=axes) * count
        return Moments(
            self.mean + delta * count / total, (spread + delta**2 * self.count * count / total) / total, total
        )

    def standardise(self, x: Float[Array, "*rows shape"]) -> Float[Array, "*rows shape"]:
        """Return `(x - mean) / std`, clipped."""
        return jnp.clip((x - self.mean) / jnp.sqrt(self.var + 1e-8), -CLIP, CLIP)

    def scale(self, x: Float[Array, "*rows shape"]) -> Float[Array, "*rows shape"]:
        """Return `x / std`, clipped."""
        return jnp.clip(x / jnp.sqrt(self.var + 1e-12), -CLIP, CLIP)
