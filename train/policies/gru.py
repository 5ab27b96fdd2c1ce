"""A gated recurrent unit (Cho et al., 2014, arXiv:1406.1078) after a perceptron: a policy with memory."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from train.policies.heads import Head, MultiDiscrete
from train.policies.mlp import ACTIVATIONS, encode, read_out
from train.policies.policy import Distribution, Params

Memory = dict[str, Float[Array, "*batch width"]]
"""The state of each trunk's unit, by the name of the trunk."""


class RecurrentActorCritic(nn.Module):
    """Trunks with a unit each, the logits and the value. The attributes are those of `GRU`."""

    hidden: tuple[int, ...]
    activation: Callable[[Array], Array]
    logits: int
    dtype: str

    @nn.compact
    def __call__(
        self, memory: Memory, obs: Float[Array, "*batch obs"]
    ) -> tuple[Memory, Float[Array, "*batch logits"], Float[Array, "*batch"]]:
        following = {}
        for name, h in memory.items():
            x = encode(obs, self.hidden, self.activation, self.dtype, name)
            h, _ = nn.GRUCell(h.shape[-1], dtype=self.dtype, name=f"{name}_gru")(h, x)
            following[name] = h.astype(jnp.float32)
        actor, critic = following.get("actor"), following.get("critic")
        if "trunk" in following:
            actor = critic = following["trunk"]
        logits = read_out(actor, self.logits, 0.01, "actor")
        return following, logits, read_out(critic, 1, 1.0, "critic")[..., 0]


@dataclasses.dataclass(frozen=True)
class GRU:
    """A recurrent policy. Gradients reach back to the first step of a rollout.

    Attributes:
      hidden: widths of the perceptron before each unit; may be empty.
      width: of each unit's memory.
      activation: a name in `mlp.ACTIVATIONS`, for the perceptron.
      shared: one trunk for logits and value instead of two.
      head: of the environment's actions.
      compute_dtype: of the products in the trunks, "float32" or "bfloat16". The memory is float32.
    """

    hidden: tuple[int, ...] = (64,)
    width: int = 64
    activation: str = "tanh"
    shared: bool = False
    head: Head = MultiDiscrete
    compute_dtype: str = "float32"

    def init(self, key: Array, obs: Float[Array, "1 obs"]) -> Params:
        """Draw fresh parameters; the first distribution is wide, and almost the same for each observation."""
        return self._module().init(key, self.initial_carry(1), obs)

    def initial_carry(self, num_envs: int) -> Memory:
        """Return zeros, [num_envs, width], for each trunk."""
        names = ("trunk",) if self.shared else ("actor", "critic")
        return {name: jnp.zeros((num_envs, self.width)) for name in names}

    def __call__(
        self, params: Params, carry: Memory, obs: Float[Array, "*batch obs"], reset: Bool[Array, "*batch"]
    ) -> tuple[Memory, Distribution, Float[Array, "*batch"]]:
        """Take one step, with zeros for the memory where `reset`."""
        memory = {name: jnp.where(jnp.asarray(reset)[..., None], 0, h) for name, h in carry.items()}
        memory, logits, value = self._module().apply(params, memory, obs)
        return memory, self.head.from_logits(logits), value

    def _module(self) -> RecurrentActorCritic:
        return RecurrentActorCritic(
            self.hidden, ACTIVATIONS[self.activation], self.head.num_logits(), self.compute_dtype
        )
