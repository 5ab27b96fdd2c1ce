"""Numbers that `vmap` may vary (EnvParams) and choices that shape the program (EnvConfig)."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax._pytree import pytree

# name: dtype, lowest, highest (both inclusive), meaning
RANGES = {
    "initial_equity": (jnp.float32, 1e-3, 1e9, "Money an account starts with, quote currency."),
    "taker_fee": (jnp.float32, 0.0, 0.1, "Fee of a fill, a fraction of its notional."),
    "slippage_base": (jnp.float32, 0.0, 0.5, "Slippage of a market order, a fraction of the price."),
    "slippage_atr": (jnp.float32, 0.0, 100.0, "Further slippage of a market order, in ATRs."),
    "stop_depth": (jnp.float32, 0.0, 1.0, "Depth of a stop's fill, a fraction of the way to the candle's extreme."),
    "max_exposure": (jnp.float32, 0.0, 1.0, "Limit on the sum of margins, a fraction of equity."),
    "max_leverage": (jnp.float32, 1.0, 1000.0, "Limit on an order's leverage."),
    "max_hold": (jnp.int32, 1, 2**30, "Bars after which a lot is closed."),
    "ruin_fraction": (jnp.float32, 0.0, 0.999, "The episode ends at this fraction of the initial equity."),
    "entry_penalty": (jnp.float32, 0.0, 1e3, "Shaped reward: penalty of an entry."),
    "risk_penalty": (jnp.float32, 0.0, 1e3, "Shaped reward: weight of notional / equity times ATR / price."),
    "liquidation_penalty": (jnp.float32, 0.0, 1e3, "Shaped reward: penalty of a liquidation."),
    "ruin_penalty": (jnp.float32, 0.0, 1e3, "Shaped reward: penalty of ruin."),
}
"""Type, range and meaning of each field of `EnvParams`."""


@pytree
class EnvParams:
    """Numbers of the simulation. Each may be an array with a batch axis, for `vmap` over environments.

    Attributes:
      initial_equity: quote currency.
      taker_fee: fraction of notional, paid at entry and at every exit but a liquidation.
      slippage_base, slippage_atr: slippage is `ceil(slippage_base * price + slippage_atr * ATR)` ticks.
      stop_depth: fraction of the way from a stop's trigger to the candle's adverse extreme at which the stop fills.
      max_exposure: limit on the sum of margins, fraction of equity.
      max_leverage: limit on an order's leverage.
      max_hold: bars after which a lot is closed.
      ruin_fraction: the episode terminates when equity is at or below this fraction of the initial equity.
      entry_penalty, risk_penalty, liquidation_penalty, ruin_penalty: weights of the `shaped` reward.

    Raises:
      ValueError: a number is not finite or out of range. The message names the field, the value and the range.
    """

    initial_equity: Float[Array, "..."] | float = 10_000.0
    taker_fee: Float[Array, "..."] | float = 0.0006
    slippage_base: Float[Array, "..."] | float = 0.0002
    slippage_atr: Float[Array, "..."] | float = 0.1
    stop_depth: Float[Array, "..."] | float = 0.1
    max_exposure: Float[Array, "..."] | float = 0.10
    max_leverage: Float[Array, "..."] | float = 10.0
    max_hold: Int[Array, "..."] | int = 192
    ruin_fraction: Float[Array, "..."] | float = 0.1
    entry_penalty: Float[Array, "..."] | float = 0.0002
    risk_penalty: Float[Array, "..."] | float = 0.1
    liquidation_penalty: Float[Array, "..."] | float = 0.005
    ruin_penalty: Float[Array, "..."] | float = 0.1

    def __post_init__(self):
        for name, (dtype, lowest, highest, meaning) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, jax.core.Tracer):
                _check_range(name, value, dtype, lowest, highest, meaning)
            # A Python float would be a weakly typed leaf and cause a second trace.
            object.__setattr__(self, name, jnp.asarray(value, dtype))

    def check_batch(self, num_envs: int | None) -> None:
        """Raise unless every field is one number, or one for each of so many environments (None: one number).

        Raises:
          ValueError: naming the field and its shape.
        """
        for name in RANGES:
            shape = jnp.shape(getattr(self, name))
            if shape in ((), (num_envs,)):
                continue
            if num_envs is None:
                raise ValueError(
                    f"EnvParams.{name} has shape {shape}, and this is one environment; step a VecEnv, or use jax.vmap "
                    "over the environment, too"
                )
            raise ValueError(
                f"EnvParams.{name} has shape {shape} for {num_envs} environments; give one number, or one for each"
            )


def _check_range(name: str, value: Any, dtype: Any, lowest: float, highest: float, meaning: str) -> None:
    """Raise unless every number is in the range. The comparison is in the field's own dtype.

    In float64 a bound of 0.1 lies below the float32 of 0.1. A value read back from the device would be refused.
    """
    try:
        host = np.asarray(value, np.float64)
    except OverflowError:  # an integer beyond float64
        far = np.vectorize(lambda x: float(x) if abs(x) < 10**300 else np.inf if x > 0 else -np.inf)
        host = far(np.asarray(value, object))
    whole = dtype == jnp.int32
    with np.errstate(over="ignore"):
        held, low, high = (np.asarray(x, np.float64 if whole else dtype) for x in (host, lowest, highest))
    bad = ~((held >= low) & (held <= high))
    if whole:
        bad |= host != np.round(host)
    if bad.any():
        raise ValueError(
            f"EnvParams.{name} = {host[bad].flat[0]:.12g} is not {'an integer ' if whole else ''}"
            f"in [{lowest:g}, {highest:g}]. {meaning}"
        )


Actions = Literal["box5", "multi_discrete"]
Intrabar = Literal["nearest", "pessimistic", "optimistic"]
Reward = Literal["log_return", "shaped"]
Opposite = Literal["refuse", "close"]


CONFIG_LIMITS = {
    "max_lots": (1024, "A step's program and its packed counts grow with the slots."),
    "episode_length": (2**30, "The clock is an int32, and so is the last bar of an episode."),
}
"""The highest number of slots and of bars, with the reason."""


@dataclasses.dataclass(frozen=True)
class EnvConfig:
    """Static choices: each set of them is one compiled program.

    Attributes:
      actions: "multi_discrete" (hold, long, short, close x size x leverage x stop x target) or "box5" (five
        floats in [-1, 1]).
      intrabar: the rule that selects one of several levels reached inside a candle.
      reward: "log_return" of equity, or "shaped" with penalties.
      opposite: treatment of a direction against the lots held: "refuse" (verdict NO_HEDGE) or "close".
      max_lots: slots of the account, at most 1024.
      episode_length: bars until truncation, at most 2^30.

    Raises:
      ValueError: a field is out of range. The message names the field, the value and the range.
    """

    actions: Actions = "multi_discrete"
    intrabar: Intrabar = "nearest"
    reward: Reward = "log_return"
    opposite: Opposite = "refuse"
    max_lots: int = 10
    episode_length: int = 672

    def __post_init__(self):
        choices = {"actions": Actions, "intrabar": Intrabar, "reward": Reward, "opposite": Opposite}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"EnvConfig.{name} = {getattr(self, name)!r} is not one of {get_args(kind)}")
        for name, (highest, why) in CONFIG_LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
                raise ValueError(f"EnvConfig.{name} = {value!r} is not an integer in [1, {highest}]. {why}")
