"""The findings of an audit, as plain data and as a printed table."""

import dataclasses
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Judgement = Literal["clean", "accused", "undecided"]
"""Undecided: it differs between two calls on the same input, so look-ahead cannot be judged."""

_COLORS = {"accused": "bold red", "undecided": "yellow", "clean": "green"}


@dataclasses.dataclass(frozen=True)
class Movement:
    """The proof of an accusation: a value known before the cut moved, although only later data was altered."""

    bar: int
    """The first bar with a moved value."""
    time: str
    """Open of that bar, UTC."""
    cut: int
    """The alteration begins with this bar. Values known at its open must not move."""
    ahead: int
    """Look-ahead in bars beyond the last closed bar, at least (`cut - bar + 1`)."""
    alteration: str
    """The alteration of the future, and the part of the data."""
    rows: int
    """Number of values that moved."""
    amount: float | None
    """The largest movement, in the column's own unit. None if a value appeared or disappeared."""
    spreads: float | None
    """The largest movement in standard deviations of the column. None also for a column without spread."""


@dataclasses.dataclass(frozen=True)
class Item:
    """The judgement of one feature column, or of one leaf of the environment's state."""

    name: str
    verdict: Judgement
    remarks: tuple[str, ...] = ()
    movement: Movement | None = None
    """The movement with the largest look-ahead; only if accused."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """The result of an audit; `str()` of it is a table."""

    subject: str
    """Name of the audited function or environment."""
    bars: int
    """Bars of the data."""
    seed: int
    comparisons: int
    """Number of runs on an altered future."""
    items: tuple[Item, ...]
    remarks: tuple[str, ...] = ()
    """Remarks on the audit as a whole."""

    @property
    def accused(self) -> tuple[str, ...]:
        """Return the names of the items that moved with the future."""
        return tuple(item.name for item in self.items if item.verdict == "accused")

    def __getitem__(self, name: str) -> Item:
        """Return the judgement of one name."""
        return {item.name: item for item in self.items}[name]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: dicts, lists, strings, finite numbers, None."""
        return dataclasses.asdict(self) | {"accused": list(self.accused)}

    def __str__(self) -> str:
        return render(tabulate(self))


def tabulate(audit: Audit) -> Table:
    """Return the table of an audit, accusations first."""
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
    """Return a table as text, without colours."""
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
