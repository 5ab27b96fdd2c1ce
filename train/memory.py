"""Memory that a run needs, compared with the memory that there is."""

import os
import pathlib
from typing import Any

import jax
import numpy as np

_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def count_bytes(tree: Any) -> int:
    """Return the size of all leaves, arrays or `jax.ShapeDtypeStruct`."""

    def size(leaf: Any) -> int:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return int(np.prod(leaf.shape, dtype=object)) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def device_bytes() -> int | None:
    """Return the memory of the default device, within the container if it is a CPU; None if unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in _CGROUP:
        path = pathlib.Path(name)
        if path.exists() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits, default=None)


def check_fit(needed: int, source: str, num_envs: int) -> None:
    """Raise if so many bytes exceed the memory of the device.

    Args:
      source: of the number, for the message.

    Raises:
      ValueError: they do.
    """
    there = device_bytes()
    if there is not None and needed > there:
        raise ValueError(
            f"this run needs {_show(needed)} ({source}) and the device has {_show(there)}; "
            f"lower num_envs (now {num_envs}) or num_steps"
        )


def program_bytes(compiled: Any) -> int:
    """Return the memory of a compiled program: arguments, results and temporaries; 0 if XLA does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return used - analysis.alias_size_in_bytes


def _show(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
