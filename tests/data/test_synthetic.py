"""The synthetic markets: deterministic, within the contract, and each of them what it says it is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax._grid import FIRST_DECISION
from perpjax.data import build_market
from perpjax.data.contract import BAR_MS, CANDLES, FUNDING, MARK, settlement_opens, validate
from perpjax.data.synthetic import NAMES, SignalParameters, Tables, synthetic_tables
from perpjax.data.synthetic_crash import CrashParameters
from perpjax.env import PerpEnv
from perpjax.instrument import EXACT
from perpjax.market import Market
from perpjax.params import EnvParams

CANDLE_MS = 180_000
SEEDS = range(8)
SHORT = 4_000


@functools.cache
def make(name: str, seed: int = 0) -> Tables:
    return synthetic_tables(name, seed=seed)


def columns(table, *names: str) -> list[np.ndarray]:
    return [table[name].to_numpy() for name in names]


def bar_returns(tables: Tables) -> np.ndarray:
    """Simple returns of whole bars, close to close."""
    close = tables.candles["close"].to_numpy()[4::5]
    return close[1:] / close[:-1] - 1


def autocorrelation(x: np.ndarray, lag: int) -> float:
    x = x - x.mean()
    return float((x[lag:] * x[:-lag]).mean() / (x * x).mean())


@pytest.mark.parametrize("name", NAMES)
def test_tables_keep_the_contract(name):
    tables = make(name)
    candles = validate(tables.candles, CANDLES, interval_ms=CANDLE_MS)
    funding = validate(tables.funding, FUNDING, "funding")
    assert tables.candles.schema == CANDLES and tables.funding.schema == FUNDING
    times, *prices = columns(candles, "open_time_ms", "open", "high", "low", "close")
    assert times[0] == 1_704_067_200_000 and times[-1] == times[0] + 35_040 * BAR_MS - CANDLE_MS
    ticks = np.stack(prices) / tables.instrument.tick_size
    np.testing.assert_allclose(ticks, np.round(ticks), rtol=0, atol=1e-6)
    assert ticks.min() >= 1 and ticks.max() <= EXACT
    settled = settlement_opens(funding)
    assert settled[0] == times[0] and np.diff(settled).max() <= 8 * 3_600_000
    assert times[-1] + CANDLE_MS - settled[-1] <= 8 * 3_600_000
    assert (tables.mark is None) == (name != "crash")
    if tables.mark is not None:
        validate(tables.mark, MARK, "mark", interval_ms=CANDLE_MS)
    assert {len(tables.latent["drift"]), len(tables.latent["volatility"])} == {35_040}


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_gives_one_market(name):
    first, again, other = (synthetic_tables(name, seed=s, bars=SHORT) for s in (3, 3, 4))
    for table in ("candles", "mark", "funding"):
        a, b, c = (getattr(t, table) for t in (first, again, other))
        assert a is b is c is None or (a.equals(b) and not a.equals(c))
    for key in first.latent:
        np.testing.assert_array_equal(first.latent[key], again.latent[key])


def test_the_markets_do_not_share_their_noise():
    a, b = (synthetic_tables(name, bars=SHORT).candles["close"].to_numpy() for name in ("signal", "martingale"))
    correlation = np.corrcoef(np.diff(np.log(a)), np.diff(np.log(b)))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(len(a))


@pytest.mark.parametrize("seed, other", [(2**32, "martingale"), (2**33, "crash")])
def test_no_seed_gives_the_noise_of_another_market(seed, other):
    """Without care the words of (2^32, signal) are those of (0, martingale), and zeros."""
    quiet = dict(jumps_per_day=0.0, slow_spread=0.0, fast_spread=0.0, volatility=0.5, bars=40)
    one = synthetic_tables("signal", seed=seed, drift=0.0, **quiet).candles
    for name, low in ((other, 0), ("signal", 0)):
        assert one["volume"] != synthetic_tables(name, seed=low, **quiet).candles["volume"]


@pytest.mark.parametrize("bars", [1, 2, 33, 700])
@pytest.mark.parametrize("name", NAMES)
def test_short_markets_exist(name, bars):
    tables = synthetic_tables(name, bars=bars)
    times = tables.candles["open_time_ms"].to_numpy()
    assert times[-1] - times[0] == bars * BAR_MS - CANDLE_MS
    validate(tables.candles, CANDLES, interval_ms=CANDLE_MS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="trend"), "synthetic market 'trend' is not one of signal, martingale, crash"),
        (dict(name="signal", seed=-1), "seed = -1 is not an integer >= 0"),
        (dict(name="signal", seed=1.0), "seed = 1.0 is not an integer >= 0"),
        (dict(name="signal", bars=0), "bars = 0 is not an integer >= 1"),
        (dict(name="signal", bars=True), "bars = True is not an integer >= 1"),
        (dict(name="martingale", drift=0.1), "martingale has no parameter 'drift'; it has volatility, "),
        (dict(name="signal", drift=-0.1), "SignalParameters: drift = -0.1 is not a finite number >= 0"),
        (dict(name="signal", drift=float("nan")), "SignalParameters: drift = nan is not a finite"),
        (dict(name="signal", drift=0.5), "SignalParameters: drift = 0.5 is not below 0.1 a bar"),
        (dict(name="signal", trend_bars=0), "SignalParameters: trend_bars = 0 is not at least 1"),
        (dict(name="signal", volatility=0), "SignalParameters: volatility = 0 is not above 0"),
        (dict(name="crash", largest_gap=1.5), "CrashParameters: largest_gap = 1.5 is not below 1"),
        (dict(name="crash", smallest_gap=0.9), "smallest_gap = 0.9 is not at most largest_gap 0.5"),
        (dict(name="crash", capped_days=2), "capped_days = 2 is not a fraction"),
        (dict(name="martingale", volatility=60.0), "synthetic market: the price "),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError) as caught:
        synthetic_tables(**arguments)
    assert message in str(caught.value)


# The noise


@pytest.mark.parametrize("name", ["martingale", "signal"])
def test_a_candle_is_one_path(name):
    """Extremes lie outside the body, and mostly strictly; the open is the last close but for a jump."""
    open_, high, low, close = columns(make(name).candles, "open", "high", "low", "close")
    assert (high >= np.maximum(open_, close)).all() and (low <= np.minimum(open_, close)).all()
    assert np.mean(high > np.maximum(open_, close)) > 0.99
    jumped = open_[1:] != close[:-1]
    # Poisson(365) jumps; a few are smaller than a tick.
    assert 365 - 4 * np.sqrt(365) - 10 < jumped.sum() < 365 + 4 * np.sqrt(365)


def test_the_martingale_has_no_drift():
    """Mean simple return over all seeds; each bar is one draw, divided by its volatility so that all weigh alike."""
    scaled = np.concatenate(
        [bar_returns(make("martingale", s)) / make("martingale", s).latent["volatility"][1:] for s in SEEDS]
    )
    t = scaled.mean() / scaled.std() * np.sqrt(len(scaled))
    assert abs(t) < 3


@pytest.mark.parametrize("lag", [1, 2, 4, 16, 96])
def test_martingale_returns_do_not_predict_each_other(lag):
    pairs = []
    for seed in SEEDS:
        returns = bar_returns(make("martingale", seed)) / make("martingale", seed).latent["volatility"][1:]
        pairs.append(np.sign(returns[lag:]) * np.sign(returns[:-lag]))
    agree = np.concatenate(pairs)
    assert abs(agree.mean()) < 3.5 / np.sqrt(len(agree))


def test_volatility_clusters_and_is_that_of_crypto():
    returns = bar_returns(make("martingale"))
    assert 0.55 < returns.std() * np.sqrt(35_040) < 0.85
    for lag, least in ((1, 0.15), (16, 0.08), (96, 0.03)):
        assert autocorrelation(np.abs(returns), lag) > least
    kurtosis = ((returns - returns.mean()) ** 4).mean() / returns.var() ** 2
    assert kurtosis > 5  # jumps, and volatility that changes
    volume = make("martingale").candles["volume"].to_numpy()
    assert volume.min() > 0
    by_bar = volume.reshape(-1, 5).sum(1)[1:]
    assert np.corrcoef(np.log(by_bar), np.log(np.abs(returns) + 1e-5))[0, 1] > 0.15


def test_martingale_funding_has_mean_zero():
    rates = np.concatenate([make("martingale", s).funding["funding_rate"].to_numpy() for s in SEEDS])
    # AR(1) with weight e^-1/4 = 0.78: the mean's variance is (1 + 0.78) / (1 - 0.78) = 8 times that of white noise.
    assert abs(rates.mean()) < 3 * 5e-5 * np.sqrt(8 / len(rates))


def test_levels_inside_a_candle_are_reached_as_by_a_continuous_path():
    """Optional stopping, which a trader of stops relies on, candle by candle and without jumps.

    From the open, sell at a limit 1 volatility up if it is reached, else at the close. Had the high been the
    highest of 10 points, the limit would be reached in 0.242 of the candles and the mean would be -0.042 (20
    standard errors).
    """
    p = dict(jumps_per_day=0, slow_spread=0, fast_spread=0)
    candles = synthetic_tables("martingale", **p).candles
    open_, high, low, close = columns(candles, "open", "high", "low", "close")
    width = open_ * 0.65 / np.sqrt(175_200)
    for side, extreme in ((1, high), (-1, low)):
        level = open_ + side * width
        exit_ = np.where(side * (extreme - level) >= 0, level, close)
        earned = side * (exit_ - open_) / width
        assert abs(earned.mean()) < 4 * earned.std() / np.sqrt(len(earned))
        # P(max >= x) = 2 P(close >= x), by reflection: 2 * 0.15866.
        assert np.mean(side * (extreme - level) >= 0) == pytest.approx(0.3173, abs=0.005)


# The signal


@functools.cache
def signal_market() -> Market:
    tables = make("signal")
    return build_market(tables.candles, tables.mark, tables.funding, tables.instrument)


def test_the_drift_is_what_it_says():
    p, drift = SignalParameters(), make("signal").latent["drift"]
    assert set(np.unique(drift)) == {-p.drift, 0.0, p.drift}
    edges = np.flatnonzero(np.diff(drift)) + 1
    lengths = np.diff(edges)
    trends = drift[edges[:-1]] != 0
    assert p.trend_bars / 2 <= lengths[trends].min() and lengths[trends].max() <= 1.5 * p.trend_bars + 1
    assert p.quiet_bars / 2 <= lengths[~trends].min() and lengths[~trends].max() <= 1.5 * p.quiet_bars + 1
    assert np.mean(drift != 0) == pytest.approx(p.trend_bars / (p.trend_bars + p.quiet_bars), abs=0.04)
    # Row t of the drift is about bar t and no other: the mean return of bars in a trend is the drift.
    first, close = columns(make("signal").candles, "open", "close")
    returns = np.sign(drift) * (close[4::5] / first[::5] - 1)
    inside = returns[drift != 0]
    assert inside.mean() == pytest.approx(p.drift, abs=4 * inside.std() / np.sqrt(len(inside)))
    signs = np.sign(drift[edges[:-1]][trends])
    moves = close[4::5] / first[::5] - 1
    # 146 trends a year or so, noise 0.0019 a bar: the means below are known to 0.00016.
    assert np.mean(signs * moves[edges[:-1]][trends]) > p.drift / 2 > np.mean(signs * moves[edges[:-1] - 1][trends])


def test_the_core_features_see_the_drift():
    """Ridge regression on the first 70 %, R^2 on the rest; and far less of it with the drift of another time."""
    market, drift = signal_market(), make("signal").latent["drift"]
    features = np.nan_to_num(np.asarray(market.features, np.float64))[:-1]
    train, unseen = slice(FIRST_DECISION, 24_500), slice(25_200, None)
    x = (features - features[train].mean(0)) / features[train].std(0)

    def r2(target: np.ndarray) -> float:
        a = x[train]
        weights = np.linalg.solve(a.T @ a + 1e-3 * len(a) * np.eye(31), a.T @ target[train])
        return 1 - np.mean((target[unseen] - x[unseen] @ weights) ** 2) / np.var(target[unseen])

    assert r2(drift) > 0.4
    assert r2(np.roll(drift, 5_000)) < 0.1


@jax.jit
def _run_trend_follower(env: PerpEnv, starts: jax.Array, estimate: jax.Array, enter: jax.Array) -> jax.Array:
    """Log returns of the policy that enters beyond `enter` at full size and leaves when the sign turns."""

    def window(start):
        def step(state, _):
            value, side = estimate[state.t], state.account.lots.side.sum()
            entry = jnp.where(value > enter, 1, jnp.where(value < -enter, 2, 0))
            what = jnp.where(side == 0, entry, jnp.where(value * side < 0, 3, 0))
            return env.step(state, jnp.stack([what, 3, 4, 3, 4]).astype(jnp.int32)), None

        state, _ = jax.lax.scan(step, env.reset(jax.random.key(0), start=start), None, length=672)
        return jnp.log(state.equity / env.params.initial_equity)

    return jax.vmap(window)(starts)


def test_the_drift_pays_after_costs():
    """The policy that knows the drift, in every week; one that looks at a single feature, in the mean."""
    market, drift = signal_market(), make("signal").latent["drift"]
    env = PerpEnv(market, params=EnvParams())
    starts = jnp.arange(FIRST_DECISION, 35_040 - 672 + 1, 672)
    knows = np.asarray(
        _run_trend_follower(env, starts, jnp.asarray(np.append(drift, 0), jnp.float32), jnp.float32(1e-4))
    )
    assert 0.10 < knows.mean() < 0.25 and knows.min() > 0
    distance = market.features[:, market.feature_names.index("ema_50_dist")]
    sees = np.asarray(_run_trend_follower(env, starts, distance, jnp.float32(0.01)))
    t = sees.mean() / sees.std(ddof=1) * np.sqrt(len(sees))
    assert t > 3 and sees.mean() < knows.mean()


# The crash


def test_crash_gaps():
    """6 a month: 73 a year, of 10 to 50 %, either way, at bar opens and elsewhere."""
    latent = make("crash").latent
    gap, idle = latent["gap"], latent["missing"] | latent["frozen"]
    times, open_, close = columns(make("crash").candles, "open_time_ms", "open", "close")
    row_of = dict(zip(((times - times[0]) // CANDLE_MS).tolist(), range(len(times)), strict=True))
    seen = [k for k in np.flatnonzero(gap) if not idle[k - 1 : k + 1].any()]
    moves = np.array([open_[row_of[k]] / close[row_of[k] - 1] - 1 for k in seen])
    assert 40 < len(moves) < 110
    assert (np.abs(moves) > 0.09).all() and (np.abs(moves) < 0.52).all()
    assert (moves > 0).sum() > 10 and (moves < 0).sum() > 10 and np.abs(moves).max() > 0.4
    at_open = np.array(seen) % 5 == 0
    assert at_open.sum() > 10 and (~at_open).sum() > 10


def test_crash_frozen_candles_are_flat():
    latent = make("crash").latent
    there = ~latent["missing"]
    frozen = latent["frozen"][there]
    open_, high, low, close, volume = columns(make("crash").candles, "open", "high", "low", "close", "volume")
    assert frozen.sum() > 1_000
    np.testing.assert_array_equal(volume == 0, frozen)
    np.testing.assert_array_equal(high[frozen], low[frozen])
    at = np.flatnonzero(frozen)
    np.testing.assert_array_equal(open_[at], close[at - 1])


def test_crash_missing_candles():
    missing = make("crash").latent["missing"]
    times = make("crash").candles["open_time_ms"].to_numpy()
    grid = (times - times[0]) // CANDLE_MS
    np.testing.assert_array_equal(np.setdiff1d(np.arange(len(missing)), grid), np.flatnonzero(missing))
    per_bar = missing.reshape(-1, 5)
    partly = per_bar.any(1) & ~per_bar.all(1)
    assert (per_bar.sum(1) == 1).sum() > 200
    assert (partly & (per_bar.sum(1) > 1)).sum() > 100
    edges = np.flatnonzero(np.diff(np.concatenate([[0], per_bar.all(1), [0]])))
    lengths = edges[1::2] - edges[::2]
    assert (lengths < 8).sum() > 50 and (lengths >= 8).sum() > 5


def test_crash_wicks_and_mark():
    """Wicks on the last price that the mark does not follow, spikes on the mark alone, and mark rows missing."""
    latent = make("crash").latent
    last, mark = (columns(t, "open_time_ms", "open", "high", "low", "close") for t in make("crash")[:2])
    both, a, b = np.intersect1d(last[0], mark[0], return_indices=True)
    candle = (both - last[0][0]) // CANDLE_MS
    reach = [
        np.maximum(t[2] / np.maximum(t[1], t[4]), np.minimum(t[1], t[4]) / t[3])[rows] - 1
        for t, rows in ((last, a), (mark, b))
    ]
    wick, spike = latent["wick"][candle], latent["mark_spike"][candle]
    traded = ~latent["frozen"][candle]
    assert wick.sum() > 100 and (reach[0][wick] > 0.029).all() and np.mean(reach[1][wick & ~spike] < 0.01) > 0.99
    assert spike.sum() > 20 and (reach[1][spike] > 0.029).all() and np.mean(reach[0][spike & ~wick] < 0.01) > 0.95
    assert np.mean(reach[1][traded] < reach[0][traded]) > 0.9
    assert len(mark[0]) == 175_200 - latent["missing_mark"].sum() and latent["missing_mark"].sum() > 100
    usual = traded & ~wick & ~spike
    assert 1e-4 < np.median(np.abs(mark[4][b] / last[4][a] - 1)[usual]) < 2e-3


def test_crash_funding_changes_its_interval_and_reaches_the_cap():
    rates = make("crash").funding["funding_rate"].to_numpy()
    hours = np.diff(settlement_opens(make("crash").funding)) // 3_600_000
    assert {1, 4, 8} <= set(hours.tolist())
    for cap in (0.02, -0.02):
        assert (rates == cap).sum() > 50
    assert np.abs(rates).max() == 0.02 and np.mean(np.abs(rates) < 0.001) > 0.4


def test_crash_builds_with_its_mark():
    tables = synthetic_tables("crash", bars=SHORT)
    market = build_market(tables.candles, tables.mark, tables.funding, tables.instrument)
    assert market.num_bars == SHORT and market.has_mark and market.candles_per_bar == 5


def test_parameters_are_documented_fields():
    quiet = synthetic_tables(
        "crash", bars=SHORT, **{f.name: 0 for f in dataclasses.fields(CrashParameters) if f.name in _EVENTS}
    )
    assert quiet.candles.num_rows == SHORT * 5 and quiet.candles["volume"].to_numpy().min() > 0


_EVENTS = ("gaps", "frozen", "missing_candles", "missing_runs", "missing_bars", "outages", "wicks", "mark_spikes")
