"""The evaluation of one policy: every lot and its costs, baselines, stresses, a diagnosis, and their files."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float, Int

from perpjax import PerpEnv
from perpjax._grid import BAR_MS
from perpjax.data.dataset import load_tables
from perpjax.data.ledger import Ledger, Span, market_spans
from perpjax.rollout import Act
from perpjax.rules.orders import Verdict
from perpjax.vec import Env, unwrapped
from train.checkpoint import write_json
from train.evaluate.account import Played, exact_decimals, play_account
from train.evaluate.baselines import (
    QUICK,
    Baseline,
    RandomDraws,
    Rivals,
    count_slipped_ticks,
    find_place,
    play_baselines,
)
from train.evaluate.bootstrap import compare, resample_days
from train.evaluate.diagnosis import diagnose, write_verdict
from train.evaluate.lots import Agreement, find_lots
from train.evaluate.measures import (
    Curve,
    combine_curves,
    count_verdicts,
    daily_returns,
    drawdown,
    make_waterfall,
    measure_equity,
    measure_lots,
    measure_round_trips,
    sharpe,
    utc_days,
)
from train.evaluate.stresses import Stress, cost_arithmetic, first_moves, play_stresses
from train.evaluate.trials import judge_trials
from train.evaluate.windows import Windows
from train.report import write_report

FORMAT = 1
UNHASHED = ("trials", "sha256")
"""Parts of the record that its hash leaves out."""
AGREED = 1e-5
"""Largest difference of simulator and twin, as a fraction of the initial equity."""
SHORT = "the segments are too short"
FAR = 6.0
"""Standard deviations of the training split beyond which a feature is unknown to a policy."""
Traded = dict[str, tuple[Int[np.ndarray, "bars"], Float[np.ndarray, "bars"]]]
"""By symbol: the opens of its bars, UTC ms ascending, and their traded value, quote."""


@dataclasses.dataclass
class Evaluation:
    """One policy on one market. docs/evaluation.md has every field.

    Attributes:
      record: the content of evaluation.json.
      equity: one row a bar and account.
      trades: one row a lot.
      candles: of every played bar.
    """

    record: dict[str, Any]
    equity: pa.Table
    trades: pa.Table
    candles: pa.Table

    def __repr__(self) -> str:
        return "\n".join([f"Evaluation of {self.record['policy']['name']}", *self.record["verdict"]])

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Write evaluation.json, the three tables and report.html; return the folder.

        Raises:
          OSError: it cannot be written.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("equity", "trades", "candles"):
            temporary = folder / f"{name}.parquet.tmp"
            pa.parquet.write_table(getattr(self, name), temporary, compression="zstd")
            temporary.replace(folder / f"{name}.parquet")
        write_json(folder / "evaluation.json", self.record)
        write_report(folder)
        return folder


def evaluate(
    env: Env,
    act: Act,
    *,
    name: str = "policy",
    dataset: str | None = None,
    split: str | None = None,
    traded: Traded | None = None,
    spans: Sequence[Span] | None = None,
    facts: dict[str, Any] | None = None,
    quick: bool = False,
    seed: int = 0,
) -> Evaluation:
    """Play one account over each whole segment of a market, and judge it.

    Args:
      env: the market, costs and limits. An `AutoReset` or `VecEnv` around it is ignored.
      act: the policy, `(key, state, carry)` to `(action, carry)`, learnt or written by hand. Pass a pytree, such as a
        loaded policy, to avoid a second compilation. With a method `sampled()` it explores, see the diagnosis.
      name: of the policy, for the report.
      dataset, split: of the data, for the report.
      traded: traded value of the bars, see `read_traded`.
      spans: key of the data in the ledger, see `perpjax.data.dataset.find_spans`. None: that of the market.
      facts: of the policy, added to the record. `settings`, a hash, tells policies apart in the ledger; without it
        two policies with different results are two.
      quick: without stresses, shifted starts, and the baselines that trade.
      seed: of the policy's random numbers, the random draws and the bootstrap.

    If the float64 twin and the simulator disagree in a bar, `record["twin"]` says so, and the lots end there.
    """
    env, key = unwrapped(env), jax.random.key(seed)
    played = play_account(env, act, key)
    lots, agreements = find_lots(played)
    record: dict[str, Any] = {"format": FORMAT, "policy": {"name": name} | (facts or {})}
    record |= _describe_data(env, played, dataset, split)
    times, curve = combine_curves([Curve(a.symbol, a.times(), a.states.equity) for a in played])
    returns, dates = daily_returns(times, curve), utc_days(times)
    rivals, windows, stresses = _play_others(env, act, key, played, lots, seed, quick)
    market = _combine(played, next(b.curves for b in rivals.baselines if b.name == "market"))
    days = (times[-1] - times[0]) / 86_400_000
    record |= {
        "accounts": [_describe_account(a) for a in played],
        "overall": measure_equity(times, curve),
        "daily": {"dates": dates, "returns": returns.tolist()},
        "market_return": float(market[-1] - 1),
        "months": _tabulate_months(dates, returns, daily_returns(times, market)),
        "lots": measure_lots(lots, float(days)),
        "waterfall": make_waterfall(lots),
        "round_trip": measure_round_trips(lots) | _explore(env, act, played, lots, key),
        "verdicts": count_verdicts([a.states.account.ledger for a in played], [v.name for v in Verdict]),
        **_measure_exposure(played),
        "volume": _measure_volume(lots, traded),
        "twin": _describe_twin(played, lots, agreements),
        "windows": windows,
        "baselines": [_describe_baseline(b, played, times, returns) for b in rivals.baselines],
        "random": _describe_random(rivals.random, float(curve[-1] - 1)),
        **stresses,
        "arithmetic": cost_arithmetic(lots),
        "latency": _measure_latency(lots, env.market.candles_per_bar),
        "actions": _tabulate_actions(played),
    }
    record["diagnosis"] = diagnose(record)
    record["verdict"] = write_verdict(record)
    record["sha256"] = hash_record(record)
    record["trials"] = _enter_look(record, list(spans or market_spans(env.market)))
    return Evaluation(record, tabulate_equity(played), lots, tabulate_candles(played))


def _play_others(
    env: PerpEnv, act: Act, key: Any, played: Sequence[Played], lots: pa.Table, seed: int, quick: bool
) -> tuple[Rivals, dict[str, Any], dict[str, Any]]:
    """Baselines, windows, stresses with shifted starts: programs of their own, compiled at the same time."""
    if quick:
        absent = {"absent": QUICK}
        return play_baselines(played, lots, seed=seed, quick=True), absent, {"stresses": [], "shifted": absent}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        rivals = threads.submit(play_baselines, played, lots, seed=seed)
        windows = threads.submit(_play_windows, env, act, key)
        found, shifted = play_stresses(env, act, key)
        later = {"bars": shifted.bars, "returns": shifted.returns.tolist()} if shifted else {"absent": SHORT}
        stresses = {"stresses": [_describe_stress(x, played) for x in found], "shifted": later}
        return rivals.result(), windows.result(), stresses


def hash_record(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a record without its trials; equal for two evaluations of one policy."""
    body = {name: value for name, value in record.items() if name not in UNHASHED}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _enter_look(record: dict[str, Any], spans: list[Span]) -> dict[str, Any]:
    """Enter this look into the ledger, and return its place among the others."""
    policy, daily = record["policy"], record["daily"]
    look = {
        "run": policy.get("run") or policy["name"], "step": policy.get("step"), "split": record["data"]["split"],
        "settings": policy.get("settings"), "result": record["sha256"], "spans": spans, "dates": daily["dates"],
        "returns": daily["returns"],
    }  # fmt: skip
    return judge_trials(Ledger(), look)


def tabulate_equity(played: Sequence[Played]) -> pa.Table:
    """Return one row for each bar of each account: time, symbol, equity, wallet, lots held and notional at entry."""
    parts = []
    for account in played:
        states, lots = account.states, account.states.account.lots
        times = pa.array(account.times(), pa.timestamp("ms", "UTC"))
        columns = {
            "account": pa.array([account.name] * len(times)), "time": times,
            "symbol": pa.array([account.symbol] * len(times)), "equity": states.equity.astype(float),
            "wallet": states.account.wallet.astype(float), "lots": (lots.quantity > 0).sum(axis=1).astype(np.int32),
            "notional": account.notional(),
        }  # fmt: skip
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def tabulate_candles(played: Sequence[Played]) -> pa.Table:
    """Return the last-price candles of every bar that was played, in quote currency."""
    parts = []
    for account in played:
        market = account.env.market
        k, first = market.candles_per_bar, int(account.states.t[0])
        tick = float(exact_decimals(market.instruments.tick_size[int(account.states.instrument[0])]))
        bars = np.asarray(market.candles[first : first + account.steps, : 4 * k], np.float64).reshape(-1, 4, k) * tick
        prices = dict(zip(("open", "high", "low", "close"), bars.transpose(1, 0, 2).reshape(4, -1), strict=True))
        times = account.times()[0] + BAR_MS // k * np.arange(account.steps * k)
        names = pa.array([account.name] * len(times))
        parts.append(pa.table({"account": names, "time": pa.array(times, pa.timestamp("ms", "UTC")), **prices}))
    return pa.concat_tables(parts)


def _describe_data(env: PerpEnv, played: Sequence[Played], dataset: str | None, split: str | None) -> dict[str, Any]:
    data = {
        "dataset": dataset or ", ".join(env.market.symbols), "split": split, "symbols": list(env.market.symbols),
        "first": int(min(a.times()[0] for a in played)), "last": int(max(a.times()[-1] for a in played)),
        "candles_per_bar": env.market.candles_per_bar, "settlements": sum(map(_count_settlements, played)),
    }  # fmt: skip
    params = {f.name: float(str(np.asarray(getattr(env.params, f.name)))) for f in dataclasses.fields(env.params)}
    return {"data": data, "params": params, "config": dataclasses.asdict(env.config)}


def _count_settlements(account: Played) -> int:
    """Bars with a funding rate other than 0."""
    market, t = account.env.market, account.states.t[: account.steps]
    return int(np.count_nonzero(np.asarray(market.candles[:, -3])[t]))


def _describe_account(account: Played) -> dict[str, Any]:
    times = account.times()
    return {
        "name": account.name, "symbol": account.symbol, "first": int(times[0]), "last": int(times[-1]),
        "bars": account.steps, "ended": "ruin" if bool(account.states.terminated[-1]) else "the segment's end",
    } | measure_equity(times, account.states.equity.astype(float))  # fmt: skip


def _combine(played: Sequence[Played], curves: Sequence[np.ndarray]) -> Float[np.ndarray, "times"]:
    """One curve of several accounts, from 1; see `combine_curves`."""
    return combine_curves([Curve(a.symbol, a.times(), x) for a, x in zip(played, curves, strict=True)])[1]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """The difference of two whole returns, and its interval from the same resampled days of both."""
    return {"difference": float(np.prod(1 + ours) - np.prod(1 + theirs)), "interval": compare(ours, theirs)}


def _describe_baseline(
    baseline: Baseline, played: Sequence[Played], times: np.ndarray, returns: np.ndarray
) -> dict[str, Any]:
    curve = _combine(played, baseline.curves)
    daily = daily_returns(times, curve)
    found: dict[str, Any] = {
        "name": baseline.name, "title": baseline.title, "return": float(curve[-1] - 1),
        "max_drawdown": drawdown(curve)[0], "lots": baseline.lots, "ended": list(baseline.ended),
        "daily": daily.tolist(),
    }  # fmt: skip
    if len(daily) >= 30 and daily.std() > 0:
        found["sharpe"] = sharpe(daily)[0]
    return found | _difference(returns, daily)


def _describe_random(draws: RandomDraws | str, ours: float) -> dict[str, Any]:
    if isinstance(draws, str):
        return {"absent": draws}
    place = find_place(draws.returns, ours)
    return {"returns": draws.returns.tolist(), "place": place, "lots_per_spell": draws.lots_per_spell}


def _describe_stress(stress: Stress, played: Sequence[Played]) -> dict[str, Any]:
    # An account that was ruined in one of them may be longer in the other: all are taken to the segment's end.
    curves = []
    for equity in (stress.equity, stress.plain):
        parts = []
        for account, values in zip(played, equity, strict=True):
            times = account.times()[0] + BAR_MS * np.arange(len(values))
            parts.append(Curve(account.symbol, times, values))
        curves.append(combine_curves(parts))
    (times, changed), (_, plain) = curves
    changed_days, plain_days = daily_returns(times, changed), daily_returns(times, plain)
    found = {
        "name": stress.name, "title": stress.title, "return": float(changed[-1] - 1), "lots": stress.opened,
        "ruined": stress.ruined,
    }  # fmt: skip
    return found | _difference(changed_days, plain_days)


def _play_windows(env: PerpEnv, act: Act, key: Any) -> dict[str, Any]:
    windows = Windows.of(env, key)
    result = windows.play(act)
    first = [env.market.open_time_ms(int(t)) for t in windows.starts]
    return {"bars": env.config.episode_length, "first": first, "returns": result.returns.tolist()}


def _tabulate_months(dates: Sequence[str], returns: np.ndarray, market: np.ndarray) -> list[dict[str, Any]]:
    months = np.asarray([date[:7] for date in dates])
    return [
        {"month": str(month), "return": float(np.prod(1 + returns[months == month]) - 1),
         "market": float(np.prod(1 + market[months == month]) - 1)}
        for month in np.unique(months)
    ]  # fmt: skip


def _measure_exposure(played: Sequence[Played]) -> dict[str, Any]:
    held = np.concatenate([a.states.account.lots.quantity.any(axis=1) for a in played])
    share = np.concatenate([np.abs(a.notional()) / np.maximum(a.states.equity, 1e-9) for a in played])
    mean = float(share[held].mean()) if held.any() else 0.0
    return {"time_in_market": float(held.mean()), "exposure": {"mean_notional": mean, "largest": float(share.max())}}


def _measure_volume(lots: pa.Table, traded: Traded | None) -> dict[str, Any]:
    if traded is None:
        return {"absent": "the volumes of the market are not known here"}
    shares = []
    for symbol, time, notional in zip(
        lots["symbol"].to_pylist(), lots["entry_time"].cast(pa.int64()).to_numpy(), lots["notional"].to_numpy(),
        strict=True,
    ):  # fmt: skip
        times, values = traded.get(symbol, (np.zeros(0), np.zeros(0)))
        bar = int(np.searchsorted(times, time))
        if bar < len(times) and times[bar] == time and values[bar] > 0:
            shares.append(notional / values[bar])
    if not shares:
        return {"absent": "no lot" if not lots.num_rows else "no volume in the bars of its entries"}
    return {"median_share": float(np.median(shares)), "largest_share": float(np.max(shares))}


def _describe_twin(played: Sequence[Played], lots: pa.Table, agreements: Sequence[Agreement]) -> dict[str, Any]:
    """The agreement of both over all accounts, and how far the lots add up to the simulator's equity."""
    initial = float(played[0].env.params.initial_equity)
    moved = sum(float(a.states.equity[-1]) - initial for a in played)
    less = (float(np.sum(lots["net"].to_numpy())) - moved) / initial
    faults = [f"{a.name}, {x.disagreement}" for a, x in zip(played, agreements, strict=True) if x.disagreement]
    largest = max(x.largest_difference for x in agreements)
    return {
        "bars": sum(x.bars for x in agreements), "lots": lots.num_rows, "largest_difference": largest,
        "lots_less_equity": less, "agrees": not faults and max(largest, abs(less)) <= AGREED, "disagreements": faults,
    }  # fmt: skip


def _measure_latency(lots: pa.Table, candles_per_bar: int) -> dict[str, Any]:
    if not lots.num_rows:
        return {"absent": "no lot"}
    moves, days = first_moves(lots)
    sums, counts = (np.bincount(days - days.min(), weights) for weights in (moves, None))
    interval = None
    if len(sums) >= 10:
        chosen = resample_days(len(sums))
        means = sums[chosen].sum(axis=1) / np.maximum(counts[chosen].sum(axis=1), 1)
        interval = [float(x) for x in np.quantile(means, [0.05, 0.95])]
    return {"first_move": float(moves.mean()), "interval": interval, "candle_minutes": 15 // candles_per_bar}


def _explore(env: PerpEnv, act: Act, played: Sequence[Played], lots: pa.Table, key: Any) -> dict[str, Any]:
    """The typical cost of a round trip, and the gross edge of the orders that a silent policy draws at random."""
    found: dict[str, Any] = {"typical_cost": _typical_cost(played)}
    if lots.num_rows or not hasattr(act, "sampled"):
        return found
    table, _ = find_lots(play_account(env, act.sampled(), key))
    explored = measure_round_trips(table)
    return found | ({"explored_gross": explored["gross"], "explored_lots": table.num_rows} if explored else {})


def _typical_cost(played: Sequence[Played]) -> float:
    """Fees and slippage of an entry and an exit at the median bar, basis points."""
    costs = []
    for account in played:
        params, market, t = account.env.params, account.env.market, account.states.t[: account.steps]
        price = np.asarray(market.candles, np.float64)[t, 0]
        slipped = count_slipped_ticks(price, np.asarray(market.atr, np.float64)[t], params)
        costs.append(2 * (float(exact_decimals(params.taker_fee)) + slipped / price))
    return float(1e4 * np.median(np.concatenate(costs)))


def _tabulate_actions(played: Sequence[Played]) -> list[dict[str, Any]]:
    """Shares of long, short and flat bars in each fifth of each feature's values, over all accounts."""
    market = played[0].env.market
    features = np.concatenate([np.asarray(market.features)[a.states.t[: a.steps]] for a in played])
    side = np.concatenate([np.sign(a.notional()[1:]) for a in played])
    z = (features - np.asarray(market.scaler_mean)) / np.asarray(market.scaler_scale)
    found = []
    for i, feature in enumerate(market.feature_names):
        edges = np.quantile(features[:, i], np.linspace(0, 1, 6))
        bins = np.clip(np.searchsorted(edges, features[:, i], side="right") - 1, 0, 4)
        counts = np.maximum(np.bincount(bins, minlength=5), 1)
        shares = {
            name: (np.bincount(bins, side == value, minlength=5) / counts).tolist()
            for name, value in (("long", 1), ("short", -1), ("flat", 0))
        }
        outside = float(np.mean(np.abs(z[:, i]) > FAR))
        found.append({"feature": feature, "edges": edges.astype(float).tolist(), **shares, "outside": outside})
    return found


def read_traded(source: str, symbols: Sequence[str]) -> Traded:
    """Return the traded value of each bar of a dataset, by symbol; without the symbols that have no volume.

    Args:
      source: as in `load_market`, with its errors.
      symbols: of the market that was loaded from it.
    """
    found = {}
    many = len(symbols) > 1 or (pathlib.Path(source) / symbols[0]).is_dir()
    for symbol in symbols:
        candles = load_tables(pathlib.Path(source) / symbol if many else source)["candles"]
        times, close, volume = (candles[name].to_numpy() for name in ("open_time_ms", "close", "volume"))
        bars, place = np.unique(times // BAR_MS, return_inverse=True)
        values = np.bincount(place, close * volume)
        if values.any():
            found[symbol] = bars * BAR_MS, values
    return found
