"""One run of PPO: load a dataset, compile, train, save, evaluate."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence

import jax

from perpjax import AutoReset, EnvParams, Market, PerpEnv, VecEnv, load_market
from perpjax.data.seeds import seed_key
from train.checkpoint import load_tree, save_tree, write_json
from train.evaluate import Result, evaluate, greedy, hold, random
from train.hooks import Hook
from train.hooks.display import Display
from train.hooks.jsonl import JsonLines
from train.loop import Interrupt, run_updates
from train.policies import MLP, Policy, single_carry
from train.ppo.algorithm import PPO
from train.ppo.config import Config
from train.state import Learner, TrainState
from train.table import print_results

EVALUATION_SEED = 1_000_003
"""The validation windows are fixed; this seeds only the random policy on them."""


def train(config: Config) -> Learner:
    """Train from a dataset to a checkpoint and a table, and return the learner.

    Writes config.json, metrics.jsonl and the checkpoint to the run directory, and prints the table. Ctrl-C ends the
    training early; the run is then saved and evaluated as usual.

    Raises:
      ValueError: the run directory holds a run, the dataset does not fit, or the training diverged.
      OSError: the run directory cannot be written.
    """
    run_dir = config.run_dir or _new_run_dir(config)
    if (run_dir / "metrics.jsonl").exists():
        raise ValueError(f"run_dir {run_dir} already holds a run; name another one")
    ppo = make_ppo(config)
    with Display(config.num_updates * config.steps_per_update) as display, Interrupt() as interrupt:
        display.stage(f"loading {config.dataset}")
        train_env, validation_env = (make_env(config, split) for split in ("train", "val"))
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / "config.json", config.to_json())
        with JsonLines(run_dir / "metrics.jsonl") as log:
            display.stage("compiling")
            envs = VecEnv(AutoReset(train_env))
            state = learn(ppo, envs, init_state(ppo, envs), (log, display), lambda: interrupt.wanted)
        display.stage("saving and evaluating")
        save_tree(run_dir, state.learner)
        results = compare(validation_env, state.learner, ppo.policy)
    windows = len(results["hold"].returns)
    print_results(
        results, f"Validation split of {config.dataset}: mean of {windows} x {config.env.episode_length} bars"
    )
    print(f"{'stopped early, ' if int(state.learner.update) < config.num_updates else ''}saved to {run_dir}")
    return state.learner


def make_ppo(config: Config) -> PPO:
    """Return the algorithm with the configured policy."""
    return PPO(config, MLP(config.hidden))


def init_state(ppo: PPO, envs: VecEnv) -> TrainState:
    """Return a fresh state, drawn from the configured seed."""
    return jax.jit(ppo.init)(envs, seed_key(ppo.config.seed))


def learn(
    ppo: PPO,
    envs: VecEnv,
    state: TrainState,
    hooks: Sequence[Hook] = (),
    stop: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Run all configured updates; see `run_updates`."""
    config = ppo.config
    return run_updates(
        ppo.update,
        envs,
        state,
        num_updates=config.num_updates,
        chunk=config.chunk,
        steps_per_update=config.steps_per_update,
        hooks=hooks,
        stop=stop,
    )


def make_env(config: Config, split: str) -> PerpEnv:
    """Return the environment of one split of the configured dataset."""
    return wrap_market(load_market(config.dataset, split=split), config)


def wrap_market(market: Market, config: Config) -> PerpEnv:
    """Return the environment of a market, with the configured numbers and choices."""
    return PerpEnv(market, EnvParams(**dataclasses.asdict(config.params)), config.env)


def load_learner(run_dir: pathlib.Path, ppo: PPO, env: PerpEnv) -> Learner:
    """Read the learner that a run of this algorithm saved.

    Args:
      env: any environment with the run's observations.

    Raises:
      ValueError: there is no checkpoint, or it does not fit the environment and the algorithm.
    """
    shapes = jax.eval_shape(ppo.init, VecEnv(AutoReset(env)), jax.random.key(0))
    return load_tree(run_dir, shapes.learner)


def compare(env: PerpEnv, learner: Learner, policy: Policy) -> dict[str, Result]:
    """Play the greedy policy, `hold` and `random` on the same windows."""
    key, baselines = jax.random.key(EVALUATION_SEED), {"hold": hold(env), "random": random(env)}
    trained = evaluate(env, greedy(learner, policy), key, carry=single_carry(policy))
    return {"trained": trained} | {name: evaluate(env, act, key) for name, act in baselines.items()}


def _new_run_dir(config: Config) -> pathlib.Path:
    name = pathlib.Path(config.dataset).name.replace(":", "-")
    return pathlib.Path("runs") / f"{name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
