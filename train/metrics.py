"""Metrics of an update: sums over ended episodes on the device, one line of numbers on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from perpjax.vec import EpisodeState

PER_EPISODE = (
    "episode_return", "episode_length", "max_drawdown", "trades", "liquidations", "fees", "slippage", "funding",
    "gross_profit", "ruined",
)  # fmt: skip
"""Metrics that the device sums over ended episodes, and `summarise` divides by their number."""


def count_episodes(stepped: EpisodeState, done: Bool[Array, "envs"]) -> dict[str, Array]:
    """Sum over the episodes that this step ended; `episodes` is their number."""
    episode, ledger = stepped.episode, stepped.episode.ledger

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(done, x, 0))

    return {
        "episodes": jnp.sum(done, dtype=jnp.int32),
        "episode_return": total(episode.return_),
        "episode_length": total(episode.length),
        "max_drawdown": total(episode.max_drawdown),
        "trades": total(ledger.opened),
        "liquidations": total(ledger.liquidated),
        "fees": total(ledger.fees),
        "slippage": total(ledger.slippage),
        "funding": total(ledger.funding),
        "gross_profit": total(ledger.realised + ledger.slippage - ledger.liquidation_losses),
        "ruined": jnp.sum(stepped.terminated, dtype=jnp.int32),
    }


def measure_exposure(states: EpisodeState) -> Float[Array, ""]:
    """Return the notional of open lots at entry over equity, a mean over all environments."""
    lots, slots = states.account.lots, states.account.lots.slot_axis
    notional = jnp.sum(lots.margin * lots.leverage, axis=slots)
    return jnp.mean(notional / jnp.maximum(states.equity, 1e-9))


def summarise(sums: dict[str, np.ndarray], update: int, steps: int) -> dict[str, Any]:
    """Return one line of metrics. A metric without data is absent, never NaN.

    Args:
      sums: metrics of one update, from the device.
      update: its number, from 1.
      steps: environment steps so far, over all environments.
    """
    metrics: dict[str, Any] = {"update": update, "steps": steps}
    episodes = int(sums["episodes"])
    for name, value in sums.items():
        if name not in PER_EPISODE:
            metrics[name] = value.item()
        elif episodes:
            metrics[name] = value.item() / episodes
    return metrics
