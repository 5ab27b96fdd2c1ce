"""`python -m train.report RUN ...`: write the report of an evaluation again, or compare several."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from train.report import write_report
from train.report.compare import compare_evaluations
from train.report.page import make_page, write_page
from train.report.read import EVALUATION, read_evaluation
from train.run_folder import clean, find_run

COMPARISON = "comparison.html"


@dataclasses.dataclass(frozen=True)
class Args:
    """Write the HTML report of a finished evaluation again; of several runs, one page that compares them.

    The page is one file without requests to the network. Make the evaluation first: perpjax evaluate RUN.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Each a run (its folder, its name in runs/, or latest), or the folder of an evaluation."""
    split: Literal["val", "test"] = "val"
    """The split of the evaluation, for a run."""
    out: pathlib.Path | None = None
    """The page; default report.html in the evaluation's folder, or comparison.html here for several runs."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m train.report") -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on stderr."""
    args = tyro.cli(Args, args=argv, prog=prog)
    try:
        print(clean(make_report(args)))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def make_report(args: Args) -> pathlib.Path:
    """Write the page, and return its path.

    Raises:
      ValueError: a run or a file is missing or damaged.
      OSError: the page cannot be written.
    """
    if not args.runs:
        raise ValueError("name a run, such as latest, or the folder of an evaluation")
    folders = [find_evaluation(name, args.split) for name in args.runs]
    if len(folders) == 1 and args.out is None:
        return write_report(folders[0])
    if len(folders) == 1:
        return write_page(args.out, make_page(read_evaluation(folders[0])))
    out = args.out or pathlib.Path(COMPARISON)
    return write_page(out, compare_evaluations([read_evaluation(folder) for folder in folders]))


def find_evaluation(name: str, split: str) -> pathlib.Path:
    """Return the folder of an evaluation, given as itself or by its run.

    Raises:
      ValueError: there is none.
    """
    path = pathlib.Path(name)
    if name and os.path.isfile(path / EVALUATION) and os.path.isfile(path / "equity.parquet"):
        return path
    folder = find_run(name) / f"evaluation-{split}"
    if not folder.is_dir():
        raise ValueError(f"{clean(folder)} is not there; `perpjax evaluate {clean(name)} --split {split}` makes it")
    return folder


if __name__ == "__main__":
    sys.exit(main())
