"""Runs of the trainer in processes of their own, and processes that die on purpose.

As a script, `processes.py train UPDATE DELAY OPTIONS...` is a run that is killed, `processes.py full UPDATE UNTIL
OPTIONS...` one whose disk is full for a while, and `processes.py save FOLDER EVERY MOMENTS` writes checkpoints in
children that are killed.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = "synthetic:crash?bars=12000"
TINY = ("--num-envs", "16", "--num-steps", "8", "--hidden", "8", "--max-lots", "2", "--episode-length", "96",
        "--no-report", "--dataset", DATA)  # fmt: skip
"""Settings of a run of a second or two, 128 steps an update. In most updates an episode ends."""
TWENTY = (*TINY, "--total-steps", "2565", "--seed", "12", "--evaluate-every", "256", "--checkpoint-every", "512")
"""20 updates; five steps are left over. The policy of update 6 is the best, that of update 12 no longer."""
ENDLESS = (*TINY, "--total-steps", "1_000_000_000", "--evaluate-every", "0", "--updates-per-chunk", "2")


def environ(cache: pathlib.Path | None = None) -> dict[str, str]:
    """Return the environment of a run: quick to compile, on one machine's CPU.

    Args:
      cache: keeps compiled programs for the next process.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    if cache is not None:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return env


def start(*args: str, cache: pathlib.Path | None = None, prefix: tuple[str, ...] = (), **settings) -> subprocess.Popen:
    """Begin `python -m train.ppo`."""
    command = [*prefix, sys.executable, "-W", "error::RuntimeWarning", "-m", "train.ppo", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes | {"cwd": ROOT, "env": environ(cache)} | settings)


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[str, str]:
    """Return what it prints, and end it if it does not end itself."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


def run(*args: str, cache: pathlib.Path | None = None) -> str:
    """Return what `python -m train.ppo` prints; it must end with status 0 and without errors."""
    process = start(*args, cache=cache)
    out, err = finish(process)
    assert process.returncode == 0 and not err, (process.returncode, err, out)
    return out


def refused(capsys, *args) -> str:
    """Return the one line that answers a command of the trainer, in this process; exit status 2."""
    from train.ppo.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def run_and_kill(update: int, delay: float, *args: str, cache: pathlib.Path | None = None) -> int:
    """Train, and kill the process so many seconds after an update. Return its status: that of the signal, or 0."""
    command = [sys.executable, __file__, "train", str(update), str(delay), *map(str, args)]
    done = subprocess.run(command, env=environ(cache), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL) and not done.stderr, done
    return done.returncode


def read_lines(path: pathlib.Path) -> list[dict]:
    """Return the lines of a file of JSON lines. Each is whole and strict JSON."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_timeless(path: pathlib.Path) -> list[dict]:
    """The same without the times."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "steps_per_second")} for line in read_lines(path)]


def assert_same_runs(one: pathlib.Path, other: pathlib.Path) -> None:
    """Equal bit by bit: every line of metrics and evaluations, every kept checkpoint, and the closing evaluation."""
    from train.checkpoint import list_steps, read

    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_timeless(one / name) == read_timeless(other / name), name
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()
    assert list_steps(one) == list_steps(other)
    for step in list_steps(one):
        a, b = read(one, step), read(other, step)
        assert a.host["sha256"] == b.host["sha256"] and a.host["leaves"] == b.host["leaves"], step
        assert a.host["progress"] | {"seconds": 0} == b.host["progress"] | {"seconds": 0}, step
        for x, y in ((a.learner, b.learner), (a.loop, b.loop)):
            assert x.keys() == y.keys() and x
            for name in x:
                assert x[name].dtype == y[name].dtype and x[name].shape == y[name].shape, name
                assert x[name].tobytes() == y[name].tobytes(), name


# What dies.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(update: int, delay: float, args: list[str]) -> None:
    from train.hooks import Hook
    from train.ppo.command import parse
    from train.ppo.run import continue_run, train

    class Killer(Hook):
        def on_updates(self, metrics):
            if metrics[-1]["update"] >= update:
                timer = threading.Timer(delay, die)
                timer.daemon = True  # a run that ends first lives
                timer.start()

    config, resumed = parse(args, "train")
    if resumed is None:
        train(config, [Killer()])
    else:
        continue_run(config, resumed, [Killer()])


def train_on_a_full_disk(update: int, until: int, args: list[str]) -> None:
    """No file may grow longer than metrics.jsonl and half a line, from one update until another one.

    So says the process's own limit. The error differs from a full disk's in its number only.
    """
    import resource

    from train.hooks import Hook
    from train.ppo.command import parse
    from train.ppo.run import train

    class Filler(Hook):
        def on_start(self, run):
            self.metrics = run.folder / "metrics.jsonl"

        def on_updates(self, metrics):
            number, (soft, hard) = metrics[-1]["update"], resource.getrlimit(resource.RLIMIT_FSIZE)
            if update <= number < until and soft == hard:
                time.sleep(0.5)  # the save before is whole
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.metrics.stat().st_size + 100, hard))
            if number >= until:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

        def on_end(self, text):
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)

    config, _ = parse(args, "train")
    train(config, [Filler()])


def snapshot(step: int):
    """A small checkpoint of its own numbers."""
    from train.checkpoint import Snapshot

    learner = {".params['kernel']": np.random.default_rng(step).normal(size=(64, 64)), ".update": np.int32(step)}
    return Snapshot(learner, {".key": np.full(2, step, np.uint32)}, {"progress": {"steps": step}})


def save_and_die(folder: pathlib.Path, nth: int | None, seconds: float | None) -> int:
    """Save step 1 whole. Then die within the save of step 2, which removes step 1: at a file operation, or in time.

    Returns:
      The file operations that there were, if nothing has killed it.
    """
    import builtins
    import io

    from train import checkpoint

    checkpoint.KEPT = 1
    checkpoints, calls = checkpoint.Checkpoints(folder), []
    checkpoints.save(1, snapshot(1))
    checkpoints.wait()

    def patch(module, name: str) -> None:
        real = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == nth:
                die()
            return real(*args, **kwargs)

        setattr(module, name, call)

    for name in ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "open", "link", "symlink", "truncate"):
        patch(os, name)
    patch(io, "open")
    patch(builtins, "open")
    if seconds is not None:
        threading.Timer(seconds, die).start()
    checkpoints.save(2, snapshot(2))
    checkpoints.close()
    return len(calls)


def look_and_save(folder: pathlib.Path) -> list[int]:
    """Check that the newest whole checkpoint is one of the two, bit by bit, and that the next save cleans up.

    Returns:
      The steps that were whole after the kill, from the newest on.
    """
    from train import checkpoint

    checkpoint.KEPT = 1
    whole = [step for step, found in checkpoint.read_newest(folder) if not isinstance(found, ValueError)]
    assert whole and set(whole) <= {1, 2}, whole
    found, expected = checkpoint.read(folder, whole[0]), snapshot(whole[0])
    for a, b in ((found.learner, expected.learner), (found.loop, expected.loop)):
        assert a.keys() == b.keys() and all(np.asarray(a[k]).tobytes() == np.asarray(b[k]).tobytes() for k in a)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.last = whole[0]
    for step in (4, 5):  # not again the one that was killed
        checkpoints.save(step, snapshot(step))
    checkpoints.close()
    left = [path.name for path in (folder / checkpoint.FOLDER).iterdir()]
    assert left == ["5"], left
    assert checkpoint.read(folder, 5).learner[".update"] == 5
    return whole


def fork(work, *args) -> tuple[int, object]:
    """Return the status of a child that does the work, and its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            result = work(*args)
            os.write(writer, json.dumps(result).encode())
            status = 0
        except BaseException as error:
            os.write(writer, json.dumps(repr(error)).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(text) if text else None


def save_in_children(folder: pathlib.Path, every: int, moments: int) -> dict:
    """Kill a save at every so many file operations and at so many random moments. Return the whole steps of each.

    The children begin as copies of a process that has only imported.
    """
    import train.checkpoint  # noqa: F401

    began = time.monotonic()
    status, operations = fork(save_and_die, folder / "whole", None, None)
    assert status == 0, operations
    seconds = time.monotonic() - began
    whole = {}
    rng = np.random.default_rng(0)
    kills = {f"operation {nth}": (nth, None) for nth in range(1, operations + 1, every)}
    kills |= {f"moment {i}": (None, rng.uniform(0, seconds / 2)) for i in range(moments)}
    for name, (nth, delay) in kills.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        status, said = fork(save_and_die, place, nth, delay)
        assert status == -signal.SIGKILL or (status == 0 and delay is not None), (name, status, said)
        status, whole[name] = fork(look_and_save, place)
        assert status == 0, (name, whole[name])
    return {"operations": operations, "whole": whole}


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train_and_die(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    elif sys.argv[1] == "full":
        train_on_a_full_disk(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        folder = pathlib.Path(sys.argv[2])
        (folder / "whole").mkdir()
        print(json.dumps(save_in_children(folder, int(sys.argv[3]), int(sys.argv[4]))))
