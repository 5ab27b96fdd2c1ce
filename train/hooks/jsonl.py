"""Metrics and evaluations as files of JSON lines."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from train.hooks import Hook, RunInfo
from train.run_folder import EVALUATIONS, METRICS


class JsonLines(Hook):
    """Writes metrics.jsonl and evaluations.jsonl in the run folder, each line at once.

    A resumed run first cuts off the lines after its checkpoint. A line that a full disk refuses is kept in memory, and
    written with the next ones.

    Args:
      say: receives one warning when a file cannot be written.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None):
        self.say = say
        self.files: dict[str, _Lines] = {}
        self.waiting: dict[str, str] = {}

    def on_start(self, run: RunInfo) -> None:
        """Open both files, and cut off the lines after the update from which the run goes on.

        Raises:
          OSError: a file cannot be made or cut; the error names it.
        """
        for name in (METRICS, EVALUATIONS):
            self.files[name] = _Lines(run.folder / name, run.first_update, self.say, self.waiting.get(name, ""))

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Write one line for each update."""
        self.files[METRICS].write(metrics)

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Write one line."""
        self.files[EVALUATIONS].write([evaluation])

    def on_end(self, text: str) -> None:
        """Write the lines that wait."""
        for file in self.files.values():
            file.write([])

    def get_state(self) -> dict[str, Any]:
        """Return the lines that wait, by file."""
        return {name: file.waiting for name, file in self.files.items() if file.waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.waiting = state


class _Lines:
    """A file that grows by whole lines only."""

    def __init__(self, path: pathlib.Path, updates: int, say: Callable[[str], None], waiting: str):
        self.path, self.say, self.warned = path, say, False
        kept = _lines_until(path, updates) if path.exists() else []
        self.size = sum(map(len, kept))
        with open(path, "ab") as file:
            file.truncate(self.size)
        written = json.loads(kept[-1])["update"] if kept else 0
        missing = [line for line in map(json.loads, waiting.splitlines()) if line["update"] > written]
        self.waiting = ""
        self.write(missing)

    def write(self, lines: list[dict[str, Any]]) -> None:
        self.waiting += "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        data = self.waiting.encode()
        if not data:
            return
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.truncate(self.size)  # the part of a line that a full disk took
                file.seek(self.size)
                left = memoryview(data)
                while left:
                    left = left[file.write(left) :]
        except OSError as error:
            if not self.warned:
                self.say(f"{self.path}: cannot be written: {error.strerror}; its lines wait in memory")
            self.warned = True
            return
        self.size += len(data)
        self.waiting, self.warned = "", False


def _lines_until(path: pathlib.Path, updates: int) -> list[bytes]:
    """Return the whole lines of the first updates."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["update"] > updates:
                break
        except (ValueError, KeyError, TypeError):  # a line that a crash has damaged
            break
        kept.append(line)
    return kept
