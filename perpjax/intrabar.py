"""Which level of which lot is reached first inside a bar. Masks and counts; no loop over lots."""

import enum
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax.batching import stage, total
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
    ambiguous: Int[Array, "lots ..."]
    """1 if that candle reached two or more of its levels and its open decided nothing."""


def resolve(bar: Bar, lots: Lots, side: Float[Array, "..."], rule: Intrabar) -> Hit:
    """Find the first candle that ends each lot, and by which level.

    All prices are multiplied by `side`, so that down is adverse for long and short alike. A level's first candle is
    a count: the number of candles whose running extreme has not reached it yet.

    Args:
      bar: K candles; those that are not valid are skipped.
      lots: held during the bar, all of one side.
      side: of the account, +1 or -1.
      rule: who wins when one candle reaches several levels and its open does not say.
    """
    paths = _sign(bar, side)
    word = _find(rule)(lots.stop, lots.target, lots.liquidation, lots.quantity > 0, side, *paths)
    return Hit(how=word & 7, candle=(word >> 3) & 0xFF, ambiguous=word >> 11)


def at_candle(path: Float[Array, "K ..."], candle: Int[Array, "lots ..."]) -> Float[Array, "lots ..."]:
    """The price of each lot's candle. K is small and static: the chain of selects fuses."""
    first = jnp.broadcast_to(path[0], candle.shape)
    return functools.reduce(lambda x, k: jnp.where(candle == k, path[k], x), range(1, len(path)), first)


@stage
def _sign(bar: Bar, side: Float[Array, "..."]) -> tuple[Float[Array, "K ..."], ...]:
    """Adverse, favourable and adverse mark extreme so far, and both opens, of each candle; times `side`."""

    def so_far(price: Array, unreachable: float, extreme: Callable[[Array, Array], Array]) -> Array:
        path = jnp.where(bar.valid, side * price, unreachable)
        return jnp.stack(list(itertools.accumulate(path, extreme)))

    long = side > 0
    return (
        so_far(jnp.where(long, bar.low, bar.high), jnp.inf, jnp.minimum),
        so_far(jnp.where(long, bar.high, bar.low), -jnp.inf, jnp.maximum),
        so_far(jnp.where(long, bar.mark_low, bar.mark_high), jnp.inf, jnp.minimum),
        side * bar.open,
        side * bar.mark_open,
    )


@functools.cache
def _find(rule: Intrabar) -> Callable[..., Int[Array, "lots ..."]]:
    @stage
    def find(
        stop: Float[Array, "lots ..."],
        target: Float[Array, "lots ..."],
        liquidation: Float[Array, "lots ..."],
        held: Bool[Array, "lots ..."],
        side: Float[Array, "..."],
        worst: Float[Array, "K ..."],
        best: Float[Array, "K ..."],
        mark_worst: Float[Array, "K ..."],
        opens: Float[Array, "K ..."],
        mark_opens: Float[Array, "K ..."],
    ) -> Int[Array, "lots ..."]:
        """A `Hit` in one word a lot: how in bits 0 to 2, the candle in 3 to 10, ambiguous in 11."""
        stop, beyond = side * stop, side * target + 1
        liquidation = jnp.where(liquidation > 0, side * liquidation, -jnp.inf)
        by_liquidation = total(mark_worst[:, None] > liquidation)
        by_stop = total(worst[:, None] > stop)
        by_target = total(best[:, None] < beyond)
        first = jnp.minimum(jnp.minimum(by_liquidation, by_stop), by_target)

        # Within that candle its open comes first. No earlier candle reached the level, so neither did its open.
        price = at_candle(opens, first)
        at_open = jnp.where(
            at_candle(mark_opens, first) <= liquidation,
            Exit.LIQUIDATED,
            jnp.where(price <= stop, Exit.STOPPED, jnp.where(price >= beyond, Exit.TARGET, Exit.NONE)),
        )
        reached = by_liquidation == first, by_stop == first, by_target == first
        how = jnp.where(at_open > 0, at_open, _choose(rule, *reached, stop >= liquidation))
        ambiguous = (sum(x.astype(jnp.int32) for x in reached) >= 2) & (at_open == 0)
        ended = held & (first < len(worst))
        return jnp.where(ended, how | first << 3 | ambiguous.astype(jnp.int32) << 11, len(worst) << 3)

    return find


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
