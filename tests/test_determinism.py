"""The same seed on the same machine: the same bits, in another process too."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from perpjax.audit.fingerprint import fingerprint

SCRIPT = pathlib.Path(__file__).with_name("determinism.py")


def run(seed: int) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, SCRIPT, str(seed)], capture_output=True, text=True, check=True, cwd=SCRIPT.parents[1]
    )
    return json.loads(done.stdout)


def test_a_rollout_and_a_training_run_are_the_same_in_two_processes():
    first = run(0)
    assert len(set(first.values())) == len(first) == 3  # another seed, another print
    assert run(0) == first


def test_a_fingerprint_sees_every_bit_and_every_name():
    tree = {"a": jnp.arange(3.0), "key": jax.random.key(0)}
    assert fingerprint(tree) == fingerprint({"key": jax.random.key(0), "a": np.arange(3.0, dtype=np.float32)})
    others = [
        {"a": jnp.arange(3.0).at[0].set(-0.0), "key": jax.random.key(0)},
        {"a": jnp.arange(3), "key": jax.random.key(0)},
        {"a": jnp.arange(3.0)[None], "key": jax.random.key(0)},
        {"b": jnp.arange(3.0), "key": jax.random.key(0)},
        {"a": jnp.arange(3.0), "key": jax.random.key(1)},
    ]
    assert len({fingerprint(t) for t in [tree, *others]}) == 6
