"""An exchange's specification of a contract: grid, limits and maintenance brackets."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from perpjax._pytree import pytree

EXACT = 2**24 - 1
"""The largest count (ticks or steps) that float32 holds exactly with all smaller ones."""

# Binance USDS-M brackets, 2025-06-19 and after: floor and cap (notional, quote), maximum leverage,
# maintenance rate (fraction of notional) and maintenance amount (quote).
_BTC = (
    (0, 300e3, 150, 0.004, 0),
    (300e3, 800e3, 100, 0.005, 300),
    (800e3, 3e6, 75, 0.0065, 1_500),
    (3e6, 12e6, 50, 0.01, 12_000),
    (12e6, 70e6, 25, 0.02, 132_000),
    (70e6, 100e6, 20, 0.025, 482_000),
    (100e6, 230e6, 10, 0.05, 2_982_000),
    (230e6, 480e6, 5, 0.10, 14_482_000),
    (480e6, 600e6, 4, 0.125, 26_482_000),
    (600e6, 800e6, 3, 0.15, 41_482_000),
    (800e6, 1.2e9, 2, 0.25, 121_482_000),
    (1.2e9, 1.8e9, 1, 0.50, 421_482_000),
)
_ETH = _BTC[:4] + (
    (12e6, 50e6, 25, 0.02, 132_000),
    (50e6, 65e6, 20, 0.025, 382_000),
    (65e6, 150e6, 10, 0.05, 2_007_000),
    (150e6, 320e6, 5, 0.10, 9_507_000),
    (320e6, 400e6, 4, 0.125, 17_507_000),
    (400e6, 530e6, 3, 0.15, 27_507_000),
    (530e6, 800e6, 2, 0.25, 80_507_000),
    (800e6, 1.2e9, 1, 0.50, 280_507_000),
)
BRACKETS: dict[str, tuple[tuple[float, ...], ...]] = {"BTCUSDT": _BTC, "ETHUSDT": _ETH}


@pytree(host=("symbol",))
class Instrument:
    """One linear USDT-margined perpetual.

    The constructor checks the values and keeps exact Python floats. Inside a `Market` the same fields are float32
    device arrays, stacked over instruments if the market has several.

    Attributes:
      symbol: the venue's name, such as "BTCUSDT".
      tick_size: price grid, quote currency.
      step_size: quantity grid, base currency.
      min_notional: smallest order, quote currency.
      max_quantity: largest market order, base currency.
      brackets: [n, 5] rows of (floor, cap, max leverage, maintenance rate, maintenance amount). A notional
        belongs to the bracket with floor < notional <= cap.
      maintenance_fee_rate: closing fee counted inside the maintenance requirement, a fraction: 0 on Binance and
        Bybit, the taker fee on OKX, Gate and Bitget. It is not Binance's `liquidationFee`.
      tick_value: derived: quote currency of one tick for one step.
      max_steps: derived: `max_quantity` in whole steps, at most 2^24 - 1.
      maintenance: derived: [n, 4]. The columns are the rate r including the fee, the maintenance amount, 1 / (1 - r)
        and 1 / (1 + r). Inside a `Market` liquidation prices read these columns, not `brackets` and
        `maintenance_fee_rate`. To change a rate, build another instrument.

    Raises:
      ValueError: a value is out of range, or the brackets are not contiguous, continuous and increasing. Also if
        a bracket's maintenance, fee included, is not below the margin at its maximum leverage.
    """

    symbol: str = "BTCUSDT"
    tick_size: Float[Array, "..."] | float = 0.1
    step_size: Float[Array, "..."] | float = 0.001
    min_notional: Float[Array, "..."] | float = 50.0
    max_quantity: Float[Array, "..."] | float = 120.0
    maintenance_fee_rate: Float[Array, "..."] | float = 0.0
    brackets: Float[Array, "... n 5"] | np.ndarray | tuple = _BTC
    tick_value: Float[Array, "..."] | float = dataclasses.field(init=False)
    max_steps: Float[Array, "..."] | float = dataclasses.field(init=False)
    maintenance: Float[Array, "... n 4"] | np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        for name in ("tick_size", "step_size", "max_quantity", "min_notional"):
            value = _exact(getattr(self, name)).item()
            if not (math.isfinite(value) and (value > 0 or (value == 0 and name == "min_notional"))):
                raise ValueError(f"instrument {self.symbol}: {name} must be a finite positive number, not {value}")
            object.__setattr__(self, name, value)
        fee = _exact(self.maintenance_fee_rate).item()
        if not 0 <= np.float32(fee) < np.float32(0.1):
            raise ValueError(f"instrument {self.symbol}: maintenance_fee_rate {fee} is not a fraction in [0, 0.1)")
        brackets = _exact(self.brackets)
        _check_brackets(self.symbol, brackets, fee)
        # 120 / 0.001 is 119999.99999999999: a part in 10^9 of a step is rounding, not quantity.
        steps = math.floor(self.max_quantity / self.step_size * (1 + 1e-9))
        if steps < 1:
            raise ValueError(
                f"instrument {self.symbol}: max_quantity {self.max_quantity} is less than one step of {self.step_size}"
            )
        rate = brackets[:, 3] + fee
        derived = {
            "maintenance_fee_rate": fee,
            "brackets": brackets,
            "tick_value": self.tick_size * self.step_size,
            "max_steps": float(min(steps, EXACT)),
            "maintenance": np.column_stack([rate, brackets[:, 4], 1 / (1 - rate), 1 / (1 + rate)]),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def on_device(self) -> "Instrument":
        """Return the instrument with float32 device arrays."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), self)


def _exact(value: Any) -> Float[np.ndarray, "..."]:
    """Return the numbers as float64. A float32 becomes the shortest decimal that rounds to it.

    An instrument read back from a device therefore equals the original: 0.001, not 0.0010000000475. With the latter,
    120 would be less than 120 000 steps.
    """
    host = np.asarray(value)
    if host.dtype != np.float32:
        return host.astype(np.float64)
    return np.array([float(str(x)) for x in host.ravel()]).reshape(host.shape)


def _check_brackets(symbol: str, brackets: np.ndarray, fee: float) -> None:
    """Raise unless maintenance(notional) is continuous, increasing and convex over all brackets."""
    if brackets.ndim != 2 or brackets.shape[1] != 5 or not len(brackets) or not np.isfinite(brackets).all():
        raise ValueError(
            f"instrument {symbol}: brackets must be finite rows of (floor, cap, max leverage, rate, amount), "
            f"not an array of shape {brackets.shape}"
        )
    floor, cap, leverage, rate, amount = brackets.T
    wrong = [
        (floor != np.append(0.0, cap[:-1]), "its floor is not the cap of the row before (0 in the first)"),
        (cap <= floor, "its cap is not above its floor"),
        (np.diff(leverage, prepend=np.inf) > 0, "its max leverage is above that of the row before"),
        (leverage < 1, "its max leverage is below 1"),
        (np.diff(rate, prepend=0.0) <= 0, "its maintenance rate is not above that of the row before"),
        (rate + fee >= 1, "its maintenance rate and fee reach 1"),
        (
            (rate + fee) * leverage > 1 - 1e-9,
            f"at its max leverage maintenance, with a fee of {fee:g}, takes all of the margin",
        ),
        # cum_n = cum_{n-1} + floor_n (rate_n - rate_{n-1}): Binance FAQ, maintenance is continuous at the edges.
        (
            np.abs(np.diff(amount, prepend=0.0) - floor * np.diff(rate, prepend=0.0)) > 1e-6 * np.maximum(amount, 1),
            "its maintenance amount is not continuous with the row before",
        ),
    ]
    for bad, why in wrong:
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(f"instrument {symbol}: bracket row {row} {brackets[row].tolist()}: {why}")
