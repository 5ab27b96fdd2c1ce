"""The cache of compiled programs: its folder, its entries, and runs that use it."""

import json
import os
import pathlib
import subprocess
import sys
import time
import zlib

import jax
import jaxlib
import pytest
from jax.experimental.compilation_cache import compilation_cache
from processes import ROOT, TINY, assert_same_runs, environ

from train import compilation
from train.compilation import use_cache
from train.ppo.config import Config, Hyperparameters

SHORT = (*TINY, "--total-steps", "384", "--seed", "7")
COUNT = """
import json, os, pathlib, sys
import jax
from train.ppo.__main__ import main

found = {"hits": 0, "misses": 0}

def count(name, **_):
    if (last := name.split("cache_")[-1]) in found:
        found[last] += 1

jax.monitoring.register_event_listener(count)
if os.environ.get("FULL"):
    from jax._src.lru_cache import LRUCache

    def put(cache, key, value):
        pathlib.Path(cache.path, f"{key}-cache").write_bytes(value[: len(value) // 2])
        raise OSError(28, "No space left on device", key)
    LRUCache.put = put
main(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(json.dumps(found))
"""
"""A run that counts the programs that were loaded, and those that were compiled for the cache."""


def start(folder: pathlib.Path, *args: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-c", COUNT, str(folder) + ".json", *SHORT, "--run-dir", str(folder), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, cwd=ROOT, env=environ() | env)


def finish(process: subprocess.Popen) -> dict[str, int]:
    """Return the counts of a run that must end well and in silence."""
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0 and not err, (out, err)
    return json.loads(pathlib.Path(process.args[3]).read_text())


def list_entries(base: pathlib.Path) -> list[pathlib.Path]:
    return sorted(base.glob("*/*-cache"))


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> pathlib.Path:
    """A run without a cache."""
    folder = tmp_path_factory.mktemp("without") / "run"
    home = folder.parent / "home"
    assert finish(start(folder, PERPJAX_CACHE="0", XDG_CACHE_HOME=str(home))) == {"hits": 0, "misses": 0}
    assert not home.exists()
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory, without) -> pathlib.Path:
    """The cache that two runs at once have filled. Both equal the run without a cache."""
    parent = tmp_path_factory.mktemp("filled")
    base, folders = parent / "cache", (parent / "one", parent / "other")
    processes = [start(folder, PERPJAX_CACHE=str(base)) for folder in folders]
    for process, folder in zip(processes, folders, strict=True):
        assert finish(process)["misses"] > 0
        assert_same_runs(without, folder)
    assert all(compilation._is_whole(entry.read_bytes()) for entry in list_entries(base))
    return base


@pytest.fixture
def kept():
    """JAX's own settings of the cache, as they were afterwards."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs",
             "jax_persistent_cache_min_entry_size_bytes")  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def base(kept, tmp_path, monkeypatch) -> pathlib.Path:
    """The folder of a cache that is not yet there."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setenv(compilation.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


# Runs.


def test_the_second_process_compiles_nothing(filled, without, tmp_path):
    found = finish(start(tmp_path / "run", PERPJAX_CACHE=str(filled)))
    assert found["misses"] == 0 and found["hits"] > 20
    assert_same_runs(without, tmp_path / "run")
    assert any(entry.name.startswith("jit_chunk-") for entry in list_entries(filled))


def test_other_numbers_need_no_other_program(filled, tmp_path):
    """Neither those of the algorithm nor those of the environment, nor another length of the run."""
    numbers = {
        "total-steps": 1280, "learning-rate": 0.003, "gamma": 0.9, "gae-lambda": 0.8, "clip": 0.1, "entropy-coef": 0.01,
        "value-coef": 0.4, "max-grad-norm": 1.0, "weight-decay": 0.1, "obs-noise": 0.1, "taker-fee": "2bp", "seed": 5,
    }  # fmt: skip
    assert {name.replace("-", "_") for name in numbers} >= set(Hyperparameters._fields) - {"minibatches"}
    args = [str(x) for name, value in numbers.items() for x in (f"--{name}", value)]
    assert finish(start(tmp_path / "run", *args, PERPJAX_CACHE=str(filled)))["misses"] == 0


def test_damaged_entries_are_replaced(filled, without, tmp_path):
    for i, entry in enumerate(list_entries(filled)):
        os.truncate(entry, entry.stat().st_size // 2 * (i % 2))
    assert finish(start(tmp_path / "run", PERPJAX_CACHE=str(filled)))["misses"] > 20
    assert_same_runs(without, tmp_path / "run")
    assert all(compilation._is_whole(entry.read_bytes()) for entry in list_entries(filled))


def test_a_full_disk_ends_no_run(without, tmp_path):
    """Each entry is cut short when it is written. The next process removes them."""
    base = tmp_path / "cache"
    folder = base / f"{jaxlib.__version__}-{compilation.describe_machine()}"
    base.mkdir(mode=0o700)
    folder.mkdir(mode=0o700)
    (folder / compilation.PROBED).write_text(compilation.QUIET)
    assert finish(start(tmp_path / "run", PERPJAX_CACHE=str(base), FULL="1"))["hits"] == 0
    assert_same_runs(without, tmp_path / "run")
    assert len(list_entries(base)) > 20
    compilation._remove_damaged(folder)
    assert list_entries(base) == []


def test_a_folder_that_cannot_be_made_ends_no_run(without, tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "run"
    assert finish(start(folder, PERPJAX_CACHE=str(tmp_path / "file" / "cache"))) == {"hits": 0, "misses": 0}
    assert_same_runs(without, folder)


def test_the_flag_turns_it_off(tmp_path):
    found = finish(start(tmp_path / "run", "--no-cache", PERPJAX_CACHE=str(tmp_path / "cache")))
    assert found == {"hits": 0, "misses": 0} and not (tmp_path / "cache").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["cache"] is False


# The folder.


def test_the_folder_is_private(base):
    folder = use_cache()
    assert folder.parent == base and jax.config.jax_compilation_cache_dir == str(folder)
    assert [part.stat().st_mode & 0o777 for part in (base, folder)] == [0o700, 0o700]
    # The probe has compiled one program and loaded it.
    assert len(list_entries(base)) == 1 and (folder / compilation.PROBED).read_text() == compilation.QUIET


@pytest.mark.parametrize("value", ["0", "", "off", "False"])
def test_the_variable_turns_it_off(base, monkeypatch, value):
    monkeypatch.setenv(compilation.VARIABLE, value)
    assert use_cache() is None and jax.config.jax_compilation_cache_dir is None
    assert not base.exists()


def test_a_folder_of_others_is_not_used(base, monkeypatch):
    base.mkdir()
    base.chmod(0o777)
    assert use_cache() is None and not list(base.iterdir())
    base.chmod(0o755)
    with monkeypatch.context() as context:
        context.setattr(os, "geteuid", lambda: base.stat().st_uid + 1)
        assert use_cache() is None and not list(base.iterdir())
    assert use_cache() is not None and base.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_jax_knows_stays(base, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert use_cache() == tmp_path / "mine"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine") and not base.exists()


def test_jax_may_have_turned_it_off(base):
    jax.config.update("jax_enable_compilation_cache", False)
    assert use_cache() is None and not base.exists()


def test_where_the_folder_lies(monkeypatch):
    monkeypatch.delenv(compilation.VARIABLE)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert compilation.find_base() == pathlib.Path("/some/cache/perpjax")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert compilation.find_base() == pathlib.Path("/home/someone/.cache/perpjax")
    monkeypatch.setenv(compilation.VARIABLE, "/elsewhere")
    assert compilation.find_base() == pathlib.Path("/elsewhere")


def test_another_machine_has_another_folder(monkeypatch):
    here = compilation.describe_machine()
    assert here == compilation.describe_machine()
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(999)))
        assert compilation.describe_machine() != here
        monkeypatch.undo()
    text = "processor: 0\nmodel name: x\nflags: fpu sse2\n\nprocessor: 1\n"
    found = []
    for flags in ("sse2", "sse2 avx512f"):
        monkeypatch.setattr(pathlib.Path, "read_text", lambda _, flags=flags: text.replace("sse2", flags))
        found.append(compilation.describe_machine())
    assert len({here, *found}) == 3


# The entries.


def test_the_least_recently_used_are_removed(tmp_path):
    now = time.time()
    for i, age in enumerate((10, 50, 30, 40, 20)):
        entry = tmp_path / f"machine-{i % 2}" / f"jit_{i}-cache"
        entry.parent.mkdir(exist_ok=True)
        entry.write_bytes(bytes(100))
        os.utime(entry, (now - age, now - 1000))
    compilation._remove_oldest(tmp_path, 500)
    assert len(list_entries(tmp_path)) == 5
    compilation._remove_oldest(tmp_path, 250)
    assert sorted(entry.name for entry in list_entries(tmp_path)) == ["jit_0-cache", "jit_4-cache"]


def test_an_entry_is_looked_at_once(tmp_path, monkeypatch):
    (tmp_path / "a-cache").write_bytes(zlib.compress(b"whole"))
    (tmp_path / "b-cache").write_bytes(zlib.compress(b"damaged")[:-1])
    (tmp_path / "c-cache").write_bytes(b"")
    compilation._remove_damaged(tmp_path)
    assert [path.name for path in list_entries(tmp_path.parent) if path.parent == tmp_path] == ["a-cache"]
    os.utime(tmp_path / "a-cache", (0, 0))
    monkeypatch.setattr(compilation, "_is_whole", lambda entry: pytest.fail("again"))
    compilation._remove_damaged(tmp_path)


# The probe.


@pytest.mark.parametrize(
    "said, found",
    [("Machine type used for XLA:CPU compilation doesn't match", "loud"), ("something else", "quiet"), ("", "quiet")],
)
def test_the_probe_hears_the_loader(base, monkeypatch, said, found):
    """It is asked once, and XLA's C++ is silenced in every process where it complains."""
    real, silenced = jax.jit, []

    def jit(work):
        os.write(2, said.encode())
        return real(work)

    monkeypatch.setattr(compilation.jax, "jit", jit)
    monkeypatch.setattr(compilation, "_silence_loader", lambda: silenced.append(True))
    folder = use_cache()
    assert (folder / compilation.PROBED).read_text() == found
    monkeypatch.setattr(compilation.jax, "jit", lambda work: pytest.fail("again"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert use_cache() == folder and len(silenced) == 2 * (found == "loud")


def test_programs_that_xla_rejects_are_not_kept(base, monkeypatch):
    def read(*args):
        raise RuntimeError("another machine")

    monkeypatch.setattr(jax._src.compilation_cache, "get_executable_and_time", read)
    assert use_cache() is None and jax.config.jax_compilation_cache_dir is None
    monkeypatch.undo()
    monkeypatch.setenv(compilation.VARIABLE, str(base))
    assert use_cache() is None


def test_a_full_disk_is_no_rejection(base, monkeypatch):
    def put(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax._src.lru_cache.LRUCache, "put", put)
    folder = use_cache()
    assert folder is not None and not (folder / compilation.PROBED).exists()


def test_jaxlib_has_the_level_of_its_log():
    from jaxlib import utils

    assert callable(utils.absl_set_min_log_level)


# The setting.


def test_an_older_run_has_the_setting():
    values = Config().to_json()
    del values["cache"]
    assert Config.from_json(values).cache is True
