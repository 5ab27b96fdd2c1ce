"""HTML elements with escaped texts, and numbers that name their place in evaluation.json."""

import html
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

DASH = "\u2013"
MINUS = "\u2212"
TIMES = "\u00d7"
_VOID = {"meta", "input", "link", "br"}


class Markup(str):
    """Text that is HTML already."""


Child = Any
Form = Callable[[float], str]


def element(tag: str, /, *children: Child, **attributes: Any) -> Markup:
    """Return an element. Children that are not `Markup` are escaped, None is left out, lists are flattened.

    An underscore in an attribute's name is a hyphen; one at its end is left out. True is an attribute without value.
    """
    parts = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{escape(value)}"')
    opened = f"<{' '.join(parts)}>"
    return Markup(opened if tag in _VOID else f"{opened}{join(children)}</{tag}>")


def join(children: Iterable[Child]) -> Markup:
    """Return children one after another."""
    found = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, list | tuple):
            found.append(join(child))
        else:
            found.append(child if isinstance(child, Markup) else escape(child))
    return Markup("".join(found))


def escape(value: Any) -> str:
    """Return a text for HTML; characters that do not print are shown by their codes."""
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value))
    return html.escape(text, quote=True)


def embed(value: Any, name: str) -> Markup:
    """Return a JSON value inside a script element that runs nothing."""
    text = json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=True)
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{escape(name)}">{text}</script>')


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


# Numbers.


def fixed(places: int = 2, sign: bool = False, factor: float = 1.0, unit: str = "") -> Form:
    """Return a function that writes a number with so many places."""

    def form(x: float) -> str:
        text = f"{abs(x) * factor:,.{places}f}"
        zero = not text.strip("0.,")
        mark = "" if zero else MINUS if x < 0 else "+" if sign else ""
        return f"{mark}{text}{unit}"

    return form


COUNT = fixed(0)
MONEY = fixed(2, sign=True)
PERCENT = fixed(2, factor=100, unit=" %")
GAIN = fixed(2, sign=True, factor=100, unit=" %")
RATIO = fixed(2)
SIGNED = fixed(2, sign=True)


def short(x: float) -> str:
    """Return a number of any size in few characters."""
    return f"{x:.2g}".replace("-", MINUS)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def look_up(record: Any, path: str) -> Any:
    """Return the value at a path such as `baselines/0/return`; None if it is not there."""
    for part in path.split("/"):
        if isinstance(record, list) and part.isdecimal() and int(part) < len(record):
            record = record[int(part)]
        elif isinstance(record, dict) and part in record:
            record = record[part]
        else:
            return None
    return record


def explain(record: Any, path: str) -> str:
    """Return the reason for a missing figure: of the nearest `absent` above it."""
    parts = path.split("/")
    for depth in range(len(parts) - 1, 0, -1):
        found = look_up(record, "/".join(parts[:depth]))
        absent = found.get("absent") if isinstance(found, dict) else None
        if isinstance(absent, str):
            return absent
        for name in parts[depth:]:
            if isinstance(absent, dict) and name in absent:
                return str(absent[name])
    return "not in evaluation.json"


def figure(record: Any, path: str, form: Form = RATIO, tone: bool = False) -> Markup:
    """Return the number at a path; a dash, with the reason, if it is missing.

    Args:
      tone: a gain and a loss differ in colour. Use it with a form that writes the sign.
    """
    value = look_up(record, path)
    if not is_number(value):
        return element("abbr", DASH, class_="none", title=explain(record, path), data_path=path)
    kind = "n" + (" gain" if tone and value > 0 else " loss" if tone and value < 0 else "")
    return element("span", form(value), class_=kind, data_path=path, title=repr(value))


def interval(record: Any, path: str, form: Form) -> Markup:
    """Return two numbers as `low to high`; a dash if they are missing."""
    value = look_up(record, path)
    if not (isinstance(value, list) and len(value) == 2 and all(map(is_number, value))):
        return element("abbr", DASH, class_="none", title=explain(record, path), data_path=path)
    ends = [figure(record, f"{path}/{i}", form) for i in (0, 1)]
    return element("span", ends[0], " to ", ends[1], class_="interval")


# Tables and cards.


def table(
    head: Iterable[Child], rows: Iterable[Iterable[Child]], class_: str = "", caption: str | None = None
) -> Markup:
    """Return a table: the first cell of a row is its head, and the others are numbers."""
    top = element("tr", [element("th", h, scope="col") for h in head])
    body = []
    for first, *others in rows:
        body.append(element("tr", element("th", first, scope="row"), [element("td", c) for c in others]))
    named = element("caption", caption) if caption else None
    content = element("table", named, element("thead", top), element("tbody", body), class_=class_)
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption or "table")


def card(title: str, *children: Child, note: Child = None, class_: str = "") -> Markup:
    """Return a section with a title, and a line below it. Its id is `part-` and the title's words."""
    top = [element("h2", title), element("p", note, class_="note") if note else None]
    return element("section", top, children, class_=f"card {class_}".strip(), id=anchor(title))


def anchor(title: str) -> str:
    """Return the id of a section."""
    return "-".join(["part", *title.lower().replace(",", "").split()])


def empty(reason: Any) -> Markup:
    """Return a line that says why there is nothing to see."""
    return element("p", str(reason), class_="empty")
