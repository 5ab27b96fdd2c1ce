"""The runs of the trainer: find, read, list, show and compare them. `python -m train.runs --help`.

To read a run takes no JAX; `python -m train.runs list` answers at once.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from train.plotting import Curves, draw_runs
from train.run_folder import Run, clean, find_run, list_runs
from train.run_tables import print_comparison, print_list, print_run

__all__ = ["Run", "find_run", "main"]

RUNS = pathlib.Path("runs")


@dataclasses.dataclass(frozen=True)
class List:
    """List the runs, the newest first: progress, and returns on validation."""

    dir: pathlib.Path = RUNS
    """Folder of the runs."""


@dataclasses.dataclass(frozen=True)
class Show:
    """Show one run: settings, state, figures, and the commands to go on from it."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Its folder, its name, the beginning of its name, or latest."""
    dir: pathlib.Path = RUNS
    """Folder of the runs."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs: only the settings that differ, and the figures on validation."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...", help_behavior_hint="")]
    """Two runs or more, each as in `show`."""
    plot: pathlib.Path | None = None
    """PNG file for a picture of validation and training returns over steps."""
    dir: pathlib.Path = RUNS
    """Folder of the runs."""


Commands = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m train.runs") -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on stderr."""
    try:
        try:
            return _run(argv, prog)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: Sequence[str] | None, prog: str) -> int:
    args = tyro.cli(Commands, args=argv, prog=prog, description="List, show and compare the runs of the trainer.")
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        with console.capture() as captured:
            _print(console, args)
    except (ValueError, OSError) as error:
        print(f"error: {clean(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(captured.get().encode(encoding, "backslashreplace").decode(encoding), end="")
    return 0


def _print(console: Console, args: List | Show | Compare) -> None:
    if isinstance(args, List):
        if runs := list_runs(args.dir):
            print_list(console, runs, args.dir)
        else:
            console.print(Text(f"no runs in {clean(args.dir)}: python -m train.ppo makes one"), soft_wrap=True)
    elif isinstance(args, Show):
        print_run(console, Run(find_run(args.run, args.dir)), _read_defaults())
    else:
        runs = [Run(find_run(name, args.dir)) for name in args.runs]
        if len(runs) < 2:
            raise ValueError(f"{len(runs)} run to compare; name at least 2")
        if args.plot is not None:
            _check_plot(args.plot)
        print_comparison(console, runs)
        if args.plot is not None:
            draw_runs(args.plot, [_read_curves(run) for run in runs])
            console.print(Text(f"\npicture saved to {clean(args.plot)}"), soft_wrap=True)


def _read_defaults() -> dict[str, Any]:
    """The settings of a run without options, as config.json would have them. This loads JAX, but starts no device."""
    from train.ppo.config import Config

    return json.loads(json.dumps(Config().to_json()))


def _check_plot(path: pathlib.Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot is {clean(path)}; the name of the picture must end in .png")
    if not path.parent.is_dir():
        raise ValueError(f"plot is {clean(path)}; the folder {clean(path.parent)} is not there")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'perpjax[viz]'")


def _read_curves(run: Run) -> Curves:
    def read(lines: list[dict[str, Any]], name: str, scale: float) -> list[tuple[float, float]]:
        values = {line["steps"]: line.get(name) for line in lines}  # after a resume the last line of a step holds
        return [(step, scale * x) for step, x in sorted(values.items()) if isinstance(x, int | float)]

    validation = read(run.evaluations(), "closed_return", 100.0)
    return Curves(clean(run.name), validation, read(run.metrics(), "episode_return", 1.0))


if __name__ == "__main__":
    sys.exit(main())
