"""The observation: scaled features of closed bars, and nine numbers of the account."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from perpjax.params import EnvParams
from perpjax.rules.bar import Bar
from perpjax.rules.exits import BarTotals
from perpjax.rules.risk import available_exposure

FEATURE_CLIP = 10.0
"""Scaled features are clipped to plus and minus this."""
ACCOUNT_FEATURES = (
    "lots", "side", "margin", "notional", "unrealised", "age", "time_left", "liquidation_distance", "available",
)  # fmt: skip


def scale_features(features: Float[Array, "F"], mean: Float[Array, "F"], scale: Float[Array, "F"]) -> Float[Array, "F"]:
    """`(x - mean) / scale`, clipped to +-10."""
    return jnp.clip((features - mean) / scale, -FEATURE_CLIP, FEATURE_CLIP)


def observe_account(
    totals: BarTotals,
    side: Float[Array, "..."],
    equity: Float[Array, "..."],
    bar: Bar,
    tick_value: Float[Array, "..."],
    params: EnvParams,
    slots: int,
) -> list[Float[Array, "..."]]:
    """The account in nine numbers of order one, in the order of `ACCOUNT_FEATURES`.

    Args:
      totals: of the lots held, marked to the close of the bar.
      side: of the account during the bar.
      equity: quote, marked to the same price.
      bar: the last closed bar.
      slots: lots the account can hold.
    """
    mark = bar.mark_close[-1]
    base = jnp.maximum(equity, 1e-6 * params.initial_equity)
    max_hold = params.max_hold.astype(jnp.float32)
    held = totals.events["held"]
    side = jnp.where(held > 0, side, 0)
    return [
        held.astype(jnp.float32) / slots,
        side,
        totals.margin / base,
        totals.quantity * mark * tick_value / base,
        totals.unrealised * tick_value / base,
        totals.oldest / max_hold,
        jnp.where(held > 0, jnp.maximum(params.max_hold - totals.oldest, 0) / max_hold, 0.0),
        jnp.where(totals.nearest_liquidation > -jnp.inf, (side * mark - totals.nearest_liquidation) / mark, 1.0),
        available_exposure(equity, totals.margin, params) / base,
    ]


def observe_nothing(params: EnvParams) -> Float[Array, "9"]:
    """The nine numbers of an account that holds nothing, [9]."""
    nothing = dict.fromkeys(ACCOUNT_FEATURES, 0.0) | {"liquidation_distance": 1.0, "available": params.max_exposure}
    return jnp.stack([jnp.asarray(nothing[name], jnp.float32) for name in ACCOUNT_FEATURES])
