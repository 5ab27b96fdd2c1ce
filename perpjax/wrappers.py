"""Auto-reset and episode statistics."""

import dataclasses
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import end_kernel, where_rows
from perpjax.orders import ActionLike, to_array
from perpjax.state import Ledger, Lots, State

T = TypeVar("T")


class Env(Protocol):
    """What a wrapper wraps: `PerpEnv`, or another wrapper with its `reset` and `step`.

    The innermost one may have a `liquidation_value(state)`; without it an episode's is its equity.
    """

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> State: ...

    def step(self, state: State, action: ActionLike) -> State: ...


@pytree
class Episode:
    """The episode that the last step belonged to; on the step that ends it, the whole of it."""

    return_: Float[Array, ""]
    """Sum of rewards."""
    length: Int[Array, ""]
    """Bars."""
    equity: Float[Array, ""]
    """After the last step, quote."""
    liquidation_value: Float[Array, ""]
    """`PerpEnv.liquidation_value` of the state that ended it, quote; before that the same as `equity`."""
    peak: Float[Array, ""]
    """Highest equity so far, quote."""
    max_drawdown: Float[Array, ""]
    """Largest fall from a peak, as a fraction of it."""
    ledger: Ledger


@pytree
class EpisodeState(State):
    """A `State` with what an auto-reset would otherwise lose."""

    final_obs: Float[Array, "observation"]
    """What the step observed, before any reset: bootstrap from it where `truncated`."""
    episode: Episode
    resets: Int[Array, ""]
    """Episodes begun after the first; with `key` it says where the next one starts."""


@pytree
class AutoReset:
    """Starts a new episode in the step that ends one.

    That step returns the fresh episode's state, with the finished step's `reward`, `terminated` and `truncated`;
    `final_obs` and `episode` are the finished one's. The next step clears both flags before it moves on.
    """

    env: Env

    def step(self, state: EpisodeState, action: ActionLike) -> EpisodeState:
        """As the wrapped environment's `step`; never absorbed."""
        started = state.terminated | state.truncated
        no = jnp.zeros_like(started)
        # A GPU reads equity and flags here, and need not keep them while it writes the new ones.
        started, peak = end_kernel((started, jnp.where(started, state.equity, state.episode.peak)))
        stepped = self.env.step(_plain(state, terminated=no, truncated=no), action)
        done = stepped.terminated | stepped.truncated
        resets = state.resets + done
        fresh, liquidation_value = _reset_if(done, self.env, _plain(stepped), resets)
        episode = _follow(state.episode, peak, stepped, started, liquidation_value)
        return own_buffers(EpisodeState(**vars(fresh), final_obs=stepped.obs, episode=episode, resets=resets))

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> EpisodeState:
        """As the wrapped environment's `reset`, with an empty episode."""
        state = self.env.reset(key, start)
        zero, equity = jnp.zeros_like(state.equity), state.equity
        episode = Episode(zero, jnp.zeros_like(state.t), equity, equity, equity, zero, state.account.ledger)
        state = EpisodeState(**vars(state), final_obs=state.obs, episode=episode, resets=jnp.zeros_like(state.t))
        return own_buffers(state)


@pytree
class VecEnv:
    """Many environments at once: `jax.vmap`, but with the batch of lots and counts on the last axis.

    So `state.account.lots` has fields of [lots, num_envs] and `ledger.counts` is [counts, num_envs], where a plain
    `jax.vmap(env.step)` has [num_envs, lots] and [num_envs, counts]; all else is the same, the ledger's properties too.
    Numbers of one kind side by side are what vector units and a GPU's threads read; those of a plain batch a CPU copies
    in every step. `one` gives the state of a single environment, `by_row` that of a plain batch. A `VecEnv` is not
    wrapped again: for more axes `jax.vmap` its `step`.
    """

    env: Env

    def step(self, state: State, action: ActionLike) -> State:
        """As the wrapped environment's `step`, of many states and of actions [num_envs, 5].

        Raises:
          ValueError: if the state lies by row, as a plain `jax.vmap` or `by_row` leaves it, or if there is not one
            action for each environment.
        """
        _refuse_rows(state)
        actions = to_array(action)
        if actions.shape[:1] != state.t.shape:
            raise ValueError(f"actions of shape {actions.shape} for {state.t.shape[0]} environments; give one to each")
        state = _with_axis(state, -1)
        axes = self.axes(state)
        return _with_axis(jax.vmap(self.env.step, (axes, 0), axes)(state, actions), -2)

    def reset(self, key: Array, start: Int[Array, "num_envs"] | None = None) -> State:
        """As the wrapped environment's `reset`, with a key for each environment, and a first bar if any is given."""
        starts = () if start is None else (start,)
        one = jax.eval_shape(self.env.reset, *jax.tree.map(lambda x: x[0], (key, *starts)))
        return _with_axis(jax.vmap(self.env.reset, out_axes=self.axes(one))(key, *starts), -2)

    @staticmethod
    def axes(state: T) -> T:
        """The batch axis of every array of a state of many environments, or of a part of it; for `jax.vmap`."""

        def of(part: Any) -> Any:
            if isinstance(part, Lots):
                return jax.tree.map(lambda _: -1, part)
            return jax.tree.map(lambda _: 0, part).replace(counts=-1) if isinstance(part, Ledger) else 0

        return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, Lots | Ledger))

    @staticmethod
    def one(state: T, i: int | Int[Array, ""]) -> T:
        """The state of environment i, as the wrapped environment knows it.

        `state.account.lots.entry[i]` is another thing: slot i of every environment.

        Raises:
          IndexError: if i is not one of the environments.
          ValueError: if the state lies by row: there row i is `jax.tree.map(lambda x: x[i], state)`.
        """
        state = VecEnv.by_row(state)
        num_envs = len(jax.tree.leaves(state)[0])
        if not isinstance(i, jax.core.Tracer) and not -num_envs <= i < num_envs:
            raise IndexError(f"environment {i} is not one of {num_envs}")
        return jax.tree.map(lambda x: x[i], state)

    @staticmethod
    def by_row(state: T) -> T:
        """The state, or a part of it, as a plain `jax.vmap` has it: everything of environment i in row i.

        It may be stacked: axes before these, of steps or of devices, stay where they are.

        Raises:
          ValueError: if the state lies by row already.
        """
        _refuse_rows(state)
        axes = VecEnv.axes(state)
        return _with_axis(jax.tree.map(lambda axis, x: x if axis == 0 else x.swapaxes(-2, -1), axes, state), -1)


def unwrapped(env: Env, *kinds: type) -> Env:
    """The environment without its wrappers of these kinds, at any depth; without any wrapper if no kind is named.

    A wrapper is a dataclass that holds the environment it wraps in the field `env`.
    """
    if not hasattr(env, "env"):
        return env
    inner = unwrapped(env.env, *kinds)
    if not kinds or isinstance(env, kinds):
        return inner
    return env if inner is env.env else dataclasses.replace(env, env=inner)


def _refuse_rows(state: Any) -> None:
    """Raise if a ledger in the state says that it lies by row."""
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Ledger))
    if any(isinstance(part, Ledger) and part.counts_axis == -1 for part in parts):
        raise ValueError("this state lies by row, environment by environment; give one that VecEnv.reset returns")


def _with_axis(state: T, axis: int) -> T:
    """The state, whose ledgers say that their counts lie along this axis."""

    def name(part: Any) -> Any:
        return part.replace(counts_axis=axis) if isinstance(part, Ledger) else part

    return jax.tree.map(name, state, is_leaf=lambda x: isinstance(x, Ledger))


def _reset_if(done: Bool[Array, ""], env: Env, state: State, number: Int[Array, ""]) -> tuple[State, Float[Array, ""]]:
    """A fresh episode where `done`, the state itself elsewhere; in a batch only the rows that ask are reset.

    Key, reward and flags stay what they were. With it the liquidation value of the episode that is done; equity
    elsewhere.

    Args:
      state: a plain one.
      number: of the fresh episode; it draws from `state.key` folded with it.
    """
    axis = state.account.ledger.counts_axis
    kept = {name: getattr(state, name) for name in ("key", "reward", "terminated", "truncated")}
    without = dict.fromkeys(kept)

    def begin(old: tuple[State, Array], env: Env, key: Array, number: Array) -> tuple[State, Array]:
        fresh = _with_axis(_plain(env.reset(jax.random.fold_in(key, number)), **without), axis)
        inner = unwrapped(env)
        return fresh, inner.liquidation_value(old[0]) if hasattr(inner, "liquidation_value") else old[1]

    fresh, value = where_rows(done, begin, (state.replace(**without), state.equity), env, state.key, number)
    return fresh.replace(**kept), value


def own_buffers(state: T) -> T:
    """The state with an array of its own in every leaf, so that it can be donated."""
    seen = set()

    def own(x: Array) -> Array:
        x = jnp.copy(x) if id(x) in seen else x
        seen.add(id(x))
        return x

    return jax.tree.map(own, state)


def _plain(state: State, **changes: Array) -> State:
    """The `State` fields of any state, some of them changed."""
    fields = {name: getattr(state, name) for name in State.__dataclass_fields__}
    return State(**(fields | changes))


def _follow(
    episode: Episode,
    peak: Float[Array, ""],
    state: State,
    started: Bool[Array, ""],
    liquidation_value: Float[Array, ""],
) -> Episode:
    """Account for one more step; `started` marks the first of an episode, `peak` is the highest equity before it."""
    peak = jnp.maximum(peak, state.equity)
    return Episode(
        return_=jnp.where(started, 0, episode.return_) + state.reward,
        length=jnp.where(started, 0, episode.length) + 1,
        equity=state.equity,
        liquidation_value=liquidation_value,
        peak=peak,
        max_drawdown=jnp.maximum(jnp.where(started, 0, episode.max_drawdown), 1 - state.equity / peak),
        ledger=state.account.ledger,
    )
