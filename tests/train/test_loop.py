"""The training loop, its moments and its hooks, with an algorithm that only counts."""

import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from train import loop
from train.checkpoint import CheckpointError
from train.hooks import Hook, RunInfo
from train.hooks.jsonl import EVALUATIONS, METRICS, JsonLines
from train.loop import Progress, Schedule, compile_chunk, run_updates


class Counter(NamedTuple):
    update: jax.Array


class State(NamedTuple):
    learner: Counter


def count(envs: jax.Array, state: State) -> tuple[State, dict[str, jax.Array]]:
    """`level` is `envs` times the number of the update. With `envs` 3 it is infinite from update 5 on."""
    update = state.learner.update + 1
    level = jnp.where((envs == 3) & (update >= 5), jnp.inf, envs * update)
    metrics = {"level": level, "episodes": update % 2, "trades": jnp.float32(6)}
    return State(Counter(update)), metrics


class Recorder(Hook):
    """Keeps all that it is given, in order."""

    def __init__(self):
        self.chunks, self.evaluations, self.messages = [], [], []

    def on_updates(self, metrics):
        self.chunks.append(metrics)

    def on_evaluation(self, evaluation):
        self.evaluations.append(evaluation)

    def on_message(self, text):
        self.messages.append(text)

    @property
    def lines(self):
        return [line for chunk in self.chunks for line in chunk]


class Saves:
    """Stands for `Checkpoints`: keeps the steps and the best, and fails where it is told to."""

    def __init__(self, fails: tuple[int, ...] = (), fails_late: tuple[int, ...] = ()):
        self.fails, self.fails_late, self.saved, self.best, self.last = fails, fails_late, [], None, None
        self.pending = None

    def save(self, step, snapshot):
        if step == self.last:
            return
        assert snapshot.host["progress"]["steps"] == step
        assert int(snapshot.learner[".update"]) * 10 == step
        if step in self.fails:
            raise CheckpointError(f"{step}: cannot be written")
        self.pending = step
        if step not in self.fails_late:
            self.saved.append((step, self.best))
            self.last = step

    def check(self):
        if self.pending in self.fails_late:
            step, self.pending = self.pending, None
            raise CheckpointError(f"{step}: cannot be written")


def run(envs: float = 2.0, done: int = 0, hook: Recorder | None = None, run_chunk=None, **settings):
    hook, state, progress = hook or Recorder(), State(Counter(jnp.int32(done))), Progress(done, 10 * done)
    plan = {name: settings.pop(name) for name in list(settings) if name in Schedule.__dataclass_fields__}
    schedule = Schedule(**{"num_updates": 6, "steps_per_update": 10, "most": 2} | plan)
    run_chunk = run_chunk or compile_chunk(count, jnp.float32(envs), state, schedule.most)
    state = run_updates(run_chunk, jnp.float32(envs), state, progress, schedule, hooks=hook, **settings)
    assert int(state.learner.update) == progress.update
    return progress, hook


def test_hooks_see_every_update_once_and_in_order():
    progress, hook = run()
    assert progress.update == 6 and progress.steps == 60
    # The first chunk, whose pace is not known yet, is one update.
    assert [len(c) for c in hook.chunks] == [1, 2, 2, 1]
    assert [line["update"] for line in hook.lines] == [1, 2, 3, 4, 5, 6]
    assert [line["steps"] for line in hook.lines] == [10, 20, 30, 40, 50, 60]
    assert [line["level"] for line in hook.lines] == [2, 4, 6, 8, 10, 12]
    # Sums over episodes become means, and are absent without an episode.
    assert [line.get("trades") for line in hook.lines] == [6, None] * 3
    seconds = [line["seconds"] for line in hook.lines]
    assert seconds == sorted(seconds) and all(line["steps_per_second"] > 0 for line in hook.lines)


@pytest.mark.parametrize("most", [1, 3, 5, 64])
def test_the_size_of_a_chunk_changes_no_number(most):
    _, hook = run(most=most, num_updates=7)
    assert [line["level"] for line in hook.lines] == [2, 4, 6, 8, 10, 12, 14]
    assert max(map(len, hook.chunks)) <= most


def test_a_chunk_lasts_about_a_second(monkeypatch):
    """Of updates of 0.3 seconds there are three."""
    now = [0.0]
    program = compile_chunk(count, jnp.float32(2), State(Counter(jnp.int32(0))), 64)

    def slow(envs, state, n):
        now[0] += 0.3 * int(n)
        return program(envs, state, n)

    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    _, hook = run(run_chunk=slow, num_updates=12, most=64)
    assert [len(c) for c in hook.chunks] == [1, 3, 3, 3, 2]
    assert [line["seconds"] for line in hook.lines] == pytest.approx([0.3 * i for i in range(1, 13)])
    assert hook.lines[-1]["steps_per_second"] == pytest.approx(10 / 0.3)


def test_it_stops_between_chunks_when_asked():
    answers, saves = iter([False, False, True]), Saves()
    progress, hook = run(stop=lambda: next(answers), checkpoints=saves)
    assert progress.update == 3 and len(hook.lines) == 3 and saves.saved == [(30, None)]
    # Before the first chunk it saves nothing.
    progress, hook = run(stop=lambda: True, checkpoints=(saves := Saves()))
    assert progress.update == 0 and not hook.lines and not saves.saved


def test_it_goes_on_from_the_updates_of_the_progress():
    progress, hook = run(done=4)
    assert [(line["update"], line["steps"]) for line in hook.lines] == [(5, 50), (6, 60)]
    # The speed is that of this session.
    assert hook.lines[0]["steps_per_second"] == pytest.approx(10 / progress.seconds, rel=1) and progress.seconds > 0
    assert run(done=6)[1].lines == []


def test_a_divergence_is_told_after_the_finite_updates():
    hook, saves = Recorder(), Saves()
    with pytest.raises(ValueError, match=r"update 5: level not finite; training has diverged"):
        run(3.0, most=3, hook=hook, checkpoints=saves, checkpoint_every=2)
    assert [line["update"] for line in hook.lines] == [1, 2, 3, 4]
    assert [step for step, _ in saves.saved] == [20, 40]


# Evaluations and checkpoints.


def looks(*returns: float):
    answers = iter(returns)
    return lambda learner: {"closed_return": next(answers)}


def test_evaluations_at_their_moments_and_at_the_end():
    """A best is one that is larger, not equal; it is saved at once."""
    saves = Saves()
    progress, hook = run(look=looks(0.5, 0.5, 0.7, 0.1), evaluate_every=2, num_updates=7, most=64, checkpoints=saves)
    assert [(e["update"], e["steps"], e["best"]) for e in hook.evaluations] == [
        (2, 20, True), (4, 40, False), (6, 60, True), (7, 70, False),
    ]  # fmt: skip
    assert progress.best == {"update": 6, "steps": 60, "closed_return": 0.7}
    assert saves.saved == [(20, 20), (60, 60), (70, 60)]


def test_without_evaluations_there_is_no_best():
    progress, hook = run(look=looks(), evaluate_every=0, checkpoints=(saves := Saves()))
    assert progress.best is None and not hook.evaluations and saves.saved == [(60, None)]


def test_checkpoints_at_their_moments_and_at_the_end():
    assert [step for step, _ in _saved(checkpoint_every=2, num_updates=5)] == [20, 40, 50]
    # The moments do not depend on where the run went on.
    assert [step for step, _ in _saved(checkpoint_every=2, num_updates=5, done=1)] == [20, 40, 50]
    assert [step for step, _ in _saved(checkpoint_every=0, checkpoint_seconds=0.0)] == [10, 30, 50, 60]
    assert [step for step, _ in _saved(checkpoint_every=0)] == [60]


def _saved(**settings):
    run(checkpoints=(saves := Saves()), **settings)
    return saves.saved


@pytest.mark.parametrize("kind", ["fails", "fails_late"])
def test_a_failed_save_is_one_warning_and_is_tried_again(kind):
    """A second warning comes only after a whole checkpoint."""
    saves = Saves(**{kind: (20, 40, 80)})
    progress, hook = run(checkpoints=saves, checkpoint_every=2, num_updates=12, most=1)
    assert progress.update == 12 and len(hook.lines) == 12
    assert [step for step, _ in saves.saved] == [60, 100, 120]
    end = "cannot be written; training goes on and tries again at the next checkpoint"
    assert hook.messages == [f"20: {end}", f"80: {end}"]


def test_a_late_failure_is_noticed_at_the_next_chunk():
    seen, saves = [], Saves(fails_late=(20,))

    class Notes(Recorder):
        def on_message(self, text):
            seen.append((self.lines[-1]["update"], text))

    run(checkpoints=saves, checkpoint_every=2, num_updates=4, most=1, hook=Notes())
    assert [update for update, _ in seen] == [3]


# JSON lines.


def info(folder: pathlib.Path, update: int = 0) -> RunInfo:
    return RunInfo(folder, "data", "MLP", "cpu", 1, 100, update, 10 * update, 1.0)


def opened(folder: pathlib.Path, update: int = 0, state: dict | None = None) -> tuple[JsonLines, list[str]]:
    said = []
    hook = JsonLines(said.append)
    if state is not None:
        hook.set_state(state)
    hook.on_start(info(folder, update))
    return hook, said


def updates(path: pathlib.Path) -> list[int]:
    return [json.loads(line)["update"] for line in path.read_text().splitlines()]


def test_json_lines_are_written_at_once_and_cut_at_the_checkpoint(tmp_path):
    hook, said = opened(tmp_path)
    hook.on_updates([{"update": 1}, {"update": 2, "x": 0.5}])
    assert (tmp_path / METRICS).read_text() == '{"update": 1}\n{"update": 2, "x": 0.5}\n'
    hook.on_evaluation({"update": 2, "best": True})
    hook.on_updates([{"update": 3}])
    assert (tmp_path / EVALUATIONS).read_text() == '{"update": 2, "best": true}\n'
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"update": 4')
    for update, kept in ((3, [1, 2, 3]), (2, [1, 2]), (0, [])):
        opened(tmp_path, update)
        assert updates(tmp_path / METRICS) == kept and updates(tmp_path / EVALUATIONS) == [2] * (update >= 2)
    assert not said and hook.get_state() == {}


def lose(folder: pathlib.Path, monkeypatch) -> None:
    """The folder takes half a line of every write, and then no more."""

    class Full:
        def __init__(self, path, mode, buffering):
            self.file = real(path, mode, buffering=0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    real = open
    monkeypatch.setattr("train.hooks.jsonl.open", Full, raising=False)


def test_lines_that_a_full_disk_refuses_wait(tmp_path, monkeypatch):
    hook, said = opened(tmp_path)
    hook.on_updates([{"update": 1}])
    with monkeypatch.context() as patch:
        lose(tmp_path, patch)
        for update in (2, 3, 4):
            hook.on_updates([{"update": update}])
    assert said == [f"{tmp_path / METRICS}: cannot be written: No space left on device; its lines wait in memory"]
    kept = hook.get_state()
    assert list(kept) == [METRICS] and (tmp_path / METRICS).read_text() != '{"update": 1}\n'
    # A run that is killed now and goes on after update 4 has them from the checkpoint.
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / METRICS).write_bytes((tmp_path / METRICS).read_bytes())
    opened(tmp_path / "killed", 4, json.loads(json.dumps(kept)))
    assert updates(tmp_path / "killed" / METRICS) == [1, 2, 3, 4]
    # One that goes on from an older state which has been written since has them once.
    opened(tmp_path / "killed", 4, kept)
    assert updates(tmp_path / "killed" / METRICS) == [1, 2, 3, 4]
    # The disk has room again: with the next line, or at the end.
    hook.on_end("")
    assert updates(tmp_path / METRICS) == [1, 2, 3, 4] and hook.get_state() == {}
    hook.on_updates([{"update": 5}])
    assert updates(tmp_path / METRICS) == [1, 2, 3, 4, 5] and len(said) == 1
