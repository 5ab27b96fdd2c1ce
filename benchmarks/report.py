"""What the benchmarks share: the figures' spread, the machine that they are of, and how a command ends."""

import importlib.metadata
import os
import pathlib
import platform
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import tyro

from train.checkpoint import write_json

Args = TypeVar("Args")

RESULTS = pathlib.Path(__file__).parent / "results"
"""Of the runs that `benchmarks/README.md` tells of."""


def describe_spread(samples: list[float], digits: int) -> str:
    """Such as "0.45 (0.43 .. 0.48)": median and quartiles."""
    if not samples:
        return "not measured"
    median = f"{statistics.median(samples):.{digits}f}"
    if len(samples) == 1:
        return median
    low, _, high = statistics.quantiles(samples, method="inclusive")
    return f"{median} ({low:.{digits}f} .. {high:.{digits}f})"


def describe_machine() -> dict[str, Any]:
    """What the figures are measured on, and how many processes it was running in the last minute."""
    file = pathlib.Path("/proc/cpuinfo")
    said = dict(re.findall(r"(.*?)\s*: (.*)", file.read_text())) if file.exists() else {}
    parts = [f"{name} {said[name]}" for name in ("cpu family", "model") if name in said]
    return {
        "processor": ", ".join([said.get("model name", platform.processor()), *parts]),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def list_versions() -> dict[str, str]:
    """Of what matters to the figures, as far as it is installed."""
    names = ("jax", "jaxlib", "numpy", "perpjax", "numba", "torch", "torchrl", "torchtrade")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {n: installed[n] for n in names if n in installed}


def save(path: pathlib.Path, program: str, result: dict[str, Any]) -> None:
    """Write what `python -m program` measured, and by which command and versions, as JSON."""
    command = " ".join([f"python -m {program}", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"command": command, "versions": list_versions()} | result)


def run_command(
    run: Callable[[Args], None], args: type[Args], program: str, description: str | None, argv: list[str] | None
) -> None:
    """Parse the arguments of `python -m program` and run it; what is wrong is one line and exit status 2."""
    try:
        run(tyro.cli(args, args=argv, prog=f"python -m {program}", description=description))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
