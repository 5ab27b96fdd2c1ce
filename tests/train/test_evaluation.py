"""The evaluation: its figures are those of its lots, its stresses those of the environments that they name."""

import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from markets import crash_market, hand_market, order

import perpjax
from perpjax import EnvConfig, EnvParams, PerpEnv, concatenate_markets
from perpjax.reference import Twin
from perpjax.rules.orders import hold_action
from train.evaluate.account import find_segments, play_account
from train.evaluate.bootstrap import block_days, compound, deepest_falls, find_interval, resample_days, sharpe_ratios
from train.evaluate.diagnosis import RULES, diagnose, write_verdict
from train.evaluate.evaluation import evaluate, hash_record
from train.evaluate.measures import DAY_MS, Curve, combine_curves, utc_days
from train.evaluate.stresses import BARS_BETWEEN, COSTS, cost_arithmetic, play_stresses

pytestmark = pytest.mark.usefixtures("quick_compilation")
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "evaluation.md"


def trader(config, every=7):
    """A rule of the clock and the account: an order every few bars, a long above the opening price, else a short."""

    def act(key, state, carry):
        count = carry + 1
        side = jnp.where(state.obs[0] > 0, 1, 2)
        enter = jnp.array([0, 3, 2, 2, 2], jnp.int32).at[0].set(side)
        return jnp.where(count % every == 0, enter, hold_action(config)), count

    return Memory(act)


@dataclasses.dataclass(frozen=True)
class Memory:
    """A policy that counts its calls."""

    act: object

    def __call__(self, key, state, carry):
        return self.act(key, state, carry)

    def initial_carry(self):
        return jnp.int32(0)


@pytest.fixture(scope="module")
def env():
    config = EnvConfig(max_lots=2, episode_length=96)
    return PerpEnv(crash_market(bars=3000), EnvParams(max_exposure=0.1), config)


@pytest.fixture(scope="module")
def found(env):
    return evaluate(env, trader(env.config), name="clock", traded={env.market.symbols[0]: (np.zeros(0), np.zeros(0))})


def test_the_record_is_json_and_its_parts_agree(found):
    record = json.loads(json.dumps(found.record, allow_nan=False))
    waterfall = dict(record["waterfall"])
    assert sum(x for name, x in waterfall.items() if name != "net") == pytest.approx(waterfall["net"], abs=1e-6)
    assert record["lots"]["lots"] == found.trades.num_rows > 100
    (account,) = record["accounts"]
    assert account["bars"] + 1 == found.equity.num_rows == record["twin"]["bars"] + 1
    assert record["overall"]["return"] == pytest.approx(account["return"])
    assert np.prod(1 + np.array(record["daily"]["returns"])) - 1 == pytest.approx(record["overall"]["return"])
    assert np.prod([1 + m["return"] for m in record["months"]]) - 1 == pytest.approx(record["overall"]["return"])
    assert np.prod([1 + m["market"] for m in record["months"]]) - 1 == pytest.approx(record["market_return"], rel=1e-4)
    assert record["twin"]["agrees"] and record["twin"]["largest_difference"] < 1e-6
    flat = next(x for x in record["baselines"] if x["name"] == "flat")
    assert flat["difference"] == pytest.approx(record["overall"]["return"])
    assert flat["interval"] == pytest.approx(record["overall"]["intervals"]["return"])
    assert len(record["shifted"]["returns"]) == 32 and len(record["daily"]["dates"]) == len(record["daily"]["returns"])
    assert found.candles.num_rows == account["bars"] * record["data"]["candles_per_bar"]
    low, high = record["overall"]["intervals"]["return"]
    assert low < record["overall"]["return"] < high
    shares = np.array([[x[name] for name in ("long", "short", "flat")] for x in record["actions"]])
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert record["arithmetic"]["1"] == pytest.approx(record["waterfall"]["net"])
    for name in ("stopped", "target"):
        assert record["lots"]["exits"][name] > 10
    assert len(record["verdict"]) == 3 and record["verdict"][0] in repr(found)


def test_every_field_is_described(found):
    text = DOCS.read_text()
    described = set(re.findall(r"`([a-z_0-9]+)`", text))
    names = set(found.record) | {x for part in found.record.values() if isinstance(part, dict) for x in part}
    names |= {x for part in found.record.values() if isinstance(part, list) and part and isinstance(part[0], dict)
              for x in part[0]}  # fmt: skip
    free = {*found.record["params"], *found.record["config"], *found.record["verdicts"], *found.record["arithmetic"]}
    assert names - free <= described
    for table in (found.trades, found.equity, found.candles):
        assert set(table.column_names) <= described


def test_twice_is_the_same(env, found):
    traded = {env.market.symbols[0]: (np.zeros(0), np.zeros(0))}
    again = perpjax.evaluate(env, trader(env.config), name="clock", traded=traded)
    assert again.record["sha256"] == found.record["sha256"] and again.trades.equals(found.trades)
    changed = found.record | {"trials": {"look": 3}}
    assert hash_record(changed) == found.record["sha256"]
    assert hash_record(changed | {"waterfall": {}}) != found.record["sha256"]


def test_an_altered_fill_is_told(env, monkeypatch):
    real = Twin._exit

    def altered(self, how, slot, lot, candle, trigger, fill):
        return real(self, how, slot, lot, candle, trigger, fill + (how == "stopped"))

    monkeypatch.setattr(Twin, "_exit", altered)
    twin = evaluate(env, trader(env.config), quick=True).record["twin"]
    assert not twin["agrees"] and re.search(r"bar \d+: ", twin["disagreements"][0])


def test_a_small_drift_of_the_equity_is_told(env, monkeypatch):
    """Below the bounds of every single posting, and above those of the whole."""
    from train.evaluate import evaluation

    real = evaluation.find_lots

    def drifting(played):
        lots, agreements = real(played)
        return lots, [x._replace(largest_difference=2e-5) for x in agreements]

    monkeypatch.setattr(evaluation, "find_lots", drifting)
    assert not evaluate(env, trader(env.config), quick=True).record["twin"]["agrees"]


# The stresses.


@pytest.fixture(scope="module")
def stressed(env):
    found, shifted = play_stresses(env, trader(env.config), jax.random.key(0))
    return {x.name: x for x in found}, shifted


@pytest.mark.parametrize("factor", [0, 2, 4])
def test_costs_are_those_of_another_environment(env, stressed, factor):
    params = env.params.replace(**{name: getattr(env.params, name) * factor for name in COSTS})
    (own,) = play_account(dataclasses.replace(env, params=params), trader(env.config), jax.random.key(0))
    stress = stressed[0][f"costs x {factor}"]
    np.testing.assert_allclose(stress.equity[0], own.states.equity, rtol=1e-6)
    assert stress.opened == int(own.states.account.ledger.opened[-1]) > 0


@pytest.mark.parametrize("rule", ["pessimistic", "optimistic"])
def test_rules_are_those_of_another_environment(env, stressed, rule):
    config = dataclasses.replace(env.config, intrabar=rule)
    (own,) = play_account(dataclasses.replace(env, config=config), trader(config), jax.random.key(0))
    np.testing.assert_allclose(stressed[0][rule].equity[0], own.states.equity, rtol=1e-6)
    assert "nearest" not in stressed[0]


def test_one_bar_later_is_a_delayed_policy(env, stressed):
    inner = trader(env.config)

    class Later(Memory):
        def initial_carry(self):
            return jnp.int32(0), hold_action(env.config)

    def act(key, state, carry):
        action, count = inner(key, state, carry[0])
        return carry[1], (count, action)

    (own,) = play_account(env, Later(act), jax.random.key(0))
    np.testing.assert_allclose(stressed[0]["one bar later"].equity[0], own.states.equity, rtol=1e-6)
    assert not np.allclose(stressed[0]["one bar later"].equity[0], stressed[0]["one bar later"].plain[0])


def test_shifted_starts_cover_the_same_bars(env, stressed):
    _, shifted = stressed
    (segment,) = find_segments(env)
    for i in (0, 5, 31):
        start = segment.first + i * BARS_BETWEEN
        short = dataclasses.replace(env, market=env.market.replace(segments=env.market.segments._replace(
            first=jnp.asarray([start], jnp.int32))))  # fmt: skip
        (own,) = play_account(short, trader(env.config), jax.random.key(0))
        equity = own.states.equity.astype(float)
        assert shifted.returns[i] == pytest.approx(equity[-1] / equity[(31 - i) * BARS_BETWEEN] - 1, abs=1e-6)
    assert np.ptp(shifted.returns) > 0


def test_cost_arithmetic_by_hand():
    lots = pa.table({"net": [10.0, -4.0], "fees": [1.0, 1.0], "slippage": [0.5, 0.5]})
    assert cost_arithmetic(lots) == {"0": 9.0, "1": 6.0, "2": 3.0, "4": -3.0}


# Several accounts.


def test_curves_of_several_accounts_by_hand():
    a = Curve("A", np.array([0, 10, 20]), np.array([100.0, 110, 121]))
    b = Curve("B", np.array([10, 20, 30]), np.array([50.0, 25, 75]))
    again = Curve("A", np.array([40, 50]), np.array([100.0, 90]))
    times, curve = combine_curves([a, b, again])
    assert times.tolist() == [0, 10, 20, 30, 40, 50]
    of_a, of_b = [1, 1.1, 1.21, 1.21, 1.21, 1.089], [1, 1, 0.5, 1.5, 1.5, 1.5]
    np.testing.assert_allclose(curve, (np.array(of_a) + of_b) / 2)
    assert combine_curves([b])[1].tolist() == [1, 0.5, 1.5]
    assert utc_days(np.array([0, DAY_MS, DAY_MS + 1, 3 * DAY_MS])) == ["1970-01-01", "1970-01-02", "1970-01-03"]


def test_two_symbols_have_an_account_each():
    markets = [crash_market(bars=bars) for bars in (1000, 1400)]
    other = markets[1].replace(origins=(markets[1].origins[0]._replace(symbol="OTHER"),))
    env = PerpEnv(concatenate_markets([markets[0], other]), config=EnvConfig(max_lots=2, episode_length=96))
    record = evaluate(env, trader(env.config)).record
    assert [a["symbol"] for a in record["accounts"]] == [markets[0].symbols[0], "OTHER"]
    assert record["accounts"][0]["bars"] < record["accounts"][1]["bars"]
    assert record["twin"]["bars"] == sum(a["bars"] for a in record["accounts"])


# The bootstrap.


def test_resampled_days_are_blocks():
    days = resample_days(100, draws=400)
    assert days.shape == (400, 100) and days.min() == 0 and days.max() == 99
    follows = np.mean((days[:, 1:] - days[:, :-1]) % 100 == 1)
    assert follows == pytest.approx(1 - 1 / block_days(100) + 0.01 / block_days(100), abs=0.01)
    counts = np.bincount(days.ravel(), minlength=100)
    assert counts.min() > 0.7 * 400 and counts.max() < 1.3 * 400
    assert np.array_equal(days, resample_days(100, draws=400))


def test_intervals_cover_the_truth():
    rng, hits, trials = np.random.default_rng(0), 0, 120
    for trial in range(trials):
        returns = rng.normal(0.001, 0.01, 120)
        low, high = find_interval(lambda x: x.mean(axis=1), returns, seed=trial)
        hits += low < 0.001 < high
    assert 0.8 < hits / trials < 0.97  # 90 %, of samples of 120 days
    assert find_interval(compound, np.zeros(9)) is None


def test_statistics_of_rows_by_hand():
    rows = np.array([[0.1, -0.5, 0.2], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(compound(rows), [1.1 * 0.5 * 1.2 - 1, 0])
    np.testing.assert_allclose(deepest_falls(rows), [0.5, 0])
    assert sharpe_ratios(rows)[0] == pytest.approx(rows[0].mean() / rows[0].std(ddof=1) * math.sqrt(365))
    assert math.isnan(sharpe_ratios(rows)[1])


# The diagnosis.

NOTHING = {
    "accounts": [{"name": "A", "ended": "the segment's end", "days": 60.0}],
    "data": {"split": "val", "dataset": "d", "settlements": 90}, "stresses": [], "market_return": 0.1,
    "overall": {"return": 0.2, "days": 60.0, "max_drawdown": 0.1, "intervals": {"return": [-0.1, 0.3]}},
    "months": [{"month": "2025-01", "return": 0.1}, {"month": "2025-02", "return": 0.1},
               {"month": "2025-03", "return": 0.0}],
    "lots": {"lots": 40, "lots_a_week": 7.0, "mean_bars": 10.0, "long": 20, "exits": {"stopped": 40},
             "best_three_net": 300.0, "open_net": 0.0},
    "waterfall": {"gross": 3000.0, "slippage": -500.0, "fees": -500.0, "funding": 0.0, "net": 2000.0},
    "round_trip": {"gross": 30.0, "cost": 10.0, "funding": 0.0, "liquidation": 0.0, "typical_cost": 12.0},
    "verdicts": {"HOLD": 900, "ACCEPTED": 40},
    "volume": {"median_share": 1e-4, "largest_share": 1e-3}, "random": {"place": 0.9, "lots_per_spell": 1.1},
    "actions": [{"feature": "rsi", "outside": 0.0}],
}  # fmt: skip
NO_LOTS = {"lots": {"lots": 0}, "waterfall": {"gross": 0.0, "slippage": 0.0, "fees": 0.0, "funding": 0.0, "net": 0.0}}


def change(**parts):
    return {name: (x | parts[name] if isinstance(x, dict) else parts[name]) if name in parts else x
            for name, x in NOTHING.items()}  # fmt: skip


CASES = [
    ("never_trades", change(**NO_LOTS, round_trip={"explored_gross": 4.0, "explored_lots": 900, "typical_cost": 23.0}),
     "costs about 23 bp here, and the entries that it draws when it explores earn 4.0 bp before costs"),
    ("never_trades", change(**NO_LOTS, verdicts={"HOLD": 1, "ACCEPTED": 0, "BELOW_MINIMUM": 70}),
     "its 70 orders were all refused, 70 of them as BELOW_MINIMUM"),
    ("never_trades", change(**NO_LOTS, verdicts={"HOLD": 9000, "ACCEPTED": 0, "DATA_GAP": 6}),
     "its 6 orders were all refused, 6 of them as DATA_GAP (the first candle of the bar is missing). A round trip"),
    ("never_trades", change(**NO_LOTS), "A round trip costs about 12 bp here."),
    ("costs_exceed_edge", change(waterfall={"net": -5.0}, round_trip={"gross": 4.0, "cost": 23.0}),
     "A round trip costs 23.0 bp here, and its entries earn 4.0 bp before costs."),
    ("has_no_edge", change(waterfall={"net": -5.0}, round_trip={"gross": -3.0, "cost": 23.0}),
     "Its entries lose 3.0 bp a round trip before costs"),
    ("funding_takes_the_profit",
     change(waterfall={"net": -5.0}, round_trip={"gross": 30.0, "cost": 23.0, "funding": 9.0}),
     "earn 30.0 bp a round trip before costs of 23.0 bp, but funding takes 9.0 bp."),
    ("trades_too_much", change(lots={"lots_a_week": 90.0}, waterfall={"slippage": -2000.0}),
     "12.9 lots a day of 10.0 bars each, and fees and slippage take 83 % of the gross profit"),
    ("lives_on_few_lots", change(lots={"best_three_net": 2100.0}), "without the best three of 40 the profit of 2,000"),
    ("trades_one_side", change(lots={"long": 40}), "It only goes long, with a market that moved +10.0 %"),
    ("trades_one_side", change(lots={"long": 0}), "It only goes short, against a market"),
    ("lives_on_one_month", change(months=[{"month": "2025-01", "return": 0.3}, {"month": "2025-02", "return": -0.1},
                                          {"month": "2025-03", "return": 0.0}]), "2025-01 made +30.0 %"),
    ("ends_with_open_lots", change(lots={"exits": {"open": 2}, "open_net": 900.0}), "2 of its lots are still open"),
    ("earns_by_funding", change(waterfall={"funding": 1500.0}), "+1,500 of a profit of +2,000"),
    ("depends_on_speed", change(stresses=[{"name": "one bar later", "return": 0.05, "difference": -0.15,
                                           "interval": [-0.3, -0.02]}]), "later it makes +5.0 % instead of +20.0 %"),
    ("depends_on_speed", change(stresses=[{"name": "one bar later", "return": 0.3, "difference": 0.1,
                                           "interval": [0.02, 0.3]}]), "the timing of its entries costs"),
    ("lacks_funding", change(data={"settlements": 0}), "The data hold no funding"),
    ("sees_the_unknown", change(actions=[{"feature": "rsi", "outside": 0.2}]), "In 20.0 % of the bars rsi lies more"),
    ("is_too_large", change(volume={"largest_share": 0.4}), "40 % at most"),
    ("ruined", change(accounts=[{"name": "A", "ended": "ruin", "days": 3.0}]), "the account of A after 3 days."),
    ("ruined", change(lots={"exits": {"liquidated": 10}}), "25 % of its lots are liquidated"),
    ("refuses_many", change(verdicts={"NO_HEDGE": 200}), "200 of 240 orders are refused, 200 as NO_HEDGE"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "record", "text"), CASES)
def test_rules_speak(rule, record, text):
    said = {x["rule"]: x["text"] for x in diagnose(record)}
    assert text in said[rule], said
    assert set(said) == {rule}
    sentences = write_verdict(record | {"diagnosis": diagnose(record)})
    assert any(text in sentence for sentence in sentences) == (record["waterfall"]["net"] <= 0)  # the reason of a loss


def test_rules_are_silent_without_a_reason():
    assert diagnose(NOTHING) == [] and {rule for rule, *_ in CASES} == {rule.__name__ for rule in RULES}
    sentences = write_verdict(NOTHING | {"diagnosis": []})
    assert "gained 20.0 % (90 % interval -10.0 to +30.0 %)" in sentences[0]
    assert "earn 30.0 bp each before costs and pay 10.0 bp of fees and slippage." in sentences[1]
    assert "includes zero" in sentences[2] and "90 % of random traders with its rate" in sentences[2]
    many = NOTHING | {"diagnosis": [], "random": {"place": 0.9, "lots_per_spell": 4.0}}
    assert "random" not in write_verdict(many)[2]  # one drawn lot stands for four


def test_a_policy_that_never_trades(env):
    never = lambda key, state, carry: (hold_action(env.config), carry)  # noqa: E731
    record = evaluate(env, never).record
    json.dumps(record, allow_nan=False)
    assert record["lots"] == {"lots": 0} and record["diagnosis"][0]["rule"] == "never_trades"
    assert "absent" in record["random"] and "absent" in record["latency"] and record["overall"]["return"] == 0
    assert record["verdict"][2] == "Without a trade there is nothing to believe or to doubt."


def test_volume_and_first_move_by_hand():
    market = hand_market(bars=9, both={(2, 0): (1000, 1010, 1000, 1005)})
    env = PerpEnv(market, EnvParams(taker_fee=0.0), EnvConfig(max_lots=2, episode_length=4))
    enter = order(1, stop=3.0, target=6.0)
    act = lambda key, state, carry: (jnp.where(state.t == 2, enter, 0 * enter), carry)  # noqa: E731
    traded = {market.symbols[0]: (np.array([1800_000]), np.array([1e6]))}
    found = evaluate(env, act, traded=traded, quick=True)
    (lot,) = found.trades.to_pylist()
    assert lot["first_move"] == pytest.approx(0.005)
    assert found.record["volume"]["median_share"] == pytest.approx(lot["notional"] / 1e6)
    assert found.record["latency"]["first_move"] == pytest.approx(50)
