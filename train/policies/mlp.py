"""A multilayer perceptron, without memory."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from train.policies.heads import Head, MultiDiscrete
from train.policies.policy import Distribution, Params

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "gelu": nn.gelu, "silu": nn.silu}
"""By the name on the command line."""


def encode(
    x: Float[Array, "*batch n"], hidden: tuple[int, ...], activation: Callable[[Array], Array], dtype: str, name: str
) -> Float[Array, "*batch m"]:
    """Apply the layers of a trunk, inside a compact flax module. Kernels are float32, and `dtype` multiplies them."""
    for i, size in enumerate(hidden):
        x = nn.Dense(size, kernel_init=nn.initializers.orthogonal(np.sqrt(2)), dtype=dtype, name=f"{name}_{i}")(x)
        x = activation(x)
    return x


def read_out(x: Float[Array, "*batch n"], width: int, scale: float, name: str) -> Float[Array, "*batch width"]:
    """Apply the last layer, in float32."""
    x = x.astype(jnp.float32)
    return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale), name=f"{name}_out")(x)


class ActorCritic(nn.Module):
    """Trunks, the logits and the value.

    Attributes:
      hidden: widths of each trunk.
      activation: between layers.
      shared: one trunk for logits and value instead of two.
      logits: number of logits.
      dtype: of the products in the trunks.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Callable[[Array], Array] = nn.tanh
    shared: bool = False
    logits: int = MultiDiscrete.num_logits()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, obs: Float[Array, "*batch obs"]) -> tuple[Float[Array, "*batch logits"], Float[Array, "*batch"]]:
        names = ("trunk",) if self.shared else ("actor", "critic")
        features = [encode(obs, self.hidden, self.activation, self.dtype, name) for name in names]
        logits = read_out(features[0], self.logits, 0.01, "actor")
        return logits, read_out(features[-1], 1, 1.0, "critic")[..., 0]


@dataclasses.dataclass(frozen=True)
class MLP:
    """The default policy: an `ActorCritic`; a `Policy` without memory.

    Attributes:
      hidden: widths of each trunk.
      activation: a name in `ACTIVATIONS`.
      shared: one trunk for logits and value instead of two.
      head: of the environment's actions.
      compute_dtype: of the products in the trunks, "float32" or "bfloat16". Everything else is float32.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    shared: bool = False
    head: Head = MultiDiscrete
    compute_dtype: str = "float32"

    def init(self, key: Array, obs: Float[Array, "1 obs"]) -> Params:
        """Draw fresh parameters; the first distribution is wide, and almost the same for each observation."""
        return self._module().init(key, obs)

    def initial_carry(self, num_envs: int) -> tuple[()]:
        """Return `()`: there is no memory."""
        return ()

    def __call__(
        self, params: Params, carry: tuple[()], obs: Float[Array, "*batch obs"], reset: Bool[Array, "*batch"]
    ) -> tuple[tuple[()], Distribution, Float[Array, "*batch"]]:
        """Return the distribution and the value of each observation; `reset` changes nothing."""
        logits, value = self._module().apply(params, obs)
        return carry, self.head.from_logits(logits), value

    def _module(self) -> ActorCritic:
        activation = ACTIVATIONS[self.activation]
        return ActorCritic(self.hidden, activation, self.shared, self.head.num_logits(), self.compute_dtype)
