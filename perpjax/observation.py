"""What the policy sees: scaled features of closed bars, and nine numbers of the account."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from perpjax.batching import fold, stage, total
from perpjax.params import EnvParams
from perpjax.risk import available_exposure
from perpjax.state import Lots, account_side, notional, unrealised

FEATURE_CLIP = 10.0
"""Scaled features are clipped to plus and minus this."""
ACCOUNT_FEATURES = (
    "lots", "side", "margin", "notional", "unrealised", "age", "time_left", "liquidation_distance", "available",
)  # fmt: skip


def scale_features(features: Float[Array, "F"], mean: Float[Array, "F"], scale: Float[Array, "F"]) -> Float[Array, "F"]:
    """`(x - mean) / scale`, clipped to +-10."""
    return jnp.clip((features - mean) / scale, -FEATURE_CLIP, FEATURE_CLIP)


@stage
def observe_account(
    lots: Lots,
    equity: Float[Array, "..."],
    mark: Float[Array, "..."],
    tick_value: Float[Array, "..."],
    params: EnvParams,
) -> Float[Array, "9 ..."]:
    """The account in nine numbers of order one, in the order of `ACCOUNT_FEATURES`.

    Args:
      equity: quote, marked to `mark`.
      mark: mark close of the last closed bar, ticks.
    """
    held = lots.quantity > 0
    base = jnp.maximum(equity, 1e-6 * params.initial_equity)
    margin = total(lots.margin)
    oldest = fold(jnp.maximum, lots.age)
    max_hold = params.max_hold.astype(jnp.float32)
    distance = jnp.where(held & (lots.liquidation > 0), lots.side * (mark - lots.liquidation) / mark, jnp.inf)
    nearest = fold(jnp.minimum, distance)
    count = total(held)
    numbers = [
        count / lots.quantity.shape[0],
        account_side(lots),
        margin / base,
        notional(lots, mark, tick_value) / base,
        unrealised(lots, mark, tick_value) / base,
        oldest / max_hold,
        jnp.where(count > 0, jnp.maximum(params.max_hold - oldest, 0) / max_hold, 0.0),
        jnp.where(nearest < jnp.inf, nearest, 1.0),
        available_exposure(equity, margin, params) / base,
    ]
    return jnp.stack(numbers)
