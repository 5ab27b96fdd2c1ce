"""Hooks: receivers of the events of a training run, such as the display, the JSON lines, or one of your own."""

import pathlib
from typing import Any, NamedTuple


class RunInfo(NamedTuple):
    """The facts about a run that hooks show or need, known before the first update."""

    folder: pathlib.Path
    """The run folder."""
    dataset: str
    """As in `Config.dataset`."""
    policy: str
    """One phrase, such as "MLP 64-64"."""
    device: str
    """One phrase, such as "1 x NVIDIA H100" or "cpu"."""
    num_envs: int
    total_steps: int
    """Environment steps of the whole run."""
    first_update: int
    """Updates that were done before this session: 0, or those of the checkpoint that is resumed."""
    first_step: int
    """Environment steps that were done before this session."""
    initial_equity: float
    """Quote currency of one account. Costs in the metrics are in quote currency, means of an episode."""


class Hook:
    """A receiver of a run's events. Override some methods; by default each does nothing.

    All methods are called in one thread, between chunks of updates. An exception ends the training.
    """

    def on_start(self, run: RunInfo) -> None:
        """Receive the facts about the run, before anything is compiled, and after `set_state`."""

    def on_stage(self, text: str) -> None:
        """Receive the name of the stage that begins, such as "compiling"."""

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Receive the metrics of finished updates, in order: one dictionary of finite numbers for each update.

        Every dictionary has `update` (from 1), `steps`, `seconds` and `steps_per_second`, over all environments.
        A mean over the episodes that ended in the update is absent if none did. docs/runs.md has them all.
        """

    def on_evaluation(self, evaluation: dict[str, Any]) -> None:
        """Receive one look at the validation split.

        Keys: `update`, `steps`, `windows`, `best` (whether it is the best so far), and means over the windows:
        `return`, `closed_return`, `max_drawdown`, `fees`, `slippage`, `funding` (fractions of initial equity), `trades`
        and `liquidations`.
        """

    def on_message(self, text: str) -> None:
        """Receive one sentence for the user, such as a warning."""

    def on_end(self, text: str) -> None:
        """Receive the last words of the run: how it ended and the commands that go on from there."""

    def get_state(self) -> dict[str, Any]:
        """Return JSON values that a checkpoint keeps under the name of the class."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take the state back when a run is resumed."""
