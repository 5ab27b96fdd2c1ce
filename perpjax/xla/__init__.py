"""The compilation of a step: fusion boundaries, loops over lots, gathers. README.md has the facts and figures.

`perpjax.rules` holds the meaning of a bar and never imports this package.
"""

from perpjax.xla.kernels import Program, default_platform
from perpjax.xla.over_lots import over_lots
from perpjax.xla.rows import each_row, in_chunks, where_rows
from perpjax.xla.transforms import batched_by, differentiable

__all__ = [
    "Program", "batched_by", "default_platform", "differentiable", "each_row", "in_chunks", "over_lots", "where_rows",
]  # fmt: skip
