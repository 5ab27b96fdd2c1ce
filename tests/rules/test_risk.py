"""Rule 4, the one place for every limit; and refusals by the constructors of parameters, choices and instruments."""

import ast
import dataclasses
import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HAND, HOLD, expect, hand_market, order, play, verdicts

from perpjax.data.venues import find_instrument
from perpjax.env import PerpEnv
from perpjax.instrument import BRACKETS, EXACT, Instrument
from perpjax.params import RANGES, EnvConfig, EnvParams
from perpjax.rules.orders import CLOSE, LONG, SHORT, SIZES, Order, Verdict
from perpjax.rules.risk import Exposure, Review, review

DEVICE = HAND.on_device()
ACCOUNT = Exposure(lots=0, slots=3, side=0.0, wallet=10_000.0, equity=10_000.0, margin=0.0)
LONG_10X = Order(LONG, 1.0, 10.0, 2.0, 4.0)
_review = jax.jit(review)


def judge(
    order: Order = LONG_10X,
    account: Exposure = ACCOUNT,
    tradable: bool = True,
    price: float = 1000.0,
    mark: float = 1000.0,
    atr: float = 10.0,
    instrument: Instrument = DEVICE,
    params: EnvParams = FREE,
    **changes: float,
) -> Review:
    """`review` with some fields of the order or of the account changed."""
    order = order._replace(**{k: v for k, v in changes.items() if k in Order._fields})
    account = account._replace(**{k: v for k, v in changes.items() if k in Exposure._fields})
    floats = [order, account, price, mark, tradable, atr]
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if isinstance(x, float) else None), floats)
    return _review(*arrays, instrument, params)


def test_an_order_that_passes():
    # available 1000; q = 10 000 / 10 = 1000; M 1000; stop 20, target 40 ticks away.
    for direction, side in ((LONG, 1.0), (SHORT, -1.0)):
        got = judge(direction=direction)
        expected = dict(
            verdict=Verdict.ACCEPTED, side=side, entry=1000.0, quantity=1000.0, leverage=10.0,
            margin=1000.0, notional=10_000.0, fee=0.0, stop=1000 - 20 * side, target=1000 + 40 * side,
            liquidation=909.0 if side > 0 else 1090.0,
        )  # fmt: skip
        chex.assert_trees_all_close(jax.tree.map(float, got._asdict()), jax.tree.map(float, expected), rtol=1e-6)
        assert bool(got.opens) and not bool(got.closes)


# Every reason to refuse, in the order of rule 4: a case for it.
REASONS = {
    Verdict.HOLD: dict(direction=0),
    Verdict.DATA_GAP: dict(tradable=False),
    Verdict.MAX_LOTS: dict(lots=3),
    Verdict.NO_HEDGE: dict(side=-1.0),
    Verdict.MAX_EXPOSURE: dict(margin=1001.0),
    Verdict.MAX_NOTIONAL: dict(equity=1e8, wallet=1e8),
    Verdict.BELOW_MINIMUM: dict(size=0.0),
    Verdict.IMMEDIATE_LIQUIDATION: dict(mark=909.0),
}


@pytest.mark.parametrize("verdict", REASONS, ids=lambda v: v.name)
def test_each_verdict(verdict):
    got = judge(**REASONS[verdict])
    assert int(got.verdict) == verdict and not bool(got.opens) and not bool(got.closes)
    assert float(got.notional) == 0 and float(got.fee) == 0


@pytest.mark.parametrize("first, second", list(itertools.combinations(REASONS, 2)), ids=lambda v: v.name)
def test_the_first_verdict_that_holds_counts(first, second):
    both = {**REASONS[second], **REASONS[first]}
    if {first, second} == {Verdict.MAX_EXPOSURE, Verdict.MAX_NOTIONAL}:
        both["margin"] = 1e8 + 1  # nothing available, however much is held
    if {first, second} == {Verdict.MAX_NOTIONAL, Verdict.BELOW_MINIMUM}:
        both = dict(equity=1e8, wallet=1.0, margin=0.0)  # asks for the moon, can pay for nothing
    assert int(judge(**both).verdict) == first


def test_all_reasons_at_once_fall_one_by_one():
    held = dict(direction=0, tradable=False, lots=3, side=-1.0, margin=2e8, equity=1e8, wallet=1e8)
    cure = [("direction", LONG), ("tradable", True), ("lots", 0), ("side", 0.0), ("margin", 0.0)]
    for (name, value), verdict in zip(cure, Verdict, strict=False):
        assert int(judge(**held).verdict) == verdict
        held[name] = value
    assert int(judge(**held).verdict) == Verdict.MAX_NOTIONAL


def test_close_verdicts():
    full = dict(direction=CLOSE, lots=3, side=1.0, margin=1e9)  # no limit on opening stops a close
    assert bool(judge(**full).closes) and int(judge(**full).verdict) == Verdict.ACCEPTED
    assert not bool(judge(**full).opens)
    got = judge(direction=CLOSE, lots=0)
    assert int(got.verdict) == Verdict.HOLD and not bool(got.closes)
    for lots in (0, 2):  # DATA_GAP comes first
        got = judge(direction=CLOSE, lots=lots, tradable=False)
        assert int(got.verdict) == Verdict.DATA_GAP and not bool(got.closes)
    assert int(judge(direction=0, tradable=False).verdict) == Verdict.HOLD


def test_hedging_is_refused_in_both_directions():
    for direction, side in itertools.product((LONG, SHORT), (1.0, -1.0)):
        expected = Verdict.ACCEPTED if direction * side > 0 else Verdict.NO_HEDGE
        assert int(judge(direction=direction, side=side, lots=1).verdict) == expected


def test_max_exposure_at_the_limit():
    # available = 0.125 * 8000 - margin: 0 at 1000, which refuses; 0.5 more is room for 4.5 of notional only.
    params = FREE.replace(max_exposure=0.125)
    small = dict(equity=8000.0, wallet=8000.0, params=params)
    assert int(judge(margin=1000.0, **small).verdict) == Verdict.MAX_EXPOSURE
    assert int(judge(margin=999.5, **small).verdict) == Verdict.BELOW_MINIMUM
    assert int(judge(margin=990.0, **small).verdict) == Verdict.ACCEPTED
    # wallet <= sum(margin): all unrealised.
    assert int(judge(margin=100.0, wallet=100.0, equity=1e4).verdict) == Verdict.MAX_EXPOSURE
    assert int(judge(margin=100.0, wallet=99.0, equity=1e4).verdict) == Verdict.MAX_EXPOSURE
    assert int(judge(margin=100.0, wallet=110.0, equity=1e4).verdict) == Verdict.ACCEPTED
    # Equity below zero.
    assert int(judge(wallet=100.0, equity=-5.0).verdict) == Verdict.MAX_EXPOSURE


def test_unrealised_profit_is_never_posted_and_the_fee_comes_from_free_money():
    # Exposure 1: available 10 000 of equity, but the wallet holds 1000, of which 400 is margin: 600 are free.
    # Without a fee the margin is 600: q = 600 * 10 / 10 = 600.
    rich = dict(equity=10_400.0, wallet=1000.0, margin=400.0)
    params = FREE.replace(max_exposure=1.0)
    assert float(judge(**rich, params=params).quantity) == 600
    # Fee 1/64: 600 / (1 + 10 / 64) = 518.92 -> q = 518; margin 518 + fee 5180 / 64 = 80.94 fits in 600; 519 does not:
    # 519 + 81.09 = 600.09.
    got = judge(**rich, params=params.replace(taker_fee=1 / 64))
    assert float(got.quantity) == 518
    # With the leverage after its clamp: 4x, 600 / (1 + 4 / 64) = 564.7 * 4 / 10 -> 225.
    got = judge(**rich, params=params.replace(taker_fee=1 / 64, max_leverage=4.0))
    assert float(got.quantity) == 225 and float(got.leverage) == 4
    # Size applies to what is available only: half of 10 000 is still more than 600 free.
    assert float(judge(size=0.5, **rich, params=params).quantity) == 600
    # In a whole account: everything at 1x with a fee of 1/64 leaves wallet >= margin.
    state = play(hand_market(), order(1, leverage=1.0), params=params.replace(taker_fee=1 / 64))[-1]
    # 10 000 / (1 + 1 / 64) = 9846.15 -> q = 984, M = 9840, fee 153.75: wallet 9846.25.
    expect(state, lot_quantity=984, lot_margin=9840, wallet=9846.25)
    assert verdicts(play(hand_market(), order(1, leverage=1.0), order(1), params=params)[-1]) == {
        "ACCEPTED": 1, "MAX_EXPOSURE": 1,
    }  # fmt: skip


def test_available_exposure_counts_profit_at_the_mark_of_the_bar_before():
    # A lot of 250 steps (M = 250) stands at mark +40 after bar 1 (+100): available = 0.1 * 10 100 - 250 = 760,
    # whatever bar 2 itself brings.
    market = hand_market(
        mark={(1, 2): (1000, 1040, 1000, 1040), (2, 0): (1100, 1100, 1100, 1100)},
        last={(1, 2): (1000, 1030, 1000, 1030)},
        atr=100,
    )
    state = play(market, order(1, size=0.25, stop=3.0), order(1, stop=3.0))[-1]
    expect(state, slot=1, lot_quantity=760, lot_margin=760)
    # Funding is paid first: 250 * 1000 * 0.01 * 0.04 = 100 -> available = 0.1 * 10 000 - (250 - 100) = 850.
    market = market.with_columns(candles=market.candles.at[2, -3:-1].set(jnp.array([0.04, 1000.0])))
    state = play(market, order(1, size=0.25, stop=3.0), order(1, stop=3.0))[-1]
    expect(state, slot=1, lot_quantity=850)


def test_leverage_is_clamped_to_the_maximum_and_then_once_to_the_bracket():
    def leverage(wanted: float, equity: float, **changes: float) -> float:
        return float(judge(leverage=wanted, equity=equity, wallet=equity, **changes).leverage)

    params = FREE.replace(max_leverage=100.0)
    # Brackets (0, 1e5] 50x, (1e5, 1e6] 10x, (1e6, 5e6] 2x; available = 0.1 * equity.
    assert leverage(0.0, 1e4) == 1 and leverage(-3.0, 1e4) == 1
    assert leverage(99.0, 1e4) == 10  # max_leverage of FREE
    assert leverage(99.0, 1e4, params=params) == 50  # 1000 * 99 = 99 000
    # 1000 * 100 = 100 000 belongs to (0, 1e5]; more does not.
    assert leverage(100.0, 1e4, params=params) == 50
    assert leverage(100.0, 1.001e4, params=params) == 10
    # Once: 5000 * 40 = 200 000 -> 10x, although 5000 * 10 = 50 000 would lie in the first bracket again.
    assert leverage(40.0, 5e4, params=params) == 10
    assert leverage(5.0, 5e5, params=params) == 5  # 250 000, and 5 < 10 stays
    # 200 000 * 10 = 2e6 -> 2x, and the size is part of the notional: 0.25 of it is 5e5 -> 10x.
    assert leverage(10.0, 2e6, params=params) == 2
    assert leverage(10.0, 2e6, params=params, size=0.25) == 10
    # The notional is that of the first clamp: 1000 * 100 wanted, but max_leverage 20 makes it 20 000.
    assert leverage(1000.0, 1e4, params=FREE.replace(max_leverage=20.0)) == 20


def test_max_notional_at_the_last_cap():
    # 0.1 * 5e6 * 10 = 5e6, the last cap, is allowed (at 2x); one tick of equity more is not.
    at = judge(equity=5e6, wallet=5e6)
    assert int(at.verdict) == Verdict.ACCEPTED and float(at.leverage) == 2
    assert int(judge(equity=5.00001e6, wallet=5.00001e6).verdict) == Verdict.MAX_NOTIONAL
    assert int(judge(equity=5.1e6, wallet=5.1e6, leverage=9.0).verdict) == Verdict.ACCEPTED


def test_multiples_are_clamped():
    def distances(stop: float, target: float) -> tuple[float, float]:
        got = judge(stop_multiple=stop, target_multiple=target, atr=100.0)
        return 1000 - float(got.stop), float(got.target) - 1000

    assert distances(0.1, 0.1) == (50, 50)
    assert distances(9.0, 9.0) == (300, 600)
    assert distances(-1.0, 1.0) == (50, 100)
    assert distances(2.0, 1.0) == (200, 200)  # the target multiple is at least the stop multiple
    assert distances(3.0, 6.0) == (300, 600)
    # 0.5 * 9 = 4.5 -> 4 and 1.5 * 9 = 13.5 -> 14: half to even, each by itself.
    got = judge(stop_multiple=0.5, target_multiple=1.5, atr=9.0)
    assert (float(got.stop), float(got.target)) == (996, 1014)


def test_distances_are_beyond_the_slippage():
    # slip(1000) = ceil(15.625 + 5) = 21: stop and target are at least 22 away from E = 1021 (979).
    params = FREE.replace(slippage_base=1 / 64, slippage_atr=0.5)
    for direction, side in ((LONG, 1), (SHORT, -1)):
        got = judge(direction=direction, stop_multiple=0.5, target_multiple=0.5, params=params)
        assert (float(got.entry), float(got.stop), float(got.target)) == (
            1000 + 21 * side,
            1000 - side,
            1000 + 43 * side,
        )


def test_below_minimum():
    # min_notional 5 = half a step of 10: one step of 10 passes. min_notional 10.01: it does not. Two steps do.
    one = dict(size=0.0015)  # 1.5 of margin: q = floor(1.5) = 1
    assert float(judge(**one).quantity) == 1 and int(judge(**one).verdict) == Verdict.ACCEPTED
    assert int(judge(size=0.0005).verdict) == Verdict.BELOW_MINIMUM  # q = 0
    for least, verdict in ((10.0, Verdict.ACCEPTED), (10.01, Verdict.BELOW_MINIMUM)):
        strict = Instrument("S", 1.0, 0.01, least, 1e5, brackets=HAND.brackets)
        assert int(judge(**one, instrument=strict.on_device()).verdict) == verdict
    # Without a smallest notional there is still a smallest quantity.
    loose = Instrument("L", 1.0, 0.01, 0.0, 1e5, brackets=HAND.brackets).on_device()
    assert int(judge(size=0.0005, instrument=loose).verdict) == Verdict.BELOW_MINIMUM
    # Free money of 1 is enough for it.
    assert int(judge(margin=100.0, wallet=101.0, equity=1e4).verdict) == Verdict.ACCEPTED


def test_quantity_is_capped_after_sizing_and_the_margin_follows():
    small = Instrument("S", 1.0, 0.01, 5.0, max_quantity=0.07, brackets=HAND.brackets)
    got = judge(instrument=small.on_device())
    # 7 steps of 10: notional 70, M = 7, and a fee of 0.1 % is 0.07.
    chex.assert_trees_all_close((got.quantity, got.notional, got.margin), jax.tree.map(jnp.float32, (7.0, 70.0, 7.0)))
    dear = judge(instrument=small.on_device(), params=FREE.replace(taker_fee=0.001))
    chex.assert_trees_all_close(dear.fee, jnp.float32(0.07), rtol=1e-6)


def test_verdicts_in_the_ledger():
    # Open, MAX_LOTS after three, NO_HEDGE, DATA_GAP, HOLD: each order is counted under what became of it.
    market = hand_market(invalid=[(5, 0)], atr=100)
    small = order(1, size=0.25)
    state = play(market, small, small, small, small, small, HOLD)[-1]
    assert verdicts(state) == {"ACCEPTED": 3, "MAX_LOTS": 1, "DATA_GAP": 1, "HOLD": 1}
    # That a later candle of the bar is invalid blocks nothing.
    market = hand_market(invalid=[(1, 1), (1, 2)], atr=100)
    assert verdicts(play(market, small)[-1]) == {"ACCEPTED": 1}
    assert verdicts(play(market, small, order(-1))[-1]) == {"ACCEPTED": 1, "NO_HEDGE": 1}
    # A refused order costs nothing.
    states = play(hand_market(invalid=[(1, 0)]), small)
    chex.assert_trees_all_equal(states[0].account.lots, states[1].account.lots)
    expect(states[1], wallet=10_000, fees=0, traded_notional=0)


def test_one_place_for_every_limit():
    """Nothing outside perpjax/risk.py compares with, or clamps to, a limit."""
    limits = {"max_leverage", "max_exposure", "max_lots", "slots", "max_hold", "min_notional", "max_steps",
              "ruin_fraction", "max_quantity", "brackets"}  # fmt: skip
    clamps = {"minimum", "maximum", "clip", "clamp", "min", "max", "where", "less", "less_equal", "greater",
              "greater_equal"}  # fmt: skip
    # What is allowed, and why: (file, limit).
    allowed = {
        ("perpjax/instrument.py", "max_quantity"),  # the constructor checks the instrument itself
        ("perpjax/data/markets.py", "brackets"),  # shapes of the tables of two markets
        ("perpjax/rules/observation.py", "max_hold"),  # time left is not a decision: it is floored at 0 for the eye
        ("perpjax/audit/fuzz.py", "max_leverage"),  # checks from outside that limits were kept
        ("perpjax/audit/fuzz.py", "ruin_fraction"),
        ("train/ladder/rungs.py", "ruin_fraction"),  # counts the windows that ended so
        ("train/ladder/references.py", "max_hold"),  # only for episodes whose lots live one bar
        ("train/evaluate/baselines.py", "max_exposure"),  # sizes an order so that the limits allow it
        ("train/evaluate/baselines.py", "max_leverage"),
        ("train/evaluate/baselines.py", "min_notional"),  # of buy and hold, which lives outside the environment
        ("train/policies/heads.py", "max_leverage"),  # the codec's scale of leverage
    }
    root = pathlib.Path(__file__).resolve().parents[2]
    files = [f for d in ("perpjax", "train") for f in sorted((root / d).rglob("*.py"))]
    assert len(files) > 15
    found, judged = set(), set()
    for file in files:
        name = file.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            clamp = getattr(called, "attr", getattr(called, "id", "")) in clamps
            if not (isinstance(node, ast.Compare) or clamp):
                continue
            inside = {getattr(x, "attr", None) for x in ast.walk(node)} & limits
            (judged if name == "perpjax/rules/risk.py" else found).update((name, x) for x in inside)
    twin = {(f, x) for f, x in found if f.startswith("perpjax/reference/")}  # shares no code with the simulator
    assert found - allowed - twin == set()
    assert {x for _, x in judged} >= {"max_leverage", "slots", "max_hold", "min_notional", "max_steps", "ruin_fraction"}


def test_params_are_strong_arrays():
    params = EnvParams(taker_fee=0, max_hold=np.int64(5), max_leverage=3)
    for field in dataclasses.fields(EnvParams):
        value = getattr(params, field.name)
        assert value.dtype == (jnp.int32 if field.name == "max_hold" else jnp.float32)
        assert not value.weak_type
    chex.assert_trees_all_equal_shapes_and_dtypes(params, EnvParams())
    assert EnvParams(taker_fee=np.array([0.0, 1e-3])).taker_fee.shape == (2,)


@pytest.mark.parametrize("name, value", [
    ("initial_equity", 0.0), ("initial_equity", -1.0), ("taker_fee", -1e-9), ("taker_fee", 0.2), ("slippage_base", 0.6),
    ("slippage_atr", -0.1), ("stop_depth", 1.1), ("max_exposure", 1.01), ("max_leverage", 0.5), ("max_hold", 0),
    ("max_hold", 1.5), ("ruin_fraction", 1.0), ("entry_penalty", -1.0), ("risk_penalty", np.inf),
    ("liquidation_penalty", np.nan), ("ruin_penalty", -0.1), ("taker_fee", np.array([0.0, np.nan])),
])  # fmt: skip
def test_params_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"EnvParams.{name} = .* is not"):
        EnvParams(**{name: value})
    with pytest.raises(ValueError, match=name):
        EnvParams().replace(**{name: value})


@pytest.mark.parametrize("end", [1, 2], ids=["lowest", "highest"])
@pytest.mark.parametrize("name", RANGES)
def test_a_bound_survives_the_way_to_the_device_and_back(name, end):
    """The float32 of a bound may lie beyond its float64, as that of 0.1 does."""
    dtype, bound = RANGES[name][0], RANGES[name][end]
    params = EnvParams(**{name: bound})
    held = getattr(params, name)
    for value in (held, np.asarray(held), held.item(), np.full(3, held), jnp.full(3, held), [bound, held.item()]):
        again = EnvParams(**{name: value})
        assert getattr(again, name).dtype == dtype and (getattr(again, name) == held).all()
        again.replace(max_exposure=0.5)
        jax.tree.map(lambda x: x, again).replace(risk_penalty=0.5)
        jax.tree.map(np.asarray, again).replace(risk_penalty=0.5)
        EnvParams(**{f.name: np.asarray(getattr(again, f.name)) for f in dataclasses.fields(again)})
    away = (-1, 1)[end - 1]
    beyond = int(bound) + away if dtype == jnp.int32 else np.nextafter(np.float32(bound), np.float32(away * np.inf))
    for value in (beyond, float(beyond), np.array([held, beyond])):
        with pytest.raises(ValueError, match=rf"EnvParams.{name} = [^ ]+ is not .*\[.*\]") as caught:
            EnvParams(**{name: value})
        told = float(str(caught.value).split()[2])
        assert told == pytest.approx(float(beyond), rel=1e-9) and not RANGES[name][1] <= told <= RANGES[name][2]


@pytest.mark.parametrize("value", [10**19, -(10**400), 10**400, 2**30 + 1, 2**31, 1e300, np.inf])
def test_a_number_too_large_for_its_field_is_refused(value):
    for name in ("max_hold", "taker_fee"):
        with pytest.raises(ValueError, match=f"EnvParams.{name} = .* is not"):
            EnvParams(**{name: value})


@pytest.mark.parametrize("name, value", [
    ("actions", "box"), ("intrabar", "worst"), ("reward", "sharpe"), ("opposite", "hedge"), ("max_lots", 0),
    ("max_lots", 2.0), ("max_lots", True), ("episode_length", 0), ("episode_length", "7"),
    ("max_lots", 1025), ("max_lots", 10**19), ("episode_length", 2**30 + 1), ("episode_length", 2**31),
    ("episode_length", 10**19),
])  # fmt: skip
def test_config_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"EnvConfig.{name} = "):
        EnvConfig(**{name: value})


def test_the_longest_episode_is_too_long_for_a_market_and_no_overflow():
    config = EnvConfig(max_lots=1024, episode_length=2**30)
    with pytest.raises(ValueError, match=f"too short for an episode of {2**30} bars"):
        PerpEnv(hand_market(), config=config)


def test_unflattening_neither_validates_nor_casts():
    for tree in (EnvParams(), HAND, hand_market()):
        leaves, structure = jax.tree.flatten(tree)
        placeholders = structure.unflatten([object() for _ in leaves])
        assert jax.tree.structure(placeholders) == structure
        jax.tree.map(lambda *_: None, tree, tree)
    axes = jax.tree.map(lambda _: None, EnvParams(), is_leaf=lambda _: False)
    assert axes.taker_fee is None
    assert jax.eval_shape(lambda p: p.replace(taker_fee=p.taker_fee * 2), EnvParams()).taker_fee.dtype == jnp.float32


BTC = np.array(BRACKETS["BTCUSDT"])


@pytest.mark.parametrize("row, column, value, why", [
    (0, 0, 1.0, "floor"), (3, 0, 2e6, "floor"), (4, 1, 12e6, "floor|cap"), (5, 2, 30, "leverage"),
    (11, 2, 0.5, "leverage"), (3, 3, 0.0065, "rate"), (11, 3, 1.0, "rate"), (0, 4, 1.0, "amount"),
    (6, 4, 2_982_100, "amount"), (2, 4, np.nan, "finite"),
])  # fmt: skip
def test_bracket_tables_that_are_refused(row, column, value, why):
    table = BTC.copy()
    table[row, column] = value
    with pytest.raises(ValueError, match=f"(?s)BTCUSDT.*({why})"):
        Instrument(brackets=table)


def test_bracket_tables_of_a_wrong_shape_and_a_fee_that_fills_them():
    for table in (np.zeros((0, 5)), BTC[:, :4], BTC[0]):
        with pytest.raises(ValueError, match="brackets"):
            Instrument(brackets=table)
    steep = [(0, 1e6, 1, 0.95, 0)]
    Instrument(brackets=steep)
    with pytest.raises(ValueError, match="reach 1"):
        Instrument(brackets=steep, maintenance_fee_rate=0.06)


def test_a_list_with_an_integer_beyond_float64_is_refused():
    with pytest.raises(ValueError, match="taker_fee"):
        EnvParams(taker_fee=[0.01, 10**400])


def test_a_quotient_that_is_a_whole_number_of_steps_is_that_many():
    # 0.1 * 500 * 3 / (300 * 0.0005) = 1000 exactly; in float32 this and hundreds like it come out just below.
    instrument = Instrument("HALF", 0.5, 0.001, 0.01, 1e4).on_device()
    equity, exposure, price, leverage, size = np.array(
        list(itertools.product((500, 3000, 20_000), (0.1, 0.2, 0.3), (300, 600, 700, 750), (1, 2, 3, 5, 10), SIZES))
    ).T
    exact = size * exposure * equity * leverage / (price * 0.0005)
    whole = np.abs(exact - np.round(exact)) < 1e-9 * exact
    steps = np.float32(exposure) * np.float32(equity) * np.float32(size) * np.float32(leverage)
    steps /= np.float32(price) * np.float32(instrument.tick_value)
    assert (np.floor(steps) < np.round(exact))[whole].sum() > 50

    def quantity(equity, exposure, price, leverage, size):
        zero = jnp.float32(0)
        account = Exposure(jnp.int32(0), 3, zero, equity, equity, zero)
        order = Order(jnp.int32(LONG), size, leverage, jnp.float32(2), jnp.float32(4))
        params = FREE.replace(max_exposure=exposure)
        return review(order, account, price, price, jnp.bool_(True), jnp.float32(10), instrument, params)

    floats = (jnp.asarray(x, jnp.float32) for x in (equity, exposure, price, leverage, size))
    got = jax.jit(jax.vmap(quantity))(*floats)
    np.testing.assert_array_equal(got.quantity[whole], np.round(exact)[whole])
    # Others are rounded down, unless they lie within the slack below a whole number.
    slack = np.minimum(exact * 2.0**-22, 0.5)
    assert (np.asarray(got.quantity) <= exact + 2 * slack).all() and (np.asarray(got.quantity) > exact - 1).all()
    # The margin exceeds what was asked for by the slack and no more.
    asked = size * exposure * equity
    assert (np.asarray(got.margin) <= asked * (1 + 2.0**-22 + 2.0**-22)).all()


@pytest.mark.parametrize("steps", [2**22 + 1, 2**23 - 1, 2**23 + 1, 12_345_677, EXACT])
def test_the_slack_never_adds_a_step_to_a_whole_number(steps):
    # From 2^23 on float32 has no halves: a whole number and one half would be rounded to the next even one.
    instrument = Instrument("ONE", 1.0, 1.0, 5.0, EXACT, 0.0, ((0, 1e12, 50, 0.01, 0),)).on_device()
    wealth = float(steps * 64)
    params = FREE.replace(max_exposure=1.0)
    got = judge(leverage=1.0, price=64.0, mark=64.0, equity=wealth, wallet=wealth, instrument=instrument, params=params)
    assert int(got.quantity) == steps and float(got.margin) == wealth


def test_maintenance_at_the_maximum_leverage_is_below_the_margin():
    # Rate times leverage is the share of a lot's margin that maintenance takes when the lot opens.
    Instrument(brackets=[(0, 1e9, 10, 0.0999, 0)])
    for rate in (0.1, 0.25):
        with pytest.raises(ValueError, match=r"bracket row 0 .* at its max leverage .* takes all of the margin"):
            Instrument(brackets=[(0, 1e9, 10, rate, 0)])
    # 1 in decimals, a little less in float64.
    for leverage, rate, fee in ((5, 0.1999, 0.0001), (10, 0.0997, 0.0003), (80, 0.0124, 0.0001)):
        with pytest.raises(ValueError, match="takes all of the margin"):
            Instrument(brackets=[(0, 1e9, leverage, rate, 0)], maintenance_fee_rate=fee)
    # With the fee in it: 150 x (0.004 + 0.05) = 8.1. Row 3 of these is the first to reach 1: 20 x (0.025 + 0.025).
    with pytest.raises(ValueError, match=r"bracket row 0 .* with a fee of 0\.05"):
        Instrument(maintenance_fee_rate=0.05)
    table = [(0, 1e5, 20, 0.01, 0), (1e5, 2e5, 20, 0.025, 1500)]
    Instrument(brackets=table, maintenance_fee_rate=0.0249)
    with pytest.raises(ValueError, match="bracket row 1 "):
        Instrument(brackets=table, maintenance_fee_rate=0.025)


def test_fees_of_maintenance_are_fractions():
    for fee in (-0.1, 0.1, np.nan):
        with pytest.raises(ValueError, match="maintenance_fee_rate"):
            Instrument(maintenance_fee_rate=fee)


def test_published_brackets_are_continuous():
    # cum_n = cum_(n-1) + floor_n (rate_n - rate_(n-1)); pairs of notional and maintenance by Binance's tables.
    for symbol in BRACKETS:
        Instrument(symbol, brackets=BRACKETS[symbol])
    for notional, expected in ((50e3, 200), (300e3, 1200), (300_001, 1200.005), (1e6, 5e3), (5e6, 38e3), (2e7, 268e3),
                               (1.5e8, 4_518_000)):  # fmt: skip
        assert np.max(BTC[:, 3] * notional - BTC[:, 4]) == pytest.approx(expected, rel=1e-9)


def test_instrument_numbers():
    btc = Instrument()
    assert btc.tick_value == pytest.approx(1e-4) and btc.max_steps == 120_000 and btc.min_notional == 50
    assert Instrument(max_quantity=1e9).max_steps == EXACT == 2**24 - 1
    for name in ("tick_size", "step_size", "max_quantity", "min_notional"):
        for value in (-0.5, -2.0, np.inf, np.nan) if name == "min_notional" else (0.0, -1.0, np.inf, np.nan):
            with pytest.raises(ValueError, match=name):
                Instrument(**{name: value})
    with pytest.raises(ValueError, match="less than one step"):
        Instrument(max_quantity=0.0001)
    for leaf in jax.tree.leaves(btc.on_device()):
        assert leaf.dtype == jnp.float32 and not leaf.weak_type


def test_unknown_symbols_get_a_step_of_about_one_unit_of_quote():
    # 10^-round(log10(2.3)) = 10^-0 = 1; of 0.0123: 10^2; of 60 000: 10^-5.
    for price, step in ((2.3, 1.0), (0.0123, 100.0), (60_000.0, 1e-5)):
        instrument, said = find_instrument("ABCUSDT", 0.001, price)
        assert instrument.step_size == pytest.approx(step) and "ABCUSDT: not a known contract" in said
        np.testing.assert_array_equal(instrument.brackets, BTC)
        assert instrument.max_steps == EXACT
    known, said = find_instrument("BTCUSDT", 0.01, 1.0)
    assert known.tick_size == 0.01 and known.step_size == 0.001 and "known contract" in said
