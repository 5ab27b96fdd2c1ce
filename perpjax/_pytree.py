"""Frozen dataclasses as pytrees, with a constructor that may validate and an unflattening that never does."""

import contextlib
import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


class Host:
    """Values that ride along with a pytree but never cause a second trace: all `Host` objects are equal."""

    def __init__(self, **values: Any):
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Host)

    def __hash__(self) -> int:
        return hash(Host)


@dataclass_transform(frozen_default=True)
def pytree(
    cls: type[T] | None = None, *, static: tuple[str, ...] = (), host: tuple[str, ...] = (), subclasses: bool = False
) -> Any:
    """Make `cls` a frozen dataclass and a pytree.

    Args:
      static: fields that are part of the trace (hashable; a change compiles anew).
      host: fields only the host reads (names, dates). They are carried along and never compared, so code
        under `jit` must not read them.
      subclasses: whether a subclass is a pytree from its first instance on, without a decorator of its own.

    The remaining fields are children. `cls.__post_init__` runs on construction and on `replace`, never when
    JAX unflattens, which must accept tracers and placeholders of any kind.
    """
    if cls is None:
        return lambda c: pytree(c, static=static, host=host, subclasses=subclasses)
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=cls.__repr__ is object.__repr__)(cls)
    _register(cls, static, host)
    cls.replace = dataclasses.replace
    if subclasses:
        known = {cls}

        def new(kind, *args, **values):
            if kind not in known:
                known.add(kind)
                with contextlib.suppress(ValueError):  # its author has registered it
                    _register(kind, static, host)
            return object.__new__(kind)

        cls.__new__ = new
    return cls


def _register(cls: type, static: tuple[str, ...], host: tuple[str, ...]) -> None:
    children = tuple(f.name for f in dataclasses.fields(cls) if f.name not in static + host)

    def flatten(self):
        aux = tuple(getattr(self, n) for n in static), Host(**{n: getattr(self, n) for n in host})
        return tuple(getattr(self, n) for n in children), aux

    def flatten_with_keys(self):
        leaves, aux = flatten(self)
        return tuple((jax.tree_util.GetAttrKey(n), x) for n, x in zip(children, leaves, strict=True)), aux

    def unflatten(aux, leaves):
        self = object.__new__(cls)
        values = dict(zip(children, leaves, strict=True)) | dict(zip(static, aux[0], strict=True)) | aux[1].values
        for name, value in values.items():
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
