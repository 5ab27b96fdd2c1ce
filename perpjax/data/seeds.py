"""Seeds: every accepted seed gives a run of its own."""

import jax
import numpy as np
from jaxtyping import Array

_WORD = 2**32


def check_seed(seed: int, low: int = 0, high: int = 2**63 - 1) -> int:
    """Return the seed as a Python integer.

    Raises:
      ValueError: for a seed that is not an integer in [low, high].
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not low <= seed <= high:
        raise ValueError(f"seed is {seed!r}; it must be an integer in [{low}, {high}]")
    return int(seed)


def seed_key(seed: int) -> Array:
    """Return the random key of a seed in [-2^63, 2^63). From 0 to 2^32 - 1 it equals that of `jax.random.key`.

    Unless 64-bit types are enabled, `jax.random.key` keeps the low word only.

    Raises:
      ValueError: for a seed outside the range.
    """
    high, low = divmod(check_seed(seed, -(2**63)), _WORD)
    words = np.array(jax.random.key_data(jax.random.key(low)))
    words[0] = high % _WORD
    return jax.random.wrap_key_data(words)


def seed_words(seed: int, index: int) -> list[int]:
    """Return entropy for NumPy: one stream for each pair of a non-negative seed and an index below 2^32.

    `SeedSequence` takes 32-bit words and ignores trailing zeros, so the high words of the seed come last. In
    `[seed, index]` a seed of 2^32 with index 0 would equal a seed of 0 with index 1.
    """
    return [seed % _WORD, index, seed // _WORD]
