"""The form of a rule for one lot."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from perpjax.state import Lots


class LotRule(Protocol):
    """One moment of a bar, for one lot. `xla.over_lots` applies it to every lot of an account.

    First each function of `decide` finds a fact about the lot, such as its payment or its fill. Then `apply` makes the
    new lot and its share of the totals from the facts. They are apart for speed: a CPU computes each fact once, and
    not anew for every number that needs it.

    The lot's fields may have any shape [...]: a rule only broadcasts.

    Attributes:
      fields: names of the fields of a lot that the rule reads or changes. The others are None in its lots.
    """

    fields: tuple[str, ...]

    @property
    def decide(self) -> tuple[Callable[..., Any], ...]:
        """Functions of the lot and of the facts before; each returns one fact, such as the price of a fill."""
        ...

    def apply(self, lot: Lots, *facts: Any) -> tuple[Lots, NamedTuple]:
        """Return the lot afterwards, and its share of the account's totals.

        Totals are added up over the lots; those named in `MAXIMA` are maximised. Their field `events` holds flags by
        name, which are counted. A free slot (quantity 0) must add nothing.
        """
        ...
