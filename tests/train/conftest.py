"""One reference run for all tests of a session."""

import pathlib

import jax
import processes
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> pathlib.Path:
    """Compiled programs, which the processes of a session share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def reference(tmp_path_factory, cache) -> pathlib.Path:
    """A run of 20 updates in one go: an evaluation every 2 updates, a checkpoint every 4."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    processes.run(*processes.TWENTY, "--run-dir", folder, cache=cache)
    return folder


@pytest.fixture(scope="module")
def compile_once(cache):
    """Runs in this process share the compiled programs, too."""
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()
