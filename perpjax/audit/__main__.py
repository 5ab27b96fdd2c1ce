"""`python -m perpjax.audit module:function --dataset DIR`: does any column of a feature function look ahead?"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.progress import track

from perpjax.audit.features import audit_features
from perpjax.audit.report import tabulate
from perpjax.data.build import find_features
from perpjax.data.dataset import load_tables


@dataclasses.dataclass(frozen=True)
class Args:
    """Audit a feature function for look-ahead: all data after a cut is altered, and nothing before the cut may change.

    The function runs a few hundred times on altered data: prices, volumes and funding after the cut are redrawn,
    left out, or shuffled. A column is accused if a row known before the cut changes. Such a column reads a bar that has
    not closed, or is fitted to the whole sample: scaling, rank, interpolation, back-fill, centred window, resampling
    labelled by its start. Columns that are constant or not finite get a remark.

    The exit status is 1 if a column is accused, and 0 if none is. It is 2 if the audit has no result: it could not run,
    or a column differs between two calls on the same input.
    """

    function: tyro.conf.Positional[str]
    """core, or module:function, a function (bars, funding) -> pyarrow.Table as the builder takes it."""
    dataset: str
    """Folder written by `python -m perpjax.data.build --out`, or synthetic:signal (martingale, crash)."""
    seed: int = 0
    """Seed of the cuts and of the altered data."""
    json: bool = False
    """Print only the result, as JSON, to standard output."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m perpjax.audit") -> int:
    """Run the command line; returns the exit status."""
    args = tyro.cli(Args, args=argv, prog=prog)
    console = Console(stderr=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the function may print
            function, tables = find_features(args.function), load_tables(args.dataset)
            audit = audit_features(
                function,
                tables["candles"],
                tables["funding"],
                seed=args.seed,
                track=lambda trials: track(trials, "auditing", console=console, transient=True),
            )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    audit = dataclasses.replace(audit, subject=args.function)
    if args.json:
        print(json.dumps(audit.to_json(), indent=1, allow_nan=False))
    else:
        Console().print(tabulate(audit))
    if audit.accused:
        return 1
    return 2 if any(item.verdict == "undecided" for item in audit.items) else 0


if __name__ == "__main__":
    sys.exit(main())
