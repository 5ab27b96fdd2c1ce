"""One account over a split: its lots add up to its equity, and the measures are those of their formulas."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from markets import FREE, crash_market, hand_market, order

from perpjax import EnvConfig, EnvParams, PerpEnv
from perpjax.reference import Twin
from perpjax.rules.orders import sample_action
from train.evaluate import account
from train.evaluate.__main__ import main
from train.evaluate.account import play_account
from train.evaluate.evaluation import tabulate_equity
from train.evaluate.lots import COSTS, find_lots
from train.evaluate.measures import DAY_MS, daily_returns, drawdown, make_waterfall, measure_equity, sharpe, sortino
from train.ppo.config import Config
from train.ppo.judge import evaluate_policy
from train.ppo.load import load_policy
from train.ppo.run import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def wild():
    """A year's worth of random trading in a crash, with costs, several lots and liquidations."""
    env = PerpEnv(crash_market(bars=1600), EnvParams(max_exposure=0.9, max_leverage=50.0), EnvConfig(max_lots=4))
    act = jax.tree_util.Partial(lambda key, state, carry: (sample_action(key, env.config), carry))
    played = play_account(env, act, jax.random.key(0))
    lots, agreements = find_lots(played)
    assert not any(agreement.disagreement for agreement in agreements)
    return played, lots


def test_lots_add_up_to_the_equity(wild):
    played, lots = wild
    moved = sum(float(a.states.equity[-1]) - float(a.env.params.initial_equity) for a in played)
    assert lots.num_rows > 50
    assert np.sum(lots["net"].to_numpy()) == pytest.approx(moved, abs=1e-5 * 1e4)
    for row in lots.to_pylist():
        costs = {name: row[name] for name in COSTS}
        assert row["net"] == pytest.approx(row["gross"] - sum(costs.values()) + 2 * costs["forgiven"], abs=1e-6)
        assert row["exit_time"] >= row["entry_time"] and row["worst"] <= row["best"]
    waterfall = make_waterfall(lots)
    net = waterfall.pop("net")
    assert sum(waterfall.values()) == pytest.approx(net, abs=1e-6)


def test_counts_are_those_of_the_ledger(wild):
    played, lots = wild
    reasons = lots["reason"].to_pylist()
    for how, event in (("stopped", "stopped"), ("target", "targets"), ("closed", "closed"), ("timed_out", "timed_out"),
                       ("liquidated", "liquidated")):  # fmt: skip
        assert reasons.count(how) == sum(int(getattr(a.states.account.ledger, event)[-1]) for a in played), how
    assert reasons.count("liquidated") > 0 and reasons.count("stopped") > 0
    assert lots.num_rows == sum(int(a.states.account.ledger.opened[-1]) for a in played)


def test_one_lot_by_hand():
    """A long of 1000 steps at 1000 ticks, 10 quote a tick, whose target at 1060 is reached in candle 1 of bar 3."""
    market = hand_market(bars=9, both={(3, 1): (1000, 1061, 1000, 1000)})
    env = PerpEnv(market, dataclasses.replace(FREE, taker_fee=0.001), EnvConfig(max_lots=2, episode_length=4))
    enter = order(1, stop=3.0, target=6.0)

    def act(key, state, carry):
        return jnp.where(state.t == 1, enter, 0 * enter), carry

    (one,) = play_account(env, act, jax.random.key(0))
    (lot,) = find_lots([one])[0].to_pylist()
    assert (lot["side"], lot["reason"], lot["entry_price"], lot["exit_price"]) == ("long", "target", 1000, 1060)
    assert lot["entry_time"].timestamp() == 900 and lot["exit_time"].timestamp() == 3 * 900 + 300
    assert (lot["quantity"], lot["notional"], lot["bars"]) == (10, 10_000, 3) and lot["margin"] == pytest.approx(1_000)
    assert (lot["stop"], lot["target"], lot["liquidation"]) == (970, 1060, 909)
    assert lot["gross"] == 600 and lot["fees"] == pytest.approx(10 + 10.6) and lot["net"] == pytest.approx(579.4)
    assert (lot["worst"], lot["best"]) == (0, pytest.approx(0.061))
    assert float(one.states.equity[-1]) == pytest.approx(10_579.4)


def test_funding_does_not_move_the_notional():
    """A long of 1000 steps at 1000 ticks pays 100 at the open of bar 3: its margin falls, its notional does not."""
    market = hand_market(bars=9, funding={3: (0.01, 1000)})
    env = PerpEnv(market, FREE, EnvConfig(max_lots=2, episode_length=4))
    enter = order(1, stop=3.0, target=6.0)
    (one,) = play_account(env, lambda key, state, carry: (jnp.where(state.t == 1, enter, 0), carry), jax.random.key(0))
    lots = one.states.account.lots
    assert lots.margin.sum(axis=1)[[2, 4]] == pytest.approx([1_000, 900])
    np.testing.assert_array_equal(one.notional(), np.where(lots.quantity.any(axis=1), 10_000, 0))
    assert tabulate_equity([one])["notional"].to_pylist() == one.notional().tolist()


def test_an_altered_fill_is_told(wild, monkeypatch):
    played, _ = wild
    real = Twin._exit

    def altered(self, how, slot, lot, candle, trigger, fill):
        return real(self, how, slot, lot, candle, trigger, fill + (how == "stopped"))

    monkeypatch.setattr(Twin, "_exit", altered)
    lots, (agreement,) = find_lots(played)
    assert agreement.disagreement.startswith("bar ") and agreement.bars < played[0].steps
    assert lots.num_rows < 50  # the lots end there


# Measures.


def test_daily_returns_are_cut_at_utc_midnights():
    times = np.arange(0, 3 * DAY_MS + 1, DAY_MS // 4) + DAY_MS // 2  # from noon to noon
    equity = 100.0 * 1.01 ** np.arange(len(times))
    returns = daily_returns(times, equity)
    # Half a day, two whole days, half a day.
    np.testing.assert_allclose(returns, [1.01**2 - 1, 1.01**4 - 1, 1.01**4 - 1, 1.01**2 - 1])
    assert np.prod(1 + returns) == pytest.approx(equity[-1] / equity[0])


def test_ratios_by_hand():
    returns = np.array([0.01, -0.02, 0.03, 0.0])
    ratio, error = sharpe(returns)
    std = math.sqrt(((0.005**2) + (0.025**2) + (0.025**2) + (0.005**2)) / 3)
    assert ratio == pytest.approx(0.005 / std * math.sqrt(365)) and error > 0
    assert sortino(returns) == pytest.approx(0.005 / math.sqrt(0.0004 / 4) * math.sqrt(365))
    assert drawdown(np.array([10.0, 12, 9, 11, 12, 6])) == (0.5, 2)
    rng = np.random.default_rng(0)
    _, error = sharpe(rng.normal(0, 0.01, 20_000))
    assert error == pytest.approx(math.sqrt(365 / 20_000), rel=0.05)  # of independent normal returns with mean 0


def test_the_standard_error_knows_autocorrelation():
    rng, n = np.random.default_rng(1), 2000
    noise = rng.normal(0, 0.01, n + 1)
    persistent = noise[1:] + 0.9 * noise[:-1]
    errors = [sharpe(x)[1] for x in (persistent, rng.permutation(persistent))]
    assert errors[0] > 1.2 * errors[1]


def test_numbers_without_a_meaning_are_absent():
    times = np.arange(0, 20 * DAY_MS, DAY_MS // 96)
    flat = measure_equity(times, np.full(len(times), 1e4))
    assert "sharpe" not in flat and flat["absent"]["sharpe"] == "equity never moved"
    short = measure_equity(times, 1e4 * (1 + 1e-4 * np.sin(np.arange(len(times)))))
    assert "annual_return" not in short and "under 30" in short["absent"]["sharpe"]


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = Config(
        num_envs=32, num_steps=8, total_steps=32 * 8 * 3, hidden=(8,), dataset="synthetic:crash?bars=12000",
        run_dir=tmp_path_factory.mktemp("account") / "run", env=EnvConfig(max_lots=2, episode_length=96),
    )  # fmt: skip
    return train(config).path


def test_the_command_writes_its_files(run, tmp_path, capsys):
    closing = json.loads((run / "evaluation-val" / "evaluation.json").read_text())  # of the training run
    assert closing["windows"] == {"absent": "left out of a quick evaluation"}
    assert main([str(run), "--which", "final"]) == 0
    said, out = capsys.readouterr().out, run / "evaluation-val"
    record = json.loads((out / "evaluation.json").read_text())
    lots, equity = (pq.read_table(out / f"{name}.parquet") for name in ("trades", "equity"))
    assert lots.num_rows == record["lots"]["lots"] and "twin agrees in all" in said
    assert record["volume"] and len(record["windows"]["returns"]) == 10 and len(record["stresses"]) == 6
    (measures,) = record["accounts"]
    assert closing["policy"]["step"] == record["policy"]["step"] or closing["policy"]["which"] == "best"
    assert measures["return"] == pytest.approx(equity["equity"][-1].as_py() / equity["equity"][0].as_py() - 1)
    assert equity.num_rows == record["twin"]["bars"] + 1 and abs(record["twin"]["lots_less_equity"]) < 1e-5
    again = evaluate_policy(load_policy(run, "final"), "val", "final")
    assert again.record["sha256"] == record["sha256"]
    saved = json.loads((again.save(tmp_path / "again") / "evaluation.json").read_text())
    assert saved["trials"]["look"] == record["trials"]["look"] + 1 == 3
    assert saved["trials"]["trials"] == len({closing["policy"]["step"], record["policy"]["step"]})
    assert saved | {"trials": {}} == record | {"trials": {}}
    assert main(["no-such-run"]) == 2
    assert "no run no-such-run" in capsys.readouterr().err


def test_ruin_ends_an_account():
    env = PerpEnv(
        crash_market(bars=760),
        EnvParams(ruin_fraction=0.9, max_exposure=1.0, max_leverage=50.0),
        EnvConfig(max_lots=4, episode_length=20),
    )
    act = jax.tree_util.Partial(lambda key, state, carry: (sample_action(key, env.config), carry))
    (one,) = account.play_account(env, act, jax.random.key(1))
    states = one.states
    assert bool(states.terminated[-1]) or one.steps == env.market.num_bars - int(env.market.segments.first[0])
    assert not states.terminated[:-1].any()
