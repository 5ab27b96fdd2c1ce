"""Faults planted in the trainer, so that the ladder can show that it would notice them.

A fault is another loss, another advantage estimator or a wrapped environment. The trainer itself stays as it is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from perpjax import VecEnv
from perpjax._pytree import pytree
from perpjax.vec import EpisodeState
from train.policies.policy import Distribution
from train.ppo.algorithm import PPO
from train.ppo.config import Hyperparameters
from train.ppo.losses import Rows

Fault = Literal["advantage-sign", "stale-observations", "bootstrap-at-liquidation"]


def plant(fault: Fault | None, ppo: PPO, envs: VecEnv) -> tuple[PPO, Any]:
    """Return the algorithm and the environments with this fault; None changes nothing."""
    if fault == "advantage-sign":
        return dataclasses.replace(ppo, loss=negate_advantage(ppo.loss)), envs
    if fault == "stale-observations":
        return ppo, StaleObservations(envs)
    if fault == "bootstrap-at-liquidation":
        return dataclasses.replace(ppo, gae=bootstrap_ruin(ppo.gae)), envs
    return ppo, envs


def negate_advantage(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss that makes actions better than expected less likely."""

    def broken(distribution: Distribution, value: Array, rows: Rows, hyper: Hyperparameters) -> Any:
        return loss(distribution, value, rows._replace(advantage=-rows.advantage), hyper)

    return broken


def bootstrap_ruin(gae: Callable[..., Array]) -> Callable[..., Array]:
    """Return an estimator that treats ruin like a time limit: the value of the next episode counts after it."""

    def broken(
        reward: Array, value: Array, last_value: Array, final_value: Array, terminated: Array, truncated: Array,
        gamma: float, gae_lambda: float,
    ) -> Array:  # fmt: skip
        after = jnp.where(terminated, jnp.concatenate([value[1:], last_value[None]]), final_value)
        never = jnp.zeros_like(terminated)
        return gae(reward, value, last_value, after, never, terminated | truncated, gamma, gae_lambda)

    return broken


@pytree
class StaleObservations:
    """A wrapper around a `VecEnv` of auto-reset environments: every observation comes one step late."""

    env: VecEnv

    def reset(self, key: Array, start: Array | None = None) -> EpisodeState:
        """As the wrapped environments' `reset`."""
        return self.env.reset(key, start)

    def step(self, state: EpisodeState, action: Array) -> EpisodeState:
        """As the wrapped environments' `step`, with the observation of the step before."""
        return self.env.step(state, action).replace(obs=state.final_obs)
