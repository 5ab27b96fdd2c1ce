"""Saving and loading what was learnt: orbax arrays and JSON, nothing pickled."""

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from perpjax import AutoReset
from train.config import Config
from train.ppo import Learner, init_train

CHECKPOINT = "checkpoint"
"""Folder of the final learner inside a run directory."""


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def save_learner(run_dir: pathlib.Path, learner: Learner) -> pathlib.Path:
    """Write the learner to `run_dir`/checkpoint, replacing an older one; returns the folder."""
    path = (run_dir / CHECKPOINT).absolute()
    fresh = path.with_name(path.name + ".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(fresh, _as_dict(learner))
    old = path.with_name(path.name + ".old")
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(fresh, path)
    shutil.rmtree(old, ignore_errors=True)
    return path


def load_learner(run_dir: pathlib.Path, env: AutoReset, config: Config) -> Learner:
    """Read the learner that a run with this configuration saved.

    Raises:
      ValueError: if there is no checkpoint, or it does not fit the environment and the configuration.
    """
    path = (run_dir / CHECKPOINT).absolute()
    if not path.is_dir():
        path = path.with_name(path.name + ".old")
    if not path.is_dir():
        raise ValueError(f"{path}: no checkpoint here; a run directory holds one when its training has ended")
    shapes = jax.eval_shape(lambda key: init_train(env, config, key).learner, jax.random.key(0))
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            restored = checkpointer.restore(path, _as_dict(shapes))
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"{path}: does not fit this environment and configuration: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(shapes), [restored[k] for k in sorted(restored)])


def _as_dict(learner: Learner) -> dict[str, Any]:
    """Leaves by position, so that optimiser states of any type are stored as plain arrays."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(learner))}
