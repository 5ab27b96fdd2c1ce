"""Warnings about a run that goes wrong, each with its remedy."""

from collections.abc import Callable
from typing import Any

from train.hooks import Hook, RunInfo

ENTROPY_SHARE = 0.05
"""Least share of the first update's entropy."""

LARGEST_KL = 0.1
"""Of one update."""

UPDATES = 10
"""Updates with ended episodes over which a metric of episodes is judged."""

PATIENCE = 0.25
"""Share of a run after which its profit is judged. An untrained policy seldom has one."""

_WATCHED = ("trades", "liquidations", "fees", "slippage", "funding", "gross_profit")


class Warner(Hook):
    """A `Hook` that says each of its warnings at most once in a run, also in one that is resumed.

    Args:
      say: takes a sentence that begins with "warning: ".
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.said: list[str] = []
        self.first_entropy: float | None = None
        self.judged_from = 0.0
        self.recent: list[dict[str, float]] = []
        """Of the last `UPDATES` updates in which episodes ended: the watched metrics."""

    def on_start(self, run: RunInfo) -> None:
        """Note the step from which on profit is judged."""
        self.judged_from = PATIENCE * run.total_steps

    def on_updates(self, metrics: list[dict[str, Any]]) -> None:
        """Judge every update."""
        for line in metrics:
            self._judge_policy(line)
            if "trades" in line:
                self.recent.append({name: line[name] for name in _WATCHED if name in line})
                self.recent = self.recent[-UPDATES:]
                if len(self.recent) == UPDATES:
                    self._judge_episodes(line["update"], line["steps"] >= self.judged_from)

    def get_state(self) -> dict[str, Any]:
        """Return the names of the warnings that were given, and the metrics that later ones need."""
        return {"said": list(self.said), "first_entropy": self.first_entropy, "recent": list(self.recent)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.said, self.first_entropy = list(state["said"]), state["first_entropy"]
        self.recent = list(state["recent"])

    def _judge_policy(self, line: dict[str, Any]) -> None:
        update, entropy, kl = line["update"], line.get("entropy"), line.get("kl", 0.0)
        if entropy is not None:
            if self.first_entropy is None:
                self.first_entropy = entropy
            if entropy < ENTROPY_SHARE * self.first_entropy and self.first_entropy > 0:
                self._warn(
                    "entropy",
                    update,
                    f"entropy collapsed from {self.first_entropy:.3g} to {entropy:.3g}, the policy hardly explores; "
                    "raise entropy_coef",
                )
        if kl > LARGEST_KL:
            self._warn(
                "kl",
                update,
                f"KL {kl:.3g} is above {LARGEST_KL}, an update changes the policy too much; "
                "lower learning_rate or epochs",
            )

    def _judge_episodes(self, update: int, is_late: bool) -> None:
        over = f"in {UPDATES} updates"
        trades = self._average("trades")
        if trades == 0:
            self._warn(
                "no trades",
                update,
                f"no trades {over}, the policy has stopped trading; costs may exceed the earnings from the features: "
                "lower the costs, or train on other features",
            )
        if not trades:
            return
        profit, liquidations = self._average("gross_profit"), self._average("liquidations")
        costs = sum(self._average(name) or 0.0 for name in ("fees", "slippage", "funding"))
        if not is_late or profit is None:
            pass
        elif profit <= 0:
            self._warn(
                "loss",
                update,
                f"gross profit of an episode is {profit:,.2f} {over}, trades lose before costs; "
                "train longer, or on other features",
            )
        elif costs > profit:
            self._warn(
                "costs",
                update,
                f"costs of an episode are {costs:,.2f}, above its gross profit of {profit:,.2f}, {over}; "
                "trade less often, or lower the costs",
            )
        if liquidations is not None and liquidations >= trades:
            self._warn("liquidations", update, f"every lot was liquidated {over}; lower max_leverage")

    def _average(self, name: str) -> float | None:
        """The mean over the recent updates; None if one lacks the metric."""
        found = [line[name] for line in self.recent if name in line]
        return sum(found) / UPDATES if len(found) == UPDATES else None

    def _warn(self, name: str, update: int, text: str) -> None:
        if name not in self.said:
            self.said.append(name)
            self.say(f"warning: update {update}: {text}")
