"""How one step of one environment becomes one step of a batch: batch axes last, and boundaries between kernels.

The functions of a step are written for one environment, lots (or candles) on the first axis, and broadcast over any
trailing axes by numpy's rules: a lot's field is [lots] or [lots, batch], a price [] or [batch]. A batch on the last
axis is what a CPU's vector units and a GPU's threads read side by side; docs/performance.md has what it is worth.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Bool, Float, Int, Num, UInt32

T = TypeVar("T")

TILE = 128
"""Environments of a tile, see `by_tile`: a few cache lines of each column."""
NARROW = 32
"""Arrays with no more than so many entries an environment (lots, counters) are laid out with the batch innermost."""
LINE = 16
"""Floats of a cache line."""
LOOK = 4096
"""`where_rows` looks for the next that asks among so many at a time."""
MANY = 256
"""From so many environments on a CPU goes through their lots slot by slot, see `moments.each_lot`."""
CHUNK = 1024
"""So many environments a CPU steps at a time, if they are too many for its caches."""
TOO_MANY = 16 * CHUNK
"""So many are."""
SHARED = -1
"""The batch axis of what has none."""

slot_by_slot = contextvars.ContextVar("slot_by_slot", default=False)
"""Whether what is traced is a step of many environments, to be compiled for a CPU; see `moments.each_lot`."""


def batch_last(extra: jax.ShapeDtypeStruct) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make `jax.vmap` call `step(env, state, *args) -> (state, extra)` once, with the batch on the last axes of arrays.

    That is one axis, or two on a CPU: tiles and the environments of a tile, see `by_tile`. There a large batch is a
    loop over `CHUNK` environments at a time, which changes the state in place. What comes back has the batch on the
    axis where it was in the state; where that is the last, nothing is moved or copied (see `VecEnv`).

    What is shared by the batch in `env` (the market, mostly) stays as it is; of its own it may have one number for each
    element, no arrays: with those, as with a `vmap` around another one, a step is batched in the ordinary way.

    Args:
      extra: shape and type of what one environment returns beside its state.
    """

    def decorate(step: Callable[..., T]) -> Callable[..., T]:
        step = _named(step)

        def returns(env: Any, state: Any, *args: Any) -> T:
            return state, jnp.zeros(extra.shape, extra.dtype)

        def vmapped(size: int, axes: list, env: Any, *args: Any) -> tuple[T, T]:
            axes[1:], args = _spread(size, axes[1:], list(args))
            out_axes = axes[1], len(extra.shape)
            vmap = functools.partial(jax.vmap, in_axes=_in_axes(axes), out_axes=out_axes, axis_size=size)

            def run(shape: tuple[int, ...], lay_out: Callable[[Array], Array], *args: Any) -> T:
                turned = jax.tree.map(lambda axis, x: _turn(axis, x, shape, lay_out), axes, list(args))
                state, more = step(*turned)

                def back(axis: int, new: Array, turned: Array, old: Array) -> Array:
                    return old if new is turned else _turn_back(axis, new, len(shape))

                state = jax.tree.map(back, axes[1], state, turned[1], args[1])
                return state, _turn_back(out_axes[1], more, len(shape))

            def some_on_cpu(some: int, *args: Any) -> T:
                token = slot_by_slot.set(some >= MANY)
                try:
                    state, more = run((-1, TILE) if some % TILE == 0 else (-1,), _row_major, *args)
                finally:
                    slot_by_slot.reset(token)
                return jax.tree.map(_batch_innermost, axes[1], state), more

            def on_cpu(*args: Any) -> T:
                if size < TOO_MANY or size % CHUNK:
                    return some_on_cpu(size, *args)
                return _in_chunks(some_on_cpu, size, axes, jnp.zeros((*extra.shape, size), extra.dtype), *args)

            default = functools.partial(run, (-1,), lambda x: x)
            if any(jax.tree.leaves(jax.tree.map(lambda axis, x: axis != SHARED and x.ndim > 1, axes[0], env))):
                default = on_cpu = vmap(step)
            return _deferred(on_cpu, default, vmap(returns), _vmap_all(vmap(step)), env, *args), out_axes

        run = functools.partial(_deferred, step, step, returns, vmapped)
        return functools.wraps(step)(lambda *args: run(*args))

    return decorate


def _turn(axis: int, x: Array, shape: tuple[int, ...], lay_out: Callable[[Array], Array]) -> Array:
    """The batch axis of x last, and of this shape."""
    if axis == SHARED:
        return x
    turned = jnp.moveaxis(x, axis, -1)
    turned = turned if axis == x.ndim - 1 else lay_out(turned)
    return turned.reshape(*turned.shape[:-1], *shape)


def _turn_back(axis: int, x: Array, dimensions: int) -> Array:
    """The last so many axes of x as its one batch axis."""
    return jnp.moveaxis(x.reshape(*x.shape[:-dimensions], -1), -1, axis)


def _in_chunks(step: Callable[..., T], size: int, axes: list, more: Array, env: Any, state: Any, *args: Any) -> T:
    """`step(CHUNK, env, state, *args)` for so many environments after so many, the whole state changed in place."""

    def do_some(i: Array, carry: T) -> T:
        def cut(axes: Any, tree: Any, first: Array) -> Any:
            def part(axis: int, x: Array) -> Array:
                return x if axis == SHARED else lax.dynamic_slice_in_dim(x, first, CHUNK, axis)

            return jax.tree.map(part, axes, tree)

        def put(axis: int, whole: Array, new: Array, old: Array | None = None) -> Array:
            return whole if new is old else lax.dynamic_update_slice_in_dim(whole, new, i * CHUNK, axis)

        # All that is read of the state is read in one stage, so XLA keeps no copy of what is written afterwards.
        now = stage(functools.partial(cut, axes[1]))(carry[0], i * CHUNK)
        some_env, *some = cut([axes[0], *axes[2:]], [env, *args], i * CHUNK)
        new, extra = step(CHUNK, some_env, now, *some)
        return jax.tree.map(put, axes[1], carry[0], new, now), put(more.ndim - 1, carry[1], extra)

    return lax.fori_loop(0, size // CHUNK, do_some, (state, more))


def _spread(size: int, axes: T, tree: T) -> tuple[T, T]:
    """Give every leaf a batch axis: the first, where it has none."""
    tree = jax.tree.map(lambda axis, x: jnp.broadcast_to(x, (size, *jnp.shape(x))) if axis == SHARED else x, axes, tree)
    return jax.tree.map(lambda axis: max(axis, 0), axes), tree


def _in_axes(axes: list) -> tuple:
    """For `jax.vmap`."""
    return jax.tree.map(lambda axis: None if axis == SHARED else axis, tuple(axes))


def _batch_innermost(axis: int, x: Array) -> Array:
    """Lay [batch, lots] out like [lots, batch]; rows of an observation stay rows."""
    return with_layout_constraint(x, Layout((1, 0))) if axis == 0 and x.ndim == 2 and x.shape[1] <= NARROW else x


def _row_major(x: Array) -> Array:
    """Lay x out as its shape says; so the copy of a loop's state is the one that a stage would ask for anyway."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if x.ndim > 1 else x


def stage(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, but on a CPU XLA computes each of its results once and fuses nothing across its boundary.

    XLA's CPU compiler has no kernels with several results: each result is a loop of its own, which computes anew
    everything it depends on. A stage is where that ends. On other devices it is `function` itself.
    """
    jitted = jax.jit(function)
    return _named(functools.wraps(function)(_on_cpu(_not_inlined(jitted), jitted)))


def _not_inlined(jitted: Callable[..., T]) -> Callable[..., T]:
    """XLA inlines every call but those that say otherwise, and optimises a call by itself."""

    def call(*args: Any) -> T:
        (first, *others), tree = jax.tree.flatten(jitted(*args))
        # One result says it for all.
        return jax.tree.unflatten(tree, [set_xla_metadata(first, inlineable="false"), *others])

    return call


def _on_cpu(cpu: Callable[..., T], default: Callable[..., T]) -> Callable[..., T]:
    """`cpu` on a CPU, `default` elsewhere."""

    def call(*args: Any) -> T:
        return cpu(*args) if slot_by_slot.get() else lax.platform_dependent(*args, cpu=cpu, default=default)

    return call


def _named(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, with its name in profiles and in `benchmarks.gpu_ahead`: what is `_deferred` has no line numbers."""
    name = function.__qualname__.rpartition("<locals>.")[2]
    return jax.named_call(function, name=f"perpjax.{name}")


def end_kernel(values: T) -> T:
    """`values`, but on a GPU they are stored: what follows reads them, and computes none of them again.

    A flag is stored as a byte, for a later kernel to make the flag of it: so the kernel that still reads an old flag is
    not the one that writes over it, which XLA would copy it for.
    """
    stored = jax.tree.map(lambda x: x.astype(jnp.int8) if x.dtype == bool else x, values)
    return jax.tree.map(lambda old, x: x.astype(old.dtype), values, lax.optimization_barrier(stored))


def by_tile(x: Num[Array, "columns ..."]) -> Num[Array, "..."]:
    """[columns, tiles, TILE] as [tiles, columns, TILE], tile behind tile; anything else as it is.

    For what a loop over lots reads many columns of at once: in a large batch those lie whole pages apart, fall into the
    same set of the cache and evict each other.
    """
    return _row_major(jnp.moveaxis(x, 0, -2)) if x.ndim > 2 else x


def by_column(x: Num[Array, "..."]) -> Num[Array, "columns ..."]:
    """What `by_tile` was given."""
    return jnp.moveaxis(x, -2, 0) if x.ndim > 2 else x


def touch(
    table: Num[Array, "rows width"], index: Int[Array, "..."], columns: slice, after: Float[Array, "..."] | None = None
) -> Int[Array, "..."]:
    """`index`, after these columns' cache lines were read: on a CPU, so that a gather finds them in the cache.

    Loads that wait for nothing overlap, and here is nothing else. A gather's loop is so long that only two or three
    rows are on their way at once: 190 us for 4096 rows of 128 bytes, 70 after this, which takes 40.

    Args:
      after: what is computed first; or XLA asks for the lines as soon as it knows the index, and they are gone again
        when they are needed.
    """
    waiting = () if after is None else (after,)
    read = _read(range(columns.start, columns.stop, LINE))
    return _on_cpu(read, lambda _, index, *__: index)(table, index, *waiting)


@functools.cache
def _read(columns: range) -> Callable[..., Array]:
    @_not_inlined
    @jax.jit
    def read(table: Array, index: Array, *after: Array) -> Array:
        row = _not_from_the_end(index)
        numbers = [*after, *(table.at[row, column].get(mode="clip") for column in columns)]
        # Bits of no number, only of a NaN that no arithmetic makes; but XLA cannot know, so it reads.
        return index + sum(lax.bitcast_convert_type(x, jnp.int32) == -1 for x in numbers)

    return read


def take_columns(table: Num[Array, "rows width"], index: Int[Array, "..."], columns: slice) -> Num[Array, "..."]:
    """Some columns of some rows, `by_tile`."""
    return _take(columns.start, columns.stop)(table, touch(table, index, columns))


@functools.cache
def _take(first: int, last: int) -> Callable[[Array, Array], Array]:
    @stage
    def take(table: Array, index: Array) -> Array:
        row = jnp.vectorize(lambda i: take_row(table, i, slice(first, last)), signature="()->(c)")
        return by_tile(jnp.moveaxis(row(index), -1, 0))

    return take


def take_row(table: Num[Array, "rows width"], index: Int[Array, ""], columns: slice) -> Num[Array, "columns"]:
    """Some columns of a row."""
    start = _not_from_the_end(index), jnp.uint32(columns.start)
    return lax.dynamic_slice(table, start, (1, columns.stop - columns.start))[0]


def split_table(table: Num[Array, "rows columns ..."]) -> list[list[Num[Array, "..."]]]:
    """The numbers of a small table, row by row. By one `lax.split`: iterating over it would trace a slice for each."""
    rows, columns, *batch = table.shape
    flat = lax.split(table.reshape(-1, *batch), [1] * (rows * columns))
    return [[x.reshape(batch) for x in flat[i : i + columns]] for i in range(0, len(flat), columns)]


def each_row(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of each row of arrays. It must broadcast: many environments on a CPU give it all rows at once.

    That is less code to compile. Else it is given one row after the other: a GPU then computes each number where it is
    needed, and stores none of them.
    """

    def call(*rows: Array) -> Array:
        if slot_by_slot.get():
            return function(*rows)
        return jnp.stack([function(*row) for row in zip(*rows, strict=True)])

    return call


def _not_from_the_end(index: Num[Array, "..."]) -> UInt32[Array, "..."]:
    """JAX counts a negative index from the end, and checks for it, but only if it is signed."""
    return index.astype(jnp.uint32)


def fold(operator: Callable[[Array, Array], Array], x: Num[Array, "lots ..."]) -> Array:
    """Reduce over the first axis, written out: unlike a reduction it is fused with what it reads."""
    return functools.reduce(operator, jnp.unstack(x))


def total(x: Array) -> Array:
    """Sum over the first axis; of booleans, their number."""
    return fold(jnp.add, x.astype(jnp.int32) if x.dtype == bool else x)


def any_of(x: Bool[Array, "lots ..."]) -> Bool[Array, "..."]:
    """Whether any holds, over the first axis."""
    return fold(jnp.logical_or, x)


def where_rows(predicate: Bool[Array, ""], function: Callable[..., T], otherwise: T, *operands: Any) -> T:
    """`function(otherwise, *operands)` where `predicate` holds, `otherwise` elsewhere; for what is rare in a batch.

    A batched `lax.cond` becomes a select: both branches always run, for all. On a CPU only those that ask are
    computed here, one by one, and put in place: what is computed for one is little code, which compiles quickly. On
    other devices it is the select, which costs them less.

    Args:
      predicate, operands: as in `lax.cond`. `function` must not close over traced values.
      otherwise: of the structure that `function` returns.
    """
    function = _named(function)

    def alone(predicate: Array, otherwise: T, *operands: Any) -> T:
        return lax.cond(predicate, function, lambda old, *_: old, otherwise, *operands)

    def vmapped(size: int, axes: list, predicate: Array, otherwise: T, *operands: Any) -> tuple[T, T]:
        axes[:2], (predicate, otherwise) = _spread(size, axes[:2], [predicate, otherwise])
        out_axes, in_axes = axes[1], _in_axes(axes[2:])
        some = min(size, LOOK)

        def on_cpu(predicate: Array, otherwise: T, *operands: Any) -> T:
            def do_some(i: Array, out: T) -> T:
                def do_row(carry: tuple[Array, Array, T]) -> tuple[Array, Array, T]:
                    last, left, out = carry
                    place = _not_from_the_end(last) - 1
                    row = _not_from_the_end(i) * some + place

                    def take(axis: int, x: Array) -> Array:
                        return x if axis == SHARED else lax.dynamic_index_in_dim(x, row, axis, keepdims=False)

                    def put(axis: int, x: Array, y: Array) -> Array:
                        return _batch_innermost(axis, lax.dynamic_update_index_in_dim(x, y, row, axis))

                    old = jax.tree.map(take, out_axes, out)
                    # In a stage of its own: what is read of the row is read before anything is put in its place.
                    new = stage(function)(old, *jax.tree.map(take, tuple(axes[2:]), operands))
                    left = lax.dynamic_update_index_in_dim(left, jnp.float32(0), place, 0)
                    return jnp.max(left), left, jax.tree.map(put, out_axes, out, new)

                left = lax.dynamic_index_in_dim(places, i, keepdims=False)
                return lax.while_loop(lambda carry: carry[0] > 0, do_row, (jnp.max(left), left, out))[2]

            # The places of those that ask, among so many and from 1 on; XLA has the maximum of floats in a library.
            asks = jnp.pad(predicate, (0, -size % some)).reshape(-1, some)
            places = jnp.where(asks, jnp.arange(1, some + 1, dtype=jnp.float32), 0)
            return lax.fori_loop(0, len(places), do_some, otherwise)

        def select(predicate: Array, otherwise: T, *operands: Any) -> T:
            new = jax.vmap(function, (out_axes, *in_axes), out_axes, axis_size=size)(otherwise, *operands)

            def choose(p: Array, new: T, otherwise: T) -> T:
                return jax.tree.map(lambda x, y: jnp.where(p, x, y), new, otherwise)

            return jax.vmap(choose, (0, out_axes, out_axes), out_axes)(predicate, new, otherwise)

        again = _vmap_all(jax.vmap(alone, (0, out_axes, *in_axes), out_axes, axis_size=size))
        return _deferred(on_cpu, select, like_otherwise, again, predicate, otherwise, *operands), out_axes

    def like_otherwise(_: Array, otherwise: T, *operands: Any) -> T:
        return otherwise

    return _deferred(alone, alone, like_otherwise, vmapped, predicate, otherwise, *operands)


def _deferred(cpu: Callable[..., T], default: Callable[..., T], returns: Callable, vmapped: Callable, *args: Any) -> T:
    """`cpu(*args)` where it is compiled for a CPU, `default(*args)` elsewhere; and traced there, not before.

    `lax.platform_dependent` traces what is not compiled too, and `jax.custom_batching.custom_vmap` what is not batched
    and never runs: half of the time that a step took to compile. None of the functions may close over traced values.

    Args:
      returns: `returns(*args)` is of the structure, shapes and types of the result.
      vmapped: `vmapped(size, axes, *args)` is the result of a batch and its batch axes: of each leaf the axis of that
        size, or `SHARED`.
    """
    leaves, tree = jax.tree.flatten(args)
    shapes = jax.eval_shape(returns, *args)

    def flat(function: Callable) -> Callable[..., list[Array]]:
        def call(*leaves: Array) -> list[Array]:
            out = function(*jax.tree.unflatten(tree, leaves))
            chex.assert_trees_all_equal_shapes_and_dtypes(out, shapes)
            return jax.tree.leaves(out)

        return call

    def batch(size: int, axes: list[int], *leaves: Array) -> tuple[list[Array], list[int]]:
        axes, args = jax.tree.unflatten(tree, axes), jax.tree.unflatten(tree, leaves)
        out, out_axes = vmapped(size, list(axes), *args)
        return jax.tree.leaves(out), jax.tree.leaves(out_axes)

    avals = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in jax.tree.leaves(shapes))
    out = _deferred_p.bind(*leaves, cpu=flat(cpu), default=flat(default), batch=batch, avals=avals)
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _vmap_all(function: Callable[..., T]) -> Callable[..., T]:
    """For `_deferred`: a batch of batches, in the ordinary way."""

    def vmapped(size: int, axes: list, *args: Any) -> tuple[T, T]:
        out = jax.vmap(function, _in_axes(axes), axis_size=size)(*args)
        return out, jax.tree.map(lambda _: 0, out)

    return vmapped


def _batch_deferred(leaves: list[Array], axes: list[int | None], batch: Callable, **_: Any) -> tuple[list, list]:
    (size,) = {x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None}
    return batch(size, [SHARED if axis is None else axis for axis in axes], *leaves)


_deferred_p = Primitive("deferred")
_deferred_p.multiple_results = True
_deferred_p.def_impl(lambda *leaves, default, **_: default(*leaves))
_deferred_p.def_abstract_eval(lambda *_, avals, **__: avals)
batching.primitive_batchers[_deferred_p] = _batch_deferred
mlir.register_lowering(_deferred_p, mlir.lower_fun(lambda *leaves, default, **_: default(*leaves)))
mlir.register_lowering(_deferred_p, mlir.lower_fun(lambda *leaves, cpu, **_: cpu(*leaves)), platform="cpu")
