"""Pictures of an episode, for notebooks. Needs matplotlib: `pip install 'perpjax[viz]'`."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.typing import ArrayLike

from perpjax.audit.replay import LotLife, replay_lots
from perpjax.env import PerpEnv
from perpjax.rules.bar import Bar
from perpjax.state import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UP, DOWN, STALE = "#2a9d8f", "#e76f51", "#bbbbbb"
COLORS = ("#0072b2", "#e69f00", "#882255", "#56b4e9", "#cc79a7", "#000000", "#999933", "#332288")
"""One for each lot, in turn: distinct for colour-blind readers (Okabe and Ito; Tol), and distinct from the candles."""
ENDS = {"stopped": "v", "target": "^", "liquidated": "X", "timed_out": "s", "closed": "o"}
"""Marker of each reason."""
LEVELS = {"stop": "--", "target": ":", "liquidation": "-."}
"""Line style of each level."""


def plot_bars(ax: "Axes", env: PerpEnv, states: Sequence[State], actions: Sequence[ArrayLike]) -> None:
    """Draw the candles between consecutive states, and every lot held in them.

    Args:
      ax: matplotlib axes; x counts bars, y is price in quote currency.
      env: the environment that made the states.
      states: the results of `reset` and of each `step`, unbatched, without auto-reset; at least two.
      actions: one between each state and the next.

    The lots come from `replay_lots`. Each has a number and a colour. A triangle marks its entry. A hollow triangle at
    the left edge is a lot already held in the first state. Thin lines are its stop (dashed), target (dotted) and
    liquidation price (dash-dotted), up to the candle of its exit. The exit marker stands in that candle, at the fill or
    at the liquidation price. Levels far from the candles are written at the edge instead of drawn. Grey candles are
    invalid.

    Raises:
      ValueError: from `replay_lots`, for example because the float64 twin disagrees with the states.
    """
    lives = replay_lots(env, states, actions)
    tick = float(env.market.instrument_at(states[0].instrument).tick_size)
    bars = [jax.device_get(env.market.bar(s.t)) for s in states[:-1] if not (s.terminated or s.truncated)]
    if not bars:
        raise ValueError("no bar lies between the states; give at least two, the first of an episode that goes on")
    first = int(states[0].t)
    low, high = min(b.low.min() for b in bars) * tick, max(b.high.max() for b in bars) * tick
    _draw_candles(ax, bars, tick)
    _Lots(ax, lives, first, env.market.candles_per_bar, tick).draw(low, high)
    ax.set_xlim(-0.15, len(bars) + 0.15)
    ax.set_xticks(range(len(bars) + 1), [str(first + i) for i in range(len(bars) + 1)])
    ax.set(xlabel="decision bar", ylabel="price")


def _draw_candles(ax: "Axes", bars: list[Bar], tick: float) -> None:
    for i, bar in enumerate(bars):
        k = len(bar.open)
        for c in range(k):
            x = i + (c + 0.5) / k
            color = (UP if bar.close[c] >= bar.open[c] else DOWN) if bar.valid[c] else STALE
            ax.plot([x, x], [bar.low[c] * tick, bar.high[c] * tick], color=color, lw=1)
            ax.plot([x, x], [bar.open[c] * tick, bar.close[c] * tick], color=color, lw=5, solid_capstyle="butt")
        ax.axvline(i, color="#eeeeee", zorder=0)


class _Lots:
    """The lots of one picture. Every artist has a `gid`: its kind and the number of its lot."""

    def __init__(self, ax: "Axes", lives: list[LotLife], first: int, candles: int, tick: float):
        self.ax, self.lives, self.first, self.candles, self.tick = ax, lives, first, candles, tick
        self.taken: Counter = Counter()
        """Count of markers or words at a place."""
        self.ends: dict[tuple[str, float], list[float]] = {}
        """End of the last line in each lane of a level."""

    def draw(self, low: float, high: float) -> None:
        """Draw all lots over candles between two prices."""
        self.limit_prices(low, high)
        for n, life in enumerate(self.lives):
            for name in LEVELS:
                self.draw_level(n, life, name)
            x, y = self.entry(life)
            self.draw_marker(n, "entry", x, y, ">", hollow=life.entry_bar < self.first)
            if life.exit:
                end_x, end_y = self.end(life)
                self.ax.plot([x, end_x], [y, end_y], color=_color(n), lw=0.8, alpha=0.6, gid=f"path {n + 1}")
                self.draw_marker(n, f"exit {life.exit.how}", end_x, end_y, ENDS[life.exit.how])
        if self.lives:
            self.draw_legend()

    def entry(self, life: LotLife) -> tuple[float, float]:
        """Return x and y of a lot's entry. An entry before the picture stands at the left edge."""
        return float(max(life.entry_bar - self.first, 0)), life.lot.entry * self.tick

    def end(self, life: LotLife) -> tuple[float, float]:
        """Return x and y of a lot's exit, in the middle of the candle."""
        return life.exit_bar - self.first + (life.exit.candle + 0.5) / self.candles, life.exit.price * self.tick

    def level(self, life: LotLife, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return x and y of the steps of a level, up to the end of the lot's last candle. NaN: no level."""
        left, lived = self.entry(life)[0], len(life.liquidations)
        right = self.end(life)[0] + 0.5 / self.candles if life.exit else left + lived
        if name == "liquidation":
            levels = np.array([x or np.nan for x in life.liquidations])
        else:
            levels = np.full(lived, getattr(life.lot, name))
        return np.append(left + np.arange(lived), right), np.append(levels, levels[-1:]) * self.tick

    def limit_prices(self, low: float, high: float) -> None:
        """Fit the y axis to candles and fills, and to the levels at most half their height away."""
        fills = [self.entry(life)[1] for life in self.lives] + [self.end(life)[1] for life in self.lives if life.exit]
        low, high = min([low, *fills]), max([high, *fills])
        reach = (high - low) / 2
        levels = np.concatenate([[low], *(self.level(life, name)[1] for life in self.lives for name in LEVELS)])
        near = levels[(levels >= low - reach) & (levels <= high + reach)]
        low, high = min(low, near.min()), max(high, near.max())
        margin = 0.12 * (high - low) or self.tick
        self.ax.set_ylim(low - margin, high + margin)

    def draw_level(self, n: int, life: LotLife, name: str) -> None:
        """Draw one line, or write its price at the edge if it is out of sight. Lines at one price lie side by side."""
        from matplotlib.transforms import ScaledTranslation

        xs, ys = self.level(life, name)
        known = ys[~np.isnan(ys)]
        if not known.size:
            return
        y = float(known[0])
        shift = ScaledTranslation(0, 1.5 / 72 * self.lane(name, y, xs), self.ax.figure.dpi_scale_trans)
        self.ax.plot(
            xs, ys, color=_color(n), ls=LEVELS[name], lw=1, drawstyle="steps-post", gid=f"{name} {n + 1}",
            transform=self.ax.transData + shift,
        )  # fmt: skip
        bottom, top = self.ax.get_ylim()
        if len(self.lives) > len(COLORS) or ((known >= bottom).any() and (known <= top).any()):
            return
        below = y < bottom
        edge, arrow, up, anchor = (0, "↓", 1, "bottom") if below else (1, "↑", -1, "top")
        self.ax.annotate(
            f"{arrow} {n + 1} {name} {y:.6g}", (xs[0], edge), xycoords=self.ax.get_xaxis_transform(),
            xytext=(3, up * (3 + 9 * self.count(edge, xs[0]))), textcoords="offset points", fontsize=7,
            color=_color(n), va=anchor, gid=f"edge {n + 1}",
        )  # fmt: skip

    def draw_marker(self, n: int, kind: str, x: float, y: float, marker: str, hollow: bool = False) -> None:
        """Draw a marker and the number of its lot. At one place later markers are larger and lie beneath."""
        others = self.count(x, y)
        self.ax.plot(
            [x], [y], color=_color(n), marker=marker, ls="none", ms=8 + 5 * others, zorder=4 - 0.1 * others,
            markerfacecolor="white" if hollow else _color(n), markeredgecolor=_color(n) if hollow else "white",
            markeredgewidth=0.7, clip_on=False, gid=f"{kind} {n + 1}",
        )  # fmt: skip
        self.ax.annotate(
            str(n + 1), (x, y), xytext=(6 + 8 * others, 4), textcoords="offset points", fontsize=8, weight="bold",
            color=_color(n), zorder=5, gid=f"number {n + 1}",
        )  # fmt: skip

    def draw_legend(self) -> None:
        """Draw the legend beside the picture: markers, line styles, and the lots if each has its own colour."""
        from matplotlib.lines import Line2D

        seen = {life.exit.how for life in self.lives if life.exit}
        markers = {"entry": ">"} | {f"exit: {how.replace('_', ' ')}": m for how, m in ENDS.items() if how in seen}
        keys = [Line2D([], [], color="dimgrey", ls="none", marker=m, label=label) for label, m in markers.items()]
        keys += [Line2D([], [], color="dimgrey", ls=style, lw=1, label=name) for name, style in LEVELS.items()]
        if len(self.lives) <= len(COLORS):
            sides = ["long" if life.lot.side > 0 else "short" for life in self.lives]
            keys += [Line2D([], [], color=_color(n), lw=3, label=f"lot {n + 1}, {x}") for n, x in enumerate(sides)]
        self.ax.legend(handles=keys, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)

    def lane(self, name: str, y: float, xs: np.ndarray) -> int:
        """Return the lowest lane of a level that is free at the beginning of a line."""
        ends = self.ends.setdefault((name, y), [])
        free = next((i for i, end in enumerate(ends) if end <= xs[0]), len(ends))
        ends[free : free + 1] = [xs[-1]]
        return free

    def count(self, *place: float) -> int:
        """Return the number of earlier calls for a place."""
        self.taken[place] += 1
        return self.taken[place] - 1


def _color(n: int) -> str:
    return COLORS[n % len(COLORS)]
