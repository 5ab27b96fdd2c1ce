"""Settings of a training run, and the checks on them."""

import dataclasses
import decimal
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import tyro

from perpjax import EnvConfig, EnvParams
from perpjax.data.seeds import check_seed
from train.loop import Schedule

ROWS_PER_MINIBATCH = 8192
"""Rows of a minibatch by default; about as many stay in cache."""
COUNT = 2**31 - 1
"""The largest count on the device, an int32."""
LOOKS = 20
"""Evaluations of a run by default."""
MOST_UPDATES = 64
"""Most updates of a chunk by default."""
WIDTH = 2**14
"""The largest width of a layer: a kernel between two of them is 1 GiB."""


def _parse_count(text: str) -> int:
    """An integer, as 3000000, 3_000_000 or 3e6."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = decimal.Decimal(text)
    except decimal.InvalidOperation:
        number = decimal.Decimal("NaN")
    if not number.is_finite() or number != number.to_integral_value() or abs(number) > 10**30:
        raise ValueError(f"{text!r} is not a whole number such as 3000000, 3_000_000 or 3e6")
    return int(number)


def _parse_fraction(text: str) -> float:
    """A fraction, as 0.0006 or 6bp."""
    number, points = text.strip().lower(), False
    if number.endswith("bp"):
        number, points = number[:-2], True
    try:
        return float(decimal.Decimal(number) / 10_000) if points else float(number)
    except (ValueError, decimal.InvalidOperation):
        raise ValueError(f"{text!r} is not a fraction such as 0.0006, or 6bp for 6 basis points") from None


def _read_as(kind: type, metavar: str, parse: Callable[[str], Any]) -> Any:
    """The type, with a parser for the command line."""
    spec = tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: parse(args[0]),
        is_instance=lambda x: isinstance(x, kind) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)],
    )
    return Annotated[kind, spec]


Count = _read_as(int, "COUNT", _parse_count)
Fraction = _read_as(float, "FRACTION|BP", _parse_fraction)

# EnvParams holds device arrays; the command line wants plain numbers with the same names and defaults.
ParamArgs = dataclasses.make_dataclass(
    "ParamArgs",
    [(f.name, type(f.default), dataclasses.field(default=f.default)) for f in dataclasses.fields(EnvParams)],
    frozen=True,
    namespace={"__doc__": "Numbers of the simulation, as `EnvParams` with plain numbers."},
)


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """The run: its data, its length, its folder."""

    dataset: str = "synthetic:signal"
    """A folder written by `python -m perpjax.data.build`, or synthetic:signal, synthetic:martingale or synthetic:crash,
    with parameters as in synthetic:signal?seed=3&bars=70080."""
    total_steps: Count = 6_000_000
    """Environment steps, over all environments, such as 15_000_000 or 3e6; rounded down to whole updates."""
    seed: int = 0
    """Seed of all random numbers, 64 bits. Equal seeds give equal runs on one machine."""
    run_dir: pathlib.Path | None = None
    """Folder of the results; default runs/<dataset>-seed<seed>-<time>."""
    init_from: str | None = None
    """A run whose best policy and statistics the new run begins with, on any dataset of the same features."""
    evaluate_every: Count | None = None
    """Steps between two evaluations on the validation split; 0 for none. Default: 20 evaluations a run."""
    checkpoint_every: Count | None = None
    """Steps between two checkpoints. Default: one every 5 minutes. Each new best on validation and the end have one."""
    report: bool = True
    """End with an evaluation on validation: every lot, its costs, report.html. `perpjax evaluate` has more."""
    tensorboard: bool = False
    """Write TensorBoard's files to the run folder, too (`pip install 'perpjax[tensorboard]'`)."""


@dataclasses.dataclass(frozen=True)
class NetworkArgs:
    """The policy's network."""

    network: Literal["mlp", "gru"] = "mlp"
    """A perceptron, or a recurrent network: a perceptron, then a gated recurrent unit with memory of the episode."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of each trunk; for gru, of the perceptron before its unit."""
    activation: Literal["tanh", "relu", "gelu", "silu"] = "tanh"
    """Function between the layers of a perceptron."""
    shared_trunk: bool = False
    """One trunk for actor and critic instead of two."""
    gru_width: int = 64
    """Numbers that each unit of gru remembers."""
    policy: str | None = None
    """A network of your own instead: module:function, a function of the settings that returns a policy. docs/runs.md
    has an example."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the products in the trunks. Parameters, memory, losses and statistics are always float32."""


@dataclasses.dataclass(frozen=True)
class PPOArgs:
    """The algorithm: how it learns from the collected steps."""

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


@dataclasses.dataclass(frozen=True)
class MachineArgs:
    """The machine: how much runs at once."""

    num_envs: Count = 4096
    """Environments stepped together. Fewer need less memory, and learn in smaller, more frequent updates."""
    updates_per_chunk: int | None = None
    """Most updates between two reports to the host. Default: as many as take a second, at most 64."""
    cache: bool = True
    """Keep compiled programs in the user's cache folder, for a quick start of the next run. PERPJAX_CACHE names
    another folder, or turns it off with 0."""


LATER = ("report", "cache", *(f.name for f in dataclasses.fields(NetworkArgs) if f.name != "hidden"))
"""Settings that came after the first config.json."""


class Hyperparameters(NamedTuple):
    """The settings that are operands of a compiled update and not constants in it: other values use it as it is."""

    learning_rate: float
    minibatches: int
    """Of the whole run; the learning rate reaches 0 after them."""
    gamma: float
    gae_lambda: float
    clip: float
    entropy_coef: float
    value_coef: float
    max_grad_norm: float
    weight_decay: float
    obs_noise: float


@dataclasses.dataclass(frozen=True)
class Config(MachineArgs, PPOArgs, NetworkArgs, RunArgs):
    """All settings of a run, checked.

    Attributes:
      env: static choices of the environment.
      params: numbers of the environment.

    Raises:
      ValueError: a setting out of range, or settings that do not fit each other; the message has the numbers.
    """

    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    params: ParamArgs = dataclasses.field(default_factory=ParamArgs)

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
        self._check_network(need)
        need(
            self.env.actions != "box5" or self.env.opposite == "close",
            f"env.actions is box5 and env.opposite is {self.env.opposite}; such a policy could never close a lot: box5 "
            "has no close of its own; give --opposite close, and an order against the lots held closes them",
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
        for name, low in (("updates_per_chunk", 1), ("checkpoint_every", 1), ("evaluate_every", 0)):
            value = getattr(self, name)
            need(value is None or value >= low, f"{name} is {value}; it must be at least {low}")
        EnvParams(**dataclasses.asdict(self.params))

    def _check_network(self, need: Callable[[bool, str], None]) -> None:
        kinds = {f.name: f.type for f in dataclasses.fields(NetworkArgs)}
        for name in ("network", "activation", "compute_dtype"):
            value, choices = getattr(self, name), get_args(kinds[name])
            need(value in choices, f"{name} is {value}; it must be one of {', '.join(choices)}")
        width = self.gru_width
        need(1 <= width <= WIDTH, f"gru_width is {width}; it must be at least 1 and at most {WIDTH}")
        if self.policy is not None:
            need(
                len(self.policy.split(":")) == 2 and all(self.policy.split(":")),
                f"policy is {self.policy!r}; it must be module:function",
            )
            need(self.network == "mlp", f"network is {self.network} and policy is {self.policy}; give one of the two")
        else:
            need(
                self.network == "gru" or width == NetworkArgs.gru_width,
                f"gru_width is {width} and network is {self.network}; --network gru has such a width",
            )

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
    def hyperparameters(self) -> Hyperparameters:
        """The numbers of the algorithm."""
        numbers = {name: getattr(self, name) for name in Hyperparameters._fields if name != "minibatches"}
        return Hyperparameters(**numbers, minibatches=self.num_updates * self.epochs * self.minibatches)

    @property
    def schedule(self) -> Schedule:
        """The moments of the run, in updates."""
        looks, saves = self.evaluate_every, self.checkpoint_every
        return Schedule(
            num_updates=self.num_updates,
            steps_per_update=self.steps_per_update,
            most=self.updates_per_chunk or MOST_UPDATES,
            evaluate_every=math.ceil(self.num_updates / LOOKS) if looks is None else self._to_updates(looks),
            checkpoint_every=0 if saves is None else self._to_updates(saves),
        )

    def _to_updates(self, steps: int) -> int:
        return math.ceil(steps / self.steps_per_update)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for config.json."""
        return dataclasses.asdict(self) | {"run_dir": None if self.run_dir is None else str(self.run_dir)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Config":
        """Return the settings of a config.json. An older one lacks those of `LATER`, which then have their defaults.

        Raises:
          ValueError: a setting is unknown, missing or wrong.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        values = {f.name: f.default for f in dataclasses.fields(cls) if f.name in LATER} | values
        if odd := sorted(known ^ set(values)):
            raise ValueError(f"{odd[0]} is {'an unknown' if odd[0] in values else 'a missing'} setting")
        try:
            nested = {"env": EnvConfig(**values["env"]), "params": ParamArgs(**values["params"])}
            run_dir = None if values["run_dir"] is None else pathlib.Path(values["run_dir"])
            return cls(**values | nested | {"hidden": tuple(values["hidden"]), "run_dir": run_dir})
        except TypeError as error:
            raise ValueError(str(error)) from None


def _largest_divisor(number: int, most: int) -> int:
    divisors = np.arange(1, most + 1)
    return int(divisors[number % divisors == 0].max())
