"""The rungs: their training data, their figures and their bounds.

Reasons for the bounds:
- martingale: staying out earns 0, and costs make any trading lose. The bound of 0.1 % a week is about a hundredth of
  the loss of a random policy.
- signal: the causal policy is strong, because it is fitted on the latent drift of the training market. Its share of
  the oracle's return shows that the market is neither hopeless nor trivial.
- leak: with `max_hold` 1 no lot outlives its bar, so the best possible return is known (`best_of_single_bars`).
- costs: turnover falls by at least a tenth, and the policy still earns.
- ruin: a trap pays in the mean, but ends the gifts (`markets.trap_market`). A trainer that counts no reward after ruin
  stays out. A trainer that bootstraps at ruin walks in, and half of its windows end in ruin.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from perpjax import EnvConfig, PerpEnv
from perpjax.audit import audit_features
from perpjax.data import synthetic_tables
from perpjax.data.synthetic import SignalParameters
from perpjax.data.synthetic_noise import YEAR_BARS
from train.evaluate import Result, greedy, measure_windows, random
from train.ladder.markets import Pair, leaking_features, synthetic_pair, trap_pair
from train.ladder.references import Ridge, best_of_single_bars, choose_thresholds, follow
from train.policies import single_carry
from train.ppo.config import Config, ParamArgs
from train.ppo.environment import wrap_market
from train.ppo.run import make_ppo
from train.state import Learner

KEY = 1_000_003
"""Seeds the random policy; the windows themselves are fixed."""

Figures = dict[str, float]
Learn = Callable[[PerpEnv, Config], Learner]


class Run(NamedTuple):
    """One rung with one seed."""

    config: Config
    learn: Learn
    earlier: Figures
    """Figures of the rung to compare with, same seed."""


class Check(NamedTuple):
    """The range that a figure of every seed must lie in."""

    figure: str
    says: str
    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True)
class Rung:
    """One thing a trainer must be able to do."""

    name: str
    asks: str
    config: Config
    measure: Callable[[Run], Figures]
    checks: tuple[Check, ...]
    after: str | None = None
    """Name of the rung to compare with, which runs before."""


class Verdict(NamedTuple):
    """A check on all seeds of a rung."""

    rung: str
    check: Check
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def seeds_passed(self) -> int:
        """Number of seeds within the range."""
        return sum(self.check.low <= x <= self.check.high for x in self.values)

    @property
    def passed(self) -> bool:
        """Whether the check holds. NaN never does."""
        return self.seeds_passed == len(self.values)


def judge(rung: Rung, figures: list[Figures]) -> list[Verdict]:
    """Judge each check of a rung on the figures of every seed."""
    return [Verdict(rung.name, check, tuple(f[check.figure] for f in figures)) for check in rung.checks]


def measure_martingale(run: Run) -> Figures:
    """Compare the turnover of the greedy policy with that of the random one."""
    pair = synthetic_pair("martingale", run.config.seed)
    env, result = _train_and_play(run, pair)
    chance = measure_windows(env, random(env), jax.random.key(KEY))
    figures = _describe(result, run.config)
    return figures | {"share_of_random": figures["turnover"] / _describe(chance, run.config)["turnover"]}


def measure_signal(run: Run) -> Figures:
    """Compare the greedy policy with thresholds on an estimate of the drift, and on the drift itself."""
    pair = synthetic_pair("signal", run.config.seed)
    env, result = _train_and_play(run, pair)
    train_env = wrap_market(pair.train, run.config)
    first, last = int(pair.train.segments.first[0]), int(pair.train.segments.last[0])
    features = [np.asarray(m.features, np.float64) for m in (pair.train, pair.unseen)]
    ridge = Ridge(features[0][first : last + 1], pair.drift[0][first : last + 1])
    estimates = {"causal": [ridge.predict(x) for x in features], "oracle": [np.append(d, 0.0) for d in pair.drift]}
    earned = {}
    for name, (fitted_on, unseen) in estimates.items():
        thresholds = choose_thresholds(train_env, fitted_on, SignalParameters.drift)
        earned[name] = _log_return(measure_windows(env, follow(unseen, *thresholds), jax.random.key(KEY)))
    figures = _describe(result, run.config)
    return figures | earned | {
        "share_of_causal": _share(figures["log_return"], earned["causal"]),
        "causal_of_oracle": _share(earned["causal"], earned["oracle"]),
    }  # fmt: skip


def measure_leak(run: Run) -> Figures:
    """Compare the greedy policy with the best policy that knows the bar's return; audit the features."""
    pair = synthetic_pair("martingale", run.config.seed, leaking_features)
    env, result = _train_and_play(run, pair)
    leaked = np.asarray(pair.unseen.features[:, -1], np.float64)
    best = best_of_single_bars(env, leaked) * run.config.env.episode_length
    figures = _describe(result, run.config)
    return figures | {
        "best": best,
        "share_of_best": figures["log_return"] / best,
        "misjudged": float(len(_accused_columns() ^ {"next_return"})),
    }


@functools.cache
def _accused_columns() -> set[str]:
    """Names of the columns that the audit accuses; run once for all seeds."""
    tables = synthetic_tables("martingale")
    return set(audit_features(leaking_features, tables.candles, tables.funding).accused)


def measure_costs(run: Run) -> Figures:
    """Compare the turnover at doubled costs with that of the same seed on `signal`."""
    _, result = _train_and_play(run, synthetic_pair("signal", run.config.seed))
    figures = _describe(result, run.config)
    return figures | {"share_of_turnover": _share(figures["turnover"], run.earlier["turnover"])}


def measure_ruin(run: Run, bars: int = YEAR_BARS) -> Figures:
    """Measure the share of windows that end in ruin, and the return as a share of that of the gifts alone.

    Args:
      bars: of each market.
    """
    pair = trap_pair(run.config.seed, bars)
    env, result = _train_and_play(run, pair)
    gifts = np.asarray(pair.unseen.features[:, 0])
    safe = measure_windows(env, follow(gifts, 0.5, 0.5), jax.random.key(KEY))
    ruined = result.returns <= run.config.params.ruin_fraction - 1
    earned, gift = _log_return(result), _log_return(safe)
    return {"log_return": earned, "gifts": gift, "share_of_gifts": _share(earned, gift), "ruined": float(ruined.mean())}


def _train_and_play(run: Run, pair: Pair) -> tuple[PerpEnv, Result]:
    """Learn on one market; return the other one and the greedy policy's windows on it."""
    learner = run.learn(wrap_market(pair.train, run.config), run.config)
    env, policy = wrap_market(pair.unseen, run.config), make_ppo(run.config).policy
    return env, measure_windows(env, greedy(learner, policy), jax.random.key(KEY), carry=single_carry(policy))


def _share(part: float, whole: float) -> float:
    """`part / whole`, and 0 where the whole is 0."""
    return part / whole if whole else 0.0


def _log_return(result: Result) -> float:
    return float(np.log1p(result.returns).mean())


def _describe(result: Result, config: Config) -> Figures:
    """Means over windows: log return, traded notional as a multiple of initial equity, lots opened."""
    turnover = result.fees.mean() / config.params.taker_fee
    return {"log_return": _log_return(result), "turnover": float(turnover), "trades": float(result.trades.mean())}


_SINGLE = ParamArgs(max_hold=1)
_DOUBLED = ParamArgs(**{
    name: 2 * getattr(ParamArgs(), name) for name in ("taker_fee", "slippage_base", "slippage_atr")
})  # fmt: skip
_TRAP = ParamArgs(
    max_hold=1, max_exposure=1.0, max_leverage=1.0, ruin_fraction=0.95,
    taker_fee=0.0, slippage_base=0.0, slippage_atr=0.0,
)  # fmt: skip
STEPS = 6_000_000
"""Environment steps of a run."""


@functools.cache
def all_rungs() -> tuple[Rung, ...]:
    """Return all rungs, in order. (A function, because a `Config` checks its numbers on the device.)"""
    return (
        Rung(
            "martingale",
            "where prices are unpredictable, does it stay out?",
            Config(total_steps=STEPS),
            measure_martingale,
            (
                Check("log_return", "log return a week", low=-0.001),
                Check("share_of_random", "turnover, of a random policy's", high=0.02),
            ),
        ),
        Rung(
            "signal",
            "does it find the drift in the features?",
            Config(total_steps=STEPS),
            measure_signal,
            (
                Check("share_of_causal", "return, of the best causal policy's", low=0.8),
                Check("causal_of_oracle", "best causal, of the oracle's return", low=0.6, high=0.85),
            ),
        ),
        Rung(
            "leak",
            "does it find a feature from the future, and does the audit?",
            # No lot outlives its bar, so later rewards do not count: gamma 0. The best order is a sharp function of the
            # leak and of volatility: many small minibatches, and no noise on the features.
            Config(total_steps=STEPS, gamma=0.0, obs_noise=0.0, num_minibatches=64, params=_SINGLE),
            measure_leak,
            (
                Check("share_of_best", "return, of the best possible", low=0.9),
                Check("misjudged", "columns the audit misjudges", high=0.0),
            ),
        ),
        Rung(
            "costs",
            "does it trade less where trading costs twice as much?",
            Config(total_steps=STEPS, params=_DOUBLED),
            measure_costs,
            (
                Check("share_of_turnover", "turnover, of that at simple costs", high=0.9),
                Check("log_return", "log return a week", low=0.03),
            ),
            after="signal",
        ),
        Rung(
            "ruin",
            "does it see that no reward comes after ruin?",
            # Returns of traps are noisy: short sums of them, and many small updates.
            Config(
                total_steps=3_000_000,
                num_envs=1024,
                gae_lambda=0.8,
                obs_noise=0.0,
                params=_TRAP,
                env=EnvConfig(episode_length=64),
            ),
            measure_ruin,
            (
                Check("ruined", "windows ruined", high=0.02),
                Check("share_of_gifts", "return, of the gifts'", low=0.95),
            ),
        ),
    )
