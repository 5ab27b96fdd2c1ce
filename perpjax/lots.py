"""The life of a lot: how it opens, what a bar does to it, what its end brings."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import any_of, by_column, by_tile, stage
from perpjax.execution import fill_exit, fill_stop
from perpjax.intrabar import Exit, Paths, at_candle, find, follow
from perpjax.market import Bar, PackedBar
from perpjax.moments import NO_SLOT, Moment, Tally, each_lot
from perpjax.params import EnvParams, Intrabar
from perpjax.risk import Review, is_due
from perpjax.state import COUNTS, Holdings, Lots, gain


class Entry(NamedTuple):
    """A lot that opens, and where."""

    lot: Lots
    slot: Int[Array, "..."]
    """`NO_SLOT` if none opens."""


def open_lot(order: Review, free: Int[Array, "..."]) -> Entry:
    """The lot of an accepted order, for the lowest free slot."""
    lot = Lots(
        order.side, order.quantity, order.entry, order.margin, order.leverage, order.stop, order.target,
        order.liquidation, age=jnp.zeros_like(order.verdict),
    )  # fmt: skip
    return Entry(lot, jnp.where(order.opens, free, NO_SLOT))


class End(NamedTuple):
    """What a bar did to each lot, in one word: read by many kernels, so it is short."""

    word: Int[Array, "..."]

    @classmethod
    def pack(cls, how: Array, candle: Array, ambiguous: Array, kept: Array) -> "End":
        """`Exit` in bits 0 to 2, the candle in 3 to 10, ambiguous in 11, kept in 12."""
        word = how | candle << 3 | ambiguous.astype(jnp.int32) << 11 | kept.astype(jnp.int32) << 12
        return cls(word.astype(jnp.int16))

    @property
    def how(self) -> Int[Array, "..."]:
        """`Exit`."""
        return self.word.astype(jnp.int32) & 7

    @property
    def candle(self) -> Int[Array, "..."]:
        """The candle that ended it; K if none did."""
        return self.word.astype(jnp.int32) >> 3 & 0xFF

    @property
    def ambiguous(self) -> Int[Array, "..."]:
        """1 as in `Hit`."""
        return self.word.astype(jnp.int32) >> 11 & 1

    @property
    def events(self) -> dict[str, Bool[Array, "..."]]:
        """By their names in `state.EVENTS` and in that order; and whether it is still held."""
        how = self.how
        return {
            "liquidated": how == Exit.LIQUIDATED,
            "stopped": how == Exit.STOPPED,
            "targets": how == Exit.TARGET,
            "closed": how == Exit.CLOSED,
            "timed_out": how == Exit.TIMED_OUT,
            "ambiguous": self.ambiguous > 0,
            "held": self.kept,
        }

    @property
    def kept(self) -> Bool[Array, "..."]:
        """Whether it is still held."""
        return self.word >= 1 << 12


class Exits(NamedTuple):
    """What the lots that ended in a bar brought, summed over lots; money in quote currency."""

    realised: Float[Array, "..."]
    """Profit before fees, without the liquidated lots."""
    fees: Float[Array, "..."]
    losses: Float[Array, "..."]
    """Margins of the liquidated lots."""
    notional: Float[Array, "..."]
    slippage: Float[Array, "..."]
    gap_losses: Float[Array, "..."]
    forgiven: Float[Array, "..."]
    """These three as in `state.Ledger`."""
    events: Tally
    """As `End.events`."""


@dataclasses.dataclass
class Life(Moment[tuple[Exits, Holdings]]):
    """The candles of a bar, what they end, and what is held after them.

    Attributes:
      order: its side is the account's, and so that of each lot.
      entry: what it opens before the first candle.
      rule: see `intrabar.resolve`.
      slots: lots the account can hold.
    """

    order: Review
    entry: Entry
    bar: PackedBar
    tick_value: Float[Array, "..."]
    rule: Intrabar
    slots: int
    params: EnvParams

    def __post_init__(self):
        self.side = self.order.side
        self.extremes = _follow(self.bar, self.side)

    def read(self, lot: Lots, slot: Int[Array, "..."] | int) -> Lots:
        here = self.entry.slot == slot
        return jax.tree.map(lambda new, old: jnp.where(here, new, old), self.entry.lot, lot)

    def paths(self, bar: Bar) -> Paths:
        """Of the bar's candles. Their opens are a product, which is not worth storing."""
        stored = jax.tree.map(by_column, self.extremes)
        mark_opens = self.side * bar.mark_open if self.bar.has_mark else None
        return stored._replace(opens=self.side * bar.open, mark_opens=mark_opens)

    @property
    def steps(self):
        return self.end, self.trigger, self.fill

    def end(self, lot: Lots) -> End:
        """How it ended."""
        bar, held, closes = self.bar.unpack(), lot.quantity > 0, self.order.closes
        hit = find(self.paths(bar), lot, self.side, self.rule)
        due = held & is_due(lot.age + 1, self.params) & any_of(bar.valid)
        how = jnp.where((hit.how == Exit.NONE) & due, Exit.TIMED_OUT, hit.how)
        # A resting stop or target that the first open has reached is filled before the order that comes there.
        opened = self.side * bar.open[0]
        resting = (opened <= self.side * lot.stop) | (opened > self.side * lot.target)
        how = jnp.where(closes & held & ~resting, Exit.CLOSED, how)
        return End.pack(how, hit.candle, hit.ambiguous & ~closes, held & (how == Exit.NONE))

    def trigger(self, lot: Lots, end: End) -> Float[Array, "..."]:
        """The price that made it end, before slippage; 0 where it did not end by a fill."""
        bar, side = self.bar.unpack(), self.side
        opened = at_candle(self.paths(bar).opens, end.candle)
        price = jnp.where(end.how == Exit.STOPPED, side * jnp.minimum(side * lot.stop, opened), lot.target)
        price = jnp.where(end.how == Exit.CLOSED, bar.open[0], price)
        price = jnp.where(end.how == Exit.TIMED_OUT, bar.close[-1], price)
        return jnp.where(end.how > Exit.LIQUIDATED, price, 0)

    def fill(self, lot: Lots, end: End, trigger: Float[Array, "..."]) -> Float[Array, "..."]:
        """The price at which it was filled; 0 where it was not."""
        bar, side, params = self.bar.unpack(), self.side, self.params
        extreme = side * at_candle(self.paths(bar).worst, end.candle)
        stopped = fill_stop(side, trigger, extreme, bar.atr, params)
        price = jnp.where(end.how == Exit.STOPPED, stopped, fill_exit(side, trigger, bar.atr, params))
        return jnp.where(end.how == Exit.TARGET, trigger, jnp.where(end.how > Exit.LIQUIDATED, price, 0))

    def weigh(
        self, lot: Lots, facts: tuple[End, Array, Array], slot: Int[Array, "..."] | int
    ) -> tuple[Exits, Holdings]:
        lot = lot.replace(side=self.side)  # a number fewer to read
        exits = settle(lot, *facts, self.tick_value, self.slots, self.params)
        return exits, Holdings.of(keep(lot, facts[0], self.bar.halted), self.bar.unpack().mark_close[-1])

    def write(self, lot: Lots, facts: tuple[End, Array, Array]) -> dict[str, Array]:
        return vars(keep(lot, facts[0], self.bar.halted))

    def add(self, a: tuple[Exits, Holdings], b: tuple[Exits, Holdings]) -> tuple[Exits, Holdings]:
        return super().add(a[0], b[0]), a[1].plus(b[1])

    def start(self, zeros: tuple[Exits, Holdings]) -> tuple[Exits, Holdings]:
        exits, nothing = zeros
        return exits, nothing._replace(brink=jnp.full_like(nothing.brink, -jnp.inf))


def live(lots: Lots, used: Int[Array, "..."], life: Life) -> tuple[Lots, Exits, Holdings]:
    """What is still held after a bar, one bar older; what the other lots brought; and the sum of what is held.

    Args:
      used: slots from here on are free, but for the one of the entry.
    """
    opens = life.entry.slot < NO_SLOT
    used = jnp.where(opens, jnp.maximum(used, life.entry.slot + 1), used)
    lots, (exits, held) = each_lot(life, lots, used)
    return lots, exits, held


def take_stock(held: Holdings, events: Tally, side: Float[Array, "..."], tick_value: Float[Array, "..."]) -> Holdings:
    """What `live` says is held, with number and side, in quote currency.

    Args:
      events: of the bar.
      side: of the account.
    """
    count = events["held"]
    side = jnp.where(count > 0, side, 0)
    return held._replace(floating=held.floating * tick_value, count=count, side=side)


@stage
def _follow(packed: PackedBar, side: Float[Array, "..."]) -> Paths:
    """The extremes of `intrabar.follow`; `by_tile`."""
    paths = follow(packed.unpack(), side, packed.has_mark)
    return jax.tree.map(by_tile, paths._replace(opens=None, mark_opens=None))


def realise(
    lot: Lots, fill: Float[Array, "..."], tick_value: Float[Array, "..."], params: EnvParams
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Profit and fee of an exit at `fill`, and what was forgiven: after entry no lot costs more than its margin."""
    profit = gain(lot, fill) * tick_value
    fee = params.taker_fee * (lot.quantity * fill * tick_value)
    floored = jnp.maximum(profit, -lot.margin)
    return floored, jnp.minimum(fee, lot.margin + floored), jnp.maximum(fee - profit - lot.margin, 0)


def settle(
    lot: Lots,
    end: End,
    trigger: Float[Array, "..."],
    fill: Float[Array, "..."],
    tick_value: Float[Array, "..."],
    slots: int,
    params: EnvParams,
) -> Exits:
    """Realise the exit of a lot, if it ended, and take its fee.

    Args:
      trigger, fill: 0 if there was none.
      slots: at most so many exits are added up.
    """
    worth = lot.quantity * tick_value
    profit, fee, forgiven = (jnp.where(fill > 0, x, 0) for x in realise(lot, fill, tick_value, params))
    gap = jnp.where(end.how == Exit.STOPPED, lot.side * (lot.stop - trigger), 0)
    return Exits(
        realised=profit,
        fees=fee,
        losses=jnp.where(end.how == Exit.LIQUIDATED, lot.margin, 0),
        notional=worth * fill,
        slippage=worth * (lot.side * (trigger - fill)),
        gap_losses=worth * gap,
        forgiven=forgiven,
        events=Tally.of(end.events, slots),
    )


def keep(lots: Lots, end: End, halted: Bool[Array, "..."]) -> Lots:
    """What is still held, a bar older unless `halted`; zeros in the other slots."""
    older = lots.replace(age=jnp.where(halted, lots.age, lots.age + 1))
    return jax.tree.map(lambda x: jnp.where(end.kept, x, 0), older)


def count(
    verdict: Int[Array, "..."], opened: Bool[Array, "..."], liquidated: Int[Array, "..."], exits: Tally
) -> Int[Array, "counts ..."]:
    """What a step adds to `Ledger.counts`. No verdict at all is -1."""
    # The same for all, so numpy's: what XLA could compute once it would store, for every environment.
    place = np.arange(len(COUNTS), dtype=np.int32).reshape(-1, *[1] * verdict.ndim)
    once = (place == verdict) | (place == COUNTS.index("opened")) & opened
    ended = exits.at(place - COUNTS.index(exits.names[0]))
    return once + ended + jnp.where(place == COUNTS.index("liquidated"), liquidated, 0)
