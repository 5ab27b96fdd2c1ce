"""Actions to orders (docs/semantics.md, the end of section "The bar")."""

from __future__ import annotations

from typing import Any

import numpy as np

from perpjax.reference.records import CLOSE, HOLD, LONG, SHORT, Lot, Order, TwinParams
from perpjax.reference.ties import Ties

DIRECTIONS = (HOLD, LONG, SHORT, CLOSE)
SIZES = (0.25, 0.5, 0.75, 1.0)
LEVERAGES = (1.0, 2.0, 3.0, 5.0, 10.0)  # for a maximum leverage of 10
STOPS = (0.5, 1.0, 2.0, 3.0)
TARGETS = (0.5, 1.0, 2.0, 4.0, 6.0)


def decode(action: Any, params: TwinParams, lots: list[Lot], ties: Ties) -> Order:
    """Return the order of a box5 [5], a multi_discrete [5] or an `Order` action, given the lots held at T_t.

    Any NaN or infinite number makes the whole action HOLD. Other numbers are clipped to their range.
    """
    numbers = np.asarray(action, dtype=np.float64)
    if not np.all(np.isfinite(numbers)):
        return Order(HOLD)
    if isinstance(action, Order):
        return action._replace(size=min(max(action.size, 0.0), 1.0))
    if params.actions == "multi_discrete":
        choices = (DIRECTIONS, SIZES, LEVERAGES, STOPS, TARGETS)
        picked = [c[min(max(int(n), 0), len(c) - 1)] for c, n in zip(choices, numbers, strict=True)]
        leverage = ties.ceil("leverage choice", picked[2] * params.max_leverage / 10)
        return Order(against_lots(int(picked[0]), params, lots), picked[1], leverage, picked[3], picked[4])
    direction, size, leverage, stop, target = np.clip(numbers, -1.0, 1.0).tolist()
    side = HOLD
    if not ties.at_most("direction > 0.33", direction, 0.33):
        side = LONG
    elif not ties.at_most("direction < -0.33", -0.33, direction):
        side = SHORT
    return Order(
        direction=against_lots(side, params, lots),
        size=(size + 1) / 2,
        leverage=ties.round("leverage choice", 1 + (leverage + 1) / 2 * (params.max_leverage - 1)),
        stop_multiple=0.5 + (stop + 1) / 2 * (3 - 0.5),
        target_multiple=0.5 + (target + 1) / 2 * (6 - 0.5),
    )


def against_lots(direction: int, params: TwinParams, lots: list[Lot]) -> int:
    """Return CLOSE if `opposite` is "close" and a lot of the other side is held, else the direction."""
    closes = params.opposite == "close" and any(lot.side == -direction for lot in lots)
    return CLOSE if closes else direction
