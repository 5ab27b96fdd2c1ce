"""Accounts over whole segments of a market: one with all its states and actions, or many with their equity."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from perpjax import EnvParams, PerpEnv, VecEnv
from perpjax.rollout import Act, Carry, as_pytree
from perpjax.rules.orders import hold_action
from perpjax.state import State


class Played(NamedTuple):
    """One account from the first to the last bar of a segment, or to its ruin."""

    env: PerpEnv
    """With episodes as long as the segment."""
    states: State
    """[steps + 1, ...] NumPy arrays, without key."""
    actions: Int[np.ndarray, "steps 5"] | Float[np.ndarray, "steps 5"]
    symbol: str
    name: str
    """The symbol, and a number if it has several segments."""

    @property
    def steps(self) -> int:
        """Bars that were played."""
        return len(self.actions)

    def times(self) -> Int[np.ndarray, "rows"]:
        """Return the time of each state, UTC ms: the open of its bar."""
        first = int(self.states.t[0])
        return self.env.market.open_time_ms(first) + 900_000 * (self.states.t - first).astype(np.int64)

    @property
    def tick_value(self) -> float:
        """Quote currency of one tick for one step, exact."""
        instruments, row = self.env.market.instruments, int(self.states.instrument[0])
        return math.prod(float(exact_decimals(getattr(instruments, x)[row])) for x in ("tick_size", "step_size"))

    def notional(self) -> Float[np.ndarray, "rows"]:
        """Return the signed notional at entry of the lots held in each state, quote currency."""
        lots = self.states.account.lots
        side, quantity, entry = (getattr(lots, x).astype(np.float64) for x in ("side", "quantity", "entry"))
        return (side * quantity * entry).sum(axis=1) * self.tick_value


def exact_decimals(number: ArrayLike) -> Float[np.ndarray, "..."]:
    """Return float32 numbers as the shortest decimals that round to them: 0.01, not 0.0099999998."""
    host = np.asarray(number, np.float32)
    return np.array([float(str(x)) for x in host.ravel()]).reshape(host.shape)


class Segment(NamedTuple):
    """A stretch of a market that one account plays."""

    name: str
    symbol: str
    first: int
    """First decision bar."""
    last: int
    """Last bar that may be stepped."""
    env: PerpEnv
    """With episodes at least as long as the segment. A few lengths serve all segments, so few programs are compiled."""


def find_segments(env: PerpEnv) -> list[Segment]:
    """Return the segments of the environment's market, in their order."""
    segments = jax.tree.map(np.asarray, env.market.segments)
    spans = list(zip(segments.first.tolist(), segments.last.tolist(), strict=True))
    rows = [origin.row for origin in env.market.origins]
    symbols = [env.market.origins[max(k for k, row in enumerate(rows) if row <= first)].symbol for first, _ in spans]
    longest = max(last - first + 1 for first, last in spans)
    found = []
    for i, ((first, last), symbol) in enumerate(zip(spans, symbols, strict=True)):
        length = longest
        while length // 2 >= last - first + 1:
            length //= 2
        whole = dataclasses.replace(env, config=dataclasses.replace(env.config, episode_length=length))
        number = sum(other == symbol for other in symbols[: i + 1])
        name = f"{symbol} {number}" if symbols.count(symbol) > 1 else symbol
        found.append(Segment(name, symbol, first, last, whole))
    return found


def play_account(env: PerpEnv, act: Act, key: Array) -> list[Played]:
    """Play one account over each segment of the environment's market.

    Args:
      env: the market, parameters and choices; its episode length is not used.
      act: the policy. Each account begins with `act.initial_carry()`, if there is such a method.
      key: of all random numbers.
    """
    function, carry = as_pytree(act)
    played = []
    for i, (name, symbol, first, _, whole) in enumerate(find_segments(env)):
        states, actions = _play(whole, function, jax.random.fold_in(key, i), jnp.int32(first), carry)
        steps = count_steps(states)
        states = jax.tree.map(lambda x, n=steps: np.asarray(x)[: n + 1], states)
        played.append(Played(whole, states, np.asarray(actions)[:steps], symbol, name))
    return played


def count_steps(states: State) -> int:
    """Return the steps up to the first state that is over, or all of them."""
    over = np.asarray(states.terminated | states.truncated)
    return int(np.argmax(over)) if over.any() else len(over) - 1


@jax.jit
def _play(env: PerpEnv, act: Act, key: Array, start: Array, carry: Carry) -> tuple[State, Array]:
    """All states of the longest episode, the first included, and its actions."""
    first = env.reset(key, start)

    def step(loop: tuple, key: Array) -> tuple:
        state, carry = loop
        action, carry = act(key, state, carry)
        state = env.step(state, action)
        return (state, carry), (state.replace(key=None), action)

    keys = jax.random.split(key, env.config.episode_length)
    _, (states, actions) = jax.lax.scan(step, (first, carry), keys)
    states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first.replace(key=None), states)
    return states, actions


class Curves(NamedTuple):
    """The equity of several accounts over the same bars; an account begins at its own first bar."""

    equity: Float[np.ndarray, "states accounts"]
    opened: Int[np.ndarray, "accounts"]
    """Lots."""
    ruined: Bool[np.ndarray, "accounts"]


def play_curves(
    env: PerpEnv,
    act: Act,
    key: Array,
    starts: Int[np.ndarray, "accounts"],
    length: int,
    *,
    params: EnvParams | None = None,
    late: Bool[np.ndarray, "accounts"] | None = None,
) -> Curves:
    """Play a batch of accounts up to the end of a segment, and keep their equity.

    Args:
      env: of `find_segments`.
      act: as in `play_account`.
      key: of all random numbers. All accounts have the same, so that they differ by nothing else.
      starts: first bars, of one segment. Before its first bar an account has its initial equity.
      length: bars from the earliest first bar to the segment's end.
      params: instead of the environment's: numbers, or fields [accounts].
      late: accounts that act one bar late.
    """
    function, carry = as_pytree(act)
    env, first = dataclasses.replace(env, params=params or env.params), int(starts.min())
    late = jnp.zeros(len(starts), bool) if late is None else jnp.asarray(late)
    played = _play_curves(env, function, key, jnp.asarray(starts), carry, late)
    equity, opened, over = jax.tree.map(np.asarray, played)
    curves = np.repeat(equity[:1], length + 1, axis=0).astype(np.float64)
    for i, start in enumerate(starts - first):
        curves[start:, i] = equity[: length + 1 - start, i]
    return Curves(curves, opened, over)


@jax.jit
def _play_curves(env: PerpEnv, act: Act, key: Array, starts: Array, carry: Carry, late: Array) -> tuple:
    n, envs = starts.shape[0], VecEnv(env)
    first = envs.reset(jax.random.split(key, n), starts)

    def step(loop: tuple, key: Array) -> tuple:
        state, carry, before = loop
        action, carry = jax.vmap(act, (None, envs.axes(state), 0))(key, state, carry)
        state = envs.step(state, jnp.where(late[:, None], before, action))
        return (state, carry, action), state.equity

    carry = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), carry)
    loop = first, carry, jnp.broadcast_to(hold_action(env.config), (n, 5))
    (last, *_), equity = jax.lax.scan(step, loop, jax.random.split(key, env.config.episode_length))
    return jnp.concatenate([first.equity[None], equity]), last.account.ledger.opened, last.terminated
