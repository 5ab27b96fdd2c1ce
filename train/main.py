"""The command line of the trainer: build, compile, train with a live display, evaluate, save."""

import dataclasses
import json
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
import tyro
from jaxtyping import Array

from perpjax import AutoReset, EnvParams, PerpEnv, State, load_market
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
        env = AutoReset(train_env)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", config.to_json())
        display.stage("compiling")
        state = jax.jit(init_train, static_argnums=1)(env, config, jax.random.key(config.seed))
        step = compile_training(env, state, config, config.chunk)
        began, update = time.monotonic(), 0
        with open(run_dir / "metrics.jsonl", "a") as log:
            while update < config.num_updates and not interrupt.wanted:
                state, stacked = step(env, state)
                stacked = jax.tree.map(np.asarray, stacked)
                for i in range(config.chunk):
                    update += 1
                    metrics = summarise({k: v[i] for k, v in stacked.items()}, update, config)
                    _check_finite(metrics)
                    metrics["seconds"] = round(time.monotonic() - began, 3)
                    metrics["steps_per_second"] = metrics["steps"] / (time.monotonic() - began)
                    log.write(json.dumps(metrics) + "\n")
                log.flush()
                display.show(metrics)
        display.stage("saving and evaluating")
        save_learner(run_dir, state.learner)
        results = compare(validation_env, state.learner, config)
    windows = len(results["hold"].returns)
    print_results(
        results, f"Validation split of {config.dataset}: mean of {windows} x {config.env.episode_length} bars"
    )
    print(f"{'stopped early, ' if update < config.num_updates else ''}saved to {run_dir}")
    return state.learner


def make_env(config: Config, split: str) -> PerpEnv:
    """The environment of one split of the configured dataset."""
    params = EnvParams(**dataclasses.asdict(config.params))
    return PerpEnv(load_market(config.dataset, split=split), params, config.env)


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
