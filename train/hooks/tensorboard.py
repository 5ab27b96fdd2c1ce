"""Metrics as event files of TensorBoard. Needs tensorboardX: `pip install 'perpjax[tensorboard]'`."""

import importlib.util
import pathlib
from typing import Any

from train.hooks import Hook, RunInfo

FLUSH_SECONDS = 10
"""Longest time between a point and its file."""


class TensorBoard(Hook):
    """A `Hook` that writes `train/NAME` and `validation/NAME` over environment steps. A context that closes the file.

    Args:
      folder: of the event files; it is made. None: `tensorboard` in the run folder.

    Raises:
      ValueError: tensorboardX is missing.
    """

    def __init__(self, folder: pathlib.Path | None = None):
        if importlib.util.find_spec("tensorboardX") is None:
            raise ValueError("TensorBoard needs tensorboardX: pip install 'perpjax[tensorboard]'")
        import tensorboardX

        self.folder = folder
        self._make = tensorboardX.SummaryWriter
        self._writer: Any = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *error: Any) -> None:
        self._close()

    def on_start(self, run: RunInfo) -> None:
        """Begin a file. TensorBoard then hides the points of an earlier session that lie after its beginning."""
        folder = self.folder or run.folder / "tensorboard"
        self._writer = self._make(str(folder), purge_step=run.first_step + 1, flush_secs=FLUSH_SECONDS)

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Write a point of each metric for each update."""
        for line in metrics:
            self._write("train", line)

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Write a point of each mean."""
        self._write("validation", {name: value for name, value in evaluation.items() if name != "best"})

    def on_end(self, text: str) -> None:
        """Close the file."""
        self._close()

    def _write(self, group: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name not in ("update", "steps"):
                self._writer.add_scalar(f"{group}/{name}", value, values["steps"])

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
