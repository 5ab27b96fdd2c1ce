"""Published figures of venues and other projects: brackets, maintenance, funding, and liquidation prices not claimed.

The liquidation prices that the kernel claims are in test_margin.py. The numbers here come from Binance's published
bracket tables, from freqtrade's tests, and from shared/data/liquidation_vectors.json.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markets import FREE, HOLD, hand_market, order, play

from perpjax.instrument import BRACKETS, Instrument
from perpjax.params import EnvConfig
from perpjax.rules.margin import funding_payment, liquidation_price, liquidation_ticks
from perpjax.rules.orders import CLOSE

# Why the kernel does not claim a published liquidation price.
ENTRY_FORM = "maintenance frozen at the entry notional: Bybit until 2024/25, Delta, Phemex 2022, jesse, TorchTrade"
FROZEN_AT_MARK = "a display value: maintenance frozen at the current mark"
POSITION_MAINTENANCE = "KuCoin isolated, 2021/22: maintenance at entry, with commission and predicted funding"
INVERSE = "coin-margined: profit is not linear in the price"
FAMILIES = {
    "BYBIT_OLD": ENTRY_FORM,
    "BITGET_CROSS_OLD": FROZEN_AT_MARK,
    "KUCOIN_POSMAINT": POSITION_MAINTENANCE,
    "COINM": INVERSE,
    "COINM+1tick": INVERSE,
    "GATE_INV": INVERSE,
}
UNCHECKABLE = {
    "binance-live-btc-cross-2022": "the wallet is not in the capture",
    "binance-pm-btc-cross": "the wallet is not in the capture",
    "htx-btc-cross": "its margin rate has two digits",
    "ft-near-live": "no formula tried reproduces it: a hand-edited fixture of an unknown venue",
}


def test_every_published_price_is_claimed_or_explained(shared_data):
    vectors = json.loads((shared_data / "liquidation_vectors.json").read_text())
    left = [v for v in vectors if not (v["contract"] == "linear" and v["canonical_reproduced"])]
    assert len(left) == 40
    for v in left:
        assert v["id"] in UNCHECKABLE or v["formula_id"] in FAMILIES, v["id"]
        assert (v["contract"] == "inverse") == (FAMILIES.get(v["formula_id"]) == INVERSE), v["id"]


def test_the_entry_form_is_another_formula_and_not_ours(shared_data):
    vectors = json.loads((shared_data / "liquidation_vectors.json").read_text())
    vectors = [v for v in vectors if v["formula_id"] == "BYBIT_OLD" and v["contract"] == "linear" and v["reproduced"]]
    assert len(vectors) == 23
    for v in vectors:
        d, entry, quantity = 1 if v["side"] == "long" else -1, v["entry_price"], v["quantity"]
        margin = v["wallet_balance"] or entry * quantity / v["leverage"]
        margin += v["extra_margin"]
        published, tolerance = v["expected_liquidation_price"], v["tolerance"]
        # EP - d (M - maintenance at the entry) / q reproduces it ...
        frozen = quantity * entry * v["mmr"] - v["maintenance_amount"]
        assert entry - d * (margin - frozen) / quantity == pytest.approx(published, abs=tolerance), v["id"]
        # ... and the kernel, whose maintenance moves with the price, does not.
        kernel = liquidation_price(d, entry, quantity, margin, v["mmr"], v["maintenance_amount"])
        assert abs(kernel - published) > tolerance, v["id"]


# Binance: maintenance amounts (cum), in thousands, of the tables of 2024-05-30 .. 2025-06.
OLD = {
    "BTCUSDT": (0, 0.05, 0.95, 11.45, 131.45, 481.45, 2981.45, 14481.45, 26481.45, 41481.45, 121481.45, 421481.45),
    "ETHUSDT": (0, 0.05, 0.95, 11.45, 131.45, 381.45, 2006.45, 9506.45, 17506.45, 27506.45, 80506.45, 280506.45),
}


def table_of_2024(symbol: str) -> np.ndarray:
    """Today's table with the first three brackets and the amounts of then."""
    table = np.array(BRACKETS[symbol], np.float64)
    table[:4, 0], table[:3, 1], table[:3, 2] = (0, 50e3, 600e3, 3e6), (50e3, 600e3, 3e6), (125, 100, 75)
    table[:, 4] = 1e3 * np.array(OLD[symbol])
    return table


@pytest.mark.parametrize("symbol", ["BTCUSDT", "ETHUSDT"])
@pytest.mark.parametrize("year", [2024, 2025])
def test_binance_amounts_make_maintenance_continuous(symbol, year):
    table = np.array(BRACKETS[symbol], np.float64) if year == 2025 else table_of_2024(symbol)
    assert len(table) == 12
    floor, _, _, rate, amount = table.T
    # Binance FAQ: cum_n = floor_n (m_n - m_{n-1}) + cum_{n-1}, cum_1 = 0.
    np.testing.assert_allclose(amount[1:], floor[1:] * np.diff(rate) + amount[:-1], rtol=1e-12)
    assert amount[0] == 0
    Instrument(symbol, brackets=table)  # accepts it
    for row in range(1, 12):
        table[row, 4] *= 1.0001
        with pytest.raises(ValueError, match=rf"bracket row {row} .*not continuous"):
            Instrument(symbol, brackets=table)
        table[row, 4] /= 1.0001


# Binance's tables: notional, rate, amount, maintenance.
MAINTENANCE = [
    (2025, 50_000, 0.004, 0, 200), (2025, 300_000, 0.004, 0, 1200), (2025, 300_001, 0.005, 300, 1200.005),
    (2025, 1e6, 0.0065, 1500, 5000), (2025, 5e6, 0.01, 12_000, 38_000), (2025, 2e7, 0.02, 132_000, 268_000),
    (2025, 1.5e8, 0.05, 2_982_000, 4_518_000), (2024, 50_000, 0.004, 0, 200), (2024, 50_001, 0.005, 50, 200.005),
]  # fmt: skip


@pytest.mark.parametrize("year, notional, rate, amount, maintenance", MAINTENANCE)
def test_published_maintenance(year, notional, rate, amount, maintenance):
    table = np.array(BRACKETS["BTCUSDT"], np.float64) if year == 2025 else table_of_2024("BTCUSDT")
    row = table[(notional > table[:, 1]).sum()]  # floor < notional <= cap
    assert tuple(row[3:]) == (rate, amount)
    assert notional * row[3] - row[4] == pytest.approx(maintenance, rel=1e-12)
    # The largest of the brackets' lines is the same number: the kernel needs no look-up.
    assert (notional * table[:, 3] - table[:, 4]).max() == pytest.approx(maintenance, rel=1e-12)
    # And the kernel agrees: a long of one unit at this price and margin M = maintenance + 7 falls due 7 lower per
    # unit of what its balance loses over its maintenance, 1 - m (all within one bracket).
    with jax.enable_x64(True):
        instrument = jax.tree.map(jnp.float64, Instrument("UNIT", 1.0, 1.0, 5.0, 1e5, brackets=table))
        level = liquidation_ticks(*(jnp.float64(x) for x in (1, notional, 1, maintenance + 7)), instrument)
    distance = (maintenance + 7 - maintenance) / (1 - rate)
    if notional - distance > table[(notional > table[:, 1]).sum(), 0]:
        assert float(level) == notional - np.ceil(distance - notional * 2.0**-22)


# Freqtrade's test of `_fetch_and_calculate_funding_fees`: marks of 2.77 at 00:00 and 08:00, rates -8e-6 and -3e-6;
# cash flow of a short. Bars open every 15 minutes, bar 1 at 23:45 the day before. The venue counts a position at
# 00:00 if it was opened in bar 1, and not if it was opened in bar 2 or later.
SETTLED = {2: (-8e-6, 2770.0), 34: (-3e-6, 2770.0)}
FUNDING = [
    ("binance 00:00:00 to 08:00:00", 1, 34, 30, -0.00091409999),
    ("binance 00:00:00 to 12:00:00", 1, 50, 30, -0.00091409999),
    ("binance 23:58:00 to 08:00:00", 1, 34, 30, -0.00091409999),
    ("binance 00:00:15 to 08:00:00", 2, 34, 30, -0.0002493),
    ("binance 00:10:01 to 08:00:00", 3, 34, 30, -0.0002493),
    ("binance 01:00:14 to 08:00:00", 6, 34, 30, -0.0002493),
    ("binance 01:00:00 to 04:00:00", 6, 18, 30, 0.0),
    ("binance 00:00:00 to 07:59:59", 1, 33, 30, -0.00066479999),
    ("binance 00:00:00 to 08:00:00", 1, 34, 50, -0.0015235),
    ("gate 00:00:00 to 08:00:00", 1, 34, 30, -0.0009140999),
    ("gate 00:00:01 to 08:00:00", 2, 34, 30, -0.0002493),
    ("gate 00:10:00 to 04:00:00", 3, 18, 30, 0.0),
]


@pytest.mark.parametrize("direction", [1, -1], ids=["long", "short"])
@pytest.mark.parametrize("opens, closes, quantity, expected", [v[1:] for v in FUNDING], ids=[v[0] for v in FUNDING])
def test_published_funding(direction, opens, closes, quantity, expected):
    ada = Instrument("ADA", tick_size=1e-3, step_size=1.0, min_notional=5.0, max_quantity=1e5)
    market = hand_market(bars=54, price=2770.0, funding=SETTLED, instrument=ada)
    # 10 % of the equity at 10x buys `quantity` units of 2.77, and half a unit more that is no whole step.
    params = FREE.replace(initial_equity=(quantity + 0.5) * 2.77)
    actions = [HOLD] * 51
    actions[opens - 1], actions[closes - 1] = order(direction), order(CLOSE)
    states = play(market, *actions, params=params, config=EnvConfig(max_lots=1, episode_length=52))
    held = states[opens].account.lots
    assert float(held.quantity[0]) == quantity and float(states[-1].account.lots.quantity[0]) == 0
    cash = -float(states[-1].account.ledger.funding)
    assert cash == pytest.approx(-direction * expected, rel=2e-6, abs=1e-12)
    assert float(states[-1].account.ledger.closed) == 1


@pytest.mark.parametrize("mark, rate, expected", [(2.0, 0.0001, 0.002), (2.5, 0.0002, 0.005)])
def test_published_single_payment(mark, rate, expected):
    paid = funding_payment(
        jnp.array([1.0, -1.0]), jnp.array([10.0, 10.0]), jnp.array([9.0, 9.0]),
        jnp.float32(mark), jnp.float32(rate), jnp.float32(1.0),
    )  # fmt: skip
    np.testing.assert_allclose(paid, [expected, -expected], rtol=1e-6)  # what a short receives, a long pays


# Bracket crossing: nobody has published a vector, so the level is held to what defines it. In float64, with ticks so
# fine that whole ticks do not matter.
FINE = 1e6  # ticks per unit of quote
positions = st.tuples(
    st.sampled_from([1.0, -1.0]),
    st.floats(1e3, 1e5),  # entry, quote
    st.floats(4.0, 9.0),  # log10 of the notional: all twelve brackets
    st.floats(0.005, 1.2),  # margin / notional, above maintenance at the entry or not
    st.sampled_from(["BTCUSDT", "ETHUSDT"]),
    st.sampled_from([0.0, 0.0006]),
)


class Position:
    """A position in float64, and its liquidation price."""

    def __init__(self, drawn):
        self.side, self.entry, log_notional, fraction, symbol, self.fee = drawn
        self.quantity = 10**log_notional / self.entry
        self.table = np.array(BRACKETS[symbol], np.float64)
        self.margin = 10**log_notional * fraction
        self.instrument = Instrument(
            symbol, tick_size=1 / FINE, step_size=1.0, max_quantity=1.0, brackets=self.table,
            maintenance_fee_rate=self.fee,
        )  # fmt: skip

    def level(self, entry: float, margin: float) -> float:
        """Quote; 0 for none."""
        with jax.enable_x64(True):
            instrument = jax.tree.map(jnp.float64, self.instrument)
            args = (self.side, entry * FINE, self.quantity, margin)
            return float(_fine_ticks(*(jnp.float64(x) for x in args), instrument)) / FINE

    def excess(self, price: np.ndarray) -> np.ndarray:
        """Margin balance less maintenance at `price`, the bracket looked up by the notional there."""
        notional = self.quantity * price
        row = np.minimum((notional[:, None] > self.table[:, 1]).sum(axis=1), len(self.table) - 1)
        maintenance = notional * (self.table[row, 3] + self.fee) - self.table[row, 4]
        return self.margin + self.side * self.quantity * (price - self.entry) - maintenance


_fine_ticks = jax.jit(liquidation_ticks)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(positions)
def test_margin_balance_is_maintenance_at_the_level_and_nowhere_else(drawn):
    p = Position(drawn)
    level, notional = p.level(p.entry, p.margin), p.quantity * p.entry
    prices = np.linspace(1e-6, 3 * p.entry, 500)
    if level == 0:
        assert p.side > 0 and (p.excess(prices) > 0).all()
        return
    assert abs(p.excess(np.array([level]))[0]) < 5e-7 * notional  # the slack is 2^-22 of the entry
    far = np.abs(prices - level) > 1e-6 * p.entry
    alive = p.side * (prices - level) > 0
    np.testing.assert_array_equal(p.excess(prices[far]) > 0, alive[far])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(positions, st.floats(0.5, 2.0))
def test_the_level_does_not_depend_on_where_the_books_were_opened(drawn, ratio):
    # entry := mark, wallet := equity.
    p = Position(drawn)
    mark = p.entry * ratio
    equity = p.margin + p.side * p.quantity * (mark - p.entry)
    assert p.level(mark, equity) == pytest.approx(p.level(p.entry, p.margin), abs=2e-6 * p.entry)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(positions, st.floats(1e-4, 1.0))
def test_more_margin_moves_the_level_away_by_its_share(drawn, more):
    # By at least A / (q (1 - d m_12)) and at most A / (q (1 - d m_1)): the slope is that of the brackets passed.
    p = Position(drawn)
    added = more * p.margin
    near, far = (p.level(p.entry, m) for m in (p.margin, p.margin + added))
    rates = p.table[:, 3] + p.fee
    slopes = added / (p.quantity * (1 - p.side * rates))
    moved = p.side * (near - far)
    if near == 0 or far == 0:
        assert p.side > 0 and moved >= 0
        return
    assert slopes.min() - 1e-6 * p.entry <= moved <= slopes.max() + 1e-6 * p.entry


def test_the_level_of_a_bracket_edge_is_the_same_from_both_sides():
    # 1 unit at 300 000: margin such that the level is the edge of the first two brackets itself, 300 000 + or - 0.
    for side in (1.0, -1.0):
        p = Position((side, 3e5, np.log10(3e5), 0.1, "BTCUSDT", 0.0))
        below = p.level(2.9e5, 1200 - side * 1e4)  # maintenance at the edge is 1 200 by either line
        above = p.level(3.1e5, 1200 + side * 1e4)
        assert below == pytest.approx(3e5, abs=1e-6 * 3e5) and above == pytest.approx(3e5, abs=1e-6 * 3e5)
