"""Write benchmarks/RESULTS.md from the JSON files in benchmarks/results.

python -m benchmarks.results
"""

import json
import pathlib
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS

PAGE = RESULTS.parent / "RESULTS.md"


class Line(NamedTuple):
    """A figure of the page."""

    file: str
    """Name of the JSON file, without `.json`."""
    where: dict[str, Any]
    """Entries that its row must have."""
    figure: str
    """The entry to show."""
    text: str
    goal: float | None = None
    at_least: bool = True
    """Whether the goal is a minimum; else a maximum."""


LINES = (
    Line("throughput", {"num_envs": 64}, "ours", "million steps/s on a CPU, 64 environments"),
    Line("throughput", {"num_envs": 4096}, "ours", "million steps/s on a CPU, 4 096 environments"),
    Line("throughput", {"num_envs": 65536}, "ours", "million steps/s on a CPU, 65 536 environments"),
    Line("throughput", {"num_envs": 4096}, "ratio", "times as fast as TorchTrade, 4 096 environments", 1.3),
    Line("gpu_counted", {"num_envs": 4096}, "kernels", "GPU kernels of a rollout step, 4 096 environments", 12, False),
    Line("gpu_counted", {"num_envs": 4096}, "bytes_per_env", "bytes of that step, an environment", 3800, False),
    Line("gpu_timed", {"num_envs": 4096}, "million_steps", "million steps/s on one H100, 4 096 environments", 100),
    Line("gpu_timed", {"num_envs": 262144}, "million_steps", "million steps/s on one H100, 262 144 environments", 700),
    Line("training", {"num_envs": 4096}, "ours", "million training steps/s, 4 096 x 32, 3 epochs"),
    Line("training", {"num_envs": 4096}, "ratio", "times as fast as a plain trainer", 1.5),
    Line("startup", {"cache": "empty"}, "first_update", "seconds to the first update, nothing compiled", 12, False),
    Line("startup", {"cache": "filled"}, "first_update", "seconds to the first update, with the cache", 5, False),
    Line("startup", {"cache": "filled"}, "end", "seconds of a run of 1 million steps, with the cache"),
    Line(
        "gpu_training_counted",
        {"body": "rollout step"},
        "kernels",
        "GPU kernels of a training step, 76 before",
        45,
        False,
    ),
    Line("gpu_training_counted", {"body": "minibatch"}, "kernels", "GPU kernels of a minibatch, 80 before", 48, False),
    Line("truth", {"check": "parity"}, "disagreements", "steps that disagree with the float64 twin", 0, False),
    Line("truth", {"check": "fuzz"}, "violations", "random steps that break a check", 0, False),
    Line("truth", {"check": "ladder"}, "failed", "verdicts of the ladder that fail", 0, False),
    Line("truth", {"check": "ladder of a GRU"}, "failed", "verdicts of the ladder that fail, with a GRU", 0, False),
    Line("mutation", {}, "unexplained", "mutants that survive without an explanation", 0, False),
)


def describe(line: Line, result: dict[str, Any]) -> str:
    """Return the line's row of the table.

    Raises:
      ValueError: no row of the result, or more than one, is meant.
    """
    rows = [r for r in result["rows"] if line.where.items() <= r.items()]
    if len(rows) != 1:
        raise ValueError(f"{line.file}.json has {len(rows)} rows with {line.where}; it must have one")
    (row,) = rows
    value, goal, met = row.get(line.figure), "", ""
    if line.goal is not None:
        goal = f"{'at least' if line.at_least else 'at most'} {number(line.goal)}"
        if value is not None:
            met = "yes" if (value >= line.goal if line.at_least else value <= line.goal) else "no"
    shown = "not measured" if value is None else number(value)
    if value is not None and line.figure in ("ratio", "million_steps"):
        shown += f" ({number(row['low'])} .. {number(row['high'])})"
    date, commit = (row.get(name, result[name]) for name in ("date", "commit"))
    return f"| {line.text} | {shown} | {goal} | {met} | {line.file} | {date} | {commit} |"


def number(value: float) -> str:
    """Return at most three digits behind the point, and a space between thousands."""
    return f"{round(value, 3):,}".replace(",", " ")


def write_page(folder: pathlib.Path = RESULTS) -> str:
    """Return the page of all results in a folder."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [
        "# Results",
        "",
        "`python -m benchmarks.results` writes this page from `benchmarks/results/*.json`. Do not edit it.",
        "Values are medians, with quartiles in brackets. A `+` after a commit means uncommitted changes.",
        "",
        "| figure | value | goal | met | file | date | commit |",
        "|---|---|---|---|---|---|---|",
        *(describe(line, results[line.file]) for line in LINES),
        "",
        "| file | command | machine | jax |",
        "|---|---|---|---|",
        *(f"| {name} | {r['command']} | {r['machine']} | {r['versions']['jax']} |" for name, r in results.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page())
