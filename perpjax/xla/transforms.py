"""A step under `jax.vmap` and `jax.grad`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.custom_batching import custom_vmap

T = TypeVar("T")


def differentiable(fast: Callable[..., T], plain: Callable[..., T]) -> Callable[..., T]:
    """`fast`, with the derivatives of `plain`: the same function, without loops that have no reverse mode."""

    @jax.custom_jvp
    def call(*args: Any) -> T:
        return fast(*args)

    @call.defjvp
    def jvp(primals: tuple, tangents: tuple) -> tuple[T, T]:
        return jax.jvp(plain, primals, tangents)

    return call


def batched_by(
    batch: Callable[..., T], plain: Callable[..., T] | None = None
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make `jax.vmap` of a function call `batch(size, batched, *args)` instead of batching its operations one by one.

    Args:
      batch: is given the number of rows, a tree of flags (which leaves of the arguments have a batch axis), and the
        arguments with that axis first. Returns the result with a batch axis in front of every leaf, or None to let
        `jax.vmap` do as it always does.
      plain: the same function, to be differentiated; by default the function itself.
    """

    def decorate(single: Callable[..., T]) -> Callable[..., T]:
        @custom_vmap
        def call(*args: Any) -> T:
            return single(*args)

        @call.def_vmap
        def rule(size: int, batched: list, *args: Any) -> tuple[T, Any]:
            out = batch(size, batched, *args)
            if out is None:
                axes = jax.tree.map(lambda flag: 0 if flag else None, tuple(batched))
                out = jax.vmap(single, axes, axis_size=size)(*args)
            return out, jax.tree.map(lambda _: True, out)

        return jax.jit(differentiable(call, plain or single))

    return decorate
