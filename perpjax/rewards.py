"""Rewards: the log return of equity, and a shaped form with the penalties of the original system."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax.params import EnvParams

EQUITY_FLOOR = 1e-3
"""Both equities inside the logarithm are at least this fraction of the initial one."""


def log_return(
    delta: Float[Array, "..."], before: Float[Array, "..."], after: Float[Array, "..."], params: EnvParams
) -> Float[Array, "..."]:
    """`log(after / before)`, by `log1p(delta / before)` so that small steps keep their digits.

    Args:
      delta: the step's postings plus the change of unrealised profit, quote.
      before, after: equity, quote.
    """
    floor = EQUITY_FLOOR * params.initial_equity
    floored = (before < floor) | (after < floor)
    base = jnp.maximum(before, floor)
    return jnp.log1p(jnp.where(floored, jnp.maximum(after, floor) - base, delta) / base)


def shaped(
    log_return: Float[Array, "..."],
    opened: Bool[Array, "..."],
    liquidations: Int[Array, "..."],
    notional: Float[Array, "..."],
    move: Float[Array, "..."],
    equity: Float[Array, "..."],
    ruined: Bool[Array, "..."],
    params: EnvParams,
) -> Float[Array, "..."]:
    """Log return less a price on entries, on exposure, on liquidations and on ruin.

    Args:
      notional: of the lots held after the step, quote.
      move: the ATR known after the step as a fraction of price.
      equity: after the step, quote; floored as inside the logarithm.
    """
    exposure = notional / jnp.maximum(equity, EQUITY_FLOOR * params.initial_equity)
    return (
        log_return
        - params.entry_penalty * opened
        - params.risk_penalty * exposure * move
        - params.liquidation_penalty * liquidations
        - params.ruin_penalty * ruined
    )
