"""Saving and loading pytrees of arrays: orbax and JSON, nothing pickled."""

import json
import os
import pathlib
import shutil
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")

CHECKPOINT = "checkpoint"
"""Folder of the final checkpoint inside a run directory."""


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def save_tree(run_dir: pathlib.Path, tree: Any) -> pathlib.Path:
    """Write a pytree of arrays to `run_dir`/checkpoint in place of an older one, and return that folder.

    A save that is killed leaves the old checkpoint or the new one, whole.
    """
    path = (run_dir / CHECKPOINT).absolute()
    fresh = path.with_name(path.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(fresh, _as_dict(tree))
    old = path.with_name(path.name + ".old")
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def load_tree(run_dir: pathlib.Path, like: T) -> T:
    """Read the pytree that `save_tree` wrote.

    Args:
      run_dir: as in `save_tree`.
      like: a pytree of the same structure, of arrays or of `jax.ShapeDtypeStruct`, such as `jax.eval_shape` returns.

    Raises:
      ValueError: there is no checkpoint, it is damaged, or its shapes and types are not those of `like`.
    """
    path = (run_dir / CHECKPOINT).absolute()
    if not path.is_dir():
        path = path.with_name(path.name + ".old")
    if not path.is_dir():
        raise ValueError(f"{path}: no checkpoint here; a run directory holds one when its training has ended")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            restored = checkpointer.restore(path, _as_dict(like))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{path}: does not fit this environment and configuration: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(like), [restored[k] for k in sorted(restored)])


def _as_dict(tree: Any) -> dict[str, Any]:
    """Leaves by position, so that optimiser states of any type are stored as plain arrays."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
