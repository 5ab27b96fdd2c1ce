"""The rows of a market on the host, parts of a market, and one market of several."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from perpjax._grid import BAR_MS, FIRST_DECISION
from perpjax.instrument import Instrument
from perpjax.market import Market, Origin, Segments, whole_lines


def pack_rows(
    last: np.ndarray,
    mark: np.ndarray | None,
    valid: np.ndarray,
    funding: np.ndarray,
    atr: np.ndarray,
    features: np.ndarray,
) -> np.ndarray:
    """Pack host arrays into the rows of `Market`.

    Args:
      last: [N, K, 4] open, high, low, close in ticks; mark: the same or None.
      valid: [N, K] bool; funding: [N, 2] rate and price at the bar's open.
      atr: [N + 1] ticks; features: [N + 1, F].

    Returns:
      [N + 1, width] float32. A row begins with the bar before: K opens, highs, lows and closes, then those of the mark
      if there is one. Next is K times whether the candle is valid, the funding's rate and price, the mark close before
      that bar, and the ATR at its open. The ATR now and the features follow. Each half is filled up with zeros to whole
      cache lines.
    """
    blocks = [last] if mark is None else [last, mark]
    num_bars, k, _ = last.shape
    before = np.concatenate([blocks[-1][:1, 0, 0], blocks[-1][:-1, -1, 3]])
    bars = [b.transpose(0, 2, 1).reshape(num_bars, -1) for b in blocks] + [valid, funding]
    bars = np.column_stack([*bars, before, atr[:-1]])
    nothing = np.concatenate([np.repeat([b[0, 0, 0] for b in blocks], 4 * k), np.zeros(k + 2), before[:1], atr[:1]])
    halves = np.column_stack([np.vstack([nothing, bars]), atr]), features
    filled = [np.pad(x, ((0, 0), (0, whole_lines(x.shape[1]) - x.shape[1]))) for x in halves]
    return np.hstack(filled).astype(np.float32)


def to_device(rows: np.ndarray) -> Float[Array, "rows width"]:
    """The rows as a device array. The features of the first ones are NaN, which `jax_debug_nans` must not refuse."""
    with jax.debug_nans(False):
        return jnp.asarray(rows)


def one_segment(first: int, last: int) -> Segments:
    """The segments of a market with a single origin."""
    return Segments(*(jnp.asarray([x], jnp.int32) for x in (first, last, 0, 0)))


def find_segments(first: int, traded: np.ndarray, hole_bars: int | None) -> Segments:
    """The segments of bars first .. N - 1: all of them, or those between the holes.

    Args:
      traded: [N] bool, bars with a valid candle.
      hole_bars: so many bars in a row without a trade are a hole, in which no episode starts and which none spans.
        None: there are no holes.
    """
    edges = np.flatnonzero(np.diff(traded.astype(np.int8), prepend=1, append=1))
    holes = [(a, b) for a, b in edges.reshape(-1, 2).tolist() if hole_bars is not None and b - a >= hole_bars]
    starts = [first, *(b for _, b in holes)]
    stops = [*(a for a, _ in holes), len(traded)]
    kept = [(max(a, first), b - 1) for a, b in zip(starts, stops, strict=True) if b > max(a, first)]
    return Segments(*jnp.asarray([(*span, 0, 0) for span in kept], jnp.int32).T)


def find_traded(market: Market) -> np.ndarray:
    """Which bars have a valid candle, [N] bool."""
    k = market.candles_per_bar
    first = (8 if market.has_mark else 4) * k
    return np.asarray(market.candles[:, first : first + k] > 0).any(axis=1)


def slice_market(market: Market, start: int, stop: int) -> Market:
    """The market of bars start .. stop - 1 of a market with one origin, which knows nothing after them."""
    (origin,) = market.origins
    if not 0 <= start < stop <= origin.num_bars:
        raise ValueError(f"bars {start} .. {stop} do not lie within the market's {origin.num_bars} bars")
    first = np.maximum(np.asarray(market.segments.first) - start, FIRST_DECISION)
    last = np.minimum(np.asarray(market.segments.last), stop - 1) - start
    kept = first <= last
    kept[0] |= not kept.any()  # no episode starts there
    spans = np.column_stack([first, last, np.zeros_like(first), np.zeros_like(first)])[kept]
    return market.replace(
        rows=to_device(np.asarray(market.rows)[start : stop + 1]),
        segments=Segments(*jnp.asarray(spans, jnp.int32).T),
        origins=(Origin(origin.symbol, origin.start_ms + BAR_MS * start, 0, stop - start),),
    )


def concatenate_markets(markets: list[Market]) -> Market:
    """One market of several (symbols, splits, folds), concatenated along bars; each keeps its segments.

    Raises:
      ValueError: if K, the mark columns, the features or the scalers differ.
    """
    head = markets[0]
    for m in markets[1:]:
        for name in ("candles_per_bar", "has_mark", "feature_names"):
            if getattr(m, name) != getattr(head, name):
                raise ValueError(f"markets differ in {name}: {getattr(head, name)} and {getattr(m, name)}")
        if not (np.array_equal(m.scaler_mean, head.scaler_mean) and np.array_equal(m.scaler_scale, head.scaler_scale)):
            raise ValueError("markets differ in their scalers; build them with one scaler")
    rows = np.cumsum([0] + [m.rows.shape[0] for m in markets])
    instruments = np.cumsum([0] + [m.instruments.tick_size.shape[0] for m in markets])

    def moved(s: Segments, row: int, instrument: int) -> Segments:
        return Segments(s.first + row, s.last + row, s.instrument + instrument, s.start + row)

    shifted = [moved(m.segments, int(r), int(i)) for m, r, i in zip(markets, rows, instruments, strict=False)]

    def join(*x: Array) -> Array:
        return jnp.concatenate(x)

    brackets = max(m.instruments.brackets.shape[1] for m in markets)
    return head.replace(
        rows=to_device(np.concatenate([np.asarray(m.rows) for m in markets])),
        segments=jax.tree.map(join, *shifted),
        instruments=jax.tree.map(join, *(_pad_brackets(m.instruments, brackets) for m in markets)),
        origins=tuple(o._replace(row=o.row + int(r)) for m, r in zip(markets, rows, strict=False) for o in m.origins),
    )


def _pad_brackets(instruments: Instrument, rows: int) -> Instrument:
    """Tables of so many brackets: the first one is repeated, which changes no limit and no liquidation price."""

    def pad(table: Array) -> Array:
        return jnp.concatenate([jnp.repeat(table[:, :1], rows - table.shape[1], axis=1), table], axis=1)

    padded = jax.tree.map(lambda x: x, instruments)  # `replace` would check the host's numbers
    for name in ("brackets", "maintenance"):
        object.__setattr__(padded, name, pad(getattr(instruments, name)))
    return padded
