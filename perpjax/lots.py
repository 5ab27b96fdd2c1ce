"""How a lot opens, and what its end brings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import fold, stage, total
from perpjax.execution import fill_exit, fill_stop
from perpjax.instrument import Instrument
from perpjax.intrabar import Exit, at_candle
from perpjax.margin import liquidation_ticks
from perpjax.market import Bar
from perpjax.params import EnvParams
from perpjax.risk import Review
from perpjax.state import Lots


def open_lot(lots: Lots, order: Review, instrument: Instrument) -> Lots:
    """Put an accepted order in the lowest free slot, with its liquidation price."""
    level = stage(liquidation_ticks)(order.side, order.entry, order.quantity, order.margin, instrument)
    lot = Lots(
        order.side, order.quantity, order.entry, order.margin, order.leverage, order.stop, order.target, level,
        age=jnp.zeros_like(order.verdict),
    )  # fmt: skip
    here = lax.broadcasted_iota(jnp.int32, lots.quantity.shape, 0) == _slot(lots.quantity, order.opens)
    return jax.tree.map(lambda new, old: jnp.where(here, new, old), lot, lots)


@stage
def _slot(quantity: Float[Array, "lots ..."], opens: Bool[Array, "..."]) -> Int[Array, "..."]:
    """The lowest free slot where a lot opens; no slot elsewhere."""
    slots = quantity.shape[0]
    free = fold(jnp.minimum, jnp.where(quantity == 0, lax.broadcasted_iota(jnp.int32, quantity.shape, 0), slots))
    return jnp.where(opens, free, slots)


class Exits(NamedTuple):
    """What the lots that ended in a bar brought, summed over lots; money in quote currency."""

    realised: Float[Array, "..."]
    """Profit before fees, without the liquidated lots."""
    fees: Float[Array, "..."]
    losses: Float[Array, "..."]
    """Margins of the liquidated lots."""
    notional: Float[Array, "..."]
    counts: Int[Array, "exits ..."]
    """Lots by `Exit`."""


def settle(
    lots: Lots,
    how: Int[Array, "lots ..."],
    candle: Int[Array, "lots ..."],
    bar: Bar,
    tick_value: Float[Array, "..."],
    params: EnvParams,
) -> Exits:
    """Fill every exit and take its fee. After entry no lot ever costs more than its margin.

    Args:
      how: `Exit` of each lot; candle: the one that ended it, where a candle did.
    """
    fill = _fill(lots.side, lots.stop, lots.target, how, candle, bar, params)
    return _sum_up(lots, how, fill, tick_value, params)


@stage
def _fill(
    side: Float[Array, "lots ..."],
    stop: Float[Array, "lots ..."],
    target: Float[Array, "lots ..."],
    how: Int[Array, "lots ..."],
    candle: Int[Array, "lots ..."],
    bar: Bar,
    params: EnvParams,
) -> Float[Array, "lots ..."]:
    """The price at which each lot would end."""
    extreme = jnp.where(side > 0, at_candle(bar.low, candle), at_candle(bar.high, candle))
    stopped = fill_stop(side, stop, at_candle(bar.open, candle), extreme, bar.atr, params)
    at_market = fill_exit(side, jnp.where(how == Exit.CLOSED, bar.open[0], bar.close[-1]), bar.atr, params)
    return jnp.where(how == Exit.STOPPED, stopped, jnp.where(how == Exit.TARGET, target, at_market))


@stage
def _sum_up(
    lots: Lots,
    how: Int[Array, "lots ..."],
    fill: Float[Array, "lots ..."],
    tick_value: Float[Array, "..."],
    params: EnvParams,
) -> Exits:
    filled = how > Exit.LIQUIDATED
    notional = jnp.where(filled, lots.quantity * fill * tick_value, 0)
    profit = jnp.maximum(lots.side * lots.quantity * (fill - lots.entry) * tick_value, -lots.margin)
    profit = jnp.where(filled, profit, 0)
    fees = jnp.where(filled, jnp.minimum(params.taker_fee * notional, lots.margin + profit), 0)
    lost = jnp.where(how == Exit.LIQUIDATED, lots.margin, 0)
    counts = jnp.stack([total(how == e) for e in Exit])
    return Exits(total(profit), total(fees), total(lost), total(notional), counts)


@stage
def close_slots(lots: Lots, how: Int[Array, "lots ..."], over: Bool[Array, "..."], before: Lots) -> Lots:
    """Zero the slots of what has ended; the lots as they were before where the episode is over."""
    free = (lots.quantity == 0) | (how != Exit.NONE)
    return jax.tree.map(lambda old, x: jnp.where(over, old, jnp.where(free, 0, x)), before, lots)
