"""Running the tests in a copy of the tree, in a process forked from one with all imports done."""

import contextlib
import multiprocessing
import os
import pathlib
import sys

import jax
import pytest

PRELOADED = ["benchmarks.mutation.suite", "jax", "jax.numpy", "flax", "chex", "hypothesis", "pytest", "beartype.door",
             "jaxtyping", "pyarrow", "rich.progress"]  # fmt: skip
"""Everything that is slow to import and is not mutated."""
RAN = 100
"""Added to pytest's exit status, so that no other failure of the process looks like a failed test."""
OUTCOMES = {RAN: "survived", RAN + 1: "killed", RAN + 2: "killed"}
"""All passed, a test failed, a module cannot be imported."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run_suite(tree: pathlib.Path, tests: list[str], timeout: float, fill_cache: bool) -> tuple[str, str]:
    """The outcome of tests in a copy of the tree: survived, killed or timeout; and the failure that pytest reports.

    With `fill_cache` the programs that are compiled are kept for the runs that follow.
    """
    log = tree / "log"
    process = _context.Process(target=_run_pytest, args=(tree, tests, log, fill_cache))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return "timeout", ""
    written = log.read_text()
    if process.exitcode not in OUTCOMES:
        raise RuntimeError(f"pytest ended with {process.exitcode}: {written[-2000:]}")
    failures = [line for line in written.splitlines() if line.startswith(("FAILED", "ERROR "))]
    return OUTCOMES[process.exitcode], (failures or [""])[0]


def _run_pytest(tree: pathlib.Path, tests: list[str], log: pathlib.Path, fill_cache: bool) -> None:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0 if fill_cache else 1e9)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        # The copy's package, before an editable install of the working tree.
        options = "-o pythonpath=. -x -q --tb=no -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning"
        status = pytest.main([*options.split(), *tests])
    sys.exit(RAN + status)
