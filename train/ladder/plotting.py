"""The ladder as a picture: a panel for each check. Needs matplotlib: `pip install 'perpjax[viz]'`."""

import math
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from train.ladder.rungs import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOLDS, FAILS = "#2a9d8f", "#e76f51"
_COLUMNS = 4


def draw_verdicts(path: pathlib.Path, verdicts: dict[str, list[Verdict]]) -> None:
    """Write the picture: every seed a dot, the mean a line, the range that it must lie in shaded."""
    from matplotlib.figure import Figure

    panels = [(trainer, verdict) for trainer, of in verdicts.items() for verdict in of]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, (trainer, verdict) in zip(axes, panels, strict=False):
        _draw(ax, verdict, "" if trainer == "whole" else f"\n{trainer}")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw(ax: "Axes", verdict: Verdict, trainer: str) -> None:
    low, high = verdict.check.low, verdict.check.high
    color = HOLDS if verdict.passed else FAILS
    shown = [*verdict.values, *(x for x in (low, high) if math.isfinite(x)), 0.0]
    margin = 0.1 * (max(shown) - min(shown)) or 1.0
    bottom, top = min(shown) - margin, max(shown) + margin
    ax.axhspan(max(low, bottom), min(high, top), color=HOLDS, alpha=0.15, lw=0)
    ax.axhline(0.0, color="black", lw=0.5)
    ax.axhline(verdict.mean, color=color, lw=2)
    ax.plot(np.arange(len(verdict.values)), verdict.values, "o", color=color)
    ax.set(ylim=(bottom, top), xlim=(-0.5, len(verdict.values) - 0.5), xticks=range(len(verdict.values)), xlabel="seed")
    ax.set_title(f"{verdict.rung}: {'holds' if verdict.passed else 'FAILS'}{trainer}", fontsize=10)
    ax.set_ylabel(verdict.check.says, fontsize=8)
