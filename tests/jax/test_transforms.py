"""jit, vmap, scan, grad-free: the environment under JAX's transformations, and one trace for all of it."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HOLD, assert_same_states, crash_market, expect, hand_market, order, play, reset, step

from perpjax._pytree import Host
from perpjax.env import PerpEnv
from perpjax.market import Market
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.orders import CLOSE, MULTI_DISCRETE
from perpjax.state import State
from perpjax.xla import Program, rows, where_rows
from perpjax.xla.kernels import MANY
from perpjax.xla.rows import prefetch_row

CONFIG = EnvConfig(max_lots=4, episode_length=50)
CPU = Program("cpu", 4)
PARAMS = EnvParams(max_exposure=0.5, max_leverage=20.0)


def unkeyed(state: State) -> State:
    return state.replace(key=jax.random.key_data(state.key))


@pytest.fixture(scope="module")
def env() -> PerpEnv:
    return PerpEnv(crash_market(bars=760), PARAMS, CONFIG)


batched = jax.jit(jax.vmap(PerpEnv.step, (None, 0, 0)))


def random_actions(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MULTI_DISCRETE, (*shape, 5)).astype(np.int32)


def test_jit_equals_no_jit():
    # Eight eventful bars: funding, a stop, a liquidation, an opening gap, a close, a timeout.
    market = hand_market(
        both={(3, 1): (1000, 1000, 940, 1000), (4, 0): (900, 900, 900, 900)},
        mark={(5, 2): (1000, 1010, 1000, 1010)},
        funding={2: (0.001, 1005)},
        invalid=[(2, 1)],
        atr=100,
    )
    actions = [
        order(1, size=0.25, stop=0.5),
        order(1, size=0.5, stop=3.0),
        HOLD,
        order(-1, leverage=2.0, stop=3.0),
        order(CLOSE),
        order(-1),
    ]
    params = EnvParams(max_hold=3)
    jitted = play(market, *actions, params=params)
    with jax.disable_jit():
        plain = PerpEnv(market, params, EnvConfig(max_lots=3, episode_length=6))
        state = plain.reset(jax.random.key(0), 1)
        for action, expected in zip(actions, jitted[1:], strict=True):
            state = plain.step(state, jnp.asarray(action))
            chex.assert_trees_all_close(unkeyed(state), unkeyed(expected), rtol=1e-5, atol=1e-5)
            ledgers = (state.account.ledger, expected.account.ledger)
            for name in ("opened", "stopped", "liquidated", "closed", "timed_out", "verdicts", "ambiguous"):
                chex.assert_trees_all_equal(*(getattr(x, name) for x in ledgers))
    expect(jitted[-1], opened=4, stopped=1, liquidated=1, closed=1)


def test_vmap_equals_a_loop(env):
    n, bars = 6, 25
    starts, actions = np.arange(680, 680 + n), random_actions((bars, n))
    many = jax.vmap(lambda s: env.reset(jax.random.key(0), s))(jnp.asarray(starts))
    singles = [reset(env, s) for s in starts]
    for action in actions:
        many = batched(env, many, action)
        singles = [step(env, s, a) for s, a in zip(singles, action, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[unkeyed(s) for s in singles])
    together = unkeyed(many)
    chex.assert_trees_all_close(together, stacked, rtol=2e-5, atol=1e-4)
    for name in ("opened", "stopped", "targets", "liquidated", "closed", "verdicts"):
        a, b = (getattr(x.account.ledger, name) for x in (together, stacked))
        chex.assert_trees_all_equal(a, b)
        assert name in ("targets", "liquidated", "closed") or a.sum() > 0


def test_vmap_over_params_equals_separate_environments(env):
    fees, leverages = np.float32([0.0, 0.0006, 0.01]), np.float32([5, 20, 50])
    mixed = PerpEnv(env.market, PARAMS.replace(taker_fee=fees, max_leverage=leverages, max_hold=[2, 192, 5]), CONFIG)
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, mixed.params)

    @jax.jit
    def together(params: EnvParams, actions: jax.Array) -> State:
        def run(params: EnvParams) -> State:
            varied = env.replace(params=params)
            first = varied.reset(jax.random.key(0), jnp.int32(690))
            return jax.lax.scan(lambda s, a: (varied.step(s, a), None), first, actions)[0]

        return jax.vmap(run, (axes,))(params)

    actions = random_actions((20,), seed=4)
    got = together(mixed.params, actions)
    for i in range(3):
        alone = env.replace(
            params=PARAMS.replace(taker_fee=fees[i], max_leverage=leverages[i], max_hold=[2, 192, 5][i])
        )
        state = reset(alone, 690)
        for action in actions:
            state = step(alone, state, action)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], unkeyed(got)), unkeyed(state), rtol=2e-5, atol=1e-4
        )
    assert len({float(x) for x in got.account.ledger.fees}) == 3


def test_nested_vmap_equals_a_flat_one(env):
    states = jax.vmap(lambda s: env.reset(jax.random.key(0), s))(jnp.arange(680, 686))
    actions = jnp.asarray(random_actions((6,)))
    flat = batched(env, states, actions)

    def fold(tree: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), tree)

    nested = jax.jit(jax.vmap(jax.vmap(PerpEnv.step, (None, 0, 0)), (None, 0, 0)))(env, fold(states), fold(actions))
    chex.assert_trees_all_close(unkeyed(nested), unkeyed(fold(flat)), rtol=1e-6)


@pytest.mark.parametrize("size", [MANY, MANY + 1])
def test_a_large_batch_equals_small_ones(env, size):
    # On a CPU a large batch goes through its lots slot by slot.
    wild = env.replace(params=PARAMS.replace(max_hold=3))
    few = 19
    states = jax.vmap(lambda s: wild.reset(jax.random.key(0), s))(680 + jnp.arange(size) % few)
    actions = random_actions((12, few))[:, np.arange(size) % few]
    many, some = states, jax.tree.map(lambda x: x[:few], states)
    for action in actions:
        many, some = batched(wild, many, action), batched(wild, some, action[:few])
    ledger = some.account.ledger
    assert min(x.sum() for x in (ledger.opened, ledger.timed_out, ledger.stopped, ledger.closed)) > 0
    expected = jax.tree.map(lambda x: x[np.arange(size) % few], some)
    assert_same_states(many, expected)


def test_a_batch_of_markets_equals_each_of_them():
    markets = [crash_market(bars=760, seed=seed) for seed in (0, 1)]
    pair = jax.tree.map(lambda *x: jnp.stack(x), *markets)
    actions = random_actions((20,), seed=2)

    @jax.jit
    def run(market: Market, actions: jax.Array) -> State:
        env = PerpEnv(market, PARAMS, CONFIG)
        first = env.reset(jax.random.key(0), jnp.int32(690))
        return jax.lax.scan(lambda s, a: (env.step(s, a), None), first, actions)[0]

    together = jax.vmap(run, (0, None))(pair, actions)
    for i, market in enumerate(markets):
        alone = run(market, actions)
        assert alone.account.ledger.opened > 0
        got = jax.tree.map(lambda x, i=i: x[i], unkeyed(together))
        chex.assert_trees_all_close(got, unkeyed(alone), rtol=2e-5, atol=1e-4)
    assert together.equity[0] != together.equity[1]


def test_one_trace_for_any_steps_and_another_market():
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(PerpEnv.step, n=1))
    first = crash_market(bars=760, seed=0)
    second = crash_market(bars=760, seed=1)
    second = second.replace(
        origins=(second.origins[0]._replace(symbol="OTHER", start_ms=900_000),), feature_names=("x", "y")
    )
    assert Host(a=1) == Host(a=2) and hash(Host(a=1)) == hash(Host())
    for market in (first, second):
        env = PerpEnv(market, PARAMS, CONFIG)
        state = env.reset(jax.random.key(0), 680)
        for action in random_actions((10,)):
            state = counted(env, state, jnp.asarray(action))
    # Other numbers, given as Python floats, ints or numpy values, are no new trace; nor is an explicit start.
    for params in (
        EnvParams(taker_fee=0, max_hold=5),
        EnvParams(max_leverage=np.float64(3)),
        PARAMS.replace(stop_depth=1),
    ):
        env = PerpEnv(first, params, CONFIG)
        counted(env, env.reset(jax.random.key(1)), jnp.asarray(HOLD))


def test_step_maps_avals_to_identical_avals(env):
    state = reset(env, 680)
    once = jax.eval_shape(PerpEnv.step, env, state, jnp.asarray(HOLD))
    twice = jax.eval_shape(PerpEnv.step, env, once, jnp.asarray(HOLD))
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (state, once, twice)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)
        assert not any(getattr(x, "weak_type", False) for x in (a, b, c))
    assert jax.tree.structure(state) == jax.tree.structure(once)
    eager = env.reset(jax.random.key(0), 680)
    chex.assert_trees_all_equal_shapes_and_dtypes(unkeyed(eager), unkeyed(state))
    assert not any(getattr(x, "weak_type", False) for x in jax.tree.leaves(eager))
    # The environment is a pytree all of whose leaves are arrays on the device.
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(env))


def test_donated_states_are_reused(env):
    donating = jax.jit(jax.vmap(PerpEnv.step, (None, 0, 0)), donate_argnums=1)
    states = jax.vmap(lambda s: env.reset(jax.random.key(0), s))(jnp.arange(680, 686))
    actions = jnp.asarray(random_actions((6,)))
    expected = jax.device_get(unkeyed(batched(env, states, actions)))
    got = donating(env, states, actions)
    assert states.account.wallet.is_deleted()
    chex.assert_trees_all_equal(jax.device_get(unkeyed(got)), expected)


def test_prefetching_a_row_changes_no_index():
    table = jax.random.normal(jax.random.key(0), (50, 64)).at[7, 16].set(jnp.nan).at[8, 32].set(-jnp.inf)
    index = jnp.asarray([[0, 7, 8], [49, 50, -1]])
    prefetched = jax.jit(lambda i: prefetch_row(table, i, slice(0, 64), CPU))
    np.testing.assert_array_equal(prefetched(index), index)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(prefetched))(index), index)
    np.testing.assert_array_equal(prefetch_row(table, index, slice(0, 0), CPU), index)


@pytest.mark.parametrize("look", [1, 3, 16])
@pytest.mark.parametrize("program", [CPU, dataclasses.replace(CPU, loops=False), Program("gpu", 4)], ids=str)
def test_where_rows_computes_the_rows_that_ask(look, program, monkeypatch):
    monkeypatch.setattr(rows, "LOOK", look)
    x, y, z = jnp.arange(4.0), 10 + jnp.arange(8.0).reshape(2, 4), jnp.float32(5)

    @jax.jit
    def run(p: jax.Array) -> tuple[jax.Array, jax.Array]:
        def new(old: tuple, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
            return old[0] * 2, old[1] + y + z

        return where_rows(p, new, (x, y), y, z, program=program, axes=((0, -1), 1, None))

    for p in (jnp.zeros(4, bool), jnp.ones(4, bool), jnp.array([True, False, False, True])):
        chex.assert_trees_all_equal(run(p), (jnp.where(p, x * 2, x), jnp.where(p, 2 * y + z, y)))


def test_garbage_actions_never_make_a_nan():
    env = PerpEnv(
        crash_market(bars=900),
        PARAMS.replace(ruin_fraction=0.0),
        EnvConfig(actions="box5", max_lots=4, episode_length=200),
    )

    @jax.jit
    def rollout(env: PerpEnv, key: jax.Array) -> State:
        states = jax.vmap(env.reset)(jax.random.split(key, 8))

        def advance(states: State, key: jax.Array) -> tuple[State, State]:
            a, b, c, d = jax.random.split(key, 4)
            wild = jax.random.normal(a, (8, 5)) * 10.0 ** jax.random.randint(b, (8, 5), -3, 38)
            poison = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0, -0.0, 3.4e38, 1e-45])[
                jax.random.randint(c, (8, 5), 0, 7)
            ]
            actions = jnp.where(jax.random.uniform(d, (8, 5)) < 0.15, poison, wild)
            states = jax.vmap(env.step)(states, actions)
            return states, states

        return jax.lax.scan(advance, states, jax.random.split(key, 150))[1]

    states = rollout(env, jax.random.key(0))
    chex.assert_tree_all_finite(unkeyed(states))
    assert int(states.account.ledger.opened[-1].sum()) > 20
    refused = states.account.ledger.verdicts[-1].sum(0)
    assert int(refused[0]) > 300 and int(refused.sum()) == 8 * 150


def test_integer_garbage():
    big = np.iinfo(np.int32)
    states = play(hand_market(), *[np.full(5, x, np.int32) for x in (big.max, big.min, -1, 2)], params=FREE)
    for state in states:
        chex.assert_tree_all_finite(unkeyed(state))
