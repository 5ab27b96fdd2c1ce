"""`VecEnv`: a batch whose lots have the batch on the last axis is the batch that `jax.vmap` makes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, assert_same_states, crash_market, hand_market, order

from perpjax import AutoReset, EnvConfig, EnvParams, PerpEnv, State, VecEnv
from perpjax.rules.orders import MULTI_DISCRETE, Verdict
from perpjax.state import EVENTS
from perpjax.vec import with_layout
from perpjax.xla import Program
from perpjax.xla.kernels import MANY

pytestmark = pytest.mark.usefixtures("quick_compilation")

FEW, BARS = 19, 40


def without_custom_vmap(env: AutoReset, state: State, action: jax.Array) -> State:
    """One step of one environment: under `jax.vmap` its operations are batched one by one."""
    return env._advance(state, action, Program("cpu"))


def make_env(lots: int = 4) -> AutoReset:
    params = EnvParams(max_exposure=0.5, max_leverage=20.0, max_hold=3)
    return AutoReset(PerpEnv(crash_market(bars=760), params, EnvConfig(max_lots=lots, episode_length=12)))


@pytest.mark.parametrize(
    ("lots", "size", "chunk"),
    [(4, 19, None), (4, MANY, None), (4, 3 * MANY, MANY), (2, MANY, None)],
    ids=["all slots at once", "slot by slot", "in chunks", "slot by slot, full accounts"],
)
def test_vec_env_equals_vmap(lots, size, chunk):
    # On a CPU many environments go through the slots of their lots in a loop, and too many for its caches in chunks.
    env = make_env(lots)
    same = np.arange(size) % FEW
    keys = jax.random.split(jax.random.key(3), FEW)[same]
    actions = np.random.default_rng(5).integers(0, MULTI_DISCRETE, (BARS, FEW, 5)).astype(np.int32)

    @jax.jit
    def run(env: VecEnv, keys: jax.Array, actions: jax.Array) -> State:
        return jax.lax.scan(lambda s, a: (env.step(s, a), s.account.lots.quantity), env.reset(keys), actions)

    one_by_one = jax.jit(jax.vmap(without_custom_vmap, (None, 0, 0)))
    state, quantity = run(VecEnv(env, chunk_size=chunk), keys, actions[:, same])
    wanted = jax.vmap(env.reset)(keys[:FEW])
    for i, action in enumerate(actions):
        np.testing.assert_allclose(quantity[i].T, wanted.account.lots.quantity[same])
        wanted = one_by_one(env, wanted, action)
    assert wanted.resets.min() > 2 and wanted.episode.ledger.opened.sum() > 0
    # Three slots were in use, or all of two.
    assert (quantity[:, 2] > 0).any() if lots > 2 else (quantity > 0).all(1).any()
    assert state.account.lots.quantity.shape == (lots, size)
    assert state.account.ledger.verdicts.shape == (len(Verdict), size)
    expected = jax.tree.map(lambda x: x[same], wanted)
    assert_same_states(VecEnv.by_row(state), expected)
    for name in (*EVENTS, "verdicts"):
        got, want = (getattr(x.account.ledger, name) for x in (VecEnv.by_row(state), expected))
        chex.assert_trees_all_equal(got, want)


def test_rows_of_a_stacked_state():
    env = VecEnv(make_env(4))
    keys = jax.random.split(jax.random.key(1), FEW)
    actions = np.random.default_rng(2).integers(0, MULTI_DISCRETE, (BARS, FEW, 5)).astype(np.int32)
    state, each = jax.lax.scan(lambda s, a: (env.step(s, a), s.episode), env.reset(keys), actions)
    by_row = env.by_row(state)
    assert by_row.account.lots.entry.shape == (FEW, 4) and by_row.account.ledger.verdicts.shape == (FEW, len(Verdict))
    chex.assert_trees_all_equal(with_layout(by_row, -2), state)
    chex.assert_trees_all_equal(env.by_row(by_row), by_row)
    assert state.episode.ledger.opened.sum() > 0
    each = jax.tree.map(np.asarray, each)
    assert each.ledger.verdicts.shape == (BARS, len(Verdict), FEW)
    np.testing.assert_array_equal(each.ledger.verdicts[3].T, each.ledger.verdicts.swapaxes(1, 2)[3])


def test_a_state_taken_out_of_a_vec_env_goes_on_alone():
    env = make_env(4)
    state = VecEnv(env).reset(jax.random.split(jax.random.key(1), 3))
    action = jnp.asarray([1, 0, 4, 0, 0], jnp.int32)
    many = jax.jit(jax.vmap(env.step, (VecEnv.axes(state), None), VecEnv.axes(state)))
    alone = jax.jit(env.step)
    # By the axes, as `jax.vmap` would, and by row.
    one = jax.tree.map(lambda axis, x: x[1] if axis == 0 else x[..., 1], VecEnv.axes(state), state)
    other = jax.tree.map(lambda x: x[1], VecEnv.by_row(state))
    for _ in range(14):
        state, one, other = many(state, action), alone(one, action), alone(other, action)
    assert other.resets == 1 and other.episode.ledger.opened > 0
    row = jax.tree.map(lambda x: x[1], VecEnv.by_row(state))
    for got in (one, row, VecEnv.one(state, 1), VecEnv.one(state, -2), jax.jit(VecEnv.one)(state, 1)):
        chex.assert_trees_all_close(*(jax.tree.leaves(x.account.lots) for x in (got, other)), rtol=1e-6)
        assert got.episode.ledger.opened == other.episode.ledger.opened and got.t == other.t


@pytest.mark.parametrize("size", [3, MANY])
def test_a_lot_liquidated_at_the_open_leaves_an_empty_slot(size):
    # The mark opens bar 2 at 905 <= L = 909. No account holds another lot, so no slot is in use any more.
    market = hand_market(mark={(2, 0): (905, 905, 905, 905)}, atr=100)
    env = VecEnv(PerpEnv(market, FREE, EnvConfig(max_lots=3, episode_length=6)))
    state = env.reset(jax.random.split(jax.random.key(1), size), np.full(size, 1))
    opened = env.step(state, np.tile(order(1), (size, 1)))
    closed = env.step(opened, np.zeros((size, 5), np.int32))
    assert (opened.account.lots.quantity[0] > 0).all() and (closed.account.ledger.liquidated == 1).all()
    assert not any(np.any(x) for x in jax.tree.leaves(closed.account.lots))


def test_one_environment_of_many_is_named_by_its_number():
    env = VecEnv(AutoReset(PerpEnv(hand_market(atr=100), FREE, EnvConfig(max_lots=3, episode_length=4))))
    state = env.reset(jax.random.split(jax.random.key(1), 3), np.array([1, 2, 3]))
    actions = np.array([[0] * 5, [1, 3, 4, 3, 4], [2, 0, 4, 3, 4]], np.int32)
    state = env.step(state, actions)
    sides = [float(VecEnv.one(state, i).account.lots.side[0]) for i in range(3)]
    assert sides == [0, 1, -1]
    assert [int(VecEnv.one(state, i).t) for i in range(3)] == [2, 3, 4]
    for i in (3, -4, 10**6):
        with pytest.raises(IndexError, match=f"environment {i} is not one of 3"):
            VecEnv.one(state, i)


@pytest.mark.parametrize("wrap", [lambda e: e, AutoReset], ids=["bare", "auto-reset"])
def test_a_vec_env_steps_rows_and_keeps_them_rows(wrap):
    env = VecEnv(wrap(make_env(4).env))
    state = env.reset(jax.random.split(jax.random.key(1), FEW))
    rows = env.by_row(state)
    for action in np.random.default_rng(2).integers(0, MULTI_DISCRETE, (15, FEW, 5)).astype(np.int32):
        state, rows = env.step(state, action), env.step(rows, action)
    assert rows.account.lots.entry.shape == (FEW, 4) and rows.account.ledger.opened.sum() > 0
    chex.assert_trees_all_equal(env.by_row(state), rows)


def test_a_vec_env_wants_an_action_for_each_environment():
    env = VecEnv(make_env(4))
    state = env.reset(jax.random.split(jax.random.key(1), 3))
    assert int(env.step(state, [[0] * 5] * 3).t[0]) == int(state.t[0]) + 1
    for shape in ((5,), (2, 5), (4, 5)):
        with pytest.raises(ValueError, match="for 3 environments"):
            env.step(state, np.zeros(shape, np.int32))
    with pytest.raises(ValueError, match=r"VecEnv\.one"):
        env.env.env.liquidation_value(state)


def test_vec_env_resets_to_given_bars():
    env = make_env()
    starts, key = jnp.arange(680, 686), jax.random.key(0)
    states = VecEnv(env).reset(jnp.repeat(key, 6), starts)
    np.testing.assert_array_equal(states.t, starts)
    alone = env.reset(key, 683)
    np.testing.assert_array_equal(states.obs[3], alone.obs)
    assert states.account.lots.side.shape == (4, 6)
