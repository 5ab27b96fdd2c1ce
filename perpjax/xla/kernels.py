"""Boundaries between kernels: on a CPU a call that XLA does not inline, on a GPU a store."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

T = TypeVar("T")

MANY = 256
"""With so many environments or more, a CPU visits their lots slot by slot, see `over_lots`."""


def default_platform() -> str:
    """The platform that JAX compiles for if nothing else is said, such as "cpu" or "gpu"."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


@dataclasses.dataclass(frozen=True)
class Program:
    """The program that a step becomes part of.

    Attributes:
      platform: "cpu"; anything else counts as a GPU.
      num_envs: size of the batch; None for one environment without a batch axis.
      chunk: environments that are stepped at a time; None for all of them.
      loops: False if the program must have a reverse-mode derivative, which a loop of unknown length lacks.
    """

    platform: str
    num_envs: int | None = None
    chunk: int | None = None
    loops: bool = True

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU runs it."""
        return self.platform == "cpu"

    @property
    def slot_by_slot(self) -> bool:
        """Whether lots are visited in a loop over slots, see `over_lots`."""
        return self.on_cpu and self.loops and (self.num_envs or 0) >= MANY

    @property
    def row_by_row(self) -> bool:
        """Whether rare rows of a batch are computed in a loop, see `where_rows`."""
        return self.on_cpu and self.loops

    def own_kernel(self, function: Callable[..., T]) -> Callable[..., T]:
        """`function`, compiled by itself on a CPU: each result is computed once, and nothing is fused across.

        XLA's CPU kernels have one result. Without a boundary each result of a step computes anew all it depends on.
        """
        jitted = jax.jit(function)
        return _named(functools.wraps(function)(_not_inlined(jitted) if self.on_cpu else jitted))

    def store(self, values: T) -> T:
        """`values`, kept in memory on a GPU: the kernels after them read them and compute none of them again.

        A flag is stored as a byte and a later kernel makes the flag of it. So the kernel that reads an old flag is not
        the one that overwrites it, and XLA needs no copy.
        """
        if self.on_cpu:
            return values
        stored = jax.tree.map(lambda x: x.astype(jnp.int8) if x.dtype == bool else x, values)
        return jax.tree.map(lambda old, x: x.astype(old.dtype), values, lax.optimization_barrier(stored))


def _not_inlined(jitted: Callable[..., T]) -> Callable[..., T]:
    """XLA inlines every call but one that says otherwise, and optimises a call by itself."""

    def call(*args: Any) -> T:
        (first, *others), tree = jax.tree.flatten(jitted(*args))
        # One result says it for all.
        return jax.tree.unflatten(tree, [set_xla_metadata(first, inlineable="false"), *others])

    return call


def _named(function: Callable[..., T]) -> Callable[..., T]:
    """`function`, with its name in profiles and in the counts of `benchmarks.gpu`."""
    name = getattr(function, "__qualname__", "step").rpartition("<locals>.")[2]
    return jax.named_call(function, name=f"perpjax.{name}")
