"""The training loop: compile once, run chunks of updates, pass their metrics to hooks, stop when asked."""

import itertools
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from perpjax import VecEnv
from train.hooks import Hook
from train.metrics import summarise
from train.state import TrainState

Update = Callable[[VecEnv, TrainState], tuple[TrainState, dict[str, Array]]]
"""One update of an algorithm, such as `PPO.update`: the next state, and scalar metrics."""


def compile_chunk(update: Update, envs: VecEnv, state: TrainState, length: int) -> Any:
    """Compile `length` updates ahead of time, as `(envs, state) -> (state, metrics [length])`. The state is donated."""

    def chunk(envs: VecEnv, state: TrainState) -> tuple[TrainState, dict[str, Array]]:
        return jax.lax.scan(lambda state, _: update(envs, state), state, length=length)

    return jax.jit(chunk, donate_argnums=1).lower(envs, state).compile()


def run_updates(
    update: Update,
    envs: VecEnv,
    state: TrainState,
    *,
    num_updates: int,
    chunk: int,
    steps_per_update: int,
    hooks: Sequence[Hook] = (),
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Run an algorithm up to update `num_updates`, or until `stop` says so.

    Args:
      update: of the algorithm.
      envs: the environments; `state.envs` are their states.
      state: where to begin. Its buffers are donated. `state.learner.update` counts the updates already done.
      num_updates: the last update.
      chunk: updates between two reports to the host; divides the number of updates to run.
      steps_per_update: environment steps of an update, over all environments.
      hooks: receive the metrics of every update, a chunk at a time.
      stop: asked before each chunk; True ends the training early.

    Raises:
      ValueError: a metric is not finite. The hooks have then seen all updates before.
    """
    run_chunk = compile_chunk(update, envs, state, chunk)
    began, first = time.monotonic(), int(state.learner.update)
    done = first
    while done < num_updates and not stop():
        state, stacked = run_chunk(envs, state)
        stacked = jax.tree.map(np.asarray, stacked)
        lines = []
        for i in range(chunk):
            done += 1
            line = summarise({name: x[i] for name, x in stacked.items()}, done, done * steps_per_update)
            seconds = time.monotonic() - began
            line["seconds"] = round(seconds, 3)
            line["steps_per_second"] = (done - first) * steps_per_update / seconds
            lines.append(line)
        finite = list(itertools.takewhile(_is_finite, lines))
        for hook in hooks if finite else ():
            hook.on_updates(finite)
        if len(finite) < chunk:
            raise ValueError(_describe_divergence(lines[len(finite)]))
    return state


def _is_finite(metrics: dict[str, Any]) -> bool:
    return all(np.isfinite(value) for value in metrics.values())


def _describe_divergence(metrics: dict[str, Any]) -> str:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    return (
        f"update {metrics['update']}: {', '.join(bad)} not finite; training has diverged, try a smaller learning_rate"
    )


class Interrupt:
    """A context in which the first Ctrl-C sets `wanted`, and a second one interrupts as usual."""

    wanted = False

    def __enter__(self) -> "Interrupt":
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)
