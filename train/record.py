"""The run folder as a record: config.json, evaluation.json, and `latest` beside the runs."""

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
import jaxlib

import perpjax
from perpjax import Market
from perpjax.audit.fingerprint import fingerprint
from train.checkpoint import write_json
from train.run_folder import CHECKPOINTS, CONFIG, EVALUATIONS, FORMAT, LATEST, METRICS


def create_folder(wanted: pathlib.Path | None, name: str) -> pathlib.Path:
    """Create a run folder that no other run has: `wanted`, or runs/NAME-TIME with a suffix if that is taken.

    Raises:
      ValueError: `wanted` exists and is not empty.
      OSError: it cannot be made.
    """
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        if any(wanted.iterdir()):
            raise ValueError(
                f"run_dir {wanted} already holds files; name another folder, or go on with --resume {wanted}"
            )
        try:
            # Of two runs started at once only one makes this file.
            open(wanted / CONFIG, "x").close()
        except FileExistsError:
            raise ValueError(f"run_dir {wanted} already holds a run; name another one") from None
        return wanted
    folder, stem = pathlib.Path("runs"), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(exist_ok=True)
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            (folder / (stem + suffix)).mkdir(exist_ok=False)
            return folder / (stem + suffix)
    raise ValueError(f"{folder / stem}: 999 runs have this name already")


def remove_unused(folder: pathlib.Path) -> None:
    """Remove the folder of a run that has ended before its first update."""
    metrics = folder / METRICS
    if (folder / CHECKPOINTS).exists() or (metrics.exists() and metrics.stat().st_size):
        return
    for name in (CONFIG, METRICS, EVALUATIONS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def point_latest(folder: pathlib.Path) -> None:
    """Make `latest`, beside the run, point to it, if it can be made. Without links it is a file with the name."""
    latest = folder.parent / LATEST
    temporary = latest.with_name(f"{LATEST}.{os.getpid()}.tmp")
    if latest.is_dir() and not latest.is_symlink():
        return  # the user's own folder
    with contextlib.suppress(OSError):
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(folder.name, target_is_directory=True)
        except OSError:
            temporary.write_text(folder.name + "\n")
        os.replace(temporary, latest)


def describe_session(first_step: int) -> dict[str, Any]:
    """Return the facts about this process: command, time, versions, device, commit."""
    return {
        "command": sys.argv,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "first_step": first_step,
        "versions": {
            "perpjax": perpjax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "orbax-checkpoint": importlib.metadata.version("orbax-checkpoint"),
            "python": platform.python_version(),
        },
        "device": describe_device(),
        "commit": _find_commit(),
    }


def describe_device() -> str:
    """Return one phrase about the default device, such as "1 x NVIDIA H100" or "cpu (2 cores)"."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu ({len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores)"
    return f"1 x {device.device_kind}"


def describe_dataset(name: str, markets: dict[str, Market]) -> dict[str, Any]:
    """Return name, path, features and symbols of the dataset, and the SHA-256 of each split as it was loaded."""
    head = next(iter(markets.values()))
    path = None if name.startswith("synthetic:") else str(pathlib.Path(name).absolute())
    hashes = {split: fingerprint(market) for split, market in markets.items()}
    symbols = sorted({origin.symbol for origin in head.origins})
    return {"name": name, "path": path, **hashes, "features": list(head.feature_names), "symbols": symbols}


def locate_dataset(record: dict[str, Any]) -> str:
    """Return the name of a run's dataset, or its absolute path if the name leads nowhere from the current folder."""
    name, path = record["settings"]["dataset"], record["dataset"].get("path")
    return name if path is None or pathlib.Path(name).exists() else path


def write_config(folder: pathlib.Path, record: dict[str, Any], session: dict[str, Any]) -> None:
    """Write config.json: settings and dataset of the run, and one entry for each session."""
    first = {name: session[name] for name in ("command", "began", "versions", "device", "commit")}
    sessions = [*record.get("sessions", []), session]
    write_json(folder / CONFIG, {"format": FORMAT} | first | record | {"sessions": sessions})


def _find_commit() -> str | None:
    """The commit of the clone that holds this program, with "+" if files differ from it; None outside a clone."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        status = ["status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run([*git, *status], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
