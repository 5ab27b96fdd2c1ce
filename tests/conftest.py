"""Strictness for every test, and the real data where it lies."""

import atexit
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# Most tests compile for longer than they run: XLA takes a fifth of its time without LLVM's optimisations.
# Only jaxlib 0.10 knows the second flag; later versions abort at an unknown one.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)

os.environ["PERPJAX_CACHE"] = "0"  # the user's compiled programs are no part of a test

import jax
import pytest
from jaxtyping import install_import_hook

# No test, and no program that a test starts, writes to the ledger of the user.
_DATA = tempfile.mkdtemp(prefix="perpjax-tests-")
atexit.register(shutil.rmtree, _DATA, ignore_errors=True)
os.environ["PERPJAX_DATA"] = _DATA

# The shapes and dtypes in the signatures of the simulator's functions are checked while the tests run. (Not those of
# the states: a batched one is built by the same constructors.)
CHECKED = ("margin", "risk", "execution", "intrabar", "exits", "rewards", "observation", "orders")
install_import_hook([f"perpjax.rules.{name}" for name in CHECKED], "beartype.beartype")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of real market data, outside the repository."""
    if not SHARED.is_dir():
        pytest.skip("real market data is not here: it is read from ../shared/data, beside the repository")
    return SHARED


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that are compiled for longer than they run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
