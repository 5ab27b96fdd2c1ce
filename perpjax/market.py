"""The market on the device: rows of candles and features, segments, and the one slice that cuts out a bar."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from perpjax._describe import format_time, is_concrete
from perpjax._grid import BAR_MS, MAX_CANDLES
from perpjax._pytree import pytree
from perpjax.instrument import Instrument
from perpjax.rules.bar import Bar
from perpjax.xla.kernels import Program, default_platform
from perpjax.xla.rows import LINE, prefetch_row, take_columns, take_row


class Segments(NamedTuple):
    """Stretches of bars that episodes may be drawn from, S of them."""

    first: Int[Array, "S"]
    """First decision bar."""
    last: Int[Array, "S"]
    """Last bar that may be stepped."""
    instrument: Int[Array, "S"]
    """Row of `Market.instruments`."""
    start: Int[Array, "S"]
    """Row at which the segment's own history begins."""


class Origin(NamedTuple):
    """Where a run of rows comes from; read by the host only."""

    symbol: str
    start_ms: int
    row: int
    num_bars: int


@pytree(static=("candles_per_bar", "has_mark"), host=("origins", "feature_names"))
class Market:
    """A dataset in device arrays. For N bars there are N + 1 rows.

    Row t holds the facts known at the open of bar t but not yet at the open of bar t - 1. Those are the candles of
    bar t - 1, the funding settled at its open, and the ATR and features at t. So a step reads one row, the one after
    its bar. A market cut off after row t knows nothing later. Row 0 of an origin has no valid candles.

    Attributes:
      rows: see `data.markets.pack_rows`; prices in ticks, features unscaled.
      scaler_mean, scaler_scale: applied by the observation, `(x - mean) / scale`.
      segments: where episodes may start and must end.
      instruments: an `Instrument` with a leading axis on its leaves, a row for each symbol.
      candles_per_bar: K, static.
      has_mark: whether mark candles are stored (static); if not, the last price is the mark.
      origins, feature_names: host properties; another dataset of the same shape does not retrace.
    """

    rows: Float[Array, "rows width"]
    scaler_mean: Float[Array, "F"]
    scaler_scale: Float[Array, "F"]
    segments: Segments
    instruments: Instrument
    candles_per_bar: int
    has_mark: bool
    origins: tuple[Origin, ...]
    feature_names: tuple[str, ...]

    def __post_init__(self):
        if not 1 <= self.candles_per_bar <= MAX_CANDLES:
            raise ValueError(
                f"candles_per_bar is {self.candles_per_bar}; it must be 1 to {MAX_CANDLES}: a step looks at every "
                "candle of its bar, so the shortest candles are those of a minute"
            )

    def __repr__(self) -> str:
        if not is_concrete(self.rows, self.segments.first):
            return f"Market of {', '.join(self.symbols)}, of arrays that have no numbers yet"
        end = self.open_time_ms(self.num_bars + len(self.origins) - 1)
        spans = zip(self.segments.first.tolist(), self.segments.last.tolist(), strict=True)
        return (
            f"Market of {', '.join(self.symbols)}: {self.num_bars:,} bars of {self.candles_per_bar} candles, "
            f"{format_time(self.start_ms)} to {format_time(end)} UTC\n"
            f"  may be traded: bars {', '.join(f'{a:,} .. {b:,}' for a, b in spans)}\n"
            f"  {len(self.feature_names)} features; mark: {'its own candles' if self.has_mark else 'the last price'}"
        )

    def bar(
        self, t: Int[Array, "..."], halted: Bool[Array, "..."] | bool = False, program: Program | None = None
    ) -> Bar:
        """Bar t, cut out in one piece; t is 0 .. N - 1, and not checked. Axes of a batch of bars come last.

        Args:
          halted: where nothing trades and no funding settles.
          program: the program that reads the bar.
        """
        columns = take_columns(self.rows, t + 1, slice(0, self._columns + 2), program or Program(default_platform()))
        halted = jnp.broadcast_to(halted, jnp.shape(t))
        return Bar(columns, halted, self.candles_per_bar, self.has_mark, axis=-1 - jnp.ndim(t))

    def last_close(self, t: Int[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The last valid close up to the end of bar t, and the ATR known at its open; ticks."""
        columns = 4 * self.candles_per_bar - 1, self._columns
        close, atr = (take_row(self.rows, t + 1, slice(i, i + 1))[0] for i in columns)
        return close, atr

    def known(self, t: Int[Array, ""]) -> Float[Array, "F"]:
        """Features known at the open of bar t, unscaled."""
        return take_row(self.rows, t, self._features)

    def prefetch_known(self, t: Int[Array, "..."], after: Float[Array, "..."], program: Program) -> Int[Array, "..."]:
        """`t`, once the row that `known` reads is in a CPU's cache. See `xla.rows.prefetch_row`."""
        return prefetch_row(self.rows, t, self._features, program, after)

    @property
    def candles(self) -> Float[Array, "N columns"]:
        """The candles and funding of every bar: columns of `data.markets.pack_rows` up to the mark close before."""
        return self._part(slice(1, None), slice(0, self._columns))

    @property
    def atr(self) -> Float[Array, "rows"]:
        """Wilder ATR(14) known at the open of bar t, whole ticks, at least 1."""
        return self._part(slice(None), self._columns + 1)

    @property
    def features(self) -> Float[Array, "rows F"]:
        """Known at the open of bar t, unscaled."""
        return self._part(slice(None), self._features)

    def _part(self, rows: slice, columns: slice | int) -> Float[Array, "..."]:
        with jax.debug_nans(False):  # the features of the first rows are NaN
            return self.rows[rows, columns]

    @property
    def _columns(self) -> int:
        return self.candles_per_bar * (9 if self.has_mark else 5) + 3

    @property
    def _features(self) -> slice:
        start = whole_lines(self._columns + 2)
        return slice(start, start + self.scaler_mean.shape[-1])

    def with_columns(
        self, candles: ArrayLike | None = None, atr: ArrayLike | None = None, features: ArrayLike | None = None
    ) -> "Market":
        """The same market with other candles, ATR or features, as the properties have them."""
        rows, c = self.rows, self._columns
        if candles is not None:
            rows = rows.at[1:, :c].set(candles)
        if atr is not None:
            rows = rows.at[:, c + 1].set(atr)
            rows = rows.at[1:, c].set(rows[:-1, c + 1])
        if features is not None:
            rows = rows.at[:, self._features].set(features)
        return self.replace(rows=rows)

    def instrument_at(self, row: Int[Array, ""]) -> Instrument:
        """The instrument of a segment. With one symbol nothing is gathered."""
        if self.instruments.tick_size.shape[0] == 1:
            return self.instrument
        return jax.tree.map(lambda x: jnp.moveaxis(x[row], range(row.ndim), range(-row.ndim, 0)), self.instruments)

    @property
    def instrument(self) -> Instrument:
        """The instrument of the first symbol (of the only one, mostly)."""
        return jax.tree.map(lambda x: x[0], self.instruments)

    @property
    def num_bars(self) -> int:
        """Number of bars, over all origins."""
        return sum(o.num_bars for o in self.origins)

    @property
    def start_ms(self) -> int:
        """Open time of bar 0, UTC milliseconds."""
        return self.origins[0].start_ms

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols, in order of first appearance."""
        return tuple(dict.fromkeys(o.symbol for o in self.origins))

    def open_time_ms(self, t: int) -> int:
        """Open time of row t, UTC milliseconds (host only)."""
        origin = [o for o in self.origins if o.row <= t][-1]
        return origin.start_ms + BAR_MS * (int(t) - origin.row)

    def num_starts(self, episode_length: int) -> int:
        """How many first bars leave room for a whole episode (host only)."""
        return int(np.maximum(_start_counts(jax.tree.map(np.asarray, self.segments), episode_length), 0).sum())


def _start_counts(segments: Segments, episode_length: int) -> Int[Array, "S"]:
    return segments.last + 1 - episode_length - segments.first + 1


def pick_start(market: Market, bits: UInt32[Array, ""], episode_length: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """A first bar and its segment, uniform over all segments' starts if `bits` are 32 uniform bits."""
    counts = jnp.maximum(_start_counts(market.segments, episode_length), 0)
    ends = jnp.cumsum(counts)
    draw = lax.rem(bits, ends[-1].astype(jnp.uint32)).astype(jnp.int32)
    segment = jnp.sum(draw >= ends)
    return market.segments.first[segment] + draw - (ends - counts)[segment], segment


def find_segment(market: Market, t: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The bar nearest to t that a segment may step, and that segment."""
    nearest = jnp.clip(t, market.segments.first, market.segments.last)
    segment = jnp.argmin(jnp.abs(nearest - t))
    return nearest[segment], segment


def whole_lines(floats: int) -> int:
    """That many floats, rounded up to whole cache lines."""
    return -(-floats // LINE) * LINE
