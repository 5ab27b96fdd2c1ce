"""The trainer of perpjax: `python -m train.ppo`, and in Python `load_policy`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.ppo.load import LoadedPolicy, load_policy

__all__ = ["LoadedPolicy", "load_policy"]


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: `python -m train.runs list` must not wait for JAX."""
    if name not in __all__:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    from train.ppo import load

    return getattr(load, name)
