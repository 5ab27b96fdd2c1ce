"""A learnt policy, loaded from its run."""

import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from perpjax import PerpEnv, load_market
from perpjax._pytree import pytree
from perpjax.audit.fingerprint import fingerprint
from perpjax.rollout import Act
from perpjax.state import State
from train.checkpoint import FOLDER, ITEMS, list_steps, read, read_newest, unflatten
from train.normalize import Moments
from train.policies import Policy, make_policy
from train.policies.policy import Carry, Params
from train.ppo.config import Config
from train.ppo.environment import wrap_market
from train.record import locate_dataset
from train.run_folder import Run, find_run
from train.state import Learner


@pytree(static=("policy",), host=("run", "step", "config", "dataset"))
class LoadedPolicy:
    """A learnt policy. It is an `Act`, greedy: pass it to `play_windows`, `evaluate` or `path_sensitivity`.

    A pytree: pass it to `jit` as an argument.

    Attributes:
      params: of the network.
      observations: the statistics that standardise an observation.
      policy: the network.
      run: its folder.
      step: environment steps of the training at which it was saved.
      config: the settings of the run.
      dataset: the record of the training data: name, hashes, features.
    """

    params: Params
    observations: Moments
    policy: Policy
    run: pathlib.Path
    step: int
    config: Config
    dataset: dict[str, Any]

    def __repr__(self) -> str:
        return f"policy of {self.run} after {self.step:,} steps on {self.dataset['name']}"

    def act(self, state: State, key: Array | None = None, carry: Carry | None = None) -> tuple[Array, Carry]:
        """Return the action of one state, or of each state of a `VecEnv`, and the memory afterwards.

        Args:
          state: of an environment with the run's observations.
          key: draws from the distribution; None for the greedy action.
          carry: the memory that the call before returned; None at the start of an episode.

        Raises:
          ValueError: the observation has another length.
        """
        size, known = jnp.shape(state.obs)[-1], len(self.observations.mean)
        if size != known:
            raise ValueError(f"an observation of {size} numbers; the {self} knows {known}: use its features")
        if carry is None:
            carry = self.initial_carry(*jnp.shape(state.t))
        obs, reset = self.observations.standardise(state.obs), state.terminated | state.truncated
        carry, distribution, _ = self.policy(self.params, carry, obs, reset)
        return (distribution.mode() if key is None else distribution.sample(key)), carry

    def __call__(self, key: Array, state: State, carry: Carry) -> tuple[Array, Carry]:
        """Return the greedy action and the memory afterwards; `key` is not used."""
        return self.act(state, carry=carry)

    def initial_carry(self, *num_envs: int) -> Carry:
        """Return the memory at the start of an episode, of one environment or of so many."""
        carry = self.policy.initial_carry(*(num_envs or (1,)))
        return carry if num_envs else jax.tree.map(lambda x: x[0], carry)

    def sampled(self) -> Act:
        """Return the policy that draws from its distribution instead of taking the greedy action."""
        return jax.tree_util.Partial(_draw, self)

    def locate(self, dataset: str | None = None) -> str:
        """Return the place of the run's dataset, or of another one."""
        return dataset or locate_dataset({"settings": vars(self.config), "dataset": self.dataset})

    def env(self, split: str | None = "val", dataset: str | None = None) -> PerpEnv:
        """Return the environment of a split, with the run's numbers and choices.

        Args:
          split: "train", "val", "test", or None for all bars. Loading "test" leaves an entry in the user's ledger.
          dataset: another dataset of the same features. By default it is that of the run. A warning says so if the
            data are not those of the training.

        Raises:
          ValueError: the features differ, or the dataset cannot be read.
        """
        name = self.locate(dataset)
        market = load_market(name, split=split)
        check_features(self.dataset, market.feature_names, name)
        known = self.dataset.get(split or "")
        if name not in (self.dataset["name"], self.dataset.get("path")):
            warnings.warn(f"{self}: played on another dataset, {name}", stacklevel=2)
        elif known and fingerprint(market) != known:
            warnings.warn(f"{self}: the {split} split of {name} has changed since the training", stacklevel=2)
        return wrap_market(market, self.config)


def _draw(policy: LoadedPolicy, key: Array, state: State, carry: Carry) -> tuple[Array, Carry]:
    return policy.act(state, key, carry)


def load_policy(run: str | pathlib.Path | Run, which: str | int = "best") -> LoadedPolicy:
    """Return the policy of a run.

    Args:
      run: a run folder, the name of a run in `runs/`, or "latest".
      which: "best" on the validation split, "final" (the newest), or the environment steps of a kept checkpoint.

    Raises:
      ValueError: there is no such run or checkpoint, it is damaged, or its own network cannot be imported. The message
        is one line.
    """
    folder = run.path if isinstance(run, Run) else find_run(run)
    record = Run(folder).config()
    config = Config.from_json(record["settings"])
    policy, step = make_run_policy(config, folder), choose_step(folder, which)
    learner = read_learner(folder, step, policy)
    return LoadedPolicy(learner.params, learner.observations, policy, folder, step, config, record["dataset"])


def make_run_policy(config: Config, folder: pathlib.Path) -> Policy:
    """Return the policy of the settings of a run in this folder.

    Raises:
      ValueError: its module or its function is not there. The message names the run, too.
    """
    try:
        return make_policy(config)
    except ValueError as error:
        raise ValueError(f"{folder}: the network of this run is not to be had: {error}") from error


def read_learner(folder: pathlib.Path, step: int, policy: Policy) -> Learner:
    """Return parameters and statistics of a checkpoint; the optimiser and the counter are None.

    Raises:
      ValueError: the checkpoint is damaged, or does not fit the policy.
    """
    saved, where = read(folder, step, ITEMS[:1]).learner, folder / FOLDER / str(step)
    if ".observations.mean" not in saved:
        raise ValueError(f"{where}: not a whole checkpoint of perpjax: lacks the statistics of the observations")
    size = len(saved[".observations.mean"])
    params = jax.eval_shape(policy.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size), jnp.float32))
    moments = (jax.eval_shape(lambda shape=shape: Moments.empty(shape)) for shape in ((size,), ()))
    wanted = {name: x for name, x in saved.items() if name.startswith((".params", ".observations", ".returns"))}
    return unflatten(wanted, Learner(params, None, *moments, None), where)


def check_features(dataset: dict[str, Any], features: tuple[str, ...], name: str) -> None:
    """Raise unless a dataset has the features with which a policy was trained, in their order.

    Raises:
      ValueError: naming the first that differs.
    """
    known = dataset["features"]
    for i, (a, b) in enumerate(zip(known, features, strict=False)):
        if a != b:
            raise ValueError(f"{name}: feature {i} is {b}, and the policy was trained with {a}")
    if len(known) != len(features):
        raise ValueError(f"{name}: {len(features)} features, and the policy was trained with {len(known)}")


def choose_step(folder: pathlib.Path, which: str | int) -> int:
    """Return the step of a run's checkpoint, see `load_policy`."""
    steps = list_steps(folder)
    if not steps:
        raise ValueError(f"{folder}: no checkpoint here: the run was ended before its first one")
    if isinstance(which, int):
        if which not in steps:
            raise ValueError(f"{folder}: no checkpoint of step {which}; there are {', '.join(map(str, steps))}")
        return which
    if which not in ("best", "final"):
        raise ValueError(f"which = {which!r} is not 'best', 'final' or a number of steps")
    errors = []
    for step, snapshot in read_newest(folder, items=()):
        if isinstance(snapshot, ValueError):
            errors.append(str(snapshot))
            continue
        best = snapshot.host["progress"]["best"]
        if which == "final":
            return step
        if best is None:
            raise ValueError(f"{folder}: this run has not looked at its validation split; use which='final'")
        return best["steps"]
    raise ValueError(errors[0])
