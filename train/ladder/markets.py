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
"""Returns of a long's bar: of a gift, always; of a trap that lets go, and of one that does not."""
GIFTS, TRAPS, CRASHES = 1 / 2, 1 / 8, 1 / 4
"""Probability of a gift and of a trap in a bar, and of a crash in a trap."""


class Pair(NamedTuple):
    """A market to learn on and one to be judged on, of one kind; features scaled as those of the first."""

    train: Market
    unseen: Market
    drift: tuple[Float[np.ndarray, "bars"], Float[np.ndarray, "bars"]]
    """Expected return of each bar of both, which no policy sees."""


def synthetic_pair(
    name: str, seed: int, features: str | FeatureFunction = "core", bars: int = YEAR_BARS, **parameters: float
) -> Pair:
    """Two synthetic markets that differ in their seed, every bar after the warm-up to be traded."""
    tables = [synthetic_tables(name, seed=s, bars=bars, **parameters) for s in (seed, UNSEEN + seed)]
    train, unseen = (build_market(t.candles, t.mark, t.funding, t.instrument, features) for t in tables)
    scaler = fit_scaler(train, range(int(train.segments.first[0]), train.num_bars))
    drift = tables[0].latent["drift"], tables[1].latent["drift"]
    return Pair(attach_scaler(train, scaler), attach_scaler(unseen, scaler), drift)


def leaking_features(bars: pa.Table, funding: pa.Table | None = None) -> pa.Table:
    """The core features, and `next_return`: the log return of bar t itself, open to close. Cheating, on purpose."""
    following = np.log(bars["close"].to_numpy() / bars["open"].to_numpy())
    return core_features(bars, funding).append_column("next_return", pa.array(following))


def trap_pair(seed: int, bars: int = YEAR_BARS) -> Pair:
    """Two markets of `trap_market`."""
    rngs = [np.random.default_rng([s, 1]) for s in (seed, UNSEEN + seed)]
    return Pair(*(trap_market(rng, bars) for rng in rngs), drift=(np.zeros(bars), np.zeros(bars)))


def trap_market(rng: np.random.Generator, bars: int) -> Market:
    """Each bar is a gift, a trap or nothing, and the only features, `gift` and `trap`, say which: 1 or 0.

    Every bar opens at one price and jumps after its first candle, where no stop can help. A long in a trap expects
    (1 - CRASHES) log(1 + TRAP) + CRASHES log(1 + CRASH) > 0; but a crash may end the episode, and the gifts with it.
    Only whole positions are accepted (the minimum notional sees to it), and levels lie too far away to matter.
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
