"""Trainers broken on purpose: each replaces one function, so that the ladder can show that it would notice."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from perpjax import AutoReset
from perpjax.wrappers import EpisodeState
from train import ppo

Fault = Literal["advantage-sign", "stale-observations", "bootstrap-at-liquidation"]


@contextlib.contextmanager
def sabotage(fault: Fault | None) -> Iterator[None]:
    """The trainer with this fault, as long as the context lasts; None leaves it whole."""
    if fault is None:
        yield
        return
    owner, name, breaks = _FAULTS[fault]
    whole = getattr(owner, name)
    setattr(owner, name, breaks(whole))
    jax.clear_caches()  # what was traced before holds the whole function, what is traced now the broken one
    try:
        yield
    finally:
        setattr(owner, name, whole)
        jax.clear_caches()


def _negate_advantage(ppo_loss: Callable) -> Callable:
    """Actions better than expected become less likely."""

    def broken(params: dict, rows: tuple[Array, ...], config: Any) -> tuple[Array, dict[str, Array]]:
        obs, action, log_prob, value, advantage, target = rows
        return ppo_loss(params, (obs, action, log_prob, value, -advantage, target), config)

    return broken


def _delay_observation(step: Callable) -> Callable:
    """The policy sees, acts on and learns from what was observed one step before."""

    def broken(self: AutoReset, state: EpisodeState, action: Array) -> EpisodeState:
        return step(self, state, action).replace(obs=state.final_obs)

    return broken


def _bootstrap_ruin(compute_gae: Callable) -> Callable:
    """Ruin is treated like a time limit: the value of what comes after it, the next episode, counts."""

    def broken(
        reward: Array, value: Array, last_value: Array, final_value: Array, terminated: Array, truncated: Array,
        gamma: float, gae_lambda: float,
    ) -> Array:  # fmt: skip
        after = jnp.where(terminated, jnp.concatenate([value[1:], last_value[None]]), final_value)
        never = jnp.zeros_like(terminated)
        return compute_gae(reward, value, last_value, after, never, terminated | truncated, gamma, gae_lambda)

    return broken


_FAULTS: dict[Fault, tuple[Any, str, Callable[[Callable], Callable]]] = {
    "advantage-sign": (ppo, "ppo_loss", _negate_advantage),
    "stale-observations": (AutoReset, "step", _delay_observation),
    "bootstrap-at-liquidation": (ppo, "compute_gae", _bootstrap_ruin),
}
