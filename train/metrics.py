"""Metrics of an update: sums over ended episodes on the device, one line of numbers on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from perpjax.vec import EpisodeState

PER_EPISODE = (
    "episode_return", "episode_length", "max_drawdown", "trades", "liquidations", "fees", "slippage", "funding",
    "gross_profit", "ruined",
)  # fmt: skip
"""Metrics that the device sums over ended episodes, and `summarise` divides by their number."""


def count_episodes(stepped: EpisodeState) -> dict[str, Shaped[Array, "envs"]]:
    """Return the figures of the episodes that this step ended, 0 elsewhere; `episodes` is their number."""
    episode, ledger = stepped.episode, stepped.episode.ledger
    done = stepped.terminated | stepped.truncated
    figures = {
        "episodes": jnp.ones_like(done, jnp.int32),
        "episode_return": episode.return_,
        "episode_length": episode.length,
        "max_drawdown": episode.max_drawdown,
        "trades": ledger.opened,
        "liquidations": ledger.liquidated,
        "fees": ledger.fees,
        "slippage": ledger.slippage,
        "funding": ledger.funding,
        "gross_profit": ledger.realised + ledger.slippage - ledger.liquidation_losses,
        "ruined": stepped.terminated.astype(jnp.int32),
    }
    return {name: jnp.where(done, x, 0) for name, x in figures.items()}


def measure_exposure(states: EpisodeState) -> Float[Array, ""]:
    """Return margin x leverage of the open lots over equity, a mean over all environments.

    That is their notional at entry, but for the funding that their margins have paid.
    """
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
