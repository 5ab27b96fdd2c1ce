"""Progress of a run, for a person: a live panel on a terminal, lines elsewhere."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from train.hooks import Hook, RunInfo
from train.run_folder import clean

LINE_SECONDS = 10.0
"""Seconds between lines where the output is not a terminal."""

TICK_SECONDS = 0.5
"""Seconds between two drawings of the panel, so that the clock goes on while a chunk runs."""

FRAME_SECONDS = 0.1
"""Least seconds between two drawings for new metrics: a drawing takes as long as a small update."""

POINTS = 30
"""Most points of a sparkline."""

WIDEST = 100
"""Most columns of the panel."""

SPARKLINE_COLUMNS = 80
"""A narrower terminal shows no sparklines."""

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_LARGEST_LOG_RETURN = 50.0  # a larger one is no result, and its exponential may overflow


class _Row(NamedTuple):
    name: str
    form: Callable[[float], str]
    """Writes the value."""
    read: Callable[[dict[str, Any]], float | None]
    """The value in the metrics of an update; costs in quote currency. None without one."""


class Display(Hook):
    """A `Hook` that shows a live panel on a terminal, and plain lines elsewhere. A context: its end ends the panel.

    A terminal that moves no cursor (`TERM=dumb`) gets lines, and an encoding without Unicode gets ASCII.
    An output that fails ends no run: from its first error on, the display and file descriptor 1 write nowhere.

    Args:
      clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._out = _Output(sys.stdout)
        self._console = Console(file=self._out, force_jupyter=False, highlight=False)  # type: ignore[arg-type]
        self._has_panel = self._out.isatty() and self._console.is_interactive and not self._console.is_dumb_terminal
        self._ascii = self._console.options.ascii_only
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._ended = threading.Event()
        self._silent = False

        self._run: RunInfo | None = None
        self._stage = "starting"
        self._began = clock()
        self._newest: dict[str, Any] = {}
        self._newest_at = self._line_at = self._drawn_at = -math.inf
        self._has_news = False
        self._values: dict[str, float] = {}
        self._best: float | None = None
        self._histories = {row.name: History() for row in _ROWS}

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: Any) -> None:
        with self._harmless():
            self._finish()

    def on_start(self, run: RunInfo) -> None:
        """Show the facts in two lines, and begin the panel."""
        self._run, self._began = run, self._clock()
        lines = [
            f"training {run.policy} on {run.dataset} in {run.num_envs:,} environments",
            f"on {run.device}, into {run.folder}",
        ]
        if run.first_step:
            lines.append(f"resumed after update {run.first_update:,}, step {run.first_step:,}")
        with self._harmless():
            for line in lines:
                self._print(line)
            if self._has_panel:
                self._begin_panel()

    def on_stage(self, text: str) -> None:
        """Show the name of the stage that begins."""
        self._stage = clean(text)
        with self._harmless():
            if self._live:
                self._draw()
            else:
                self._print(text)

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Show the newest metrics, and add all of them to the sparklines."""
        with self._lock:
            for line in metrics:
                for row in _ROWS:
                    value = row.read(line)
                    if value is not None:
                        self._add(row.name, value)
            self._newest, self._newest_at, self._has_news = metrics[-1], self._clock(), True
            self._stage = "training"
        with self._harmless():
            self._show()

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Show the return of the validation split."""
        with self._lock:
            self._add("validation", evaluation["closed_return"])
            if evaluation["best"]:
                self._best = evaluation["closed_return"]
            self._has_news = True
        with self._harmless():
            self._show()

    def on_message(self, text: str) -> None:
        """Print a line, above the panel if there is one. `warning:` at its start is yellow."""
        with self._harmless():
            self._print(text)

    def on_end(self, text: str) -> None:
        """End the panel, which stays, and print the text below."""
        with self._harmless():
            self._stage = "finished" if self._run and self._steps >= self._run.total_steps else "ended"
            self._finish()
            for line in text.splitlines():
                self._print(line, wrap=False)  # a command that is copied stays one line

    def show(self, renderable: RenderableType) -> None:
        """End the panel, which stays, and print something below."""
        with self._harmless():
            self._finish()
            self._console.print(renderable)

    def get_state(self) -> dict[str, Any]:
        """Return the table: histories, newest values, and the best validation."""
        with self._lock:
            histories = {name: history.get_state() for name, history in self._histories.items()}
            return {"histories": histories, "values": dict(self._values), "best": self._best}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the table back."""
        with self._lock:
            for name, history in state["histories"].items():
                if name in self._histories:
                    self._histories[name].set_state(history)
            self._values, self._best = dict(state["values"]), state["best"]

    # The content.

    def _add(self, name: str, value: float) -> None:
        if name == "costs" and self._run:
            value /= self._run.initial_equity
        self._values[name] = value
        self._histories[name].add(value)

    @property
    def _steps(self) -> int:
        return self._newest.get("steps", self._run.first_step if self._run else 0)

    @property
    def _percent(self) -> int:
        """Rounded down: 100 only at the end."""
        return 100 * self._steps // max(self._run.total_steps, 1) if self._run else 0

    def _list_facts(self) -> list[str]:
        """Steps, speed and times. The time left follows from the speed of this session alone."""
        facts = [f"{self._steps:,} of {self._run.total_steps:,} steps"] if self._run else []
        facts += [f"{format_seconds(self._clock() - self._began)} spent"]
        speed = self._newest.get("steps_per_second", 0.0)
        if self._run and speed > 0:
            facts.insert(-1, f"{speed:,.0f} steps/s")
        if self._run and speed > 0 and not self._ended.is_set():
            left = (self._run.total_steps - self._steps) / speed - (self._clock() - self._newest_at)
            facts.append(f"{format_seconds(max(left, 0.0))} left")
        return facts

    def _make_line(self) -> str:
        """Everything on one line."""
        shown = [f"{self._percent} %", *self._list_facts()]
        for row in _ROWS:
            if row.name in self._values:
                best = f" ({self._format_best()})" if row.name == "validation" and self._best is not None else ""
                shown.append(f"{row.name} {row.form(self._values[row.name])}{best}")
        return "  ".join(shown)

    def _format_best(self) -> str:
        return "" if self._best is None else f"best {format_change(self._best)}"

    # The panel.

    def _build_panel(self) -> RenderableType:
        width = min(self._console.width, WIDEST)
        inner = max(width - 4, 1)
        lines = [self._build_bar(inner), *map(Text, pack(self._list_facts(), inner))]
        if self._values:
            lines += [Text(""), *self._build_table(inner)]
        title: Text | None = Text(self._stage)
        if title.cell_len > inner - 4:
            lines.insert(0, Text(self._stage))
            title = None
        if not self._ended.is_set():
            lines = lines[: max(self._console.height - 3, 1)]  # a higher panel could not be drawn over
        for line in lines:
            line.overflow = "fold"
        return Panel(Group(*lines), box=box.ROUNDED, title=title, title_align="left", width=width)

    def _build_bar(self, inner: int) -> Text:
        percent = f" {self._percent:3d} %"
        length = max(inner - len(percent), 0)
        full = length * min(self._percent, 100) // 100
        done, left = ("#", "-") if self._ascii else ("━", "─")
        return Text.assemble((done * full, "green"), (left * (length - full), "dim"), percent)

    def _build_table(self, inner: int) -> list[Text]:
        """One line for each row. It drops the sparklines where they do not fit, then the best validation."""
        names = max(len(row.name) for row in _ROWS)
        values = {row.name: row.form(self._values[row.name]) if row.name in self._values else "-" for row in _ROWS}
        longest = max(len(value) for value in [*values.values(), "+10.00 %"])
        best, used = self._format_best(), names + 2 + longest
        if best:
            best = best if used + 2 + len(best) <= inner else ""
            used += 2 + len(best) if best else 0
        has_sparklines = self._console.width >= SPARKLINE_COLUMNS and used + 2 + POINTS <= inner
        lines = []
        for row in _ROWS:
            line = Text(f"{row.name:<{names}}  ")
            line.append(f"{values[row.name]:>{longest}}", style="bold")
            if best:
                line.append(f"  {best if row.name == 'validation' else '':<{len(best)}}")
            if has_sparklines:
                points = self._histories[row.name].get_points()
                line.append("  " + draw_sparkline(points, _ASCII_BARS if self._ascii else _BARS), style="cyan")
            lines.append(line)
        return lines

    def _begin_panel(self) -> None:
        # What goes to another place than the terminal is left alone.
        errors_too = sys.stderr is not None and sys.stderr.isatty()
        self._live = Live(
            self._build_panel(),
            console=self._console,
            auto_refresh=False,
            redirect_stderr=errors_too,
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)
        threading.Thread(target=self._tick, name="display", daemon=True).start()

    def _tick(self) -> None:
        """Draw until the end, in a thread of its own."""
        while not self._ended.wait(TICK_SECONDS):
            with self._harmless():
                self._draw()

    def _draw(self) -> None:
        if self._live:
            self._live.update(self._build_panel(), refresh=True)
            self._drawn_at = self._clock()

    # The output.

    def _show(self) -> None:
        if self._live:
            if self._clock() - self._drawn_at >= FRAME_SECONDS:
                self._draw()
        elif self._clock() - self._line_at >= LINE_SECONDS:
            self._print_line()

    def _print_line(self) -> None:
        self._line_at, self._has_news = self._clock(), False
        self._print(self._make_line())

    def _print(self, text: str, wrap: bool = True) -> None:
        """Print a line. A terminal wraps it between words, unless one of them, such as a path, is too long."""
        shown = Text(clean(text))
        if text.startswith("warning:"):
            shown.stylize("yellow", 0, len("warning:"))
        fits = max(map(len, shown.plain.split(" "))) < self._console.width
        self._console.print(shown, soft_wrap=not (wrap and fits and self._has_panel))

    def _finish(self) -> None:
        """Show the newest state, and leave it on the screen."""
        self._ended.set()
        if self._live:
            self._live.update(self._build_panel())
            self._stop_panel()
        elif self._has_news and not self._silent and not self._has_panel:
            self._print_line()

    def _stop_panel(self) -> None:
        live, self._live = self._live, None
        self._ended.set()
        if live:
            live.stop()

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        """A context, for one thread at a time, in which an error of the output silences the display."""
        with self._lock:
            try:
                yield
            except (OSError, ValueError):
                self._out.has_failed = True
            if self._out.has_failed and not self._silent:
                self._silent = True
                with contextlib.suppress(OSError, ValueError):
                    self._stop_panel()
                self._out.discard()


class History:
    """A curve of at most `POINTS` means over equally many values, whatever the number of values."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.every, self.sum, self.count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """Add the next value. A full curve halves its resolution."""
        self.sum, self.count = self.sum + value, self.count + 1
        if self.count == self.every:
            self.means.append(self.sum / self.count)
            self.sum, self.count = 0.0, 0
        if len(self.means) == POINTS:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self.every *= 2

    def get_points(self) -> list[float]:
        """Return the means from the oldest to the newest, which may be of fewer values."""
        return [*self.means, self.sum / self.count] if self.count else list(self.means)

    def get_state(self) -> dict[str, Any]:
        """Return the curve as JSON values."""
        return {"means": list(self.means), "every": self.every, "sum": self.sum, "count": self.count}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the curve back."""
        self.means = list(state["means"])
        self.every, self.sum, self.count = state["every"], state["sum"], state["count"]


class _Output:
    """The standard output as a file that raises nothing: its first error sets `has_failed` and ends the writing."""

    def __init__(self, file: TextIO | None):
        self.file = file
        self.has_failed = file is None
        self.encoding = getattr(file, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write the text, with "?" for characters that the encoding lacks."""
        if not self.has_failed:
            try:
                self.file.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError):
                self.has_failed = True
        return len(text)

    def flush(self) -> None:
        if not self.has_failed:
            try:
                self.file.flush()
            except (OSError, ValueError):
                self.has_failed = True

    def isatty(self) -> bool:
        try:
            return self.file is not None and self.file.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
          OSError: there is none.
          ValueError: the file is closed.
        """
        if self.file is None:
            raise OSError("there is no standard output; start Python with one")
        return self.file.fileno()

    def discard(self) -> None:
        """Let the null device take the place of the file: Python flushes at its exit, and others may print."""
        try:
            descriptor = self.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        except (OSError, ValueError):
            # A closed file names no descriptor, so another object takes its place.
            if self.file is not None and sys.stdout is self.file:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def draw_sparkline(points: Sequence[float], bars: str) -> str:
    """Return one character of `bars` for each point, from the lowest to the highest."""
    if not points:
        return ""
    low, high = min(points), max(points)
    if low == high:
        return bars[len(bars) // 2 - 1] * len(points)
    return "".join(bars[round((x - low) / (high - low) * (len(bars) - 1))] for x in points)


def pack(items: Sequence[str], width: int) -> list[str]:
    """Return lines of items with two spaces between. Only an item wider than a line is divided, between its words."""
    lines: list[str] = []
    for item in items:
        pieces = [item] if len(item) <= width else item.split(" ")
        for i, piece in enumerate(pieces):
            gap = "  " if i == 0 else " "
            if lines and len(lines[-1]) + len(gap) + len(piece) <= width:
                lines[-1] += gap + piece
            else:
                lines.append(piece)
    return lines


def format_seconds(seconds: float) -> str:
    """Return hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_change(fraction: float) -> str:
    """Return a signed percentage."""
    return _format(100 * fraction, "+", 2) + " %"


def format_share(fraction: float) -> str:
    """Return a percentage with a sign only if it is negative."""
    return _format(100 * fraction, "-", 2) + " %"


def _format(value: float, sign: str, digits: int) -> str:
    return f"{value:{sign}.3e}" if abs(value) >= 1e9 else f"{value:{sign}z,.{digits}f}"


def _format_small(value: float) -> str:
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else _format(value, "-", 4)


def _read_return(metrics: dict[str, Any]) -> float | None:
    if "episode_return" not in metrics:
        return None
    return math.expm1(min(metrics["episode_return"], _LARGEST_LOG_RETURN))


def _read_costs(metrics: dict[str, Any]) -> float | None:
    found = [metrics[name] for name in ("fees", "slippage", "funding") if name in metrics]
    return sum(found) if found else None


_ROWS = (
    _Row("return", format_change, _read_return),
    _Row("drawdown", format_share, lambda metrics: metrics.get("max_drawdown")),
    _Row("trades", lambda value: _format(value, "-", 1), lambda metrics: metrics.get("trades")),
    _Row("costs", format_share, _read_costs),
    _Row("validation", format_change, lambda metrics: None),
    _Row("entropy", lambda value: _format(value, "-", 3), lambda metrics: metrics.get("entropy")),
    _Row("KL", _format_small, lambda metrics: metrics.get("kl")),
)
