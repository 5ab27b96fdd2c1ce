"""The results of a step: the reward (rule 11) and the observation (docs/semantics.md, section "Observation")."""

from __future__ import annotations

import math

import numpy as np

from perpjax.reference.records import Ledger, Lot, TwinMarket, TwinParams, TwinState

REWARD_FLOOR = 1e-3  # of the initial equity: for equities inside the logarithm, and for the shaped risk term
OBSERVATION_FLOOR = 1e-6  # of the initial equity: the divisor of the account numbers
FEATURE_CLIP = 10.0


def profit(lot: Lot, price: float, tick_value: float) -> float:
    """Return `d * q * (price - E) * tick_value`, quote."""
    return lot.side * lot.quantity * (price - lot.entry) * tick_value


def reward(s: TwinState, m: TwinMarket, p: TwinParams, equity_before: float, before: Ledger) -> float:
    """Return the reward of the step over bar t = s.t; every field of `s` but `t` has its value after the step.

    Postings and the change of unrealised profit sum to the change of equity. `log1p(delta / e)` is therefore the
    logarithm of the ratio.
    """
    floor = REWARD_FLOOR * p.initial_equity
    log_return = math.log(max(s.equity, floor) / max(equity_before, floor))
    if p.reward == "log_return":
        return log_return
    if p.reward != "shaped":
        raise ValueError(f"reward = {p.reward!r}: the twin knows log_return and shaped")
    mark, close = float(m.mark_close[s.t, -1]), float(m.close[s.t, -1])
    notional = sum(lot.quantity * mark * m.tick_value for lot in s.lots if lot is not None)
    risk = notional / max(s.equity, floor) * float(m.atr[s.t + 1]) / close
    return (
        log_return
        - p.entry_penalty * (s.ledger.opened - before.opened)
        - p.risk_penalty * risk
        - p.liquidation_penalty * (s.ledger.liquidated - before.liquidated)
        - p.ruin_penalty * s.terminated
    )


def observe(s: TwinState, m: TwinMarket, p: TwinParams) -> np.ndarray:
    """Return [F + 9] at decision s.t: scaled features, then the account at the mark close of the bar before."""
    scaled = (m.features[s.t] - m.feature_mean) / m.feature_scale
    lots, mark = [lot for lot in s.lots if lot is not None], float(m.mark_close[s.t - 1, -1])
    posted = sum(lot.margin for lot in lots)
    notional = sum(lot.quantity * mark * m.tick_value for lot in lots)
    unrealised = sum(profit(lot, mark, m.tick_value) for lot in lots)
    equity = s.wallet + unrealised
    divisor = max(equity, OBSERVATION_FLOOR * p.initial_equity)
    oldest = max([lot.age for lot in lots], default=0)
    distances = [lot.side * (mark - lot.liquidation) / mark for lot in lots if lot.liquidation > 0]
    account = [
        len(lots) / p.max_lots,
        lots[0].side if lots else 0,
        posted / divisor,
        notional / divisor,
        unrealised / divisor,
        oldest / p.max_hold,
        max(p.max_hold - oldest, 0) / p.max_hold if lots else 0,
        min(distances, default=1.0),
        (p.max_exposure * equity - posted) / divisor,
    ]
    return np.concatenate([np.clip(scaled, -FEATURE_CLIP, FEATURE_CLIP), np.asarray(account, np.float64)])
