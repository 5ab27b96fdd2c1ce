"""The inputs of the twin (market, parameters, order) and its records (lots, ledger, state).

Units as in the contract (docs/semantics.md, section "Units"): prices, ATR and distances in whole ticks, quantities
in whole steps, money in quote currency. Rates and fees are fractions, and time is a bar index. Every number is float64
or int. In a parity test the floats hold the simulator's float32 values exactly (`float(numpy.float32(x))`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np

HOLD, LONG, SHORT, CLOSE = 0, 1, -1, 2


class Verdict(IntEnum):
    """The answer to an order: the first that holds, in this order (rule 4)."""

    HOLD = 0
    DATA_GAP = 1
    MAX_LOTS = 2
    NO_HEDGE = 3
    MAX_EXPOSURE = 4
    MAX_NOTIONAL = 5
    BELOW_MINIMUM = 6
    IMMEDIATE_LIQUIDATION = 7
    ACCEPTED = 8


class Order(NamedTuple):
    """A decoded action: direction HOLD, LONG, SHORT or CLOSE, and the numbers of an opening."""

    direction: int
    size: float = 0.0
    leverage: float = 1.0
    stop_multiple: float = 1.0
    target_multiple: float = 1.0


class Bracket(NamedTuple):
    """One line of the maintenance table: `maintenance = rate * notional - amount` on (floor, cap]."""

    floor: float
    cap: float
    max_leverage: float
    rate: float
    amount: float


def _widen(record: object) -> None:
    """Make every float of a frozen dataclass float64: a single numpy float32 would turn sums into float32."""
    for entry in fields(record):
        value = getattr(record, entry.name)
        if entry.type == "float":
            object.__setattr__(record, entry.name, float(value))
        elif entry.type == "np.ndarray" and entry.name != "valid":
            object.__setattr__(record, entry.name, np.asarray(value, np.float64))


@dataclass(frozen=True)
class TwinMarket:
    """N bars of K candles of one instrument, in one segment.

    Attributes:
      open, high, low, close, mark_open, mark_high, mark_low, mark_close: [N, K] ticks.
      valid: [N, K] bool.
      funding_rate: [N], 0 where nothing settles.
      funding_price: [N] ticks.
      atr: [N + 1] whole ticks, known at T_t.
      features: [N + 1, F] unscaled, known at T_t.
      feature_mean, feature_scale: [F].
      tick_value: quote currency of one tick for one step.
      min_notional: the venue's smallest order, quote currency.
      max_steps: the venue's largest order in steps.
      maintenance_fee_rate: closing fee inside the maintenance requirement, a fraction.
      brackets: [n, 5] rows (floor, cap, max leverage, rate, amount).
      first: first decision bar of the segment.

    Raises:
      ValueError: the bracket table is not continuous and increasing (rule 6), or `first` is below 1.
    """

    open: np.ndarray
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    mark_open: np.ndarray
    mark_high: np.ndarray
    mark_low: np.ndarray
    mark_close: np.ndarray
    valid: np.ndarray
    funding_rate: np.ndarray
    funding_price: np.ndarray
    atr: np.ndarray
    features: np.ndarray
    feature_mean: np.ndarray
    feature_scale: np.ndarray
    tick_value: float
    min_notional: float
    max_steps: float
    maintenance_fee_rate: float
    brackets: np.ndarray
    first: int = 673

    def __post_init__(self) -> None:
        _widen(self)
        if self.first < 1:
            raise ValueError(f"first decision bar {self.first}: a decision needs a bar before it")
        for before, after in zip(self.table, self.table[1:], strict=False):
            # The jump may be 1e-5, relative: the columns may have been rounded to float32.
            jump = after.floor * (after.rate - before.rate) - (after.amount - before.amount)
            if after.floor != before.cap or after.cap <= after.floor or after.rate <= before.rate:
                raise ValueError(f"brackets {before} and {after} are not increasing")
            if abs(jump) > 1e-5 * max(1.0, after.amount):
                raise ValueError(f"maintenance jumps by {jump} between brackets {before} and {after}")

    @property
    def bars(self) -> int:
        return self.open.shape[0]

    @property
    def candles(self) -> int:
        return self.open.shape[1]

    @cached_property
    def table(self) -> list[Bracket]:
        return [Bracket(*(float(number) for number in row)) for row in self.brackets]


@dataclass(frozen=True)
class TwinParams:
    """The parameters and static choices, with their defaults."""

    initial_equity: float = 10_000.0
    taker_fee: float = 0.0006
    slippage_base: float = 0.0002
    slippage_atr: float = 0.1
    stop_depth: float = 0.1
    max_exposure: float = 0.10
    max_leverage: float = 10.0
    max_hold: int = 192
    ruin_fraction: float = 0.1
    entry_penalty: float = 0.0002
    risk_penalty: float = 0.1
    liquidation_penalty: float = 0.005
    ruin_penalty: float = 0.1
    actions: str = "box5"  # or "multi_discrete"
    intrabar: str = "nearest"  # or "pessimistic", "optimistic"
    reward: str = "log_return"  # or "shaped"
    opposite: str = "refuse"  # or "close"
    max_lots: int = 10
    episode_length: int = 672

    def __post_init__(self) -> None:
        _widen(self)


@dataclass
class Lot:
    """One open position; a free slot holds None instead."""

    side: int  # +1 long, -1 short: the `d` of the rules
    quantity: float  # steps
    entry: float  # ticks
    margin: float  # quote
    leverage: float
    stop: float  # ticks
    target: float  # ticks
    liquidation: float = 0.0  # ticks; 0: none
    age: int = 0  # bars; the opening bar counts 1 once it is over
    settlements: int = 0  # funding payments so far: for near-ties only


class Exit(NamedTuple):
    """The end of one lot. Money in quote currency, computed from this exit alone."""

    how: str  # closed, stopped, target, timed_out or liquidated
    slot: int
    lot: Lot  # its state at the end
    candle: int  # of the bar, 0 .. K - 1
    price: float  # ticks: the fill; for a liquidation L, or the bankruptcy price if that is nearer to the entry
    realised: float = 0.0  # profit before the fee; 0 for a liquidation
    fee: float = 0.0
    slippage: float = 0.0  # from the price that triggered the exit to the fill
    gap_loss: float = 0.0  # from the stop to the candle open beyond it
    forgiven: float = 0.0  # saved by the floor at -M and by the fee's cap
    forfeited: float = 0.0  # margin left at the price of a liquidation


@dataclass
class Ledger:
    """Counts and sums since reset (docs/semantics.md, section "Account")."""

    fees: float = 0.0
    funding: float = 0.0  # paid; a receipt is negative
    realised: float = 0.0
    liquidation_losses: float = 0.0
    traded_notional: float = 0.0  # entry and exit fills
    slippage: float = 0.0  # entries and exits
    gap_losses: float = 0.0
    forgiven: float = 0.0
    forfeited: float = 0.0
    opened: int = 0
    stopped: int = 0
    targets: int = 0
    timed_out: int = 0
    closed: int = 0
    liquidated: int = 0
    ambiguous: int = 0
    verdicts: list[int] = field(default_factory=lambda: [0] * len(Verdict))  # orders by verdict

    def copy(self) -> Ledger:
        return replace(self, verdicts=list(self.verdicts))


@dataclass
class TwinState:
    """The state at decision t, with the results of the last step."""

    t: int
    end: int  # bar at which the episode ends: min(start + episode_length, N)
    wallet: float
    lots: list[Lot | None]  # [max_lots]
    ledger: Ledger
    equity: float
    largest: float  # largest wallet so far: the scale of the rounding of its terms
    obs: np.ndarray | None = None  # [F + 9]
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    events: list[tuple] = field(default_factory=list)  # of the last step
    exits: list[Exit] = field(default_factory=list)  # of the last step, in the order they happened

    def copy(self) -> TwinState:
        lots = [lot and replace(lot) for lot in self.lots]
        return replace(self, lots=lots, ledger=self.ledger.copy(), events=list(self.events), exits=list(self.exits))
