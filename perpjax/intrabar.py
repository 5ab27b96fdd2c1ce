"""Which level of which lot is reached first inside a bar. Masks and counts; no loop over lots."""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perpjax.market import Bar
from perpjax.params import Intrabar
from perpjax.state import Lots


class Exit(enum.IntEnum):
    """How a lot ended."""

    NONE = 0
    LIQUIDATED = 1
    STOPPED = 2
    TARGET = 3
    CLOSED = 4
    TIMED_OUT = 5


class Hit(NamedTuple):
    """What the candles of one bar did to each lot."""

    how: Int[Array, "lots"]
    """NONE, LIQUIDATED, STOPPED or TARGET."""
    candle: Int[Array, "lots"]
    """The candle that ended the lot; K if none did."""
    ambiguous: Int[Array, "lots"]
    """1 if that candle reached two or more of its levels and its open decided nothing."""


def no_hit(bar: Bar, lots: Lots, side: Float[Array, ""]) -> Hit:
    """What the candles do where no lot is held."""
    zero = jnp.zeros(lots.quantity.shape, jnp.int32)
    return Hit(zero, zero + bar.open.shape[0], zero)


def resolve(bar: Bar, lots: Lots, side: Float[Array, ""], rule: Intrabar) -> Hit:
    """Find the first candle that ends each lot, and by which level.

    All prices are multiplied by `side`, so that down is adverse for long and short alike. A level's first candle is
    a count: the number of candles whose running extreme has not reached it yet.

    Args:
      bar: K candles; those that are not valid are skipped.
      lots: held during the bar, all of one side.
      side: of the account, +1 or -1.
      rule: who wins when one candle reaches several levels and its open does not say.
    """
    long, k = side > 0, bar.open.shape[0]

    def signed(price: Array, unreachable: float) -> Array:
        return jnp.where(bar.valid, side * price, unreachable)

    worst = signed(jnp.where(long, bar.low, bar.high), jnp.inf)
    best = signed(jnp.where(long, bar.high, bar.low), -jnp.inf)
    mark_worst = signed(jnp.where(long, bar.mark_low, bar.mark_high), jnp.inf)
    stop, beyond = side * lots.stop, side * lots.target + 1
    liquidation = jnp.where(lots.liquidation > 0, side * lots.liquidation, -jnp.inf)

    by_liquidation = _first_at_or_below(mark_worst, liquidation)
    by_stop = _first_at_or_below(worst, stop)
    by_target = _first_at_or_below(-best, -beyond)
    first = jnp.minimum(jnp.minimum(by_liquidation, by_stop), by_target)

    # Within that candle its open comes first. No earlier candle reached the level, so neither did its open.
    open_liquidates = _first_at_or_below(signed(bar.mark_open, jnp.inf), liquidation) == first
    open_stops = _first_at_or_below(signed(bar.open, jnp.inf), stop) == first
    open_targets = _first_at_or_below(-signed(bar.open, -jnp.inf), -beyond) == first
    by_rule = _choose(rule, by_liquidation == first, by_stop == first, by_target == first, stop >= liquidation)
    at_open = jnp.where(
        open_liquidates,
        Exit.LIQUIDATED,
        jnp.where(open_stops, Exit.STOPPED, jnp.where(open_targets, Exit.TARGET, 0)),
    )
    how = jnp.where(at_open > 0, at_open, by_rule)

    ended = (first < k) & (lots.quantity > 0)
    several = (by_liquidation == first).astype(jnp.int32) + (by_stop == first) + (by_target == first) >= 2
    return Hit(
        how=jnp.where(ended, how, Exit.NONE),
        candle=jnp.where(ended, first, k),
        ambiguous=(ended & several & (at_open == 0)).astype(jnp.int32),
    )


def _first_at_or_below(path: Float[Array, "K"], level: Float[Array, "lots"]) -> Int[Array, "lots"]:
    """Index of the first price at or below each level; K if none is. K is small and static: the chain fuses."""
    low, count = path[0], jnp.zeros(level.shape, jnp.int32)
    for price in path:
        low = jnp.minimum(low, price)
        count += low > level
    return count


def _choose(rule: Intrabar, liquidation: Array, stop: Array, target: Array, stop_not_beyond: Array) -> Array:
    """The level that counts among those reached in one candle, where its open does not say."""
    orders = {
        "nearest": (
            (stop & stop_not_beyond, Exit.STOPPED),
            (liquidation, Exit.LIQUIDATED),
            (stop, Exit.STOPPED),
        ),
        "pessimistic": ((liquidation, Exit.LIQUIDATED), (stop, Exit.STOPPED)),
        "optimistic": ((target, Exit.TARGET), (stop, Exit.STOPPED), (liquidation, Exit.LIQUIDATED)),
    }
    chosen = jnp.full(stop.shape, Exit.TARGET, jnp.int32)
    for reached, exit in reversed(orders[rule]):
        chosen = jnp.where(reached, exit, chosen)
    return chosen
