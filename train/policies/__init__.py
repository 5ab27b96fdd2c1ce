"""Policies that the trainer can learn: a perceptron, a recurrent one, or one of your own.

To add one, write a frozen dataclass with `init`, `initial_carry` and `__call__`, as `policy.Policy` describes.
Return a distribution from `heads`, or one of your own with `sample`, `mode`, `log_prob` and `entropy`.
Pass it to the trainer, `PPO(config, MyPolicy())`, or give `--policy module:function`, a function of the run's settings.
"""

import dataclasses
from typing import Any

from perpjax._importing import import_function
from train.policies.gru import GRU
from train.policies.heads import Box5, Box5Head, Head, MultiDiscrete, make_head
from train.policies.mlp import ACTIVATIONS, MLP
from train.policies.policy import Distribution, Policy, single_carry

__all__ = [
    "ACTIVATIONS", "GRU", "MLP", "Box5", "Box5Head", "Distribution", "Head", "MultiDiscrete", "Policy",
    "describe_policy", "make_head", "make_policy", "single_carry",
]  # fmt: skip


def make_policy(config: Any) -> Policy:
    """Return the policy of a run's settings (`train.ppo.Config`).

    Raises:
      ValueError: `config.policy` names no function, or one that returns no policy.
    """
    if config.policy is not None:
        return _check_policy(import_function(config.policy, "policy")(config), config.policy)
    head = make_head(config.env, config.params.max_leverage)
    if config.network == "gru":
        return GRU(config.hidden, config.gru_width, config.activation, config.shared_trunk, head, config.compute_dtype)
    return MLP(config.hidden, config.activation, config.shared_trunk, head, config.compute_dtype)


def _check_policy(policy: Any, spec: str) -> Policy:
    for name in ("init", "initial_carry", "__call__"):
        if not callable(getattr(policy, name, None)) or isinstance(policy, type):
            raise ValueError(f"policy {spec}: returned a {type(policy).__name__}, not a policy: it lacks {name}")
    try:
        hash(policy)
    except TypeError as error:
        raise ValueError(f"policy {spec}: is not hashable, as a frozen dataclass is: {error}") from None
    return policy


def describe_policy(policy: Policy) -> str:
    """Return one phrase for people, such as "MLP hidden=(64, 64)"; it leaves out the other defaults."""
    fields = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    values = {
        f.name: getattr(policy, f.name) for f in fields if f.name == "hidden" or f.default != getattr(policy, f.name)
    }
    return " ".join([type(policy).__name__, ", ".join(f"{name}={value}" for name, value in values.items())]).strip()
