"""Evaluation: whole episodes in windows, and one account over a whole split with every lot.

python -m train.evaluate RUN --split val
"""

from train.evaluate.windows import (
    Result,
    Windows,
    evaluate,
    flat,
    greedy,
    random,
    t_statistic,
    window_starts,
)

__all__ = ["Result", "Windows", "evaluate", "flat", "greedy", "random", "t_statistic", "window_starts"]
