"""Baselines of a policy on its own bars: none is learnt, and none knows more than the open of its bar.

`flat`, the market and buy and hold are computed here, in float64. EMA trend, funding carry and the random draws are
schedules of a side for each bar. They play inside the environment, with its costs and limits, in one batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from perpjax import PerpEnv
from perpjax._grid import BAR_MS
from perpjax.data.indicators import ema
from perpjax.market import Market
from perpjax.params import EnvParams
from perpjax.state import State, account_side
from perpjax.vec import VecEnv
from train.evaluate.account import Played, exact_decimals
from train.evaluate.measures import day_closes

FAST, SLOW = 96, 384
"""Spans of the EMA trend, bars: one day and four."""
LEAST_EXPOSURE = 0.005
"""A policy's mean exposure below this is none: longs and shorts cancel."""
CHUNK = 1024
"""Bars of one call of the compiled program. Accounts of any length share it."""
NEVER, QUICK = "the policy never trades", "left out of a quick evaluation"
END, RUIN, POLICY_RUIN = "the segment's end", "ruin", "the policy's ruin"
"""The ways in which an account of a baseline ends. After its own ruin the equity stays the same."""

Curve = Float[np.ndarray, "rows"]


class Baseline(NamedTuple):
    """The equity of one baseline on the bars of each account of the policy."""

    name: str
    title: str
    curves: tuple[Curve, ...]
    """For each account, at `Played.times()`; quote. The first value is the initial equity."""
    lots: int | None
    """Opened in all accounts; None if the baseline is no account."""
    ended: tuple[str, ...]
    """For each account: the segment's end, ruin, or the policy's ruin, after which no bar is compared."""


class RandomDraws(NamedTuple):
    """Accounts that trade at random as often, on the same sides, for as long and as large as the policy."""

    returns: Float[np.ndarray, "draws"]
    """As `combine_curves`: a symbol's segments one after the other, then the mean over symbols."""
    lots_per_spell: float
    """Lots of the policy for which one drawn lot stands. Above 1 the draws pay fewer entries than the policy."""
    lots: Int[np.ndarray, "draws"]
    """Opened in all accounts."""
    times: tuple[Int[np.ndarray, "days"], ...]
    """For each account: its first time and the last of each UTC day, ms."""
    closes: tuple[Float[np.ndarray, "draws days"], ...]
    """Equity at these times, quote."""


class Rivals(NamedTuple):
    """The baselines, and the random draws or the reason for their absence."""

    baselines: list[Baseline]
    random: RandomDraws | str


class Habits(NamedTuple):
    """The manner of a policy's trading, from all its accounts.

    A spell is a stretch of bars from a flat account's entry until the account is flat again. Where a policy holds one
    lot at a time, a spell is a lot. Where it holds several, one drawn lot stands for all lots of a spell.
    """

    entry_rate: float
    """Spells begun for each bar at whose open the account is flat."""
    sides: Int[np.ndarray, "spells"]
    """+1 long, -1 short."""
    bars: Int[np.ndarray, "spells"]
    """From the entry's bar to the exit's, both counted."""
    notional: float
    """Mean total notional at entry over equity, while in the market."""
    exposure: float
    """Mean signed notional at entry over equity, over all bars; negative: short."""
    leverage: float
    """Total notional over total margin of all lots."""


def play_baselines(
    played: Sequence[Played], lots: pa.Table, draws: int = 200, seed: int = 0, *, quick: bool = False
) -> Rivals:
    """Play the baselines and the random draws on the bars of a policy.

    EMA trend, funding carry and the draws hold one lot at a time, with the policy's mean notional while in the market.
    If the policy never trades, the first two hold 1 x equity, and the draws are absent.

    Args:
      played: the policy's accounts. They share one market and one set of parameters.
      lots: of these accounts, see `train.evaluate.lots.find_lots`.
      draws: number of random accounts.
      seed: of the draws.
      quick: without those that trade inside the environment.
    """
    habits = find_habits(played, lots)
    baselines = [_stay_flat(played), _follow_market(played), _buy_and_hold(played, 1.0, "buy and hold", "")]
    if habits and abs(habits.exposure) >= LEAST_EXPOSURE:
        name, why = "hold its mean size", ", the policy's mean exposure"
        baselines.append(_buy_and_hold(played, habits.exposure, name, why))
    if quick:
        return Rivals(baselines, QUICK)
    params = played[0].env.params
    notional = min(habits.notional if habits else 1.0, float(params.max_exposure) * float(params.max_leverage))
    order = _encode_order(params, notional, habits.leverage if habits else 1.0)
    plays = []
    for i, account in enumerate(played):
        rows = [schedule_trend(account), schedule_carry(account)]
        if habits:
            rows.extend(draw_schedules(habits, account.steps, draws, np.random.default_rng([seed, i])))
        plays.append(_play_schedules(account, order, np.stack(rows)))
    for row, (name, rule) in enumerate((("EMA trend", f"EMA {FAST}/{SLOW} trend"), ("funding carry",) * 2)):
        baselines.append(
            Baseline(
                name,
                f"{rule} at {notional:.2f} x equity",
                tuple(play.curves[row] for play in plays),
                int(sum(play.opened[row] for play in plays)),
                tuple(RUIN if play.ruined[row] else _end(a) for play, a in zip(plays, played, strict=True)),
            )
        )
    return Rivals(baselines, _gather_draws(played, plays, lots.num_rows / len(habits.bars)) if habits else NEVER)


def find_place(returns: Float[np.ndarray, "draws"], own: float) -> float:
    """Return the share of the draws below a return; ties count half."""
    return float(np.mean((returns < own) + 0.5 * (returns == own)))


def find_habits(played: Sequence[Played], lots: pa.Table) -> Habits | None:
    """Return the manner of the policy's trading; None if it never trades."""
    if lots.num_rows == 0:
        return None
    entries, bars = lots["entry_time"].cast(pa.int64()).to_numpy(), lots["bars"].to_numpy()
    symbols, sides = (lots[name].to_numpy(zero_copy_only=False) for name in ("symbol", "side"))
    found, flat = [], 0
    for account in played:
        times = account.times()
        own = (symbols == account.symbol) & (entries >= times[0]) & (entries < times[-1])
        order = np.argsort(entries[own], kind="stable")
        first = ((entries[own] - times[0]) // BAR_MS)[order]
        last = np.maximum.accumulate(first + bars[own][order] - 1)
        begins = np.flatnonzero(first > np.concatenate([[-1], last[:-1]]))
        ends = last[np.append(begins[1:], len(last)) - 1] if len(begins) else last
        length = ends - first[begins] + 1
        found += zip(np.where(sides[own][order][begins] == "long", 1, -1), length, strict=True)
        flat += account.steps - int((length - 1).sum())
    spells = np.array(found, np.int64).reshape(-1, 2)
    notional, leverage = (lots[name].to_numpy() for name in ("notional", "leverage"))
    held = np.concatenate([_exposures(account) for account in played])
    inside = held[held != 0]
    initial = float(played[0].env.params.initial_equity)
    return Habits(
        entry_rate=len(spells) / max(flat, len(spells)),
        sides=spells[:, 0],
        bars=spells[:, 1],
        # Lots that end in the bar of their entry are in no state.
        notional=float(np.abs(inside).mean() if len(inside) else notional.mean() / initial),
        exposure=float(held.mean()) if len(held) else 0.0,
        leverage=float(notional.sum() / (notional / leverage).sum()),
    )


def _exposures(account: Played) -> Float[np.ndarray, "steps"]:
    """Signed notional at entry over equity after each bar, as long as equity is positive."""
    equity, notional = account.states.equity[1:].astype(np.float64), account.notional()[1:]
    return notional[equity > 0] / equity[equity > 0]


def _end(account: Played) -> str:
    return POLICY_RUIN if account.states.terminated[-1] else END


# Computed here: flat, the market, buy and hold.


class _Contract(NamedTuple):
    """An account's instrument, exact."""

    tick_value: float
    """Quote currency of one tick for one step."""
    min_notional: float
    maintenance: Float[np.ndarray, "brackets 2"]
    """Rate with fee, and amount."""

    @classmethod
    def of(cls, account: Played) -> "_Contract":
        instruments, row = account.env.market.instruments, int(account.states.instrument[0])
        return cls(
            account.tick_value,
            float(exact_decimals(instruments.min_notional[row])),
            exact_decimals(np.asarray(instruments.maintenance)[row, :, :2]),
        )


class _Bars(NamedTuple):
    """Bars of a market; prices in ticks."""

    last: Float[np.ndarray, "bars 4 K"]
    """Opens, highs, lows, closes."""
    mark: Float[np.ndarray, "bars 4 K"]
    valid: Bool[np.ndarray, "bars K"]
    rate: Float[np.ndarray, "bars"]
    """Of the settlement at the open; 0: none."""
    funding_price: Float[np.ndarray, "bars"]
    atr: Float[np.ndarray, "bars"]
    """Known at the open."""

    @classmethod
    def of(cls, market: Market, first: int, stop: int) -> "_Bars":
        """Return the bars first .. stop - 1. Row t + 1 holds the candles of bar t."""
        k, rows = market.candles_per_bar, np.asarray(market.rows)[first : stop + 1].astype(np.float64)
        width = k * (8 if market.has_mark else 4)
        series = rows[1:, :width].reshape(stop - first, -1, 4, k)
        valid, (rate, price) = rows[1:, width : width + k] > 0, rows[1:, width + k : width + k + 2].T
        return cls(series[:, 0], series[:, -1], valid, rate, price, rows[:-1, width + k + 4])


def _own_bars(account: Played) -> _Bars:
    first = int(account.states.t[0])
    return _Bars.of(account.env.market, first, first + account.steps)


def _initial(account: Played) -> float:
    return float(account.states.equity[0])


def _stay_flat(played: Sequence[Played]) -> Baseline:
    curves = tuple(np.full(a.steps + 1, _initial(a)) for a in played)
    return Baseline("flat", "flat: never trades", curves, 0, tuple(map(_end, played)))


def _follow_market(played: Sequence[Played]) -> Baseline:
    def follow(account: Played) -> Curve:
        bars = _own_bars(account)
        prices = np.concatenate([bars.last[:1, 0, 0], bars.last[:, 3, -1]])
        return _initial(account) * prices / prices[0]

    title = "the market's own return: the last price alone, without costs and funding"
    return Baseline("market", title, tuple(map(follow, played)), None, tuple(map(_end, played)))


def _buy_and_hold(played: Sequence[Played], exposure: float, name: str, why: str) -> Baseline:
    curves, opened, ended = zip(*(hold_position(account, exposure) for account in played), strict=True)
    verb = "buy" if exposure > 0 else "sell short"
    ends = tuple(RUIN if ruined else _end(account) for ruined, account in zip(ended, played, strict=True))
    return Baseline(name, f"{verb} and hold at {abs(exposure):.2f} x equity{why}", curves, sum(opened), ends)


def hold_position(account: Played, exposure: float) -> tuple[Curve, int, bool]:
    """Hold a fixed quantity from the first to the last bar, outside the environment.

    The entry is at the first open that trades, the exit at the last close. Both pay slippage and taker fee. Every
    settlement pays funding. The whole equity is the margin. Where the mark reaches the price at which equity is the
    maintenance margin, the position ends there, or at the candle's mark open if that is beyond. Equity then stays at
    the money that is left, at least 0.

    Args:
      exposure: notional at the entry over the initial equity; negative: short.

    Returns:
      The equity at `Played.times()`, the number of lots opened, and whether the account was liquidated.
    """
    bars, contract, params = _own_bars(account), _Contract.of(account), account.env.params
    initial, side = _initial(account), math.copysign(1.0, exposure)
    equity = np.full(account.steps + 1, initial)
    trades = np.flatnonzero(bars.valid[:, 0])
    if not len(trades):
        return equity, 0, False
    entry_bar = int(trades[0])
    open_ = bars.last[entry_bar, 0, 0]
    entry = max(open_ + side * count_slipped_ticks(open_, bars.atr[entry_bar], params), 1.0)
    quantity = math.floor(abs(exposure) * initial / (entry * contract.tick_value) * (1 + 1e-12))
    worth, fee = quantity * contract.tick_value, float(exact_decimals(params.taker_fee))
    if quantity < 1 or worth * entry < contract.min_notional:
        return equity, 0, False

    held = slice(entry_bar, None)
    funding = side * worth * bars.funding_price[held] * bars.rate[held]
    funding[0] = 0.0  # a lot opened in a bar does not pay at its open
    wallet = initial - fee * worth * entry - np.cumsum(funding)
    equity[entry_bar + 1 :] = wallet + side * worth * (bars.mark[held, 3, -1] - entry)

    rate, amount = contract.maintenance.T
    distance = ((wallet[:, None] + amount) / worth - rate * entry) / (1 - side * rate)
    level = entry - side * distance.min(axis=1)
    worst = bars.mark[held, 2 if side > 0 else 1]
    reached = (side * (worst - level[:, None]) <= 0) & (level[:, None] > 0)
    if reached.any():
        bar, candle = divmod(int(reached.argmax()), reached.shape[1])
        price = side * min(side * level[bar], side * bars.mark[entry_bar + bar, 0, candle])
        equity[entry_bar + bar + 1 :] = max(wallet[bar] + side * worth * (price - entry), 0.0)
        return equity, 1, True
    close = bars.last[-1, 3, -1]
    out = max(close - side * count_slipped_ticks(close, bars.atr[-1], params), 1.0)
    equity[-1] = wallet[-1] + side * worth * (out - entry) - fee * worth * out
    return equity, 1, False


def count_slipped_ticks(
    price: Float[ArrayLike, "..."], atr: Float[ArrayLike, "..."], params: EnvParams
) -> Float[np.ndarray, "..."]:
    """Return the slippage of market orders, whole ticks."""
    slippage = float(exact_decimals(params.slippage_base)) * price + float(exact_decimals(params.slippage_atr)) * atr
    return np.ceil(slippage * (1 - 1e-12))


# Schedules. At a bar with an entry there is the bar at whose open the lot is closed, times its side; elsewhere 0. An
# account takes an entry only where it is flat.


def schedule_trend(account: Played) -> Int[np.ndarray, "steps"]:
    """Return the schedule that is long while the fast EMA of the closes is above the slow one, and short while below.

    A change of the signal closes the lot at the open of the next bar, and opens the other side a bar later. A lot that
    ends before the signal changes is not replaced.
    """
    start, first = _history(account), int(account.states.t[0])
    closes = _Bars.of(account.env.market, start, first + account.steps).last[:, 3, -1]
    sides = np.sign(ema(closes, FAST) - ema(closes, SLOW)).astype(np.int32)
    known = np.concatenate([[0], sides])[first - start : -1]
    return _schedule(known, np.flatnonzero(np.diff(known, prepend=2)) + 1)


def schedule_carry(account: Played) -> Int[np.ndarray, "steps"]:
    """Return the schedule that holds the side that receives funding, while funding would pay for a round trip.

    It would if the rate of the last settlement, times the number of settlements in the last `max_hold` bars, exceeds
    fees and slippage of an entry and an exit. A settlement closes a lot one bar after it, and opens one two bars after
    it. A lot that ends in between is replaced after the next settlement.
    """
    start, first, params = _history(account), int(account.states.t[0]), account.env.params
    bars, hold = _Bars.of(account.env.market, start, first + account.steps), int(params.max_hold)
    settled = np.flatnonzero(bars.rate[:-1])
    if not len(settled):
        return np.zeros(account.steps, np.int32)
    rate, close, atr = bars.rate[settled], bars.last[settled, 3, -1], bars.atr[settled + 1]
    count = np.arange(1, len(settled) + 1) - np.searchsorted(settled, settled - hold, side="right")
    cost = float(params.taker_fee) + float(params.slippage_base) + float(params.slippage_atr) * atr / close
    sides = np.where(np.abs(rate) * count > 2 * cost, -np.sign(rate), 0).astype(np.int32)
    before = np.searchsorted(settled + 1, first - start + np.arange(account.steps), side="right")
    known = np.concatenate([[0], sides])[before]  # 0 before any settlement
    return _schedule(known, settled + 2 - (first - start))


def _schedule(sides: Int[np.ndarray, "steps"], entries: Int[np.ndarray, "entries"]) -> Int[np.ndarray, "steps"]:
    """Entries at some bars, each held until the side known at the open changes."""
    ends = np.append(np.flatnonzero(np.diff(sides)) + 1, len(sides))
    whole = sides * np.repeat(ends, np.diff(ends, prepend=0))
    entries = entries[(entries >= 0) & (entries < len(sides))]
    schedule = np.zeros(len(sides), np.int32)
    schedule[entries] = whole[entries]
    return schedule


def _history(account: Played) -> int:
    """The first bar of the history of an account's segment."""
    segments, first = account.env.market.segments, int(account.states.t[0])
    inside = (np.asarray(segments.first) <= first) & (first <= np.asarray(segments.last))
    return int(np.asarray(segments.start)[inside.argmax()])


def draw_schedules(habits: Habits, steps: int, draws: int, rng: np.random.Generator) -> Int[np.ndarray, "draws steps"]:
    """Return schedules with entries at the policy's rate, each with the side and the bars of one of its spells.

    Stops and targets are at their widest. A lot that they end before its time is not replaced before that time: the
    draws pay for as many entries as the policy.
    """
    mean = steps * habits.entry_rate  # of entries, were the account always flat: ten deviations more is enough
    most = min(steps // 2 + 1, math.ceil(mean + 10 * math.sqrt(mean)) + 20)
    gaps = rng.geometric(habits.entry_rate, (draws, most))
    spells = rng.integers(len(habits.bars), size=(draws, most))
    # A lot closed at the open of a bar has been in that bar, too. No lot can be closed in the bar of its entry.
    held = np.maximum(habits.bars - 1, 1)[spells]
    ends = np.cumsum(gaps + held, axis=1) - 1
    entries = ends - held
    row, spell = np.nonzero(entries < steps)
    schedules = np.zeros((draws, steps), np.int32)
    schedules[row, entries[row, spell]] = (habits.sides[spells] * ends)[row, spell]
    return schedules


def _encode_order(params: EnvParams, notional: float, leverage: float) -> Float[np.ndarray, "5"]:
    """Return the `box5` order of this notional over equity. Stop and target are at their widest, 3 and 6 ATR.

    The leverage is the policy's, or the smallest whole number above it with which the limit on margins allows the
    notional.
    """
    limit, most = float(params.max_exposure), float(params.max_leverage)
    if limit > 0:
        leverage = max(round(leverage), math.ceil(notional / limit - 1e-6))
    leverage = min(max(leverage, 1.0), most)
    size = min(notional / (limit * leverage), 1.0) if limit > 0 else 0.0
    return np.array([0, 2 * size - 1, 2 * (leverage - 1) / max(most - 1, 1e-6) - 1, 1, 1], np.float32)


# The environment.


class _Play(NamedTuple):
    curves: Float[np.ndarray, "2 rows"]
    """Equity of the first two schedules, after each bar."""
    closes: Float[np.ndarray, "draws days"]
    """Equity of the others, at the closes of the days: all their bars would be 28 MB a year."""
    times: Int[np.ndarray, "days"]
    opened: Int[np.ndarray, "n"]
    ruined: Bool[np.ndarray, "n"]


def _play_schedules(account: Played, order: Float[np.ndarray, "5"], schedules: Int[np.ndarray, "n steps"]) -> _Play:
    """Play each schedule in an account of its own."""
    # A direction against the lot is a close. All accounts share a program: the episode's end is a number of its state.
    choices = {"actions": "box5", "opposite": "close", "max_lots": 1, "episode_length": 1}
    env = dataclasses.replace(account.env, config=dataclasses.replace(account.env.config, **choices))
    first, steps = int(account.states.t[0]), account.steps
    loop = _begin(env, jnp.int32(first), jnp.int32(first + steps), schedules[:, 0])
    parts = [np.full((1, len(schedules)), _initial(account), np.float32)]
    for begin in range(0, steps, CHUNK):
        bars = min(CHUNK, steps - begin)
        part = np.zeros((CHUNK, len(schedules)), np.int32)
        part[:bars] = schedules[:, begin : begin + bars].T
        loop, equity = _play_chunk(env, order, part, jnp.int32(begin), jnp.int32(bars), loop)
        parts.append(np.asarray(equity)[:bars])
    state, _ = loop
    opened, ruined = np.asarray(state.account.ledger.opened), np.asarray(state.terminated)
    equity, times = np.concatenate(parts), account.times()
    kept = day_closes(times)
    curves, closes = equity[:, :2].T.astype(np.float64), equity[kept, 2:].T.astype(np.float64)
    return _Play(curves, closes, times[kept], opened, ruined)


Loop = tuple[State, Int[Array, "n"]]
"""States, and the bars at whose opens the lots are closed."""


@jax.jit
def _begin(env: PerpEnv, first: Array, end: Array, like: Int[Array, "n"]) -> Loop:
    """Fresh accounts."""
    n = like.shape[0]
    state = VecEnv(env).reset(jax.random.split(jax.random.key(0), n), jnp.full(n, first))
    return state.replace(end=jnp.full(n, end), obs=None, key=None), jnp.zeros(n, jnp.int32)


@jax.jit
def _play_chunk(
    env: PerpEnv, order: Float[Array, "5"], schedule: Int[Array, "chunk n"], begin: Array, bars: Array, loop: Loop
) -> tuple[Loop, Float[Array, "chunk n"]]:
    """Play some bars, and return the equity after each."""
    envs = VecEnv(env)
    chunk, n = schedule.shape

    def step(i: Array, carry: tuple[Loop, Array]) -> tuple[Loop, Array]:
        ((state, end), equity), entry = carry, schedule[i]
        held = account_side(state.account.lots)
        end = jnp.where((held == 0) & (entry != 0), jnp.abs(entry), end)
        leaves = begin + i >= end
        direction = jnp.where(held == 0, jnp.sign(entry), jnp.where(leaves, -held, 0))
        action = jnp.broadcast_to(order, (n, 5)).at[:, 0].set(direction.astype(jnp.float32))
        state = envs.step(state, action).replace(obs=None)
        return (state, end), equity.at[i].set(state.equity)

    return lax.fori_loop(0, bars, step, (loop, jnp.zeros((chunk, n), jnp.float32)))


def _gather_draws(played: Sequence[Played], plays: Sequence[_Play], lots_per_spell: float) -> RandomDraws:
    growth: dict[str, Any] = {}
    for account, play in zip(played, plays, strict=True):
        growth[account.symbol] = growth.get(account.symbol, 1.0) * play.closes[:, -1] / play.closes[:, 0]
    return RandomDraws(
        np.mean(list(growth.values()), axis=0) - 1,
        lots_per_spell,
        lots=np.sum([play.opened[2:] for play in plays], axis=0),
        times=tuple(play.times for play in plays),
        closes=tuple(play.closes for play in plays),
    )
