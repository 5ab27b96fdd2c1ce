"""The markets of the ladder: pairs to train on and to be judged on, a feature that leaks, and a trap."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from perpjax import Market
from perpjax.data import CANDLES, build_market, fit_scaler, synthetic_tables
from perpjax.data.builder import FeatureFunction
from perpjax.data.scaler import attach_scaler
from perpjax.data.synthetic import START_MS
from perpjax.data.synthetic_noise import CANDLE_MS, CANDLES_PER_BAR, YEAR_BARS
from perpjax.features import core_features
from perpjax.instrument import Instrument

UNSEEN = 1_000
"""The market that judges seed i has seed UNSEEN + i."""

GIFT, TRAP, CRASH = 0.01, 0.18, -0.35
"""Return of a long in one bar: in a gift, in a trap without a crash, in a trap with one."""
GIFTS, TRAPS, CRASHES = 1 / 2, 1 / 8, 1 / 4
"""Probability of a gift and of a trap in a bar, and of a crash in a trap."""


class Pair(NamedTuple):
    """A training market and a held-out one of the same kind, with the scaler of the first."""

    train: Market
    unseen: Market
    drift: tuple[Float[np.ndarray, "bars"], Float[np.ndarray, "bars"]]
    """Expected return of each bar of both markets; no policy sees it."""


def synthetic_pair(
    name: str, seed: int, features: str | FeatureFunction = "core", bars: int = YEAR_BARS, **parameters: float
) -> Pair:
    """Make two synthetic markets that differ in their seed; all bars after the warm-up can be traded."""
    tables = [synthetic_tables(name, seed=s, bars=bars, **parameters) for s in (seed, UNSEEN + seed)]
    train, unseen = (build_market(t.candles, t.mark, t.funding, t.instrument, features) for t in tables)
    scaler = fit_scaler(train, range(int(train.segments.first[0]), train.num_bars))
    drift = tables[0].latent["drift"], tables[1].latent["drift"]
    return Pair(attach_scaler(train, scaler), attach_scaler(unseen, scaler), drift)


def leaking_features(bars: pa.Table, funding: pa.Table | None = None) -> pa.Table:
    """Compute the core features and a leak: `next_return`, the log return of bar t itself, open to close."""
    following = np.log(bars["close"].to_numpy() / bars["open"].to_numpy())
    return core_features(bars, funding).append_column("next_return", pa.array(following))


def trap_pair(seed: int, bars: int = YEAR_BARS) -> Pair:
    """Make two markets of `trap_market`."""
    rngs = [np.random.default_rng([s, 1]) for s in (seed, UNSEEN + seed)]
    return Pair(*(trap_market(rng, bars) for rng in rngs), drift=(np.zeros(bars), np.zeros(bars)))


def trap_market(rng: np.random.Generator, bars: int) -> Market:
    """Make a market in which each bar is a gift, a trap or neither; the features `gift` and `trap` are 1 or 0.

    Every bar opens at one price and jumps after its first candle, so a stop cannot help. A long in a trap expects
    (1 - CRASHES) log(1 + TRAP) + CRASHES log(1 + CRASH) > 0. But a crash may end the episode, and the gifts with it.
    The minimum notional admits only whole positions, and stops and targets lie too far away to matter.
    """
    draw = rng.random(bars)
    gift, trap = draw < GIFTS, (draw >= GIFTS) & (draw < GIFTS + TRAPS)
    price = 50_000.0
    move = np.select([gift, trap], [GIFT, np.where(rng.random(bars) < CRASHES, CRASH, TRAP)])
    path = np.full((bars, CANDLES_PER_BAR, 4), price)
    path[:, 1:] = np.round(price * (1 + move), 1)[:, None, None]
    times = START_MS + CANDLE_MS * np.arange(bars * CANDLES_PER_BAR)
    columns = [times, *path.reshape(-1, 4).T, np.ones(len(times))]
    instrument = Instrument("TRAP", tick_size=0.1, step_size=0.001, min_notional=9_000.0, max_quantity=120.0)
    known = pa.table({name: np.append(x, 0.0) for name, x in (("gift", gift), ("trap", trap))})
    candles = pa.table([pa.array(c) for c in columns], schema=CANDLES)
    market = build_market(candles, instrument=instrument, features=lambda bars, funding: known)
    return market.with_columns(atr=0.25 * price / 0.1)
