"""Maintenance margin, liquidation price and funding."""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import split_table
from perpjax.instrument import Instrument
from perpjax.market import PackedBar
from perpjax.moments import NO_SLOT, Moment, Tally, count_used, each_lot
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


@jax.jit  # many environments ask twice for the same shapes: traced once
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
      side: +1 or -1; entry in ticks; quantity in steps, 0 counts as 1; margin in quote currency.
    """
    per_tick = 1 / (jnp.where(quantity > 0, quantity, 1) * instrument.tick_value)
    free = margin * per_tick
    distance = jnp.full_like(entry, jnp.inf)
    is_long = side > 0
    for rate, amount, of_long, of_short in split_table(instrument.maintenance):
        line = (free + amount * per_tick - rate * entry) * jnp.where(is_long, of_long, of_short)
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
    """What each lot pays at a settlement (negative: receives), quote currency; never more than its margin."""
    return jnp.minimum(side * quantity * funding_price * tick_value * funding_rate, margin)


def at_liquidation(
    side: Float[Array, "..."], mark: Float[Array, "..."], level: Float[Array, "..."]
) -> Bool[Array, "..."]:
    """Whether the mark is at or past a liquidation price; a level of 0 is none."""
    return (level > 0) & (side * (mark - level) <= 0)


class Fate(enum.IntEnum):
    """What the opening of a bar made of a slot."""

    FREE = 0
    HELD = 1
    LIQUIDATED = 2


class Opening(NamedTuple):
    """What the opening of a bar took from an account, and what it left."""

    funding: Float[Array, "..."]
    """Paid (negative: received), quote."""
    losses: Float[Array, "..."]
    """Margins of the lots liquidated, quote."""
    carried: Float[Array, "..."]
    """Unrealised profit before, at the mark close of the bar before, ticks times steps."""
    floating: Float[Array, "..."]
    """That of the lots that are left."""
    sides: Float[Array, "..."]
    """Sum of theirs."""
    margin: Float[Array, "..."]
    """Sum of theirs, quote."""
    free: Int[Array, "..."]
    """The lowest free slot; no slot if there is none."""
    fates: Tally
    """Lots held and lots liquidated."""

    @property
    def count(self) -> Int[Array, "..."]:
        """Lots left."""
        return self.fates["held"]

    @property
    def side(self) -> Float[Array, "..."]:
        """Theirs: +1, -1, or 0 if none is left."""
        return jnp.clip(self.sides, -1.0, 1.0)

    @property
    def liquidated(self) -> Int[Array, "..."]:
        """Lots liquidated."""
        return self.fates["liquidated"]


def open_bar(lots: Lots, bar: PackedBar, instrument: Instrument) -> tuple[Lots, Int[Array, "..."], Opening]:
    """Settle funding, then liquidate the lots whose level the mark open has reached: their quantity becomes 0.

    Returns:
      The lots, how many slots they use (those from there on are free), and what it did to the account.
    """
    used = count_used(lots)
    moment = _Open(bar, instrument, used, slots=len(lots.quantity))
    at_open, opening = each_lot(moment, lots.replace(**dict.fromkeys(_UNTOUCHED)), used)
    return at_open.replace(**{name: getattr(lots, name) for name in _UNTOUCHED}), used, opening


_UNTOUCHED = ("leverage", "stop", "target", "age")
"""What the opening of a bar neither reads nor changes."""


@dataclasses.dataclass
class _Open(Moment[Opening]):
    """See `open_bar`."""

    bar: PackedBar
    instrument: Instrument
    used: Int[Array, "..."]
    slots: int

    @property
    def steps(self):
        return self.settle, self.liquidate

    def settle(self, lot: Lots) -> tuple[Array, Array, Array]:
        """What it pays; its margin and liquidation price afterwards."""
        bar, held = self.bar.unpack(), lot.quantity > 0
        rate, tick_value = bar.funding_rate, self.instrument.tick_value
        paid = funding_payment(lot.side, lot.quantity, lot.margin, bar.funding_price, rate, tick_value)
        margin = lot.margin - paid
        moved = liquidation_ticks(lot.side, lot.entry, lot.quantity, margin, self.instrument)
        return paid, margin, jnp.where(held & (rate != 0), moved, lot.liquidation)

    def liquidate(self, lot: Lots, settled: tuple[Array, Array, Array]) -> Int[Array, "..."]:
        """Its `Fate`: whether the mark is at or past its liquidation price. A byte, read by many kernels."""
        bar, (_, _, level) = self.bar.unpack(), settled
        reached = bar.valid[0] & at_liquidation(lot.side, bar.mark_open[0], level)
        fate = jnp.where(reached, Fate.LIQUIDATED, Fate.HELD)
        return jnp.where(lot.quantity > 0, fate, Fate.FREE).astype(jnp.int8)

    def weigh(self, lot: Lots, facts: tuple, slot: Int[Array, "..."] | int) -> Opening:
        (paid, margin, _), fate = facts
        held, gone = fate == Fate.HELD, fate == Fate.LIQUIDATED
        profit = gain(lot, self.bar.unpack().mark_before)
        return Opening(
            funding=paid,
            losses=jnp.where(gone, margin, 0),
            carried=profit,
            floating=jnp.where(held, profit, 0),
            sides=jnp.where(held, lot.side, 0),
            margin=jnp.where(held, margin, 0),
            free=jnp.where(held, NO_SLOT, slot),
            fates=Tally.of({"held": held, "liquidated": gone}, self.slots),
        )

    def write(self, lot: Lots, facts: tuple) -> dict[str, Array]:
        (_, margin, liquidation), fate = facts
        quantity = jnp.where(fate == Fate.HELD, lot.quantity, 0)
        return {"margin": margin, "liquidation": liquidation, "quantity": quantity}

    def add(self, a: Opening, b: Opening) -> Opening:
        return super().add(a, b)._replace(free=jnp.minimum(a.free, b.free))

    def start(self, zeros: Opening) -> Opening:
        return zeros._replace(free=self.used)
