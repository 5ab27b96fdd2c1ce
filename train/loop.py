"""The training loop: chunks of updates, their metrics to hooks, evaluations and checkpoints in between."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from perpjax import VecEnv
from perpjax.rollout import as_pytree
from train.checkpoint import CheckpointError, Checkpoints, Snapshot, flatten
from train.hooks import Hook
from train.metrics import summarise
from train.state import Learner, TrainState

Update = Callable[[VecEnv, TrainState], tuple[TrainState, dict[str, Array]]]
"""One update of an algorithm, such as `PPO.update`: the next state, and scalar metrics."""
Look = Callable[[Learner], dict[str, Any]]
"""One evaluation of the greedy policy: means over windows, see `Hook.on_evaluation`."""
CHUNK_SECONDS = 1.0
"""A chunk of updates lasts about so long. A signal is answered after it."""
LONGEST_UPDATE = 5.0
"""An update that takes longer, in seconds, is worth a message."""


@dataclasses.dataclass
class Progress:
    """The counters of a run on the host, which a checkpoint keeps.

    Attributes:
      update: updates done.
      steps: environment steps done, over all environments.
      seconds: spent in updates, over all sessions.
      best: the evaluation of the best policy so far, or None.
    """

    update: int = 0
    steps: int = 0
    seconds: float = 0.0
    best: dict[str, Any] | None = None


@dataclasses.dataclass
class Schedule:
    """The moments of a run, in updates.

    Attributes:
      num_updates: the last update.
      steps_per_update: environment steps of an update, over all environments.
      most: most updates of a chunk; the compiled program has room for the metrics of so many.
      evaluate_every: updates between two evaluations; 0 for none. The last update has one in any case.
      checkpoint_every: updates between two checkpoints; 0 for one every `checkpoint_seconds`.
      checkpoint_seconds: see there. The end of the training has a checkpoint in any case.
    """

    num_updates: int
    steps_per_update: int
    most: int
    evaluate_every: int = 0
    checkpoint_every: int = 0
    checkpoint_seconds: float = 300.0

    def next_stop(self, update: int) -> int:
        """Return the update after which the host has something to do."""
        intervals = (every for every in (self.evaluate_every, self.checkpoint_every) if every)
        return min([self.num_updates, update + self.most, *(update - update % every + every for every in intervals)])

    def is_due(self, update: int, every: int) -> bool:
        """Return whether something that is done every so many updates is due after this one."""
        return bool(every) and (update % every == 0 or update == self.num_updates)


def compile_chunk(update: Update, envs: VecEnv, state: TrainState, most: int) -> functools.partial:
    """Compile `(envs, state, n) -> (state, metrics [most])`, n updates of which the first n metrics count.

    Args:
      update: a pytree, whose leaves become operands of the program, or a plain function.
      state: arrays or `jax.ShapeDtypeStruct`. The program takes its buffers over (donation).
      most: the largest n. The program is the same for every n, and so are its numbers.
    """
    update, _ = as_pytree(update)
    call = jax.jit(lambda update, *args: update(*args), inline=True)  # traced once, for both uses below

    def chunk(update: Update, envs: VecEnv, state: TrainState, n: Array) -> tuple[TrainState, dict[str, Array]]:
        forms = jax.eval_shape(call, update, envs, state)[1]
        room = jax.tree.map(lambda form: jnp.zeros((most, *form.shape), form.dtype), forms)

        def step(i: Array, carry: tuple) -> tuple:
            state, metrics = call(update, envs, carry[0])
            return state, jax.tree.map(lambda all, x: all.at[i].set(x), carry[1], metrics)

        return jax.lax.fori_loop(0, n, step, (state, room))

    compiled = jax.jit(chunk, donate_argnums=2).lower(update, envs, state, jnp.int32(0)).compile()
    return functools.partial(compiled, update)


def run_updates(
    run_chunk: Callable[..., tuple[TrainState, dict[str, Array]]],
    envs: VecEnv,
    state: TrainState,
    progress: Progress,
    schedule: Schedule,
    *,
    hooks: Hook,
    look: Look | None = None,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], bool] = lambda: False,
    started: Callable[[], None] = lambda: None,
) -> TrainState:
    """Run an algorithm up to the last update, or until `stop` says so.

    Args:
      run_chunk: of `compile_chunk`. The buffers of `state` are donated.
      envs: the environments; `state.envs` are their states.
      state: where to begin.
      progress: where to begin; it is kept up to date.
      schedule: the moments at which the host does something.
      hooks: receive everything.
      look: evaluates the policy at the moments of the schedule, and for `progress.best`.
      checkpoints: saved at the moments of the schedule, at each new best and at the end. A save that fails is a
        message, and is tried again at the next moment.
      stop: asked before each chunk; True ends the training early.
      started: called after the first chunk.

    Raises:
      ValueError: a metric is not finite. The hooks have then seen all updates before.
    """
    saved, pace = time.monotonic(), 0.0
    first_steps, first_seconds = progress.steps, progress.seconds
    warned_after: int | None = -1  # the newest whole checkpoint at the last warning; None for none

    def save() -> None:
        nonlocal saved
        if checkpoints is None:
            return
        saved = time.monotonic()
        try:
            checkpoints.best = progress.best["steps"] if progress.best else None
            checkpoints.save(progress.steps, take_snapshot(state, progress, hooks))
        except CheckpointError as error:
            complain(error)

    def complain(error: CheckpointError) -> None:
        nonlocal warned_after
        if warned_after != checkpoints.last:
            hooks.on_message(f"{error}; training goes on and tries again at the next checkpoint")
        warned_after = checkpoints.last

    while progress.update < schedule.num_updates and not stop():
        began = time.monotonic()
        n = max(1, int(CHUNK_SECONDS / pace)) if pace else 1
        n = min(n, schedule.next_stop(progress.update) - progress.update)
        state, stacked = run_chunk(envs, state, jnp.int32(n))
        stacked = jax.tree.map(np.asarray, stacked)
        took = time.monotonic() - began
        pace = took / n
        lines = []
        for i in range(n):
            progress.update += 1
            progress.steps += schedule.steps_per_update
            progress.seconds += pace
            line = summarise({name: x[i] for name, x in stacked.items()}, progress.update, progress.steps)
            line["seconds"] = round(progress.seconds, 3)
            line["steps_per_second"] = (progress.steps - first_steps) / (progress.seconds - first_seconds)
            lines.append(line)
        finite = list(itertools.takewhile(_is_finite, lines))
        if finite:
            hooks.on_updates(finite)
        if len(finite) < n:
            raise ValueError(_describe_divergence(lines[len(finite)]))
        if progress.steps == first_steps + n * schedule.steps_per_update:
            started()
            if pace > LONGEST_UPDATE:
                hooks.on_message(f"warning: an update takes {pace:.0f} s; a signal is answered only after it")

        is_best = False
        if look is not None and schedule.is_due(progress.update, schedule.evaluate_every):
            evaluation = {"update": progress.update, "steps": progress.steps} | look(state.learner)
            is_best = progress.best is None or evaluation["closed_return"] > progress.best["closed_return"]
            if is_best:
                progress.best = evaluation
            hooks.on_evaluation(evaluation | {"best": is_best})
        due = schedule.is_due(progress.update, schedule.checkpoint_every)
        if not schedule.checkpoint_every:
            due = time.monotonic() - saved >= schedule.checkpoint_seconds
        if due or is_best:
            save()
        elif checkpoints is not None:
            try:
                checkpoints.check()
            except CheckpointError as error:
                complain(error)
    if progress.steps > first_steps:
        save()
    return state


def take_snapshot(state: TrainState, progress: Progress, hooks: Hook) -> Snapshot:
    """Copy everything that a resumed run needs to the host."""
    host = {"progress": dataclasses.asdict(progress), "hooks": hooks.get_state()}
    return Snapshot(flatten(state.learner), flatten(state._replace(learner=())), host)


def _is_finite(metrics: dict[str, Any]) -> bool:
    return all(np.isfinite(value) for value in metrics.values())


def _describe_divergence(metrics: dict[str, Any]) -> str:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    return (
        f"update {metrics['update']}: {', '.join(bad)} not finite; training has diverged, try a smaller learning_rate"
    )
