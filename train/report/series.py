"""The bars, short candles, equity and lots of a page, packed account by account."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from train.report.encode import Packer, find_scale
from train.report.read import FLOATS, Evaluation, floats, milliseconds

NEAR = 8
"""Bars before an entry and after an exit for which the short candles are kept."""
LIMIT = 1_700_000
"""Bytes for all short candles of a page."""
_ATTEMPTS = ((7, math.inf, 1.0), (5, math.inf, 1.0), (5, 40, 1.0), (5, 8, 1.0), (5, 8, 0.5), (5, 8, 0.2), (5, 8, 0.05))
"""If the short candles take more bytes, they lose digits, then the middle of long lots, then the smallest lots.

Each has the digits of a price, the bars at both ends of a lot, and the share of the lots."""
_WORDS = ("side", "reason")


def pack_evaluation(evaluation: Evaluation, packer: Packer) -> dict[str, Any]:
    """Add the series of an evaluation to a packer, and return their description for the page."""
    equity, trades, candles = evaluation.equity, evaluation.trades, evaluation.candles
    names = equity["account"].unique().drop_null().to_pylist()
    accounts = []
    parts = [_split(equity, n) for n in names], [_split(trades, n) for n in names], [_split(candles, n) for n in names]
    spare = LIMIT
    for name, bars, lots, short in zip(names, *parts, strict=True):
        account, used = _pack_account(name, bars, lots, short, packer, spare)
        accounts.append(account)
        spare -= used
    return {"accounts": accounts}


def _split(table: pa.Table, name: str) -> pa.Table:
    """The rows of one account."""
    return table.filter(pc.equal(table["account"], name))


def _pack_account(name, bars, lots, short, packer: Packer, spare: int) -> tuple[dict[str, Any], int]:
    times = milliseconds(bars["time"])
    moves = np.diff(times)
    length = float(np.median(moves)) if len(moves) else 900_000.0
    account: dict[str, Any] = {"name": str(name), "symbol": str(bars["symbol"][0]), "length": length / 1000}
    account["time"] = packer.add(times / 1000, scale=1)
    for column in ("equity", "notional"):
        account[column] = packer.add(floats(bars[column]), digits=7)
    stamps, prices = milliseconds(short["time"]), [floats(short[n]) for n in ("open", "high", "low", "close")]
    order = np.argsort(stamps, kind="stable")
    stamps, prices = stamps[order], [p[order] for p in prices]
    whole, first, count = _gather(times, length, stamps, prices)
    scale = find_scale(np.concatenate(whole), 9)
    coarse = _limit_scale(whole[3], scale, 7)
    account["bars"] = _pack_candles(whole, coarse, packer)
    account["lots"] = _pack_lots(lots, packer)
    native, used = _choose_native(times, length, lots, first, count, prices, coarse, spare)
    if native is not None:
        chosen, kept, at = native
        account["short"] = {"bar": packer.add(chosen.astype(float), scale=1), "each": int(count[chosen[0]])}
        account["short"] |= {"prices": _pack_candles(kept, at, packer), "all": bool(used >= 0)}
    return account, abs(used)


def _gather(times: np.ndarray, length: float, stamps: np.ndarray, prices: list[np.ndarray]):
    """The prices of every bar, out of its candles; and where its candles begin, and their number."""
    first = np.searchsorted(stamps, times, "left")
    count = np.searchsorted(stamps, times + length, "left") - first
    whole = [np.full(len(times), np.nan) for _ in range(4)]
    held = np.flatnonzero(count > 0)
    if held.size:
        begin, end = first[held], first[held] + count[held]
        edges = np.stack([begin, end], 1).ravel()
        whole[0][held], whole[3][held] = prices[0][begin], prices[3][end - 1]
        for i, combine in ((1, np.fmax), (2, np.fmin)):
            padded = np.append(prices[i], np.nan)  # an index one past the end is allowed
            whole[i][held] = combine.reduceat(padded, edges)[::2]
    return whole, first, count


def _limit_scale(close: np.ndarray, scale: int, digits: int) -> int:
    """The scale, coarser if the prices would have more significant digits."""
    finite = close[np.isfinite(close)]
    if not finite.size or finite.max() <= 0:
        return scale
    return min(scale, 10 ** max(0, digits - 1 - math.floor(math.log10(finite.max()))))


def _pack_candles(prices: list[np.ndarray], scale: int, packer: Packer) -> dict[str, Any]:
    """Closes as differences; the open from the last close, and high and low from the body."""
    opened, high, low, close = (np.rint(p * scale) for p in prices)
    before = np.concatenate([close[:1] * 0, close[:-1]])
    parts = (close, opened - np.where(np.isfinite(before), before, 0), high - np.fmax(opened, close),
             np.fmin(opened, close) - low)  # fmt: skip
    return {"scale": scale, "parts": [packer.add(p, scale=1, delta=i == 0) for i, p in enumerate(parts)]}


def _pack_lots(lots, packer: Packer) -> dict[str, Any]:
    packed = {name: packer.add_words([str(x) for x in lots[name].to_pylist()]) for name in _WORDS}
    packed["id"] = packer.add(floats(lots["id"]), scale=1)
    packed["bars"] = packer.add(floats(lots["bars"]), scale=1, delta=False)
    for name in ("entry_time", "exit_time"):
        packed[name] = packer.add(milliseconds(lots[name]) / 1000, scale=1)
    for name in FLOATS:
        packed[name] = packer.add(floats(lots[name]), digits=9 if name.endswith("price") else 7, delta=False)
    return packed


def _choose_native(times, length, lots, first, count, prices, scale: int, spare: int):
    """The bars with short candles, their prices and scale; and the bytes used, negative if some are left out."""
    each = int(np.median(count[count > 0])) if (count > 0).any() else 0
    begun, ended = milliseconds(lots["entry_time"]), milliseconds(lots["exit_time"])
    if each < 2 or not len(begun) or spare <= 0:
        return None, 0
    enter = np.searchsorted(times, begun, "right") - 1
    leave = np.where(np.isnan(ended), len(times) - 1, np.searchsorted(times, np.nan_to_num(ended), "right") - 1)
    rank = np.argsort(-np.abs(np.nan_to_num(floats(lots["net"]))), kind="stable")
    for digits, long, share in _ATTEMPTS:
        own = rank[: math.ceil(share * len(rank))]
        begun, ended, near = enter[own], leave[own], NEAR if long > 8 else 2
        live = np.zeros(len(times) + 1, np.int64)
        spans = [(begun - near, ended + near)]
        if long is not math.inf:
            spans = [(begun - near, np.minimum(begun + long, ended)), (np.maximum(ended - long, begun), ended + near)]
        for begin, end in spans:
            np.add.at(live, np.clip(begin, 0, len(times)), 1)
            np.add.at(live, np.clip(end + 1, 0, len(times)), -1)
        chosen = np.flatnonzero((np.cumsum(live)[:-1] > 0) & (count == each))
        if not chosen.size:
            return None, 0
        rows = (first[chosen][:, None] + np.arange(each)).ravel()
        kept = [p[rows] for p in prices]
        at = _limit_scale(kept[3], scale, digits)
        trial = Packer()
        _pack_candles(kept, at, trial)
        used = len(trial.block())
        if used <= spare:
            return (chosen, kept, at), used if long is math.inf else -used
    return None, 0
