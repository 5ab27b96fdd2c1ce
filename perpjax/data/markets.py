"""The rows of a market on the host, parts of a market, and one market of several."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from perpjax._grid import BAR_MS, FIRST_DECISION
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


def slice_market(market: Market, start: int, stop: int) -> Market:
    """The market of bars start .. stop - 1 of a market with one origin, which knows nothing after them."""
    (origin,) = market.origins
    if not 0 <= start < stop <= origin.num_bars:
        raise ValueError(f"bars {start} .. {stop} do not lie within the market's {origin.num_bars} bars")
    first = max(int(market.segments.first[0]) - start, FIRST_DECISION)
    return market.replace(
        rows=to_device(np.asarray(market.rows)[start : stop + 1]),
        segments=one_segment(first, stop - start - 1),
        origins=(Origin(origin.symbol, origin.start_ms + BAR_MS * start, 0, stop - start),),
    )


def concatenate_markets(markets: list[Market]) -> Market:
    """One market of several (symbols, splits, folds), concatenated along bars; each keeps its segments.

    Raises:
      ValueError: if K, the mark columns, the features, the brackets' shape or the scalers differ.
    """
    head = markets[0]
    for m in markets[1:]:
        for name in ("candles_per_bar", "has_mark", "feature_names"):
            if getattr(m, name) != getattr(head, name):
                raise ValueError(f"markets differ in {name}: {getattr(head, name)} and {getattr(m, name)}")
        if m.instruments.brackets.shape[1:] != head.instruments.brackets.shape[1:]:
            raise ValueError("markets differ in their number of brackets; give them tables of one length")
        if not (np.array_equal(m.scaler_mean, head.scaler_mean) and np.array_equal(m.scaler_scale, head.scaler_scale)):
            raise ValueError("markets differ in their scalers; build them with one scaler")
    rows = np.cumsum([0] + [m.rows.shape[0] for m in markets])
    instruments = np.cumsum([0] + [m.instruments.tick_size.shape[0] for m in markets])

    def moved(s: Segments, row: int, instrument: int) -> Segments:
        return Segments(s.first + row, s.last + row, s.instrument + instrument, s.start + row)

    shifted = [moved(m.segments, int(r), int(i)) for m, r, i in zip(markets, rows, instruments, strict=False)]

    def join(*x: Array) -> Array:
        return jnp.concatenate(x)

    return head.replace(
        rows=to_device(np.concatenate([np.asarray(m.rows) for m in markets])),
        segments=jax.tree.map(join, *shifted),
        instruments=jax.tree.map(join, *(m.instruments for m in markets)),
        origins=tuple(o._replace(row=o.row + int(r)) for m, r in zip(markets, rows, strict=False) for o in m.origins),
    )
