"""Parts of a market, and one market of several."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from perpjax._grid import BAR_MS, FIRST_DECISION
from perpjax.market import Market, Origin, Segments, one_segment


def slice_market(market: Market, start: int, stop: int) -> Market:
    """The market of bars start .. stop - 1 of a market with one origin, which knows nothing after them."""
    (origin,) = market.origins
    if not 0 <= start < stop <= origin.num_bars:
        raise ValueError(f"bars {start} .. {stop} do not lie within the market's {origin.num_bars} bars")
    first = max(int(market.segments.first[0]) - start, FIRST_DECISION)
    return market.replace(
        rows=market.rows[start : stop + 1],
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
        rows=join(*(m.rows for m in markets)),
        segments=jax.tree.map(join, *shifted),
        instruments=jax.tree.map(join, *(m.instruments for m in markets)),
        origins=tuple(o._replace(row=o.row + int(r)) for m, r in zip(markets, rows, strict=False) for o in m.origins),
    )
