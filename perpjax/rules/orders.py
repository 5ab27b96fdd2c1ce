"""The orders of a policy, and the codecs from actions to orders."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax._arrays import any_of
from perpjax.params import EnvConfig, EnvParams

HOLD, LONG, SHORT, CLOSE = 0, 1, -1, 2

ActionLike = Any
"""An array of five numbers, or a list of them; see `check_action`."""

DIRECTIONS = (HOLD, LONG, SHORT, CLOSE)
SIZES = (0.25, 0.5, 0.75, 1.0)
LEVERAGES = (1.0, 2.0, 3.0, 5.0, 10.0)
STOPS = (0.5, 1.0, 2.0, 3.0)
TARGETS = (0.5, 1.0, 2.0, 4.0, 6.0)
MULTI_DISCRETE = tuple(len(x) for x in (DIRECTIONS, SIZES, LEVERAGES, STOPS, TARGETS))
"""Number of choices of each of the five entries of a `multi_discrete` action."""
THRESHOLD = 0.33
"""A `box5` direction beyond this is an order."""


class Verdict(enum.IntEnum):
    """The verdict on an order; `risk.review` has their precedence."""

    HOLD = 0
    DATA_GAP = 1
    MAX_LOTS = 2
    NO_HEDGE = 3
    MAX_EXPOSURE = 4
    MAX_NOTIONAL = 5
    BELOW_MINIMUM = 6
    IMMEDIATE_LIQUIDATION = 7
    ACCEPTED = 8


class Order(NamedTuple):
    """One order at the open of a bar, before review."""

    direction: Int[Array, "..."]
    """HOLD 0, LONG 1, SHORT -1, CLOSE 2."""
    size: Float[Array, "..."]
    """Fraction of the available exposure, 0 .. 1."""
    leverage: Float[Array, "..."]
    stop_multiple: Float[Array, "..."]
    """Stop distance in ATRs."""
    target_multiple: Float[Array, "..."]


def to_array(action: ActionLike) -> Array:
    """An action, or a batch of them, as a device array of its own kind; lists and numbers are taken, too.

    Raises:
      ValueError: for anything but an array of numbers.
    """
    if isinstance(action, jax.Array):
        return action
    try:
        numbers = jax.tree.map(_fit, action) if isinstance(action, list | tuple) else action
        if any(isinstance(x, jax.Array) for x in jax.tree.leaves(numbers)):
            return jnp.asarray(numbers)
        host = _fit(np.asarray(numbers))
    except (TypeError, ValueError):
        host = np.asarray(None)
    if not jnp.issubdtype(host.dtype, jnp.number) and host.dtype != bool:
        raise ValueError(f"an action is an array of five numbers, not {action!r}")
    return jnp.asarray(host)


def _fit(x: Any) -> Any:
    """Numbers of the host, within int32 and float32: a device has no others, and 2^32 would become 0."""
    if isinstance(x, int) and not isinstance(x, bool):
        return min(max(x, -(2**31)), 2**31 - 1)
    if not isinstance(x, np.ndarray | np.number):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return np.clip(x, -(2**31), 2**31 - 1).astype(np.int32)
    if x.dtype in (np.float64, np.longdouble):
        largest = np.finfo(np.float32).max
        return np.where(np.isfinite(x), np.clip(x, -largest, largest), x).astype(np.float32)
    return x


def check_action(action: ActionLike, config: EnvConfig, batch: bool = False) -> Array:
    """The action as its codec wants it: [5] float32 for `box5`, int32 for `multi_discrete`.

    Args:
      batch: whether axes of a batch may follow.

    Raises:
      ValueError: naming the codec and the type or the shape that the action has.
    """
    action = to_array(action)
    kind, dtype = (jnp.floating, jnp.float32) if config.actions == "box5" else (jnp.integer, jnp.int32)
    if not jnp.issubdtype(action.dtype, kind):
        raise ValueError(
            f"an action of {config.actions} is an array of {_MEANING[config.actions]}, not of {action.dtype}"
        )
    if action.shape[:1] != (5,) or (action.ndim > 1 and not batch):
        raise ValueError(f"an action has shape (5,), not {action.shape}; use jax.vmap for a batch")
    if kind is jnp.integer and action.dtype != dtype:  # a number beyond int32 is out of range all the same
        action = jnp.clip(action, 0, 127)
    return action.astype(dtype)


_MEANING = {
    "box5": "floats in [-1, 1] (direction, size, leverage, stop, target)",
    "multi_discrete": f"integers, indices below {MULTI_DISCRETE}",
}


def decode(action: ActionLike, params: EnvParams, config: EnvConfig) -> Order:
    """The order that an action means; NaN or infinite entries make it HOLD, others are clipped to their range."""
    action = check_action(action, config, batch=True)
    # All zeros are HOLD in both codecs.
    action = jnp.where(any_of(~jnp.isfinite(action)), jnp.zeros_like(action), action)
    return _decode_box(action, params) if config.actions == "box5" else _decode_discrete(action, params)


def _decode_box(action: Array, params: EnvParams) -> Order:
    """[direction, size, leverage, stop, target], each in [-1, 1]."""
    action = jnp.clip(action, -1.0, 1.0)
    unit = (action + 1) / 2
    direction = (action[0] > THRESHOLD).astype(jnp.int32) - (action[0] < -THRESHOLD).astype(jnp.int32)
    return Order(
        direction=direction,
        size=unit[1],
        leverage=jnp.round(1 + unit[2] * (params.max_leverage - 1)),
        stop_multiple=STOPS[0] + unit[3] * (STOPS[-1] - STOPS[0]),
        target_multiple=TARGETS[0] + unit[4] * (TARGETS[-1] - TARGETS[0]),
    )


def _decode_discrete(action: Array, params: EnvParams) -> Order:
    """Indices into DIRECTIONS, SIZES, LEVERAGES, STOPS and TARGETS."""

    def choose(values: tuple[float | int, ...], index: Array) -> Array:
        # A chain of selects: cheaper under vmap than a gather from a table.
        chosen = jnp.asarray(values[0], jnp.float32)
        for i, value in enumerate(values[1:], 1):
            chosen = jnp.where(index >= i, jnp.float32(value), chosen)
        return chosen

    return Order(
        direction=choose(DIRECTIONS, action[0]).astype(jnp.int32),
        size=choose(SIZES, action[1]),
        leverage=jnp.ceil(choose(LEVERAGES, action[2]) * params.max_leverage / LEVERAGES[-1]),
        stop_multiple=choose(STOPS, action[3]),
        target_multiple=choose(TARGETS, action[4]),
    )


def sample_action(key: Array, config: EnvConfig, batch: tuple[int, ...] = ()) -> Array:
    """Uniformly random actions [*batch, 5] of the kind that `config.actions` names, in one draw."""
    if config.actions == "box5":
        return jax.random.uniform(key, (*batch, 5), minval=-1.0, maxval=1.0)
    # The 1600 actions, numbered: one random word each, where a draw of five integers takes ten.
    number, entries = jax.random.bits(key, batch, jnp.uint32), []
    for choices in MULTI_DISCRETE:
        entries.append((number % choices).astype(jnp.int32))
        number = number // choices
    return jnp.stack(entries, axis=-1)


def hold_action(config: EnvConfig) -> Array:
    """The action that asks for nothing."""
    return jnp.zeros(5, jnp.float32 if config.actions == "box5" else jnp.int32)
