"""A market, an environment and a state in a few lines, for `print` and for notebooks."""

import datetime
import math
from typing import Any

import jax
import numpy as np


def is_concrete(*leaves: Any) -> bool:
    """Whether every leaf is an array with numbers: not traced, not deleted, not a shape."""
    arrays = all(isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer) for x in leaves)
    return arrays and not any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves)


def format_time(milliseconds: int) -> str:
    """UTC, to the minute."""
    return f"{datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC):%Y-%m-%d %H:%M}"


def format_values(x: Any, form: str = ",.6g") -> str:
    """One number, or the range and the mean of many."""
    x = np.asarray(x, np.float64)
    if x.ndim == 0:
        return format(x.item(), form)
    if x.size == 0:
        return "none"
    low, high = x.min().item(), x.max().item()
    if math.isclose(low, high, rel_tol=1e-12):
        return format(low, form)
    return f"{low:{form}} .. {high:{form}} (mean {x.mean().item():{form}})"


def show(text: Any) -> str:
    """Text for a terminal: control characters and others that do not print are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
