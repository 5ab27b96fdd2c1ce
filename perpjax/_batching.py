"""A `lax.cond` that still skips work under `vmap`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

T = TypeVar("T")


def cond_any(predicate: Bool[Array, ""], on_true: Callable[..., T], on_false: Callable[..., T], *operands: Any) -> T:
    """`lax.cond(predicate, on_true, on_false, *operands)`, that under `vmap` runs `on_true` if any element asks.

    A batched `lax.cond` becomes a select: both branches always run. Here the branch is a real one over the whole
    batch, with the select inside. It also keeps XLA from computing the branch anew in every kernel that reads one of
    its results, which is worth a factor of two on a CPU.

    Neither branch may close over traced values: everything they read is an operand.
    """

    @jax.custom_batching.custom_vmap
    def run(predicate: Array, *operands: Any) -> T:
        return jax.lax.cond(predicate, on_true, on_false, *operands)

    @run.def_vmap
    def _(size: int, batched: list, predicate: Array, *operands: Any) -> tuple[T, Any]:
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(batched))

        def select(predicate: Array, *operands: Any) -> T:
            return jax.tree.map(lambda a, b: jnp.where(predicate, a, b), on_true(*operands), on_false(*operands))

        def skip(_: Array, *operands: Any) -> T:
            return on_false(*operands)

        branches = [jax.vmap(f, axes, axis_size=size) for f in (select, skip)]
        out = jax.lax.cond(jnp.any(predicate), *branches, predicate, *operands)
        return out, jax.tree.map(lambda _: True, out)

    return run(predicate, *operands)
