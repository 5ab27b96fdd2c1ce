"""Policies that the trainer can learn.

To add one, write a frozen dataclass with `init`, `initial_carry` and `__call__`, as `policy.Policy` describes.
Return a distribution from `heads`, or one of your own with `sample`, `mode`, `log_prob` and `entropy`.
Then pass it to the trainer, `PPO(config, MyPolicy())`, or choose it in `make_policy` for the command line.
"""

from typing import Any

from train.policies.heads import MultiDiscrete
from train.policies.mlp import MLP
from train.policies.policy import Distribution, Policy, single_carry

__all__ = ["MLP", "Distribution", "MultiDiscrete", "Policy", "describe_policy", "make_policy", "single_carry"]


def make_policy(config: Any) -> Policy:
    """Return the policy of a run's settings (`train.ppo.Config`)."""
    return MLP(config.hidden)


def describe_policy(policy: Policy) -> str:
    """Return one phrase for people, such as "MLP hidden=(64, 64)"."""
    fields = ", ".join(f"{name}={value}" for name, value in vars(policy).items())
    return f"{type(policy).__name__} {fields}".strip()
