"""The protocol between the trainer and a policy."""

from typing import Any, Protocol

import jax
from jaxtyping import Array, Bool, Float

Params = Any
"""A pytree of arrays that the optimiser changes."""
Carry = Any
"""A policy's memory: a pytree of arrays [envs, ...]. `()` means that the policy has none."""


class Distribution(Protocol):
    """A distribution over actions; a pytree of arrays."""

    def sample(self, key: Array) -> Array:
        """Draw one action for each row, [*batch, entries]."""

    def mode(self) -> Array:
        """Return the greedy action of each row, [*batch, entries]."""

    def log_prob(self, action: Array) -> Float[Array, "*batch"]:
        """Return the log probability of each action, nats."""

    def entropy(self) -> Float[Array, "*batch"]:
        """Return the entropy of each row, nats."""


class Policy(Protocol):
    """A network with an actor and a critic, as functions of its parameters.

    A policy is hashable and compares by value, as a frozen dataclass does: it is part of the compiled program.
    """

    def init(self, key: Array, obs: Float[Array, "1 obs"]) -> Params:
        """Draw fresh parameters for observations of this shape."""

    def initial_carry(self, num_envs: int) -> Carry:
        """Return the memory at the start of an episode, [num_envs, ...]; `()` for a policy without memory."""

    def __call__(
        self, params: Params, carry: Carry, obs: Float[Array, "*batch obs"], reset: Bool[Array, "*batch"]
    ) -> tuple[Carry, Distribution, Float[Array, "*batch"]]:
        """Take one step.

        Args:
          params: from `init`.
          carry: memory before this step, [*batch, ...].
          obs: standardised observations. The batch may have any number of axes, or none.
          reset: marks the environments where an episode begins with this observation. The policy replaces their memory
            by the initial one before it reads the observation.

        Returns:
          The memory after this step, the distribution over actions, and the value of the observation.
        """


def single_carry(policy: Policy) -> Carry:
    """Return the initial memory of one environment, without a batch axis."""
    return jax.tree.map(lambda x: x[0], policy.initial_carry(1))
