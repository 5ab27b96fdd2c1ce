"""Synthetic markets: seeded, no file needed.

All three have 3-minute candles from 2024-01-01 UTC around 50 000 quote, tick 0.1, and the same kind of noise:

- Volatility is the exponential of a slow (4 days) and a fast (3 hours) autoregression. Volume follows it.
- Within a candle the price is one continuous path: four lognormal substeps, each with the extremes of its own
  Brownian bridge. Maximum and minimum of one substep are drawn independently of each other. A level inside a candle
  is therefore reached exactly when the path reaches it, and a fill at the level is fair. Extremes of a sampled path
  would not be fair, because such a path jumps past the level.
- Jumps, symmetric in simple returns, fall *between* candles: a stop that is jumped over fills at the candle's open.
  A target that is jumped over fills at the target, never better (rule 7). This costs its owner a little.
- The open of a candle is otherwise the close of the candle before. Rounding to ticks comes last.

`martingale`: nothing to learn. The mean of the price never changes. Volatility is 68 % a year. Funding has mean
zero and is much smaller than a round trip's cost. Without fees and slippage, random entries with any stop and
target earn nothing significant. They lose the gain of jumps beyond their targets (up to 1 % of equity a week at
targets of 1 ATR).

`signal`: the noise at 36 % a year, and a latent drift. Quiet stretches without drift (36 hours in the mean)
and trends (24 hours) alternate. Lengths are uniform over half to one and a half of their mean. A trend's
expected return is plus or minus 0.08 % a bar, or 0.4 of the noise of a bar, and 7.7 % over an average trend.
Signs are shuffled in eights, four of each. The drift is not a feature. Past returns carry it, and with them EMA
distances, slopes, RSI and MACD. A ridge regression of the drift on the core features has a held-out R^2 of 0.53 to
0.61. A round trip costs 0.16 % and 0.2 ATR, together about 0.22 %. The table holds log returns of equity with the
default `EnvParams`, in windows of 672 bars (a week) of the validation split without overlap. Notional is at most
1 x equity. The commands are `python -m benchmarks.synthetic_policies --seeds 0 1 2 3 4 5`, and `--seeds 0` for the
default market alone.

    policy                             seeds   windows   mean %   sd %       t   share of oracle
    oracle (knows the drift)           0 - 5        36     18.8    4.2    27.1              1.00
                                       0             6     17.8    2.5    17.7              1.00
    filter (knows the parameters)      0 - 5        36     14.2    5.0    17.1              0.76
                                       0             6     11.9    3.8     7.6              0.67
    causal (ridge on core features)    0 - 5        36     14.1    4.7    17.9              0.75
                                       0             6     12.1    3.2     9.2              0.68
    random (uniform multi_discrete)    0 - 5        36     -9.6    2.1   -27.8             -0.51
    flat                               any                  0.0    0.0

That is far more than any real market pays. A validation split has six such windows. Only a signal this strong is
learnt with t >= 3 in them.

`crash`: the noise of `martingale`, and events in every month that reach every path of the simulator:

- gaps of 10 to 50 % between candles;
- frozen candles without volume, and missing candles, bars and hours;
- wicks that the mark does not follow, and mark spikes that the last price does not follow;
- funding every 8, 4 or 1 hours, and for whole days at plus or minus 2 %.

The mark is a series of its own at 3 minutes. Gaps lean back towards the first price, so this market is not fair.

The same arguments give the same tables on one machine. The last digits of `exp` may differ between machines.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from perpjax.data.contract import CANDLES, FUNDING, MARK
from perpjax.data.seeds import seed_words
from perpjax.data.synthetic_crash import (
    CrashParameters,
    add_spikes,
    draw_events,
    draw_gaps,
    draw_mark,
    draw_wild_funding,
    freeze,
)
from perpjax.data.synthetic_noise import (
    CANDLE_MS,
    CANDLES_PER_BAR,
    HOUR_MS,
    YEAR_BARS,
    MartingaleParameters,
    autoregress,
    draw_jumps,
    draw_volatility,
    draw_volume,
    walk,
)
from perpjax.instrument import EXACT, Instrument

START_MS = 1_704_067_200_000
"""2024-01-01 00:00 UTC, a Monday."""
START_PRICE = 50_000.0
TICK = 0.1


@dataclasses.dataclass(frozen=True)
class SignalParameters(MartingaleParameters):
    """The noise, quieter than in `martingale`, and the latent drift."""

    volatility: float = 0.35
    slow_spread: float = 0.25
    fast_spread: float = 0.15
    jump_size: float = 0.005
    drift: float = 0.0008
    """Expected return of a bar in a trend, fraction of price; its sign is the trend's."""
    trend_bars: float = 96.0
    """Mean length of a trend (a day). Lengths are uniform over half to one and a half of it."""
    quiet_bars: float = 144.0
    """Mean length of the stretch without drift between two trends. Lengths are uniform in the same way."""

    def __post_init__(self):
        super().__post_init__()
        self.require(self.trend_bars >= 1, "trend_bars", "at least 1")
        self.require(self.quiet_bars >= 1, "quiet_bars", "at least 1")
        self.require(self.drift < 0.1, "drift", "below 0.1 a bar")


_PARAMETERS = {"signal": SignalParameters, "martingale": MartingaleParameters, "crash": CrashParameters}

NAMES: tuple[str, ...] = tuple(_PARAMETERS)
"""The names that `synthetic_tables` accepts."""


def name_market(name: str, **numbers: float) -> str:
    """Return one name for every way to write the same market: sorted, without the numbers that are the defaults."""
    known = {"seed": 0, "bars": YEAR_BARS} | dataclasses.asdict(_PARAMETERS[name]())
    told = {key: value for key, value in sorted(numbers.items()) if value != known[key]}
    query = "&".join(f"{key}={type(known[key])(value)!r}" for key, value in told.items())
    return f"{name}?{query}" if query else name


class Tables(NamedTuple):
    """A synthetic market, in the tables of `perpjax.data.contract`."""

    candles: pa.Table
    mark: pa.Table | None
    """Only in `crash`; in the other markets the last price is the mark."""
    funding: pa.Table
    instrument: Instrument
    latent: dict[str, np.ndarray]
    """Quantities hidden from every policy: see `synthetic_tables`."""


def synthetic_tables(name: str, seed: int = 0, bars: int = YEAR_BARS, **parameters: float) -> Tables:
    """Draw a synthetic market: 3-minute candles from 2024-01-01 UTC, equal for equal arguments.

    Args:
      name: one of `NAMES`.
      seed: any non-negative integer; each gives its own market.
      bars: number of 15-minute bars, N.
      parameters: replacements of the defaults in the market's own dataclass: `SignalParameters`,
        `MartingaleParameters`, `CrashParameters`.

    Returns:
      Tables in the schemas of `perpjax.data.contract`, with prices in whole ticks (mark prices in hundredths).
      `latent` holds `volatility` [N] (fraction of price per bar, at the bar's first candle) and `drift` [N].
      The drift is the expected return of bar t, 0 but in `signal`, and unknown at T_t. In `crash`, `latent` also holds
      the bool masks [5 N] `gap`, `frozen`, `missing`, `wick`, `mark_spike` and `missing_mark`, one entry for each
      candle of the full grid.

    Raises:
      ValueError: the name or a parameter is unknown, or the seed or the number of bars is out of range. Also if a
        price exceeds the exact range of float32 (only for many years or for extreme parameters).
    """
    if name not in _PARAMETERS:
        raise ValueError(f"synthetic market {name!r} is not one of {', '.join(NAMES)}")
    for label, value, least in (("seed", seed, 0), ("bars", bars, 1)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(f"synthetic market {name}: {label} = {value!r} is not an integer >= {least}")
    known = [field.name for field in dataclasses.fields(_PARAMETERS[name])]
    for key in parameters.keys() - set(known):
        raise ValueError(f"synthetic market {name} has no parameter {key!r}; it has {', '.join(known)}")
    p = _PARAMETERS[name](**parameters)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed_words(int(seed), NAMES.index(name)))))

    sigma = draw_volatility(rng, p, bars * CANDLES_PER_BAR)
    jumps = draw_jumps(rng, p, len(sigma))
    volume = draw_volume(rng, p, sigma)
    drift = _draw_drift(rng, p, bars) if isinstance(p, SignalParameters) else np.zeros(bars)
    growth = np.repeat(np.log1p(drift) / CANDLES_PER_BAR, CANDLES_PER_BAR)
    path = walk(rng, sigma, growth, jumps)
    times = START_MS + CANDLE_MS * np.arange(len(sigma))
    latent = {"volatility": sigma[::CANDLES_PER_BAR] * np.sqrt(CANDLES_PER_BAR), "drift": drift}
    if isinstance(p, CrashParameters):
        return _crash_tables(rng, p, times, path, volume, latent)
    stamps = np.arange(times[0], times[-1] + CANDLE_MS, 8 * HOUR_MS)
    rates = autoregress(rng, len(stamps), p.funding_spread, 4.0)  # half forgotten within a day
    return Tables(_candle_table(times, path, volume), None, _funding_table(stamps, rates), _instrument(), latent)


def _crash_tables(
    rng: np.random.Generator,
    p: CrashParameters,
    times: np.ndarray,
    path: np.ndarray,
    volume: np.ndarray,
    latent: dict[str, np.ndarray],
) -> Tables:
    events = draw_events(rng, p, len(times))
    path = path + draw_gaps(rng, p, path, events["gap"])[:, None]
    # Before the last price freezes: the mark keeps moving while nothing trades.
    mark = draw_mark(rng, path, events["mark_spike"])
    path = freeze(add_spikes(rng, path, events["wick"]), events["frozen"], events["missing"])
    volume = np.where(events["frozen"], 0.0, volume)
    there, marked = ~events["missing"], ~events["missing_mark"]
    return Tables(
        _candle_table(times[there], path[there], volume[there]),
        _mark_table(times[marked], mark[marked]),
        _funding_table(*draw_wild_funding(rng, p, times)),
        _instrument(),
        latent | events,
    )


def _instrument() -> Instrument:
    return Instrument("SYNTHETIC", tick_size=TICK, step_size=0.001, min_notional=5.0, max_quantity=120.0)


def _draw_drift(rng: np.random.Generator, p: SignalParameters, bars: int) -> Float[np.ndarray, "bars"]:
    """Draw the expected return of each bar: quiet stretches (0) and trends (plus or minus `drift`) in turn.

    Signs are shuffled in eights, four plus and four minus. Every split has both, and no year drifts far away.
    """
    # Lengths are at least half their means: twice as many pairs always suffice.
    pairs = int(2 * bars / (p.trend_bars + p.quiet_bars)) + 2
    shares = rng.uniform(0.5, 1.5, (pairs, 2))
    lengths = np.ceil(shares * [p.quiet_bars, p.trend_bars]).astype(np.int64).ravel()
    drifts = np.zeros(2 * pairs)
    signs = rng.permuted(np.tile([1.0, -1.0], (pairs // 8 + 1, 4)), axis=1)
    drifts[1::2] = p.drift * signs.ravel()[:pairs]
    return np.repeat(drifts, lengths)[:bars]


def _candle_table(times: np.ndarray, path: np.ndarray, volume: np.ndarray) -> pa.Table:
    """Return the candles of a log path; prices in whole ticks."""
    ticks = np.round(START_PRICE / TICK * np.exp(path))
    for wrong, what in ((ticks[:, 2] < 1, "reached zero"), (ticks[:, 1] > EXACT, f"exceeded {EXACT} ticks")):
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"synthetic market: the price {what} at candle {row} of {len(ticks)}; "
                "use fewer bars, another seed or milder parameters"
            )
    # Divided by 10, not multiplied by 0.1: the float64 nearest to the decimal price.
    columns = [times, *(ticks / round(1 / TICK)).T, volume]
    return pa.table([pa.array(c) for c in columns], schema=CANDLES)


def _mark_table(times: np.ndarray, path: np.ndarray) -> pa.Table:
    """Return mark candles, in hundredths: the venue's mark is finer than its ticks."""
    prices = np.round(START_PRICE * np.exp(path), 2)
    return pa.table([pa.array(c) for c in (times, *prices.T)], schema=MARK)


def _funding_table(stamps: np.ndarray, rates: np.ndarray) -> pa.Table:
    return pa.table([pa.array(stamps), pa.array(np.round(rates, 8))], schema=FUNDING)
