"""What the `signal` market pays: the policy that knows the drift, causal ones, hold and random.

    python -m benchmarks.synthetic_policies                       # the default market, seed 0
    python -m benchmarks.synthetic_policies --seeds 0 1 2 3 --parameter drift=0.0006

Every policy holds at most one position: at the open of a bar it enters with full size at the highest leverage
(stop 3 ATR, target 6 ATR) when its estimate of the drift is beyond `enter`, and closes when the estimate,
times the side held, is under `leave`. Both thresholds are those with the best mean return over the training
windows; the table is about windows that were not fitted on.

- `oracle` knows the drift of the bar about to begin.
- `filter` knows the market's parameters and volatility, and turns bar returns into a probability of each state.
- `causal` knows the core features: ridge regression of the drift on them, fitted on the training split.
- `hold` never trades, `random` draws uniform `multi_discrete` actions.
"""

import argparse
import math
from typing import NamedTuple

import jax
import numpy as np

from perpjax import PerpEnv
from perpjax.data import build_market
from perpjax.data.dataset import split_by_fraction
from perpjax.data.synthetic import SignalParameters, Tables, synthetic_tables
from perpjax.data.synthetic_noise import CANDLES_PER_BAR, YEAR_BARS
from perpjax.market import FIRST_DECISION, Market
from train.evaluate import Act, evaluate, hold, random, t_statistic
from train.ladder.references import Ridge, choose_thresholds, follow


class Windows(NamedTuple):
    """What a policy earned in each window."""

    returns: np.ndarray
    """Log return of equity."""
    trades: np.ndarray
    """Positions opened."""
    fees: np.ndarray
    """Fraction of initial equity."""


def play(env: PerpEnv, act: Act, starts: np.ndarray) -> Windows:
    """One window from each of `starts`."""
    result = evaluate(env, act, jax.random.key(0), starts)
    return Windows(np.log1p(result.returns), result.trades, result.fees)


def filter_drift(tables: Tables, p: SignalParameters) -> np.ndarray:
    """Expected drift of bar t given the returns of bars < t, [N + 1]: the forward filter of a Markov chain.

    The chain has the market's states and mean lengths, though its lengths are geometric.
    """
    close = tables.candles["close"].to_numpy()[CANDLES_PER_BAR - 1 :: CANDLES_PER_BAR]
    returns = np.diff(np.log(close), prepend=np.log(tables.candles["open"][0].as_py()))
    drifts, volatility = np.array([-p.drift, 0.0, p.drift]), tables.latent["volatility"]
    end, begin = 1 / p.trend_bars, 1 / p.quiet_bars
    move = np.array([[1 - end, end, 0], [begin / 2, 1 - begin, begin / 2], [0, end, 1 - end]])
    errors = (returns[:, None] - drifts + volatility[:, None] ** 2 / 2) / volatility[:, None]
    likelihood = 1 / (1 + (errors**2) / 8) ** 4.5  # a Student t with 8 degrees: a jump is not a trend
    belief, known = np.array([0.0, 1.0, 0.0]), np.zeros(len(returns) + 1)
    for t, like in enumerate(likelihood, 1):
        belief = (belief * like) @ move
        belief /= belief.sum()
        known[t] = belief @ drifts
    return known


def regress_drift(market: Market, drift: np.ndarray, last: int, unseen: int) -> tuple[np.ndarray, float]:
    """Ridge regression of the drift on the core features, fitted on bars before `last`.

    Returns:
      The estimate [N + 1], and its R^2 on the bars from `unseen` on.
    """
    features, train = np.asarray(market.features, np.float64), slice(FIRST_DECISION, last)
    estimate = Ridge(features[train], drift[train]).predict(features)
    error = np.mean((drift[unseen:] - estimate[unseen:-1]) ** 2)
    return estimate, float(1 - error / np.var(drift[unseen:]))


def measure(seed: int, bars: int, parameters: dict[str, float]) -> dict[str, dict[str, Windows]]:
    """Policy -> split -> windows, of one market; prints the regression's R^2 and the thresholds."""
    tables = synthetic_tables("signal", seed=seed, bars=bars, **parameters)
    p = SignalParameters(**parameters)
    market = build_market(tables.candles, tables.mark, tables.funding, tables.instrument)
    env, drift = PerpEnv(market), tables.latent["drift"]
    length = env.config.episode_length
    splits = split_by_fraction(market, episode_length=length)
    starts = {s.name: np.arange(s.start, s.stop - length + 1, length) for s in splits}
    regression, r2 = regress_drift(market, drift, splits[0].stop, splits[1].start)
    estimates = {"oracle": np.append(drift, 0.0), "filter": filter_drift(tables, p), "causal": regression}
    policies: dict[str, Act] = {}
    for name, estimate in estimates.items():
        enter, leave = choose_thresholds(env, estimate, p.drift, starts["train"])
        print(f"seed {seed}  {name}: enter {enter / p.drift:.1f}, leave {leave / p.drift:.1f} of the drift")
        policies[name] = follow(estimate, enter, leave)
    policies |= {"hold": hold(env), "random": random(env)}
    results = {name: {split: play(env, act, s) for split, s in starts.items()} for name, act in policies.items()}
    print(f"seed {seed}  R^2 of the regression on unseen bars {r2:.2f}")
    return results


def show(value: float, form: str) -> str:
    """The number, or a dash of its width where it has no value."""
    return format(value, form) if math.isfinite(value) else format("-", f">{form.partition('.')[0]}")


def tabulate(results: list[dict[str, dict[str, Windows]]]) -> str:
    """The table: a line for each policy, the windows of all seeds together; last the share of the oracle's."""
    lines = [
        f"{'policy':8} {'split':6} {'windows':>7} {'mean %':>8} {'sd %':>6} "
        f"{'t':>6} {'trades':>7} {'fees %':>7} {'share':>6}"
    ]
    for split in results[0]["oracle"]:
        top = np.concatenate([r["oracle"][split].returns for r in results]).mean()
        for name in results[0]:
            w = Windows(*(np.concatenate(x) for x in zip(*(r[name][split] for r in results), strict=True)))
            mean, t = w.returns.mean(), t_statistic(w.returns)
            deviation = w.returns.std(ddof=1) if len(w.returns) > 1 else math.nan
            lines.append(
                f"{name:8} {split:6} {len(w.returns):7d} {100 * mean:8.2f} {show(100 * deviation, '6.2f')} "
                f"{show(t, '6.1f')} "
                f"{w.trades.mean():7.1f} {100 * w.fees.mean():7.2f} {mean / top:6.2f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bars", type=int, default=YEAR_BARS)
    parser.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE", help="of SignalParameters")
    args = parser.parse_args()
    parameters = {}
    for item in args.parameter:
        name, equals, value = item.partition("=")
        if not equals:
            parser.error(f"--parameter {item}: expected NAME=VALUE, such as drift=0.0006")
        parameters[name] = float(value)
    print(tabulate([measure(seed, args.bars, parameters) for seed in args.seeds]))


if __name__ == "__main__":
    main()
