"""Fill prices and slippage, in ticks."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from perpjax.params import EnvParams

MIN_FILL = 1.0
"""Every fill price is at least one tick."""


def slip(price: Float[Array, "..."], atr: Float[Array, "..."], params: EnvParams) -> Float[Array, "..."]:
    """Slippage of a market order at `price`: whole ticks, always against the trader."""
    return jnp.ceil(params.slippage_base * price + params.slippage_atr * atr)


def fill_entry(
    side: Float[Array, "..."], price: Float[Array, "..."], atr: Float[Array, "..."], params: EnvParams
) -> Float[Array, "..."]:
    """Price of a market order that opens a lot of `side` (+1, -1)."""
    return jnp.maximum(price + side * slip(price, atr, params), MIN_FILL)


def fill_exit(
    side: Float[Array, "..."], price: Float[Array, "..."], atr: Float[Array, "..."], params: EnvParams
) -> Float[Array, "..."]:
    """Price of a market order that closes a lot of `side`."""
    return fill_entry(-side, price, atr, params)


def fill_stop(
    side: Float[Array, "..."],
    trigger: Float[Array, "lots ..."],
    extreme: Float[Array, "lots ..."],
    atr: Float[Array, "..."],
    params: EnvParams,
) -> Float[Array, "lots ..."]:
    """Price of a stop: its trigger, slippage, and part of the way to the candle's adverse extreme.

    Args:
      trigger: the worse of the stop and the candle's open, ticks.
    """
    depth = jnp.ceil(params.stop_depth * jnp.abs(trigger - extreme))
    return jnp.maximum(trigger - side * (slip(trigger, atr, params) + depth), MIN_FILL)
