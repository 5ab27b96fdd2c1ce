"""The policy played anew under other costs, other rules for ambiguous candles, and from other first bars."""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float

from perpjax import EnvParams, PerpEnv
from perpjax._grid import BAR_MS
from perpjax.params import RANGES, Intrabar
from perpjax.rollout import Act
from train.evaluate.account import Segment, find_segments, play_curves

COSTS = ("taker_fee", "slippage_base", "slippage_atr", "stop_depth")
"""Parameters that a stress of costs multiplies."""
FACTORS = (0.0, 2.0, 4.0)
STARTS, BARS_BETWEEN = 32, 12
"""The shifted starts: so many, each 3 hours after the one before."""


class Stress(NamedTuple):
    """The equity of the policy under one change, and without it."""

    name: str
    title: str
    equity: list[Float[np.ndarray, "states"]]
    """Of each account."""
    plain: list[Float[np.ndarray, "states"]]
    """Without the change, of the same program."""
    opened: int
    """Lots of all accounts."""
    ruined: int
    """Accounts that ended in ruin."""


class Shifted(NamedTuple):
    """Accounts that begin later, each by `bars` bars more."""

    bars: int
    returns: Float[np.ndarray, "starts"]
    """Over the bars that all of them trade; mean over the segments that are long enough."""


def play_stresses(env: PerpEnv, act: Act, key: Array) -> tuple[list[Stress], Shifted | None]:
    """Play the policy under every stress, and from shifted starts. Programs compile at the same time.

    Args:
      env: market, parameters and choices; its episode length is not used.
      act: the policy.
      key: of all random numbers.

    Returns:
      The stresses, and None instead of the shifted starts if no segment has four times their bars.
    """
    segments = find_segments(env)
    rules = [rule for rule in get_args(Intrabar) if rule != env.config.intrabar]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        other = [threads.submit(_play_rule, rule, segments, act, key) for rule in rules]
        found, shifted = _play_batch(env, segments, act, key)
        plain = found[0].plain
        for rule, one in zip(rules, other, strict=True):
            found.append(Stress(rule, f"ambiguous candles: {rule}", one.result()[0], plain, *one.result()[1:]))
    return found, shifted


def _play_batch(env: PerpEnv, segments: Sequence[Segment], act: Act, key: Array) -> tuple[list[Stress], Shifted | None]:
    names = [("plain", ""), *((f"costs x {k:g}", f"fees and slippage times {k:g}") for k in FACTORS)]
    names.append(("one bar later", "every decision one bar later"))
    params = _multiply_costs(env.params, [1.0, *FACTORS, 1.0], STARTS)
    late = np.arange(len(names) + STARTS) == len(names) - 1
    curves, shifted = [], []
    for i, segment in enumerate(segments):
        shifts = np.arange(STARTS) * BARS_BETWEEN
        length = segment.last - segment.first + 1
        if length < 4 * shifts[-1]:
            shifts = np.zeros_like(shifts)
        starts = segment.first + np.concatenate([np.zeros(len(names), int), shifts])
        played = play_curves(
            segment.env, act, jax.random.fold_in(key, i), starts, length, params=params, late=jnp.asarray(late)
        )
        curves.append(played)
        if shifts.any():
            paths = played.equity[:, len(names) :]
            shifted.append(paths[-1] / np.maximum(paths[shifts[-1]], 1e-9) - 1)
    plain, found = [c.equity[:, 0] for c in curves], []
    for k, (name, title) in enumerate(names[1:], 1):
        opened, ruined = (sum(int(getattr(c, kind)[k]) for c in curves) for kind in ("opened", "ruined"))
        found.append(Stress(name, title, [c.equity[:, k] for c in curves], plain, opened, ruined))
    return found, Shifted(BARS_BETWEEN, np.mean(shifted, axis=0)) if shifted else None


def _play_rule(rule: Intrabar, segments: Sequence[Segment], act: Act, key: Array) -> tuple[list[np.ndarray], int, int]:
    """The equity of each account under another rule, its lots, and the accounts that were ruined."""
    curves = []
    for i, segment in enumerate(segments):
        env = dataclasses.replace(segment.env, config=dataclasses.replace(segment.env.config, intrabar=rule))
        length = segment.last - segment.first + 1
        curves.append(play_curves(env, act, jax.random.fold_in(key, i), np.asarray([segment.first]), length))
    opened, ruined = (sum(int(getattr(c, kind)[0]) for c in curves) for kind in ("opened", "ruined"))
    return [c.equity[:, 0] for c in curves], opened, ruined


def _multiply_costs(params: EnvParams, factors: Sequence[float], others: int) -> EnvParams:
    """Return parameters of one row for each factor, and of so many other rows with the costs as they are."""
    scale = jnp.asarray([*factors, *[1.0] * others], jnp.float32)
    rows = {name: jnp.broadcast_to(getattr(params, name), scale.shape) for name in RANGES}
    for name in COSTS:
        rows[name] = jnp.minimum(rows[name] * scale, RANGES[name][2])
    return params.replace(**rows)


def cost_arithmetic(lots: pa.Table) -> dict[str, float]:
    """Return the net of the recorded lots with k times their fees and slippage, by k, quote.

    Size, stops and later trades stay as they were; `play_stresses` changes them, too.
    """
    total = {name: float(np.sum(lots[name].to_numpy())) for name in ("net", "fees", "slippage")}
    paid = total["fees"] + total["slippage"]
    return {f"{k:g}": total["net"] - (k - 1) * paid for k in (0.0, 1.0, 2.0, 4.0)}


def first_moves(lots: pa.Table) -> tuple[Float[np.ndarray, "lots"], Float[np.ndarray, "lots"]]:
    """Return the signed move over the first candle, basis points, and the UTC day of each lot's entry."""
    days = lots["entry_time"].cast(pa.int64()).to_numpy() // (96 * BAR_MS)
    return 1e4 * lots["first_move"].to_numpy(), days
