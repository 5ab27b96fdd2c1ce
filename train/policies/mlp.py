"""A multilayer perceptron: two separate trunks, without memory."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Float

from train.policies.heads import MultiDiscrete
from train.policies.policy import Params


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

        return trunk(MultiDiscrete.num_logits(), 0.01, "actor"), trunk(1, 1.0, "critic")[..., 0]


@dataclasses.dataclass(frozen=True)
class MLP:
    """The default policy: an `ActorCritic` with a `MultiDiscrete` head; a `Policy` without memory.

    Attributes:
      hidden: widths of each trunk.
    """

    hidden: tuple[int, ...] = (64, 64)

    def init(self, key: Array, obs: Float[Array, "1 obs"]) -> Params:
        """Draw fresh parameters; the first distribution is almost uniform."""
        return ActorCritic(self.hidden).init(key, obs)

    def initial_carry(self, num_envs: int) -> tuple[()]:
        """Return `()`: there is no memory."""
        return ()

    def __call__(
        self, params: Params, carry: tuple[()], obs: Float[Array, "*batch obs"], reset: Bool[Array, "*batch"]
    ) -> tuple[tuple[()], MultiDiscrete, Float[Array, "*batch"]]:
        """Return the distribution and the value of each observation; `reset` changes nothing."""
        logits, value = ActorCritic(self.hidden).apply(params, obs)
        return carry, MultiDiscrete.from_logits(logits), value
