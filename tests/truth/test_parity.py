"""The simulator against the float64 twin, written from docs/semantics.md alone: every event, level and flag.

python -m perpjax.audit.parity --episodes 10000      # the long form; last result in benchmarks/RESULTS.md
"""

import dataclasses
import multiprocessing
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import workers
from markets import crash_market

from perpjax import load_market
from perpjax.audit import agreement, parity
from perpjax.audit.agreement import Seen, disagreement, look
from perpjax.audit.draws import CONFIGS, draw_actions, draw_params
from perpjax.audit.parity import NOTHING, Args, Outcome, compare, compare_episodes, main
from perpjax.data import build_market
from perpjax.data.contract import read_table
from perpjax.env import PerpEnv
from perpjax.market import Market
from perpjax.params import EnvConfig, EnvParams
from perpjax.reference import Twin, step_like
from perpjax.state import Lots

pytestmark = pytest.mark.usefixtures("quick_compilation")

REAL = {
    "orca": "binance-um_ORCAUSDT_perp_3m_20241231_20260219.parquet",
    "near": "binance-um_NEARUSDT_perp_3m_20250704_20251231.parquet",
    "btc": "binance-um_BTCUSDT_perp_5m_20230101_20241231.parquet",
}
FUNDING = {
    "orca": "binance-um_ORCAUSDT_funding_20241231_20260219.parquet",
    "btc": "binance-um_BTCUSDT_funding_20221201_20241231.parquet",
}


def find_market(name: str, request: pytest.FixtureRequest) -> Market:
    """Synthetic markets by name, the last 4 000 bars of real ones, and the wild one of these tests."""
    if name.startswith("synthetic"):
        return load_market(name)
    if name.startswith("wild"):
        return crash_market(bars=1600, candles=int(name.partition(" ")[2]), seed=1)
    folder = request.getfixturevalue("shared_data")
    candles = read_table(folder / REAL[name])
    funding = read_table(folder / FUNDING[name]) if name in FUNDING else None
    symbol = name.upper() + "USDT"
    return build_market(candles.slice(candles.num_rows - 20_000), funding=funding, symbol=symbol, features=None)


# Every static choice and every kind of market, in seven programs; the numbers vary within each.
CASES = [
    ("synthetic:crash", 0),
    ("wild 3", 1),
    ("synthetic:martingale", 2),
    ("orca", 3),
    ("near", 4),
    ("btc", 5),
    ("wild 15", 3),
]
EVENTS = {
    "synthetic:crash": ("stopped", "targets", "timed_out", "closed", "liquidated", "DATA_GAP", "NO_HEDGE"),
    "wild 3": ("stopped", "targets", "timed_out", "closed", "liquidated", "ambiguous", "DATA_GAP", "MAX_LOTS"),
    "synthetic:martingale": ("stopped", "targets", "timed_out", "closed", "MAX_LOTS", "MAX_EXPOSURE"),
    "orca": ("stopped", "targets", "timed_out", "BELOW_MINIMUM", "NO_HEDGE"),
    "near": ("stopped", "targets", "timed_out", "closed", "MAX_LOTS"),
    "btc": ("stopped", "targets", "timed_out", "closed", "BELOW_MINIMUM"),
    "wild 15": ("stopped", "targets", "liquidated", "ambiguous", "DATA_GAP", "NO_HEDGE", "MAX_EXPOSURE"),
}


@pytest.mark.parametrize("name, choice", CASES, ids=[f"{name}-{i}" for name, i in CASES])
def test_simulator_equals_twin(name, choice, request):
    config = dataclasses.replace(CONFIGS[choice], episode_length=300)
    outcome = compare(find_market(name, request), config, episodes=16, seed=choice)
    assert outcome.disagreements == ()
    assert outcome.episodes == 16 and outcome.steps > 16 * 100
    assert max(outcome.wallet_error, outcome.equity_error) <= agreement.CARRIED
    assert outcome.flipped <= 0.02 * outcome.steps, "near-ties that float32 takes the other way are rare"
    assert min(outcome.events[event] for event in EVENTS[name]) > 0, outcome.events


def test_a_hundred_thousand_bars():
    # Little enough is traded, and cheaply enough, that the account lives; funding is paid at every settlement.
    length, rng = 100_000, np.random.default_rng(0)
    config = EnvConfig(episode_length=length, max_lots=3)
    market = load_market(f"synthetic:martingale?bars={length + 700}").replace(
        scaler_mean=jnp.zeros(0), scaler_scale=jnp.ones(0)
    )
    params = EnvParams(taker_fee=1e-5, slippage_base=1e-6, slippage_atr=0.0, max_exposure=0.05, max_hold=400)
    env = PerpEnv(market, jax.tree.map(lambda x: x[None], params), config)
    actions = draw_actions(rng, config, length, 1)
    actions[rng.random((length, 1)) < 0.9] = 0
    outcome, states = compare_episodes(env, np.array([673]), actions)
    assert outcome.disagreements == () and outcome.steps == length
    assert max(outcome.wallet_error, outcome.equity_error) <= 1e-5
    assert outcome.events["opened"] > 2_000 and states.account.ledger.funding[-1, 0] != 0


@pytest.mark.parametrize(
    "rounded, found", [(0.0, ""), (5e-7, ""), (-5e-7, ""), (3e-6, "realised"), (-3e-6, "realised")]
)
def test_what_an_exit_leaves_of_a_margin_is_as_rounded_as_the_margin(rounded, found):
    """Funding took most of the margin, and a stop, far beyond it, the rest."""
    market = crash_market(bars=800, seed=3)
    env, t, tick_value = PerpEnv(market, config=EnvConfig(episode_length=50)), 700, market.instrument.tick_value
    price, quantity = market.bar(t).open[0], 1000.0
    lot = {"side": -1.0, "quantity": quantity, "entry": jnp.round(price / 2), "leverage": 1.0, "margin": 7.0,
           "stop": price, "target": 1.0, "liquidation": 4 * price, "age": 3}  # fmt: skip
    state = env.reset(jax.random.key(0), t)
    lots = Lots(**{name: getattr(state.account.lots, name).at[0].set(x) for name, x in lot.items()})
    state = state.replace(account=state.account.replace(lots=lots))
    after = jax.jit(env.step)(state, jnp.zeros(5, jnp.int32))
    seen = Seen(jax.tree.map(lambda a, b: np.stack([a, b]), *map(parity.to_host, (state, after))))
    twin = Twin(agreement.twin_market(market), agreement.twin_params(env.params, env.config))
    posted = quantity * float(lots.entry[0] * tick_value)
    margins = np.asarray(lots.margin, np.float64) + rounded * posted * np.eye(len(lots.margin))[0]
    twin.load(t=t, end=int(state.end), wallet=seen.wallet[0], lots=vars(lots.replace(margin=margins)))
    before = look(twin)
    step_like(twin, np.zeros(5, int), lambda twin: not disagreement(twin, seen, 1, before))
    why = disagreement(twin, seen, 1, before)
    assert twin.state.ledger.stopped == 1 and twin.state.ledger.realised == -margins[0]
    assert why.partition(":")[0] == found


# What is wrong with the simulator is found: here the twin is told one number a little differently.
@pytest.mark.parametrize(
    "number, factor, found",
    [
        ("taker_fee", 1.0001, "fees"),
        ("slippage_base", 1.01, "slot"),
        ("stop_depth", 0.9, "fees"),
        ("max_leverage", 1.1, "slot"),
        ("max_exposure", 1.001, "slot"),
        ("max_hold", 1.5, "slot"),
        ("initial_equity", 1.00001, "wallet"),
        ("ruin_fraction", 1.5, "clock and flags"),
        ("risk_penalty", 1.01, "reward"),
    ],
)
def test_a_number_that_is_off_is_found(monkeypatch, number, factor, found):
    def told(params, config):
        honest = agreement.twin_params(params, config)
        return dataclasses.replace(honest, **{number: type(getattr(honest, number))(getattr(honest, number) * factor)})

    monkeypatch.setattr(parity, "twin_params", told)
    outcome = play_twelve()
    assert any(found in why for why in outcome.disagreements), outcome.disagreements


@pytest.mark.parametrize(
    "number, change, found",
    [
        ("funding_rate", lambda x: x * 1.001, "margin"),
        ("funding_price", lambda x: x + 30, "margin"),
        ("maintenance_fee_rate", lambda x: x + 1e-4, "slot"),
        ("min_notional", lambda x: 2_000.0, "slot"),
        ("atr", lambda x: x + 1, "slot"),
        ("close", lambda x: x - 1, "fees"),
        ("mark_close", lambda x: x - 1, "equity"),
        ("features", lambda x: x + 1e-3, "observation"),
    ],
)
def test_a_market_that_is_off_is_found(monkeypatch, number, change, found):
    def told(market):
        honest = agreement.twin_market(market)
        return dataclasses.replace(honest, **{number: change(getattr(honest, number))})

    monkeypatch.setattr(parity, "twin_market", told)
    outcome = play_twelve()
    assert any(found in why for why in outcome.disagreements), outcome.disagreements


def test_a_posting_that_only_the_wallet_shows_is_found(monkeypatch):
    honest = parity.to_host

    def off(states):
        states = honest(states)
        wallet = states.account.wallet * (1 + 1e-5 * (states.t > states.t[0] + 40))
        return states.replace(account=states.account.replace(wallet=wallet))

    monkeypatch.setattr(parity, "to_host", off)
    assert any("wallet" in why for why in play_twelve().disagreements)


def test_an_observation_that_is_off_is_found(monkeypatch):
    honest = parity.to_host
    monkeypatch.setattr(parity, "to_host", lambda states: (h := honest(states)).replace(obs=h.obs * 1.001))
    assert any("observation" in why for why in play_twelve().disagreements)


def play_twelve() -> Outcome:
    """Twelve short episodes of a shaped reward in the wild market, with an account that may be ruined."""
    config = dataclasses.replace(CONFIGS[2], episode_length=150)
    rng = np.random.default_rng(5)
    params = EnvParams(taker_fee=1e-3, max_exposure=0.8, max_leverage=20.0, max_hold=10, ruin_fraction=0.5)
    params = jax.tree.map(lambda x: jnp.repeat(x[None], 12, 0), params)
    env = PerpEnv(crash_market(bars=1000, candles=3, seed=2), params, config)
    return compare_episodes(env, rng.integers(673, 800, 12), draw_actions(rng, config, 150, 12))[0]


def test_the_untouched_twelve_agree():
    outcome = play_twelve()
    assert outcome.disagreements == () and outcome.events["stopped"] > 0


def test_command_line(capsys):
    args = ["--dataset", "synthetic:crash?bars=12000", "--episodes", "2", "--length", "20"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "synthetic:crash" in out and "near-ties" in out and "stopped" in out


@pytest.mark.parametrize(
    "args, why",
    [
        (["--dataset", "synthetic:bogus"], "bogus"),
        (["--dataset", "no/such/folder"], "no/such/folder"),
        (["--episodes", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--seed", "-1"], "seed is -1; it must be an integer in [0, "),
        (["--episodes", str(32 * 1_000_000 + 1)], "episodes is 32000001; it must be at most 32000000"),
        (["--episodes", str(10**19)], "at most 32000000"),
        (["--workers", "257"], "workers is 257; it must be at most 256"),
        (["--workers", str(10**12)], "it must be at most 256"),
        (["--length", str(2**30 + 1)], f"episode_length = {2**30 + 1} is not an integer in [1, {2**30}]"),
        (["--length", str(10**19)], "is not an integer in"),
        (["--length", str(2**30), "--dataset", "synthetic:crash?bars=12000"], "too short for an episode of"),
        (["--length", "11328", "--dataset", "synthetic:crash?bars=12000"], "too short for an episode of 11328 bars"),
    ],
)
def test_wrong_usage_is_one_line(args, why, capsys):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert why in err and err.startswith("error: ") and err.count("\n") == 1


def test_the_largest_run_is_planned():
    args = Args(dataset=("synthetic:crash?bars=12000",), length=11_327, workers=256, episodes=64)
    assert [(task.episodes, task.config.episode_length) for task in parity.plan(args)] == [(11, 11_327)] * 6


def test_no_two_runs_share_a_seed():
    """The longest run of seed 0 ends before the first batch of seed 1; small seeds are those of earlier records."""
    seeds = [[task.seed for task in parity.plan(Args(seed=seed, episodes=32 * 1_000_000))] for seed in (0, 1)]
    assert seeds[0] == list(range(len(seeds[0]))) and len(seeds[0]) >= 1_000_000
    assert seeds[0][-1] < seeds[1][0] == 1_000_003


@pytest.mark.parametrize(
    "does, why",
    [
        (workers.die, "a worker process died"),
        (
            workers.run_out_of_memory,
            "RuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.",
        ),
    ],
)
def test_a_worker_that_fails_ends_the_run(does, why, monkeypatch, capfd, tmp_path):
    """At once, whatever the others are doing, and with one line."""
    monkeypatch.setattr(parity, "run_task", does)
    monkeypatch.setenv(workers.FOLDER, str(tmp_path))
    began = time.monotonic()
    assert main(["--dataset", "synthetic:crash?bars=12000", "--episodes", "3", "--length", "20", "--workers", "2"]) == 2
    assert time.monotonic() - began < 30
    err = capfd.readouterr().err
    assert err.startswith(f"error: {why}") and err.count("\n") == 1, err
    sleepers = [int(path.name) for path in tmp_path.iterdir()]
    assert sleepers
    for pid in sleepers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_only_workers_are_ended(monkeypatch, tmp_path):
    """Another child of the process goes on."""
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    other.start()
    monkeypatch.setattr(parity, "run_task", workers.run_out_of_memory)
    monkeypatch.setenv(workers.FOLDER, str(tmp_path))
    try:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            parity.run(Args(dataset=("synthetic:crash?bars=12000",), episodes=3, length=20, workers=2))
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_parent_and_workers_share_a_gpu(monkeypatch):
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    for before, after in ((None, "false"), ("true", "true")):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
        if before:
            monkeypatch.setenv(name, before)
        assert main(["--workers", "0"]) == 2 and os.environ[name] == after


def test_disagreements_give_exit_status_1(monkeypatch, capsys):
    bad = NOTHING._replace(episodes=1, disagreements=("slot 0: 1 and 2",))
    monkeypatch.setattr(parity, "run", lambda args: {"synthetic:crash": bad})
    assert main([]) == 1
    assert "slot 0" in capsys.readouterr().out


def test_the_liquidation_value_is_the_twins():
    market, rng, config = crash_market(bars=800, seed=3), np.random.default_rng(4), EnvConfig(episode_length=80)
    env = PerpEnv(market, draw_params(rng, 12), config)
    states = parity.record(env, jnp.full(12, 690), jnp.asarray(draw_actions(rng, config, 80, 12)))
    value = jax.vmap(lambda p, state: env.replace(params=p).liquidation_value(state))
    values = np.asarray(jax.jit(jax.vmap(value, (None, 0)))(env.params, states), np.float64)
    host, held = parity.to_host(states), 0
    for i in range(12):
        twin = Twin(agreement.twin_market(market), agreement.twin_params(parity.take(env.params, i), config))
        for t in range(1, 81):
            one = jax.tree.map(lambda x, t=t, i=i: x[t : t + 1, i], host)
            agreement.take_over(twin, one, Seen(one))
            held += twin.liquidation_value() != twin.state.wallet
            size = max(abs(twin.state.wallet), twin.params.initial_equity)
            assert abs(twin.liquidation_value() - values[t, i]) <= agreement.CARRIED * size
    assert held > 300
