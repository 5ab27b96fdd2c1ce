"""Hooks of a training run: a display, a file of metrics, or your own."""

from typing import Any, Protocol


class Hook(Protocol):
    """A receiver of the metrics of a run."""

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Receive the metrics of finished updates, in order: one dictionary of finite numbers for each update.

        Every dictionary has `update` (from 1), and `steps`, `seconds` and `steps_per_second` over all environments.
        """
