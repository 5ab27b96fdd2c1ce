"""Rewards: functions of one step's outcome. A new one gets a name in `REWARDS` and in `params.Reward`."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax.params import EnvParams

EQUITY_FLOOR = 1e-3
"""Both equities inside the logarithm are at least this fraction of the initial one."""


class Outcome(NamedTuple):
    """One step of one account, as a reward sees it. Money in quote currency."""

    change: Float[Array, "..."]
    """Of equity: the step's postings plus the change of unrealised profit."""
    before: Float[Array, "..."]
    """Equity before the step."""
    after: Float[Array, "..."]
    """Equity after the step."""
    opened: Bool[Array, "..."]
    """Whether a lot opened."""
    liquidated: Int[Array, "..."]
    """Lots liquidated."""
    notional: Float[Array, "..."]
    """Of the lots held after the step, at the mark close."""
    move: Float[Array, "..."]
    """The ATR known after the step, a fraction of the close."""
    ruined: Bool[Array, "..."]
    """Whether the episode terminated."""


def log_return(outcome: Outcome, params: EnvParams) -> Float[Array, "..."]:
    """`log(after / before)`, by `log1p(change / before)` so that small steps keep their digits."""
    floor = EQUITY_FLOOR * params.initial_equity
    floored = (outcome.before < floor) | (outcome.after < floor)
    base = jnp.maximum(outcome.before, floor)
    return jnp.log1p(jnp.where(floored, jnp.maximum(outcome.after, floor) - base, outcome.change) / base)


def shaped(outcome: Outcome, params: EnvParams) -> Float[Array, "..."]:
    """Log return less a price on entries, on exposure, on liquidations and on ruin."""
    exposure = outcome.notional / jnp.maximum(outcome.after, EQUITY_FLOOR * params.initial_equity)
    return (
        log_return(outcome, params)
        - params.entry_penalty * outcome.opened
        - params.risk_penalty * exposure * outcome.move
        - params.liquidation_penalty * outcome.liquidated
        - params.ruin_penalty * outcome.ruined
    )


REWARDS = {"log_return": log_return, "shaped": shaped}
"""By the name in `EnvConfig.reward`."""
