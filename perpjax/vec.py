"""Many environments at once, auto-reset, and episode statistics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.params import EnvParams
from perpjax.rules.orders import ActionLike, to_array
from perpjax.state import Ledger, Lots, State
from perpjax.xla import Program, batched_by, default_platform, differentiable, where_rows

T = TypeVar("T")

CHUNK = 1024
"""Environments that a CPU steps at a time by default, if they are too many for its caches: `CHUNKED` or more."""
CHUNKED = 16 * CHUNK


class Env(Protocol):
    """The environment in a wrapper: `PerpEnv`, or another wrapper with its `reset` and `step`.

    A wrapper is a pytree and holds the environment in the field `env`. The innermost environment may have two methods
    more. `liquidation_value(state)`, of a state without its ledger: without it an episode's is its equity.
    `step_batch(state, action, program)`, which steps a whole batch: without it `VecEnv` uses `jax.vmap`.
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

    def after(
        self,
        state: State,
        started: Bool[Array, "..."],
        peak: Float[Array, "..."],
        liquidation_value: Float[Array, "..."],
    ) -> "Episode":
        """The statistics after one more step.

        Args:
          state: after the step, before any reset.
          started: whether the step was the first of an episode.
          peak: highest equity before the step.
          liquidation_value: of `state`.
        """
        peak = jnp.maximum(peak, state.equity)
        return Episode(
            return_=jnp.where(started, 0, self.return_) + state.reward,
            length=jnp.where(started, 0, self.length) + 1,
            equity=state.equity,
            liquidation_value=liquidation_value,
            peak=peak,
            max_drawdown=jnp.maximum(jnp.where(started, 0, self.max_drawdown), 1 - state.equity / peak),
            ledger=state.account.ledger,
        )


@pytree
class EpisodeState(State):
    """A `State` with the facts that an auto-reset would otherwise lose."""

    final_obs: Float[Array, "observation"]
    """The observation after the step, before any reset: bootstrap from it where `truncated`."""
    episode: Episode
    resets: Int[Array, ""]
    """Episodes begun after the first; with `key` it says where the next one starts."""


@pytree
class AutoReset:
    """Starts a new episode in the step that ends one. It wraps one environment, or a `VecEnv`.

    That step returns the fresh episode's state, with the finished step's `reward`, `terminated` and `truncated`;
    `final_obs` and `episode` are the finished one's. The next step clears both flags before it moves on.
    """

    env: Env

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> EpisodeState:
        """As the wrapped environment's `reset`, with an empty episode."""
        state = self.env.reset(key, start)
        zero, equity = jnp.zeros_like(state.equity), state.equity
        episode = Episode(zero, jnp.zeros_like(state.t), equity, equity, equity, zero, state.account.ledger)
        state = EpisodeState(**vars(state), final_obs=state.obs, episode=episode, resets=jnp.zeros_like(state.t))
        return own_buffers(state)

    def step(self, state: EpisodeState, action: ActionLike) -> EpisodeState:
        """As the wrapped environment's `step`; never absorbed."""
        if isinstance(self.env, VecEnv):
            return _advance_batch(self.env.program(state))(self, state, to_array(action))
        return as_one(_advance_one(self, as_one(state), to_array(action)), state.account.lots.slot_axis)

    def _advance(self, state: EpisodeState, action: Array, program: Program) -> EpisodeState:
        started = state.terminated | state.truncated
        # A GPU reads equity and flags here, and need not keep them while it writes the new ones.
        started, peak = program.store((started, jnp.where(started, state.equity, state.episode.peak)))
        running = jnp.zeros_like(started)
        stepped = self.env.step(_plain(state, terminated=running, truncated=running), action)
        done = stepped.terminated | stepped.truncated
        resets = state.resets + done
        fresh, liquidation_value = self._reset_where(done, _plain(stepped), resets, program)
        episode = state.episode.after(stepped, started, peak, liquidation_value)
        return own_buffers(EpisodeState(**vars(fresh), final_obs=stepped.obs, episode=episode, resets=resets))

    def _reset_where(
        self, done: Bool[Array, "..."], state: State, number: Int[Array, "..."], program: Program
    ) -> tuple[State, Float[Array, "..."]]:
        """A fresh episode where `done`, the state elsewhere. Key, reward and flags stay.

        Returns:
          The state, and the liquidation value of the episode that is done (equity elsewhere).
        """
        kept = {name: getattr(state, name) for name in ("key", "reward", "terminated", "truncated")}
        without, ledger, layout = dict.fromkeys(kept), state.account.ledger, state.account.lots.slot_axis

        def strip(state: State) -> State:
            return state.replace(**without, account=state.account.replace(ledger=None))

        def begin(old: tuple[State, Array], env: Env, key: Array, number: Array) -> tuple[State, Array]:
            fresh, inner = strip(_plain(env.reset(jax.random.fold_in(key, number)))), unwrapped(env)
            return fresh, inner.liquidation_value(old[0]) if hasattr(inner, "liquidation_value") else old[1]

        old = strip(state), state.equity
        if program.num_envs is None and program.loops:
            fresh, value = lax.cond(done, begin, lambda old, *_: old, old, self.env, state.key, number)
        elif program.num_envs is None:
            new = begin(old, self.env, state.key, number)
            fresh, value = jax.tree.map(functools.partial(jnp.where, done), new, old)
        else:
            env, batch = self.env.env, VecEnv.axes(old)
            # The rows are states of one environment in either layout of the batch.
            old, batch = as_one(old), as_one(batch)
            axes = batch, env_axes(env), 0, 0
            fresh, value = where_rows(done, begin, old, env, state.key, number, program=program, axes=axes)
        # A fresh ledger is all zeros. The episode keeps the old one, so a select costs no more than the copy would.
        verdicts = jnp.where(jnp.expand_dims(done, ledger.verdict_axis), 0, ledger.verdicts)
        others = jax.tree.map(lambda x: jnp.where(done, jnp.zeros_like(x), x), ledger.replace(verdicts=None))
        ledger = others.replace(verdicts=verdicts)
        fresh = fresh.replace(**kept, account=fresh.account.replace(ledger=ledger))
        return as_one(fresh, layout), value


@pytree(static=("platform", "chunk_size"))
class VecEnv:
    """Many environments at once: `jax.vmap`, but with the batch of lots on the last axis.

    So `state.account.lots` has fields of [lots, num_envs] and `ledger.verdicts` is [verdicts, num_envs], where a plain
    `jax.vmap(env.step)` has [num_envs, lots] and [num_envs, verdicts]; all else is the same. Vector units and a GPU's
    threads read numbers of one kind side by side. `one` gives the state of a single environment, `by_row` that of a
    plain batch.

    `AutoReset(VecEnv(env))` and `VecEnv(AutoReset(env))` are the same. For more axes `jax.vmap` its `step`.

    Attributes:
      env: one environment. Each of its `EnvParams` is one number, or one for each environment.
      platform: that the step is compiled for, such as "cpu" or "gpu" (static). Default: JAX's default.
      chunk_size: environments that are stepped at a time; it must divide their number (static). By default a CPU
        takes 1 024 at a time if there are 16 384 or more and it divides them.
    """

    env: Env
    platform: str | None = None
    chunk_size: int | None = None

    def reset(self, key: Array, start: Int[Array, "num_envs"] | None = None) -> State:
        """As the wrapped environment's `reset`, with a key for each environment, and a first bar if any is given.

        Raises:
          ValueError: naming the field of `EnvParams` that has not one number for each environment.
        """
        if isinstance(self.env, AutoReset):
            return AutoReset(self.replace(env=self.env.env)).reset(key, start)
        _check_params(self.env, len(key))
        axes = env_axes(self.env), 0, None if start is None else 0
        return with_layout(jax.vmap(lambda env, *args: env.reset(*args), axes)(self.env, key, start), -2)

    def step(self, state: State, action: ActionLike) -> State:
        """As the wrapped environment's `step`, of many states and of actions [num_envs, 5].

        Args:
          state: that `reset` returns, or a row-major one, as a plain `jax.vmap` or `by_row` leaves it. The layout of
            its lots is that of the result.

        Raises:
          ValueError: if there is not one action for each environment, or not one number of a field of `EnvParams`.
        """
        actions, num_envs = to_array(action), state.t.shape[0]
        if actions.shape[:1] != (num_envs,):
            raise ValueError(f"actions of shape {actions.shape} for {num_envs} environments; give one to each")
        if isinstance(self.env, AutoReset):
            return AutoReset(self.replace(env=self.env.env)).step(state, actions)
        _check_params(self.env, num_envs)
        key, state = state.key, state.replace(key=None)
        if _steps_batches(self.env):
            return step_batch(self.program(state))(self.env, state, actions).replace(key=key)
        layout, axes = state.account.lots.slot_axis, self.axes(state)
        state, axes = as_one(state), as_one(axes)
        step = jax.vmap(lambda env, *args: env.step(*args), (env_axes(self.env), axes, 0), axes)
        return as_one(step(self.env, state, actions).replace(key=key), layout)

    def program(self, state: State) -> Program:
        """The program of one step of these environments.

        Raises:
          ValueError: if `chunk_size` does not divide their number.
        """
        platform, size, chunk = self.platform or default_platform(), state.t.shape[0], self.chunk_size
        if chunk is not None and size % chunk:
            raise ValueError(f"chunk_size {chunk} does not divide the number of environments, {size}")
        if chunk is None and platform == "cpu" and size >= CHUNKED and size % CHUNK == 0:
            chunk = CHUNK
        return Program(platform, size, None if chunk == size else chunk)

    @staticmethod
    def axes(state: T) -> T:
        """The batch axis of every array of a state of many environments, or of a part of it; for `jax.vmap`."""

        def of(part: Any) -> Any:
            if isinstance(part, Lots):
                return jax.tree.map(lambda _: -1 if part.slot_axis == -2 else 0, part)
            if isinstance(part, Ledger):
                return jax.tree.map(lambda _: 0, part).replace(verdicts=-1 if part.verdict_axis == -2 else 0)
            return 0

        return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, Lots | Ledger))

    @staticmethod
    def one(state: T, i: int | Int[Array, ""]) -> T:
        """The state of environment i, as the wrapped environment knows it.

        `state.account.lots.entry[i]` is something else: slot i of every environment.

        Raises:
          IndexError: if i is not one of the environments.
        """
        state = VecEnv.by_row(state)
        num_envs = len(jax.tree.leaves(state)[0])
        if not isinstance(i, jax.core.Tracer) and not -num_envs <= i < num_envs:
            raise IndexError(f"environment {i} is not one of {num_envs}")
        return jax.tree.map(lambda x: x[i], state)

    @staticmethod
    def by_row(state: T) -> T:
        """The state, or a part of it, as a plain `jax.vmap` has it: everything of environment i in row i.

        It may be stacked: axes before these, of steps or of devices, stay where they are. A row-major one stays.
        """
        return with_layout(state, -1)


def with_layout(state: T, axis: int) -> T:
    """The state with the slots of its lots and the verdicts of its ledgers along this axis: -1 by row, -2."""

    def turn(x: Array) -> Array:
        if axis == -2:
            return x.swapaxes(-2, -1)
        # Row by row, in which XLA's CPU compiler takes two thirds of the time of a transpose.
        return jnp.stack(jnp.unstack(x, axis=-2), axis=-1)

    def of(part: Any) -> Any:
        if isinstance(part, Lots) and part.slot_axis != axis:
            return jax.tree.map(turn, part).replace(slot_axis=axis)
        if isinstance(part, Ledger) and part.verdict_axis != axis:
            return part.replace(verdicts=turn(part.verdicts), verdict_axis=axis)
        return part

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, Lots | Ledger))


def env_axes(env: Env) -> Env:
    """For `jax.vmap` over environments: 0 where a parameter has a number for each, None elsewhere."""

    def of(part: Any) -> Any:
        return jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, part) if isinstance(part, EnvParams) else None

    return jax.tree.map(of, env, is_leaf=lambda x: isinstance(x, EnvParams))


def unwrapped(env: Env, *kinds: type) -> Env:
    """The environment without its wrappers of these kinds, at any depth; without any wrapper if no kind is named."""
    if not hasattr(env, "env"):
        return env
    inner = unwrapped(env.env, *kinds)
    if not kinds or isinstance(env, kinds):
        return inner
    return env if inner is env.env else dataclasses.replace(env, env=inner)


def own_buffers(state: T) -> T:
    """The state with an array of its own in every leaf, so that it can be donated."""
    seen: set[int] = set()
    # `seen.add` returns None: the first leaf of each array stays.
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in seen else seen.add(id(x)) or x, state)


def step_rows(step: Callable[[Env, State, Array], State]) -> Callable[..., State | None]:
    """For `xla.batched_by`: `jax.vmap` of a single step becomes `step` of a batch.

    Not if more of the environment has a batch axis than its parameters, such as the market.
    """

    def rows(size: int, batched: list, env: Env, state: State, action: Array) -> State | None:
        parts = jax.tree.leaves(batched[0], is_leaf=lambda x: isinstance(x, EnvParams))
        if any(part for part in parts if not isinstance(part, EnvParams)):
            return None

        def spread(flag: bool, x: Array) -> Array:
            return x if flag else jnp.broadcast_to(x, (size, *jnp.shape(x)))

        return step(env, *jax.tree.map(spread, tuple(batched[1:]), (state, action)))

    return rows


def _steps_batches(env: Env) -> bool:
    """Whether `step_batch` does the same as `step`: a subclass may have changed `step` alone."""

    def owner(name: str) -> type | None:
        return next((kind for kind in type(env).__mro__ if name in vars(kind)), None)

    return hasattr(env, "step_batch") and owner("step") is owner("step_batch")


@functools.cache
def step_batch(program: Program) -> Callable[[Env, State, Array], State]:
    """The compiled step of a batch; it has derivatives."""

    def step(program: Program) -> Callable[[Env, State, Array], State]:
        return lambda env, state, action: env.step_batch(state, action, program)

    return jax.jit(differentiable(step(program), step(dataclasses.replace(program, chunk=None, loops=False))))


@functools.cache
def _advance_batch(program: Program) -> Callable[[AutoReset, EpisodeState, Array], EpisodeState]:
    """The compiled auto-reset step of a batch; it has derivatives."""

    def advance(loops: bool) -> Callable[[AutoReset, EpisodeState, Array], EpisodeState]:
        return lambda env, state, action: env._advance(state, action, dataclasses.replace(program, loops=loops))

    return jax.jit(differentiable(advance(True), advance(False)))


@batched_by(
    step_rows(lambda env, *args: AutoReset(VecEnv(env.env)).step(*args)),
    plain=lambda env, *args: env._advance(*args, Program(default_platform(), loops=False)),
)
def _advance_one(env: AutoReset, state: EpisodeState, action: Array) -> EpisodeState:
    return env._advance(state, action, Program(default_platform()))


def _check_params(env: Env, num_envs: int) -> None:
    params = getattr(unwrapped(env), "params", None)
    if isinstance(params, EnvParams):
        params.check_batch(num_envs)


def as_one(state: T, axis: int = -1) -> T:
    """The same arrays, marked as the state of one environment (-1), or of a `VecEnv` (-2)."""

    def name(part: Any) -> Any:
        if isinstance(part, Lots):
            return part.replace(slot_axis=axis)
        return part.replace(verdict_axis=axis) if isinstance(part, Ledger) else part

    return jax.tree.map(name, state, is_leaf=lambda x: isinstance(x, Lots | Ledger))


def _plain(state: State, **changes: Array) -> State:
    """The `State` fields of any state, some of them changed."""
    fields = {name: getattr(state, name) for name in State.__dataclass_fields__}
    return State(**(fields | changes))
