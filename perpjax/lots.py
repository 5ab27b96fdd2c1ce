"""The life of a lot: how it opens, what a bar does to it, what its end brings."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import any_of, by_column, by_tile, fold, stage
from perpjax.execution import fill_exit, fill_stop
from perpjax.instrument import Instrument
from perpjax.intrabar import Exit, Paths, at_candle, find, follow
from perpjax.margin import liquidation_ticks
from perpjax.market import PackedBar
from perpjax.params import EnvParams, Intrabar
from perpjax.risk import Review, is_due
from perpjax.state import COUNTS, Holdings, Lots, sum_up


@pytree
class Book:
    """The lots of an account, and one that opens but is not written into its slot yet.

    Whoever needs them writes it, in its own `stage`: that costs less than to store nine fields.
    """

    lots: Lots
    new: Lots
    """One, without an axis for slots."""
    slot: Int[Array, "..."]
    """Where it goes; no slot if none opens."""

    def write(self) -> Lots:
        """All of them."""
        return self._write(self.lots, lax.broadcasted_iota(jnp.int32, self.lots.quantity.shape, 0))

    def each(self) -> list[Lots]:
        """All of them, one after the other."""
        return [self._write(lot, slot) for slot, lot in enumerate(self.lots.each())]

    def _write(self, lots: Lots, slot: Int[Array, "..."] | int) -> Lots:
        return jax.tree.map(lambda new, old: jnp.where(slot == self.slot, new, old), self.new, lots)


def open_lot(lots: Lots, order: Review, instrument: Instrument) -> Book:
    """Put an accepted order in the lowest free slot, with its liquidation price."""
    level = stage(liquidation_ticks)(order.side, order.entry, order.quantity, order.margin, instrument)
    new = Lots(
        order.side, order.quantity, order.entry, order.margin, order.leverage, order.stop, order.target, level,
        age=jnp.zeros_like(order.verdict),
    )  # fmt: skip
    return Book(lots, new, _find_slot(lots.quantity, order.opens))


@stage
def _find_slot(quantity: Float[Array, "lots ..."], opens: Bool[Array, "..."]) -> Int[Array, "..."]:
    """The lowest free slot where a lot opens; no slot elsewhere."""
    slots = quantity.shape[0]
    free = fold(jnp.minimum, jnp.where(quantity == 0, lax.broadcasted_iota(jnp.int32, quantity.shape, 0), slots))
    return jnp.where(opens, free, slots)


class End(NamedTuple):
    """What a bar did to each lot, in one word: read by many kernels, so it is short."""

    word: Int[Array, "..."]

    @classmethod
    def pack(cls, how: Array, candle: Array, ambiguous: Array, kept: Array) -> "End":
        """`Exit` in bits 0 to 2, the candle in 3 to 10, ambiguous in 11, kept in 12."""
        word = how | candle << 3 | ambiguous.astype(jnp.int32) << 11 | kept.astype(jnp.int32) << 12
        return cls(word.astype(jnp.int16))

    def each(self) -> "list[End]":
        """One after the other, of an array with the lots first."""
        return [End(word) for word in self.word]

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
        """By their name in `state.COUNTS`."""
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
    def of(cls, flags: list[dict[str, Bool[Array, "..."]]]) -> "Tally":
        """Of lots, one after the other."""
        names, bits = tuple(flags[0]), len(flags).bit_length()
        words = []
        for i in range(0, len(names), 31 // bits):
            some = names[i : i + 31 // bits]
            ones = (jnp.where(lot[name], 1 << bits * j, 0) for lot in flags for j, name in enumerate(some))
            words.append(functools.reduce(jnp.add, ones))
        return cls(words, names, bits)

    def __getitem__(self, name: str) -> Int[Array, "..."]:
        word, place = divmod(self.names.index(name), 31 // self.bits)
        return self.words[word] >> self.bits * place & (1 << self.bits) - 1


def live(
    book: Book, bar: PackedBar, side: Float[Array, "..."], closes: Bool[Array, "..."], rule: Intrabar, params: EnvParams
) -> tuple[End, Float[Array, "lots ..."]]:
    """What a bar does to each lot: a close at its open, its candles, or the end of the time that a lot may be held.

    Args:
      side: of the account, +1 or -1.
      closes: whether a close order was accepted.
      rule: see `intrabar.resolve`.

    Returns:
      How each lot ended, and the price at which it was filled; 0 where none was.
    """
    paths = _follow(bar, side)
    end = _live(rule)(book, bar, paths, side, closes, params)
    return end, _fill(book, end, bar, paths, side, params)


@stage
def _follow(packed: PackedBar, side: Float[Array, "..."]) -> Paths:
    """See `intrabar.follow`; `by_tile`."""
    return jax.tree.map(by_tile, follow(packed.unpack(), side, packed.has_mark))


@functools.cache
def _live(rule: Intrabar) -> Callable[..., End]:
    @stage
    def live(book: Book, packed: PackedBar, paths: Paths, side: Array, closes: Array, params: EnvParams) -> End:
        lots = book.write()
        held = lots.quantity > 0
        hit = find(jax.tree.map(by_column, paths), lots, side, rule)
        due = held & is_due(lots.age + 1, params) & any_of(packed.unpack().valid)
        how = jnp.where((hit.how == Exit.NONE) & due, Exit.TIMED_OUT, hit.how)
        how = jnp.where(closes & held, Exit.CLOSED, how)
        return End.pack(how, hit.candle, hit.ambiguous & ~closes, held & (how == Exit.NONE))

    return live


@stage
def _fill(
    book: Book, end: End, packed: PackedBar, paths: Paths, side: Float[Array, "..."], params: EnvParams
) -> Float[Array, "lots ..."]:
    """The price at which each lot is filled; 0 where none is."""
    lots, bar = book.write(), packed.unpack()
    opened, extreme = (side * at_candle(by_column(path), end.candle) for path in (paths.opens, paths.worst))
    stopped = fill_stop(side, lots.stop, opened, extreme, bar.atr, params)
    at_market = fill_exit(side, jnp.where(end.how == Exit.CLOSED, bar.open[0], bar.close[-1]), bar.atr, params)
    price = jnp.where(end.how == Exit.STOPPED, stopped, jnp.where(end.how == Exit.TARGET, lots.target, at_market))
    return jnp.where(end.how > Exit.LIQUIDATED, price, 0)


class Exits(NamedTuple):
    """What the lots that ended in a bar brought, summed over lots; money in quote currency."""

    realised: Float[Array, "..."]
    """Profit before fees, without the liquidated lots."""
    fees: Float[Array, "..."]
    losses: Float[Array, "..."]
    """Margins of the liquidated lots."""
    notional: Float[Array, "..."]
    events: Tally
    """By their name in `state.COUNTS`."""


@stage
def settle(
    book: Book,
    end: End,
    fill: Float[Array, "lots ..."],
    side: Float[Array, "..."],
    tick_value: Float[Array, "..."],
    params: EnvParams,
) -> Exits:
    """Realise every exit and take its fee. After entry no lot ever costs more than its margin."""

    def one(lot: Lots, end: End, fill: Array) -> tuple[Array, ...]:
        notional = lot.quantity * fill * tick_value
        profit = jnp.maximum(side * lot.quantity * (fill - lot.entry) * tick_value, -lot.margin)
        profit = jnp.where(fill > 0, profit, 0)
        fee = jnp.minimum(params.taker_fee * notional, lot.margin + profit)
        return profit, fee, jnp.where(end.how == Exit.LIQUIDATED, lot.margin, 0), notional

    money = zip(*map(one, book.each(), end.each(), fill), strict=True)
    return Exits(*(sum(x[1:], x[0]) for x in money), Tally.of([x.events for x in end.each()]))


def keep(lots: Lots, end: End, bars: Int[Array, "..."]) -> Lots:
    """What is still held, so many bars older; zeros in the other slots."""
    return jax.tree.map(lambda x: jnp.where(end.kept, x, 0), lots.replace(age=lots.age + bars))


@stage
def hold(
    book: Book,
    end: End,
    bars: Int[Array, "..."],
    side: Float[Array, "..."],
    bar: PackedBar,
    tick_value: Float[Array, "..."],
) -> Holdings:
    """What `keep` leaves, summed up and marked to the mark close of the bar.

    Args:
      side: of the account, and so of each lot: nine numbers fewer to read.
    """
    lots = [lot.replace(side=side) for lot in book.each()]
    kept = [keep(lot, how, bars) for lot, how in zip(lots, end.each(), strict=True)]
    return sum_up(kept, bar.unpack().mark_close[-1], tick_value)


@stage
def count(
    verdict: Int[Array, "..."], opened: Bool[Array, "..."], liquidated: Int[Array, "..."], exits: Tally
) -> Int[Array, "counts ..."]:
    """What a step adds to `Ledger.counts`. No verdict at all is -1."""
    events = {name: exits[name] for name in exits.names} | {"opened": opened, "liquidated": liquidated}
    happened = [events[name].astype(jnp.int32) if name in events else jnp.zeros_like(verdict) for name in COUNTS]
    happened = jnp.stack(happened)
    return happened + (lax.broadcasted_iota(jnp.int32, happened.shape, 0) == verdict)
