"""Training steps a second: our PPO trainer, and a plain one of the same sizes, in turn, in one process.

    python -m benchmarks.training --peer benchmarks/plain_trainer.py      # writes benchmarks/results/training.json
    python -m benchmarks.training                                 # ours alone

The peer is a Python file with a function

    make(env, num_envs, num_steps, epochs, minibatches, updates) -> (init, train)

`init(key)` returns the trainer's first state. `train(state)` runs all updates and returns the next state and metrics.
Both trainers get the same environment, an `AutoReset(PerpEnv)` of the training split, and the same sizes. Compiling is
not timed. A ratio is that of two calls in the same turn.
"""

import dataclasses
import importlib.util
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console

from benchmarks.harness import RESULTS, Clock, clock, quartiles, run_command, save, take_turns
from perpjax import AutoReset, VecEnv

PROGRAM = "benchmarks.training"
Trainer = Callable[[AutoReset, Any], tuple[Any, Any]]
"""From the environment and a training state to the next state and metrics."""


@dataclasses.dataclass
class Args:
    """The trainers to time."""

    peer: pathlib.Path | None = None
    """A file with a trainer to compare with."""
    num_envs: int = 4096
    """Environments of each trainer."""
    num_steps: int = 32
    """Steps of each environment in an update."""
    epochs: int = 3
    """Passes over the collected steps in an update."""
    minibatches: int = 16
    """Minibatches of a pass."""
    updates: int = 8
    """Updates of a timed call."""
    repeats: int = 5
    """Timed calls of each trainer."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market."""
    out: pathlib.Path = RESULTS / "training.json"
    """Where the result goes."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.num_envs, self.num_steps, self.epochs, self.minibatches, self.updates

    def __post_init__(self):
        if min(*self.sizes, self.repeats) < 1:
            raise ValueError("sizes and repeats must be at least 1")


def make_ours(args: Args) -> tuple[AutoReset, Any, Trainer]:
    """Return the environment, and our trainer's first state and updates: all that this script knows of `train`."""
    from train.ppo.config import Config
    from train.ppo.environment import make_env
    from train.ppo.run import init_state, make_ppo

    num_envs, num_steps, epochs, minibatches, updates = args.sizes
    total_steps = num_envs * num_steps * updates * (args.repeats + 1)  # the learning rate falls over all of them
    config = Config(
        dataset=args.dataset, num_envs=num_envs, total_steps=total_steps, num_steps=num_steps, epochs=epochs,
        num_minibatches=minibatches,
    )  # fmt: skip
    env, ppo = AutoReset(make_env(config, "train")), make_ppo(config)

    def run_updates(env: AutoReset, state: Any) -> Any:
        return jax.lax.scan(lambda state, _: ppo.update(VecEnv(env), state), state, length=updates)

    return env, init_state(ppo, VecEnv(env)), run_updates


def make_peer(args: Args, env: AutoReset) -> tuple[Any, Trainer]:
    """Return the peer's first state and updates.

    Raises:
      ValueError: the file has no function `make`.
    """
    spec = importlib.util.spec_from_file_location("peer", args.peer)
    if spec is None or spec.loader is None:
        raise ValueError(f"{args.peer} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "make"):
        raise ValueError(f"{args.peer} has no function make")
    init, train = module.make(env, *args.sizes)
    return jax.jit(init)(jax.random.key(0)), lambda env, state: train(state)


def time_trainer(env: AutoReset, state: Any, train: Trainer) -> Clock:
    """Return a clock that trains on from the state of the call before."""
    compiled = jax.jit(train, donate_argnums=1).lower(env, state).compile()

    def call(_: None) -> Any:
        nonlocal state
        state, metrics = compiled(env, state)
        return metrics

    return clock(lambda: None, call)


def summarise(args: Args, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return the row of the result: million training steps/s of both, and how many times as fast ours is."""
    names = ("num_envs", "num_steps", "epochs", "minibatches")
    row: dict[str, Any] = {name: getattr(args, name) for name in names}
    total = args.num_envs * args.num_steps * args.updates / 1e6
    row |= {name: round(total / statistics.median(x), 3) for name, x in seconds.items()}
    if "peer" in seconds:
        ratios = quartiles([b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True)])
        row |= {name: round(x, 2) for name, x in zip(("low", "ratio", "high"), ratios, strict=True)}
    return row


def run(args: Args) -> None:
    """Compile, time, show and save."""
    env, state, train = make_ours(args)
    clocks = {"ours": time_trainer(env, state, train)}
    if args.peer:
        clocks["peer"] = time_trainer(env, *make_peer(args, env))
    row = summarise(args, take_turns(clocks, args.repeats))
    Console().print(f"million training steps/s: {row}", highlight=False)
    save(args.out, PROGRAM, [row])


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(run, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
