"""Reference policies: thresholds on an estimate, and the best order of each single bar."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax import PerpEnv, State
from perpjax.rollout import Act, Carry, window_starts
from perpjax.rules.orders import CLOSE, DIRECTIONS, HOLD, LONG, MULTI_DISCRETE, SHORT
from train.evaluate import measure_windows

THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Candidates for `enter` and `leave`, in units of the drift."""
RIDGE = 1e-3
"""Weight of the penalty, relative to the features' variance."""
SIZE, LEVERAGE, STOP, TARGET = 3, 4, 3, 4
"""Indices of a full position: size 1, the highest leverage, stop 3 ATR, target 6 ATR."""
CELLS = (64, 8)
"""Groups of bars in `best_of_single_bars`."""


class Ridge:
    """Ridge regression of a number on the features, standardised by the rows it was fitted on."""

    def __init__(self, features: Float[np.ndarray, "rows F"], target: Float[np.ndarray, "rows"]):
        self.mean, deviation = features.mean(axis=0), features.std(axis=0)
        self.scale = np.where(deviation > 0, deviation, 1.0)
        x, self.offset = self._standardise(features), target.mean()
        penalty = RIDGE * len(x) * np.eye(x.shape[1])
        self.weights = np.linalg.solve(x.T @ x + penalty, x.T @ (target - self.offset))

    def predict(self, features: Float[np.ndarray, "rows F"]) -> Float[np.ndarray, "rows"]:
        """Return the estimate for every row. A missing feature counts as 0 before it is standardised."""
        return self._standardise(np.nan_to_num(features)) @ self.weights + self.offset

    def _standardise(self, features: np.ndarray) -> np.ndarray:
        return np.clip((np.asarray(features, np.float64) - self.mean) / self.scale, -10, 10)


def follow(estimate: Float[np.ndarray, "rows"], enter: float, leave: float) -> Act:
    """Return a policy that holds at most one full position.

    It enters where the estimate is beyond `enter`. It closes where the estimate times the side held is under `leave`.

    Args:
      estimate: of the return of bar t, in row t.
      enter, leave: thresholds, in units of the estimate.
    """
    return jax.tree_util.Partial(_follow, *(jnp.asarray(x, jnp.float32) for x in (estimate, enter, leave)))


def _follow(
    estimate: Array, enter: Array, leave: Array, key: Array, state: State, carry: Carry
) -> tuple[Int[Array, "5"], Carry]:
    value, side = estimate[state.t], state.account.lots.side.sum()
    opens = jnp.where(value > enter, LONG, jnp.where(value < -enter, SHORT, HOLD))
    closes = jnp.where(value * side < leave, CLOSE, HOLD)
    direction = jnp.argmax(jnp.asarray(DIRECTIONS) == jnp.where(side == 0, opens, closes))
    return jnp.stack([direction, SIZE, LEVERAGE, STOP, TARGET]).astype(jnp.int32), carry


def choose_thresholds(
    env: PerpEnv, estimate: np.ndarray, unit: float, starts: np.ndarray | None = None
) -> tuple[float, float]:
    """Choose `enter` and `leave` from `THRESHOLDS` times `unit`: the pair with the best mean log return."""
    starts = window_starts(env) if starts is None else starts
    pairs = [(unit * enter, unit * leave) for enter in THRESHOLDS for leave in THRESHOLDS if leave <= enter]

    def earns(pair: tuple[float, float]) -> float:
        return np.log1p(measure_windows(env, follow(estimate, *pair), jax.random.key(0), starts).returns).mean()

    return max(pairs, key=earns)


def best_of_single_bars(env: PerpEnv, known: Float[np.ndarray, "rows"], cells: tuple[int, int] = CELLS) -> float:
    """Return the mean log return a bar of the best policy that knows one number of the next bar, and its ATR.

    With `max_hold` 1 no lot outlives its bar, so the best policy is the best order of each bar. Bars are grouped by the
    known number and the ATR. In each group the order with the highest return in these same bars counts; holding is an
    order too. The figure is therefore slightly above the return of such a policy on held-out bars.

    Args:
      known: of each bar, such as its return.
      cells: groups of bars by `known` in ATRs, and by ATR as a fraction of price.

    Raises:
      ValueError: `max_hold` is not 1.
    """
    if int(env.params.max_hold) != 1:
        raise ValueError(f"max_hold = {int(env.params.max_hold)}: bars are independent only with max_hold = 1")
    (first,), (last,) = np.asarray(env.market.segments.first), np.asarray(env.market.segments.last)
    bars = np.arange(first, last + 1)
    sides = [DIRECTIONS.index(LONG), DIRECTIONS.index(SHORT)]
    levels = (range(MULTI_DISCRETE[3]), range(MULTI_DISCRETE[4]))
    orders = np.array([(side, SIZE, LEVERAGE, *level) for side in sides for level in itertools.product(*levels)])
    earned = np.asarray(_earn(env, jnp.asarray(bars), jnp.asarray(orders, jnp.int32)), np.float64)
    atr = np.asarray(env.market.atr, np.float64)[bars] / np.asarray(env.market.candles, np.float64)[bars, -1]
    move, level = (_rank(x, n) for x, n in zip((known[bars] / atr, atr), cells, strict=True))
    sums = [np.bincount(move * cells[1] + level, weights=x) for x in earned.T]
    return float(np.max(sums, axis=0).clip(min=0).sum() / len(bars))


def _rank(x: np.ndarray, groups: int) -> np.ndarray:
    """Group of each value, 0 .. groups - 1, all of about one size."""
    return np.argsort(np.argsort(x, kind="stable"), kind="stable") * groups // len(x)


@jax.jit
def _earn(env: PerpEnv, bars: Int[Array, "bars"], orders: Int[Array, "orders 5"]) -> Float[Array, "bars orders"]:
    """Log return of each order in each bar, from a fresh account."""

    def bar(t: Int[Array, ""]) -> Float[Array, "orders"]:
        state = env.reset(jax.random.key(0), start=t)
        return jax.vmap(lambda order: env.step(state, order).reward)(orders)

    return jax.lax.map(bar, bars, batch_size=1024)
