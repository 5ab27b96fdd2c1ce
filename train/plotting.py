"""Runs as a picture: returns over steps. Needs matplotlib: `pip install 'perpjax[viz]'`."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]


class Curves(NamedTuple):
    """The curves of one run: pairs of environment steps and a figure."""

    name: str
    validation: Points
    """Mean return of a window with all lots closed, % of initial equity."""
    training: Points
    """Mean return of the episodes that ended in an update, sum of rewards."""


def draw_runs(path: pathlib.Path, runs: Sequence[Curves]) -> None:
    """Write the picture: a panel for validation, one for training, a colour for each run."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.5 + 0.2 * len(runs)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    colors = [colormaps["tab10" if len(runs) <= 10 else "tab20"](i % 20) for i in range(len(runs))]
    for run, color in zip(runs, colors, strict=True):
        _draw(upper, run.validation, color, "o-")
        _draw(lower, run.training, color, "-")
    upper.set_title("Validation: mean return of a window, all lots closed", loc="left", fontsize=10)
    upper.set_ylabel("% of initial equity")
    lower.set_title("Training: mean return of the episodes that ended in an update", loc="left", fontsize=10)
    lower.set_ylabel("sum of rewards")
    lower.set_xlabel("environment steps")
    for ax, drawn in ((upper, any(run.validation for run in runs)), (lower, any(run.training for run in runs))):
        _dress(ax, drawn)
    handles = [upper.plot([], [], "o-", color=color, markersize=4)[0] for color in colors]
    # A dollar sign begins a formula, and a legend leaves out a name that begins with an underscore.
    labels = [" " * run.name.startswith("_") + run.name.replace("$", r"\$") for run in runs]
    figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=9)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _draw(ax: "Axes", points: Points, color: object, form: str) -> None:
    ax.plot([x for x, _ in points], [y for _, y in points], form, color=color, markersize=4, lw=1.5, alpha=0.9)


def _dress(ax: "Axes", drawn: bool) -> None:
    from matplotlib.ticker import EngFormatter

    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.axhline(0.0, color="black", lw=0.5)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if not drawn:
        ax.text(0.5, 0.6, "no data yet", transform=ax.transAxes, ha="center", color="gray")
