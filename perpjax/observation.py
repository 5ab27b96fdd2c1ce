"""What the policy sees: scaled features of closed bars, and nine numbers of the account."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perpjax.params import EnvParams
from perpjax.risk import available_exposure
from perpjax.state import Holdings

FEATURE_CLIP = 10.0
"""Scaled features are clipped to plus and minus this."""
ACCOUNT_FEATURES = (
    "lots", "side", "margin", "notional", "unrealised", "age", "time_left", "liquidation_distance", "available",
)  # fmt: skip


def scale_features(features: Float[Array, "F"], mean: Float[Array, "F"], scale: Float[Array, "F"]) -> Float[Array, "F"]:
    """`(x - mean) / scale`, clipped to +-10."""
    return jnp.clip((features - mean) / scale, -FEATURE_CLIP, FEATURE_CLIP)


def observe_account(
    held: Holdings,
    slots: int | Int[Array, ""],
    equity: Float[Array, "..."],
    mark: Float[Array, "..."],
    tick_value: Float[Array, "..."],
    params: EnvParams,
) -> list[Float[Array, "..."]]:
    """The account in nine numbers of order one, in the order of `ACCOUNT_FEATURES`.

    Args:
      held: lots, marked to `mark`.
      slots: lots the account can hold.
      equity: quote, marked to `mark`.
      mark: mark close of the last closed bar, ticks.
    """
    base = jnp.maximum(equity, 1e-6 * params.initial_equity)
    max_hold = params.max_hold.astype(jnp.float32)
    return [
        held.count / slots,
        held.side,
        held.margin / base,
        held.quantity * mark * tick_value / base,
        held.floating / base,
        held.oldest / max_hold,
        jnp.where(held.count > 0, jnp.maximum(params.max_hold - held.oldest, 0) / max_hold, 0.0),
        jnp.where(held.brink > -jnp.inf, (held.side * mark - held.brink) / mark, 1.0),
        available_exposure(equity, held.margin, params) / base,
    ]


def observe_nothing(params: EnvParams) -> Float[Array, "9"]:
    """What `observe_account` says of an account that holds nothing; a fresh episode needs no arithmetic for it."""
    nothing = dict.fromkeys(ACCOUNT_FEATURES, 0.0) | {"liquidation_distance": 1.0, "available": params.max_exposure}
    return jnp.stack([jnp.asarray(nothing[name], jnp.float32) for name in ACCOUNT_FEATURES])
