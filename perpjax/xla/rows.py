"""Rows of large tables: gathers, prefetches, and functions of the few rows that ask for them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

from perpjax._pytree import pytree
from perpjax.xla.kernels import Program

T = TypeVar("T")

LINE = 16
"""Floats of a cache line."""
PAGE = 256
"""Rows of so many floats, or a multiple, are padded: four of them are a page of memory."""
LOOK = 4096
"""`where_rows` looks for the next row that asks among so many at a time."""


@pytree(static=("size",))
class PaddedRows:
    """[rows, size], with a cache line more in each row; indexed by row or by a slice of rows.

    Rows that lie a multiple of a page apart fall into the same sets of a CPU's cache and evict each other.
    """

    array: Num[Array, "rows padded"]
    size: int

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: int | slice) -> Num[Array, "..."]:
        if isinstance(rows, int) and rows >= len(self):
            raise IndexError(rows)  # ends an iteration
        return self.array[rows, ..., : self.size]


def pad_rows(x: Num[Array, "rows ..."], program: Program) -> Num[Array, "rows ..."] | PaddedRows:
    """The rows of a batch, padded if many environments on a CPU would read them a multiple of a page apart."""
    if not program.slot_by_slot or x.shape[-1] % PAGE:
        return x
    return PaddedRows(jnp.pad(x, ((0, 0), (0, LINE))), x.shape[-1])


def each_row(program: Program) -> Callable[[Callable[..., Array]], Callable[..., Any]]:
    """Apply a function of one row to all rows of some arrays; the function must broadcast.

    A CPU is given all rows at once, which is less code. A GPU is given one row after the other: it then computes each
    number at its use and stores none.
    """

    def apply(function: Callable[..., Array]) -> Callable[..., Any]:
        if program.on_cpu:
            return lambda *rows: pad_rows(function(*rows), program)
        return lambda *rows: jnp.stack([function(*row) for row in zip(*rows, strict=True)])

    return apply


def take_row(table: Num[Array, "rows width"], index: Int[Array, ""], columns: slice) -> Num[Array, "columns"]:
    """Some columns of a row."""
    start = _not_from_the_end(index), jnp.uint32(columns.start)
    return lax.dynamic_slice(table, start, (1, columns.stop - columns.start))[0]


def take_columns(
    table: Num[Array, "rows width"], index: Int[Array, "..."], columns: slice, program: Program
) -> Num[Array, "columns ..."] | PaddedRows:
    """Some columns of some rows."""

    @program.own_kernel
    def take(table: Array, index: Array) -> Array:
        row = jnp.vectorize(lambda i: take_row(table, i, columns), signature="()->(c)")
        return pad_rows(jnp.moveaxis(row(index), -1, 0), program)

    return take(table, prefetch_row(table, index, columns, program))


def prefetch_row(
    table: Num[Array, "rows width"],
    index: Int[Array, "..."],
    columns: slice,
    program: Program,
    after: Float[Array, "..."] | None = None,
) -> Int[Array, "..."]:
    """`index`, once a CPU has read one number of each cache line of these columns: the gather then finds them in cache.

    Reads that wait for nothing overlap. The loop of a gather is so long that only two or three of its rows do.

    Args:
      after: computed first. Otherwise XLA prefetches as soon as it knows the index, and the cache may lose the lines.
    """
    if not program.on_cpu:
        return index
    waiting = () if after is None else (after,)

    @program.own_kernel
    def read(table: Array, index: Array, *after: Array) -> Array:
        row = _not_from_the_end(index)
        lines = range(columns.start, columns.stop, LINE)
        numbers = [*after, *(table.at[row, column].get(mode="clip") for column in lines)]
        # These are the bits of a NaN that no arithmetic makes. XLA cannot know it, so it reads.
        return index + sum((lax.bitcast_convert_type(x, jnp.int32) == -1).astype(jnp.int32) for x in numbers)

    return read(table, index, *waiting)


def _not_from_the_end(index: Num[Array, "..."]) -> UInt32[Array, "..."]:
    """JAX counts a negative index from the end, and checks for it, but only if it is signed."""
    return index.astype(jnp.uint32)


def where_rows(
    predicate: Bool[Array, "batch"],
    function: Callable[..., T],
    otherwise: T,
    *operands: Any,
    program: Program,
    axes: tuple[Any, ...],
) -> T:
    """`function(otherwise, *operands)` for the rows where `predicate` holds, `otherwise` for the others.

    A CPU computes only the rows that ask, one by one, and puts them in place. A GPU computes all rows and selects,
    which costs it less; so does a CPU without loops.

    Args:
      function: of one row of `otherwise` and of each operand; must not close over traced values.
      axes: batch axes of `otherwise` and of each operand, as `in_axes` of `jax.vmap`.
    """
    if not program.row_by_row:
        new = jax.vmap(function, axes, axes[0], axis_size=predicate.shape[0])(otherwise, *operands)

        def choose(axis: int, new: Array, old: Array) -> Array:
            return jnp.where(jnp.expand_dims(predicate, [i for i in range(new.ndim) if i != axis]), new, old)

        return map_axes(choose, axes[0], new, otherwise)

    size = predicate.shape[0]
    some = min(size, LOOK)
    alone = program.own_kernel(function)  # so a row is read before anything is put in its place
    # The places of those that ask, among so many and from 1 on; XLA has the maximum of floats in a library.
    asks = jnp.pad(predicate, (0, -size % some)).reshape(-1, some)
    places = jnp.where(asks, jnp.arange(1, some + 1, dtype=jnp.float32), 0)

    def do_some(i: Array, out: T) -> T:
        def do_row(carry: tuple[Array, Array, T]) -> tuple[Array, Array, T]:
            last, left, out = carry
            place = _not_from_the_end(last) - 1
            row = _not_from_the_end(i) * some + place

            def take(axis: int, x: Array) -> Array:
                return lax.dynamic_index_in_dim(x, row, axis, keepdims=False)

            def put(axis: int, x: Array, y: Array) -> Array:
                return lax.dynamic_update_index_in_dim(x, y, row, axis)

            new = alone(*map_axes(take, axes, (out, *operands)))
            left = lax.dynamic_update_index_in_dim(left, jnp.float32(0), place, 0)
            return jnp.max(left), left, map_axes(put, axes[0], out, new)

        left = lax.dynamic_index_in_dim(places, i, keepdims=False)
        return lax.while_loop(lambda carry: carry[0] > 0, do_row, (jnp.max(left), left, out))[2]

    return lax.fori_loop(0, len(places), do_some, otherwise)


def in_chunks(
    function: Callable[..., tuple[T, Array]], env: Any, state: T, action: Array, program: Program, axes: tuple
) -> tuple[T, Array]:
    """`function(env, state, action, program)` for `program.chunk` environments after so many; the state in place.

    Args:
      function: returns the state, and an array with the batch on the last axis.
      axes: batch axes of the environment, of the state and of the actions, as `in_axes` of `jax.vmap`.
    """
    if program.chunk is None:
        return function(env, state, action, program)
    small = dataclasses.replace(program, num_envs=program.chunk, chunk=None)

    def cut(first: Array, axes: Any, tree: Any) -> Any:
        return map_axes(lambda axis, x: lax.dynamic_slice_in_dim(x, first, program.chunk, axis), axes, tree)

    def do_some(i: Array, carry: tuple[T, Array]) -> tuple[T, Array]:
        def put(axis: int, whole: Array, new: Array, old: Array | None = None) -> Array:
            return whole if new is old else lax.dynamic_update_slice_in_dim(whole, new, first, axis)

        first = i * program.chunk
        # All that is read of the state is read in one kernel, so XLA keeps no copy of the old numbers.
        old = program.own_kernel(lambda state: cut(first, axes[1], state))(carry[0])
        new, more = function(cut(first, axes[0], env), old, cut(first, axes[2], action), small)
        return map_axes(put, axes[1], carry[0], new, old), put(more.ndim - 1, carry[1], more)

    shape = jax.eval_shape(functools.partial(function, program=program), env, state, action)[1]
    more = jnp.zeros(shape.shape, shape.dtype)
    return lax.fori_loop(0, program.num_envs // program.chunk, do_some, (state, more))


def map_axes(function: Callable[..., Array], axes: Any, tree: T, *others: T) -> T:
    """`function(axis, leaf, *leaves)` for the leaves that have an axis; the others stay.

    Args:
      axes: a prefix of the tree, as `in_axes` of `jax.vmap`. A negative axis is given as a positive one.
    """
    leaves, treedef = jax.tree.flatten(tree)

    def repeat(axis: int | None, part: Any) -> list[int | None]:
        return [axis] * len(jax.tree.leaves(part))

    lists = jax.tree.map(repeat, axes, tree, is_leaf=lambda x: x is None)
    places = [axis for part in jax.tree.leaves(lists, is_leaf=lambda x: isinstance(x, list)) for axis in part]
    rows = zip(places, leaves, *map(jax.tree.leaves, others), strict=True)
    new = [x if axis is None else function(axis % x.ndim, x, *more) for axis, x, *more in rows]
    return jax.tree.unflatten(treedef, new)
