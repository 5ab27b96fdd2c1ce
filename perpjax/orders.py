"""What a policy may ask for, and the codecs from actions to orders."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perpjax.batching import any_of
from perpjax.params import EnvConfig, EnvParams

HOLD, LONG, SHORT, CLOSE = 0, 1, -1, 2

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
    """What became of an order; the first that holds, in this order."""

    HOLD = 0
    DATA_GAP = 1
    MAX_LOTS = 2
    NO_HEDGE = 3
    MAX_EXPOSURE = 4
    MAX_NOTIONAL = 5
    BELOW_MINIMUM = 6
    ACCEPTED = 7


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


def check_action(action: Array) -> None:
    """Raise unless it is one action.

    Raises:
      ValueError: naming the shape it has.
    """
    if jnp.shape(action)[:1] != (5,):
        raise ValueError(f"an action has shape (5,), not {jnp.shape(action)}; use jax.vmap for a batch")


def decode(action: Array, params: EnvParams, config: EnvConfig) -> Order:
    """The order that an action means; NaN or infinite entries make it HOLD, others are clipped to their range."""
    check_action(action)
    # All zeros are HOLD in both codecs.
    action = jnp.where(any_of(~jnp.isfinite(action)), jnp.zeros_like(action), action)
    return _decode_box(action, params) if config.actions == "box5" else _decode_discrete(action, params)


def _decode_box(action: Array, params: EnvParams) -> Order:
    """[direction, size, leverage, stop, target], each in [-1, 1]."""
    action = jnp.clip(action.astype(jnp.float32), -1.0, 1.0)
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
