"""Progress of a run, for a person."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

LINE_SECONDS = 10.0
"""Seconds between lines where the output is not a terminal."""

_SHOWN = (
    ("episode_return", "return/episode", "{:+.4f}"),
    ("trades", "trades/episode", "{:.1f}"),
    ("liquidations", "liquidations/episode", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl", "KL", "{:.4f}"),
    ("explained_variance", "explained variance", "{:.3f}"),
)


class Display:
    """A `Hook` that shows a live panel on a terminal, and a line now and then elsewhere. A context.

    Args:
      total_steps: environment steps of the whole run.
    """

    def __init__(self, total_steps: int):
        self.console = Console()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("starting", total=total_steps)
        self.live = Live(self.progress, console=self.console, refresh_per_second=8, transient=True)
        self.last_line = -LINE_SECONDS

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.stop()

    def stage(self, text: str) -> None:
        """Show the name of the stage that begins."""
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal:
            print(text, flush=True)

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Show the newest metrics."""
        self._show(metrics[-1])

    def _show(self, metrics: dict[str, Any]) -> None:
        self.progress.update(self.task, completed=metrics["steps"], description="training")
        shown = [(label, form.format(metrics[name])) for name, label, form in _SHOWN if name in metrics]
        shown = [("steps", f"{metrics['steps']:,}"), ("steps/s", f"{metrics['steps_per_second']:,.0f}"), *shown]
        if self.console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for label, value in shown:
                table.add_row(label, value)
            self.live.update(Group(self.progress, table))
        elif time.monotonic() - self.last_line > LINE_SECONDS:
            self.last_line = time.monotonic()
            print("  ".join(f"{label} {value}" for label, value in shown), flush=True)
