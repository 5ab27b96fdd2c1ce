"""Charts out of plain elements: bars, steps, intervals and histograms. They print, and need no script."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from train.report.markup import Child, Form, Markup, element


class Span(NamedTuple):
    """The range of an axis."""

    low: float
    high: float

    def place(self, x: float) -> float:
        """Return the place of a number in percent of the width."""
        width = self.high - self.low
        return round(min(max(100 * (x - self.low) / width, 0), 100), 3) if width > 0 else 50.0


def cover(values: Sequence[float], zero: bool = True) -> Span:
    """Return an axis that holds the values, with a margin."""
    held = [*values, *([0.0] if zero else [])] or [0.0]
    low, high = min(held), max(held)
    margin = 0.04 * ((high - low) or abs(high) or 1.0)
    return Span(low - margin * (low < 0 or not zero), high + margin * (high > 0 or not zero or low == high == 0))


def track(axis: Span, *marks: Markup, zero: bool = True) -> Markup:
    """Return a line of a chart with its marks."""
    line = element("i", class_="zero", style=f"left:{axis.place(0)}%") if zero and axis.low <= 0 <= axis.high else None
    return element("span", line, marks, class_="track")


def block(axis: Span, begin: float, end: float, kind: str, title: str | None = None) -> Markup:
    """Return a bar from one number to another; nothing if they are equal."""
    if begin == end:
        return Markup("")
    left, right = sorted((axis.place(begin), axis.place(end)))
    return element("i", class_=f"block {kind}", style=f"left:{left}%;width:{max(right - left, 0.3):.3f}%", title=title)


def dot(axis: Span, at: float, kind: str = "", title: str | None = None) -> Markup:
    """Return a point."""
    return element("i", class_=f"dot {kind}".strip(), style=f"left:{axis.place(at)}%", title=title)


def tick(axis: Span, at: float, kind: str = "", title: str | None = None) -> Markup:
    """Return an upright line."""
    return element("i", class_=f"tick {kind}".strip(), style=f"left:{axis.place(at)}%", title=title)


def tone(value: float) -> str:
    """Return the class of a gain or a loss."""
    return "up" if value >= 0 else "down"


def rows(lines: Sequence[tuple[Child, Markup, Child]], class_: str = "", label: str = "") -> Markup:
    """Return a chart of lines: a name, a track, a number."""
    cells = []
    for name, drawn, number in lines:
        value = element("span", number, class_="value")
        cells.append(
            element(
                "div",
                element("span", name, class_="name", title=None if isinstance(name, Markup) else name),
                drawn,
                value,
                class_="line",
            )
        )
    return element("div", cells, class_=f"lines {class_}".strip(), role="group", aria_label=label)


def scale_line(axis: Span, form: Form, unit: str) -> Markup:
    """Return the ends of an axis in words, with its unit."""
    middle = form(0) if axis.low < 0 < axis.high else None
    zero = element("span", middle, style=f"left:{axis.place(0)}%", class_="at") if middle else None
    near = zero is not None and not 18 < axis.place(0) < 82
    ends = element("span", form(axis.low)), None if near else zero, element("span", form(axis.high))
    return element("div", element("span", unit, class_="name"), element("span", ends, class_="scale"),
                   element("span", "", class_="value"), class_="line axis")  # fmt: skip


def histogram(
    values: Sequence[float], axis: Span, kind: str, bins: int = 24, title: str = "", marks: Sequence[Markup] = ()
) -> Markup:
    """Return columns over an axis, with upright marks in front."""
    held = np.asarray(values, float)
    counts, _ = np.histogram(held[np.isfinite(held)], bins=bins, range=(axis.low, axis.high))
    top = max(int(counts.max()), 1)
    columns = [
        element("i", class_=f"column {kind}", title=f"{int(n)}",
                style=f"left:{100 * k / bins:.3f}%;width:{100 / bins:.3f}%;height:{100 * n / top:.2f}%")
        for k, n in enumerate(counts) if n
    ]  # fmt: skip
    return element("div", columns, marks, class_="histogram", role="img", aria_label=title)
