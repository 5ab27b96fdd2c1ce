"""The ladder: its references on cases worked by hand, its markets, its verdicts, and trainers broken on purpose."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, hand_market, order

from perpjax import AutoReset, EnvConfig, PerpEnv, VecEnv
from perpjax.audit import audit_features
from perpjax.data import synthetic_tables
from perpjax.rules.orders import Verdict as OrderVerdict
from train.evaluate import measure_windows
from train.ladder.__main__ import main
from train.ladder.climb import Settings, choose_rungs, climb, read_runs
from train.ladder.faults import StaleObservations, bootstrap_ruin, plant
from train.ladder.markets import CRASH, CRASHES, GIFT, GIFTS, TRAP, TRAPS, leaking_features, synthetic_pair, trap_pair
from train.ladder.references import Ridge, best_of_single_bars, choose_thresholds, follow
from train.ladder.rungs import Check, Run, Rung, Verdict, all_rungs, measure_ruin
from train.policies import GRU, MultiDiscrete
from train.ppo.config import Config
from train.ppo.environment import wrap_market
from train.ppo.losses import Rows, compute_gae
from train.ppo.run import init_state, learn, make_ppo
from train.state import Learner

BY_NAME = {rung.name: rung for rung in all_rungs()}
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def jumps(**moves: float) -> dict[tuple[int, int], list[float]]:
    """Candles of a market at 1000 ticks that moves by so many ticks in the first candle of a bar: b2=+10."""
    path, price = {}, 1000.0
    for t in range(8):
        new = price + moves.get(f"b{t}", 0.0)
        path[t, 0] = [price, max(price, new), min(price, new), new]
        path |= {(t, k): [new] * 4 for k in (1, 2)}
        price = new
    return path


# References.


@pytest.fixture(scope="module")
def hand_env() -> PerpEnv:
    """Up 1 % in bar 2, down 10 ticks in bar 4; no costs."""
    return PerpEnv(hand_market(both=jumps(b2=10, b4=-10)), FREE, EnvConfig(max_lots=3, episode_length=6))


def test_thresholds_trade_as_they_say(hand_env):
    # Enters long at bar 2 (2 > 1) at 1000, holds bar 3 (1 is not under 0.5), closes at bar 4 (0 < 0.5) at 1010:
    # 10 ticks of 10 quote on 10 000. At bar 5 the estimate is not beyond 1, and nothing happens.
    estimate = np.array([0, 0, 2, 1, 0, 1, 0, 0, 0.0])
    result = measure_windows(hand_env, follow(estimate, 1.0, 0.5), KEY, np.array([1]))
    np.testing.assert_allclose(result.returns, [0.01], rtol=1e-6)
    np.testing.assert_array_equal(result.trades, [1])
    # Mirrored, it is short in the same bars and loses as much.
    result = measure_windows(hand_env, follow(-estimate, 1.0, 0.5), KEY, np.array([1]))
    np.testing.assert_allclose(result.returns, [-0.01], rtol=1e-6)


def test_thresholds_are_those_that_earn_most(hand_env):
    # 0.55 of the unit is right at bar 2, 0.25 wrong at bar 4: entering between the two earns, below it loses again.
    estimate = np.array([0, 0, 0.55, 0, 0.25, 0, 0, 0, 0.0])
    enter, leave = choose_thresholds(hand_env, estimate, 1.0, np.array([1]))
    assert 0.25 <= enter < 0.55 and leave <= enter


def test_ridge_finds_a_line():
    x = np.random.default_rng(0).normal(size=(5_000, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 1.0]
    ridge = Ridge(x[:4_000], x[:4_000] @ [2.0, 0.3, 0.0] + 7)
    np.testing.assert_allclose(ridge.predict(x[4_000:]), x[4_000:] @ [2.0, 0.3, 0.0] + 7, atol=0.02)
    assert np.isfinite(ridge.predict(np.full((1, 3), np.nan))).all()


def test_the_best_of_single_bars_by_hand(hand_env):
    env = hand_env.replace(params=FREE.replace(max_hold=1))
    known = np.zeros(9)
    # Seven bars, each a group of its own. Bar 2: a long of 10 000 earns 100. Bar 4: a short at 1010, 990 steps, earns
    # 990 x 0.01 x 10 = 99. In the others nothing moves.
    assert best_of_single_bars(env, known) == pytest.approx((math.log(1.01) + math.log(1.0099)) / 7, rel=1e-5)
    # All bars in one group: one order for all of them. A long loses at most its stop of half an ATR (5 ticks) in bar 4.
    expected = (math.log(1.01) + math.log(1 - 0.00495)) / 7
    assert best_of_single_bars(env, known, cells=(1, 1)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="max_hold = 192"):
        best_of_single_bars(hand_env, known)


# Markets.


def test_the_leak_is_accused_and_nothing_else():
    tables = synthetic_tables("martingale", bars=2_000)
    assert tuple(audit_features(leaking_features, tables.candles, tables.funding).accused) == ("next_return",)


def test_pairs_share_a_scaler_and_nothing_else():
    pair = synthetic_pair("martingale", 3, leaking_features, bars=1_500)
    np.testing.assert_array_equal(pair.train.scaler_mean, pair.unseen.scaler_mean)
    assert not np.array_equal(pair.train.candles, pair.unseen.candles)
    # The leaked feature of bar t is that bar's own return.
    bar = pair.train.bar(jnp.int32(900))
    assert pair.train.features[900, -1] == pytest.approx(math.log(bar.close[-1] / bar.open[0]), abs=1e-6)


def test_a_trap_pays_until_it_ends_everything():
    config = BY_NAME["ruin"].config
    trap = (1 - CRASHES) * math.log1p(TRAP) + CRASHES * math.log1p(CRASH)
    gifts = GIFTS * math.log1p(GIFT) / (1 - config.gamma)
    # Whoever forgets the future walks in; whoever counts it loses seven times as much by doing so.
    assert trap > 0.015 and CRASHES * gifts > 7 * trap
    # A short is no way out, and a crash ruins whoever has not yet earned 46 %: twice what the gifts of an episode pay.
    assert (1 - CRASHES) * math.log1p(-TRAP) + CRASHES * math.log1p(-CRASH) < 0
    assert config.params.ruin_fraction > 1.46 * (1 + CRASH)


def test_the_trap_market_does_what_it_says():
    config, pair = BY_NAME["ruin"].config, trap_pair(0, bars=673 + 64 * 200)
    env = wrap_market(pair.train, config)
    gift, trap = np.asarray(pair.train.features[:-1]).T
    assert gift.mean() == pytest.approx(GIFTS, abs=0.02) and trap.mean() == pytest.approx(TRAPS, abs=0.02)
    gifts, traps = (673 + np.flatnonzero(x[673:])[:20] for x in (gift, trap))
    step = jax.jit(jax.vmap(lambda t, action: env.step(env.reset(KEY, start=t), action), in_axes=(0, None)))
    np.testing.assert_allclose(step(gifts, order(1)).reward, math.log1p(GIFT), rtol=1e-3)
    after = step(traps, order(1))
    crashed = np.asarray(after.reward < 0)
    assert crashed.any() and not crashed.all()
    np.testing.assert_allclose(np.expm1(after.reward), np.where(crashed, CRASH, TRAP), rtol=2e-3)
    np.testing.assert_array_equal(after.terminated, crashed)
    # A part of a position is refused: nobody can make a trap harmless.
    small = step(traps, order(1, size=0.75))
    assert small.account.ledger.verdicts[:, OrderVerdict.BELOW_MINIMUM].all() and not small.reward.any()

    # In whole episodes, staying out of traps is the better policy, though each trap pays.
    safe, greedy = (measure_windows(env, follow(np.append(x, 0), 0.5, 0.5), KEY) for x in (gift, gift + trap))
    assert np.log1p(safe.returns).mean() > np.log1p(greedy.returns).mean()
    ruined = [(r.returns <= config.params.ruin_fraction - 1).mean() for r in (safe, greedy)]
    assert ruined[0] == 0 and ruined[1] > 0.4


# Verdicts.


@pytest.mark.parametrize(
    "low, high, values, seeds, passed",
    [
        (0.8, math.inf, (0.9, 0.75, 0.9), 2, False),  # every seed counts, whatever the mean
        (0.8, math.inf, (0.9, 0.8, 0.8), 3, True),
        (-math.inf, 0.9, (0.5, 0.95), 1, False),
        (-math.inf, 0.9, (0.5, 0.9), 2, True),
        (0.6, 0.85, (0.9, 0.7), 1, False),
        (0.8, math.inf, (1.0, math.nan), 1, False),  # what is no number never passes
        (0.8, math.inf, (0.8,), 1, True),
    ],
)
def test_a_check_is_judged_by_its_range(low, high, values, seeds, passed):
    verdict = Verdict("rung", Check("x", "x", low, high), values)
    assert (verdict.seeds_passed, verdict.passed) == (seeds, passed)


def test_which_rungs_are_climbed():
    def names(fault=None, **settings):
        return [rung.name for rung in choose_rungs(Settings(**settings), fault)]

    assert names() == ["martingale", "signal", "leak", "costs", "ruin"]
    assert names(rungs=("costs",)) == ["signal", "costs"]
    assert names(rungs=("ruin", "leak")) == ["leak", "ruin"]
    assert names("stale-observations") == ["leak"] and names("bootstrap-at-liquidation") == ["ruin"]
    assert names("stale-observations", rungs=("signal",)) == ["signal"]
    other = choose_rungs(Settings(total_steps=200_000, network="gru"), None)
    assert {(r.config.total_steps, r.config.network) for r in other} == {(200_000, "gru")}
    assert all(isinstance(make_ppo(r.config).policy, GRU) for r in other)


def test_costs_are_doubled_and_nothing_else():
    changed = {k: v / dataclasses.asdict(BY_NAME["signal"].config.params)[k]
               for k, v in dataclasses.asdict(BY_NAME["costs"].config.params).items()}  # fmt: skip
    assert {k for k, v in changed.items() if v == 2} == {"taker_fee", "slippage_base", "slippage_atr"}
    assert all(v in (1, 2) for v in changed.values())
    assert dataclasses.replace(BY_NAME["costs"].config, params=BY_NAME["signal"].config.params) == (
        BY_NAME["signal"].config
    )


# The command, with a rung that needs no training.


def fake(values: tuple[float, ...]) -> Rung:
    """Seed i measures values[i], which must be at least 1."""
    return Rung("leak", "?", Config(), lambda run: {"x": values[run.config.seed]}, (Check("x", "an x", low=1.0),))


@pytest.mark.parametrize(
    "values, broken, status", [((1.0, 2.0), None, True), ((0.0, 1.0), None, False),
                               ((1.0, 2.0), "stale-observations", False), ((0.0, 1.0), "stale-observations", True)],
)  # fmt: skip
def test_a_climb_leaves_a_table_a_picture_and_figures(tmp_path, capsys, values, broken, status):
    out = tmp_path / "deep" / "out"
    assert climb(Settings(seeds=2, broken=broken, out=out), [fake(values)]) is status
    assert {p.name for p in out.iterdir()} == {"results.json", "ladder.png"}
    saved = json.loads((out / "results.json").read_text())
    trainer = broken or "whole"
    assert saved["runs"][f"{trainer}/leak/1"]["figures"] == {"x": values[1]}
    assert saved["runs"][f"{trainer}/leak/1"]["config"]["seed"] == 1
    assert [v["passed"] for v in saved["verdicts"]] == [np.mean(values) >= 1]
    said = capsys.readouterr()
    assert ("holds" if np.mean(values) >= 1 else "FAILS") in said.out and "leak/1" in said.err


def test_finished_runs_are_kept(tmp_path):
    climb(Settings(seeds=1, out=tmp_path), [fake((1.0,))])
    # A rung that now measures something else is not asked again for seed 0, only for seed 1 ...
    climb(Settings(seeds=2, out=tmp_path), [fake((5.0, 7.0))])
    runs = read_runs(tmp_path)
    assert [runs[f"whole/leak/{i}"]["figures"]["x"] for i in (0, 1)] == [1.0, 7.0]
    # ... unless its settings are others.
    climb(Settings(seeds=1, total_steps=200_000, out=tmp_path), [fake((5.0, 7.0))])
    assert read_runs(tmp_path)["whole/leak/0"]["figures"]["x"] == 5.0


def test_wrong_values_are_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[]")
    Settings(seeds=1000)
    for args, says in ((["--seeds", "0"], "seeds is 0"), (["--out", str(tmp_path)], str(tmp_path)),
                       (["--seeds", "1001"], "seeds is 1001"),
                       (["--seeds", str(10**19)], f"seeds is {10**19}"),
                       (["--total-steps", str(10**19), "--out", str(tmp_path / "x")], "int32"),
                       (["--total-steps", "7", "--out", str(tmp_path / "x")], "total_steps is 7")):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2 and says in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


# Trainers broken on purpose.


def test_advantage_sign():
    config = Config(hidden=(4,))
    advantage, four = jnp.arange(4.0), jnp.zeros(4)
    rows = Rows(jnp.ones((4, 3)), four > 0, jnp.zeros((4, 5), jnp.int32), four, four, advantage, four)
    ppo, distribution = make_ppo(config), MultiDiscrete.from_logits(jnp.zeros((4, MultiDiscrete.num_logits())))
    faulty, envs = plant("advantage-sign", ppo, "the environments")
    assert envs == "the environments" and dataclasses.replace(faulty, loss=ppo.loss) == ppo
    broken = faulty.loss(distribution, four, rows, config)[1]
    right, negated = (
        ppo.loss(distribution, four, rows._replace(advantage=x), config)[1] for x in (advantage, -advantage)
    )
    assert broken == negated and broken["policy_loss"] != right["policy_loss"]
    assert broken["value_loss"] == right["value_loss"]


def test_stale_observations(hand_env):
    whole, hold = VecEnv(AutoReset(hand_env)), jnp.zeros((1, 5), jnp.int32)
    ppo = make_ppo(Config())
    same, stale = plant("stale-observations", ppo, whole)
    assert same is ppo and isinstance(stale, StaleObservations)
    step = jax.jit(lambda envs, state: envs.step(state, hold))
    first = stale.reset(KEY[None], jnp.array([1]))
    second = step(stale, first)
    third = step(stale, second)
    right = [first.obs, step(whole, first).obs]
    np.testing.assert_array_equal(second.obs, right[0])
    np.testing.assert_array_equal(third.obs, right[1])
    assert not np.array_equal(right[0], right[1])
    # Nothing but what is seen changes.
    assert third.t == 3 and third.equity == step(whole, step(whole, first)).equity


def test_bootstrap_at_liquidation():
    # gamma = lambda = 1/2. Step 1 ends in ruin, the next episode's first value is 8.
    column = [jnp.float32(x)[:, None] for x in ([1, 1, 1], [2, 4, 8])]
    terminated = jnp.array([False, True, False])[:, None]
    args = (*column, jnp.float32([0]), jnp.zeros((3, 1)), terminated, jnp.zeros_like(terminated), 0.5, 0.5)
    right, broken = compute_gae(*args)[:, 0], bootstrap_ruin(compute_gae)(*args)[:, 0]
    # delta_1 = 1 - 4 = -3, and with the bootstrap 1 + 0.5 x 8 - 4 = 1; delta_0 = 1 + 0.5 x 4 - 2 = 1.
    np.testing.assert_array_equal(right, [1 - 3 / 4, -3, -7])
    np.testing.assert_array_equal(broken, [1 + 1 / 4, 1, -7])
    faulty, _ = plant("bootstrap-at-liquidation", make_ppo(Config()), None)
    np.testing.assert_array_equal(faulty.gae(*args)[:, 0], broken)


def test_no_fault_changes_nothing():
    ppo, envs = make_ppo(Config()), object()
    assert plant(None, ppo, envs) == (ppo, envs)


@pytest.mark.parametrize("fault", [None, "advantage-sign"])
def test_a_short_run_learns_unless_it_is_broken(fault):
    """The gifts of `ruin`, by a small network on a short market: the whole rung, with fewer steps."""
    config = dataclasses.replace(BY_NAME["ruin"].config, num_envs=512, num_steps=16, total_steps=200_000, hidden=(16,))

    def train(env: PerpEnv, config: Config) -> Learner:
        ppo, envs = plant(fault, make_ppo(config), VecEnv(AutoReset(env)))
        return learn(ppo, envs, init_state(ppo, envs)).learner

    figures = measure_ruin(Run(config, train, {}), bars=673 + 64 * 50)
    assert (figures["share_of_gifts"] > 0.8) == (fault is None), figures
