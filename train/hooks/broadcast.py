"""Several hooks as one."""

from collections.abc import Callable, Sequence
from typing import Any

from train.hooks import Hook


def _forward(event: str) -> Callable[..., None]:
    def forward(self: "Broadcast", *args: Any) -> None:
        for hook in self.hooks.values():
            getattr(hook, event)(*args)

    return forward


class Broadcast(Hook):
    """Passes each event to every hook, in order.

    Args:
      hooks: their states are kept by class name; of several hooks of one class the later ones are numbered.
    """

    def __init__(self, hooks: Sequence[Hook]):
        self.hooks: dict[str, Hook] = {}
        for hook in hooks:
            name, same = type(hook).__name__, sum(type(h) is type(hook) for h in self.hooks.values())
            self.hooks[f"{name} {same + 1}" if same else name] = hook

    on_start = _forward("on_start")
    on_stage = _forward("on_stage")
    on_updates = _forward("on_updates")
    on_evaluation = _forward("on_evaluation")
    on_message = _forward("on_message")
    on_end = _forward("on_end")

    def get_state(self) -> dict[str, Any]:
        """Return the states that are not empty, by name."""
        states = {name: hook.get_state() for name, hook in self.hooks.items()}
        return {name: state for name, state in states.items() if state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Give each hook its state; a hook that had none gets none."""
        for name in self.hooks.keys() & state.keys():
            self.hooks[name].set_state(state[name])
