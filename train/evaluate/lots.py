"""Every lot of an account, from the float64 twin: times, prices, costs, and its way from gross to net."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from perpjax._grid import BAR_MS
from perpjax.audit.replay import LotLife, replay_states
from train.evaluate.account import Played, exact_decimals

SCHEMA = pa.schema(
    [
        ("id", pa.int32()), ("account", pa.string()), ("symbol", pa.string()), ("side", pa.string()),
        ("entry_time", pa.timestamp("ms", "UTC")), ("entry_price", pa.float64()),
        ("exit_time", pa.timestamp("ms", "UTC")), ("exit_price", pa.float64()), ("reason", pa.string()),
        ("quantity", pa.float64()), ("notional", pa.float64()), ("leverage", pa.float64()), ("margin", pa.float64()),
        ("stop", pa.float64()), ("target", pa.float64()), ("liquidation", pa.float64()),
        ("liquidation_at_exit", pa.float64()), ("gross", pa.float64()), ("slippage", pa.float64()),
        ("gap_losses", pa.float64()), ("fees", pa.float64()), ("funding", pa.float64()), ("forfeited", pa.float64()),
        ("forgiven", pa.float64()), ("net", pa.float64()), ("bars", pa.int32()),
        ("worst", pa.float64()), ("best", pa.float64()),
        ("first_move", pa.float64()),
    ]
)  # fmt: skip
"""Columns of trades.parquet: prices in quote currency, quantity in base, money in quote.

`net` is `gross` less slippage, gap losses, fees, funding and forfeited, plus forgiven. `worst` and `best` bound the
excursion, as fractions of the entry price: the order inside the first and the last candle is unknown. `first_move` is
the signed move over the entry's first candle, a fraction.
"""
COSTS = ("slippage", "gap_losses", "fees", "funding", "forfeited", "forgiven")


class Agreement(NamedTuple):
    """How simulator and twin agree on one account."""

    bars: int
    """Bars in which every level, count and amount agrees."""
    largest_difference: float
    """Of the two equities at the end of a bar, as a fraction of the initial equity."""
    disagreement: str
    """The first one; empty if there is none. The lots end there."""


def find_lots(played: Sequence[Played]) -> tuple[pa.Table, list[Agreement]]:
    """Return one row for each lot, in the order of opening, and the agreement of each account.

    Lots still open are valued at the last mark close.
    """
    rows: list[dict[str, Any]] = []
    agreements = []
    for account in played:
        candles = np.asarray(account.env.market.candles, np.float64)  # [N, 4 K + ...]: opens, highs, lows, closes
        replay = replay_states(account.env, account.states, account.actions)
        equity, initial = account.states.equity.astype(float), float(account.env.params.initial_equity)
        difference = np.abs(replay.equity - equity[: len(replay.equity)]).max() / initial
        agreements.append(Agreement(len(replay.equity) - 1, float(difference), replay.disagreement))
        for life in replay.lives:
            names = {"id": len(rows), "account": account.name, "symbol": account.symbol}
            rows.append(names | _describe(life, account, candles))
    return pa.Table.from_pylist(rows, schema=SCHEMA), agreements


def _describe(life: LotLife, account: Played, candles: np.ndarray) -> dict[str, Any]:
    env, lot = account.env, life.lot
    market, params = env.market, env.params
    row = int(account.states.instrument[0])
    tick, step = (float(exact_decimals(getattr(market.instruments, name)[row])) for name in ("tick_size", "step_size"))
    worth = lot.quantity * tick * step
    k, fee_rate = market.candles_per_bar, float(params.taker_fee)
    opened = candles[life.entry_bar, 0]
    entry_slippage = lot.side * worth * (lot.entry - opened)
    entry_fee = fee_rate * worth * lot.entry
    first = market.open_time_ms(life.entry_bar)
    if life.exit is None:
        end_bar, end_candle, how = int(account.states.t[-1]) - 1, k - 1, "open"
        price = _mark_close(market, candles, end_bar)
        profit, exit_fee, slippage, gap, forgiven, forfeited = lot.side * worth * (price - lot.entry), 0, 0, 0, 0, 0
        margin = float(account.states.account.lots.margin[-1][life.slot])
        exit_time, liquidation = market.open_time_ms(end_bar) + BAR_MS, life.liquidations[-1]
    else:
        end, end_bar = life.exit, life.exit_bar
        end_candle, how, price = (0 if end.how == "closed" else end.candle), end.how, end.price
        profit = lot.side * worth * (price - lot.entry)
        exit_fee = 0.0 if how == "liquidated" else fee_rate * worth * price
        slippage, gap, forgiven, forfeited = end.slippage, end.gap_loss, end.forgiven, end.forfeited
        margin, liquidation = end.lot.margin, end.lot.liquidation
        exit_time = market.open_time_ms(end_bar) + (BAR_MS if how == "timed_out" else end_candle * (BAR_MS // k))
        if how == "timed_out":
            end_candle = k - 1
    funding = lot.margin - margin
    worst, best = _excursion(candles, k, life.entry_bar, end_bar, end_candle, lot.side, lot.entry)
    gross = profit + entry_slippage + slippage + gap
    costs = {
        "slippage": entry_slippage + slippage, "gap_losses": gap, "fees": entry_fee + exit_fee, "funding": funding,
        "forfeited": forfeited, "forgiven": forgiven,
    }  # fmt: skip
    net = gross - sum(costs.values()) + 2 * forgiven
    return {
        "side": "long" if lot.side > 0 else "short", "entry_time": first, "entry_price": lot.entry * tick,
        "exit_time": exit_time, "exit_price": price * tick, "reason": how,
        "quantity": lot.quantity * step, "notional": worth * lot.entry, "leverage": lot.leverage,
        "margin": lot.margin, "stop": lot.stop * tick, "target": lot.target * tick,
        "liquidation": life.liquidations[0] * tick or None, "liquidation_at_exit": liquidation * tick or None,
        "gross": gross, **costs, "net": net, "bars": end_bar - life.entry_bar + 1, "worst": worst, "best": best,
        "first_move": lot.side * (candles[life.entry_bar, 3 * k] / opened - 1),
    }  # fmt: skip


def _mark_close(market: Any, candles: np.ndarray, bar: int) -> float:
    """The mark close of a bar, ticks."""
    k = market.candles_per_bar
    return float(candles[bar, (8 if market.has_mark else 4) * k - 1])


def _excursion(
    candles: np.ndarray, k: int, first: int, last: int, candle: int, side: int, entry: float
) -> tuple[float, float]:
    """The worst and the best price from the entry's candle to the exit's, as fractions of the entry."""
    highs, lows = candles[first : last + 1, k : 2 * k].ravel(), candles[first : last + 1, 2 * k : 3 * k].ravel()
    stop = (last - first) * k + candle + 1
    moves = side * (lows[:stop].min() / entry - 1), side * (highs[:stop].max() / entry - 1)
    return min(moves), max(moves)
