"""How a lot opens, and what its end brings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perpjax.batching import cond_any
from perpjax.execution import fill_exit, fill_stop
from perpjax.instrument import Instrument
from perpjax.intrabar import Exit
from perpjax.margin import liquidation_ticks
from perpjax.market import Bar
from perpjax.params import EnvParams
from perpjax.risk import Review
from perpjax.state import Lots, clear


def open_lot(lots: Lots, order: Review, instrument: Instrument) -> Lots:
    """Put an accepted order in the lowest free slot, with its liquidation price."""
    level = liquidation_ticks(order.side, order.entry, order.quantity, order.margin, instrument)
    lot = Lots(
        order.side, order.quantity, order.entry, order.margin, order.leverage, order.stop, order.target, level,
        age=jnp.zeros((), jnp.int32),
    )  # fmt: skip
    here = jnp.arange(lots.quantity.shape[0]) == jnp.argmax(lots.quantity == 0)
    return jax.tree.map(lambda new, old: jnp.where(here, new, old), lot, lots)


class Exits(NamedTuple):
    """What the lots that ended in a bar brought, summed over lots; money in quote currency."""

    realised: Float[Array, ""]
    """Profit before fees, without the liquidated lots."""
    fees: Float[Array, ""]
    losses: Float[Array, ""]
    """Margins of the liquidated lots."""
    notional: Float[Array, ""]
    counts: Int[Array, "exits"]
    """Lots by `Exit`."""


def keep_all(lots: Lots, *_: object) -> tuple[Lots, Exits]:
    """The exits of a bar in which no lot ended."""
    return lots, Exits(*[jnp.float32(0)] * 4, jnp.zeros(len(Exit), jnp.int32))


def settle(
    lots: Lots,
    how: Int[Array, "lots"],
    candle: Int[Array, "lots"],
    bar: Bar,
    atr: Float[Array, ""],
    tick_value: Float[Array, ""],
    params: EnvParams,
) -> tuple[Lots, Exits]:
    """Fill every exit, take its fee, and free the slots. After entry no lot ever costs more than its margin.

    Args:
      how: `Exit` of each lot; candle: the one that ended it, where a candle did.
    """
    at_market = jnp.where(how == Exit.CLOSED, bar.open[0], bar.close[-1])
    fill = jnp.where(how == Exit.TARGET, lots.target, fill_exit(lots.side, at_market, atr, params))
    stopped = how == Exit.STOPPED
    fill = cond_any(jnp.any(stopped), _fill_stops, lambda fill, *_: fill, fill, stopped, lots, candle, bar, atr, params)

    filled = how > Exit.LIQUIDATED
    notional = jnp.where(filled, lots.quantity * fill * tick_value, 0)
    profit = jnp.maximum(lots.side * lots.quantity * (fill - lots.entry) * tick_value, -lots.margin)
    profit = jnp.where(filled, profit, 0)
    fees = jnp.where(filled, jnp.minimum(params.taker_fee * notional, lots.margin + profit), 0)
    lost = jnp.where(how == Exit.LIQUIDATED, lots.margin, 0)
    counts = jnp.sum(how[:, None] == jnp.arange(len(Exit)), axis=0, dtype=jnp.int32)
    exits = Exits(jnp.sum(profit), jnp.sum(fees), jnp.sum(lost), jnp.sum(notional), counts)
    return clear(lots, how != Exit.NONE), exits


def _fill_stops(
    fill: Float[Array, "lots"],
    stopped: Array,
    lots: Lots,
    candle: Int[Array, "lots"],
    bar: Bar,
    atr: Float[Array, ""],
    params: EnvParams,
) -> Float[Array, "lots"]:
    def at_candle(path: Float[Array, "K"]) -> Float[Array, "lots"]:
        return sum(jnp.where(candle == k, price, 0) for k, price in enumerate(path))

    extreme = jnp.where(lots.side > 0, at_candle(bar.low), at_candle(bar.high))
    return jnp.where(stopped, fill_stop(lots.side, lots.stop, at_candle(bar.open), extreme, atr, params), fill)
