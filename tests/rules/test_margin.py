"""Rule 6, the liquidation price, and published worked examples (shared/data/liquidation_vectors.json)."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import FREE, HAND, expect, hand_market, order, play

from perpjax.instrument import BRACKETS, Instrument
from perpjax.rules.margin import CEIL_SLACK, funding_payment, liquidation_price, liquidation_ticks

# Vectors that the kernel reproduces after what their own note says, and why. None is left out.
BUFFERED = "freqtrade's liquidation_buffer moves the price 5 % of the distance towards the entry"
EXPLAINED = {
    "ft-entry-binance-shortbuf": BUFFERED,
    "ft-entry-binance-longbuf": BUFFERED,
    "ft-entry-gate-shortbuf": BUFFERED,
    "ft-entry-gate-longbuf": BUFFERED,
    "ft-bt-long-buf": BUFFERED,
    "ft-bt-short-buf": BUFFERED,
    "ft-adj-L1-100": BUFFERED,
    "ft-adj-L2-100": BUFFERED,
    "ft-adj-L1-200": BUFFERED,
    "ft-adj-L2-200": BUFFERED,
    "binance-live-op-long-1x": "a price below zero is shown as 0: the long cannot be liquidated",
    "okx-doc-eth-cross": "margin is the equity at the mark, marginRatio * (mm + fee * value), so the mark is the entry",
    "kucoin-xbt-cross": "margin is given only by the bankruptcy price: d (E - bust) q",
}


def test_published_liquidation_prices(shared_data):
    vectors = [v for v in json.loads((shared_data / "liquidation_vectors.json").read_text())
               if v["contract"] == "linear" and v["canonical_reproduced"]]  # fmt: skip
    assert len(vectors) >= 70 and {v["id"] for v in vectors} >= set(EXPLAINED)
    missed = []
    with jax.enable_x64(True):
        for v in vectors:
            side = 1.0 if v["side"] == "long" else -1.0
            entry, quantity, fee = v["entry_price"], v["quantity"], v["taker_fee"]
            if v["id"] == "okx-doc-eth-cross":
                entry = v["mark_price"]
                margin = v["margin_ratio"] * (v["maintenance_margin"] + fee * entry * quantity)
            elif v["id"] == "kucoin-xbt-cross":
                margin = side * (entry - v["bankruptcy_price"]) * quantity
            else:
                margin = v["wallet_balance"] + v["extra_margin"] - v.get("tmm_other", 0) + v.get("upnl_other", 0)
            arguments = [
                jnp.float64(x) for x in (side, entry, quantity, margin, v["mmr"], v["maintenance_amount"], fee)
            ]
            price = float(liquidation_price(*arguments))
            explained = EXPLAINED.get(v["id"])
            if explained == BUFFERED:
                price += v["liquidation_buffer"] * (entry - price)
            elif v["id"] == "binance-live-op-long-1x":
                assert price < 0
                price = max(price, 0.0)
            if abs(price - v["expected_liquidation_price"]) > max(v["tolerance"], 1e-12):
                missed.append((v["id"], price, v["expected_liquidation_price"], v["tolerance"]))
    assert missed == []


def test_liquidation_price_broadcasts_in_its_own_dtype():
    # (E - d (M + cum) / q) / (1 - d (m + f)): (100 - 10) / 0.99 and (100 + 10) / 1.01.
    sides = jnp.array([[1.0], [-1.0]])
    price = liquidation_price(sides, 100.0, jnp.array([1.0, 2.0]), jnp.array([10.0, 20.0]), 0.01, 0.0)
    np.testing.assert_allclose(price, [[90 / 0.99] * 2, [110 / 1.01] * 2], rtol=1e-6)
    assert price.dtype == jnp.float32
    # cum 5 and a fee of 1 % inside: (100 - 15) / 0.98.
    np.testing.assert_allclose(liquidation_price(1.0, 100.0, 1.0, 10.0, 0.01, 5.0, 0.01), 85 / 0.98, rtol=1e-6)
    # Adding margin A moves it by -d A / (q (1 - d m)).
    moved = liquidation_price(sides, 100.0, 2.0, 30.0, 0.01, 0.0) - liquidation_price(
        sides, 100.0, 2.0, 20.0, 0.01, 0.0
    )
    np.testing.assert_allclose(moved, [[-10 / 2 / 0.99], [10 / 2 / 1.01]], rtol=1e-4)


_ticks = jax.jit(liquidation_ticks)
TABLES = {
    "hand": HAND,
    "btc": Instrument(),
    "fee": Instrument(
        "FEE", 0.01, 1.0, brackets=BRACKETS["ETHUSDT"], maintenance_fee_rate=0.0006, max_quantity=2**24 - 1
    ),
}
DEVICE = {name: x.on_device() for name, x in TABLES.items()}


def ticks(side: int, entry: float, quantity: float, margin: float, table: str = "hand") -> float:
    return float(_ticks(*(jnp.asarray([x], jnp.float32) for x in (side, entry, quantity, margin)), DEVICE[table])[0])


def test_golden_levels():
    # Hand table, tick_value 0.01. q 1000, M 1000, E 1000: 90 / 0.99 = 90.91 -> 909; 90 / 1.01 = 89.11 -> 1090.
    assert ticks(1, 1000, 1000, 1000) == 909
    assert ticks(-1, 1000, 1000, 1000) == 1090
    # Second bracket: q 20 000, notional 200 000, M 20 000: (21 000 / 200 - 20) / 0.98 = 86.73 -> 87, less than the
    # first bracket's 90 / 0.99 and the third's (51 000 / 200 - 50) / 0.95 = 216.3.
    assert ticks(1, 1000, 20_000, 20_000) == 913
    # Short: (105 - 20) / 1.02 = 83.33 -> 84.
    assert ticks(-1, 1000, 20_000, 20_000) == 1084
    # A long of notional 100 001 that falls into the first bracket by L: the smallest distance is still right.
    # First: 90 / 0.99 = 90.9; second: (M = 10 000.1: 11 000.1 / 100.001 - 20) / 0.98 = 91.8: the first.
    assert ticks(1, 1000, 10_000.1, 10_000.1) == 909
    # A distance that is whole in exact arithmetic: q 100, M = 1 * (0.99 * 90 + 10) = 99.1 -> exactly 90, not 91.
    assert ticks(1, 1000, 100, 99.1) == 910
    # 1x long: M = E: (1000 - 10) / 0.99 = 1000 -> 0: none. Half a tick more margin: none either, and never negative.
    assert ticks(1, 1000, 1000, 10_000) == 0
    assert ticks(1, 1000, 1000, 20_000) == 0
    # 1x short: L = 2 E / (1 + m): 990 / 1.01 = 980.2 -> 1981.
    assert ticks(-1, 1000, 1000, 10_000) == 1981
    # No margin at all: past the entry, (0 - 10) / 0.99 = -10.1 -> 1010 for a long; -9.9 -> 991 for a short.
    assert ticks(1, 1000, 1000, 0) == 1010
    assert ticks(-1, 1000, 1000, 0) == 991


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_whole_distances_stay_whole_in_float32(side):
    # M chosen so that the distance is exactly D ticks: float32 puts M, and so the distance, a hair to either side.
    distances, entries = np.meshgrid(np.arange(1.0, 400.0), [1000.0, 12_345.0, 777_777.0])
    quantity = 7.0  # notional within the first bracket
    margin = quantity * HAND.tick_value * (distances * (1 - side * 0.01) + 0.01 * entries)
    levels = _ticks(*(jnp.asarray(x, jnp.float32) for x in (side, entries, quantity, margin)), DEVICE["hand"])
    np.testing.assert_array_equal(levels, entries - side * distances)


@pytest.mark.parametrize("excess, ticks_away", [(0, 100), (3 / 16, 100), (3 / 8, 101), (1, 101)])
def test_the_slack_is_a_quarter_of_a_tick_at_two_to_the_twenty(excess, ticks_away):
    # CEIL_SLACK * 2^20 = 1 / 4: a distance of up to 100.25 counts as 100 ticks.
    margin = 7.0 * HAND.tick_value * ((100 + excess) * 0.99 + 0.01 * 2**20)
    assert ticks(1, 2**20, 7.0, margin) == 2**20 - ticks_away


def test_the_fee_inside_maintenance():
    # OKX form: f = 0.01 on m = 0.01: (100 - 20) / 0.98 = 81.63 -> 918; 80 / 1.02 = 78.4 -> 1079.
    brackets = HAND.brackets.copy()
    brackets[0, 2] = 49  # at 50x maintenance and fee would be all of the margin
    market = hand_market(instrument=Instrument("FEE", 1.0, 0.01, 5.0, 1e5, 0.01, brackets), atr=100)
    for side, level in ((1, 918), (-1, 1079)):
        expect(play(market, order(side))[-1], lot_liquidation=level)


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_levels_in_the_environment_by_leverage(side):
    # E 1000, M = notional / leverage: distance = (1000 / leverage - 10) / (1 - 0.01 d).
    for leverage in (1.0, 2.0, 3.0, 5.0, 10.0):
        state = play(hand_market(atr=100), order(side, leverage=leverage), params=FREE)[-1]
        # The margin is that of whole steps: the same notional / leverage, so the distance is exact.
        distance = math.ceil((1000 / leverage - 10) / (1 - 0.01 * side) - 1e-4)
        expect(state, lot_liquidation=max(1000 - side * distance, 0), lot_leverage=leverage)


def maintenance(table: Instrument, quantity: float, price: float) -> float:
    """Quote, by looking the bracket up, as a venue does."""
    notional = quantity * price * table.tick_value
    brackets = table.brackets
    row = brackets[min(int((notional > brackets[:, 1]).sum()), len(brackets) - 1)]
    return notional * (row[3] + table.maintenance_fee_rate) - row[4]


positions = st.tuples(
    st.sampled_from([1, -1]),
    st.integers(50, 2_000_000),  # entry, ticks
    st.integers(1, 100_000),  # steps
    st.floats(0.008, 1.0),  # margin / notional
    st.sampled_from(sorted(TABLES)),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(positions)
def test_the_level_is_the_first_tick_at_which_maintenance_is_not_covered(position):
    side, entry, quantity, fraction, name = position
    table = TABLES[name]
    per_tick = quantity * table.tick_value
    margin = float(np.float32(entry * per_tick * fraction))
    level = ticks(side, entry, quantity, margin, name)

    def excess(price: float) -> float:
        """Margin balance less maintenance, in ticks of the whole position."""
        return (margin + side * per_tick * (price - entry) - maintenance(table, quantity, price)) / per_tick

    # float32: the distance is good to a few 2^-23 of its terms, the slack allows 2^-22 of the entry.
    slack = 4 * CEIL_SLACK * max(entry, level)
    if level == 0:
        assert side == 1 and excess(1) > -slack
        return
    assert level > 0
    assert excess(level) <= slack
    assert excess(level + side) > -slack


@settings(max_examples=100, deadline=None, derandomize=True)
@given(positions, st.floats(1.0, 3.0))
def test_more_margin_moves_the_level_away(position, factor):
    side, entry, quantity, fraction, name = position
    margin = entry * quantity * TABLES[name].tick_value * fraction
    near, far = (ticks(side, entry, quantity, m, name) for m in (margin, margin * factor))
    assert side * (near - far) >= 0 or (side < 0 and far >= near)
    if side > 0:
        assert far <= near


def test_funding_payments():
    # The marks, rates and quantities of freqtrade's funding test (sign: cash of a short, so a long pays it).
    paid = funding_payment(
        side=jnp.array([1.0, -1.0, 1.0, -1.0]),
        quantity=jnp.array([30.0, 30.0, 30.0, 30.0]),
        margin=jnp.array([10.0, 10.0, 10.0, 1e-4]),
        funding_price=jnp.float32(2.77),
        funding_rate=jnp.float32(-8e-6),
        tick_value=jnp.float32(1.0),
    )
    # 30 * 2.77 * -8e-6 = -0.0006648; the last short owes that much and has 0.0001.
    np.testing.assert_allclose(paid, [-6.648e-4, 6.648e-4, -6.648e-4, 1e-4], rtol=1e-5)
