"""Stepping the twin to a simulator's result, near-ties taken as the simulator took them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from perpjax.reference.twin import Twin


def step_like(twin: Twin, action: Any, agrees: Callable[[Twin], bool], limit: int = 512) -> bool:
    """Steps the twin, deciding as few near-ties as possible against float64 until `agrees(twin)`.

    Tries no flip, then every single flip, then pairs, and so on, at most `limit` steps in all. When nothing
    agrees the twin is left where float64 alone leads, and the answer is False: a real disagreement.
    """
    start, counts = twin.state, (twin.near_ties, twin.flipped_ties)
    queue: deque[dict[int, float]] = deque([{}])
    for _ in range(limit):
        if not queue:
            break
        forced = queue.popleft()
        twin.state, (twin.near_ties, twin.flipped_ties) = start.copy(), counts
        twin.step(action, forced)
        if agrees(twin):
            return True
        for i in range(max(forced, default=-1) + 1, len(twin.ties.cases)):
            case = twin.ties.cases[i]
            others = [option for option in case.options if option != case.taken]
            queue.extend({**forced, i: option} for option in sorted(others, key=lambda x, c=case: abs(x - c.value)))
    twin.state, (twin.near_ties, twin.flipped_ties) = start.copy(), counts
    twin.step(action)
    return False
