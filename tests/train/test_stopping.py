"""A run that is ended: by signals, by a disk, by a lost folder or output. It keeps the work, or leaves nothing."""

import gc
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from processes import ENDLESS, ROOT, TINY, TWENTY, environ, finish, read_lines, read_timeless, run, start

import train.ppo.__main__ as command_line
from train.checkpoint import list_steps, read
from train.hooks import Hook
from train.ppo.command import parse
from train.ppo.run import resume, train
from train.stopping import SIGNALS, Interrupted, Stopper

pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_once")

MANY = {"SIGTERM": 143, "SIGHUP": 129, "SIGINT": 130}


class Listener(Hook):
    """Keeps the texts, and calls `act` once, at an update or in the stage of a name.

    Args:
      at: the number of the update, or how the text of the stage begins.
    """

    def __init__(self, at=None, act=lambda: None):
        self.at, self.act, self.messages, self.last, self.folder = at, act, [], "", None

    def _reach(self, reached: bool) -> None:
        if reached and self.act is not None:
            act, self.act = self.act, None
            act()

    def on_start(self, run):
        self.folder = run.folder

    def on_updates(self, metrics):
        self._reach(isinstance(self.at, int) and metrics[-1]["update"] >= self.at)

    def on_stage(self, text):
        self._reach(isinstance(self.at, str) and text.startswith(self.at))

    def on_message(self, text):
        self.messages.append(text)

    def on_end(self, text):
        self.last = text


@pytest.fixture(autouse=True)
def heard():
    """Under `nohup` SIGHUP is ignored, and a run leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def config_of(*args):
    return parse([str(arg) for arg in args], "train")[0]


def wait_for_threads() -> None:
    """Until no work that was left behind runs any more."""
    for thread in threading.enumerate():
        if thread.name == "perpjax":
            thread.join(60)
            assert not thread.is_alive()


# Signals after the first update.


def test_each_signal_saves_and_the_run_goes_on(tmp_path):
    """One run, which each of the three signals ends once. The handlers are the caller's again afterwards."""
    folder, before = tmp_path / "run", [signal.getsignal(s) for s in SIGNALS]
    steps = 0
    for name in MANY:
        signum = getattr(signal, name)
        hook = Listener(steps // 128 + 3, lambda signum=signum: send(signum))
        began = time.monotonic()
        with pytest.raises(Interrupted) as caught:
            if steps:
                resume(folder, hooks=[hook])
            else:
                train(config_of(*ENDLESS, "--run-dir", folder), [hook])
        assert time.monotonic() - began < 60 and caught.value.signum == signum
        assert isinstance(caught.value, KeyboardInterrupt)
        assert [signal.getsignal(s) for s in SIGNALS] == before
        lines = read_lines(folder / "metrics.jsonl")
        assert lines[-1]["steps"] > steps
        steps = lines[-1]["steps"]
        assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))
        # The checkpoint is that of the last line, and the message says so.
        assert list_steps(folder)[-1] == steps and int(read(folder, steps).learner[".update"]) == len(lines)
        assert f"stopped after {steps:,} of 1,000,000,000 steps" in str(caught.value)
        assert f"the checkpoint of step {steps:,} is whole in {folder}" in str(caught.value)
        assert f"--resume {folder}" in hook.last
    assert (tmp_path / "latest").resolve() == folder


@pytest.mark.parametrize("name, status", MANY.items())
def test_the_status_is_128_and_the_signal(monkeypatch, name, status):
    def interrupted(config):
        raise Interrupted(getattr(signal, name), "stopped")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(command_line, "train", interrupted)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as caught:
        command_line.main([*TINY])
    assert caught.value.code == status


def test_nohup_and_ctrl_c(tmp_path, cache):
    """Under nohup SIGHUP changes nothing. Ctrl-C then saves within 10 seconds and ends with status 130."""
    folder = tmp_path / "run"
    process = start(*ENDLESS, "--run-dir", folder, cache=cache, prefix=("nohup",), stdin=subprocess.DEVNULL)
    for line in process.stdout:
        if "steps/s" in line:
            break
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    lines = len((folder / "metrics.jsonl").read_text().splitlines())
    time.sleep(1.0)
    assert process.poll() is None and len((folder / "metrics.jsonl").read_text().splitlines()) > lines
    assert not (folder / "checkpoints").exists()
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = finish(process)
    assert time.monotonic() - began < 10
    assert process.returncode == 130 and "Traceback" not in out + err and f"--resume {folder}" in out
    assert list_steps(folder) == [read_lines(folder / "metrics.jsonl")[-1]["steps"]]


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """The work hangs after the first one. The message names the checkpoint that was whole before."""
    folder, release = tmp_path / "run", threading.Event()

    def interrupt_twice():
        for _ in range(2):
            send(signal.SIGINT)
            time.sleep(0.3)
        release.wait(60)

    hook = Listener(9, interrupt_twice)
    began = time.monotonic()
    try:
        with pytest.raises(Interrupted, match="stopped at once by SIGINT") as caught:
            train(config_of(*ENDLESS, "--checkpoint-every", "256", "--run-dir", folder), [hook])
        assert not release.is_set() and time.monotonic() - began < 60
        step = int(re.search(r"the checkpoint of step (\d+) is whole", str(caught.value))[1])
        assert str(folder) in str(caught.value) and step in (512, 768, 1024) and read(folder, step)
        assert str(caught.value) == hook.last
        assert (folder / "config.json").exists()
    finally:
        release.set()
        wait_for_threads()


def test_one_ctrl_c_waits_for_the_work():
    """The counterpart of the two: the first signal alone is patient, until the work is."""
    stopper = Stopper()

    def work():
        stopper.patient = True
        send(signal.SIGINT)
        time.sleep(0.5)
        return stopper.wanted

    assert stopper.run(work) == signal.SIGINT
    with pytest.raises(Interrupted, match="nothing was saved"):
        impatient = Stopper()
        impatient.run(lambda: send(signal.SIGINT) or time.sleep(2))


# Before the first update.


@pytest.mark.parametrize("stage", ["loading", "compiling"])
def test_before_the_first_update_nothing_is_left(tmp_path, monkeypatch, stage):
    """The work is still under way when the signal comes, and goes on for a while: it leaves nothing, either."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "runs" / "other"
    other.mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("other")
    release, sent = threading.Event(), []

    def interrupt():
        sent.append(time.monotonic())
        send(signal.SIGTERM)
        release.wait(60)

    hook = Listener(stage, interrupt)
    try:
        with pytest.raises(Interrupted, match="nothing was saved"):
            train(config_of(*ENDLESS), [hook])
        assert time.monotonic() - sent[0] < 2
        assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["latest", "other"]
    finally:
        release.set()
        wait_for_threads()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["latest", "other"]
    assert (tmp_path / "runs" / "latest").resolve() == other


def test_ctrl_c_while_compiling_ends_the_process(tmp_path):
    """A network large enough to compile for a while; no handler runs inside XLA's compiler."""
    folder = tmp_path / "deep" / "run"
    process = start(*ENDLESS, "--hidden", *["64"] * 8, "--run-dir", folder)
    for line in process.stdout:
        if line.startswith("compiling"):
            break
    time.sleep(0.5)
    assert folder.exists()
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = finish(process)
    assert time.monotonic() - began < 2
    assert process.returncode == 130 and "Traceback" not in out + err and "nothing was saved" in out
    assert not folder.exists()


# Another thread.


def test_a_thread_trains_without_signals(tmp_path):
    before, ended = [signal.getsignal(s) for s in SIGNALS], []
    config = config_of(*TINY, "--total-steps", "256", "--evaluate-every", "0", "--run-dir", tmp_path / "run")
    thread = threading.Thread(target=lambda: ended.append(train(config)))
    thread.start()
    thread.join(120)
    assert ended[0].path == tmp_path / "run" and list_steps(ended[0].path) == [256]
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_an_error_of_the_work_is_the_callers(tmp_path):
    """A hook that fails after some updates: its error, the handlers, and the checkpoint before it."""
    before = [signal.getsignal(s) for s in SIGNALS]
    config = config_of(*ENDLESS, "--checkpoint-every", "256", "--run-dir", tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(config, [Listener(7, lambda: 1 // 0)])
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert list_steps(tmp_path / "run")[-1] == 768 and read(tmp_path / "run", 768)


# Disks, folders, outputs.


def test_a_full_disk_ends_no_run(reference, tmp_path, cache):
    """Full from update 3 to 15: one warning each, and in the end every line and checkpoint is there."""
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tests" / "processes.py"), "full", "3", "15", *TWENTY]
    done = subprocess.run(
        [*command, "--run-dir", folder], env=environ(cache), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    said = "".join(done.stdout.split())
    assert done.returncode == 0 and not done.stderr, (done.stdout, done.stderr)
    assert said.count("metrics.jsonl:cannotbewritten:Filetoolarge;itslineswaitinmemory") == 1
    assert said.count("traininggoesonandtriesagain") == 1
    assert f"{folder}/checkpoints/512:cannotbewritten" in said and "thecheckpointofstep256iswhole" in said
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_timeless(folder / name) == read_timeless(reference / name)
    assert list_steps(folder)[-2:] == [2048, 2560]
    assert read(folder, 2560).host["sha256"] == read(reference, 2560).host["sha256"]


@pytest.mark.slow
def test_a_disk_that_stays_full_loses_no_line(tmp_path, cache, reference):
    """Full from update 7 to the end; then --resume writes the lines and the checkpoints."""
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tests" / "processes.py"), "full", "7", "99", *TWENTY]
    done = subprocess.run(
        [*command, "--run-dir", folder], env=environ(cache), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr
    step = list_steps(folder)[-1]
    assert step <= 1024 and f"the end is not saved; the checkpoint of step {step:,} is whole" in done.stdout
    assert not list(folder.glob("*.tmp"))
    assert list_steps(folder)[-1] <= 1024
    run("--resume", folder, cache=cache)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_timeless(folder / name) == read_timeless(reference / name)
    assert read(folder, 2560).host["sha256"] == read(reference, 2560).host["sha256"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]).returncode:
        pytest.skip("only root mounts a small disk")
    yield place
    gc.collect()
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: pathlib.Path) -> None:
    with open(place / "ballast", "wb", buffering=0) as file:
        for size in (2**16, 2**8, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


class Weather(Listener):
    """Calls one function at an update, and another one at a later update."""

    def __init__(self, spoil, update, repair, until):
        super().__init__(update, spoil)
        self.repair, self.until = repair, until

    def on_updates(self, metrics):
        super().on_updates(metrics)
        if metrics[-1]["update"] >= self.until and self.repair:
            repair, self.repair = self.repair, None
            repair()


@pytest.mark.slow
def test_a_small_disk_that_fills_and_empties(reference, small_disk):
    folder = small_disk / "run"
    hook = Weather(lambda: fill(small_disk), 3, lambda: (small_disk / "ballast").unlink(), 15)
    train(config_of(*TWENTY, "--run-dir", folder), [hook])
    saves = [text for text in hook.messages if "training goes on" in text]
    assert len(saves) == 1 and "No space left on device" in saves[0] and str(folder / "checkpoints") in saves[0]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_timeless(folder / name) == read_timeless(reference / name)
    assert read(folder, 2560).host["sha256"] == read(reference, 2560).host["sha256"]
    assert (folder / "evaluation.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_read_only_for_a_while(reference, small_disk):
    folder = small_disk / "run"

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)

    hook = Weather(lambda: remount("ro"), 5, lambda: remount("rw"), 15)
    train(config_of(*TWENTY, "--run-dir", folder), [hook])
    saves = [text for text in hook.messages if "training goes on" in text]
    assert len(saves) == 1 and "Read-only file system" in saves[0] and str(folder / "checkpoints") in saves[0]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert read_timeless(folder / name) == read_timeless(reference / name)
    assert read(folder, 2560).host["sha256"] == read(reference, 2560).host["sha256"]


def test_a_deleted_run_folder_stays_deleted(tmp_path):
    """The training goes on to its end with one warning, prints its table, and says that evaluation.json failed."""
    folder = tmp_path / "run"

    def lose():
        time.sleep(0.5)  # the save before is whole
        shutil.rmtree(folder)

    hook = Listener(9, lose)
    with pytest.raises(OSError, match=str(folder / "evaluation.json")):
        train(config_of(*TWENTY, "--run-dir", folder), [hook])
    saves = [text for text in hook.messages if "training goes on" in text]
    assert len(saves) == 1 and str(folder / "checkpoints") in saves[0]
    assert not folder.exists()


def test_a_closed_output_ends_no_run(reference, tmp_path, cache):
    """As `| head -1`."""
    folder = tmp_path / "run"
    process = start(*TWENTY, "--run-dir", folder, cache=cache)
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and not err
    assert read_timeless(folder / "metrics.jsonl") == read_timeless(reference / "metrics.jsonl")
    assert json.loads((folder / "evaluation.json").read_text())
