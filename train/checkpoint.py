"""Checkpoints: pytrees of arrays and JSON values, written by orbax while the training goes on. Nothing is pickled.

A checkpoint is a folder `checkpoints/STEP`. Its items `learner` and `loop` are flat dictionaries from key paths,
such as ".params['params']['actor_0']['kernel']", to arrays. Its item `host` is JSON values, with a hash of each item.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from train.run_folder import CHECKPOINTS as FOLDER
from train.run_folder import Run

T = TypeVar("T")

FORMAT = 1
"""Version of the layout. A checkpoint of another one is refused."""
KEPT = 3
"""The newest so many checkpoints are kept, and the best on validation."""
ITEMS = ("learner", "loop")
SPARE_BYTES = 2**18
"""Room for the names and forms of a checkpoint's arrays, beside the arrays."""

# A save or a read that fails raises; orbax also logs it, hundreds of lines long.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: not re.search("orbax|OCDBT", record.getMessage()))


class Snapshot(NamedTuple):
    """A copy of a training run on the host."""

    learner: dict[str, np.ndarray]
    """By key path; as much as a policy needs in play, and the optimiser."""
    loop: dict[str, np.ndarray]
    """The rest of the state: environments, memory, keys."""
    host: dict[str, Any]
    """JSON values: counters, the best so far, the hooks' state."""


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write a file whole or not at all.

    Raises:
      OSError: it cannot be written; the error names the file.
    """
    text, temporary = json.dumps(value, indent=2, allow_nan=False) + "\n", path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # that of a full disk has no name


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Return copies of the leaves on the host, by key path; random keys as their data.

    Leaves without elements are left out: orbax refuses them, and `unflatten` needs none.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    arrays = {jax.tree_util.keystr(path): np.array(_key_data(leaf)) for path, leaf in paths}
    return {name: x for name, x in arrays.items() if x.size}


def unflatten(arrays: dict[str, np.ndarray], like: T, where: pathlib.Path) -> T:
    """Return the pytree of such a dictionary, as device arrays.

    Args:
      like: a pytree of the same structure, of arrays or of `jax.ShapeDtypeStruct`. A leaf with a sharding gets it.
      where: the checkpoint, for messages.

    Raises:
      ValueError: a leaf is missing, left over, or of another shape or type.
    """
    expected = jax.tree_util.tree_leaves_with_path(like)
    names = [jax.tree_util.keystr(path) for path, _ in expected]
    if left := sorted(set(arrays) - set(names)):
        raise ValueError(f"{where}: does not fit this run: it holds {left[0]}, of which this program knows nothing")

    def restore(name: str, leaf: Any) -> Any:
        form = jax.eval_shape(_key_data, leaf)
        if 0 in form.shape:
            return jnp.zeros(form.shape, form.dtype)
        if name not in arrays:
            raise ValueError(f"{where}: does not fit this run: it lacks {name}")
        x = arrays[name]
        if (x.shape, x.dtype) != (form.shape, form.dtype):
            kind, wanted = f"{x.dtype}{list(x.shape)}", f"{form.dtype}{list(form.shape)}"
            raise ValueError(f"{where}: does not fit this run: {name} is {kind} there and {wanted} here")
        sharding = getattr(leaf, "sharding", None)
        x = jnp.array(x) if sharding is None else jax.device_put(x, sharding)
        return jax.random.wrap_key_data(x) if _is_key(leaf) else x

    leaves = [restore(name, leaf) for name, (_, leaf) in zip(names, expected, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


class CheckpointError(OSError):
    """A save that failed. The message is one line that names the folder."""


class Checkpoints:
    """The checkpoints of one run, written in the background. The last `KEPT` are kept, and the best.

    Args:
      run_folder: holds them in `checkpoints/`. The first save removes the remains of a killed one.
    """

    def __init__(self, run_folder: pathlib.Path):
        self.folder = (run_folder / FOLDER).absolute()
        self.best: int | None = None
        """The step to keep, however old."""
        self.last: int | None = None
        """The newest step that is known to be whole. The first save removes later ones, which are damaged."""
        self._pending: int | None = None
        self._manager: ocp.CheckpointManager | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, after the one before it is whole. The arrays must not change until then.

        Raises:
          CheckpointError: this save failed, and the next call tries again. Or the one before it has failed, and this
            one has begun.
        """
        before = None
        try:
            self.wait()
        except CheckpointError as error:
            before = error
        if step != self.last:
            self._begin(step, snapshot)
        if before is not None:
            raise before

    def _begin(self, step: int, snapshot: Snapshot) -> None:
        items = {name: ocp.args.PyTreeSave(getattr(snapshot, name)) for name in ITEMS}
        hashes = {name: _hash(getattr(snapshot, name)) for name in ITEMS}
        leaves = {name: sorted(getattr(snapshot, name)) for name in ITEMS}
        needed = SPARE_BYTES + sum(x.nbytes for name in ITEMS for x in getattr(snapshot, name).values())
        host = ocp.args.JsonSave(snapshot.host | {"format": FORMAT, "leaves": leaves, "sha256": hashes})
        try:
            self._pending = step
            if self._manager is None:
                self._manager = self._open()
            if not self.folder.is_dir():  # orbax would make it and its parents again
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            free = shutil.disk_usage(self.folder).free
            if free < needed:  # noticed before orbax, whose writers fail with tracebacks
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.1f} of {needed / 1e6:.1f} MB")
            self._manager.save(step, args=ocp.args.Composite(host=host, **items), force=True)
        except Exception as error:
            raise self._fail(error) from error

    def check(self) -> None:
        """Notice whether the save that is under way has ended.

        Raises:
          CheckpointError: it failed.
        """
        if self._manager is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the save that is under way is whole.

        Raises:
          CheckpointError: it failed.
        """
        if self._pending is None or self._manager is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._fail(error) from error
        self.last, self._pending = self._pending, None

    def describe(self) -> str:
        """Return one phrase about the newest whole checkpoint."""
        if self.last is None:
            return "no checkpoint is whole yet"
        return f"the checkpoint of step {self.last:,} is whole in {self.folder.parent}"

    def close(self) -> None:
        """Wait, and end the threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        self.folder.mkdir(exist_ok=True)  # not its parents: a run folder that was deleted stays away
        for step in list_steps(self.folder.parent):
            if self.last is not None and step > self.last:
                shutil.rmtree(self.folder / str(step))
        _silence_orbax()
        options = ocp.CheckpointManagerOptions(preservation_policy=_Keep(self), cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self.folder, options=options)

    def _fail(self, error: Exception) -> CheckpointError:
        """The error in one line. The manager of the failed save is closed, and its files are removed."""
        manager, self._manager, step, self._pending = self._manager, None, self._pending, None
        if manager is not None:
            for end in (manager.wait_until_finished, manager.close):
                with contextlib.suppress(Exception):  # the same failure again
                    end()
        for path in [self.folder / str(step), *self.folder.glob(f"{step}.*")]:
            if step != self.last:
                shutil.rmtree(path, ignore_errors=True)
        for place in (self.folder, self.folder.parent):  # a writer makes a deleted folder again
            with contextlib.suppress(OSError):
                place.rmdir()
        return CheckpointError(f"{self.folder / str(step)}: cannot be written: {_reason(error)}; {self.describe()}")


class _Keep(checkpoint_managers.PreservationPolicy):
    """Keeps the newest checkpoints and the best."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return, for each checkpoint in the order of steps, whether it stays."""
        newest = {info.step for info in checkpoints[-KEPT:]}
        return [info.step in newest or info.step == self.checkpoints.best for info in checkpoints]


def list_steps(run_folder: pathlib.Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder, ascending; whole ones and damaged ones."""
    return Run(run_folder).checkpoint_steps()


def read(run_folder: pathlib.Path, step: int, items: Sequence[str] = ITEMS) -> Snapshot:
    """Read one checkpoint, or some of its items.

    Raises:
      ValueError: it is damaged, foreign, or of another version. The message is one line.
    """
    path = (run_folder / FOLDER).absolute() / str(step)
    try:
        return _read(path, items)
    except Exception as error:
        lacks = "lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"{path}: not a whole checkpoint of perpjax: {lacks}{_first_line(error)}") from None


def _read(path: pathlib.Path, items: Sequence[str]) -> Snapshot:
    host = json.loads((path / "host" / "metadata").read_text())
    if host["format"] != FORMAT:
        raise ValueError(f"format {host['format']}; this program reads format {FORMAT}")
    arrays = {}
    for name in items:
        with ocp.PyTreeCheckpointer() as checkpointer:
            arrays[name] = {}
            for leaf in host["leaves"][name]:
                # One by one: if several reads fail at once, those that nobody awaits print their tracebacks.
                arguments = ocp.args.PyTreeRestore(
                    item={leaf: 0}, restore_args={leaf: ocp.RestoreArgs(restore_type=np.ndarray)}, partial_restore=True
                )
                arrays[name] |= checkpointer.restore(path / name, args=arguments)
        if _hash(arrays[name]) != host["sha256"][name]:
            raise ValueError(f"the hash of its {name} differs: the file was damaged")
    return Snapshot(arrays.get("learner", {}), arrays.get("loop", {}), host)


def read_newest(run_folder: pathlib.Path, items: Sequence[str] = ITEMS) -> Iterator[tuple[int, Snapshot | ValueError]]:
    """Yield the checkpoints of a run from the newest on, each read or as the error of reading it."""
    for step in reversed(list_steps(run_folder)):
        try:
            yield step, read(run_folder, step, items)
        except ValueError as error:
            yield step, error


def _hash(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        x = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {x.dtype.str} {x.shape}\n".encode())
        digest.update(x)
    return digest.hexdigest()


@functools.cache
def _silence_orbax() -> None:
    """Drop the tracebacks that the other writers of a failed save leave behind, also after the end of the run."""
    before = sys.unraisablehook

    def drop(failure: Any) -> None:
        if not (isinstance(failure.exc_value, RuntimeError) and str(failure.exc_value) == "Event loop is closed"):
            before(failure)

    sys.unraisablehook = drop


def _reason(error: Exception) -> str:
    """The system's words, such as "No space left on device", which tensorstore hides behind the places of its files."""
    line = re.split(r" \[(?:tensorstore_spec|os_error_code|source)", _first_line(error, 10_000))[0]
    return (line.rsplit(": ", 1)[-1] if re.match("[A-Z_]+: ", line) else line)[:300]


def _first_line(error: Exception, most: int = 300) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:most]
