"""Evaluation of a policy: windows of whole episodes, and the whole verdict, `evaluation.evaluate`.

python -m train.evaluate RUN --split val
"""

from train.evaluate.windows import (
    Result,
    Windows,
    choose,
    flat,
    greedy,
    measure_windows,
    random,
    t_statistic,
    window_starts,
)

__all__ = ["Result", "Windows", "choose", "flat", "greedy", "measure_windows", "random", "t_statistic", "window_starts"]
