"""Checkpoints: bit for bit, whole or not at all, and nothing pickled."""

import errno
import gc
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, hand_market
from processes import ROOT, environ, snapshot

import train
from perpjax import AutoReset, EnvConfig, PerpEnv, VecEnv
from train import checkpoint
from train.checkpoint import (
    FOLDER,
    CheckpointError,
    Checkpoints,
    Snapshot,
    flatten,
    list_steps,
    read,
    read_newest,
    unflatten,
    write_json,
)  # fmt: skip
from train.hooks.broadcast import Broadcast
from train.loop import Progress, take_snapshot
from train.ppo.config import Config
from train.ppo.run import init_state, make_ppo
from train.state import TrainState

# A restore that fails leaves orbax's own event loop to the garbage collector, which complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ENV = EnvConfig(max_lots=2, episode_length=4)
CONFIG = Config(num_envs=2, num_steps=2, total_steps=4, hidden=(6, 5), env=ENV)
PPO = make_ppo(CONFIG)


@pytest.fixture(autouse=True, scope="module")
def buried():
    """Failed reads leave tasks that complain when they are collected, which in the midst of `ast.parse` is an error."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def state() -> TrainState:
    return init_state(PPO, VecEnv(AutoReset(PerpEnv(hand_market(bars=9), FREE, ENV))))


def scrambled(tree, seed: int):
    """Every leaf different from every other, so that a swapped pair shows."""
    rng = np.random.default_rng(seed)

    def draw(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(rng.integers(2**31)), x.shape)
        return jnp.asarray(rng.normal(size=x.shape) * 100).astype(x.dtype)

    return jax.tree.map(draw, tree)


def save(folder: pathlib.Path, step: int, taken: Snapshot, best: int | None = None) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.best = best
    checkpoints.save(step, taken)
    checkpoints.close()


def assert_same(a, b) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    chex.assert_trees_all_equal(*(jax.tree.map(checkpoint._key_data, x) for x in (a, b)))


def same_arrays(a: Snapshot, b: Snapshot) -> bool:
    pairs = [(a.learner, b.learner), (a.loop, b.loop)]
    return all(x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in pairs)


def test_a_whole_state_is_bit_for_bit(state, tmp_path):
    """Also keys, flags, counters, and leaves without elements."""
    wild, progress = scrambled(state, 1), Progress(3, 12, 0.25, {"steps": 8, "closed_return": -0.125})
    taken = take_snapshot(wild, progress, Broadcast([]))
    save(tmp_path, 12, taken)
    found, where = read(tmp_path, 12), tmp_path / FOLDER / "12"
    assert_same(unflatten(found.learner, state.learner, where), wild.learner)
    rest = state._replace(learner=())
    assert_same(unflatten(found.loop, rest, where), wild._replace(learner=()))
    assert Progress(**found.host["progress"]) == progress
    # Shapes alone are enough, and the learner alone can be read.
    forms = jax.eval_shape(lambda: state.learner)
    alone = read(tmp_path, 12, ("learner",))
    assert_same(unflatten(alone.learner, forms, where), wild.learner)
    assert alone.loop == {}
    # NaN and infinity are numbers like others.
    odd = {".x": np.float32([np.nan, np.inf, -0.0]), ".y": np.bool_([True]), ".z": np.uint32(2**32 - 1)}
    (tmp_path / "odd").mkdir()
    save(tmp_path / "odd", 1, Snapshot(odd, {".k": np.int32(1)}, {}))
    got = read(tmp_path / "odd", 1).learner
    assert all(got[k].dtype == x.dtype and got[k].tobytes() == x.tobytes() for k, x in odd.items())


def test_a_snapshot_is_a_copy(state):
    """The program takes the buffers over while a checkpoint is still written."""
    arrays = flatten(state.learner)
    assert all(x.base is None and x.flags.owndata for x in arrays.values())


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    save(pathlib.Path("run"), 1, snapshot(1))
    assert same_arrays(read(pathlib.Path("run"), 1), snapshot(1))


def test_a_missing_checkpoint(tmp_path):
    assert list_steps(tmp_path) == list_steps(tmp_path / "never") == [] and list(read_newest(tmp_path)) == []
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / FOLDER / "7"))):
        read(tmp_path, 7)


@pytest.mark.parametrize("hidden", [(6, 4), (6,), (6, 5, 5), (5, 6)], ids=str)
def test_another_network_does_not_fit(state, tmp_path, hidden):
    other = make_ppo(Config(num_envs=2, num_steps=2, total_steps=4, hidden=hidden, env=ENV))
    like = jax.eval_shape(other.init, VecEnv(AutoReset(PerpEnv(hand_market(bars=9), FREE, ENV))), jax.random.key(0))
    with pytest.raises(ValueError, match="does not fit this run") as caught:
        unflatten(flatten(state.learner), like.learner, tmp_path)
    assert str(tmp_path) in str(caught.value) and str(caught.value).count("\n") == 0


# Which are kept.


def test_the_last_three_and_the_best_are_kept(tmp_path):
    """Also over a session that goes on, and when the best changes."""
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3, 4, 5, 6):
        checkpoints.best = min(step, 2)
        checkpoints.save(step, snapshot(step))
    checkpoints.close()
    assert list_steps(tmp_path) == [2, 4, 5, 6] and checkpoints.last == 6
    again = Checkpoints(tmp_path)
    again.last = 6
    for step, best in ((7, 2), (8, 2), (9, 9), (10, 9), (11, 9), (12, 9), (13, 9)):
        again.best = best
        again.save(step, snapshot(step))
        again.wait()
        assert (2 in list_steps(tmp_path)) == (best == 2)
    again.close()
    assert list_steps(tmp_path) == [9, 11, 12, 13]
    assert all(same_arrays(read(tmp_path, step), snapshot(step)) for step in (9, 11, 12, 13))


def test_damaged_ones_after_the_one_that_went_on_are_removed(tmp_path):
    for step in (1, 2, 9):
        save(tmp_path, step, snapshot(step))
    shutil.rmtree(tmp_path / FOLDER / "9" / "host")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.last = 2
    checkpoints.save(3, snapshot(3))
    checkpoints.close()
    assert list_steps(tmp_path) == [1, 2, 3]


# Damage.


def test_each_damaged_file_is_noticed(tmp_path):
    """Emptied, cut, removed, or one bit flipped: an error of one line, or a file that nothing needs."""
    save(tmp_path, 1, snapshot(1))
    # The files below ocdbt.process_0 are merged into the rest when a save ends.
    files = [p for p in sorted((tmp_path / FOLDER / "1").rglob("*")) if p.is_file() and p.name != "commit_success.txt"]
    assert len(files) >= 6
    noticed = 0
    for file in files:
        kept = file.read_bytes()
        flipped = bytearray(kept)
        flipped[len(kept) // 2] ^= 1
        for damage in (b"", kept[: len(kept) // 2], None, bytes(flipped)):
            file.unlink() if damage is None else file.write_bytes(damage)
            try:
                found = read(tmp_path, 1)
            except ValueError as error:
                noticed += 1
                assert str(error).startswith(f"{tmp_path}/{FOLDER}/1: not a whole checkpoint of perpjax: ")
                assert "\n" not in str(error) and len(str(error)) < 600
            else:
                assert same_arrays(found, snapshot(1)), (file.name, damage)
            file.write_bytes(kept)
    assert noticed >= 12
    assert same_arrays(read(tmp_path, 1), snapshot(1))


def test_arrays_of_another_checkpoint_are_noticed(tmp_path):
    """All files are whole, and of one layout; only the hash tells."""
    for step in (1, 2):
        save(tmp_path, step, snapshot(step))
    place = tmp_path / FOLDER
    shutil.rmtree(place / "2" / "learner")
    shutil.copytree(place / "1" / "learner", place / "2" / "learner")
    with pytest.raises(ValueError, match="the hash of its learner differs"):
        read(tmp_path, 2)
    found = list(read_newest(tmp_path))
    assert [step for step, _ in found] == [2, 1] and isinstance(found[0][1], ValueError)
    assert same_arrays(found[1][1], snapshot(1))


def test_another_format_is_refused(tmp_path):
    save(tmp_path, 1, snapshot(1))
    host = tmp_path / FOLDER / "1" / "host" / "metadata"
    host.write_text(json.dumps(json.loads(host.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="format 99; this program reads format 1"):
        read(tmp_path, 1)


def test_what_lies_beside_them_does_not_matter(tmp_path):
    save(tmp_path, 1, snapshot(1))
    place = tmp_path / FOLDER
    (place / "notes").mkdir()
    (place / "7").write_text("a file")
    (place / "3.orbax-checkpoint-tmp").mkdir()
    assert list_steps(tmp_path) == [1]


# Failures of a save.


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def begun(folder: pathlib.Path) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, snapshot(1))
    checkpoints.wait()
    return checkpoints


def assert_failed(checkpoints: Checkpoints, error: CheckpointError, folder: pathlib.Path) -> None:
    """The message, the checkpoint before, no remains; the next save works."""
    text = str(error)
    assert text.startswith(f"{folder}/{FOLDER}/2: cannot be written: ") and "\n" not in text and len(text) < 600
    assert os.strerror(errno.ENOSPC) in text and f"the checkpoint of step 1 is whole in {folder}" in text
    assert [p.name for p in (folder / FOLDER).iterdir()] == ["1"] and checkpoints.last == 1
    assert same_arrays(read(folder, 1), snapshot(1))
    checkpoints.save(3, snapshot(3))
    checkpoints.close()
    assert list_steps(folder) == [1, 3] and same_arrays(read(folder, 3), snapshot(3))


def test_a_save_that_fails_at_once(tmp_path, monkeypatch):
    checkpoints = begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "save", no_space)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(2, snapshot(2))
    assert_failed(checkpoints, caught.value, tmp_path)


def test_a_save_without_room(tmp_path, monkeypatch):
    checkpoints = begun(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 2**18))
        with pytest.raises(CheckpointError, match=r"0\.3 of 0\.3 MB") as caught:
            checkpoints.save(2, snapshot(2))
    assert_failed(checkpoints, caught.value, tmp_path)


@pytest.mark.parametrize("notice", ["check", "wait", "save", "close"])
def test_a_save_that_fails_late(tmp_path, monkeypatch, notice):
    """In the background, when it renames. Each of the four notices."""
    checkpoints = begun(tmp_path)
    with monkeypatch.context() as patch:
        real = os.rename

        def rename(source, *args, **kwargs):
            no_space() if str(source).endswith("2.orbax-checkpoint-tmp") else real(source, *args, **kwargs)

        patch.setattr(os, "rename", rename)
        checkpoints.save(2, snapshot(2))
        while checkpoints._manager.is_saving_in_progress():
            time.sleep(0.01)
        with pytest.raises(CheckpointError) as caught:
            if notice == "save":
                checkpoints.save(3, snapshot(3))
            else:
                getattr(checkpoints, notice)()
        if notice == "save":  # which has begun nevertheless
            checkpoints.wait()
            assert checkpoints.last == 3 and same_arrays(read(tmp_path, 3), snapshot(3))
            assert "/2: cannot be written" in str(caught.value) and list_steps(tmp_path) == [1, 3]
            return
    assert_failed(checkpoints, caught.value, tmp_path)
    checkpoints.check()


def test_a_save_of_the_same_step_again_does_nothing(tmp_path):
    checkpoints = begun(tmp_path)
    checkpoints.save(1, snapshot(5))
    checkpoints.close()
    assert same_arrays(read(tmp_path, 1), snapshot(1))


def test_a_deleted_run_folder_stays_away(tmp_path):
    for opened in (True, False):
        folder = tmp_path / str(opened)
        folder.mkdir()
        checkpoints = begun(folder) if opened else Checkpoints(folder)
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match=re.escape(f"{folder}/{FOLDER}/2: cannot be written")):
            checkpoints.save(2, snapshot(2))
        checkpoints.close()
        assert not folder.exists()


def test_the_words_of_a_failure():
    where = 'OCDBT database at local file "/a/b: c/": Failed to write 166 bytes to file 9: No space left on device'
    long = f"RESOURCE_EXHAUSTED: Error writing {where} [tensorstore_spec='a: 1'] [source locations='x']\nmore"
    assert checkpoint._reason(ValueError(long)) == "No space left on device"
    assert checkpoint._reason(OSError(28, "No space left on device")) == "[Errno 28] No space left on device"
    assert checkpoint._reason(ValueError()) == "ValueError" and len(checkpoint._reason(ValueError("x" * 999))) == 300


def test_the_log_of_orbax_alone_is_silent(caplog):
    logging.getLogger("asyncio").error("Task exception was never retrieved: orbax/checkpoint/x.py")
    assert caplog.text == ""
    logging.getLogger("asyncio").error("Task exception was never retrieved: mine.py")
    assert "mine.py" in caplog.text


# kill -9.


def kill_saves(folder: pathlib.Path, every: int, moments: int) -> dict:
    command = [sys.executable, str(ROOT / "tests" / "processes.py"), "save", folder, every, moments]
    env = environ() | {"OPENBLAS_NUM_THREADS": "1"}  # a fork copies one thread only
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_survived(said: dict) -> None:
    """The old checkpoint before the renaming, both before the old one is removed, the new one afterwards."""
    whole = [steps for name, steps in said["whole"].items() if name.startswith("operation")]
    assert said["operations"] > 40 and [1] in whole and [2] in whole
    assert whole == sorted(whole, key=[[1], [2, 1], [2]].index)


def test_killed_at_file_operations(tmp_path):
    """A save that is killed at every fifth of its file operations, and at three moments of the background."""
    assert_survived(kill_saves(tmp_path, 5, 3))


@pytest.mark.slow
def test_killed_at_each_file_operation(tmp_path):
    said = kill_saves(tmp_path, 1, 40)
    assert_survived(said)
    assert len(said["whole"]) == said["operations"] + 40 and [2, 1] in said["whole"].values()


# JSON files.


class Broken(Exception):
    pass


def broken(*args, **kwargs):
    raise Broken


def test_json_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})
    for odd in (object(), float("nan")):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, {"a": odd})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(Broken):
            write_json(path, {"a": 2})
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", no_space)
        with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")):
            write_json(path, {"a": 3})
    assert path.read_text().split() == ["{", '"a":', "1", "}"]
    assert list(tmp_path.iterdir()) == [path]


PICKLES = (
    r"\bimport (cloud)?pickle", r"allow_pickle\s*=\s*True", r"\bnp\.(save|load)\b", r"\b(joblib|shelve|dill|marshal)\b",
)  # fmt: skip


def test_nothing_is_pickled():
    root = pathlib.Path(train.__file__).parents[1]
    sources = [*(root / "train").rglob("*.py"), *(root / "perpjax").rglob("*.py")]
    assert len(sources) > 20
    for source in sources:
        for pattern in PICKLES:
            assert not re.search(pattern, source.read_text()), f"{source}: {pattern}"
