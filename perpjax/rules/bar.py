"""One 15-minute bar as the rules read it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perpjax._arrays import fold
from perpjax._pytree import pytree


def _candles(series: int, doc: str) -> property:
    def get(self: "Bar") -> Float[Array, "K ..."]:
        first = (series if self.has_mark or series < 4 else series - 4) * self.candles_per_bar
        return self.cut(slice(first, first + self.candles_per_bar))

    return property(get, doc=doc)


def _number(place: int, doc: str) -> property:
    return property(lambda self: self.cut(place), doc=doc)


@pytree(static=("candles_per_bar", "has_mark", "axis"))
class Bar:
    """The K candles of one bar, the funding settled at its open, and the ATR around it.

    Prices are whole ticks. Opens and closes of the mark and the funding price may have parts of ticks.

    Attributes:
      columns: the row of `Market.rows`, up to the ATR after the bar. Every property is a slice of it.
        Of a batch it may be any sequence of rows with the batch on their last axis.
      halted: True if the episode is over: nothing trades and no funding settles.
      candles_per_bar: K, static.
      has_mark: False if the market stores no mark candles (static). The last price is then the mark.
      axis: of the columns and so of the candles (static): -1, or -2 if the bars of a batch lie on the last axis.
    """

    columns: Float[Array, "columns ..."]
    halted: Bool[Array, "..."]
    candles_per_bar: int
    has_mark: bool
    axis: int = -1

    open = _candles(0, "Last price, [K, ...].")
    high = _candles(1, "Last price, [K, ...].")
    low = _candles(2, "Last price, [K, ...].")
    close = _candles(3, "Last price, [K, ...].")
    mark_open = _candles(4, "Mark price, [K, ...].")
    mark_high = _candles(5, "Mark price, [K, ...].")
    mark_low = _candles(6, "Mark price, [K, ...].")
    mark_close = _candles(7, "Mark price, [K, ...].")
    traded = _candles(8, "Above 0 where the candle exists and something traded in it, [K, ...].")
    funding_price = _number(-4, "Mark price of the settlement, [...].")
    mark_before = _number(-3, "Mark close of the bar before, [...]. The account is marked to it when this bar opens.")
    atr = _number(-2, "Known at the open, [...].")
    atr_after = _number(-1, "Known when the bar has closed, [...].")

    @property
    def funding_rate(self) -> Float[Array, "..."]:
        """Fraction of notional that longs pay at the open; 0 without a settlement."""
        return self.cut(-5) * ~self.halted

    @property
    def valid(self) -> Bool[Array, "K ..."]:
        """False where the candle is missing or nothing traded: no fill, no trigger."""
        halted = self.halted[..., None] if self.axis == -1 else self.halted[..., None, :]
        return (self.traded > 0) & ~halted

    def is_valid(self, candle: int) -> Bool[Array, "..."]:
        """`valid` of one candle."""
        return (self.cut((8 if self.has_mark else 4) * self.candles_per_bar + candle) > 0) & ~self.halted

    def any_valid(self) -> Bool[Array, "..."]:
        """Whether any candle is valid."""
        return (fold(jnp.maximum, self.traded) > 0) & ~self.halted

    def cut(self, columns: slice | int) -> Float[Array, "..."]:
        """Some columns."""
        return self.columns[..., columns] if self.axis == -1 else self.columns[columns]
