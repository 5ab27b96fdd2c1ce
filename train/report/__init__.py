"""The HTML report of an evaluation, made from the files of docs/evaluation.md without JAX."""

import pathlib

from train.report.page import make_page, write_page
from train.report.read import read_evaluation

__all__ = ["REPORT", "write_report"]

REPORT = "report.html"


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """Write report.html beside the four files of an evaluation, and return its path.

    Raises:
      ValueError: a file is missing, damaged or of another format. The message names it.
      OSError: the folder cannot be written.
    """
    return write_page(folder / REPORT, make_page(read_evaluation(folder)))
