"""The algorithm: what it collects, what it learns from, one trace, and learning something easy."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HAND, assemble
from toy import LENGTH, toy

from perpjax import AutoReset, EnvConfig, Market, PerpEnv, VecEnv
from train.evaluate import greedy
from train.loop import compile_chunk
from train.normalize import Moments
from train.policies import MLP
from train.ppo.algorithm import value_truncated
from train.ppo.config import Config
from train.ppo.losses import compute_gae, ppo_loss
from train.ppo.run import make_ppo
from train.state import Learner, TrainState

ENV = EnvConfig(max_lots=2, episode_length=LENGTH)
SMALL = Config(num_envs=12, num_steps=8, total_steps=12 * 8 * 6, epochs=2, num_minibatches=3, hidden=(8,), env=ENV)

PPO_SMALL = make_ppo(SMALL)


def init(envs: VecEnv, config: Config, seed: int = 0) -> TrainState:
    return jax.jit(make_ppo(config).init)(envs, jax.random.key(seed))


@jax.jit
@chex.assert_max_traces(n=1)
def two_updates(envs: VecEnv, state: TrainState) -> tuple[TrainState, dict]:
    """Of `SMALL`. Most tests below run this one program; a second trace of it is an error."""
    return jax.lax.scan(lambda state, _: PPO_SMALL.update(envs, state), state, length=2)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def env() -> VecEnv:
    return toy()


@pytest.fixture(scope="module")
def learner(env) -> Learner:
    return init(env, SMALL).learner


# The values that truncated episodes are bootstrapped from.


class Stepped(NamedTuple):
    """What `value_truncated` reads of a state."""

    truncated: jax.Array
    final_obs: jax.Array


@pytest.mark.parametrize("num_envs", [1, 16, 17, 200])
def test_value_truncated_is_the_value_of_the_final_observation(learner, num_envs):
    rng = np.random.default_rng(num_envs)
    shape = (num_envs, *learner.observations.mean.shape)
    final_obs, blur = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    learner = learner._replace(observations=learner.observations.update(final_obs * 3 + 1))
    seen = learner.observations.standardise(final_obs) + blur
    policy, reset = PPO_SMALL.policy, jnp.zeros(num_envs, bool)
    values = np.asarray(policy(learner.params, (), seen, reset)[2])
    assert len(np.unique(values)) == num_envs
    few = jax.jit(value_truncated, static_argnums=0)
    for count in {c for c in (0, 1, 7, 15, 16, 17, num_envs) if c <= num_envs}:
        truncated = np.zeros(num_envs, bool)
        truncated[rng.permutation(num_envs)[:count]] = True
        got = few(policy, learner, (), Stepped(jnp.asarray(truncated), final_obs), blur)
        np.testing.assert_allclose(got, np.where(truncated, values, 0), rtol=1e-4, atol=1e-6, err_msg=f"{count}")


# Rewards.


def test_the_unit_of_the_reward_does_not_matter():
    """Rewards are divided by the spread of the discounted return, from the first update on and however few the rows."""
    one, other = (two_updates(e, init(e, SMALL))[0].learner for e in (toy(), toy(factor=1024.0)))
    assert float(other.returns.var / one.returns.var) == pytest.approx(1024.0**2, rel=1e-3)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-3, atol=1e-3)


def test_discounted_return_starts_again_with_each_episode(env):
    state = init(env, SMALL)
    ends = jnp.asarray([16, 15, 1, 3, 16, 16, 9, 12, 16, 16, 16, 16])  # of the 2 x 8 steps
    envs = state.envs.replace(end=state.envs.t + ends)
    state = state._replace(envs=envs, discounted=jnp.full(12, 1000.0, jnp.float32))
    after, _ = two_updates(env, state)
    discounted = np.asarray(after.discounted)
    np.testing.assert_array_equal(discounted[np.asarray(ends) == 16], 0)
    # Rewards are 1e-4: nobody remembers the 1000, and who has gone on has something.
    assert np.abs(discounted).max() < 2e-3 and np.count_nonzero(discounted) > 0


def test_the_greedy_policy_knows_nothing_of_reward_scale(env, learner):
    state = jax.jit(env.reset)(jax.random.split(jax.random.key(0), 50))
    odd = learner._replace(returns=Moments(jnp.float32(5), jnp.float32(1e6), jnp.float32(10)))
    plain, carry = greedy(learner, PPO_SMALL.policy)(jax.random.key(0), state, ())
    assert plain.shape == (50, 5) and plain.dtype == jnp.int32 and carry == ()
    for other, key in ((odd, 0), (learner, 1)):
        chex.assert_trees_all_equal(plain, greedy(other, MLP(SMALL.hidden))(jax.random.key(key), state, ())[0])


# Episodes of the first round, and how often they end.


def test_first_episodes_end_at_different_times(env):
    config = Config(num_envs=3200, num_steps=1, total_steps=3200, hidden=(4,), env=ENV)
    envs = init(env, config).envs
    left = np.asarray(envs.end - envs.t)
    counts = np.bincount(left, minlength=LENGTH + 1)
    assert left.min() == 1 and left.max() == LENGTH and counts[0] == 0
    # 3200 draws over 16 lengths: 200 +- 14 each; five standard deviations.
    assert np.abs(counts[1:] - 200).max() < 70
    assert np.asarray(envs.end).max() <= 400


def test_metrics_count_every_episode_once(env):
    state = init(env, SMALL)
    ends = np.asarray(state.envs.end - state.envs.t)
    episodes = lengths = 0
    for _ in range(3):
        state, metrics = two_updates(env, state)
        episodes += int(metrics["episodes"].sum())
        lengths += int(metrics["episode_length"].sum())
        assert int(metrics["ruined"].sum()) == 0
    # 3 x 2 x 8 = 48 steps: the first episode is cut after `ends`, each next one after 16 bars.
    expected = [[e, *[LENGTH] * ((48 - e) // LENGTH)] for e in ends]
    assert (episodes, lengths) == (sum(map(len, expected)), sum(map(sum, expected)))


# Minibatches.


@pytest.mark.parametrize(
    "num_envs, num_minibatches, expected",
    [(15, 5, 5), (7, None, 1)],
)
def test_each_row_is_in_exactly_one_block_of_an_epoch(env, num_envs, num_minibatches, expected):
    config = Config(
        num_envs=num_envs, num_steps=5, total_steps=num_envs * 5, epochs=3, num_minibatches=num_minibatches,
        hidden=(4,), env=ENV, learning_rate=0.0,
    )  # fmt: skip
    assert config.minibatches == expected
    blocks = []

    def recorded(distribution, value, rows, config):
        jax.debug.callback(lambda *rows: blocks.append([np.asarray(x) for x in rows]), *rows)
        return ppo_loss(distribution, value, rows, config)

    ppo = dataclasses.replace(make_ppo(config), loss=recorded)
    _, metrics = jax.jit(ppo.update)(env, init(env, config))
    jax.block_until_ready(metrics)
    jax.effects_barrier()
    assert len(blocks) == 3 * expected
    assert all(len(b[0]) == num_envs * 5 // expected for b in blocks)
    epochs = [blocks[i * expected : (i + 1) * expected] for i in range(3)]
    rows = [np.concatenate([np.column_stack([x.reshape(len(x), -1) for x in b]) for b in e]) for e in epochs]
    ordered = [r[np.lexsort(r.T)] for r in rows]
    assert len(np.unique(ordered[0], axis=0)) == num_envs * 5
    for other in ordered[1:]:
        np.testing.assert_array_equal(ordered[0], other)
    # The columns of a row belong together: with a learning rate of 0 the old policy is the new one, and the
    # advantages are the standardised difference of target and value.
    assert float(metrics["kl"]) == pytest.approx(0, abs=1e-6) and float(metrics["clip_fraction"]) == 0
    value, advantage, target = (np.concatenate([b[i] for b in epochs[0]]) for i in (4, 5, 6))
    raw = target - value
    np.testing.assert_allclose(advantage, (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-3)


def test_default_minibatches_divide_and_are_about_8192_rows():
    for num_envs, num_steps in ((4096, 32), (1000, 32), (999, 17), (1, 1), (7, 100_000), (97, 1024)):
        config = Config(num_envs=num_envs, num_steps=num_steps, total_steps=num_envs * num_steps)
        assert num_envs % config.minibatches == 0
        assert num_envs * num_steps / config.minibatches >= min(8192, num_envs * num_steps)
    assert Config(num_envs=4096, num_steps=32).minibatches == 16


@pytest.mark.parametrize("updates", [1, 2, 3, 5, 7, 12, 113])
def test_the_moments_of_a_run_follow_from_its_settings(updates):
    """Chunks end at each moment; by default there are about 20 evaluations and no counted checkpoints."""
    config = Config(num_envs=2, num_steps=2, total_steps=4 * updates + 3)
    assert config.num_updates == updates
    schedule = config.schedule
    assert schedule.num_updates == updates and schedule.most == 64 and schedule.checkpoint_every == 0
    assert min(updates, 10) <= -(-updates // schedule.evaluate_every) <= 20
    few = dataclasses.replace(config, evaluate_every=9, checkpoint_every=21, updates_per_chunk=4).schedule
    # 9 steps are 3 updates of 4, rounded up; 21 are 6.
    assert (few.evaluate_every, few.checkpoint_every) == (3, 6)
    stops, update = [], 0
    while update < updates:
        update = few.next_stop(update)
        stops.append(update)
    assert stops == sorted({*range(3, updates, 3), updates})
    none = dataclasses.replace(config, evaluate_every=0).schedule
    assert none.evaluate_every == 0 and not none.is_due(updates, none.evaluate_every)


# One program, the same every time.


def test_an_update_keeps_every_type(env):
    state = init(env, SMALL)
    after, metrics = jax.eval_shape(PPO_SMALL.update, env, state)
    before = jax.eval_shape(lambda s: s, state)
    described = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(t)] for t in (before, after)]
    assert described[0] == described[1]
    assert all(x.shape == () for x in metrics.values())


def trained(env: VecEnv, seed: int) -> tuple[TrainState, dict]:
    """The six updates of `SMALL`."""
    state = init(env, SMALL, seed)
    for _ in range(3):
        state, metrics = two_updates(env, state)
    return state, metrics


def test_equal_seeds_give_equal_learners(env):
    first, metrics = trained(env, 0)
    second, again = trained(env, 0)
    other, _ = trained(env, 1)
    assert int(first.learner.update) == 6
    chex.assert_trees_all_equal(first.learner, second.learner)
    chex.assert_trees_all_equal(metrics, again)
    for a, b in zip(jax.tree.leaves(first.learner.params), jax.tree.leaves(other.learner.params), strict=True):
        assert not np.array_equal(a, b)


def test_learning_rate_falls_to_zero(env):
    """After the last update of a run another one no longer moves the parameters."""
    state, _ = trained(env, 0)
    after, _ = two_updates(env, state)
    chex.assert_trees_all_close(after.learner.params, state.learner.params, rtol=0, atol=1e-7)


def test_terminated_and_truncated_reach_the_advantages():
    """In the loop itself: flags of the step that ended, the value of what it saw last, and of no other step."""
    env = toy(ruin=tuple(range(0, 400, 23)))
    config = Config(num_envs=8, num_steps=40, total_steps=320, hidden=(8,), env=ENV, obs_noise=0.0, num_minibatches=1)
    seen = []

    def recorded(*args):
        jax.debug.callback(lambda *args: seen.append([np.asarray(x) for x in args]), *args[:6])
        return compute_gae(*args)

    ppo = dataclasses.replace(make_ppo(config), gae=recorded)
    before = init(env, config)
    after, metrics = jax.block_until_ready(jax.jit(ppo.update)(env, before))
    jax.effects_barrier()
    _, value, last_value, final_value, terminated, truncated = seen[0]

    def values(obs):
        obs = before.learner.observations.standardise(obs)
        return np.asarray(ppo.policy(before.learner.params, (), obs, np.zeros(len(obs), bool))[2])

    # What the toy does next does not depend on the action: any will do to follow it.
    follow, state, cuts, ruins = jax.jit(env.step), before.envs, 0, 0
    for step in range(40):
        np.testing.assert_allclose(value[step], values(state.obs), rtol=1e-3, atol=1e-4)
        ruined = np.asarray(state.t) % 23 == 0
        cut = ~ruined & (np.asarray(state.t) + 1 >= np.asarray(state.end))
        np.testing.assert_array_equal(terminated[step], ruined)
        np.testing.assert_array_equal(truncated[step], cut)
        seen_last = jax.vmap(env.env.env.observe)(state.t + 1)
        np.testing.assert_allclose(final_value[step], np.where(cut, values(seen_last), 0), rtol=1e-3, atol=1e-4)
        state = follow(state, jnp.zeros((8, 5), jnp.int32))
        cuts, ruins = cuts + cut.sum(), ruins + ruined.sum()
    np.testing.assert_allclose(last_value, values(state.obs), rtol=1e-3, atol=1e-4)
    assert ruins > 5 and cuts > 5
    assert int(metrics["ruined"]) == ruins and int(metrics["episodes"]) == ruins + cuts
    chex.assert_tree_all_finite((after.learner, metrics))


# The real environment.


def telling_market(bars: int = 500, seed: int = 0) -> Market:
    """One candle a bar, which moves 60 ticks up or down; feature 0 says which way, feature 1 is noise.

    With an ATR of 100 a stop or target of 0.5 lies 50 ticks away: a lot with the move wins its 50 ticks within the bar,
    one against it loses them. A long of size 1 at 10x of 10 000 quote makes 50 / 10 000 x 10 x 10 % = 0.5 % a bar.
    """
    rng = np.random.default_rng(seed)
    move = rng.choice([-1, 1], bars)
    edges = 10_000 + 60 * np.concatenate([[0], np.cumsum(move)])
    opens, closes = edges[:-1], edges[1:]
    last = np.stack([opens, np.maximum(opens, closes), np.minimum(opens, closes), closes], -1)[:, None].astype(float)
    features = np.stack([np.append(move, 0), rng.normal(size=bars + 1)], -1)
    return assemble(
        last, np.ones((bars, 1), bool), np.zeros((bars, 2)), np.full(bars + 1, 100.0), features,
        mark=None, first=1, instrument=HAND,
    )  # fmt: skip


def test_it_learns_what_a_feature_tells():
    """Feature 0 says where the bar goes. Whoever has seen that makes up to 0.5 % a bar, 8 % in an episode of 16."""
    config = Config(
        num_envs=128, num_steps=16, total_steps=128 * 16 * 60, hidden=(16,), env=ENV, num_minibatches=2, epochs=4,
        learning_rate=3e-3,
    )  # fmt: skip
    env, unseen = (VecEnv(AutoReset(PerpEnv(telling_market(seed=seed), FREE, ENV))) for seed in (0, 7))
    ppo = make_ppo(config)

    @jax.jit
    def play(env: VecEnv, learner: Learner, key: jax.Array) -> jax.Array:
        """Equity after one episode each, by the most probable action."""
        act = greedy(learner, ppo.policy)
        state = env.reset(jax.random.split(key, 64))
        step = lambda state, _: (env.step(state, act(key, state, ())[0]), None)  # noqa: E731
        return jax.lax.scan(step, state, length=LENGTH)[0].episode.equity

    state = init(env, config)
    before = np.asarray(play(unseen, state.learner, jax.random.key(1)))
    step = compile_chunk(ppo.update, env, state, 6)
    for _ in range(10):
        state, _ = step(env, state, jnp.int32(6))
    after = np.asarray(play(unseen, state.learner, jax.random.key(1)))
    assert abs(before.mean() - 10_000) < 150
    assert after.mean() > 10_300 and after.mean() - before.mean() > 200
    assert np.mean(after > 10_000) > 0.9
    # And again, bit for bit.
    again = init(env, config)
    for _ in range(10):
        again, _ = step(env, again, jnp.int32(6))
    chex.assert_trees_all_equal(state.learner, again.learner)
