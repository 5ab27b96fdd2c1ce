"""Step the twin to a simulator's result, with near-ties decided as the simulator decided them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from perpjax.reference.twin import Twin


def step_like(twin: Twin, action: Any, agrees: Callable[[Twin], bool], limit: int = 4096) -> bool:
    """Step the twin with the fewest near-ties decided against float64 that make `agrees(twin)` true.

    The first try flips nothing. The likeliest sets of flips follow: few flips, each to a result next to float64's own.
    The search takes at most `limit` steps.

    Returns:
      False for a real disagreement: no set of flips agrees. The twin then holds the result of float64 alone.
    """
    start, counts = twin.state, (twin.near_ties, twin.flipped_ties)
    order = itertools.count()
    heap: list[tuple[int, int, dict[int, float]]] = [(0, next(order), {})]
    for _ in range(limit):
        if not heap:
            break
        cost, _, forced = heapq.heappop(heap)
        twin.state, (twin.near_ties, twin.flipped_ties) = start.copy(), counts
        twin.step(action, forced)
        if agrees(twin):
            return True
        for i in range(max(forced, default=-1) + 1, len(twin.ties.cases)):
            case = twin.ties.cases[i]
            others = [option for option in case.options if option != case.taken]
            for far, option in enumerate(sorted(others, key=lambda x, c=case: abs(x - c.value)), 1):
                heapq.heappush(heap, (cost + far, next(order), {**forced, i: option}))
    twin.state, (twin.near_ties, twin.flipped_ties) = start.copy(), counts
    twin.step(action)
    return False
