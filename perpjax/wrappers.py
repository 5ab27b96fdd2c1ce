"""Auto-reset and episode statistics."""

from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import end_kernel, where_rows
from perpjax.state import Ledger, Lots, State

T = TypeVar("T")


class Env(Protocol):
    """What a wrapper wraps: `PerpEnv`, or another wrapper with its `reset` and `step`."""

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> State: ...

    def step(self, state: State, action: Array) -> State: ...


@pytree
class Episode:
    """The episode that the last step belonged to; on the step that ends it, the whole of it."""

    return_: Float[Array, ""]
    """Sum of rewards."""
    length: Int[Array, ""]
    """Bars."""
    equity: Float[Array, ""]
    """After the last step, quote."""
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

    def step(self, state: EpisodeState, action: Array) -> EpisodeState:
        """As the wrapped environment's `step`; never absorbed."""
        started = state.terminated | state.truncated
        no = jnp.zeros_like(started)
        # A GPU reads equity and flags here, and need not keep them while it writes the new ones.
        started, peak = end_kernel((started, jnp.where(started, state.equity, state.episode.peak)))
        stepped = self.env.step(_plain(state, terminated=no, truncated=no), action)
        episode = _follow(state.episode, peak, stepped, started)
        done = stepped.terminated | stepped.truncated
        resets = state.resets + done
        fresh = _reset_if(done, self.env, _plain(stepped), resets)
        return EpisodeState(**vars(fresh), final_obs=stepped.obs, episode=episode, resets=resets)

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> EpisodeState:
        """As the wrapped environment's `reset`, with an empty episode."""
        state = self.env.reset(key, start)
        zero = jnp.zeros_like(state.equity)
        episode = Episode(zero, jnp.zeros_like(state.t), state.equity, state.equity, zero, state.account.ledger)
        return EpisodeState(**vars(state), final_obs=state.obs, episode=episode, resets=jnp.zeros_like(state.t))


@pytree
class VecEnv:
    """Many environments at once: `jax.vmap`, but with the batch of lots and counts on the last axis.

    So `state.account.lots` has fields of [lots, num_envs] and `ledger.counts` is [counts, num_envs], where a plain
    `jax.vmap(env.step)` has [num_envs, lots] and [num_envs, counts]; all else is the same, the ledger's properties too.
    Numbers of one kind side by side are what vector units and a GPU's threads read; those of a plain batch a CPU copies
    in every step. `by_row` gives the one for the other. A `VecEnv` is not wrapped again: for more axes `jax.vmap` its
    `step`.
    """

    env: Env

    def step(self, state: State, action: Array) -> State:
        """As the wrapped environment's `step`, of many states and of actions [num_envs, 5].

        Raises:
          ValueError: if the state lies by row, as a plain `jax.vmap` or `by_row` leaves it.
        """
        if state.account.ledger.counts_axis == -1:
            raise ValueError(
                "this state lies by row, environment by environment; a VecEnv steps what VecEnv.reset returns"
            )
        state = _with_axis(state, -1)
        axes = self.axes(state)
        return _with_axis(jax.vmap(self.env.step, (axes, 0), axes)(state, action), -2)

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
    def by_row(state: T) -> T:
        """The state, or a part of it, as a plain `jax.vmap` has it: everything of environment i in row i.

        It may be stacked: axes before these, of steps or of devices, stay where they are.
        """
        axes = VecEnv.axes(state)
        return _with_axis(jax.tree.map(lambda axis, x: x if axis == 0 else x.swapaxes(-2, -1), axes, state), -1)


def _with_axis(state: T, axis: int) -> T:
    """The state, whose ledgers say that their counts lie along this axis."""

    def name(part: Any) -> Any:
        return part.replace(counts_axis=axis) if isinstance(part, Ledger) else part

    return jax.tree.map(name, state, is_leaf=lambda x: isinstance(x, Ledger))


def _reset_if(done: Bool[Array, ""], env: Env, state: State, number: Int[Array, ""]) -> State:
    """A fresh episode where `done`, the state itself elsewhere; in a batch only the rows that ask are reset.

    Key, reward and flags stay what they were.

    Args:
      state: a plain one.
      number: of the fresh episode; it draws from `state.key` folded with it.
    """
    axis = state.account.ledger.counts_axis
    kept = {name: getattr(state, name) for name in ("key", "reward", "terminated", "truncated")}
    without = dict.fromkeys(kept)

    def begin(env: Env, key: Array, number: Array) -> State:
        return _with_axis(_plain(env.reset(jax.random.fold_in(key, number)), **without), axis)

    return where_rows(done, begin, state.replace(**without), env, state.key, number).replace(**kept)


def _plain(state: State, **changes: Array) -> State:
    """The `State` fields of any state, some of them changed."""
    fields = {name: getattr(state, name) for name in State.__dataclass_fields__}
    return State(**(fields | changes))


def _follow(episode: Episode, peak: Float[Array, ""], state: State, started: Bool[Array, ""]) -> Episode:
    """Account for one more step; `started` marks the first of an episode, `peak` is the highest equity before it."""
    peak = jnp.maximum(peak, state.equity)
    return Episode(
        return_=jnp.where(started, 0, episode.return_) + state.reward,
        length=jnp.where(started, 0, episode.length) + 1,
        equity=state.equity,
        peak=peak,
        max_drawdown=jnp.maximum(jnp.where(started, 0, episode.max_drawdown), 1 - state.equity / peak),
        ledger=state.account.ledger,
    )
