"""Small reductions, written out term by term: XLA fuses them with their operands, a reduction it does not."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Num


def fold(operator: Callable[[Array, Array], Array], x: Num[Array, "n ..."]) -> Array:
    """Reduce over the first axis."""
    return functools.reduce(operator, jnp.unstack(x))


def total(x: Array) -> Array:
    """Sum over the first axis; of booleans, the number of true ones."""
    return fold(jnp.add, x.astype(jnp.int32) if x.dtype == bool else x)


def any_of(x: Bool[Array, "n ..."]) -> Bool[Array, "..."]:
    """Whether any is true, over the first axis."""
    return fold(jnp.logical_or, x)


def split_table(table: Num[Array, "rows columns ..."]) -> list[list[Num[Array, "..."]]]:
    """The numbers of a small table, row by row. One `lax.split` is traced; iterating would trace a slice for each."""
    rows, columns, *batch = table.shape
    flat = lax.split(table.reshape(-1, *batch), [1] * (rows * columns))
    return [[x.reshape(batch) for x in flat[i : i + columns]] for i in range(0, len(flat), columns)]
