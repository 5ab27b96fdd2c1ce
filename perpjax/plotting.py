"""Pictures of an episode, for notebooks. Needs matplotlib: `pip install 'perpjax[viz]'`."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from perpjax.env import PerpEnv
from perpjax.state import Lots, State

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UP, DOWN, STALE = "#2a9d8f", "#e76f51", "#bbbbbb"
_ENDS = (
    ("liquidated", "X", "black"),
    ("stopped", "v", "crimson"),
    ("targets", "^", "seagreen"),
    ("timed_out", "s", "slateblue"),
    ("closed", "o", "steelblue"),
)


def plot_bars(ax: "Axes", env: PerpEnv, states: Sequence[State]) -> None:
    """Draw the candles between consecutive states, and the life of every lot across them.

    Args:
      ax: matplotlib axes; x counts bars, y is price in quote currency.
      env: the environment that made the states.
      states: what `reset` and then each `step` returned, unbatched, without auto-reset.

    A lot is a bar from its opening to its end at its entry price; dashed are its stop, dotted its target, dash-dotted
    its liquidation price. The mark under a bar says what ended the lots in it. Grey candles are not valid.
    """
    tick = float(env.market.instrument.tick_size)
    bars = [_host(env.market.bar(s.t)) for s in states[:-1]]
    first = int(states[0].t)
    k = env.market.candles_per_bar
    for i, bar in enumerate(bars):
        for c in range(k):
            x = i + (c + 0.5) / k
            color = (UP if bar.close[c] >= bar.open[c] else DOWN) if bar.valid[c] else STALE
            ax.plot([x, x], [bar.low[c] * tick, bar.high[c] * tick], color=color, lw=1)
            ax.plot([x, x], [bar.open[c] * tick, bar.close[c] * tick], color=color, lw=5, solid_capstyle="butt")
        ax.axvline(i, color="#eeeeee", zorder=0)
    height = (max(b.high.max() for b in bars) - min(b.low.min() for b in bars)) * tick
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        _draw_lots(ax, _host(before.account.lots), _host(after.account.lots), i, tick)
        y = float(bars[i].low.min()) * tick
        for name, marker, color in _ENDS:
            ended = int(getattr(after.account.ledger, name)) - int(getattr(before.account.ledger, name))
            if ended:
                y -= 0.06 * height
                ax.plot(i + 0.3, y, marker=marker, color=color, ls="none")
                ax.annotate(f"{ended} {name}", (i + 0.36, y), va="center", fontsize=8)
    ax.set_xticks(range(len(bars) + 1), [str(first + i) for i in range(len(bars) + 1)])
    ax.set(xlabel="decision bar", ylabel="price")


def _draw_lots(ax: "Axes", before: Lots, after: Lots, left: int, tick: float) -> None:
    """The levels, during one bar, of the lots carried in and of the one it opened."""
    for n in range(before.quantity.shape[0]):
        lots = before if before.quantity[n] > 0 else after
        if lots.quantity[n] == 0:
            continue
        levels = [(lots.entry[n], "-", "black"), (lots.stop[n], "--", "crimson"), (lots.target[n], ":", "seagreen")]
        if lots.liquidation[n] > 0:
            levels.append((lots.liquidation[n], "-.", "black"))
        for level, style, color in levels:
            ax.hlines(level * tick, left, left + 1, color=color, ls=style, lw=1)


def _host(tree):
    return jax.tree.map(np.asarray, tree)
