"""Roundings and thresholds, with the near-ties of SPEC section 1 found and counted.

SPEC: "Float32 and float64 can still round to different sides when the number to round, or the two
sides of a threshold, lie within 2^-20 of the jump. The float64 twin then takes the simulator's side
and counts the case; everything else must be identical."

The 2^-20 is read as relative: a number x with terms of size `scale` is near a jump when the jump lies
within `2^-20 * max(1, |x|, scale)`. An absolute 2^-20 cannot be meant (a float32 distance of 90 000 ticks
is spaced 2^-7), and `scale` matters where large terms cancel (`available`, the liquidation distance).
The reading is generous on purpose: a near-tie changes nothing unless the twin is told to flip it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

WIDTH = 2.0**-20


class Tie(NamedTuple):
    """One decision that float32 may take differently."""

    where: str  # what was rounded or compared, in the words of SPEC
    value: float  # the number to round, or left - right of a threshold
    options: tuple[float, ...]  # the results within reach; thresholds: 1.0 (true) and 0.0 (false)
    own: float  # float64's result
    taken: float  # the result used


class Ties:
    """Takes every rounding and every money threshold of one step, and records the near-ties in order.

    A number that comes again in the step (the slippage at one price, say) is decided as it was before, unless that use
    of it (`use`) is forced to the other side: a compiler may compute one number twice, and round it both ways.

    Args:
      forced: result to take for the i-th near-tie of the step; those not named take float64's side.
    """

    def __init__(self, forced: Mapping[int, float] | None = None):
        self.forced = dict(forced or {})
        self.cases: list[Tie] = []
        self._decided: dict[tuple[str, float], float] = {}

    @property
    def flipped(self) -> int:
        """How many numbers were not decided as float64 decides them, in any of their uses."""
        return len({(case.where, case.value) for case in self.cases if case.taken != case.own})

    @property
    def count(self) -> int:
        """How many numbers were near-ties, each counted once."""
        return len(self._decided)

    def ceil(self, where: str, x: float, scale: float = 0.0, use: str = "") -> float:
        return self._rounded(math.ceil, where, x, scale, use)

    def floor(self, where: str, x: float, scale: float = 0.0) -> float:
        return self._rounded(math.floor, where, x, scale)

    def round(self, where: str, x: float, scale: float = 0.0) -> float:
        """Half to even, as everywhere in SPEC section 3 (and as Python's own `round`)."""
        return self._rounded(round, where, x, scale)

    def at_most(self, where: str, left: float, right: float, scale: float = 0.0) -> bool:
        """`left <= right`, two sums of money whose largest terms are of size `scale`."""
        own = float(left <= right)
        reach = WIDTH * max(1.0, abs(left), abs(right), scale)
        options = (0.0, 1.0) if abs(left - right) <= reach else (own,)
        return bool(self._take(where, left - right, options, own))

    def _rounded(self, rule: Callable[[float], int], where: str, x: float, scale: float, use: str = "") -> float:
        own = float(rule(x))
        reach = WIDTH * max(1.0, abs(x), scale)
        options = tuple(float(n) for n in range(rule(x - reach), rule(x + reach) + 1))
        return self._take(where, x, options, own, use)

    def _take(self, where: str, value: float, options: tuple[float, ...], own: float, use: str = "") -> float:
        if len(options) == 1:
            return own
        before = self._decided.get((where, value))
        if before is not None and not use:
            return before
        taken = self.forced.get(len(self.cases), own if before is None else before)
        if taken not in options:
            raise ValueError(f"near-tie {len(self.cases)} ({where}) is among {options}, not {taken}")
        self.cases.append(Tie(where, value, options, own, taken))
        self._decided.setdefault((where, value), taken)
        return taken
