"""Does the environment look ahead? The same actions are played in markets that differ only from one bar on."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from perpjax._describe import format_time
from perpjax.audit.report import Audit, Item, Movement
from perpjax.data.seeds import check_seed
from perpjax.env import PerpEnv
from perpjax.instrument import EXACT
from perpjax.market import Market
from perpjax.rollout import Act, Carry
from perpjax.rules.orders import sample_action
from perpjax.state import State
from perpjax.vec import AutoReset, Env, VecEnv, unwrapped

BEFORE, AFTER = 48, 24
"""Decisions from the earliest start to the cut, and from there to the end of play."""

ALTERATIONS = {"perturbed": 1, "shuffled": 1, "perturbed, its own open included": 0}
"""Kinds of alteration, each with the number of rows from the cut to the first altered features and ATR.

Candles always differ from the cut on. In the third kind features and ATR of the cut's own open differ too. Only the
observation and the reward there may depend on them, never the account. This finds an ATR that is used a bar early.
"""
_OBSERVED = ("obs", "reward")


def audit_env(
    env: Env,
    *,
    policy: Act | None = None,
    carry: Carry = (),
    cuts: Sequence[int] | None = None,
    num_envs: int = 32,
    seed: int = 0,
) -> Audit:
    """Judge every leaf of the environment's `State`: are its bits up to T_t independent of the market after T_t?

    Args:
      env: a `PerpEnv`, or a dataclass with its `reset`, `step`, `market` and `config` that `replace` can copy.
        A wrapper around it holds it in the field `env`. An `AutoReset` or a `VecEnv` is ignored, because a restart
        moves the clock. Other wrappers are audited with the environment.
      policy: `(key, state, carry)` to `(action, carry)`, the same in every market. Uniformly random by default.
      carry: the policy's memory at the start of an episode.
      cuts: bars t from which the market is altered. By default the last tradable bar and five drawn bars.
      num_envs: episodes in each market. They start from 48 bars before the cut up to the cut itself.

    Returns:
      One item for each leaf. `movement.bar` is the first decision at which it differed. A remark says if nothing
      differed even after the cut, or if no lot was opened before it. The audit then tested nothing.

    Raises:
      ValueError: a cut is not tradable, there are no environments, or the seed is negative.
    """
    rng, world = np.random.default_rng(check_seed(seed)), unwrapped(env, AutoReset, VecEnv)
    env = unwrapped(env)
    cuts = _draw_cuts(env, rng) if cuts is None else list(cuts)
    env.check_start(np.asarray(cuts))
    if num_envs < 1:
        raise ValueError(f"num_envs = {num_envs} is not positive")
    act = policy or (lambda key, state, carry: (sample_action(key, env.config), carry))
    play = _compile_play(world, act, carry, min(BEFORE, env.config.episode_length) + AFTER)
    found: dict[str, Item] = {}
    opened, reacts, names = 0, False, ()
    for cut in cuts:
        starts, key = _spread_starts(env, cut, num_envs), jax.random.key(int(rng.integers(2**31)))
        base = _leaves(play(env.market, starts, key))
        decisions = starts + np.arange(len(base["t"]))[:, None]
        names, known = tuple(base), decisions <= cut
        opened += int(base["account.ledger.opened"][known].sum())
        for alteration in ALTERATIONS:
            other = _leaves(play(alter_market(env.market, cut, alteration, rng), starts, key))
            reacts |= bool((base["equity"] != other["equity"])[~known].any())
            for name in names:
                until = cut - (name in _OBSERVED and ALTERATIONS[alteration] == 0)
                moved = _differs(base[name], other[name]) & (decisions <= until)[..., None]
                if moved.any():
                    movement = _describe(env, base[name], other[name], moved, decisions, cut, alteration)
                    if name not in found or found[name].movement.ahead < movement.ahead:
                        found[name] = Item(name, "accused", _name_entries(moved), movement)
    remarks = []
    if not opened:
        remarks.append("no lot was opened before any cut: the effect of orders was not tested")
    if not reacts:
        remarks.append("equity never differed after a cut either: the audit tested nothing")
    return Audit(
        subject=type(world).__name__,
        bars=env.market.num_bars,
        seed=seed,
        comparisons=len(cuts) * len(ALTERATIONS),
        items=tuple(found.get(name, Item(name, "clean")) for name in names),
        remarks=tuple(remarks),
    )


def alter_market(market: Market, cut: int, alteration: str, rng: np.random.Generator) -> Market:
    """Return the market with other candles, funding, features and ATR from bar `cut` on. Every row stays well-formed.

    Args:
      alteration: a key of `ALTERATIONS`.
    """
    k, late = market.candles_per_bar, cut + ALTERATIONS[alteration]
    candles, atr, features = (np.array(x) for x in (market.candles, market.atr, market.features))
    future = candles[cut:]
    n = len(future)
    prices = future[:, : -k - 3].reshape(n, -1, 4, k)  # the last price, then the mark if there is one
    if alteration == "shuffled":
        order, later = rng.permutation(n), late + rng.permutation(len(atr) - late)
        prices, valid, rate = prices[order], future[order, -k - 3 : -3], future[order, -3]
        atr[late:], features[late:] = atr[later], features[later]
    else:
        prices = np.clip(np.round(prices * np.exp(rng.uniform(-1, 1, (n, 1, 1, k)))), 1, EXACT)
        valid = rng.random((n, k)) < 0.9
        rate = rng.uniform(-0.01, 0.01, n) * (rng.random(n) < 0.2)
        rate[0] = rng.uniform(-1e-4, 1e-4)  # a rule that charges funding a bar early fails at every cut
        atr[late:] = np.maximum(1, np.round(atr[late:] * np.exp(rng.uniform(-1, 1, len(atr) - late))))
        drawn = rng.normal(size=features[late:].shape)
        features[late:] = np.asarray(market.scaler_mean) + np.asarray(market.scaler_scale) * drawn
    _repeat_last_close(prices[:, 0], valid > 0, candles[cut - 1, 4 * k - 1])
    future[:, : -k - 3], future[:, -k - 3 : -3] = prices.reshape(n, -1), valid
    future[:, -3], future[:, -2] = rate, prices[:, -1, 0, 0]
    future[1:, -1] = prices[:-1, -1, 3, -1]  # mark close of the bar before; that of bar cut - 1 is known
    return market.with_columns(candles, atr, features)


def _repeat_last_close(last: np.ndarray, valid: np.ndarray, before: float) -> None:
    """Set the four prices of invalid candles to the last valid close, in place; last [n, 4, K], valid [n, K]."""
    row = np.maximum.accumulate(np.where(valid.ravel(), np.arange(valid.size), -1))
    close = np.where(row >= 0, last[:, 3].ravel()[row], before).reshape(valid.shape)
    last[:] = np.where(valid[:, None], last, close[:, None])


def replace_inner(env: Env, **changes: Any) -> Env:
    """The environment with other fields of the one inside all of its wrappers."""
    changes = {"env": replace_inner(env.env, **changes)} if hasattr(env, "env") else changes
    return dataclasses.replace(env, **changes)


def _compile_play(env: Env, act: Act, carry: Carry, steps: int) -> Callable[..., State]:
    """Return a function from `(market, starts, key)` to all states, [1 + steps, envs]: one program for all markets."""

    @jax.jit
    def play(market: Market, starts: Array, key: Array) -> State:
        world = replace_inner(env, market=market)

        def advance(loop: tuple[State, Carry], key: Array) -> tuple[tuple[State, Carry], State]:
            state, carry = loop
            keys = jax.random.split(key, starts.shape[0])
            action, carry = jax.vmap(act)(keys, state, carry)
            state = jax.vmap(world.step)(state, action)
            return (state, carry), state

        first = jax.vmap(world.reset)(jax.random.split(key, starts.shape[0]), starts)
        carries = jax.tree.map(lambda x: jnp.broadcast_to(x, (*starts.shape, *jnp.shape(x))), carry)
        states = jax.lax.scan(advance, (first, carries), jax.random.split(key, steps))[1]
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, states)

    return play


def _draw_cuts(env: PerpEnv, rng: np.random.Generator) -> list[int]:
    """Draw five bars with room for the starts before them, if there is any, and add the last tradable bar."""
    firsts, lasts = (np.asarray(x) for x in (env.market.segments.first, env.market.segments.last))
    bars = np.concatenate([np.arange(min(a + BEFORE, b), b + 1) for a, b in zip(firsts, lasts, strict=True)])
    return [*rng.choice(bars, 5).tolist(), int(lasts[-1])]


def _spread_starts(env: PerpEnv, cut: int, count: int) -> np.ndarray:
    """Return first bars from 48 bars, or one shorter episode, before the cut up to the cut, inside its segment."""
    segments = jax.tree.map(np.asarray, env.market.segments)
    first = segments.first[(segments.first <= cut) & (cut <= segments.last)].max()
    back = np.linspace(min(BEFORE, env.config.episode_length), 0, count).round().astype(np.int32)
    return np.maximum(cut - back, first).astype(np.int32)


def _leaves(states: State) -> dict[str, np.ndarray]:
    """Return every leaf by its path: random keys as their data."""
    named: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(states):
        data = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        named[jax.tree_util.keystr(path, simple=True, separator=".")] = np.asarray(data)
    return named


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where the bits differ, [decisions, environments, entries]."""
    bits = f"u{a.dtype.itemsize}"
    return (a.view(bits) != b.view(bits)).reshape(*a.shape[:2], -1)


def _describe(
    env: PerpEnv, a: np.ndarray, b: np.ndarray, moved: np.ndarray, decisions: np.ndarray, cut: int, alteration: str
) -> Movement:
    a, b = (x.astype(np.float64).reshape(moved.shape) for x in (a, b))
    bar, spread = int(decisions[moved.any(axis=-1)].min()), float(a.std())
    amount = float(np.abs(a - b)[moved].max())
    amount = amount if np.isfinite(amount) else None
    return Movement(
        bar=bar,
        time=format_time(env.market.open_time_ms(bar)),
        cut=cut,
        ahead=max(1, cut + ALTERATIONS[alteration] - bar),
        alteration=alteration,
        rows=int(moved.any(axis=-1).sum()),
        amount=amount,
        spreads=None if amount is None or spread == 0 else amount / spread,
    )


def _name_entries(moved: np.ndarray) -> tuple[str, ...]:
    """Name the moved entries of a leaf with several entries."""
    entries = moved.any(axis=(0, 1)).nonzero()[0]
    return (f"entries {', '.join(map(str, entries))}",) if moved.shape[-1] > 1 else ()
