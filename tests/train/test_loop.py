"""The training loop and its hooks, with an algorithm that only counts."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from train.hooks.jsonl import JsonLines
from train.loop import run_updates


class Counter(NamedTuple):
    update: jax.Array


class State(NamedTuple):
    learner: Counter


def begin(update: int = 0) -> State:
    return State(Counter(jnp.int32(update)))


def count(envs: jax.Array, state: State) -> tuple[State, dict[str, jax.Array]]:
    """`level` is `envs` times the number of the update. With `envs` 3 it is infinite from update 5 on."""
    update = state.learner.update + 1
    level = jnp.where((envs == 3) & (update >= 5), jnp.inf, envs * update)
    metrics = {"level": level, "episodes": update % 2, "trades": jnp.float32(6)}
    return State(Counter(update)), metrics


class Recorder:
    """A hook that keeps what it is given."""

    def __init__(self):
        self.chunks = []

    def on_updates(self, metrics):
        self.chunks.append(metrics)

    @property
    def lines(self):
        return [line for chunk in self.chunks for line in chunk]


def run(envs: float = 2.0, begun: int = 0, **settings):
    hook = Recorder()
    settings = {"num_updates": 6, "chunk": 2, "steps_per_update": 10, "hooks": (hook,)} | settings
    return run_updates(count, jnp.float32(envs), begin(begun), **settings), hook


def test_hooks_see_every_update_once_and_in_order():
    state, hook = run()
    assert int(state.learner.update) == 6 and [len(c) for c in hook.chunks] == [2, 2, 2]
    assert [line["update"] for line in hook.lines] == [1, 2, 3, 4, 5, 6]
    assert [line["steps"] for line in hook.lines] == [10, 20, 30, 40, 50, 60]
    assert [line["level"] for line in hook.lines] == [2, 4, 6, 8, 10, 12]
    # Sums over episodes become means, and are absent without an episode.
    assert [line.get("trades") for line in hook.lines] == [6, None] * 3
    seconds = [line["seconds"] for line in hook.lines]
    assert seconds == sorted(seconds) and all(line["steps_per_second"] > 0 for line in hook.lines)


def test_it_stops_between_chunks_when_asked():
    answers = iter([False, True])
    state, hook = run(stop=lambda: next(answers))
    assert int(state.learner.update) == 2 and len(hook.lines) == 2


def test_it_goes_on_from_the_updates_of_the_state():
    state, hook = run(begun=4)
    assert int(state.learner.update) == 6
    assert [(line["update"], line["steps"]) for line in hook.lines] == [(5, 50), (6, 60)]


def test_a_divergence_is_told_after_the_finite_updates():
    hook = Recorder()
    with pytest.raises(ValueError, match=r"update 5: level not finite; training has diverged"):
        run(3.0, chunk=3, hooks=(hook,))
    assert [line["update"] for line in hook.lines] == [1, 2, 3, 4]


def test_json_lines_are_written_at_once_and_appended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with JsonLines(path) as log:
            log.on_updates([{"update": 1}, {"update": 2, "x": 0.5}])
            written = [json.loads(line) for line in path.read_text().splitlines()]
            assert written[-2:] == [{"update": 1}, {"update": 2, "x": 0.5}]
    assert len(path.read_text().splitlines()) == 4
