"""What a person watching a run sees."""

import math
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from train.evaluate import Result, t_statistic

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
    """A live panel on a terminal, a line now and then elsewhere."""

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
        """Say what is being done."""
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal:
            print(text, flush=True)

    def show(self, metrics: dict[str, Any]) -> None:
        """Show the newest metrics."""
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


_CAPTION = (
    "Means of an episode; %: of initial equity (drawdown: of the peak). t: mean return over its standard error; "
    "trained against random: {}. liq.: lots liquidated. Return % if the lots still open were closed: {}."
)


def _show(form: str, value: float) -> str:
    """The number, or a dash where it has no value."""
    return form.format(value) if math.isfinite(value) else "-"


def print_results(results: dict[str, Result], title: str) -> None:
    """The closing table: each policy over the validation windows."""
    closed = ", ".join(f"{name} {100 * r.closed_returns.mean():+.3f}" for name, r in results.items())
    against = _show("{:+.1f}", t_statistic(results["trained"].returns - results["random"].returns))
    table = Table(title=title, title_justify="left", caption_justify="left", caption=_CAPTION.format(against, closed))
    table.add_column("policy", no_wrap=True)
    heads = ("return %", "± s.e.", "t", "drawdown %", "trades", "fees %", "liq.")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, r in results.items():
        error = r.returns.std(ddof=1) / len(r.returns) ** 0.5 if len(r.returns) > 1 else float("nan")
        table.add_row(
            name,
            f"{100 * r.returns.mean():+.3f}",
            _show("{:.3f}", 100 * error),
            _show("{:+.1f}", r.t_stat()),
            f"{100 * r.max_drawdown.mean():.2f}",
            f"{r.trades.mean():.1f}",
            f"{100 * r.fees.mean():.3f}",
            f"{r.liquidations.mean():.2f}",
        )
    Console(file=sys.stdout).print(table)
