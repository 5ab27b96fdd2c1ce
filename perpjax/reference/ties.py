"""Roundings and thresholds, with near-ties (docs/semantics.md, section "Units") found and counted.

Float32 and float64 may round to different sides if the number lies within 2^-20 of the jump. So may the two sides of a
threshold. The twin then takes the simulator's side and counts the case. Everything else must be identical.

The 2^-20 is relative. A number x with terms of size `scale` is near a jump if the jump lies within
`2^-20 * max(1, |x|, scale)`. An absolute 2^-20 would be too small: float32 distances of 90 000 ticks are spaced 2^-7.
`scale` matters where large terms cancel (`available`, the liquidation distance). The width is generous on purpose: a
near-tie changes nothing unless `forced` flips it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

WIDTH = 2.0**-20


class Tie(NamedTuple):
    """One decision that float32 may take differently."""

    where: str  # the number or the threshold, in the words of the contract
    value: float  # the number to round, or left - right of a threshold
    options: tuple[float, ...]  # the results within reach; thresholds: 1.0 (true) and 0.0 (false)
    own: float  # float64's result
    taken: float  # the result used


class Ties:
    """Decide every rounding and every money threshold of one step, and record the near-ties in order.

    A number that recurs in the step, such as the slippage at one price, keeps its first result. A named use of it
    (`use`) may be forced to the other side: a compiler may compute one number twice, and round it both ways.

    Args:
      forced: the result of the i-th near-tie of the step. Near-ties without an entry take float64's side.
    """

    def __init__(self, forced: Mapping[int, float] | None = None):
        self.forced = dict(forced or {})
        self.cases: list[Tie] = []
        self._decided: dict[tuple[str, float], float] = {}

    @property
    def flipped(self) -> int:
        """Count the numbers that were decided against float64, in any of their uses."""
        return len({(case.where, case.value) for case in self.cases if case.taken != case.own})

    @property
    def count(self) -> int:
        """Count the numbers that were near-ties, each once."""
        return len(self._decided)

    def ceil(self, where: str, x: float, scale: float = 0.0, use: str = "") -> float:
        return self._rounded(math.ceil, where, x, scale, use)

    def floor(self, where: str, x: float, scale: float = 0.0) -> float:
        return self._rounded(math.floor, where, x, scale)

    def round(self, where: str, x: float, scale: float = 0.0) -> float:
        """Round half to even, as everywhere in the rules (and as Python's own `round`)."""
        return self._rounded(round, where, x, scale)

    def at_most(self, where: str, left: float, right: float, scale: float = 0.0) -> bool:
        """Return `left <= right` for two sums of money with largest terms of size `scale`."""
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
