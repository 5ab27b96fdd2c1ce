"""One run of PPO: load a dataset, compile, train, evaluate, and keep everything in the run folder."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from perpjax import AutoReset, PerpEnv, VecEnv
from perpjax.data.seeds import seed_key
from train import checkpoint
from train.checkpoint import Checkpoints, write_json
from train.evaluate import Result, Windows, choose, t_statistic
from train.hooks import Hook, RunInfo
from train.hooks.broadcast import Broadcast
from train.hooks.display import Display
from train.hooks.jsonl import JsonLines
from train.hooks.tensorboard import TensorBoard
from train.hooks.warner import Warner
from train.loop import Progress, compile_chunk, run_updates
from train.memory import check_fit, count_bytes, program_bytes
from train.policies import describe_policy, make_policy, single_carry
from train.ppo.algorithm import PPO
from train.ppo.config import Config
from train.ppo.environment import make_env
from train.ppo.judge import evaluate_policy
from train.ppo.load import check_features, choose_step, load_policy, make_run_policy, read_learner
from train.record import (
    create_folder,
    describe_dataset,
    describe_device,
    describe_session,
    locate_dataset,
    point_latest,
    remove_unused,
    write_config,
)  # fmt: skip
from train.run_folder import CLOSING, Run, find_run
from train.state import Learner, TrainState
from train.stopping import Interrupted, InThread, Stopper
from train.table import make_table

EVALUATION_SEED = 1_000_003
"""The validation windows are fixed; this seeds only the random policy on them."""
LOOK_WINDOWS = 64
"""An evaluation in the loop plays so many windows at most, evenly spaced."""


def train(config: Config, hooks: Sequence[Hook] = ()) -> Run:
    """Train from a dataset to a run folder and a table, and return the run.

    The folder holds config.json, metrics.jsonl, evaluations.jsonl, evaluation.json and checkpoints. A first Ctrl-C,
    SIGTERM or SIGHUP saves and ends the run; `resume` goes on from there.

    Args:
      config: the settings.
      hooks: of your own, beside the display, the JSON lines and the warnings.

    Raises:
      ValueError: the folder is taken, the dataset does not fit, or the training diverged.
      OSError: the run folder cannot be written.
      Interrupted: a signal ended the run.
    """
    return _Session(config, hooks).run()


def resume(run: str | pathlib.Path, total_steps: int | None = None, hooks: Sequence[Hook] = ()) -> Run:
    """Go on with a run from its newest whole checkpoint, bit by bit as if it had never stopped.

    Args:
      run: its folder, its name in `runs/`, or "latest".
      total_steps: a new end of the run. The learning rate is then that of a run of so many steps.
      hooks: as in `train`; each gets back its state.

    Raises:
      As `train`. ValueError: there is no whole checkpoint, or nothing is left to do.
    """
    folder = find_run(run)
    config = Config.from_json(Run(folder).settings())
    if total_steps is not None:
        config = dataclasses.replace(config, total_steps=total_steps)
    return continue_run(config, folder, hooks)


def continue_run(config: Config, folder: str | pathlib.Path, hooks: Sequence[Hook] = ()) -> Run:
    """`resume` with settings that may differ from those of the folder's config.json."""
    return _Session(config, hooks, pathlib.Path(folder)).run()


class _Resumed(NamedTuple):
    """A checkpoint to go on from."""

    state: TrainState
    hooks: dict[str, Any]


class _Session:
    """One process's part of a run: `train` has the first, each `resume` another one."""

    def __init__(self, config: Config, hooks: Sequence[Hook], resumed: pathlib.Path | None = None):
        self.config, self.folder, self.is_new = config, resumed, resumed is None
        self.ppo, self.stopper, self.progress = make_ppo(config), Stopper(), Progress()
        self.display = Display()
        own = [JsonLines(self.display.on_message), self.display, Warner(self.display.on_message)]
        if config.tensorboard:
            own.append(TensorBoard())
        self.hooks = Broadcast([*own, *hooks])
        self.messages: list[str] = []
        self._lock, self._is_left = threading.Lock(), False
        self._saved: int | None = None

    def run(self) -> Run:
        """Train in a thread that signals can interrupt; see `train`."""
        try:
            with self.display:
                self.stopper.run(self._train)
        except BaseException as error:
            with self._lock:
                self._is_left = True
                if self.is_new and self.folder is not None:
                    remove_unused(self.folder)
            if isinstance(error, Interrupted):
                self.hooks.on_end(str(error))
            raise
        if self.stopper.wanted is not None:
            steps = f"{self.progress.steps:,} of {self.config.total_steps:,} steps"
            text = f"stopped after {steps}; {self.stopper.describe()}"
            self.hooks.on_end(f"{text}\ngo on: python -m train.ppo --resume {shlex.quote(str(self.folder))}")
            raise Interrupted(self.stopper.wanted, text)
        return Run(self.folder)

    def _train(self) -> None:
        config, hooks = self.config, self.hooks
        hooks.on_stage(f"loading {config.dataset}")
        dataset = config.dataset if self.is_new else locate_dataset(Run(self.folder).config())
        train_env, validation_env = (make_env(config, split, dataset) for split in ("train", "val"))
        envs = VecEnv(AutoReset(train_env))
        forms = jax.eval_shape(self.ppo.init, envs, jax.random.key(0))
        check_fit(_lower_bound(config, forms), "at least, before anything is compiled", config.num_envs)
        resumed = None if self.is_new else self._read(forms)
        origin = None if config.init_from is None or resumed else self._read_origin(train_env)
        self._record({"train": train_env.market, "val": validation_env.market}, resumed)
        with self._unless_left():
            if resumed:
                hooks.set_state(resumed.hooks)
            hooks.on_start(describe_run(config, config.dataset, self.folder, self.progress))
        for text in self.messages:
            hooks.on_message(text)

        is_to_learn = self.progress.update < config.num_updates
        if is_to_learn:
            hooks.on_stage("compiling")
            # The largest program begins first, in a thread. The first state needs a program, too.
            program = InThread(lambda: compile_chunk(Partial(PPO.update, self.ppo), envs, forms, config.schedule.most))
        state = resumed.state if resumed else _begin(self.ppo, envs, origin)
        if is_to_learn:
            state = self._learn(envs, validation_env, state, program)
        if self.stopper.wanted is None:
            self.stopper.patient = False  # everything is saved: a signal may leave the rest behind
            hooks.on_stage("evaluating")
            report = InThread(lambda: self._judge(validation_env) if config.report else "")
            try:
                self._compare(validation_env, state.learner)
                if config.report:
                    hooks.on_stage("replaying every lot")
            finally:
                report.done.wait()  # no thread is left in XLA
            hooks.on_end(report() + self._last_words())

    def _learn(self, envs: VecEnv, validation: PerpEnv, state: TrainState, program: InThread) -> TrainState:
        """Run the updates up to the end or a signal; everything is saved afterwards.

        Args:
          program: compiles them.
        """
        config, hooks = self.config, self.hooks
        windows = Windows.of(validation, jax.random.key(EVALUATION_SEED), most=LOOK_WINDOWS)
        run_chunk = program()
        check_fit(program_bytes(run_chunk.func), "the compiled program", config.num_envs)
        # The evaluation compiles beside the first update, not before it.
        first = jax.tree.map(np.array, state.learner)  # the updates take the buffers over
        is_ready = InThread(lambda: self._look(windows, first) if config.schedule.evaluate_every else None)

        def look(learner: Learner) -> dict[str, Any]:
            is_ready()
            return self._look(windows, learner)

        hooks.on_stage("training")
        checkpoints = Checkpoints(self.folder)
        checkpoints.last = self._saved
        self.stopper.describe = checkpoints.describe
        try:
            return run_updates(
                run_chunk,
                envs,
                state,
                self.progress,
                config.schedule,
                hooks=hooks,
                look=look,
                checkpoints=checkpoints,
                stop=lambda: self.stopper.wanted is not None,
                started=self._on_first_chunk,
            )
        finally:
            is_ready.done.wait()  # no thread is left in XLA
            try:
                checkpoints.close()
            except checkpoint.CheckpointError as error:
                hooks.on_message(str(error))
            self._saved = checkpoints.last

    def _on_first_chunk(self) -> None:
        self.stopper.patient = True  # a signal now waits for the save
        point_latest(self.folder)

    @contextlib.contextmanager
    def _unless_left(self) -> Iterator[None]:
        """Touch the run folder: not while a signal removes it, and not afterwards."""
        with self._lock:
            if self._is_left:
                raise RuntimeError("a signal has ended this run")
            yield

    def _read_origin(self, env: PerpEnv) -> Learner:
        """Parameters and statistics of the run of `init_from`."""
        folder, policy = find_run(self.config.init_from), self.ppo.policy
        record = Run(folder).config()
        check_features(record["dataset"], env.market.feature_names, self.config.dataset)
        # Numbers of the environment may differ, and so may the type of the products: the parameters are the same.
        changes = {"params": self.config.params, "compute_dtype": self.config.compute_dtype}
        other = make_run_policy(dataclasses.replace(Config.from_json(record["settings"]), **changes), folder)
        if other != policy:
            raise ValueError(
                f"init_from {folder} has the network {describe_policy(other)}, and this run {describe_policy(policy)}"
            )
        return read_learner(folder, choose_step(folder, "best"), policy)

    def _read(self, forms: TrainState) -> _Resumed:
        """The newest whole checkpoint. Newer, damaged ones are removed by the next save."""
        config, skipped = self.config, []
        for step, snapshot in checkpoint.read_newest(self.folder):
            try:
                if isinstance(snapshot, ValueError):
                    raise snapshot
                state, progress = _restore(snapshot, forms, self.folder / checkpoint.FOLDER / str(step))
            except ValueError as error:
                skipped.append(str(error))
                continue
            self.messages += [f"{text}; the one of step {step} is used" for text in skipped]
            if progress.update > config.num_updates:
                raise ValueError(
                    f"total_steps is {config.total_steps:,}, and {self.folder} has done {progress.steps:,}; "
                    f"--total-steps with a larger number goes on"
                )
            if progress.update == config.num_updates and self._is_evaluated(progress.steps):
                raise ValueError(
                    f"{self.folder} has ended: {progress.steps:,} of {config.total_steps:,} steps are done; "
                    f"--total-steps with a larger number goes on"
                )
            self.progress, self._saved = progress, step
            return _Resumed(state, snapshot.host["hooks"])
        raise ValueError(
            skipped[0] if skipped else f"{self.folder}: no checkpoint here: the run was ended before its first one"
        )

    def _record(self, markets: dict[str, Any], resumed: _Resumed | None) -> None:
        """Make the folder of a new run, check that of an old one, and write config.json."""
        config = self.config
        dataset = describe_dataset(config.dataset, markets)
        record = {"settings": config.to_json(), "dataset": dataset, "policy": describe_policy(self.ppo.policy)}
        if resumed:
            before = Run(self.folder).config()
            if before["dataset"]["train"] != dataset["train"]:
                raise ValueError(
                    f"the training split of {config.dataset} has changed since {self.folder} began; "
                    f"--init-from {self.folder} begins a new run with its policy"
                )
            if before["dataset"]["val"] != dataset["val"]:
                self.messages.append(f"warning: the validation split of {config.dataset} has changed since then")
            record["dataset"] = before["dataset"] | {"val": dataset["val"]}
            old = Config.from_json(before["settings"])
            if old.total_steps != config.total_steps:
                self.messages.append(_describe_rate(old, config, self.progress.update))
            record = before | record
        session = describe_session(self.progress.steps)
        with self._unless_left():
            if not resumed:
                self.folder = create_folder(config.run_dir, _name(config))
            write_config(self.folder, record, session)

    def _is_evaluated(self, steps: int) -> bool:
        """Whether evaluation.json is that of the policy after so many steps. A longer run has an old one, too."""
        try:
            return json.loads((self.folder / CLOSING).read_text())["policies"]["final"]["step"] == steps
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _look(self, windows: Windows, learner: Learner) -> dict[str, Any]:
        policy = self.ppo.policy
        result = windows.play(choose("greedy", windows.env, learner, policy), single_carry(policy))
        return {"windows": len(windows.starts)} | result.means()

    def _compare(self, env: PerpEnv, learner: Learner) -> None:
        """Play best, final, `flat` and `random` on all validation windows; write evaluation.json and the table."""
        config, policy = self.config, self.ppo.policy
        windows = Windows.of(env, jax.random.key(EVALUATION_SEED))
        learnt = {"final": (self.progress.steps, learner)}
        if self.progress.best is not None:
            step = self.progress.best["steps"]
            try:
                learnt = {"best": (step, read_learner(self.folder, step, policy))} | learnt
            except ValueError as error:
                self.hooks.on_message(str(error))
        plan = {name: ("greedy", of_step) for name, (_, of_step) in learnt.items()}
        plan |= {name: (name, learner) for name in ("flat", "random")}
        results = {
            name: windows.play(choose(choice, env, of_step, policy), single_carry(policy))
            for name, (choice, of_step) in plan.items()
        }
        policies = {name: {"step": learnt[name][0]} if name in learnt else {} for name in results}
        policies = {name: policies[name] | _describe_result(result) for name, result in results.items()}
        bars = config.env.episode_length
        title = f"Validation split of {config.dataset}: mean of {len(windows.starts)} x {bars} bars"
        self.display.show(make_table(results, title))
        write_json(
            self.folder / CLOSING,
            {"split": "val", "windows": len(windows.starts), "bars": bars, "policies": policies},
        )

    def _judge(self, env: PerpEnv) -> str:
        """Evaluate the best policy on validation, every lot of it; return the verdict. A failure is no end of a run."""
        which = "final" if self.progress.best is None else "best"
        folder = self.folder / "evaluation-val"
        try:
            evaluation = evaluate_policy(load_policy(self.folder, which), "val", which, env=env, quick=True)
            evaluation.save(folder)
        except (ValueError, OSError) as error:
            return f"no evaluation: {error}\n"
        sentences = "\n".join(evaluation.record["verdict"])
        more = f"more of it: perpjax evaluate {shlex.quote(str(self.folder))}"
        return f"{sentences}\nreport: {folder / 'report.html'}\n{more}\n"

    def _last_words(self) -> str:
        if self._saved != self.progress.steps:
            resume = f"python -m train.ppo --resume {shlex.quote(str(self.folder))}"
            return f"the end is not saved; {self.stopper.describe()}\ngo on: {resume}"
        return (
            f"saved to {self.folder}\n"
            f"look: python -m train.runs show {self.folder}\n"
            f'load: from train import load_policy; policy = load_policy("{self.folder}")'
        )


def make_ppo(config: Config) -> PPO:
    """Return the algorithm with the configured policy."""
    return PPO(config, make_policy(config))


def describe_run(config: Config, dataset: str, folder: pathlib.Path, progress: Progress | None = None) -> RunInfo:
    """Return the facts that hooks show."""
    progress = progress or Progress()
    return RunInfo(
        folder=folder,
        dataset=dataset,
        policy=describe_policy(make_policy(config)),
        device=describe_device(),
        num_envs=config.num_envs,
        total_steps=config.num_updates * config.steps_per_update,
        first_update=progress.update,
        first_step=progress.steps,
        initial_equity=float(config.params.initial_equity),
    )


def init_state(ppo: PPO, envs: VecEnv) -> TrainState:
    """Return a fresh state, drawn from the configured seed."""
    return jax.jit(ppo.init)(envs, seed_key(ppo.config.seed))


def learn(
    ppo: PPO, envs: VecEnv, state: TrainState, hooks: Sequence[Hook] = (), stop: Callable[[], bool] = lambda: False
) -> TrainState:
    """Run all configured updates in memory, without a run folder; see `run_updates`."""
    schedule = dataclasses.replace(ppo.config.schedule, evaluate_every=0, checkpoint_every=0)
    run_chunk = compile_chunk(Partial(PPO.update, ppo), envs, state, schedule.most)
    update = int(state.learner.update)
    progress = Progress(update, update * schedule.steps_per_update)
    return run_updates(run_chunk, envs, state, progress, schedule, hooks=Broadcast(hooks), stop=stop)


def _begin(ppo: PPO, envs: VecEnv, start: Learner | None) -> TrainState:
    """A fresh state, or one with the parameters and statistics of another run's learner."""
    state = init_state(ppo, envs)
    if start is None:
        return state
    learnt = {"params": start.params, "observations": start.observations, "returns": start.returns}
    return state._replace(learner=state.learner._replace(**learnt))


def _restore(snapshot: checkpoint.Snapshot, forms: TrainState, where: pathlib.Path) -> tuple[TrainState, Progress]:
    """The state and the counters of a checkpoint.

    Raises:
      ValueError: it is not one of this run.
    """
    learner = checkpoint.unflatten(snapshot.learner, forms.learner, where)
    rest = checkpoint.unflatten(snapshot.loop, forms._replace(learner=()), where)
    try:
        progress = Progress(**snapshot.host["progress"])
        done = (progress.steps, progress.update)
        dict(snapshot.host["hooks"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}: does not fit this run: its counters are of another program") from None
    if done != (int(where.name), int(learner.update)):
        raise ValueError(f"{where}: does not fit this run: its counter says {progress.steps} steps")
    return rest._replace(learner=learner), progress


def _lower_bound(config: Config, forms: TrainState) -> int:
    """Bytes of the state and of the stored observations; the program needs more."""
    return count_bytes(forms) + config.num_steps * count_bytes(forms.envs.obs)


def _describe_rate(old: Config, new: Config, update: int) -> str:
    def rate(config: Config) -> float:
        return config.learning_rate * max(0.0, 1 - update / config.num_updates)

    return (
        f"total_steps is {new.total_steps:,} instead of {old.total_steps:,}: the learning rate starts anew at "
        f"{rate(new):.3g}, where it was {rate(old):.3g}, and falls to 0 at the new end"
    )


def _describe_result(result: Result) -> dict[str, Any]:
    n, t = len(result.returns), t_statistic(result.returns)
    error = float(result.returns.std(ddof=1) / math.sqrt(n)) if n > 1 else None
    numbers = {"standard_error": error, "t": t if math.isfinite(t) else None}
    return result.means() | numbers | {"returns": [float(x) for x in result.returns]}


def _name(config: Config) -> str:
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in pathlib.Path(config.dataset).name)
    return f"{name}-seed{config.seed}"
