"""The float64 twin: one environment, one lot at a time, written from the contract (docs/semantics.md) alone."""

from perpjax.reference.parity import step_like
from perpjax.reference.records import Exit, Ledger, Lot, Order, TwinMarket, TwinParams, TwinState, Verdict
from perpjax.reference.ties import Tie, Ties
from perpjax.reference.twin import Twin

__all__ = [
    "Exit",
    "Ledger",
    "Lot",
    "Order",
    "Tie",
    "Ties",
    "Twin",
    "TwinMarket",
    "TwinParams",
    "TwinState",
    "Verdict",
    "step_like",
]
