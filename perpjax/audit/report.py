"""What an audit found, as plain data and as a table for people."""

import dataclasses
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Judgement = Literal["clean", "accused", "undecided"]
"""Undecided: it differs between two calls on the same input, so nothing can be said of the future."""

_COLORS = {"accused": "bold red", "undecided": "yellow", "clean": "green"}


@dataclasses.dataclass(frozen=True)
class Movement:
    """The proof of an accusation: what was known before the cut moved when only what comes after it was altered."""

    bar: int
    """The first bar whose value moved."""
    time: str
    """Open of that bar, UTC."""
    cut: int
    """The alteration begins with this bar; what is known at its open must not move."""
    ahead: int
    """It looked at least so many bars beyond the last one that was closed (`cut - bar + 1`)."""
    alteration: str
    """How the future was altered, and of which bars."""
    rows: int
    """How many values moved."""
    amount: float | None
    """The largest movement, in the column's own unit; None where a value came or went."""
    spreads: float | None
    """The same in standard deviations of the column; None also for a column without spread."""


@dataclasses.dataclass(frozen=True)
class Item:
    """The judgement of one feature column, or of one leaf of the environment's state."""

    name: str
    verdict: Judgement
    remarks: tuple[str, ...] = ()
    movement: Movement | None = None
    """Of all movements the one that looked furthest ahead; only if accused."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of an audit; `str()` of it is a table."""

    subject: str
    """What was audited."""
    bars: int
    """Bars of the data."""
    seed: int
    comparisons: int
    """How often it was run on an altered future."""
    items: tuple[Item, ...]
    remarks: tuple[str, ...] = ()
    """On the audit as a whole."""

    @property
    def accused(self) -> tuple[str, ...]:
        """Names of all that moved with the future."""
        return tuple(item.name for item in self.items if item.verdict == "accused")

    def __getitem__(self, name: str) -> Item:
        """The judgement of one name."""
        return {item.name: item for item in self.items}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, finite numbers, None."""
        return dataclasses.asdict(self) | {"accused": list(self.accused)}

    def __str__(self) -> str:
        return render(tabulate(self))


def tabulate(audit: Audit) -> Table:
    """The table of an audit, accusations first."""
    told = ", ".join([f"{len(audit.accused)} of {len(audit.items)} accused", *audit.remarks])
    table = Table(title=f"{audit.subject}: {told}", title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.caption = f"{audit.comparisons:,} altered futures on {audit.bars:,} bars, seed {audit.seed}; ahead: in bars"
    for name in ("name", "verdict", "proof and remarks"):
        table.add_column(name, no_wrap=name != "proof and remarks")
    for item in sorted(audit.items, key=lambda item: list(_COLORS).index(item.verdict)):
        notes = item.remarks if item.movement is None else (_describe_movement(item.movement), *item.remarks)
        table.add_row(Text(item.name), Text(item.verdict, _COLORS[item.verdict]), Text("; ".join(notes)))
    return table


def _describe_movement(move: Movement) -> str:
    by = "a value or none"
    if move.amount is not None:
        by = f"{move.amount:.3g}" + ("" if move.spreads is None else f" ({move.spreads:.2g} s.d.)")
    where = f"bar {move.bar} ({move.time}) moved first, ahead >= {move.ahead}"
    return f"{where}, by {by}; {move.alteration}, from bar {move.cut} on"


def render(table: Table) -> str:
    """A table as text, without colours."""
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
