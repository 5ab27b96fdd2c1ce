"""The life of a lot: how it opens, what a bar does to it, what its end brings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import any_of, by_column, by_tile, stage
from perpjax.execution import fill_exit, fill_stop
from perpjax.instrument import Instrument
from perpjax.intrabar import Exit, Paths, at_candle, find, follow
from perpjax.margin import liquidation_ticks
from perpjax.market import PackedBar
from perpjax.moments import NO_SLOT, Moment, each_lot
from perpjax.orders import Verdict
from perpjax.params import EnvParams, Intrabar
from perpjax.risk import Review, is_due
from perpjax.state import EVENTS, Holdings, Lots


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
        """By their name in `state.EVENTS`."""
        how = self.how
        return {
            "liquidated": how == Exit.LIQUIDATED,
            "stopped": how == Exit.STOPPED,
            "targets": how == Exit.TARGET,
            "closed": how == Exit.CLOSED,
            "timed_out": how == Exit.TIMED_OUT,
            "ambiguous": self.ambiguous > 0,
        }

    @property
    def kept(self) -> Bool[Array, "..."]:
        """Whether it is still held."""
        return self.word >= 1 << 12


@pytree(static=("names", "bits"))
class Tally:
    """How many lots are what, by name. The counts share words: they are added up together."""

    words: list[Int[Array, "..."]]
    names: tuple[str, ...]
    bits: int

    @classmethod
    def of(cls, flags: dict[str, Bool[Array, "..."]], most: int) -> "Tally":
        """Of one lot, of at most so many that are added up."""
        names, bits = tuple(flags), most.bit_length()
        words = []
        for i in range(0, len(names), 31 // bits):
            some = names[i : i + 31 // bits]
            ones = (jnp.where(flags[name], 1 << bits * j, 0) for j, name in enumerate(some))
            words.append(functools.reduce(jnp.add, ones))
        return cls(words, names, bits)

    def __getitem__(self, name: str) -> Int[Array, "..."]:
        word, place = divmod(self.names.index(name), 31 // self.bits)
        return self.words[word] >> self.bits * place & (1 << self.bits) - 1


class Exits(NamedTuple):
    """What the lots that ended in a bar brought, summed over lots; money in quote currency."""

    realised: Float[Array, "..."]
    """Profit before fees, without the liquidated lots."""
    fees: Float[Array, "..."]
    losses: Float[Array, "..."]
    """Margins of the liquidated lots."""
    notional: Float[Array, "..."]
    events: Tally
    """By their name in `state.EVENTS`."""


@dataclasses.dataclass
class Life(Moment[tuple[End, Array], tuple[Exits, Holdings]]):
    """The candles of a bar, what they end, and what is held after them.

    Attributes:
      entry: what opens before the first candle.
      side: of the account, +1 or -1, and so of each lot.
      closes: whether a close order was accepted: its lots see no candle.
      bars: 1, or 0 for an episode that is over.
      rule: see `intrabar.resolve`.
      slots: lots the account can hold.
    """

    entry: Entry
    bar: PackedBar
    side: Float[Array, "..."]
    closes: Bool[Array, "..."]
    bars: Int[Array, "..."]
    tick_value: Float[Array, "..."]
    rule: Intrabar
    slots: int
    params: EnvParams

    def __post_init__(self):
        self.paths = _follow(self.bar, self.side)

    def read(self, lot: Lots, slot: Int[Array, "..."] | int) -> Lots:
        here = self.entry.slot == slot
        return jax.tree.map(lambda new, old: jnp.where(here, new, old), self.entry.lot, lot)

    def look(self, lot: Lots) -> tuple[End, Array]:
        """How it ended, and the price at which it was filled; 0 where it was not."""
        end = _live(self.rule)(lot, self.bar, self.paths, self.side, self.closes, self.params)
        return end, _fill(lot, end, self.bar, self.paths, self.side, self.params)

    def weigh(self, lot: Lots, facts: tuple[End, Array], slot: Int[Array, "..."] | int) -> tuple[Exits, Holdings]:
        end, fill = facts
        lot = lot.replace(side=self.side)  # a number fewer to read
        exits = settle(lot, end, fill, self.tick_value, self.slots, self.params)
        return exits, Holdings.of(keep(lot, end, self.bars), self.bar.unpack().mark_close[-1])

    def write(self, lot: Lots, facts: tuple[End, Array]) -> dict[str, Array]:
        return vars(keep(lot, facts[0], self.bars))

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
    return lots, exits, held.priced(life.tick_value)


@stage
def _follow(packed: PackedBar, side: Float[Array, "..."]) -> Paths:
    """See `intrabar.follow`; `by_tile`."""
    return jax.tree.map(by_tile, follow(packed.unpack(), side, packed.has_mark))


@functools.cache
def _live(rule: Intrabar) -> Callable[..., End]:
    @stage
    def live(lots: Lots, packed: PackedBar, paths: Paths, side: Array, closes: Array, params: EnvParams) -> End:
        held = lots.quantity > 0
        hit = find(jax.tree.map(by_column, paths), lots, side, rule)
        due = held & is_due(lots.age + 1, params) & any_of(packed.unpack().valid)
        how = jnp.where((hit.how == Exit.NONE) & due, Exit.TIMED_OUT, hit.how)
        how = jnp.where(closes & held, Exit.CLOSED, how)
        return End.pack(how, hit.candle, hit.ambiguous & ~closes, held & (how == Exit.NONE))

    return live


@stage
def _fill(
    lots: Lots, end: End, packed: PackedBar, paths: Paths, side: Float[Array, "..."], params: EnvParams
) -> Float[Array, "..."]:
    """The price at which each lot is filled; 0 where none is."""
    bar = packed.unpack()
    opened, extreme = (side * at_candle(by_column(path), end.candle) for path in (paths.opens, paths.worst))
    stopped = fill_stop(side, lots.stop, opened, extreme, bar.atr, params)
    at_market = fill_exit(side, jnp.where(end.how == Exit.CLOSED, bar.open[0], bar.close[-1]), bar.atr, params)
    price = jnp.where(end.how == Exit.STOPPED, stopped, jnp.where(end.how == Exit.TARGET, lots.target, at_market))
    return jnp.where(end.how > Exit.LIQUIDATED, price, 0)


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


def keep(lots: Lots, end: End, bars: Int[Array, "..."]) -> Lots:
    """What is still held, so many bars older; zeros in the other slots."""
    return jax.tree.map(lambda x: jnp.where(end.kept, x, 0), lots.replace(age=lots.age + bars))


@stage
def count(
    verdict: Int[Array, "..."], opened: Bool[Array, "..."], liquidated: Int[Array, "..."], exits: Tally
) -> Int[Array, "counts ..."]:
    """What a step adds to `Ledger.counts`. No verdict at all is -1."""
    events = {name: exits[name] for name in exits.names} | {"opened": opened, "liquidated": liquidated}
    verdicts = lax.broadcasted_iota(jnp.int32, (len(Verdict), *verdict.shape), 0) == verdict
    happened = jnp.stack([events[name].astype(jnp.int32) for name in EVENTS])
    return jnp.concatenate([verdicts.astype(jnp.int32), happened])
