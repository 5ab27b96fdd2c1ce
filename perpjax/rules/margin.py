"""Maintenance margin, liquidation price and funding."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from perpjax._arrays import split_table
from perpjax.instrument import Instrument
from perpjax.rules.bar import Bar
from perpjax.state import Lots, gain

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


@jax.jit  # asked several times for the same shapes: traced once
def liquidation_ticks(
    side: Float[Array, "..."],
    entry: Float[Array, "..."],
    quantity: Float[Array, "..."],
    margin: Float[Array, "..."],
    instrument: Instrument,
) -> Float[Array, "..."]:
    """The first tick at which margin balance <= maintenance, over all brackets; 0 for a long that has none.

    The formula of `liquidation_price` as a distance from the entry, so that float32 keeps the tick. Maintenance is the
    largest of the brackets' lines, so the smallest distance counts and no bracket is looked up.

    Args:
      side: +1 or -1.
      entry: ticks.
      quantity: steps; 0 counts as 1.
      margin: quote currency.
    """
    per_tick = 1 / (jnp.where(quantity > 0, quantity, 1) * instrument.tick_value)
    cushion = margin * per_tick
    distance = jnp.full_like(entry, jnp.inf)
    is_long = side > 0
    for rate, amount, of_long, of_short in split_table(instrument.maintenance):
        line = (cushion + amount * per_tick - rate * entry) * jnp.where(is_long, of_long, of_short)
        distance = jnp.where(line < distance, line, distance)
    level = entry - side * jnp.ceil(distance - entry * CEIL_SLACK)
    return jnp.where(level > 0, level, 0.0)


def funding_payment(
    side: Float[Array, "..."],
    quantity: Float[Array, "..."],
    margin: Float[Array, "..."],
    funding_price: Float[Array, "..."],
    funding_rate: Float[Array, "..."],
    tick_value: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Payment of a lot at a settlement (negative: receipt), quote currency; never more than its margin."""
    return jnp.minimum(side * quantity * funding_price * tick_value * funding_rate, margin)


def at_liquidation(
    side: Float[Array, "..."], mark: Float[Array, "..."], level: Float[Array, "..."]
) -> Bool[Array, "..."]:
    """Whether the mark is at or past a liquidation price; a level of 0 is none."""
    return (level > 0) & (side * (mark - level) <= 0)


class OpeningTotals(NamedTuple):
    """Funding and the opening check, summed over an account's lots."""

    funding: Float[Array, "..."]
    """Paid (negative: received), quote."""
    losses: Float[Array, "..."]
    """Margins of the lots liquidated, quote."""
    unrealised_before: Float[Array, "..."]
    """Of all lots at the mark close of the bar before, ticks times steps."""
    unrealised: Float[Array, "..."]
    """Of the lots that are left, at the same mark."""
    sides: Float[Array, "..."]
    """Sum of the sides of the lots that are left."""
    margin: Float[Array, "..."]
    """Of the lots that are left, quote."""
    events: Mapping[str, Array]
    """Lots "held" (left) and "liquidated": flags of one lot, counts of all."""

    MAXIMA = ()

    @property
    def side(self) -> Float[Array, "..."]:
        """+1, -1, or 0 if no lot is left: an account is never long and short at once."""
        return jnp.clip(self.sides, -1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class SettleAndCheck:
    """The `LotRule` of a bar's open: 1. funding settles, 2. a lot at its liquidation price is liquidated.

    A liquidated lot keeps its other fields but its quantity becomes 0, which frees the slot.
    """

    bar: Bar
    instrument: Instrument

    fields = ("side", "quantity", "entry", "margin", "liquidation")

    @property
    def decide(self):
        return self.settle, self.is_liquidated

    def settle(self, lot: Lots) -> tuple[Array, Array, Array]:
        """Its payment, and its margin and liquidation price afterwards."""
        bar, rate = self.bar, self.bar.funding_rate
        paid = funding_payment(lot.side, lot.quantity, lot.margin, bar.funding_price, rate, self.instrument.tick_value)
        margin = lot.margin - paid
        moved = liquidation_ticks(lot.side, lot.entry, lot.quantity, margin, self.instrument)
        return paid, margin, jnp.where((lot.quantity > 0) & (rate != 0), moved, lot.liquidation)

    def is_liquidated(self, lot: Lots, settled: tuple[Array, Array, Array]) -> Bool[Array, "..."]:
        """Whether the mark open is at or past its liquidation price."""
        _, _, level = settled
        return (lot.quantity > 0) & self.bar.is_valid(0) & at_liquidation(lot.side, self.bar.mark_open[0], level)

    def apply(self, lot: Lots, settled: tuple[Array, Array, Array], liquidated: Array) -> tuple[Lots, OpeningTotals]:
        """The lot after the open of the bar."""
        paid, margin, liquidation = settled
        profit = gain(lot, self.bar.mark_before)
        share = OpeningTotals(
            funding=paid,
            losses=jnp.where(liquidated, margin, 0),
            unrealised_before=profit,
            unrealised=jnp.where(liquidated, 0, profit),
            sides=jnp.where(liquidated, 0, lot.side),
            margin=jnp.where(liquidated, 0, margin),
            events={"held": (lot.quantity > 0) & ~liquidated, "liquidated": liquidated},
        )
        quantity = jnp.where(liquidated, 0, lot.quantity)
        return lot.replace(margin=margin, liquidation=liquidation, quantity=quantity), share
