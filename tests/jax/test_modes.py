"""The environment under JAX's switches and transformations: the same results, or one clear line."""

import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, assert_same_states, crash_market, hand_market, order

from perpjax import AutoReset, EnvConfig, EnvParams, PerpEnv, State, VecEnv
from perpjax._pytree import pytree
from perpjax.params import RANGES
from perpjax.rollout import play_windows
from perpjax.rules.rewards import Outcome
from perpjax.xla.kernels import MANY

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOX = EnvConfig(actions="box5", max_lots=3, episode_length=20)
WILD = EnvParams(max_exposure=0.5, max_leverage=20.0, max_hold=5)
LONG = np.float32([1.0, 0.5, 0.2, 0.3, 0.3])


@pytest.fixture(scope="module")
def env() -> PerpEnv:
    return PerpEnv(crash_market(bars=760), WILD, BOX)


# SWITCHES: each in a process of its own, because they are global.

PROGRAM = """
import json, sys
import jax, numpy as np
jax.config.update(sys.argv[1], sys.argv[2] == "True") if sys.argv[1] != "none" else None
from markets import crash_market
from perpjax import AutoReset, EnvConfig, EnvParams, PerpEnv, VecEnv, load_market

assert load_market("synthetic:crash?bars=12000").num_bars
found = {}
for size in (3, 256):
    env = AutoReset(PerpEnv(crash_market(bars=760), EnvParams(max_exposure=0.5, max_leverage=20.0, max_hold=3),
                            EnvConfig(actions="box5", max_lots=3, episode_length=9, reward="shaped")))
    env, random = VecEnv(env), np.random.default_rng(0)
    state = env.reset(jax.random.split(jax.random.key(0), size))
    for _ in range(int(sys.argv[3])):
        state = env.step(state, random.uniform(-1, 1, (size, 5)).astype(np.float32))
    assert {str(x.dtype) for x in jax.tree.leaves(state.replace(key=None))} == {"bool", "float32", "int32"}
    ledger = state.account.ledger
    found[size] = [float(x.sum()) for x in (state.equity, state.obs, ledger.opened, ledger.verdicts, state.resets)]
print(json.dumps(found))
"""


def run(switch: str, value: bool, steps: int) -> dict[str, list[float]]:
    folder = pathlib.Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, switch, str(value), str(steps)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("switch", ["jax_enable_x64", "jax_debug_nans"])
def test_a_switch_of_jax_changes_no_result(switch):
    expected, got = run("none", True, 25), run(switch, True, 25)
    for size, numbers in expected.items():
        np.testing.assert_allclose(got[size], numbers, rtol=1e-6)
        assert numbers[2] > int(size) and numbers[4] >= 2 * int(size)


# UN-JITTED STEPS


@pytest.mark.parametrize("wrap", [lambda e: e, AutoReset], ids=["bare", "auto-reset"])
def test_a_second_step_of_the_same_shapes_compiles_nothing(env, wrap, caplog):
    env = wrap(env)
    state = env.step(env.reset(jax.random.key(0)), LONG)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        env.step(state, LONG)
    assert not [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]


# DERIVATIVES


@pytest.mark.parametrize("size", [3, MANY])
@pytest.mark.parametrize("wrap", [lambda e: e, AutoReset], ids=["bare", "auto-reset"])
def test_derivatives_through_a_vec_env_and_a_vmap(env, wrap, size):
    def through(many: bool, fee: jax.Array) -> jax.Array:
        inner = wrap(env.replace(params=WILD.replace(taker_fee=fee)))
        vec = VecEnv(inner)
        state = vec.reset(jax.random.split(jax.random.key(0), size))
        actions = jnp.broadcast_to(LONG, (size, 5))
        if many:
            return vec.step(state, actions).equity.sum()
        return jax.vmap(inner.step)(vec.by_row(state), actions).equity.sum()

    for many in (True, False):
        slope = jax.jit(jax.grad(lambda fee: through(many, fee)))(jnp.float32(0.001))  # noqa: B023
        low, high = (float(through(many, jnp.float32(x))) for x in (0.0009, 0.0011))
        assert slope < 0
        np.testing.assert_allclose(slope, (high - low) / 0.0002, rtol=0.02)


def test_derivatives_of_a_bare_step(env):
    state = env.reset(jax.random.key(0))

    def equity(fee: jax.Array) -> jax.Array:
        return env.replace(params=WILD.replace(taker_fee=fee)).step(state, LONG).equity

    slope = jax.grad(equity)(jnp.float32(0.001))
    np.testing.assert_allclose(slope, (equity(jnp.float32(0.0011)) - equity(jnp.float32(0.0009))) / 0.0002, rtol=0.02)
    slopes = jax.vmap(jax.grad(equity))(jnp.float32([0.001, 0.001]))
    np.testing.assert_allclose(slopes, [slope, slope], rtol=1e-6)


# SUBCLASSES


class Watcher(PerpEnv):
    """Observes the clock before the account, and is rewarded by the change of equity in quote."""

    def observe(self, t: jax.Array, view: jax.Array) -> jax.Array:
        return jnp.concatenate([t[None].astype(jnp.float32), view])

    def reward(self, outcome: Outcome) -> jax.Array:
        return jnp.maximum(outcome.change, -1.0) if outcome.change.ndim == 0 else jnp.nan


@dataclasses.dataclass(frozen=True, eq=False)
class Doubler(PerpEnv):
    """Wraps the step itself, and has a field of its own."""

    factor: float = 2.0

    def step(self, state: State, action: jax.Array) -> State:
        new = super().step(state, action)
        return new.replace(reward=self.factor * new.reward)


@pytree
class Halver:
    """A wrapper."""

    env: PerpEnv

    def reset(self, key: jax.Array, start: int | None = None) -> State:
        return self.env.reset(key, start)

    def step(self, state: State, action: jax.Array) -> State:
        new = self.env.step(state, action)
        return new.replace(reward=new.reward / 2)


@pytest.mark.parametrize("size", [3, MANY])
@pytest.mark.parametrize(
    "make", [Watcher, Doubler, lambda *x: Halver(PerpEnv(*x)), lambda *x: Halver(Watcher(*x))],
    ids=["own observation and reward", "own step", "wrapper", "wrapper of a subclass"],
)  # fmt: skip
def test_a_plain_subclass_or_wrapper_works_everywhere(make, size):
    env = make(crash_market(bars=760), WILD, BOX)
    assert jax.tree.structure(env) == jax.tree.structure(jax.tree.map(lambda x: x, env))
    vec = VecEnv(AutoReset(env))
    state = jax.jit(lambda env, keys: env.reset(keys))(vec, jax.random.split(jax.random.key(0), size))
    alone, step, single = vec.one(state, 1), jax.jit(lambda e, s, a: e.step(s, a)), jax.jit(AutoReset.step)
    actions = np.random.default_rng(0).uniform(-1, 1, (25, size, 5)).astype(np.float32)
    total = 0.0
    for action in actions:
        state, alone = step(vec, state, action), single(AutoReset(env), alone, action[1])
        total += abs(float(alone.reward))
        np.testing.assert_allclose(state.reward[1], alone.reward, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(vec.one(state, 1).obs, alone.obs, rtol=1e-4, atol=1e-5)
    assert total > 0 and alone.resets >= 1
    act = jax.tree_util.Partial(lambda key, state, carry: (jax.random.uniform(key, (5,), minval=-1), carry))
    episode = play_windows(env, act, jax.random.key(0), np.arange(680, 680 + 3))
    assert np.all(episode.length == 20)
    if isinstance(env, Watcher):
        assert state.obs[1, 0] == state.t[1]


def test_a_subclass_with_another_number_is_another_environment():
    market = crash_market(bars=760)
    step = jax.jit(lambda env, state: env.step(state, LONG).reward)
    rewards = [
        step(env, env.reset(jax.random.key(0)))
        for env in (Doubler(market, WILD, BOX), Doubler(market, WILD, BOX, factor=3.0), PerpEnv(market, WILD, BOX))
    ]
    np.testing.assert_allclose(rewards[:2], [2 * rewards[2], 3 * rewards[2]], rtol=1e-6)


# PARAMETERS WITH A BATCH AXIS

CHOICES = {
    "initial_equity": [5e3, 1e4, 2e4],
    "taker_fee": [0.0, 1e-3, 1e-2],
    "slippage_base": [0, 1e-3, 5e-3],
    "slippage_atr": [0, 0.2, 1.0],
    "stop_depth": [0, 0.5, 1],
    "max_exposure": [0.1, 0.5, 1],
    "max_leverage": [2, 10, 50],
    "max_hold": [1, 3, 9],
    "ruin_fraction": [0, 0.5, 0.99],
    "entry_penalty": [0, 1, 2],
    "risk_penalty": [0, 1, 2],
    "liquidation_penalty": [0, 1, 2],
    "ruin_penalty": [0, 1, 2],
}


def test_every_parameter_may_have_a_number_for_each_environment():
    assert list(CHOICES) == list(RANGES)
    base = PerpEnv(crash_market(bars=760), WILD, dataclasses.replace(BOX, reward="shaped"))
    actions = np.random.default_rng(1).uniform(-1, 1, (30, 3, 5)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 3)

    def play(env: VecEnv, keys: jax.Array, actions: jax.Array) -> State:
        return jax.lax.scan(lambda s, a: (env.step(s, a), None), env.reset(keys), actions)[0]

    run = jax.jit(play)
    single = [run(VecEnv(AutoReset(with_params(base, {n: x[i] for n, x in CHOICES.items()}))), keys[i : i + 1],
                  actions[:, i : i + 1]) for i in range(3)]  # fmt: skip
    wanted = jax.tree.map(lambda *x: jnp.concatenate(x), *map(VecEnv.by_row, single))
    # All fields at once, with numbers that differ; then each alone, against the same number given to all.
    mixed = with_params(base, CHOICES)
    got = run(VecEnv(AutoReset(mixed)), keys, actions)
    assert_same_states(VecEnv.by_row(got), wanted)
    assert wanted.episode.ledger.opened.sum() > 0 and len(set(wanted.equity.tolist())) == 3
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, mixed.params)

    def plain(params: EnvParams, key: jax.Array, actions: jax.Array) -> State:
        env = AutoReset(base.replace(params=params))
        return jax.lax.scan(lambda s, a: (env.step(s, a), None), env.reset(key), actions)[0]

    rows = jax.jit(jax.vmap(plain, (axes, 0, 1)))(mixed.params, keys, actions)
    assert_same_states(rows, wanted)


def with_params(env: PerpEnv, numbers: dict) -> PerpEnv:
    return env.replace(params=EnvParams(**numbers))


@pytest.mark.parametrize("name", RANGES)
def test_a_parameter_of_another_length_is_refused_by_name(name):
    env = PerpEnv(
        hand_market(), FREE.replace(**{name: np.repeat(CHOICES[name][1], 4)}), EnvConfig(max_lots=3, episode_length=4)
    )
    for wrapped in (VecEnv(env), VecEnv(AutoReset(env))):
        with pytest.raises(ValueError, match=rf"EnvParams.{name} has shape \(4,\) for 8 environments"):
            wrapped.reset(jax.random.split(jax.random.key(0), 8))
    for wrapped in (env, AutoReset(env)):
        with pytest.raises(ValueError, match=rf"EnvParams.{name} has shape \(4,\), and this is one environment"):
            wrapped.reset(jax.random.key(0))


def test_a_batch_of_states_is_refused_by_a_single_step():
    env = PerpEnv(hand_market(), FREE, EnvConfig(max_lots=3, episode_length=4))
    state = VecEnv(env).reset(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"a state of \(2,\) environments; step a VecEnv"):
        env.step(state, order(1))
