"""The command line of the trainer: groups of options, and the settings that they make."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from perpjax import EnvConfig, EnvParams
from perpjax.params import RANGES
from train.ppo.config import Config, Fraction, MachineArgs, NetworkArgs, ParamArgs, PPOArgs, RunArgs
from train.run_folder import Run, find_run

CHOICES = {
    "actions": "Form of an action: indices, or five floats in [-1, 1], which need --opposite close.",
    "intrabar": "Rule that selects one of several levels reached inside a candle.",
    "reward": "log_return of equity, or shaped: that less the penalties below.",
    "opposite": "Treatment of a direction against the lots held: refuse the order, or close the lots.",
    "max_lots": "Slots for lots of an account.",
    "episode_length": "Bars of an episode; 672 are a week.",
}
"""Help of each field of `EnvConfig`."""
IN_BASIS_POINTS = ("taker_fee", "slippage_base")
MAY_CHANGE = (
    "total_steps", "evaluate_every", "checkpoint_every", "report", "tensorboard", "updates_per_chunk", "cache"
)  # fmt: skip
"""Settings that a resumed run may change; none changes the updates but the end of the learning rate."""


def _group(name: str, doc: str, fields: Sequence[str]) -> type:
    """A group of options made of fields of `EnvParams` and `EnvConfig`."""
    choices = {f.name: f for f in dataclasses.fields(EnvConfig)}
    numbers = {f.name: f for f in dataclasses.fields(EnvParams)}
    options = []
    for field in fields:
        if field in choices:
            kind, text, default = choices[field].type, CHOICES[field], choices[field].default
        else:
            kind, text, default = type(numbers[field].default), RANGES[field][-1], numbers[field].default
        if field in IN_BASIS_POINTS:
            kind, text = Fraction, f"{text} {default * 1e4:g}bp means {default * 1e4:g} basis points."
        options.append((field, Annotated[kind, tyro.conf.arg(help=text)], dataclasses.field(default=default)))
    return dataclasses.make_dataclass(name, options, frozen=True, namespace={"__doc__": doc})


MarketArgs = _group(
    "MarketArgs", "The market's costs, and the form of an episode.",
    ["initial_equity", "taker_fee", "slippage_base", "slippage_atr", "stop_depth", "intrabar", "episode_length"],
)  # fmt: skip
LimitArgs = _group(
    "LimitArgs", "Limits of an account.",
    ["max_exposure", "max_leverage", "max_hold", "max_lots", "opposite", "actions", "ruin_fraction"],
)  # fmt: skip
RewardArgs = _group(
    "RewardArgs", "The reward of a step.",
    ["reward", "entry_penalty", "risk_penalty", "liquidation_penalty", "ruin_penalty"],
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunOptions(RunArgs):
    """The run: its data, its length, its folder."""

    resume: str | None = None
    """A run to go on with, bit by bit: its folder, its name in runs/, or latest. All settings are those of the run; a
    larger --total-steps makes it longer."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Train a PPO policy on a perpetual-futures market.

    The run folder holds config.json, metrics.jsonl, evaluations.jsonl, evaluation.json and checkpoints. The training
    ends with a table of the policy against `flat` (never trades) and `random` on the validation split. Ctrl-C, SIGTERM
    and SIGHUP save and stop; --resume goes on.

    For example:

    - perpjax train --num-envs 4096

    - perpjax train --dataset datasets/orca --total-steps 3e7 --taker-fee 4bp --seed 1

    - perpjax train --resume latest
    """

    run: tyro.conf.OmitArgPrefixes[RunOptions] = dataclasses.field(default_factory=RunOptions)
    market_and_costs: tyro.conf.OmitArgPrefixes[MarketArgs] = dataclasses.field(default_factory=MarketArgs)
    limits: tyro.conf.OmitArgPrefixes[LimitArgs] = dataclasses.field(default_factory=LimitArgs)
    reward: tyro.conf.OmitArgPrefixes[RewardArgs] = dataclasses.field(default_factory=RewardArgs)
    network: tyro.conf.OmitArgPrefixes[NetworkArgs] = dataclasses.field(default_factory=NetworkArgs)
    ppo: tyro.conf.OmitArgPrefixes[PPOArgs] = dataclasses.field(default_factory=PPOArgs)
    machine: tyro.conf.OmitArgPrefixes[MachineArgs] = dataclasses.field(default_factory=MachineArgs)

    def values(self) -> dict[str, Any]:
        """Return all options by name."""
        return {k: v for group in dataclasses.fields(self) for k, v in vars(getattr(self, group.name)).items()}

    def to_config(self) -> Config:
        """Return the settings.

        Raises:
          ValueError: a setting is out of range, or settings do not fit each other.
        """
        values = self.values()
        del values["resume"]
        env = EnvConfig(**{f.name: values.pop(f.name) for f in dataclasses.fields(EnvConfig)})
        params = ParamArgs(**{f.name: values.pop(f.name) for f in dataclasses.fields(ParamArgs)})
        return Config(**values, env=env, params=params)

    @classmethod
    def of(cls, config: Config, resume: str | None = None) -> "Command":
        """Return the options that make these settings."""
        values = vars(config) | vars(config.env) | vars(config.params) | {"resume": resume}
        kinds = {f.name: f.default_factory for f in dataclasses.fields(cls)}
        return cls(
            **{name: kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for name, kind in kinds.items()}
        )


def parse(args: Sequence[str] | None, prog: str) -> tuple[Config, str | None]:
    """Return the settings, and the run to resume or None.

    Options that were not given come from the run that is resumed. The network comes from the run of --init-from.

    Raises:
      ValueError: a setting is wrong, or a resumed run may not change it.
    """
    # Earlier commands gave the environment's options with a prefix.
    args = None if args is None else [a.replace("--env.", "--", 1).replace("--params.", "--", 1) for a in args]
    command = tyro.cli(Command, args=args, prog=prog)
    if (resumed := command.run.resume) is not None:
        folder = find_run(resumed)
        saved = Command.of(Config.from_json(Run(folder).settings()), str(folder))
        given = tyro.cli(Command, args=args, prog=prog, default=saved)
        before, now = saved.values(), given.values()
        for name in before.keys() - {"resume", *MAY_CHANGE}:
            if now[name] != before[name]:
                raise ValueError(
                    f"{name} is {now[name]}, and {folder} has {before[name]}: a resumed run keeps its settings; "
                    f"--init-from {folder} begins a new run with its policy"
                )
        return given.to_config(), str(folder)
    if (origin := command.run.init_from) is not None:
        network = Command.of(Config.from_json(Run(find_run(origin)).settings())).network
        default = dataclasses.replace(Command(), network=network)
        command = tyro.cli(Command, args=args, prog=prog, default=default)
    return command.to_config(), None
