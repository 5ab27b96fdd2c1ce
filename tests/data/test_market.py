"""A Market: its rows, cuts, slices and concatenations, and the bars at which episodes may start."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HAND, HOLD, all_bars, assemble, crash_market, expect, hand_market, order, play, reset, step

from perpjax._grid import BAR_MS
from perpjax.data.markets import concatenate_markets, pack_rows, slice_market
from perpjax.env import PerpEnv
from perpjax.instrument import Instrument
from perpjax.market import Market, Segments, find_segment, pick_start
from perpjax.params import EnvConfig

SHORT = EnvConfig(max_lots=3, episode_length=2)


def draw_starts(market: Market, length: int, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """First bars and segments of n uniform draws of 32 bits."""
    bits = jax.random.bits(jax.random.key(0), (n,))
    return jax.device_get(jax.jit(jax.vmap(lambda b: pick_start(market, b, length)))(bits))


@pytest.mark.parametrize("has_mark", [True, False], ids=["mark", "last"])
@pytest.mark.parametrize("k", [3, 5, 15])
def test_every_bar_is_cut_where_it_lies(k, has_mark):
    # Candle k of bar t is row K t + k: each price says where it stands.
    n = 6
    last = np.arange(n * k * 4).reshape(n, k, 4) + 1.0
    mark = last + 5000 if has_mark else None
    valid = (np.arange(n * k) % 3 > 0).reshape(n, k)
    funding = np.stack([np.arange(n) / 1024, np.arange(n) + 7], -1)
    atr, features = np.arange(n + 1) + 3.0, np.arange(2 * n + 2).reshape(n + 1, 2) + 0.5
    market = assemble(last, valid, funding, atr, features, mark=mark, first=1, instrument=HAND)
    bars = jax.device_get(all_bars(market))
    names = ("open", "high", "low", "close")
    for i, name in enumerate(names):
        np.testing.assert_array_equal(getattr(bars, name), last[..., i])
        np.testing.assert_array_equal(getattr(bars, "mark_" + name), (last if mark is None else mark)[..., i])
    np.testing.assert_array_equal(bars.valid, valid)
    np.testing.assert_array_equal(bars.funding_rate, funding[:, 0])
    np.testing.assert_array_equal(bars.funding_price, funding[:, 1])
    # The mark close of the bar before; of the first bar, its own mark open.
    closes = (last if mark is None else mark)[:, -1, 3]
    np.testing.assert_array_equal(bars.mark_before, [(last if mark is None else mark)[0, 0, 0], *closes[:-1]])
    np.testing.assert_array_equal(bars.atr, atr[:-1])
    np.testing.assert_array_equal(bars.atr_after, atr[1:])
    np.testing.assert_array_equal(jax.vmap(market.known)(jnp.arange(n + 1)), features)
    np.testing.assert_array_equal(market.atr, atr)
    np.testing.assert_array_equal(market.features, features)
    # Before bar 0 no candle is known: none is valid, nothing is settled.
    before = jax.device_get(market.bar(jnp.int32(-1)))
    assert not before.valid.any() and before.funding_rate == 0 and before.atr_after == atr[0]
    # Candles and features begin at a cache line; what fills the lines up is zero.
    columns = k * (9 if has_mark else 5) + 5
    assert market.rows.shape[1] % 16 == 0 and market.rows[0, -16:].tolist() == [0.5, 1.5] + 14 * [0]
    assert not market.rows[:, columns:-16].any()


def test_columns_are_replaced_where_they_lie():
    market, other = crash_market(bars=700), crash_market(bars=700, seed=1)
    rows = np.asarray(market.rows)
    for names in (["candles"], ["atr"], ["features"], ["candles", "atr", "features"]):
        changed = market.with_columns(**{name: getattr(other, name) for name in names})
        for name in ("candles", "atr", "features"):
            np.testing.assert_array_equal(getattr(changed, name), getattr(other if name in names else market, name))
        np.testing.assert_array_equal(jax.vmap(changed.bar)(jnp.arange(700)).atr, changed.atr[:-1])
    np.testing.assert_array_equal(changed.rows[1:], other.rows[1:])
    np.testing.assert_array_equal(market.rows, rows)


def test_prices_up_to_the_largest_tick_are_exact():
    last = np.full((2, 3, 4), 2.0**24 - 1)
    rows = pack_rows(last, None, np.ones((2, 3)), np.zeros((2, 2)), np.ones(3), np.zeros((3, 0)))
    assert (rows[1:, :12] == 2**24 - 1).all()


def test_host_properties():
    market = crash_market(bars=700)
    assert (market.num_bars, market.start_ms, market.symbols) == (700, 0, ("CRASH",))
    assert market.candles.shape[0] + 1 == market.atr.shape[0] == market.features.shape[0] == len(market.rows) == 701
    assert market.open_time_ms(3) == 3 * BAR_MS
    assert market.num_starts(28 - 1) == 1 and market.num_starts(27 + 1) == 0
    assert hand_market().instrument.tick_size.shape == ()


def test_starts_run_from_the_first_decision_to_the_last_whole_episode():
    # 673 .. N - 27 inclusive.
    market = crash_market(bars=720)
    draws, _ = draw_starts(market, 27)
    assert sorted(set(draws.tolist())) == list(range(673, 720 - 27 + 1))
    # The same through reset, from consecutive keys.
    env = PerpEnv(market, FREE, EnvConfig(episode_length=27))
    keys = jax.vmap(jax.random.key)(jnp.arange(2000))
    values, counts = np.unique(np.asarray(jax.jit(jax.vmap(lambda k: env.reset(k).t))(keys)), return_counts=True)
    assert values.tolist() == list(range(673, 694)) and counts.min() > 60 and counts.max() < 140


def test_slices_know_nothing_of_what_follows():
    market = crash_market(bars=1500)
    part = slice_market(market, 100, 900)
    assert (part.num_bars, part.start_ms) == (800, 100 * BAR_MS)
    assert part.segments.first.tolist() == [673] and part.segments.last.tolist() == [799]
    whole = jax.device_get(all_bars(market))
    cut = jax.device_get(all_bars(part))
    chex.assert_trees_all_equal(cut, jax.tree.map(lambda x: x[100:900], whole))
    np.testing.assert_array_equal(part.features, market.features[100:901])
    np.testing.assert_array_equal(part.atr, market.atr[100:901])
    np.testing.assert_array_equal(part.rows, market.rows[100:901])
    assert slice_market(part, 0, 800).candles.tolist() == part.candles.tolist()
    for start, stop in ((-1, 5), (5, 5), (7, 3), (0, 1501)):
        with pytest.raises(ValueError, match=f"bars {start} .. {stop} do not lie within the market's 1500"):
            slice_market(market, start, stop)
    # A slice warms up on its own bars, like any other market.
    assert slice_market(hand_market(bars=8), 0, 8).segments.first.tolist() == [673]


def test_markets_concatenate_along_bars():
    cheap = Instrument("CHEAP", 1.0, 0.001, 5.0, 1e5, brackets=HAND.brackets)
    a, b = hand_market(atr=100), hand_market(bars=12, instrument=cheap, price=500, atr=100)
    both = concatenate_markets([a, b])
    assert (both.num_bars, both.symbols) == (20, ("HAND", "CHEAP"))
    # The second begins at row 9: N + 1 rows of the first.
    assert both.segments.first.tolist() == [1, 10] and both.segments.last.tolist() == [7, 20]
    assert both.segments.instrument.tolist() == [0, 1] and both.segments.start.tolist() == [0, 9]
    assert both.open_time_ms(9) == 0 and both.open_time_ms(8) == 8 * BAR_MS and both.open_time_ms(10) == BAR_MS
    env = PerpEnv(both, FREE, SHORT)
    # tick_value 0.001 there: q = 10 000 / (500 * 0.001) = 20 000 steps; in the first 1000.
    for start, quantity, entry, row in ((2, 1000, 1000, 0), (12, 20_000, 500, 1)):
        state = step(env, reset(env, start), jnp.asarray(order(1)))
        expect(state, lot_quantity=quantity, lot_entry=entry, instrument=row)
    # An episode ends with its segment: bar 7 is the last of the first market, although rows go on.
    state = step(env, reset(env, 7), jnp.asarray(HOLD))
    expect(state, t=8, truncated=True)
    # Starts are drawn over both, uniformly over bars: 6 of the first, 10 of the second.
    draws = draw_starts(both, 2)
    values, counts = np.unique(draws[0], return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 5, 6, *range(10, 20)] and counts.min() > 180
    np.testing.assert_array_equal(draws[1], (draws[0] >= 10).astype(int))
    # An explicit start between the segments is none.
    with pytest.raises(ValueError, match=r"start = 8 .* those are 1 .. 7, 10 .. 20"):
        env.reset(jax.random.key(0), 8)
    assert [int(find_segment(both, jnp.int32(t))[0]) for t in (0, 1, 7, 8, 9, 10, 20, 21)] == [
        1,
        1,
        7,
        7,
        10,
        10,
        20,
        20,
    ]


def test_a_segment_too_short_for_an_episode_is_never_drawn():
    both = concatenate_markets([hand_market(bars=3), hand_market(bars=8)])
    starts, segments = draw_starts(both, 5, 200)
    assert set(segments.tolist()) == {1}
    assert set(starts.tolist()) == {5, 6, 7} and both.num_starts(5) == 3
    assert isinstance(both.segments, Segments)


def test_markets_that_do_not_fit_together():
    a = hand_market()
    for other, why in (
        (hand_market(candles=5), "candles_per_bar"),
        (hand_market(has_mark=False), "has_mark"),
        (a.replace(feature_names=("other",)), "feature_names"),
        (a.replace(scaler_mean=a.scaler_mean + 1), "scalers"),
    ):
        with pytest.raises(ValueError, match=why):
            concatenate_markets([a, other])


@pytest.mark.parametrize("notional", [1.0, 3e5, 5e6, 2e9])
def test_bracket_tables_of_different_lengths_fit_together(notional):
    """The shorter table is filled up; maintenance and maximum leverage of a notional stay those of its own table."""
    one = hand_market()
    both = concatenate_markets([one, hand_market(instrument=Instrument())])
    assert both.instruments.brackets.shape == (2, 12, 5)
    for row, own in ((0, one.instrument), (1, Instrument())):
        brackets, maintenance = (np.asarray(getattr(both.instruments, n)[row]) for n in ("brackets", "maintenance"))
        table = np.asarray(own.brackets, np.float32)
        assert brackets[-1, 1] == table[-1, 1]
        lowest = [t[t[:, 0] < notional, 2].min() for t in (brackets, table)]
        assert lowest[0] == lowest[1]
        lines = [np.max(t[:, 0] * notional - t[:, 1]) for t in (maintenance, np.asarray(own.maintenance, np.float32))]
        assert lines[0] == lines[1]


def test_an_invalid_candle_later_in_the_bar_does_not_block_an_entry():
    state = play(hand_market(invalid=[(1, 1), (1, 2)]), order(1))[-1]
    expect(state, opened=1, lot_age=1)
