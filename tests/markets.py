"""Hand-made markets, worked out to the tick, and a wild random one; what the tests of the simulator step through.

The hand-worked market: every price 1000 ticks, tick_value 0.01 quote, K = 3 candles a bar, decisions from bar 1.
With equity 10 000 and no fees or slippage an order of size 1 at 10x has
    available 0.1 * 10 000 = 1000 = margin; q = floor(1000 * 10 / (1000 * 0.01)) = 1000 steps; notional 10 000;
    10 quote a tick; long L = 1000 - ceil((1000 / 10 - 0.01 * 1000) / 0.99) = 1000 - ceil(90.91) = 909;
    short L = 1000 + ceil(90 / 1.01) = 1000 + ceil(89.11) = 1090.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from perpjax.data.markets import one_segment, pack_rows, to_device
from perpjax.env import PerpEnv
from perpjax.instrument import Instrument
from perpjax.market import Market, Origin
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.bar import Bar
from perpjax.rules.orders import DIRECTIONS, LEVERAGES, SIZES, STOPS, TARGETS, Verdict
from perpjax.state import SUMS, State

OHLC = Sequence[float]
HAND = Instrument(
    "HAND",
    tick_size=1.0,
    step_size=0.01,
    min_notional=5.0,
    max_quantity=1e5,
    brackets=((0, 1e5, 50, 0.01, 0), (1e5, 1e6, 10, 0.02, 1e3), (1e6, 5e6, 2, 0.05, 31e3)),
)
FREE = EnvParams(taker_fee=0.0, slippage_base=0.0, slippage_atr=0.0, stop_depth=0.0)
CONFIG = EnvConfig(max_lots=3, episode_length=6)
HOLD = np.zeros(5, np.int32)

step = jax.jit(PerpEnv.step)
reset = jax.jit(lambda env, start: env.reset(jax.random.key(0), start))


@functools.cache
def stacked(instrument: Instrument) -> Instrument:
    """The instruments of a market with one symbol."""
    return jax.tree.map(lambda x: x[None], instrument.on_device())


def assemble(
    last: np.ndarray,
    valid: np.ndarray,
    funding: np.ndarray,
    atr: np.ndarray,
    features: np.ndarray,
    *,
    mark: np.ndarray | None,
    first: int,
    instrument: Instrument,
) -> Market:
    """A `Market` of one symbol: last, mark [N, K, 4] ticks, valid [N, K], funding [N, 2], atr, features [N + 1]."""
    bars, k, _ = last.shape
    width = features.shape[1]
    return Market(
        rows=to_device(pack_rows(last, mark, valid, funding, atr, features)),
        scaler_mean=jnp.asarray(np.zeros(width, np.float32)),
        scaler_scale=jnp.asarray(np.ones(width, np.float32)),
        segments=one_segment(first, bars - 1),
        instruments=stacked(instrument),
        candles_per_bar=k,
        has_mark=mark is not None,
        origins=(Origin(instrument.symbol, 0, 0, bars),),
        feature_names=tuple(f"f{i}" for i in range(width)),
    )


def hand_market(
    *,
    last: Mapping[tuple[int, int], OHLC] | None = None,
    mark: Mapping[tuple[int, int], OHLC] | None = None,
    both: Mapping[tuple[int, int], OHLC] | None = None,
    invalid: Iterable[tuple[int, int]] = (),
    funding: Mapping[int, tuple[float, float]] | None = None,
    atr: float | Sequence[float] = 10.0,
    price: float = 1000.0,
    bars: int = 8,
    candles: int = 3,
    has_mark: bool = True,
    first: int = 1,
    instrument: Instrument = HAND,
) -> Market:
    """A flat market with some candles changed.

    Args:
      last, mark, both: (bar, candle) -> open, high, low, close in ticks, of the series named.
      invalid: candles in which nothing traded; their last prices repeat the close before, unless given.
      funding: bar -> rate, price in ticks.
      atr: of all rows, or of each of the bars + 1.
    """
    prices, marks = (np.full((bars, candles, 4), price) for _ in range(2))
    valid, settled = np.ones((bars, candles), bool), np.zeros((bars, 2))
    changed = {**(both or {}), **(last or {})}
    for at, ohlc in changed.items():
        prices[at] = ohlc
    for at, ohlc in {**(both or {}), **(mark or {})}.items():
        marks[at] = ohlc
    for t, k in sorted(invalid):
        valid[t, k] = False
        if (t, k) not in changed:
            prices[t, k] = prices.reshape(-1, 4)[t * candles + k - 1, 3]
    for t, rate in (funding or {}).items():
        settled[t] = rate
    rows = np.broadcast_to(np.asarray(atr, np.float64), (bars + 1,))
    features = np.arange(bars + 1, dtype=np.float64)[:, None]
    return assemble(
        prices, valid, settled, rows, features, mark=marks if has_mark else None, first=first, instrument=instrument
    )


def crash_market(
    bars: int = 1200, candles: int = 5, has_mark: bool = True, seed: int = 0, first: int = 673, wild: bool = False
) -> Market:
    """Heavy tails, gaps, crashes of 15 to 30 %, missing candles, a mark that strays, funding of both signs.

    In a wild market the mark has parts of ticks, and one candle of 50 has a mark that is off by percents. One bar of
    ten opens with a gap of percents in the last price alone.
    """
    rng = np.random.default_rng(seed)
    n = bars * candles
    returns = rng.normal(0, 0.003, n) * (1 + 5 * (rng.random(n) < 0.02))
    jumps = rng.random(n) < 0.002
    returns[jumps] += rng.choice([-0.3, -0.15, 0.15, 0.3], jumps.sum())
    close = np.maximum(np.round(60_000 * np.exp(np.cumsum(returns - returns.mean()))), 5)
    gaps = 1 + rng.normal(0, 0.0005, n) + (rng.random(n) < 0.01) * rng.normal(0, 0.05, n)
    open_ = np.maximum(np.round(np.concatenate([close[:1], close[:-1]]) * gaps), 5)
    high = np.maximum(open_, close) + np.round(close * rng.exponential(0.002, n))
    low = np.maximum(np.minimum(open_, close) - np.round(close * rng.exponential(0.002, n)), 1)
    valid = rng.random(n) > 0.03
    valid[rng.integers(0, bars, 8)[:, None] * candles + np.arange(candles)] = False
    valid[0] = True
    for i in np.flatnonzero(~valid):
        open_[i] = high[i] = low[i] = close[i] = close[i - 1]
    last = np.stack([open_, high, low, close], -1)
    off = close * rng.normal(0, 0.001, n)  # opens and closes of the mark are no whole ticks
    more = np.random.default_rng([seed, 1])  # so that the other numbers are the same in a market that is not wild
    mark = last + (off * np.where(more.random(n) < 0.02, 20, 1) if wild else off)[:, None]
    mark[:, 1] = np.ceil(mark[:, 1] + close * rng.exponential(0.0005, n))
    mark[:, 2] = np.floor(mark[:, 2] - close * rng.exponential(0.0005, n))
    if wild:
        opens = np.flatnonzero((np.arange(n) % candles == 0) & valid & (more.random(n) < 0.1))
        last[opens, 0] = np.maximum(np.round(last[opens, 0] * (1 + more.normal(0, 0.05, len(opens)))), 5)
        last[:, 1], last[:, 2] = last.max(axis=1), last.min(axis=1)
    last, mark = last.reshape(bars, candles, 4), np.maximum(mark, 1).reshape(bars, candles, 4)
    funding = np.zeros((bars, 2))
    settles = np.arange(0, bars, 16)
    funding[settles, 0] = rng.normal(0, 3e-3, len(settles))
    funding[:, 1] = (mark if has_mark else last)[:, 0, 0]
    atr = np.maximum(1, np.round(np.abs(rng.normal(0.006, 0.002, bars + 1)) * np.append(close[::candles], close[-1])))
    instrument = Instrument(
        "CRASH", tick_size=0.01, step_size=0.01, max_quantity=200.0, maintenance_fee_rate=seed % 2 * 0.0006
    )
    return assemble(
        last, valid.reshape(bars, candles), funding, atr, rng.normal(size=(bars + 1, 2)),
        mark=mark if has_mark else None, first=first, instrument=instrument,
    )  # fmt: skip


def all_bars(market: Market) -> Bar:
    """Every bar of a market, stacked."""
    return jax.jit(jax.vmap(Market.bar, (None, 0)))(market, jnp.arange(market.num_bars))


def order(
    direction: int, size: float = 1.0, leverage: float = 10.0, stop: float = 2.0, target: float = 6.0
) -> np.ndarray:
    """The `multi_discrete` action that means this order (of a maximum leverage of 10)."""
    tables = (DIRECTIONS, SIZES, LEVERAGES, STOPS, TARGETS)
    wanted = (direction, size, leverage, stop, target)
    return np.array([t.index(x) for t, x in zip(tables, wanted, strict=True)], np.int32)


def play(
    market: Market, *actions: Any, params: EnvParams = FREE, config: EnvConfig = CONFIG, start: int = 1
) -> list[State]:
    """The state after `reset(start)` and after each action."""
    env = PerpEnv(market, params, config)
    states = [reset(env, start)]
    for action in actions:
        states.append(step(env, states[-1], jnp.asarray(action)))
    return states


def expect(state: State, slot: int = 0, rtol: float = 1e-6, **expected: float) -> None:
    """Assert named numbers of a state: its own fields, the account's, the ledger's, and `lot_*` of one slot."""
    account = state.account
    got = {}
    for name in expected:
        if name.startswith("lot_"):
            got[name] = getattr(account.lots, name[4:])[slot]
        elif name == "open_lots":
            got[name] = (account.lots.quantity > 0).sum()
        else:
            owner = next(x for x in (state, account, account.ledger) if hasattr(x, name))
            got[name] = getattr(owner, name)
    got = {name: np.asarray(x, np.float64) for name, x in got.items()}
    wanted = {name: np.asarray(x, np.float64) for name, x in expected.items()}
    chex.assert_trees_all_close(got, wanted, rtol=rtol, atol=1e-6)


def assert_same_states(got: State, wanted: State) -> None:
    """Two batches are the same but for rounding; a two-float sum counts as one number, to 1e-6 of it."""

    def split(state: State) -> tuple[State, list[np.ndarray]]:
        ledgers = [state.account.ledger, *([state.episode.ledger] if hasattr(state, "episode") else [])]
        lows = [state.account.wallet_low, *(low for ledger in ledgers for low in ledger.low)]
        highs = [state.account.wallet, *(getattr(x, name) for x in ledgers for name in SUMS)]
        sums = [np.float64(high) + np.float64(low) for high, low in zip(highs, lows, strict=True)]
        account = state.account.replace(wallet_low=None, ledger=ledgers[0].replace(low=None))
        rest = state.replace(account=account, key=jax.random.key_data(state.key))
        if len(ledgers) > 1:
            rest = rest.replace(episode=rest.episode.replace(ledger=ledgers[1].replace(low=None)))
        return rest, sums

    (got, got_sums), (wanted, wanted_sums) = split(got), split(wanted)
    chex.assert_trees_all_close(got_sums, wanted_sums, rtol=1e-6, atol=1e-4)
    chex.assert_trees_all_close(got, wanted, rtol=2e-5, atol=1e-4)


def verdicts(state: State) -> dict[str, int]:
    """How many orders met each verdict, those that none met left out."""
    return {v.name: int(n) for v, n in zip(Verdict, state.account.ledger.verdicts, strict=True) if n}
