"""Metrics as a file of JSON lines."""

import json
import pathlib
from typing import Any


class JsonLines:
    """A `Hook` that writes one line an update, at once. A context: the file is closed at its end.

    Args:
      path: of the file. New lines are appended.
    """

    def __init__(self, path: pathlib.Path):
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Write the lines."""
        for line in metrics:
            self.file.write(json.dumps(line) + "\n")

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()
