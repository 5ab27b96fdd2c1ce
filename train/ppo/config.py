"""Settings of a training run, and the checks on them."""

import dataclasses
import math
import pathlib
from typing import Annotated, Any

import numpy as np
import tyro

from perpjax import EnvConfig, EnvParams
from perpjax.data.seeds import check_seed
from perpjax.params import RANGES

ROWS_PER_MINIBATCH = 8192
"""Rows of a minibatch by default; about as many stay in cache."""
COUNT = 2**31 - 1
"""The largest count on the device, an int32."""
WIDTH = 2**14
"""The largest width of a layer: a kernel between two of them is 1 GiB."""

# EnvParams holds device arrays; the command line wants plain numbers with the same names and defaults.
ParamArgs = dataclasses.make_dataclass(
    "ParamArgs",
    [
        (
            f.name,
            Annotated[type(f.default), tyro.conf.arg(help=RANGES[f.name][-1])],
            dataclasses.field(default=f.default),
        )
        for f in dataclasses.fields(EnvParams)
    ],
    frozen=True,
    namespace={"__doc__": "Numbers of the simulation."},
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train a PPO policy on a perpetual-futures market.

    Writes config.json, metrics.jsonl and a final checkpoint to the run directory, and ends with a table of the greedy
    policy against `hold` (never trades) and `random` on the validation split. Ctrl-C finishes the current update,
    saves and stops.
    """

    dataset: str = "synthetic:signal"
    """A folder written by `python -m perpjax.data.build`, or synthetic:signal, synthetic:martingale or synthetic:crash,
    with parameters as in synthetic:signal?seed=3&bars=70080."""
    num_envs: int = 4096
    """Environments stepped together."""
    total_steps: int = 15_000_000
    """Environment steps, over all environments; rounded down to whole updates."""
    seed: int = 0
    """Seed of all random numbers, 64 bits. Equal seeds give equal runs on one machine."""
    run_dir: pathlib.Path | None = None
    """Folder of the results; default runs/<dataset>-seed<seed>-<time>."""

    num_steps: int = 32
    """Steps of every environment between two updates."""
    epochs: int = 3
    """Passes over the collected steps in an update."""
    num_minibatches: int | None = None
    """Minibatches of an update, as blocks of environments; must divide num_envs. Default: about 8192 rows each."""
    learning_rate: float = 1e-3
    """Step size of Adam at the start; it falls linearly to zero."""
    gamma: float = 0.99
    """Discount of a 15-minute step."""
    gae_lambda: float = 0.95
    """Trade-off of bias (0) against variance (1) in the advantages."""
    clip: float = 0.2
    """Clip range of the probability ratio and of the change in value."""
    entropy_coef: float = 0.003
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm above which gradients are scaled down."""
    weight_decay: float = 1.0
    """Decoupled weight decay of the kernels, against overfitting."""
    obs_noise: float = 0.6
    """Standard deviation of the noise on standardised market features in training, against overfitting."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of each trunk."""

    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    """Static choices of the environment."""
    params: ParamArgs = dataclasses.field(default_factory=ParamArgs)
    """Numbers of the environment."""
    updates_per_chunk: int | None = None
    """Updates between two reports to the host; must divide the number of updates. Default: at most 4."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """`Settings` that are checked.

    Raises:
      ValueError: a setting out of range, or settings that do not fit each other; the message has the numbers.
    """

    def __post_init__(self):
        def need(holds: bool, message: str) -> None:
            if not holds:
                raise ValueError(message)

        for name in ("num_envs", "num_steps", "epochs", "total_steps"):
            need(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        check_seed(self.seed, low=-(2**63))
        for name, low, high in (("gamma", 0, 1), ("gae_lambda", 0, 1), ("clip", 0, 1), ("learning_rate", 0, 1)):
            need(low <= getattr(self, name) <= high, f"{name} is {getattr(self, name)}; it must lie in [{low}, {high}]")
        for name in ("entropy_coef", "value_coef", "max_grad_norm", "obs_noise", "weight_decay"):
            value = getattr(self, name)
            need(math.isfinite(value) and value >= 0, f"{name} is {value}; it must be a finite number of at least 0")
        need(
            all(1 <= w <= WIDTH for w in self.hidden),
            f"hidden is {self.hidden}; every width must be at least 1 and at most {WIDTH}",
        )
        need(
            self.env.actions == "multi_discrete",
            f"env.actions is {self.env.actions}; the trainer's policy is a multi_discrete one",
        )
        batch = self.num_envs * self.num_steps
        bars = self.num_envs * (self.env.episode_length + self.num_steps)
        need(
            bars <= COUNT,
            f"num_envs {self.num_envs} x (env.episode_length {self.env.episode_length} + num_steps {self.num_steps}) = "
            f"{bars} is above {COUNT}; the bars of the episodes that end in an update are an int32",
        )
        need(
            self.total_steps >= batch,
            f"total_steps is {self.total_steps}, less than one update of num_envs {self.num_envs} x "
            f"num_steps {self.num_steps} = {batch}",
        )
        n = self.num_minibatches
        need(
            n is None or (n >= 1 and self.num_envs % n == 0),
            f"num_minibatches {n} does not divide num_envs {self.num_envs}",
        )
        steps = self.num_updates * self.num_steps
        need(
            steps <= COUNT,
            f"total_steps {self.total_steps} are {steps} steps of each of the num_envs {self.num_envs}, above {COUNT}; "
            "the episodes of an environment are counted in an int32",
        )
        # Before `minibatches`, which tries every divisor up to the number of rows, this number is bounded above.
        steps = self.num_updates * self.epochs * self.minibatches
        need(
            steps <= COUNT,
            f"total_steps {self.total_steps} are {self.num_updates} updates x epochs {self.epochs} x "
            f"{self.minibatches} minibatches = {steps}, above {COUNT}; the optimiser counts its steps in an int32",
        )
        n = self.updates_per_chunk
        need(
            n is None or (n >= 1 and self.num_updates % n == 0),
            f"updates_per_chunk {n} does not divide the {self.num_updates} updates of total_steps {self.total_steps}",
        )
        EnvParams(**dataclasses.asdict(self.params))

    @property
    def num_updates(self) -> int:
        """Whole updates in `total_steps`."""
        return self.total_steps // (self.num_envs * self.num_steps)

    @property
    def steps_per_update(self) -> int:
        """Environment steps of an update, over all environments."""
        return self.num_envs * self.num_steps

    @property
    def minibatches(self) -> int:
        """Minibatches of an update."""
        most = max(1, self.num_envs * self.num_steps // ROWS_PER_MINIBATCH)
        return self.num_minibatches or _largest_divisor(self.num_envs, most)

    @property
    def chunk(self) -> int:
        """Updates between two reports to the host."""
        return self.updates_per_chunk or _largest_divisor(self.num_updates, 4)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return dataclasses.asdict(self) | {"run_dir": None if self.run_dir is None else str(self.run_dir)}


def _largest_divisor(number: int, most: int) -> int:
    divisors = np.arange(1, most + 1)
    return int(divisors[number % divisors == 0].max())
