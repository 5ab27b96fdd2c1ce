"""What the workers of a test do instead of their task. Imports nothing heavy, for each worker begins with it."""

import os
import pathlib
import signal
import time

FOLDER = "PERPJAX_TEST_WORKERS"
"""Name of the environment variable with the folder in which workers leave their process ids."""


def _fail_or_sleep(task, fail) -> None:
    """The first task fails once another sleeps; the others sleep for a minute."""
    folder = pathlib.Path(os.environ[FOLDER])
    if task.seed:
        (folder / str(os.getpid())).touch()
        time.sleep(60)
    while not list(folder.iterdir()):
        time.sleep(0.05)
    fail()


def die(task) -> None:
    _fail_or_sleep(task, lambda: os.kill(os.getpid(), signal.SIGKILL))


def run_out_of_memory(task) -> None:
    def fail() -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n  while trying to allocate 9 bytes.")

    _fail_or_sleep(task, fail)
