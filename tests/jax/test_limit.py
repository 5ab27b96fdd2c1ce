"""The benchmark's hand-written loop is held to the environment it is compared with: every field, after every step.

XLA and numba both contract multiply-adds, not always the same ones, so a number to be rounded that lies on a jump may
fall on either side of it: a level, a fill or a quantity is then one tick or step off. Such near-ties are counted. They
may be TIES of all steps of an environment (measured: 2e-5), and never more than that tick.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import jax
import numba
import numpy as np
import pytest
from markets import FREE, HAND, all_bars, crash_market, hand_market, order, stacked

from benchmarks import limit as module
from benchmarks.limit import Limit, read_field
from perpjax import AutoReset, EnvConfig, EnvParams, Instrument, PerpEnv, State, Verdict, concatenate_markets
from perpjax.audit.draws import draw_actions
from perpjax.rules.orders import CLOSE, DIRECTIONS, LEVERAGES, LONG, SIZES
from perpjax.state import EVENTS, SUMS

pytestmark = pytest.mark.usefixtures("quick_compilation")

ENVS, TIES = 256, 1e-4
LENGTHS = {"wild": (90, 110, 100, 120, 80, 150, 130, 70, 60, 90), "rich": (150, 140)}
"""Steps of each run; 1000, and 290."""
LEVELS = {"entry", "stop", "target", "liquidation", "quantity"}
"""Whole ticks, or steps."""
FRACTIONS = {"obs": 1e-5, "final_obs": 1e-5, "reward": 1e-6, "return_": 1e-6, "max_drawdown": 1e-6}
"""To what that which is no money agrees; money agrees to 1e-6 of equity, or of itself where it has grown larger."""
MONEY = {"equity", "liquidation_value", "wallet", "margin", "peak", *SUMS}


STEEP = Instrument("STEEP", 1.0, 1e-3, 150.0, 5.0, maintenance_fee_rate=6e-4, brackets=HAND.brackets)
PARAMS = {
    # Everything that can happen to a lot happens.
    "wild": EnvParams(initial_equity=1000.0, max_exposure=0.5, max_hold=12, max_leverage=60.0, ruin_fraction=0.4),
    # Orders that reach the upper brackets, their cap and the largest quantity.
    "rich": EnvParams(initial_equity=3e5, max_exposure=0.9, max_hold=12, max_leverage=40.0),
}


@functools.cache
def make_env(kind: str) -> PerpEnv:
    """Wild markets of two segments, with a mark of their own that has parts of ticks."""
    markets = [crash_market(bars=1000, seed=seed, wild=True) for seed in (1, 2)]
    market = concatenate_markets([m.replace(instruments=stacked(STEEP)) for m in markets])
    return PerpEnv(market, PARAMS[kind], EnvConfig(max_lots=3, episode_length=120))


@jax.jit
def reset(env: PerpEnv | AutoReset, seed: int) -> State:
    return jax.vmap(env.reset)(jax.random.split(jax.random.key(seed), ENVS))


@jax.jit
def reset_at(env: AutoReset, starts: np.ndarray) -> State:
    return jax.vmap(env.reset, (None, 0))(jax.random.key(0), starts)


@jax.jit
def advance(env: PerpEnv | AutoReset, state: State, actions: np.ndarray) -> State:
    return jax.vmap(env.step)(state, actions)


Fields = dict[str, np.ndarray]
"""Fields of a batch of states by name; the batch may be one of several steps, one after the other."""


def play(env: PerpEnv | AutoReset, steps: int) -> Iterator[tuple[State, np.ndarray, State]]:
    """Steps of random traders, who close more often than most, all of them anew: state, actions, state."""
    state, rng = reset(env, steps), np.random.default_rng(steps)
    actions = draw_actions(rng, EnvConfig(), steps, ENVS)
    actions[rng.random((steps, ENVS)) < 0.1, 0] = DIRECTIONS.index(CLOSE)
    for action in actions:
        stepped = advance(env, state, action)
        yield state, action, stepped
        state = stepped


def play_beside(env: PerpEnv | AutoReset, steps: int) -> tuple[Fields, Fields, Fields]:
    """What the environment was in before each step, what it was in then, and what the limit made of the same state."""
    limit, batches = Limit(env), []
    for state, action, stepped in play(env, steps):
        limit.load(state)
        limit.step(action)
        batches.append((read_state(limit.fields, state), read_state(limit.fields, stepped), read_all(limit)))
    joined = [
        {name: np.concatenate([x[name] for x in column]) for name in limit.fields}
        for column in zip(*batches, strict=True)
    ]
    return tuple(joined)


def read_all(limit: Limit) -> Fields:
    return {name: limit.read(name).copy() for name in limit.fields}


def read_state(names: Iterable[str], state: State) -> Fields:
    return {name: read_field(state, name) for name in names}


def errors(got: Fields, wanted: Fields) -> Fields:
    """By field, the largest error of each environment over its tolerance; a tick or step of a level counts as 2."""
    got, wanted = sum_up(got), sum_up(wanted)
    equity = np.maximum(np.abs(wanted["equity"]), 1)
    found = {}
    for name, x in wanted.items():
        kind, error = name.rpartition(".")[2], np.abs(got[name] - x)
        if kind in MONEY:
            error = error / (1e-6 * np.maximum(equity.reshape(-1, *[1] * (x.ndim - 1)), np.abs(x)))
        elif kind in FRACTIONS:
            error = error / FRACTIONS[kind]
        else:
            error = 2 * error if kind in LEVELS else np.where(error > 0, np.inf, 0)
        found[name] = error.reshape(len(x), -1).max(axis=1)
    return found


def sum_up(fields: Fields) -> Fields:
    """All fields in float64, each two-float sum as one number."""
    fields = {name: x.astype(np.float64) for name, x in fields.items()}
    for name in [n for n in fields if n.endswith("ledger.low")]:
        for i, low in enumerate(fields.pop(name).T):
            fields[name.replace("low", SUMS[i])] += low
    fields["account.wallet"] += fields.pop("account.wallet_low")
    return fields


def near_ties(found: Fields) -> int:
    """How many environments differ; what differs is a tick's worth."""
    for name, error in found.items():
        most = 2 if name.rpartition(".")[2] in LEVELS else 1000
        assert error.max() <= most, (name, error.max(), (error > 1).sum())
    return int((np.max(list(found.values()), axis=0) > 1).sum())


def count_low_parts(before: Fields, wanted: Fields, got: Fields) -> np.ndarray:
    """By sum of money, how often it moved and has a low part, and how often the limit's is the same to the bit."""
    lows = {"account.wallet": lambda fields: fields["account.wallet_low"]}
    lows |= {f"account.ledger.{n}": lambda fields, i=i: fields["account.ledger.low"][:, i] for i, n in enumerate(SUMS)}
    counts = []
    for name, low in lows.items():
        moved = (before[name] != wanted[name]) & (low(wanted) != 0)
        counts.append((moved.sum(), (low(got) == low(wanted))[moved].sum()))
    return np.array(counts)


def happened(before: Fields, after: Fields) -> dict[str, int]:
    """How often each thing that can happen to an account happened in a step."""
    change = {name.rpartition(".")[2]: after[name] - before[name] for name in after if ".ledger." in name}
    closing = (change["refused"][:, Verdict.ACCEPTED] > 0) & (change["opened"] == 0)
    return {
        **{name: int(change[name].sum()) for name in EVENTS},
        **{v.name: int(change["refused"][:, v].sum()) for v in Verdict},
        **{name: int((change[name] > 0).sum()) for name in ("slippage", "gap_losses", "forgiven")},
        "paid": int((change["funding"] > 0).sum()),
        "received": int((change["funding"] < 0).sum()),
        "stop before close": int(change["stopped"][closing].sum()),
        "gapped stop before close": int((change["gap_losses"][closing] > 0).sum()),
        "target before close": int(change["targets"][closing].sum()),
        "absorbed": int((before["terminated"] | before["truncated"]).sum()),
        "terminated": int(after["terminated"].sum()),
    }


NEVER = {
    "wild": {"MAX_NOTIONAL"},
    "rich": {"terminated", "liquidated", "BELOW_MINIMUM", "IMMEDIATE_LIQUIDATION", "forgiven"}
    | {"stop before close", "gapped stop before close", "target before close"},
}
"""What happens less than 50 times in a run."""


@pytest.mark.parametrize("kind, never", NEVER.items())
def test_every_step_is_the_environments_step(kind, never):
    counts, low_parts, ties, steps = collections.Counter(), 0, 0, 0
    for length in LENGTHS[kind]:
        before, wanted, got = play_beside(make_env(kind), length)
        ties += near_ties(errors(got, wanted))
        counts.update(happened(before, wanted))
        low_parts += count_low_parts(before, wanted, got)
        steps += length
    assert ties <= TIES * steps * ENVS
    assert {name for name, n in counts.items() if n < 50} <= never, counts
    moved, same = low_parts.T  # what is lost or wrong is never the same
    assert (same >= 0.65 * moved).all() and (moved.all() or kind == "rich"), low_parts


@pytest.mark.parametrize("step", [0.09, 9e-7])
def test_quantity_that_rounding_makes_less_than_whole_is_whole(step):
    """0.09 in float32 is a little more than that, and a third of the quotients fall short of a whole number of steps.

    Steps of 9e-7 are so many that the slack would be more than one if it were not half a step at most.
    """
    prices = [p for p in range(100, 10_001) if 10**6 % p == 0]
    flat = {(t, k): (p,) * 4 for t, p in enumerate(prices, 1) for k in range(3)}
    market = hand_market(both=flat, bars=len(prices) + 8, instrument=dataclasses.replace(HAND, step_size=step))
    env = PerpEnv(market, FREE.replace(initial_equity=9000.0), EnvConfig(max_lots=3, episode_length=6))
    orders = [order(LONG, *x) for x in itertools.product(SIZES, LEVERAGES)]
    starts, chosen = (x.ravel() for x in np.meshgrid(np.arange(1, len(prices) + 1), np.arange(len(orders))))
    state = jax.jit(jax.vmap(env.reset, (None, 0)))(jax.random.key(0), starts)
    actions = np.array(orders)[chosen]
    limit = Limit(env)
    limit.load(state)
    limit.step(actions)
    wanted = read_state(limit.fields, advance(env, state, actions))
    assert not near_ties(errors(read_all(limit), wanted))
    lots = {name: wanted[f"account.lots.{name}"][:, 0] for name in ("quantity", "entry", "leverage")}
    margin = np.float32([SIZES[i] for i in actions[:, 1]]) * (env.params.max_exposure * env.params.initial_equity)
    steps = margin * lots["leverage"] / (lots["entry"] * market.instrument.tick_value)
    assert (np.floor(steps) < lots["quantity"]).sum() > 20


def test_free_run_ends_where_the_environment_ends():
    env, steps = make_env("wild"), 125
    limit, played = Limit(env), list(play(env, steps))
    limit.load(played[0][0])
    for _, action, _ in played:
        limit.step(action)
    found = errors(read_all(limit), read_state(limit.fields, played[-1][2]))
    assert (np.max(list(found.values()), axis=0) > 1).sum() <= TIES * steps * ENVS


def test_auto_reset_is_the_wrappers():
    """But for the first bar of a new episode: there the rest is what the environment begins with at that bar."""
    env = AutoReset(make_env("wild"))
    _, wanted, got = play_beside(env, 600)
    done = wanted["terminated"] | wanted["truncated"]
    fresh = read_state(wanted, reset_at(env, np.where(done, got["t"], wanted["t"])))
    for name in ("t", "end", "obs", "equity", *(n for n in wanted if n.startswith("account"))):
        wanted[name] = np.where(done.reshape(-1, *[1] * (wanted[name].ndim - 1)), fresh[name], wanted[name])
    assert near_ties(errors(got, wanted)) <= TIES * 600 * ENVS
    assert done.sum() > 400
    lots_left = wanted["episode.liquidation_value"] != wanted["episode.equity"]
    assert (lots_left & done).sum() > 100 and not (lots_left & ~done).any()


def test_first_bars_are_uniform():
    """Each leaves room for an episode, and eighths of all such bars are drawn equally often (5 sigma)."""
    env = make_env("wild")
    limit, drawn = Limit(AutoReset(env)), []
    limit.load(reset(AutoReset(env), 0))
    for action in draw_actions(np.random.default_rng(0), EnvConfig(), 500, ENVS):
        limit.step(action)
        drawn.append(limit.read("t")[limit.read("terminated") | limit.read("truncated")])
    drawn, segments = np.concatenate(drawn), jax.tree.map(np.asarray, env.market.segments)
    spans = zip(segments.first, segments.last + 2 - env.config.episode_length, strict=True)
    room = np.concatenate([np.arange(*span) for span in spans])
    assert np.isin(drawn, room).all() and len(np.unique(drawn)) > 0.9 * len(room)
    counts, expected = np.bincount(8 * np.searchsorted(room, drawn) // len(room), minlength=8), len(drawn) / 8
    assert expected > 200 and np.abs(counts - expected).max() < 5 * np.sqrt(expected), counts


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_anything(threads):
    """Each environment is the same whatever thread steps it."""
    env = make_env("wild")
    many = 2 * ENVS + 1
    few, state = Limit(env), reset(env, 0)
    few.load(state)
    rows = np.arange(many) % ENVS
    all_ = Limit(env)
    all_.load(jax.tree.map(lambda x: x[rows], state))
    before = numba.get_num_threads()
    for action in draw_actions(np.random.default_rng(0), EnvConfig(), 20, ENVS):
        numba.set_num_threads(1)
        few.step(action)
        numba.set_num_threads(threads)
        all_.step(action[rows])
    numba.set_num_threads(before)
    for name in few.fields:
        np.testing.assert_array_equal(all_.read(name), few.read(name)[rows], err_msg=name)


def test_marks_have_parts_of_ticks():
    rows = module.pack_market(make_env("wild").market)[:-1]
    for marks in (rows["mark"]["open"], rows["mark"]["close"], rows["before"], rows["funding_price"]):
        assert (marks % 1 != 0).mean() > 0.9
    for levels in (rows["mark"]["high"], rows["mark"]["low"], rows["last"]["open"], rows["last"]["close"]):
        levels = levels[np.isfinite(levels)]
        np.testing.assert_array_equal(levels, np.round(levels))


def test_market_without_a_mark_is_marked_to_the_last_price():
    """One layout of prices under two names; the loop does not know."""
    market = crash_market(candles=3, has_mark=False)
    rows = module.pack_market(market)
    assert rows.dtype.fields["mark"] == rows.dtype.fields["last"]
    np.testing.assert_array_equal(rows["mark"]["close"][:-1], np.asarray(all_bars(market).mark_close)[:, -1])


def test_loop_is_float32_throughout():
    assert not any("double" in x for x in module._step_some.inspect_llvm().values())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(config=EnvConfig(intrabar="optimistic", episode_length=9)), "default config"),
        (dict(config=EnvConfig(max_lots=32, episode_length=9)), "max_lots = 32 is more than the limit's 31"),
        (dict(params=EnvParams(taker_fee=[0.0, 1e-3])), "with a batch axis: taker_fee"),
    ],
)
def test_what_the_loop_does_not_do_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Limit(make_env("wild").replace(**change))


def test_states_beyond_the_market_are_refused():
    state = reset(make_env("wild"), 0)
    with pytest.raises(ValueError, match=r"state 0 is at bar \d+ of an episode to \d{5}: not within 1 .. 2001"):
        Limit(make_env("wild")).load(state.replace(end=state.end + 10_000))


def test_actions_of_another_kind_are_refused():
    limit = Limit(make_env("wild"))
    limit.load(reset(make_env("wild"), 0))
    for actions in (np.zeros((ENVS, 5), np.int64), np.zeros((ENVS - 1, 5), np.int32), np.zeros((ENVS, 4), np.int32)):
        with pytest.raises(ValueError, match=rf"actions are \[{ENVS}, 5\] int32, not"):
            limit.step(actions)
