"""The level of each lot that a bar reaches first. Masks and selects; no loop over lots."""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax.params import Intrabar
from perpjax.rules.bar import Bar
from perpjax.state import Lots


class ExitReason(enum.IntEnum):
    """Why a lot ended. Every reason above LIQUIDATED has a fill."""

    NONE = 0
    LIQUIDATED = 1
    STOPPED = 2
    TARGET = 3
    CLOSED = 4
    TIMED_OUT = 5


class Touch(NamedTuple):
    """The first level that each lot reaches in one bar."""

    reason: Int[Array, "lots ..."]
    """NONE, LIQUIDATED, STOPPED or TARGET."""
    candle: Int[Array, "lots ..."]
    """The candle that reached it; K if none did."""
    ambiguous: Bool[Array, "lots ..."]
    """Whether that candle reached two or more of the lot's levels and its open decided nothing."""


Candles = Any
"""A number of each candle: [K, ...], or another sequence of K arrays [...]."""


class Paths(NamedTuple):
    """The candles of a bar times the side of an account: down is adverse for long and short alike."""

    worst: Candles
    """Lowest price of each candle; +inf if the candle is not valid."""
    best: Candles
    """Highest price; -inf if the candle is not valid."""
    mark_worst: Candles | None
    """None if the last price is the mark."""


def resolve(bar: Bar, lots: Lots, side: Float[Array, "..."], rule: Intrabar) -> Touch:
    """Find the first candle that ends each lot, and the level that counts.

    Args:
      bar: K candles; those that are not valid are skipped.
      lots: held during the bar, all of one side.
      side: of the account, +1 or -1.
      rule: which level counts if one candle reaches several and its open does not say.
    """
    return first_touch(signed_paths(bar, side), bar, lots, side, rule)


def signed_paths(bar: Bar, side: Float[Array, "..."], each_candle: Callable = lambda function: function) -> Paths:
    """The extremes of a bar's candles, seen from one side.

    Args:
      each_candle: applies a function of one candle to all of them; by default it broadcasts.
    """

    def sign(of_long: Array, of_short: Array, unreachable: float) -> Candles:
        def signed(traded: Array, of_long: Array, of_short: Array) -> Array:
            valid = (traded > 0) & ~bar.halted
            return jnp.where(valid, side * jnp.where(side > 0, of_long, of_short), unreachable)

        return each_candle(signed)(bar.traded, of_long, of_short)

    mark_worst = sign(bar.mark_low, bar.mark_high, jnp.inf) if bar.has_mark else None
    return Paths(sign(bar.low, bar.high, jnp.inf), sign(bar.high, bar.low, -jnp.inf), mark_worst)


def at_candle(path: Candles, candle: Int[Array, "lots ..."]) -> Float[Array, "lots ..."]:
    """The price of each lot's candle. K is small and static: the chain of selects fuses."""
    first = jnp.broadcast_to(path[0], candle.shape)
    return functools.reduce(lambda x, k: jnp.where(candle == k, path[k], x), range(1, len(path)), first)


def first_touch(paths: Paths, bar: Bar, lots: Lots, side: Float[Array, "..."], rule: Intrabar) -> Touch:
    """See `resolve`."""
    held = lots.quantity > 0
    stop, beyond = side * lots.stop, side * lots.target + 1
    liquidation = jnp.where(lots.liquidation > 0, side * lots.liquidation, -jnp.inf)
    mark_worst = paths.worst if paths.mark_worst is None else paths.mark_worst
    by_liquidation = _find_first([low <= liquidation for low in mark_worst])
    by_stop = _find_first([low <= stop for low in paths.worst])
    by_target = _find_first([high >= beyond for high in paths.best])
    first = jnp.minimum(jnp.minimum(by_liquidation, by_stop), by_target)

    # Within that candle its open comes first. No earlier candle reached the level, so neither did its open.
    price = at_candle(side * bar.open, first)
    at_open = jnp.where(
        at_candle(side * bar.mark_open, first) <= liquidation,
        ExitReason.LIQUIDATED,
        jnp.where(price <= stop, ExitReason.STOPPED, jnp.where(price >= beyond, ExitReason.TARGET, ExitReason.NONE)),
    )
    reached = by_liquidation == first, by_stop == first, by_target == first
    reason = jnp.where(at_open > 0, at_open, _choose(rule, *reached, stop >= liquidation))
    ambiguous = (sum(x.astype(jnp.int32) for x in reached) >= 2) & (at_open == 0)
    candles = len(paths.worst)
    ended = held & (first < candles)
    return Touch(jnp.where(ended, reason, ExitReason.NONE), jnp.where(ended, first, candles), ended & ambiguous)


def _find_first(reached: list[Bool[Array, "lots ..."]]) -> Int[Array, "lots ..."]:
    """Number of the first that holds; their count if none does."""
    first = jnp.full(reached[0].shape, len(reached), jnp.int32)
    for k, holds in reversed(list(enumerate(reached))):
        first = jnp.where(holds, jnp.int32(k), first)
    return first


def _choose(rule: Intrabar, liquidation: Array, stop: Array, target: Array, stop_not_beyond: Array) -> Array:
    """The level that counts among those reached in one candle, if its open does not say."""
    orders = {
        "nearest": (
            (stop & stop_not_beyond, ExitReason.STOPPED),
            (liquidation, ExitReason.LIQUIDATED),
            (stop, ExitReason.STOPPED),
        ),
        "pessimistic": ((liquidation, ExitReason.LIQUIDATED), (stop, ExitReason.STOPPED)),
        "optimistic": (
            (target, ExitReason.TARGET),
            (stop, ExitReason.STOPPED),
            (liquidation, ExitReason.LIQUIDATED),
        ),
    }
    chosen = jnp.full(stop.shape, ExitReason.TARGET, jnp.int32)
    for reached, reason in reversed(orders[rule]):
        chosen = jnp.where(reached, jnp.int32(reason), chosen)
    return chosen
