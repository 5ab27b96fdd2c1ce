"""An evaluation as a picture: equity, lots, drawdown. Needs matplotlib: `pip install 'perpjax[viz]'`."""

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from train.evaluate.evaluation import Evaluation
from train.evaluate.measures import Curve, combine_curves
from train.report.read import floats, milliseconds, read_evaluation
from train.run_folder import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POLICY = "#0072b2"
GAIN, LOSS, OPEN = "#2a9d8f", "#e76f51", "#777777"
RIVALS = {
    "market": {"label": "price of the market", "color": "#cccccc", "lw": 3},
    "buy and hold": {"label": "buy and hold", "color": "#555555", "lw": 1.2, "ls": "--"},
}
"""Baselines beside the policy, by the names in evaluation.json, and their lines. The two often coincide."""
LONGEST_NAME = 40
DAY = np.timedelta64(1, "D")


def plot_evaluation(evaluation: Evaluation | str | pathlib.Path, path: str | pathlib.Path | None = None) -> "Figure":
    """Draw an evaluation in three panels over one axis of time, and return the matplotlib figure.

    The upper panel has the equity of the policy, with buy and hold and the price from the same money. The middle panel
    has a triangle for each lot: up for long, down for short, at the entry, as high as its net result. The lower panel
    has the drawdown. Several accounts are one curve, as in `overall` of docs/evaluation.md.

    Args:
      evaluation: the result of `evaluate`, or the folder of a saved one.
      path: of an image to write, such as equity.png.

    Raises:
      ValueError: the folder is not a saved evaluation.
      OSError: the image cannot be written.
    """
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure

    found = evaluation if isinstance(evaluation, Evaluation) else read_evaluation(pathlib.Path(evaluation))
    figure = Figure(figsize=(10, 5.5), dpi=110, layout="constrained", facecolor="white")
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.4, 1.1))
    times, equity = _combine(found.equity, float(found.record["params"]["initial_equity"]))
    _draw_equity(upper, found.record, times, equity)
    _draw_lots(middle, found.trades)
    _draw_drawdown(lower, times, equity)
    for ax in (upper, middle, lower):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    locator = AutoDateLocator(minticks=4, maxticks=9)
    lower.xaxis.set_major_locator(locator)
    lower.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    lower.set_xlabel("time, UTC", fontsize=9)
    lower.margins(x=0.01)
    figure.align_ylabels()
    if path is not None:
        path = pathlib.Path(path)
        temporary = path.with_name("." + path.name)
        figure.savefig(temporary)
        temporary.replace(path)
    return figure


def _combine(table: pa.Table, initial: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and equity of all accounts together; of one account the rows of the table."""
    names = np.array(table["account"].to_pylist())
    times, equity = milliseconds(table["time"]).astype(np.int64), floats(table["equity"])
    if len(set(names)) > 1:
        symbols = np.array(table["symbol"].to_pylist())
        rows = [names == name for name in dict.fromkeys(names)]
        times, curve = combine_curves([Curve(symbols[row][0], times[row], equity[row]) for row in rows])
        equity = initial * curve
    return times.astype("datetime64[ms]"), equity


def _draw_equity(ax: "Axes", record: dict[str, Any], times: np.ndarray, equity: np.ndarray) -> None:
    from matplotlib.ticker import StrMethodFormatter

    ends = np.array(record["daily"]["dates"], "datetime64[ms]") + DAY
    days = np.concatenate([times[:1], np.minimum(ends, times[-1])])
    for rival in record["baselines"]:
        if style := RIVALS.get(rival["name"]):
            curve = equity[0] * np.cumprod([1.0, *(1 + np.array(rival["daily"]))])
            ax.plot(days, curve, gid=rival["name"], **style)
    ax.plot(times, equity, color=POLICY, lw=1.5, label="policy", gid="equity")
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_ylabel("equity,\nquote currency", fontsize=9)
    handles, labels = ax.get_legend_handles_labels()
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.12 * (top - bottom))  # room for the legend
    ax.legend(handles[::-1], labels[::-1], loc="upper left", ncols=3, frameon=False, fontsize=9)
    title = ax.set_title("", loc="left", fontsize=11)
    title.set_parse_math(False)
    title.set_text(_show(title, _describe(record)))


def _draw_lots(ax: "Axes", trades: pa.Table) -> None:
    """A triangle for each lot. Those of one side and one result are one line without a stroke."""
    from matplotlib.lines import Line2D

    net = 100 * floats(trades["net"]) / floats(trades["notional"])
    times = milliseconds(trades["entry_time"]).astype("datetime64[ms]")
    is_long, is_open = (np.array([x == y for x in trades[name].to_pylist()], bool) for name, y in
                        (("side", "long"), ("reason", "open")))  # fmt: skip
    size = float(np.clip(40 / max(len(net), 1) ** 0.4, 2.5, 7))
    for side, marker, of_side in (("long", "^", is_long), ("short", "v", ~is_long)):
        results = {"gain": (GAIN, ~is_open & (net > 0)), "loss": (LOSS, ~is_open & ~(net > 0)), "open": (OPEN, is_open)}
        for result, (color, of_result) in results.items():
            chosen = of_side & of_result
            ax.plot(
                times[chosen], net[chosen], marker, color=color, ms=size, mew=0.7, alpha=0.8,
                mfc="white" if result == "open" else color, gid=f"lots {side} {result}",
            )  # fmt: skip
    ax.axhline(0, color="black", lw=0.6)
    ax.set_ylabel("net of a lot,\n% of notional", fontsize=9)
    if not len(net):
        ax.text(0.5, 0.75, "no lot", transform=ax.transAxes, ha="center", va="center", color=OPEN)
        ax.set_ylim(-1, 1)
        return
    keys = [("^", GAIN, GAIN, "long"), ("v", GAIN, GAIN, "short"), ("s", GAIN, GAIN, "gain"), ("s", LOSS, LOSS, "loss")]
    keys += [("s", "white", OPEN, "still open")] * bool(is_open.any())
    handles = [Line2D([], [], ls="", marker=m, mfc=face, mec=edge, ms=5, label=x) for m, face, edge, x in keys]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=5, fontsize=8, frameon=False,
              borderpad=0, borderaxespad=0.2, handletextpad=0.1, columnspacing=1)  # fmt: skip


def _draw_drawdown(ax: "Axes", times: np.ndarray, equity: np.ndarray) -> None:
    fall = 100 * (equity / np.maximum.accumulate(equity) - 1)
    ax.plot(times, fall, color=POLICY, lw=0.8, gid="drawdown")
    ax.fill_between(times, fall, 0, color=POLICY, alpha=0.2, lw=0)
    ax.set_ylabel("drawdown,\n% of peak", fontsize=9)


def _describe(record: dict[str, Any]) -> str:
    """The title: the policy, its data and its main figures."""
    overall, data, lots = record["overall"], record["data"], record["lots"]["lots"]
    name, dataset = (_shorten(clean(x)) for x in (record["policy"]["name"], data["dataset"]))
    split = f", {clean(data['split'])} split" if data["split"] else ""
    figures = f"{100 * overall['return']:+.1f} %, deepest fall {100 * overall['max_drawdown']:.1f} %, {lots:,} lots"
    return f"{name} on {dataset}{split}: {figures}"


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_NAME else "..." + text[3 - LONGEST_NAME :]


def _show(artist: Any, text: str) -> str:
    """The text with a question mark for each character that the artist's font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(artist.get_fontproperties()))
    return "".join(c if font.get_char_index(ord(c)) else "?" for c in text)
