"""What follows a training run: a display, a file of metrics, or a hook of your own."""

from typing import Any, Protocol


class Hook(Protocol):
    """Anything that wants to see the metrics of a run."""

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Take note of finished updates, in order: one dictionary each, of finite numbers by name.

        Always there: `update` (from 1), `steps`, `seconds` and `steps_per_second`, over all environments.
        """
