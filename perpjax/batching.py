"""A `lax.cond` that still skips work under `vmap`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

T = TypeVar("T")


def cond_any(
    predicate: Bool[Array, ""], on_true: Callable[..., T], on_false: Callable[..., T], *operands: Any, few: int = 0
) -> T:
    """`lax.cond(predicate, on_true, on_false, *operands)`, that under `vmap` runs `on_true` if any element asks.

    A batched `lax.cond` becomes a select: both branches always run. Here the branch is a real one over the whole
    batch, with the select inside. It also keeps XLA from computing the branch anew in every kernel that reads one of
    its results, which is worth a factor of two on a CPU.

    Args:
      predicate, on_true, on_false, operands: as in `lax.cond`. Neither branch may close over traced values:
        everything they read is an operand.
      few: if no more elements than this ask, `on_true` runs on their rows alone. For what is rare in a batch.
    """

    @jax.custom_batching.custom_vmap
    def run(predicate: Array, *operands: Any) -> T:
        return jax.lax.cond(predicate, on_true, on_false, *operands)

    @run.def_vmap
    def _(size: int, batched: list, predicate: Array, *operands: Any) -> tuple[T, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))

        def over_batch(branch: Callable[..., T], rows: int = size) -> Callable[..., T]:
            return jax.vmap(branch, axes, axis_size=rows)

        def choose(predicate: Array, *operands: Any) -> T:
            return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), on_true(*operands), on_false(*operands))

        def skip(_: Array, *operands: Any) -> T:
            return on_false(*operands)

        def run_rows(*args: Any) -> T:
            (rows,) = jnp.nonzero(args[0], size=few, fill_value=size)
            taken = jax.tree.map(lambda b, x: x.at[rows].get(mode="clip") if b else x, tuple(batched), args)
            done = over_batch(lambda _, *operands: on_true(*operands), few)(*taken)
            return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), over_batch(skip)(*args), done)

        asking = jnp.sum(predicate)
        branches = [over_batch(skip), over_batch(choose)]
        if 0 < few < size:
            branches.append(run_rows)
            index = jnp.where(asking == 0, 0, jnp.where(asking > few, 1, 2))
        else:
            index = (asking > 0).astype(jnp.int32)
        out = jax.lax.switch(index, branches, predicate, *operands)
        return out, jax.tree.map(lambda _: True, out)

    return run(predicate, *operands)
