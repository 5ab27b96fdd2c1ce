"""A million random steps, every one checked; and that each check finds what it is there for.

python -m perpjax.audit.fuzz --steps 1_000_000_000      # the long form; last result in benchmarks/RESULTS.md
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import crash_market, order, reset, step

from perpjax import load_market
from perpjax.audit import fuzz as fuzzing
from perpjax.audit.draws import CONFIGS
from perpjax.audit.fuzz import NOTHING, Tally, check_envs, check_step, fuzz, main
from perpjax.env import PerpEnv
from perpjax.params import EnvConfig, EnvParams
from perpjax.state import State


@pytest.mark.parametrize("name, choice", [("crash", 0), ("signal", 3), ("martingale", 5)])
def test_a_million_random_steps(name, choice):
    tally = fuzz(load_market(f"synthetic:{name}?bars=12000"), CONFIGS[choice], 350_000, num_envs=1024, seed=choice)
    assert tally.steps >= 350_000 and len(tally.broken) == 14
    assert {check: n for check, n in tally.broken.items() if n} == {}
    assert tally.episodes > 100 and tally.ruined > 10 and tally.liquidated > 10


PARAMS = EnvParams(slippage_atr=0.0, max_exposure=0.3)
CONFIG = EnvConfig(max_lots=3, episode_length=50)


@pytest.fixture(scope="module")
def steps() -> tuple[PerpEnv, State, State]:
    """An environment, and a state before and after a step in which two lots were held."""
    env = PerpEnv(crash_market(bars=800, seed=3), PARAMS, CONFIG)
    state = reset(env, 700)
    states = [state]
    for _ in range(4):
        states.append(step(env, states[-1], jnp.asarray(order(1, size=0.5, leverage=2.0, stop=3.0))))
    held = [int((s.account.lots.quantity > 0).sum()) for s in states]
    at = next(i for i, n in enumerate(held[1:], 1) if n == 2)
    return env, states[at - 1], states[at]


def broken(env: PerpEnv, before: State, after: State) -> set[str]:
    return {name for name, holds in jax.jit(check_step)(env, before, after).items() if not holds}


def change(state: State, **changes: object) -> State:
    """The state with some numbers replaced: of its own, the account's, its lots' first slot or its ledger's."""
    account = state.account
    for name, value in changes.items():
        if name.startswith("lot_"):
            lots = account.lots
            new = getattr(lots, name[4:]).at[0].set(value)
            account = account.replace(lots=lots.replace(**{name[4:]: new}))
        elif name == "verdicts":
            refused = account.ledger.verdicts.at[: len(value)].add(value)
            account = account.replace(ledger=account.ledger.replace(verdicts=refused))
        elif hasattr(account.ledger, name):
            account = account.replace(ledger=account.ledger.replace(**{name: getattr(account.ledger, name) + value}))
        elif hasattr(account, name):
            account = account.replace(**{name: getattr(account, name) + value})
        else:
            state = state.replace(**{name: jnp.asarray(value, getattr(state, name).dtype)})
    return state.replace(account=account)


def test_an_honest_step_breaks_nothing(steps):
    assert broken(*steps) == set()


def test_the_last_bar_of_the_market_is_checked_by_its_own_mark():
    env = PerpEnv(crash_market(bars=800, seed=3), PARAMS, dataclasses.replace(CONFIG, episode_length=4))
    state = reset(env, env.market.num_bars - 4)
    while not (state.terminated | state.truncated):
        before, state = state, step(env, state, jnp.asarray(order(1, size=0.5, leverage=2.0, stop=3.0)))
        assert broken(env, before, state) == set()
    assert state.t == env.market.num_bars and (state.account.lots.quantity > 0).any()


FAULTS = [
    ({"obs": jnp.nan}, "all numbers finite"),
    ({"lot_stop": jnp.inf}, "all numbers finite"),
    ({"lot_margin": -1.0}, "quantities, margins, ages not negative"),
    ({"lot_quantity": 10.5}, "levels and quantities whole"),
    ({"lot_entry": 50_000.25}, "levels and quantities whole"),
    ({"lot_side": -1.0}, "free slots empty, one side"),
    ({"lot_leverage": 11.0}, "leverage within its limit"),
    ({"stopped": -1}, "counts and fees never fall"),
    ({"stopped": 1}, "opened = ended + held"),
    ({"opened": 1}, "opened = ended + held"),
    ({"wallet": 0.01}, "wallet = initial + realised - fees - funding - losses"),
    ({"wallet_low": 0.01}, "wallet = initial + realised - fees - funding - losses"),
    ({"fees": 0.01}, "wallet = initial + realised - fees - funding - losses"),
    ({"funding": 0.01}, "wallet = initial + realised - fees - funding - losses"),
    ({"liquidation_losses": 0.01}, "wallet = initial + realised - fees - funding - losses"),
    ({"equity": 9_900.0}, "equity = wallet + unrealised"),
    ({"t": 5}, "clock and flags"),
    ({"terminated": True}, "clock and flags"),
    ({"truncated": True}, "clock and flags"),
    ({"reward": 0.01}, "reward = log return, less penalties"),
    ({"wallet": -9_000.0}, "free money not negative"),
    ({"wallet": -1.0}, "lots cost no more than margins and fees"),
]


@pytest.mark.parametrize("fault, check", FAULTS, ids=[f"{next(iter(f))}-{i}" for i, (f, _) in enumerate(FAULTS)])
def test_a_fault_is_found(steps, fault, check):
    env, before, after = steps
    assert check in broken(env, before, change(after, **fault))


def test_a_second_verdict_is_found(steps):
    env, before, after = steps
    assert "one verdict an order" in broken(env, before, change(after, verdicts=jnp.eye(8, dtype=jnp.int32)[0]))


def test_a_free_slot_with_something_in_it_is_found(steps):
    env, before, after = steps
    lots = after.account.lots
    lots = lots.replace(stop=lots.stop.at[2].set(7.0))
    assert lots.quantity[2] == 0
    dirty = after.replace(account=after.account.replace(lots=lots))
    assert "free slots empty, one side" in broken(env, before, dirty)


def test_command_line(capsys, monkeypatch):
    monkeypatch.setattr(fuzzing, "CONFIGS", CONFIGS[:1])
    assert main(["--dataset", "synthetic:crash?bars=12000", "--steps", "5000", "--num-envs", "64"]) == 0
    out = capsys.readouterr().out
    assert "synthetic:crash" in out and "always: all numbers finite" in out
    assert main(["--steps", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    bad = Tally(1, 0, 0, 0, {"all numbers finite": 3})
    monkeypatch.setattr(fuzzing, "run", lambda args: {"x": NOTHING + bad})
    assert main([]) == 1
    assert "failed 3 times: all numbers finite" in capsys.readouterr().out


def test_the_counts_of_a_chunk_fit_their_type(capsys):
    """In a chunk of 256 steps an account ends its 10 lots and one lot a step: 266 of each of 8 073 246 accounts."""
    check_envs(8_073_246, max_lots=10)
    check_envs((2**31 - 1) // 257, max_lots=1)
    for num_envs in (0, 8_073_247, 2**31, 10**12):
        assert main(["--num-envs", str(num_envs)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: num_envs is {num_envs}; it must be in [1, 8073246]") and err.count("\n") == 1
    with pytest.raises(ValueError, match="num_envs is 8291443; it must be in"):
        fuzz(crash_market(bars=800), CONFIG, 1, num_envs=(2**31 - 1) // 259 + 1)


def test_steps_are_counted_by_the_host(monkeypatch):
    """A run of 10^19 steps is begun: no count of it is of a fixed size."""

    class BegunError(Exception):
        pass

    def stop(market, config, steps, *rest):
        raise BegunError(steps)

    monkeypatch.setattr(fuzzing, "fuzz", stop)
    with pytest.raises(BegunError, match=str(-(-(10**19) // 6))):
        main(["--steps", str(10**19), "--dataset", "synthetic:crash?bars=12000"])
    assert (Tally(10**19, 0, 0, 0, {}) + Tally(10**19, 0, 0, 0, {})).steps == 2 * 10**19


@pytest.mark.parametrize("seed", [-1, 2**60 + 1])
def test_a_seed_out_of_range_is_one_line(seed, capsys):
    assert main(["--seed", str(seed)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: seed is {seed}; it must be an integer in [0, ") and err.count("\n") == 1
    with pytest.raises(ValueError, match="seed is -1;"):
        fuzz(crash_market(bars=800), CONFIG, 1, num_envs=1, seed=-1)


def test_parameters_vary_within_a_run():
    from perpjax.audit.draws import draw_params

    params = draw_params(np.random.default_rng(0), 100)
    for field in dataclasses.fields(params):
        assert len(np.unique(getattr(params, field.name))) > 1, field.name
