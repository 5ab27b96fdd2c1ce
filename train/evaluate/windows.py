"""Evaluation: whole episodes of a policy on a market, from evenly spaced first bars."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax.params import EnvConfig
from perpjax.rollout import Act, play_windows, window_starts
from perpjax.rules.orders import hold_action, sample_action
from perpjax.state import State
from perpjax.vec import Env, unwrapped
from train.normalize import Moments
from train.policies.policy import Carry, Params, Policy
from train.state import Learner

CHOICES = ("greedy", "flat", "random")
"""Names of `choose`."""


class Result(NamedTuple):
    """One number an episode, each [windows]; fractions of initial equity where not said otherwise."""

    returns: Float[np.ndarray, "windows"]
    """Of equity, open lots at their mark."""
    closed_returns: Float[np.ndarray, "windows"]
    """The same after closing every lot at the end, with slippage and fee (`PerpEnv.liquidation_value`)."""
    max_drawdown: Float[np.ndarray, "windows"]
    """Fraction of the peak."""
    trades: Float[np.ndarray, "windows"]
    fees: Float[np.ndarray, "windows"]
    slippage: Float[np.ndarray, "windows"]
    funding: Float[np.ndarray, "windows"]
    """Paid; negative: received."""
    liquidations: Float[np.ndarray, "windows"]

    def means(self) -> dict[str, float]:
        """Means over the windows, by the names that the files and the hooks use."""
        names = {"returns": "return", "closed_returns": "closed_return"}
        return {names.get(name, name): float(np.mean(x)) for name, x in self._asdict().items()}

    def t_stat(self) -> float:
        """Mean return over its standard error; NaN with fewer than two windows or no spread (it never trades)."""
        return t_statistic(self.returns)


def t_statistic(x: Float[np.ndarray, "n"]) -> float:
    """Student's t of the mean against zero; NaN with fewer than two values or no spread."""
    if len(x) < 2 or np.ptp(x) == 0:
        return math.nan
    return float(np.mean(x) / (np.std(x, ddof=1) / np.sqrt(len(x))))


def flat(env: Env) -> Act:
    """Return the policy that never trades."""
    action = hold_action(unwrapped(env).config)
    return lambda key, state, carry: (action, carry)


def random(env: Env) -> Act:
    """Return the policy that draws actions uniformly."""
    config = unwrapped(env).config
    return lambda key, state, carry: (sample_action(key, config), carry)


def greedy(learner: Learner, policy: Policy) -> Act:
    """Return the learnt policy, which takes the most probable action.

    It starts from `single_carry(policy)` in one environment, and from `policy.initial_carry(n)` in a batch of n. After
    an auto-reset it begins with fresh memory.
    """
    return jax.tree_util.Partial(_Greedy(policy), learner.params, learner.observations)


@dataclasses.dataclass(frozen=True)
class _Greedy:
    """A function that compares by its policy, so that two of them share one compiled program."""

    policy: Policy

    def __call__(
        self, params: Params, observations: Moments, key: Array, state: State, carry: Carry
    ) -> tuple[Array, Carry]:
        reset = state.terminated | state.truncated
        carry, distribution, _ = self.policy(params, carry, observations.standardise(state.obs), reset)
        return distribution.mode(), carry


def choose(name: str, env: Env, learner: Learner, policy: Policy) -> Act:
    """Return `greedy`, `flat` or `random` by its name. The three share one compiled program."""
    act = _Chosen(policy, unwrapped(env).config)
    return jax.tree_util.Partial(act, np.int32(CHOICES.index(name)), learner.params, learner.observations)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The actions of all three, of which it returns one."""

    policy: Policy
    config: EnvConfig

    def __call__(
        self, choice: Array, params: Params, observations: Moments, key: Array, state: State, carry: Carry
    ) -> tuple[Array, Carry]:
        action, carry = _Greedy(self.policy)(params, observations, key, state, carry)
        return jnp.stack([action, hold_action(self.config), sample_action(key, self.config)])[choice], carry


def measure_windows(
    env: Env, act: Act, key: Array, starts: Int[np.ndarray, "windows"] | None = None, *, carry: Carry | None = None
) -> Result:
    """Play one episode from each first bar, by default every window that fits without overlap.

    Args:
      env: the market, parameters and choices to evaluate on; wrappers as in `play_windows`.
      act: the policy; a pytree of arrays (`jax.tree_util.Partial`) avoids a second compilation.
      key: of all random numbers; windows do not share them.
      starts: first bars.
      carry: the policy's memory at the start of a window, as in `play_windows`.

    Raises:
      ValueError: a first bar that may not be traded.
    """
    starts = window_starts(env) if starts is None else starts
    episode = play_windows(env, act, key, starts, carry)
    episode = jax.tree.map(lambda x: np.asarray(x, np.float64), episode)
    initial = float(unwrapped(env).params.initial_equity)
    ledger = episode.ledger
    return Result(
        returns=episode.equity / initial - 1,
        closed_returns=episode.liquidation_value / initial - 1,
        max_drawdown=episode.max_drawdown,
        trades=ledger.opened,
        fees=ledger.fees / initial,
        slippage=ledger.slippage / initial,
        funding=ledger.funding / initial,
        liquidations=ledger.liquidated,
    )


@dataclasses.dataclass(frozen=True)
class Windows:
    """Fixed windows of a market, played `rows` at a time: one compiled program for any number of them.

    The rows that are left over in the last batch play its first window again, and do not count.

    Attributes:
      env: the market, parameters and choices.
      starts: first bars.
      key: of all random numbers.
      rows: windows of one call.
    """

    env: Env
    starts: Int[np.ndarray, "windows"]
    key: Array
    rows: int = 64

    @classmethod
    def of(cls, env: Env, key: Array, most: int | None = None) -> "Windows":
        """Return the windows that fit without overlap, or `most` of them, evenly spaced."""
        starts = window_starts(env)
        if most is not None and len(starts) > most:
            starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
        return cls(env, starts, key)

    def play(self, act: Act, carry: Carry | None = None) -> Result:
        """Play one episode in each window; see `evaluate`."""
        parts = []
        for i in range(0, len(self.starts), self.rows):
            batch = self.starts[i : i + self.rows]
            padded = np.concatenate([batch, np.full(self.rows - len(batch), batch[0])])
            result = measure_windows(self.env, act, jax.random.fold_in(self.key, i), padded, carry=carry)
            parts.append(Result(*(x[: len(batch)] for x in result)))
        return Result(*(np.concatenate(x) for x in zip(*parts, strict=True)))
