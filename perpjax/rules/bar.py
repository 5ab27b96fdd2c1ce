"""One 15-minute bar as the rules read it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perpjax._arrays import fold
from perpjax._pytree import pytree


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

    def _series(self, number: int) -> Float[Array, "K ..."]:
        k = self.candles_per_bar
        return self._cut(slice(number * k, (number + 1) * k))

    def _cut(self, columns: slice | int) -> Float[Array, "..."]:
        return self.columns[..., columns] if self.axis == -1 else self.columns[columns]

    @property
    def open(self) -> Float[Array, "K ..."]:
        """Last price."""
        return self._series(0)

    @property
    def high(self) -> Float[Array, "K ..."]:
        """Last price."""
        return self._series(1)

    @property
    def low(self) -> Float[Array, "K ..."]:
        """Last price."""
        return self._series(2)

    @property
    def close(self) -> Float[Array, "K ..."]:
        """Last price."""
        return self._series(3)

    @property
    def mark_open(self) -> Float[Array, "K ..."]:
        """Mark price."""
        return self._series(4 if self.has_mark else 0)

    @property
    def mark_high(self) -> Float[Array, "K ..."]:
        """Mark price."""
        return self._series(5 if self.has_mark else 1)

    @property
    def mark_low(self) -> Float[Array, "K ..."]:
        """Mark price."""
        return self._series(6 if self.has_mark else 2)

    @property
    def mark_close(self) -> Float[Array, "K ..."]:
        """Mark price."""
        return self._series(7 if self.has_mark else 3)

    @property
    def traded(self) -> Float[Array, "K ..."]:
        """Above 0 where the candle exists and something traded in it."""
        return self._series(8 if self.has_mark else 4)

    @property
    def valid(self) -> Bool[Array, "K ..."]:
        """False where the candle is missing or nothing traded: no fill, no trigger."""
        return (self.traded > 0) & ~jnp.expand_dims(self.halted, self.axis)

    def is_valid(self, candle: int) -> Bool[Array, "..."]:
        """`valid` of one candle."""
        return (self._cut((8 if self.has_mark else 4) * self.candles_per_bar + candle) > 0) & ~self.halted

    def any_valid(self) -> Bool[Array, "..."]:
        """Whether any candle is valid."""
        return (fold(jnp.maximum, self.traded) > 0) & ~self.halted

    @property
    def funding_rate(self) -> Float[Array, "..."]:
        """Fraction of notional that longs pay at the open; 0 without a settlement."""
        return jnp.where(self.halted, 0, self._cut(-5))

    @property
    def funding_price(self) -> Float[Array, "..."]:
        """Mark price of the settlement."""
        return self._cut(-4)

    @property
    def mark_before(self) -> Float[Array, "..."]:
        """Mark close of the bar before. The account is marked to it when this bar opens."""
        return self._cut(-3)

    @property
    def atr(self) -> Float[Array, "..."]:
        """Known at the open."""
        return self._cut(-2)

    @property
    def atr_after(self) -> Float[Array, "..."]:
        """Known when the bar has closed."""
        return self._cut(-1)
