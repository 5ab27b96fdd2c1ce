"""The life of a lot: how it opens, what a bar does to it, what its end brings."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import any_of, by_column, by_tile, stage
from perpjax.execution import fill_exit, fill_stop
from perpjax.instrument import Instrument
from perpjax.intrabar import Exit, Paths, at_candle, find, follow
from perpjax.margin import liquidation_ticks
from perpjax.market import Bar, PackedBar
from perpjax.moments import NO_SLOT, Moment, Tally, each_lot
from perpjax.params import EnvParams, Intrabar
from perpjax.risk import Review, is_due
from perpjax.state import COUNTS, Holdings, Lots


class Entry(NamedTuple):
    """A lot that opens, and where."""

    lot: Lots
    slot: Int[Array, "..."]
    """`NO_SLOT` if none opens."""


def open_lot(order: Review, free: Int[Array, "..."], instrument: Instrument) -> Entry:
    """The lot of an accepted order, with its liquidation price, for the lowest free slot."""
    level = stage(liquidation_ticks)(order.side, order.entry, order.quantity, order.margin, instrument)
    lot = Lots(
        order.side, order.quantity, order.entry, order.margin, order.leverage, order.stop, order.target, level,
        age=jnp.zeros_like(order.verdict),
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
    events: Tally
    """As `End.events`."""


@dataclasses.dataclass
class Life(Moment[tuple[Exits, Holdings]]):
    """The candles of a bar, what they end, and what is held after them.

    Attributes:
      order: its side is the account's, and so that of each lot; lots that it closes see no candle.
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
        return self.end, self.fill

    def end(self, lot: Lots) -> End:
        """How it ended."""
        bar, held, closes = self.bar.unpack(), lot.quantity > 0, self.order.closes
        hit = find(self.paths(bar), lot, self.side, self.rule)
        due = held & is_due(lot.age + 1, self.params) & any_of(bar.valid)
        how = jnp.where((hit.how == Exit.NONE) & due, Exit.TIMED_OUT, hit.how)
        how = jnp.where(closes & held, Exit.CLOSED, how)
        return End.pack(how, hit.candle, hit.ambiguous & ~closes, held & (how == Exit.NONE))

    def fill(self, lot: Lots, end: End) -> Float[Array, "..."]:
        """The price at which it was filled; 0 where it was not."""
        bar, side, params = self.bar.unpack(), self.side, self.params
        paths = self.paths(bar)
        opened, extreme = (side * at_candle(x, end.candle) for x in (paths.opens, paths.worst))
        stopped = fill_stop(side, lot.stop, opened, extreme, bar.atr, params)
        at_market = fill_exit(side, jnp.where(end.how == Exit.CLOSED, bar.open[0], bar.close[-1]), bar.atr, params)
        price = jnp.where(end.how == Exit.STOPPED, stopped, jnp.where(end.how == Exit.TARGET, lot.target, at_market))
        return jnp.where(end.how > Exit.LIQUIDATED, price, 0)

    def weigh(self, lot: Lots, facts: tuple[End, Array], slot: Int[Array, "..."] | int) -> tuple[Exits, Holdings]:
        end, fill = facts
        lot = lot.replace(side=self.side)  # a number fewer to read
        exits = settle(lot, end, fill, self.tick_value, self.slots, self.params)
        return exits, Holdings.of(keep(lot, end, self.bar.halted), self.bar.unpack().mark_close[-1])

    def write(self, lot: Lots, facts: tuple[End, Array]) -> dict[str, Array]:
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


def settle(
    lot: Lots,
    end: End,
    fill: Float[Array, "..."],
    tick_value: Float[Array, "..."],
    slots: int,
    params: EnvParams,
) -> Exits:
    """Realise the exit of a lot, if it ended, and take its fee. After entry no lot ever costs more than its margin.

    Args:
      fill: 0 if there was none.
      slots: at most so many exits are added up.
    """
    notional = lot.quantity * fill * tick_value
    profit = jnp.maximum(lot.side * lot.quantity * (fill - lot.entry) * tick_value, -lot.margin)
    profit = jnp.where(fill > 0, profit, 0)
    fee = jnp.minimum(params.taker_fee * notional, lot.margin + profit)
    loss = jnp.where(end.how == Exit.LIQUIDATED, lot.margin, 0)
    return Exits(profit, fee, loss, notional, Tally.of(end.events, slots))


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
