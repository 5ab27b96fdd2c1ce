"""The same seed on the same machine: the same bits, in another process too."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax.audit.fingerprint import fingerprint
from perpjax.data.seeds import check_seed, seed_key, seed_words

SCRIPT = pathlib.Path(__file__).parents[1] / "determinism.py"


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


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, np.int64(5)])
def test_a_seed_of_one_word_has_the_key_of_jax(seed):
    key, known = seed_key(seed), jax.random.key(int(seed))
    assert key.dtype == known.dtype
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(known))


def test_every_seed_has_its_own_key():
    """Pairs that agree in their low words, the ends of the range, and the two's complement of negative seeds."""
    near = [0, 2**31, 2**32, 2**33, 2**62]
    seeds = {s + d for s in near for d in (-1, 0, 1)} | {-s + d for s in near for d in (-1, 0, 1)}
    seeds |= {-(2**63), 2**63 - 1}
    keys = {tuple(jax.random.key_data(seed_key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    np.testing.assert_array_equal(jax.random.key_data(seed_key(-1)), [2**32 - 1, 2**32 - 1])
    np.testing.assert_array_equal(jax.random.key_data(seed_key(3 * 2**32 + 5)), [3, 5])


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63, 10**30, 0.5, True, "1"])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=r"^seed is .*; it must be an integer in \[-9223372036854775808, [^\n]*$"):
        seed_key(seed)


def test_a_negative_seed_is_none_of_numpy():
    assert check_seed(0) == 0 and check_seed(2**63 - 1) == 2**63 - 1
    with pytest.raises(ValueError, match=r"seed is -1; it must be an integer in \[0, "):
        check_seed(-1)


def test_seeds_and_indices_do_not_share_a_stream():
    def state(entropy: list[int]) -> tuple[int, ...]:
        return tuple(np.random.SeedSequence(entropy).generate_state(4).tolist())

    pairs = [(seed, i) for seed in (0, 1, 2, 2**32, 2**32 + 1, 2**33, 2**64, 2**65) for i in (0, 1, 2)]
    assert len({state(seed_words(*pair)) for pair in pairs}) == len(pairs)
    for seed in (0, 1, 2**32 - 1):
        for i in (0, 1, 2):
            assert state(seed_words(seed, i)) == state([seed, i])
