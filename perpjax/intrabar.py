"""Which level of which lot is reached first inside a bar. Masks and selects; no loop over lots."""

import enum
import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import each_row
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

    how: Int[Array, "lots ..."]
    """NONE, LIQUIDATED, STOPPED or TARGET."""
    candle: Int[Array, "lots ..."]
    """The candle that ended the lot; K if none did."""
    ambiguous: Bool[Array, "lots ..."]
    """Whether that candle reached two or more of its levels and its open decided nothing."""


class Paths(NamedTuple):
    """The candles of a bar times the side of an account, so that down is adverse for long and short alike."""

    worst: Float[Array, "K ..."]
    """Lowest of each candle; of one that is not valid out of reach."""
    best: Float[Array, "K ..."]
    """Highest."""
    opens: Float[Array, "K ..."]
    mark_worst: Float[Array, "K ..."] | None = None
    """None: the last price is the mark."""
    mark_opens: Float[Array, "K ..."] | None = None


def resolve(bar: Bar, lots: Lots, side: Float[Array, "..."], rule: Intrabar) -> Hit:
    """Find the first candle that ends each lot, and by which level.

    Args:
      bar: K candles; those that are not valid are skipped.
      lots: held during the bar, all of one side.
      side: of the account, +1 or -1.
      rule: who wins when one candle reaches several levels and its open does not say.
    """
    return find(follow(bar, side, has_mark=True), lots, side, rule)


def follow(bar: Bar, side: Float[Array, "..."], has_mark: bool) -> Paths:
    """The paths of a bar's prices for an account of one side."""

    def sign(of_long: Array, of_short: Array, unreachable: float) -> Array:
        def signed(valid: Array, of_long: Array, of_short: Array) -> Array:
            return jnp.where(valid, side * jnp.where(side > 0, of_long, of_short), unreachable)

        return each_row(signed)(bar.valid, of_long, of_short)

    paths = Paths(sign(bar.low, bar.high, jnp.inf), sign(bar.high, bar.low, -jnp.inf), side * bar.open)
    if not has_mark:
        return paths
    return paths._replace(mark_worst=sign(bar.mark_low, bar.mark_high, jnp.inf), mark_opens=side * bar.mark_open)


def at_candle(path: Float[Array, "K ..."], candle: Int[Array, "lots ..."]) -> Float[Array, "lots ..."]:
    """The price of each lot's candle. K is small and static: the chain of selects fuses."""
    first = jnp.broadcast_to(path[0], candle.shape)
    return functools.reduce(lambda x, k: jnp.where(candle == k, path[k], x), range(1, len(path)), first)


def find(paths: Paths, lots: Lots, side: Float[Array, "..."], rule: Intrabar) -> Hit:
    """See `resolve`."""
    held = lots.quantity > 0
    stop, beyond = side * lots.stop, side * lots.target + 1
    liquidation = jnp.where(lots.liquidation > 0, side * lots.liquidation, -jnp.inf)
    mark_worst, mark_opens = (
        (paths.worst, paths.opens) if paths.mark_worst is None else (paths.mark_worst, paths.mark_opens)
    )
    by_liquidation = _find_first([low <= liquidation for low in mark_worst])
    by_stop = _find_first([low <= stop for low in paths.worst])
    by_target = _find_first([high >= beyond for high in paths.best])
    first = jnp.minimum(jnp.minimum(by_liquidation, by_stop), by_target)

    # Within that candle its open comes first. No earlier candle reached the level, so neither did its open.
    price = at_candle(paths.opens, first)
    at_open = jnp.where(
        at_candle(mark_opens, first) <= liquidation,
        Exit.LIQUIDATED,
        jnp.where(price <= stop, Exit.STOPPED, jnp.where(price >= beyond, Exit.TARGET, Exit.NONE)),
    )
    reached = by_liquidation == first, by_stop == first, by_target == first
    how = jnp.where(at_open > 0, at_open, _choose(rule, *reached, stop >= liquidation))
    ambiguous = (sum(x.astype(jnp.int32) for x in reached) >= 2) & (at_open == 0)
    candles = len(paths.worst)
    ended = held & (first < candles)
    return Hit(jnp.where(ended, how, Exit.NONE), jnp.where(ended, first, candles), ended & ambiguous)


def _find_first(reached: list[Bool[Array, "lots ..."]]) -> Int[Array, "lots ..."]:
    """The first that holds; their number if none does."""
    first = jnp.full(reached[0].shape, len(reached), jnp.int32)
    for k, here in reversed(list(enumerate(reached))):
        first = jnp.where(here, k, first)
    return first


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
