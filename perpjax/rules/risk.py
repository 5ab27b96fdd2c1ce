"""Every limit, once, in `review`. A live runner can ask it, too."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perpjax._arrays import split_table
from perpjax.instrument import Instrument
from perpjax.params import EnvParams
from perpjax.rules.execution import fill_entry, slip
from perpjax.rules.margin import at_liquidation, liquidation_ticks
from perpjax.rules.orders import CLOSE, HOLD, SHORT, Order, Verdict

MIN_STOP, MAX_STOP = 0.5, 3.0
"""Range of the stop multiple, ATRs."""
MIN_TARGET, MAX_TARGET = 0.5, 6.0
"""Range of the target multiple, ATRs; the target is also at least as far as the stop."""
STEP_SLACK = 2.0**-22
"""Fraction of a quantity by which it may fall short of a whole step and still count as that; at most `HALF_STEP`."""
HALF_STEP = float(np.nextafter(np.float32(0.5), np.float32(0)))
"""Just under 1/2: from 2^23 steps on float32 would round a whole number and a half up."""


class Exposure(NamedTuple):
    """The account as an order finds it."""

    lots: Int[Array, "..."]
    """Lots open."""
    slots: int
    """Lots the account can hold."""
    side: Float[Array, "..."]
    """+1, -1, or 0 when flat: lots are never long and short at once."""
    wallet: Float[Array, "..."]
    """Quote; after funding and the opening check."""
    equity: Float[Array, "..."]
    """Wallet plus unrealised profit at the mark close of the bar before."""
    margin: Float[Array, "..."]
    """Sum over lots."""


class Review(NamedTuple):
    """The verdict, and the lot that an accepted opening order becomes."""

    verdict: Int[Array, "..."]
    side: Float[Array, "..."]
    """Of the lot that opens; the account's if none does."""
    entry: Float[Array, "..."]
    """Fill price, ticks."""
    quantity: Float[Array, "..."]
    """Steps."""
    leverage: Float[Array, "..."]
    margin: Float[Array, "..."]
    """Notional / leverage, quote."""
    notional: Float[Array, "..."]
    """Quote; 0 if no lot opens."""
    fee: Float[Array, "..."]
    """Of the entry, quote."""
    stop: Float[Array, "..."]
    """Ticks."""
    target: Float[Array, "..."]
    liquidation: Float[Array, "..."]
    """Ticks; 0 for a long that has none."""

    @property
    def opens(self) -> Bool[Array, "..."]:
        """Whether a lot opens."""
        return self.notional != 0

    @property
    def closes(self) -> Bool[Array, "..."]:
        """Whether the lots are closed: every order that is accepted opens or closes."""
        return (self.verdict == Verdict.ACCEPTED) & ~self.opens

    def slippage(self, price: Float[Array, "..."], tick_value: Float[Array, "..."]) -> Float[Array, "..."]:
        """From the open, in ticks, to the fill of the lot that opens; quote."""
        return jnp.where(self.opens, self.side * self.quantity * (self.entry - price) * tick_value, 0)


def available_exposure(
    equity: Float[Array, "..."], margin: Float[Array, "..."], params: EnvParams
) -> Float[Array, "..."]:
    """Margin that may still be posted, quote."""
    return params.max_exposure * equity - margin


def is_due(age: Int[Array, "lots ..."], params: EnvParams) -> Bool[Array, "lots ..."]:
    """Whether this is the last bar that a lot may be held."""
    return age >= params.max_hold


def is_ruined(equity: Float[Array, "..."], params: EnvParams) -> Bool[Array, "..."]:
    """Whether the account is too small to go on."""
    return equity <= params.ruin_fraction * params.initial_equity


def review(
    order: Order,
    account: Exposure,
    price: Float[Array, "..."],
    mark: Float[Array, "..."],
    tradable: Bool[Array, "..."],
    atr: Float[Array, "..."],
    instrument: Instrument,
    params: EnvParams,
    liquidation: Callable = liquidation_ticks,
) -> Review:
    """Judge one order at the open of a bar, and size it.

    Args:
      order: as decoded; multiples and leverage are clamped here.
      account: as the order finds it.
      price: last-price open of the bar's first candle, ticks.
      mark: mark open of that candle, ticks.
      tradable: whether that candle is valid.
      atr: known at the open, ticks.
      liquidation: `liquidation_ticks`, or the same compiled in another way.
    """
    available = available_exposure(account.equity, account.margin, params)
    leverage = jnp.clip(order.leverage, 1.0, params.max_leverage)
    wanted = order.size * available * leverage
    for floor, _, most, _, _ in split_table(instrument.brackets):
        leverage = jnp.where(wanted > floor, jnp.minimum(leverage, most), leverage)
    stop_multiple = jnp.clip(order.stop_multiple, MIN_STOP, MAX_STOP)
    target_multiple = jnp.clip(order.target_multiple, MIN_TARGET, MAX_TARGET)

    # Unrealised profit is never posted, and the entry fee is paid from the free margin, too.
    free_margin = account.wallet - account.margin
    margin = jnp.minimum(order.size * available, free_margin / (1 + leverage * params.taker_fee))
    side = jnp.where(order.direction == SHORT, -1.0, 1.0)
    entry = fill_entry(side, price, atr, params)
    step_notional = entry * instrument.tick_value
    steps = margin * leverage / step_notional
    quantity = jnp.minimum(jnp.floor(steps + jnp.minimum(steps * STEP_SLACK, HALF_STEP)), instrument.max_steps)
    notional = quantity * step_notional
    posted = notional / leverage
    level = liquidation(side, entry, quantity, posted, instrument)
    stop_distance = jnp.maximum(slip(price, atr, params) + 1, jnp.round(stop_multiple * atr))
    target_distance = jnp.maximum(stop_distance, jnp.round(target_multiple * atr))

    # The first line that holds. A new reason to refuse an order is a line here, and a `Verdict`.
    close = order.direction == CLOSE
    verdicts = (
        (order.direction == HOLD, Verdict.HOLD),
        (~tradable, Verdict.DATA_GAP),
        (close & (account.lots == 0), Verdict.HOLD),
        (close, Verdict.ACCEPTED),
        (account.lots >= account.slots, Verdict.MAX_LOTS),
        (account.side * side < 0, Verdict.NO_HEDGE),
        ((available <= 0) | (free_margin <= 0), Verdict.MAX_EXPOSURE),
        (wanted > instrument.brackets[-1, 1], Verdict.MAX_NOTIONAL),
        ((quantity < 1) | (notional < instrument.min_notional), Verdict.BELOW_MINIMUM),
        (at_liquidation(side, mark, level), Verdict.IMMEDIATE_LIQUIDATION),
    )
    verdict = jnp.int32(Verdict.ACCEPTED)
    for holds, code in reversed(verdicts):
        verdict = jnp.where(holds, jnp.int32(code), verdict)
    opens = (verdict == Verdict.ACCEPTED) & ~close
    notional = jnp.where(opens, notional, 0)
    return Review(
        verdict, jnp.where(opens, side, account.side), entry, quantity, leverage, posted, notional,
        params.taker_fee * notional, entry - side * stop_distance, entry + side * target_distance, level,
    )  # fmt: skip
