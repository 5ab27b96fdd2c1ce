"""The trainer's package, imported under its name `train` even where another module has that name.

`train` is a usual name for a script. In a folder with a `train.py`, `python -m train.ppo` runs that file and not the
trainer, and `import train` gets it, too. The same holds if such a folder is on PYTHONPATH, or if the user's module is
already imported. The console script `perpjax` and this module load the package beside `perpjax` in all these cases.
"""

import contextlib
import importlib
import importlib.util
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

_NAME = "train"
_FOLDER = pathlib.Path(__file__).resolve().parents[1] / _NAME
_OURS: dict[str, ModuleType] = {}
"""The trainer's modules by name, while a foreign module has the name. Otherwise they are in `sys.modules`."""
_BLOCKS: list[dict[str, ModuleType] | None] = []
"""The open blocks of `use_trainer`, of all threads. The first holds the foreign modules, if there are any."""
_LOCK = threading.RLock()


def import_train(submodule: str = "") -> ModuleType:
    """Return a module of the trainer.

    Foreign modules of the same name stay as they are. Equal calls return the same module object.

    Args:
      submodule: such as "ppo.run"; "" for the package.

    Raises:
      ModuleNotFoundError: the trainer has no such module.
    """
    with use_trainer():
        return importlib.import_module(f"{_NAME}.{submodule}" if submodule else _NAME)


@contextlib.contextmanager
def use_trainer() -> Iterator[None]:
    """Give the name `train` to the trainer in the block, and afterwards back to the module that had it.

    All threads see the trainer during the block. Functions of the trainer that import others when they are called need
    the block around the call.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    with _LOCK:
        if not _BLOCKS and not _is_ours():
            _BLOCKS.append(_take_modules())
            sys.modules.update(_OURS)
            try:
                if _NAME not in _OURS:
                    _load_package()
            except BaseException:
                _give_back()
                raise
        else:
            _BLOCKS.append(None)


def _leave() -> None:
    with _LOCK:
        if len(_BLOCKS) == 1 and _BLOCKS[0] is not None:
            _give_back()
        else:
            _BLOCKS.pop()


def _give_back() -> None:
    _OURS.update(_take_modules())
    sys.modules.update(_BLOCKS.pop())


def _is_ours() -> bool:
    """Whether `import train` gets the trainer."""
    if _NAME in sys.modules:
        found = getattr(sys.modules[_NAME], "__file__", None)
    else:
        spec = importlib.util.find_spec(_NAME)
        found = spec.origin if spec else None
    return found is not None and os.path.realpath(found) == str(_FOLDER / "__init__.py")


def _take_modules() -> dict[str, ModuleType]:
    """Remove `train` and its submodules from the imported modules, and return them."""
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}


def _load_package() -> None:
    spec = importlib.util.spec_from_file_location(
        _NAME, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
