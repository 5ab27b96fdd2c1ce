"""The import of a function that a command line names as `module:function`."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


def import_function(spec: str, role: str) -> Callable[..., Any]:
    """Return the function of "module:function". The module may lie in the current folder, too.

    Args:
      role: the first word of a message, such as "features".

    Raises:
      ValueError: there is no such function.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{role} {spec!r} is not module:function")
    try:
        with _reach_current_folder():
            function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(f"{role} {spec}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{role} {spec}: is a {type(function).__name__}, not a function")
    return function


@contextlib.contextmanager
def _reach_current_folder() -> Iterator[None]:
    """Search the current folder last. `python -m` searches it first, a console script not at all."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]
