"""A lot from its opening to its end: the candles of a bar, the fills, the money."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax.params import EnvParams, Intrabar
from perpjax.rules.bar import Bar
from perpjax.rules.execution import fill_exit, fill_stop
from perpjax.rules.intrabar import ExitReason, Paths, at_candle, first_touch
from perpjax.rules.risk import Review, is_due
from perpjax.state import LOT_FIELDS, Lots, gain


def open_lot(review: Review) -> Lots:
    """The lot of an accepted order."""
    return Lots(
        review.side, review.quantity, review.entry, review.margin, review.leverage, review.stop, review.target,
        review.liquidation, age=jnp.int32(0),
    )  # fmt: skip


class LotOutcome(NamedTuple):
    """The fate of each lot in one bar, in 16 bits: many kernels read it."""

    word: Int[Array, "..."]

    @classmethod
    def of(cls, reason: Array, candle: Array, ambiguous: Array, kept: Array) -> "LotOutcome":
        """`ExitReason` in bits 0 to 2, the candle in 3 to 10, ambiguous in 11, kept in 12."""
        word = reason | candle << 3 | ambiguous.astype(jnp.int32) << 11 | kept.astype(jnp.int32) << 12
        return cls(word.astype(jnp.int16))

    @property
    def reason(self) -> Int[Array, "..."]:
        """`ExitReason`."""
        return self.word.astype(jnp.int32) & 7

    @property
    def candle(self) -> Int[Array, "..."]:
        """The candle that ended the lot; K if none did."""
        return self.word.astype(jnp.int32) >> 3 & 0xFF

    @property
    def ambiguous(self) -> Bool[Array, "..."]:
        """See `Touch`."""
        return self.word.astype(jnp.int32) >> 11 & 1 > 0

    @property
    def kept(self) -> Bool[Array, "..."]:
        """Whether the lot is still held."""
        return self.word >= 1 << 12

    @property
    def filled(self) -> Bool[Array, "..."]:
        """Whether the lot ended by a fill: a liquidation has none."""
        return self.reason > ExitReason.LIQUIDATED


class BarTotals(NamedTuple):
    """The lots that ended in a bar and those still held, summed over an account's lots. Money in quote currency."""

    realised: Float[Array, "..."]
    """Profit before fees, without the liquidated lots."""
    fees: Float[Array, "..."]
    losses: Float[Array, "..."]
    """Margins of the liquidated lots."""
    notional: Float[Array, "..."]
    """Of the exits that have a fill."""
    slippage: Float[Array, "..."]
    gap_losses: Float[Array, "..."]
    forgiven: Float[Array, "..."]
    """These three as in `state.Ledger`."""
    events: Mapping[str, Array]
    """Lots by the way they ended, as in `state.EVENTS`, and lots still "held": flags of one lot, counts of all."""
    margin: Float[Array, "..."]
    """This field and the others below are about the lots still held."""
    quantity: Float[Array, "..."]
    """Steps."""
    unrealised: Float[Array, "..."]
    """At the mark close of the bar, ticks times steps."""
    oldest: Int[Array, "..."]
    """Age in bars."""
    nearest_liquidation: Float[Array, "..."]
    """The nearest liquidation price times the side, ticks; -inf if no lot has one."""

    MAXIMA = ("oldest", "nearest_liquidation")


@dataclasses.dataclass(frozen=True)
class LiveThrough:
    """The `LotRule` of a bar's candles: 7. first touch, 8. timeout, 9. fills and their money.

    Attributes:
      bar: its candles.
      paths: `signed_paths` of them, for the account's side.
      review: of the bar's order. Its side is the account's, and so the side of each lot.
      intrabar: see `intrabar.resolve`.
    """

    bar: Bar
    paths: Paths
    review: Review
    tick_value: Float[Array, "..."]
    params: EnvParams
    intrabar: Intrabar

    fields = LOT_FIELDS

    @property
    def decide(self):
        return self.outcome, self.trigger, self.fill

    def outcome(self, lot: Lots) -> LotOutcome:
        """The reason and the candle of its end, if it ends."""
        bar, side, held, closes = self.bar, self.review.side, lot.quantity > 0, self.review.closes
        touch = first_touch(self.paths, bar, lot, side, self.intrabar)
        due = held & is_due(lot.age + 1, self.params) & bar.any_valid()
        reason = jnp.where((touch.reason == ExitReason.NONE) & due, ExitReason.TIMED_OUT, touch.reason)
        # A resting stop or target that the first open has reached is filled before a CLOSE, which comes at that open.
        # `touch` does not tell it: a level reached later in candle 0 comes after the CLOSE,
        # and a lot liquidated at the open is gone already (`SettleAndCheck`).
        opened = side * bar.open[0]
        resting = (opened <= side * lot.stop) | (opened > side * lot.target)
        reason = jnp.where(closes & held & ~resting, ExitReason.CLOSED, reason)
        return LotOutcome.of(reason, touch.candle, touch.ambiguous & ~closes, held & (reason == ExitReason.NONE))

    def trigger(self, lot: Lots, outcome: LotOutcome) -> Float[Array, "..."]:
        """The price that made it end, before slippage; 0 if it did not end by a fill."""
        bar, side, reason = self.bar, self.review.side, outcome.reason
        opened = at_candle(side * bar.open, outcome.candle)
        price = jnp.where(reason == ExitReason.STOPPED, side * jnp.minimum(side * lot.stop, opened), lot.target)
        price = jnp.where(reason == ExitReason.CLOSED, bar.open[0], price)
        price = jnp.where(reason == ExitReason.TIMED_OUT, bar.close[-1], price)
        return jnp.where(outcome.filled, price, 0)

    def fill(self, lot: Lots, outcome: LotOutcome, trigger: Float[Array, "..."]) -> Float[Array, "..."]:
        """The price of its fill; 0 if it has none."""
        bar, side, reason, params = self.bar, self.review.side, outcome.reason, self.params
        extreme = side * at_candle(self.paths.worst, outcome.candle)
        stopped = fill_stop(side, trigger, extreme, bar.atr, params)
        price = jnp.where(reason == ExitReason.STOPPED, stopped, fill_exit(side, trigger, bar.atr, params))
        return jnp.where(reason == ExitReason.TARGET, trigger, jnp.where(outcome.filled, price, 0))

    def apply(self, lot: Lots, outcome: LotOutcome, trigger: Array, fill: Array) -> tuple[Lots, BarTotals]:
        """The lot a bar older if it is still held, an empty slot otherwise."""
        side, reason, tick_value = self.review.side, outcome.reason, self.tick_value
        lot = lot.replace(side=side)  # the account's: a number fewer to read
        worth = lot.quantity * tick_value
        profit, fee, forgiven = (jnp.where(fill > 0, x, 0) for x in realise(lot, fill, tick_value, self.params))
        gap = jnp.where(reason == ExitReason.STOPPED, side * (lot.stop - trigger), 0)
        held = keep(lot, outcome, self.bar.halted)
        return held, BarTotals(
            realised=profit,
            fees=fee,
            losses=jnp.where(reason == ExitReason.LIQUIDATED, lot.margin, 0),
            notional=worth * fill,
            slippage=worth * (side * (trigger - fill)),
            gap_losses=worth * gap,
            forgiven=forgiven,
            events={
                "liquidated": reason == ExitReason.LIQUIDATED,
                "stopped": reason == ExitReason.STOPPED,
                "targets": reason == ExitReason.TARGET,
                "closed": reason == ExitReason.CLOSED,
                "timed_out": reason == ExitReason.TIMED_OUT,
                "ambiguous": outcome.ambiguous,
                "held": outcome.kept,
            },
            margin=held.margin,
            quantity=held.quantity,
            unrealised=gain(held, self.bar.mark_close[-1]),
            oldest=held.age,
            nearest_liquidation=jnp.where(held.liquidation > 0, held.side * held.liquidation, -jnp.inf),
        )


def realise(
    lot: Lots, fill: Float[Array, "..."], tick_value: Float[Array, "..."], params: EnvParams
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Profit and fee of an exit at `fill`, and the part forgiven: after entry no lot costs more than its margin."""
    profit = gain(lot, fill) * tick_value
    fee = params.taker_fee * (lot.quantity * fill * tick_value)
    floored = jnp.maximum(profit, -lot.margin)
    return floored, jnp.minimum(fee, lot.margin + floored), jnp.maximum(fee - profit - lot.margin, 0)


def keep(lots: Lots, outcome: LotOutcome, halted: Bool[Array, "..."]) -> Lots:
    """The lots still held, a bar older unless `halted`; zeros in the other slots."""
    older = lots.replace(age=jnp.where(halted, lots.age, lots.age + 1))
    return jax.tree.map(lambda x: jnp.where(outcome.kept, x, 0), older)
