"""Maintenance margin, liquidation price and funding."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import stage, total
from perpjax.instrument import Instrument
from perpjax.market import PackedBar
from perpjax.state import Lots, sum_up, unrealised

CEIL_SLACK = 2.0**-22
"""Fraction of the entry price by which a distance may exceed a whole tick and still count as that tick."""


def liquidation_price(
    side: ArrayLike,
    entry_price: ArrayLike,
    quantity: ArrayLike,
    margin: ArrayLike,
    mmr: ArrayLike,
    maintenance_amount: ArrayLike,
    fee_rate: ArrayLike = 0.0,
) -> ArrayLike:
    """Mark price at which margin balance equals maintenance margin, for one bracket. Broadcasts.

    `LP = (E - d (M + cum) / q) / (1 - d (m + f))`: the formula of Binance's FAQ "How to Calculate Liquidation
    Price of USDS-M Futures Contracts" for an isolated position, with the closing fee `f` that OKX, Gate and
    Bitget count in. It is the unique solution of `M + d q (LP - E) = q LP (m + f) - cum`.

    Args:
      side: d, +1 long or -1 short.
      entry_price: E, quote currency per unit.
      quantity: q > 0, base currency.
      margin: M, isolated wallet, quote currency.
      mmr: m, maintenance rate of the bracket, a fraction.
      maintenance_amount: cum, quote currency.
      fee_rate: f, a fraction; 0 on Binance and Bybit.

    Returns:
      The price, in the units of `entry_price` and in the inputs' dtype. Negative or zero for a long that cannot
      be liquidated.
    """
    return (entry_price - side * (margin + maintenance_amount) / quantity) / (1 - side * (mmr + fee_rate))


def liquidation_ticks(
    side: Float[Array, "..."],
    entry: Float[Array, "..."],
    quantity: Float[Array, "..."],
    margin: Float[Array, "..."],
    instrument: Instrument,
) -> Float[Array, "..."]:
    """The first tick at which margin balance <= maintenance, over all brackets; 0 for a long that has none.

    The same kernel as `liquidation_price`, as a distance from the entry so that float32 keeps the tick, and the
    smallest over all brackets: maintenance is the largest of the brackets' lines, so no look-up is needed.

    Args:
      side: +1 or -1; entry in ticks; quantity in steps (> 0); margin in quote currency.
    """
    per_tick = 1 / (quantity * instrument.tick_value)
    free = margin * per_tick
    distance = jnp.full_like(entry, jnp.inf)
    rates = instrument.brackets[:, 3] + instrument.maintenance_fee_rate
    slopes = zip(1 / (1 - rates), 1 / (1 + rates), strict=True)
    for rate, amount, (long, short) in zip(rates, instrument.brackets[:, 4], slopes, strict=True):
        line = (free + amount * per_tick - rate * entry) * jnp.where(side > 0, long, short)
        distance = jnp.where(line < distance, line, distance)
    level = entry - side * jnp.ceil(distance - entry * CEIL_SLACK)
    return jnp.where(level > 0, level, 0.0)


def funding_payment(
    side: Float[Array, "lots ..."],
    quantity: Float[Array, "lots ..."],
    margin: Float[Array, "lots ..."],
    funding_price: Float[Array, "..."],
    funding_rate: Float[Array, "..."],
    tick_value: Float[Array, "..."],
) -> Float[Array, "lots ..."]:
    """What each lot pays at a settlement (negative: receives), quote currency; never more than its margin."""
    return jnp.minimum(side * quantity * funding_price * tick_value * funding_rate, margin)


def liquidates(lots: Lots, mark: Float[Array, "..."]) -> Bool[Array, "lots ..."]:
    """Whether `mark` is at or past each lot's liquidation price."""
    return (lots.liquidation > 0) & (lots.side * (mark - lots.liquidation) <= 0)


class Opening(NamedTuple):
    """What the opening of a bar took from an account, and what it left."""

    funding: Float[Array, "..."]
    """Paid (negative: received), quote."""
    losses: Float[Array, "..."]
    """Margins of the lots liquidated, quote."""
    liquidated: Int[Array, "..."]
    carried: Float[Array, "..."]
    """Unrealised profit before, at the mark close of the bar before, quote."""
    floating: Float[Array, "..."]
    """That of the lots that are left."""
    count: Int[Array, "..."]
    """Lots left."""
    side: Float[Array, "..."]
    """Theirs."""
    margin: Float[Array, "..."]
    """Sum of theirs, quote."""


def open_bar(lots: Lots, bar: PackedBar, instrument: Instrument) -> tuple[Lots, Opening]:
    """Settle funding, then liquidate the lots whose level the mark open has reached: their quantity becomes 0."""
    margin, liquidation, paid, carried = _settle(lots, bar, instrument)
    lots = lots.replace(margin=margin, liquidation=liquidation)
    lots = lots.replace(quantity=_liquidate(lots, bar))
    return lots, Opening(paid, carried=carried, **_weigh(lots, bar, instrument.tick_value))


@stage
def _settle(
    lots: Lots, packed: PackedBar, instrument: Instrument
) -> tuple[Float[Array, "lots ..."], Float[Array, "lots ..."], Float[Array, "..."], Float[Array, "..."]]:
    """Margins and liquidation prices after a settlement, what was paid, and the unrealised profit."""
    bar, tick_value = packed.unpack(), instrument.tick_value
    rate = bar.funding_rate
    paid = funding_payment(lots.side, lots.quantity, lots.margin, bar.funding_price, rate, tick_value)
    margin, held = lots.margin - paid, lots.quantity > 0
    moved = liquidation_ticks(lots.side, lots.entry, jnp.where(held, lots.quantity, 1), margin, instrument)
    liquidation = jnp.where(held & (rate != 0), moved, lots.liquidation)
    return margin, liquidation, total(paid), unrealised(lots, bar.mark_before, tick_value)


@stage
def _liquidate(lots: Lots, packed: PackedBar) -> Float[Array, "lots ..."]:
    """The quantities left."""
    bar = packed.unpack()
    return jnp.where(bar.valid[0] & liquidates(lots, bar.mark_open[0]), 0, lots.quantity)


@stage
def _weigh(lots: Lots, packed: PackedBar, tick_value: Float[Array, "..."]) -> dict[str, Array]:
    """What an `Opening` has of the lots that are gone (an entry, but no quantity) and of those that are left."""
    held = lots.quantity > 0
    gone = ~held & (lots.entry > 0)
    left = lots.replace(**{name: jnp.where(held, getattr(lots, name), 0) for name in ("side", "margin")})
    sums = sum_up(left.each(), packed.unpack().mark_before, tick_value)
    return {
        "losses": total(jnp.where(gone, lots.margin, 0)),
        "liquidated": total(gone),
        "floating": sums.floating,
        "count": sums.count,
        "side": sums.side,
        "margin": sums.margin,
    }
