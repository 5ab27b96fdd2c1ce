"""The command line of the trainer: build, compile, train with a live display, evaluate, save."""

import dataclasses
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tyro
from jaxtyping import Array

from perpjax import AutoReset, EnvParams, Market, PerpEnv, State, load_market
from perpjax._seed import seed_key
from train.checkpoint import save_learner, write_json
from train.config import Config, Settings
from train.display import Display, print_results
from train.evaluate import Act, evaluate, hold, random
from train.networks import ActorCritic, Policy
from train.normalize import Moments
from train.ppo import Learner, compile_training, init_train

EVALUATION_SEED = 1_000_003
"""The validation windows are fixed; this seeds only the random policy on them."""
PER_EPISODE = ("episode_return", "episode_length", "max_drawdown", "trades", "liquidations", "fees", "ruined")


def main(args: list[str] | None = None) -> None:
    """Parse the arguments and train; a wrong value is one line and exit status 2."""
    try:
        settings = tyro.cli(Settings, args=args, prog="python -m train.ppo")
        train(Config(**vars(settings)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def train(config: Config) -> Learner:
    """One run, from a dataset to a checkpoint and a table; returns what was learnt."""
    run_dir = config.run_dir or _new_run_dir(config)
    if (run_dir / "metrics.jsonl").exists():
        raise ValueError(f"run_dir {run_dir} already holds a run; name another one")
    with Display(config.num_updates * config.num_envs * config.num_steps) as display, _Interrupt() as interrupt:
        display.stage(f"loading {config.dataset}")
        train_env, validation_env = (make_env(config, split) for split in ("train", "val"))
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", config.to_json())
        with open(run_dir / "metrics.jsonl", "a", buffering=1) as log:
            learner = learn(
                train_env, config, display, lambda line: log.write(json.dumps(line) + "\n"), lambda: interrupt.wanted
            )
        display.stage("saving and evaluating")
        save_learner(run_dir, learner)
        results = compare(validation_env, learner, config)
    windows = len(results["hold"].returns)
    print_results(
        results, f"Validation split of {config.dataset}: mean of {windows} x {config.env.episode_length} bars"
    )
    print(f"{'stopped early, ' if int(learner.update) < config.num_updates else ''}saved to {run_dir}")
    return learner


def learn(
    env: PerpEnv,
    config: Config,
    display: Display,
    record: Callable[[dict[str, Any]], object] = lambda metrics: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Learner:
    """The training loop: compile, then update after update, a chunk of them between two looks of the host.

    Args:
      env: what is learnt from.
      display: shows each chunk's last metrics.
      record: is given the metrics of every update.
      interrupted: asked before each chunk; True ends the training early.

    Raises:
      ValueError: the training has diverged.
    """
    display.stage("compiling")
    env = AutoReset(env)
    state = jax.jit(init_train, static_argnums=1)(env, config, seed_key(config.seed))
    step = compile_training(env, state, config, config.chunk)
    began, update = time.monotonic(), 0
    while update < config.num_updates and not interrupted():
        state, stacked = step(env, state)
        stacked = jax.tree.map(np.asarray, stacked)
        for i in range(config.chunk):
            update += 1
            metrics = summarise({k: v[i] for k, v in stacked.items()}, update, config)
            _check_finite(metrics)
            metrics["seconds"] = round(time.monotonic() - began, 3)
            metrics["steps_per_second"] = metrics["steps"] / (time.monotonic() - began)
            record(metrics)
        display.show(metrics)
    return state.learner


def make_env(config: Config, split: str) -> PerpEnv:
    """The environment of one split of the configured dataset."""
    return wrap_market(load_market(config.dataset, split=split), config)


def wrap_market(market: Market, config: Config) -> PerpEnv:
    """The environment of any market, with the configured numbers and choices."""
    return PerpEnv(market, EnvParams(**dataclasses.asdict(config.params)), config.env)


def greedy(learner: Learner, config: Config) -> Act:
    """The most probable action of the learnt policy."""
    model = ActorCritic(config.hidden)

    def act(params: dict, observations: Moments, key: Array, state: State) -> Array:
        logits, _ = model.apply(params, observations.standardise(state.obs))
        return Policy.from_logits(logits).mode()

    return jax.tree_util.Partial(act, learner.params, learner.observations)


def compare(env: PerpEnv, learner: Learner, config: Config) -> dict[str, Any]:
    """The greedy policy against hold and random, on the same windows."""
    key = jax.random.key(EVALUATION_SEED)
    policies = {"trained": greedy(learner, config), "hold": hold(env), "random": random(env)}
    return {name: evaluate(env, act, key) for name, act in policies.items()}


def summarise(sums: dict[str, np.ndarray], update: int, config: Config) -> dict[str, Any]:
    """One line of metrics.jsonl; what has no data is absent, never NaN."""
    metrics: dict[str, Any] = {"update": update, "steps": update * config.num_envs * config.num_steps}
    episodes = int(sums["episodes"])
    for name, value in sums.items():
        if name not in PER_EPISODE:
            metrics[name] = value.item()
        elif episodes:
            metrics[name] = value.item() / episodes
    return metrics


def _check_finite(metrics: dict[str, Any]) -> None:
    bad = [name for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise ValueError(
            f"update {metrics['update']}: {', '.join(bad)} not finite; training has diverged, "
            "try a smaller learning_rate"
        )


def _new_run_dir(config: Config) -> pathlib.Path:
    name = pathlib.Path(config.dataset).name.replace(":", "-")
    return pathlib.Path("runs") / f"{name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


class _Interrupt:
    """The first Ctrl-C asks for a clean stop after the running updates; the second one is an ordinary one."""

    wanted = False

    def __enter__(self) -> "_Interrupt":
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.wanted = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)
