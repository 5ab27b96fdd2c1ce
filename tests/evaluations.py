"""A made-up evaluation folder: the four files of docs/evaluation.md, random but consistent."""

import datetime
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

BAR_MS, CANDLES, TICK, INITIAL = 900_000, 5, 0.1, 10_000.0
FIRST = 1_704_067_200_000
"""2024-01-01, UTC."""
FEE, SLIP = 0.0006, 0.0003
REASONS = ("stopped", "target", "liquidated", "closed", "timed_out", "open")
PARTS = ("gross", "slippage", "gap_losses", "fees", "funding", "forfeited", "forgiven")
VERDICTS = ("HOLD", "DATA_GAP", "MAX_LOTS", "NO_HEDGE", "MAX_EXPOSURE", "MAX_NOTIONAL", "BELOW_MINIMUM", "ACCEPTED")


def make_evaluation(
    folder: pathlib.Path,
    bars: int = 2000,
    lots: int = 120,
    seed: int = 0,
    symbols: Sequence[str] = ("BTCUSDT",),
    policy: str = "best of ppo-core",
    run: str = "ppo-core-seed0-20261128-090000",
    baselines: bool = True,
    ruin: bool = False,
) -> dict[str, Any]:
    """Write the four files to a folder, and return the content of evaluation.json.

    Args:
      bars, lots: of all accounts together.
      symbols: one account each.
      ruin: the first account loses 95 % and ends there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    parts = [_play(rng, i, s, bars // len(symbols), lots // len(symbols), ruin) for i, s in enumerate(symbols)]
    trades = pa.concat_tables([p["trades"] for p in parts])
    trades = trades.set_column(0, "id", pa.array(np.arange(len(trades))))
    for name in ("equity", "candles"):
        pq.write_table(pa.concat_tables([p[name] for p in parts]), folder / f"{name}.parquet", compression="zstd")
    pq.write_table(trades, folder / "trades.parquet", compression="zstd")
    record = _record(rng, parts, trades, symbols, policy, run, baselines)
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    record["trials"] = {
        "look": 3, "trials": 41, "effective": 17, "probabilistic_sharpe": 0.83, "deflated_sharpe": 0.21, "opened": 0,
        "absent": {}, "ledger": "runs/ledger.jsonl", "note": "The ledger counts the looks of this machine alone.",
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(record, indent=1))
    return record


def _play(rng: np.random.Generator, index: int, symbol: str, bars: int, lots: int, ruin: bool) -> dict[str, Any]:
    """One account: its candles, lots and equity, and the daily returns of both price and equity."""
    name = f"{symbol} {index}"
    count = bars * CANDLES
    volatility = 0.0012 * np.exp(np.repeat(np.cumsum(rng.normal(0, 0.03, bars)) % 1.5 - 0.75, CANDLES))
    close = 42_000 * np.exp(np.cumsum(rng.normal(0, 1, count) * volatility))
    close = np.round(close / TICK) * TICK
    opens = np.concatenate([[42_000.0], close[:-1]])
    span = np.abs(rng.normal(0, 1, (2, count))) * volatility * close * 0.5
    high = np.round((np.maximum(opens, close) + span[0]) / TICK) * TICK
    low = np.round((np.minimum(opens, close) - span[1]) / TICK) * TICK
    times = FIRST + np.arange(count) * (BAR_MS // CANDLES)
    candles = pa.table({
        "account": [name] * count, "time": pa.array(times, pa.timestamp("ms", "UTC")),
        "open": opens, "high": high, "low": low, "close": close,
    })  # fmt: skip
    rows, equity, wallet = [], np.zeros(bars), np.zeros(bars)
    held, notional = np.zeros(bars, np.int32), np.zeros(bars)
    bar_open, bar_close = opens[::CANDLES], close[CANDLES - 1 :: CANDLES]
    entries = np.sort(rng.choice(max(bars - 2, 1), lots, replace=lots > bars - 2)) if lots else []
    for entry in map(int, entries):
        row = _trade(rng, name, symbol, entry, bars, opens, high, low, close)
        last = row.pop("_last")
        rows.append(row)
        sign = 1 if row["side"] == "long" else -1
        equity[entry:last] += sign * row["quantity"] * (bar_close[entry:last] - row["entry_price"])
        held[entry:last] += 1
        notional[entry:last] += sign * row["notional"]
        if row["reason"] == "open":
            wallet[entry:] -= row["fees"]  # of the entry
        else:
            wallet[last:] += row["net"]
    wallet += INITIAL
    equity += wallet
    if ruin:
        equity = equity * np.linspace(1, 0.05, bars)
    daily = _daily(equity, INITIAL)
    # A row is the state at the open of a bar: one more than there are bars.
    equity, wallet = (np.concatenate([[INITIAL], x]) for x in (equity, wallet))
    held, notional = (np.concatenate([x[:1] * 0, x]) for x in (held, notional))
    rows_of = bars + 1
    stamps = FIRST + np.arange(rows_of) * BAR_MS
    table = pa.table({
        "account": [name] * rows_of, "time": pa.array(stamps, pa.timestamp("ms", "UTC")), "symbol": [symbol] * rows_of,
        "equity": equity, "wallet": wallet, "lots": held, "notional": notional,
    })  # fmt: skip
    market = _daily(bar_close, bar_open[0])
    return {
        "name": name, "symbol": symbol, "bars": bars, "candles": candles, "equity": table, "daily": daily,
        "market": market, "trades": _tabulate(rows), "held": held, "notional": notional, "values": equity, "ruin": ruin,
    }  # fmt: skip


def _trade(rng, name, symbol, entry, bars, opens, high, low, close) -> dict[str, Any]:
    """One lot from its entry bar on: the candle decides on its exit."""
    ahead = close[min(entry + 16, bars - 1) * CANDLES] > opens[entry * CANDLES]
    sign = 1 if ahead == (rng.random() < 0.54) else -1  # a little skill
    price = opens[entry * CANDLES] + sign * np.round(SLIP * opens[entry * CANDLES] / TICK) * TICK
    leverage = float(rng.choice((2.0, 5.0, 10.0)))
    margin = float(np.round(rng.uniform(60, 240), 2))
    size = leverage * margin
    stop = np.round((price * (1 - sign * rng.uniform(0.004, 0.02))) / TICK) * TICK
    target = np.round((price * (1 + sign * rng.uniform(0.006, 0.03))) / TICK) * TICK
    liquidation = price * (1 - sign * 0.95 / leverage)
    limit = min(entry + 1 + int(rng.geometric(0.03)), bars)
    span = slice(entry * CANDLES, limit * CANDLES)
    adverse, fair = (low[span], high[span]) if sign > 0 else (high[span], low[span])
    hit = np.flatnonzero(sign * (adverse - stop) <= 0)
    won = np.flatnonzero(sign * (fair - target) >= 0)
    first_hit, first_won = (x[0] if len(x) else 1 << 30 for x in (hit, won))
    if min(first_hit, first_won) < 1 << 30:
        index = entry * CANDLES + int(min(first_hit, first_won))
        stopped = first_hit <= first_won
        reason, level = ("stopped", stop) if stopped else ("target", target)
    else:
        index = limit * CANDLES - 1
        level = close[index]
        reason = "open" if limit == bars else str(rng.choice(("closed", "timed_out"), p=(0.8, 0.2)))
    quantity = float(np.round(size / price, 5))
    gross = sign * quantity * (level - price)
    fees = FEE * quantity * (price + (level if reason != "open" else 0))
    slippage = 0.0 if reason in ("target", "open") else SLIP * quantity * level
    funding = float(rng.normal(0, 0.02)) if index // CANDLES - entry > 16 else 0.0
    gap = float(slippage * rng.uniform(0, 2)) if reason == "stopped" and rng.random() < 0.1 else 0.0
    seen_low, seen_high = low[entry * CANDLES : index + 1].min(), high[entry * CANDLES : index + 1].max()
    extremes = sorted((sign * (seen_low / price - 1), sign * (seen_high / price - 1)))
    last = index // CANDLES + 1
    return {
        "id": 0, "account": name, "symbol": symbol, "side": "long" if sign > 0 else "short",
        "entry_time": FIRST + entry * BAR_MS, "entry_price": price,
        "exit_time": None if reason == "open" else FIRST + index * BAR_MS // CANDLES,
        "exit_price": None if reason == "open" else level - sign * (slippage + gap) / quantity, "reason": reason,
        "quantity": quantity, "notional": quantity * price, "leverage": leverage, "margin": margin, "stop": stop,
        "target": target if rng.random() < 0.9 else None, "liquidation": liquidation,
        "liquidation_at_exit": liquidation + sign * funding, "gross": gross, "slippage": slippage, "gap_losses": gap,
        "fees": fees, "funding": funding, "forfeited": 0.0, "forgiven": 0.0,
        "net": gross - slippage - gap - fees - funding, "bars": last - entry, "worst": extremes[0],
        "best": extremes[1], "first_move": sign * (close[entry * CANDLES] / opens[entry * CANDLES] - 1), "_last": last,
    }  # fmt: skip


SCHEMA = pa.schema(
    [("id", pa.int64())]
    + [(n, pa.string()) for n in ("account", "symbol", "side")]
    + [("entry_time", pa.timestamp("ms", "UTC")), ("entry_price", pa.float64())]
    + [("exit_time", pa.timestamp("ms", "UTC")), ("exit_price", pa.float64()), ("reason", pa.string())]
    + [(n, pa.float64()) for n in ("quantity", "notional", "leverage", "margin", "stop", "target", "liquidation")]
    + [(n, pa.float64()) for n in ("liquidation_at_exit", *PARTS, "net")]
    + [("bars", pa.int64())]
    + [(n, pa.float64()) for n in ("worst", "best", "first_move")]
)


def _tabulate(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({f.name: pa.array([r[f.name] for r in rows], f.type) for f in SCHEMA}, schema=SCHEMA)


def _daily(values: np.ndarray, start: float) -> np.ndarray:
    ends = np.append(values[95::96], values[-1:] if len(values) % 96 else [])
    return np.diff(np.concatenate([[start], ends])) / np.concatenate([[start], ends])[:-1]


def _measure(rng: np.random.Generator, returns: np.ndarray) -> dict[str, Any]:
    curve = np.cumprod(1 + returns)
    peak = np.maximum.accumulate(np.concatenate([[1.0], curve]))[1:]
    total, deviation, days = float(curve[-1] - 1), float(np.std(returns)), len(returns)
    figures: dict[str, Any] = {
        "days": days, "return": total, "max_drawdown": float((1 - curve / peak).max()),
        "longest_drawdown_days": days // 3, "volatility": deviation * 365**0.5,
    }  # fmt: skip
    if days < 30:
        reason = f"{days} days are fewer than 30"
        return figures | {
            "absent": dict.fromkeys(("sharpe", "sharpe_error", "sortino", "annual_return", "calmar"), reason)
        }
    draws = np.array([np.prod(1 + rng.choice(returns, days)) - 1 for _ in range(100)])
    sharpe = float(np.mean(returns) / max(deviation, 1e-12) * 365**0.5)
    error = (365 / days) ** 0.5
    return figures | {
        "sharpe": sharpe, "sharpe_error": error, "sortino": 1.4 * sharpe, "annual_return": total * 365 / days,
        "intervals": {
            "return": np.quantile(draws, (0.05, 0.95)).tolist(),
            "sharpe": [sharpe - 1.64 * error, sharpe + 1.64 * error],
            "max_drawdown": [figures["max_drawdown"] * 0.8, figures["max_drawdown"] * 1.9],
        },
        "absent": {"calmar": "the drawdown lies in the first day"},
    }  # fmt: skip


def _date(days: int) -> str:
    return (datetime.date(2024, 1, 1) + datetime.timedelta(days)).isoformat()


def _record(rng, parts, trades, symbols, policy, run, baselines) -> dict[str, Any]:
    longest = max(len(p["daily"]) for p in parts)
    stacked = np.full((2, len(parts), longest), np.nan)
    for i, p in enumerate(parts):
        stacked[0, i, : len(p["daily"])], stacked[1, i, : len(p["market"])] = p["daily"], p["market"]
    daily, market = np.nanmean(stacked, axis=1)
    dates = [_date(i) for i in range(longest)]
    months = []
    for month in sorted({d[:7] for d in dates}):
        days = [i for i, d in enumerate(dates) if d[:7] == month]
        months.append({"month": month, "return": float(np.prod(1 + daily[days]) - 1),
                       "market": float(np.prod(1 + market[days]) - 1)})  # fmt: skip
    net = trades["net"].to_numpy()
    held = np.concatenate([p["held"] for p in parts])
    share = np.abs(np.concatenate([p["notional"] for p in parts])) / np.concatenate([p["values"] for p in parts])
    bars = sum(p["bars"] for p in parts)
    waterfall = {n: float(trades[n].to_numpy().sum()) * (1 if n in ("gross", "forgiven") else -1) for n in PARTS}
    total = float(np.prod(1 + daily) - 1)
    draws = rng.normal(total - 0.02, 0.03, 200)
    record: dict[str, Any] = {
        "format": 1,
        "policy": {"name": policy, "run": run, "which": "best", "step": 4_587_520},
        "data": {"dataset": "datasets/core", "split": "val", "symbols": list(symbols), "first": FIRST,
                 "last": FIRST + longest * 96 * BAR_MS, "candles_per_bar": CANDLES},
        "params": {"initial_equity": INITIAL, "taker_fee": FEE, "slippage_base": 0.0002, "max_leverage": 10.0},
        "config": {"max_lots": 3, "episode_bars": 2016, "hedge": False, "reward": "log_equity"},
        "accounts": [
            {"name": p["name"], "symbol": p["symbol"], "first": FIRST, "last": FIRST + p["bars"] * BAR_MS,
             "bars": p["bars"],
             "ended": "ruin" if p["ruin"] else "the segment's end", **_measure(rng, p["daily"])} for p in parts
        ],
        "overall": _measure(rng, daily),
        "daily": {"dates": dates, "returns": daily.tolist()},
        "market_return": float(np.prod(1 + market) - 1),
        "months": months,
        "round_trip": {"typical_cost": 16.4, "explored_gross": -1.3, "explored_lots": 220},
        "lots": {"lots": len(trades)},
        "waterfall": waterfall | {"net": float(sum(waterfall.values()))},
        "verdicts": {name: int(n) for name, n in zip(VERDICTS, (bars, 3, 12, 0, 44, 1, 0, len(trades)), strict=True)},
        "time_in_market": float((held > 0).mean()),
        "exposure": {"mean_notional": float(share[held > 0].mean()) if held.any() else 0.0,
                     "largest": float(share.max())},
        "volume": {"median_share": 0.00021, "largest_share": 0.0143},
        "twin": {"bars": bars, "lots": len(trades), "largest_difference": 1.1e-7, "lots_less_equity": -3.0e-8,
                 "agrees": True, "disagreements": []},
        "windows": {"bars": 2016, "returns": [],
                    "first": [FIRST + b * BAR_MS for b in range(0, max(bars - 2016, 1), 2016)]},
        "shifted": {"bars": 96, "returns": rng.normal(total, 0.02, 32).tolist()},
        "baselines": [],
        "random": {"returns": draws.tolist(), "place": float((draws < total).mean()), "lots_per_spell": 1.2},
        "stresses": [],
        "arithmetic": {},
        "latency": {"first_move": 1.8, "interval": [-0.6, 4.1], "candle_minutes": 3},
        "actions": [],
        "diagnosis": [
            {"rule": "interval", "text": "The interval of the difference from flat holds zero."},
            {"rule": "costs", "text": "Costs take more than half of the gross profit."},
        ],
        "verdict": [
            f"The policy returned {100 * total:+.2f} % in {longest} days.",
            "The difference from holding nothing is within its error.",
            "Costs decide on the sign: without them the policy would have gained more.",
        ],
    }  # fmt: skip
    record["windows"]["returns"] = rng.normal(0.002, 0.015, len(record["windows"]["first"])).tolist()
    if len(trades):
        gains, losses = net[net > 0].sum(), -net[net < 0].sum()
        held_bars, reasons = trades["bars"].to_numpy(), trades["reason"].to_pylist()
        record["lots"] |= {
            "lots_a_week": len(trades) / longest * 7, "turnover_a_week": float(trades["notional"].to_numpy().sum()),
            "win_rate": float((net > 0).mean()), "profit_factor": float(gains / losses) if losses else 0.0,
            "expectancy": float(net.mean()), "tail_loss": float(np.sort(net)[: max(1, len(net) // 20)].mean()),
            "mean_bars": float(held_bars.mean()), "median_bars": float(np.median(held_bars)),
            "long": trades["side"].to_pylist().count("long"),
            "exits": {r: reasons.count(r) for r in REASONS if r in reasons},
            "best_three_net": float(np.sort(net)[-3:].sum()), "open_net": float(net[np.array(reasons) == "open"].sum()),
        }  # fmt: skip
        traded, spent = float(trades["notional"].to_numpy().sum()) / 1e4, waterfall["slippage"] + waterfall["fees"]
        record["round_trip"] = {
            "gross": waterfall["gross"] / traded, "cost": -(spent + waterfall["gap_losses"]) / traded,
            "funding": -waterfall["funding"] / traded, "liquidation": 0.0, "typical_cost": 16.4,
        }  # fmt: skip
        costs = waterfall["slippage"] + waterfall["gap_losses"] + waterfall["fees"] + waterfall["funding"]
        record["arithmetic"] = {str(k): waterfall["gross"] + k * costs for k in (0, 0.5, 1, 2, 4)}
        edges = [-2.1, -0.8, -0.2, 0.3, 0.9, 2.4]
        for feature in ("rsi_14", "momentum_96", "funding_z"):
            tilt = np.linspace(0.1, 0.5, 5)
            long, short = tilt * rng.uniform(0.5, 1), tilt[::-1] * rng.uniform(0.5, 1)
            record["actions"].append({"feature": feature, "edges": edges, "long": long.tolist(),
                                      "short": short.tolist(), "flat": (1 - long - short).tolist(),
                                      "outside": 0.0012})  # fmt: skip
    for name, title, scale in (
        ("costs x0", "costs x 0", 0), ("costs x2", "costs x 2", 2), ("costs x4", "costs x 4", 4),
        ("pessimistic", "pessimistic intrabar rule", 1.2), ("late", "one bar later", 1.1),
    ):  # fmt: skip
        shift = -0.01 * (scale - 1) - 0.001
        record["stresses"].append({"name": name, "title": title, "return": total + shift, "lots": len(trades),
                                   "difference": shift, "interval": [shift - 0.004, shift + 0.004]})  # fmt: skip
    if baselines:
        for name, title, returns in (
            ("flat", "hold nothing", np.zeros(longest)), ("buy", "buy and hold", market),
            ("momentum", "momentum of 96 bars", 0.4 * market * np.sign(np.roll(market, 1))),
            ("random", "random orders", rng.normal(-0.0003, 0.004, longest)),
        ):  # fmt: skip
            measured, difference = _measure(rng, returns), float((daily - returns).sum())
            width = float(1.64 * np.std(daily - returns) * longest**0.5)
            one = {"name": name, "title": title, "return": measured["return"],
                   "max_drawdown": measured["max_drawdown"], "daily": returns.tolist(), "difference": difference,
                   "lots": {"flat": 0, "buy": 1}.get(name, int(rng.integers(9, 400))),
                   "interval": [difference - width, difference + width],
                   "ended": ["the segment's end"] * len(parts)}  # fmt: skip
            if "sharpe" in measured and name != "flat":
                one["sharpe"] = measured["sharpe"]
            record["baselines"].append(one)
    else:
        record["shifted"] = {"absent": "the segments are too short"}
        record["random"] = {"absent": "no random draws were asked for"}
        record["volume"] = {"absent": "the dataset has no volumes"}
        record["latency"] = {"absent": "no lot was opened"}
    return record
