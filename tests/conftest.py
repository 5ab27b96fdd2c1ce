"""Strictness for every test, and the real data where it lies."""

import os
import pathlib

# Two devices on one CPU, before JAX starts: a test that needs one device must not care.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "standard")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real market data, outside the repository."""
    if not SHARED.is_dir():
        pytest.skip("real market data is not here: it is read from ../shared/data, beside the repository")
    return SHARED
