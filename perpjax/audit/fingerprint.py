"""One hash of a whole pytree: equal if two runs agree to the last bit."""

import hashlib
from typing import Any

import jax
import numpy as np


def fingerprint(tree: Any) -> str:
    """Return the hexadecimal SHA-256 of the paths, dtypes, shapes and bytes of all leaves (random keys as their data).

    Equal seeds give equal fingerprints for one compiled program on one machine, in any process. Another jax, another
    processor or a changed program may order the same sums differently. On a GPU no result of the simulator depends on
    the order of threads. XLA may choose other kernels for the trainer's matrix products from run to run;
    `XLA_FLAGS="--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"` prevents this.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        host = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {host.dtype.str} {host.shape}\n".encode())
        digest.update(host.tobytes())
    return digest.hexdigest()
