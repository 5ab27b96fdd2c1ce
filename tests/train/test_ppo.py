"""The trainer's arithmetic: advantages, losses, normalisation, minibatches, one trace, and learning something easy."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HAND, assemble

from perpjax import AutoReset, EnvConfig, Market, PerpEnv, VecEnv
from perpjax._pytree import pytree
from perpjax.rules.observation import ACCOUNT_FEATURES
from perpjax.rules.orders import DIRECTIONS, MULTI_DISCRETE
from perpjax.state import State, open_account
from train import ppo
from train.config import Config
from train.main import greedy
from train.networks import ActorCritic, Policy
from train.normalize import CLIP, Moments
from train.ppo import (
    Learner,
    Train,
    compile_training,
    compute_gae,
    init_train,
    ppo_loss,
    train_update,
    train_updates,
    value_truncated,
)

LENGTH = 16
ENV = EnvConfig(max_lots=2, episode_length=LENGTH)
SMALL = Config(num_envs=12, num_steps=8, total_steps=12 * 8 * 6, epochs=2, num_minibatches=3, hidden=(8,), env=ENV)

init = jax.jit(init_train, static_argnums=1)


@jax.jit
@chex.assert_max_traces(n=1)
def two_updates(env: AutoReset, state: Train) -> tuple[Train, dict]:
    """Of `SMALL`. Most tests below run this one program; a second trace of it is an error."""
    return train_updates(env, state, SMALL, 2)


@pytree(static=("length",))
class Toy:
    """An environment that compiles in no time: a long earns `move[t]`, a short loses it; `ruin[t]` ends the episode."""

    move: jax.Array
    ruin: jax.Array
    factor: jax.Array
    """Unit of the reward."""
    length: int = LENGTH

    def observe(self, t):
        return jnp.concatenate([jnp.stack([jnp.sign(self.move[t]), jnp.sin(t * 1.0)]), jnp.ones(len(ACCOUNT_FEATURES))])

    def reset(self, key, start=None):
        key, draw = jax.random.split(key)
        t = jax.random.randint(draw, (), 0, self.move.shape[0] - self.length) if start is None else jnp.asarray(start)
        no, one = jnp.zeros((), bool), jnp.ones((), jnp.float32)
        end, row = t + self.length, jnp.zeros((), jnp.int32)
        return State(t, self.observe(t), one * 0, no, no, one, open_account(one, 1), key, end, row)

    def step(self, state, action):
        side = (action[0] == DIRECTIONS.index(1)) * 1.0 - (action[0] == DIRECTIONS.index(-1)) * 1.0
        reward, ruin = side * self.move[state.t], self.ruin[state.t]
        return state.replace(
            t=state.t + 1, obs=self.observe(state.t + 1), reward=reward * self.factor, terminated=ruin,
            truncated=~ruin & (state.t + 1 >= state.end), equity=state.equity * jnp.exp(reward),
        )  # fmt: skip


def toy(ruin: tuple[int, ...] = (), factor: float = 1.0, bars: int = 400) -> AutoReset:
    move = np.random.default_rng(0).choice([-1e-4, 1e-4], bars + 1)
    ends = np.isin(np.arange(bars + 1), ruin)
    return AutoReset(Toy(jnp.asarray(move, jnp.float32), jnp.asarray(ends), jnp.float32(factor)))


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def env() -> AutoReset:
    return toy()


@pytest.fixture(scope="module")
def learner(env) -> Learner:
    return init(env, SMALL, jax.random.key(0)).learner


def gae(reward, value, last_value, final_value, terminated, truncated, gamma=0.5, gae_lambda=0.5) -> np.ndarray:
    """One environment, plain lists in, [steps] out."""
    columns = [jnp.asarray(x, jnp.float32)[:, None] for x in (reward, value, final_value)]
    flags = [jnp.asarray(x, bool)[:, None] for x in (terminated, truncated)]
    reward, value, final = columns
    out = compute_gae(reward, value, jnp.float32([last_value]), final, *flags, gamma, gae_lambda)
    return np.asarray(out)[:, 0]


# compute_gae, gamma = lambda = 1/2, so that gamma lambda = 1/4 carries an advantage one step back.


def test_gae_without_an_end():
    # delta_2 = 4 + 0.5 x 8 - 2 = 6          A_2 = 6
    # delta_1 = 2 + 0.5 x 2 - 4 = -1         A_1 = -1 + 6 / 4 = 0.5
    # delta_0 = 1 + 0.5 x 4 - 2 = 1          A_0 = 1 + 0.5 / 4 = 1.125
    no = [0, 0, 0]
    np.testing.assert_array_equal(gae([1, 2, 4], [2, 4, 2], 8, [0, 0, 0], no, no), [1.125, 0.5, 6])


def test_gae_does_not_bootstrap_where_terminated():
    # Step 1 ends in ruin: nothing follows it, neither value[2] = 100 nor A_2.
    # delta_1 = 2 - 4 = -2 = A_1; A_0 = (1 + 0.5 x 4 - 2) - 2 / 4 = 0.5; A_2 = 4 + 0.5 x 8 - 100 = -92
    got = gae([1, 2, 4], [2, 4, 100], 8, [7, 7, 7], [0, 1, 0], [0, 0, 0])
    np.testing.assert_array_equal(got, [0.5, -2, -92])


def test_gae_bootstraps_from_the_final_observation_where_truncated():
    # Step 1 is cut: its future is worth final_value[1] = 6, not the next episode's first value of 100.
    # delta_1 = 2 + 0.5 x 6 - 4 = 1 = A_1 (A_2 does not leak back); A_0 = 1 + 1 / 4 = 1.25; A_2 = -92
    got = gae([1, 2, 4], [2, 4, 100], 8, [0, 6, 0], [0, 0, 0], [0, 1, 0])
    np.testing.assert_array_equal(got, [1.25, 1, -92])


def test_gae_end_at_the_last_step_does_not_read_the_last_value():
    # A_1 = 2 - 4 = -2 if terminated, 2 + 0.5 x 6 - 4 = 1 if truncated; A_0 = 1 + 0.5 x 4 - 2 + A_1 / 4
    np.testing.assert_array_equal(gae([1, 2], [2, 4], 1e9, [0, 6], [0, 1], [0, 0]), [0.5, -2])
    np.testing.assert_array_equal(gae([1, 2], [2, 4], 1e9, [0, 6], [0, 0], [0, 1]), [1.25, 1])


def test_gae_several_ends_in_a_row():
    # Each step is an episode of its own: terminated, truncated, terminated. delta = A everywhere.
    # 1 - 2 = -1; 2 + 0.5 x 8 - 4 = 2; 4 - 2 = 2
    np.testing.assert_array_equal(gae([1, 2, 4], [2, 4, 2], 99, [5, 8, 5], [1, 0, 1], [0, 1, 0]), [-1, 2, 2])


def naive_gae(reward, value, last_value, final_value, terminated, truncated, gamma, gae_lambda) -> np.ndarray:
    """The definition: sum of (gamma lambda)^k delta_{t+k} up to the end of the episode, in float64."""
    steps, envs = reward.shape
    out = np.zeros((steps, envs))
    for e in range(envs):
        for t in range(steps):
            weight = 1.0
            for s in range(t, steps):
                after = value[s + 1, e] if s + 1 < steps else last_value[e]
                if terminated[s, e]:
                    after = 0.0
                elif truncated[s, e]:
                    after = final_value[s, e]
                out[t, e] += weight * (reward[s, e] + gamma * after - value[s, e])
                weight *= gamma * gae_lambda
                if terminated[s, e] or truncated[s, e]:
                    break
    return out


@pytest.mark.parametrize("gamma, gae_lambda", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_against_the_definition(gamma, gae_lambda):
    rng = np.random.default_rng(1)
    shape = (25, 9)
    reward, value, final = rng.normal(size=(3, *shape))
    ends = rng.random(shape)
    terminated, truncated = ends < 0.1, (ends > 0.8)
    last = rng.normal(size=shape[1])
    arrays = [jnp.asarray(x, jnp.float32) for x in (reward, value, last, final)]
    got = compute_gae(*arrays, jnp.asarray(terminated), jnp.asarray(truncated), gamma, gae_lambda)
    expected = naive_gae(reward, value, last, final, terminated, truncated, gamma, gae_lambda)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


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
    values = np.asarray(ActorCritic(SMALL.hidden).apply(learner.params, seen)[1])
    assert len(np.unique(values)) == num_envs
    few = jax.jit(value_truncated, static_argnums=1)
    for count in {c for c in (0, 1, 7, 15, 16, 17, num_envs) if c <= num_envs}:
        truncated = np.zeros(num_envs, bool)
        truncated[rng.permutation(num_envs)[:count]] = True
        got = few(learner, SMALL, Stepped(jnp.asarray(truncated), final_obs), blur)
        np.testing.assert_allclose(got, np.where(truncated, values, 0), rtol=1e-4, atol=1e-6, err_msg=f"{count}")


# The loss.


@functools.partial(jax.jit, static_argnums=4)
def differentiate(ratio, advantage, value_offset, target_offset, config):
    obs = jnp.asarray([[0.3, -1.0, 2.0]])
    params = ActorCritic(config.hidden).init(jax.random.key(3), obs)
    logits, value = ActorCritic(config.hidden).apply(params, obs)
    action = jnp.asarray([[1, 2, 3, 0, 4]])
    old = Policy.from_logits(logits).log_prob(action) - jnp.log(ratio)
    rows = (obs, action, old, value - value_offset, advantage[None], value + target_offset)
    return jax.value_and_grad(ppo_loss, has_aux=True)(params, rows, config)


def loss_of(ratio, advantage, value_offset=0.0, target_offset=0.0, **changes):
    """ppo_loss of one row whose probability ratio, and value relative to the old one, are given."""
    numbers = map(jnp.float32, (ratio, advantage, value_offset, target_offset))
    (loss, parts), grads = differentiate(*numbers, Config(hidden=(4,), clip=0.2, **changes))
    return float(loss), {k: float(v) for k, v in parts.items()}, grads["params"]


@pytest.mark.parametrize(
    "ratio, advantage, expected, moves",
    [
        (1.5, +1.0, -1.2, False),  # -min(1.5 x 1, 1.2 x 1): already more likely than the clip rewards
        (0.5, +1.0, -0.5, True),  # -min(0.5, 0.8): a good action that became rarer is pulled back
        (1.5, -1.0, +1.5, True),  # -min(-1.5, -1.2): a bad action that became likelier is pushed down
        (0.5, -1.0, +0.8, False),  # -min(-0.5, -0.8): rare enough
        (1.1, +2.0, -2.2, True),  # inside the clip: plain ratio x advantage
        (0.9, -2.0, +1.8, True),
    ],
)
def test_policy_loss_clips_the_ratio(ratio, advantage, expected, moves):
    _, parts, grads = loss_of(ratio, advantage, entropy_coef=0.0)
    assert parts["policy_loss"] == pytest.approx(expected, rel=1e-5)
    assert parts["clip_fraction"] == (1.0 if abs(ratio - 1) > 0.2 else 0.0)
    # k3 estimator of KL(old || new): ratio - 1 - log ratio, never negative.
    assert parts["kl"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)
    assert (float(jnp.abs(grads["actor_out"]["kernel"]).max()) > 1e-6) == moves


@pytest.mark.parametrize(
    "value_offset, target_offset, expected",
    [
        (0.1, 1.0, 0.5),  # moved 0.1 from the old value: not clipped; 0.5 x 1^2
        (0.5, 0.0, 0.045),  # moved 0.5, counts as 0.2: 0.3 short of the target that it is on; 0.5 x max(0, 0.3^2)
        (0.5, 1.0, 0.845),  # 1 below the target, 1.3 when clipped: 0.5 x 1.3^2
        (0.5, -1.0, 0.5),  # 1 above the target, 0.7 when clipped: 0.5 x 1^2
        (-0.5, 0.0, 0.045),
    ],
)
def test_value_loss_is_the_worse_of_clipped_and_not(value_offset, target_offset, expected):
    _, parts, _ = loss_of(1.0, 0.0, value_offset, target_offset)
    assert parts["value_loss"] == pytest.approx(expected, rel=1e-4)


def test_loss_is_the_weighted_sum_of_its_parts():
    loss, parts, _ = loss_of(1.1, 2.0, 0.1, 1.0, value_coef=0.25, entropy_coef=0.125)
    expected = parts["policy_loss"] + 0.25 * parts["value_loss"] - 0.125 * parts["entropy"]
    assert loss == pytest.approx(expected, rel=1e-6)
    # A fresh policy is close to uniform: log 4 for the direction, the other four matter in half of the cases.
    uniform = math.log(4) + 0.5 * sum(math.log(n) for n in MULTI_DISCRETE[1:])
    assert parts["entropy"] == pytest.approx(uniform, rel=1e-2)


# Running moments.


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4], ids=str)
@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
def test_moments_are_those_of_all_rows_seen(shape, scale):
    """At the scale of raw log returns (1e-4) too: what `empty` starts from must leave no trace."""
    rng = np.random.default_rng(0)
    moments, seen = Moments.empty(shape), []
    for leading in ((5, 7), (64,), (1, 1), (40, 3)):
        batch = scale * (rng.normal(size=(*leading, *shape)) * 2 + len(seen))
        moments = jax.jit(Moments.update)(moments, jnp.asarray(batch, jnp.float32))
        seen.append(batch.reshape(-1, *shape))
        rows = np.concatenate(seen)
        np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=2e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(moments.var, rows.var(axis=0), rtol=2e-4)
    assert float(moments.count) == pytest.approx(sum(map(len, seen)), rel=1e-5)


def test_moments_of_many_batches_do_not_drift():
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.normal(3.0, 0.5, (400, 512)), jnp.float32)
    moments, _ = jax.lax.scan(lambda m, b: (m.update(b), None), Moments.empty(()), batches)
    np.testing.assert_allclose([moments.mean, moments.var], [batches.mean(), batches.var()], rtol=1e-4)


def test_standardise_and_scale():
    moments = Moments(jnp.float32([1.0, -2.0]), jnp.float32([4.0, 0.25]), jnp.float32(10))
    # (3 - 1) / 2 = 1; (-2 + 2) / 0.5 = 0; far out is clipped. `scale` divides only: 3 / 2, -2 / 0.5.
    rows = jnp.float32([[3.0, -2.0], [1e9, -1e9]])
    np.testing.assert_allclose(moments.standardise(rows), [[1, 0], [CLIP, -CLIP]], atol=1e-6)
    np.testing.assert_allclose(moments.scale(rows), [[1.5, -4], [CLIP, -CLIP]], rtol=1e-6)
    # A feature that never varies: no NaN, no infinity.
    flat = Moments.empty((2,)).update(jnp.ones((50, 2)))
    assert bool(jnp.isfinite(flat.standardise(jnp.ones((1, 2)))).all())
    assert float(jnp.abs(flat.standardise(jnp.ones((1, 2)))).max()) < 1


# Rewards.


def test_the_unit_of_the_reward_does_not_matter():
    """Rewards are divided by the spread of the discounted return, from the first update on and however few the rows."""
    one, other = (two_updates(e, init(e, SMALL, jax.random.key(0)))[0].learner for e in (toy(), toy(factor=1024.0)))
    assert float(other.returns.var / one.returns.var) == pytest.approx(1024.0**2, rel=1e-3)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-3, atol=1e-3)


def test_discounted_return_starts_again_with_each_episode(env):
    state = init(env, SMALL, jax.random.key(0))
    ends = jnp.asarray([16, 15, 1, 3, 16, 16, 9, 12, 16, 16, 16, 16])  # of the 2 x 8 steps
    envs = state.envs.replace(end=state.envs.t + ends)
    state = state._replace(envs=envs, discounted=jnp.full(12, 1000.0, jnp.float32))
    after, _ = two_updates(env, state)
    discounted = np.asarray(after.discounted)
    np.testing.assert_array_equal(discounted[np.asarray(ends) == 16], 0)
    # Rewards are 1e-4: nobody remembers the 1000, and who has gone on has something.
    assert np.abs(discounted).max() < 2e-3 and np.count_nonzero(discounted) > 0


def test_the_greedy_policy_knows_nothing_of_reward_scale_or_noise(env, learner):
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 50))
    odd = learner._replace(returns=Moments(jnp.float32(5), jnp.float32(1e6), jnp.float32(10)))
    noisy = Config(hidden=(8,), env=ENV, obs_noise=5.0)
    plain = greedy(learner, SMALL)(jax.random.key(0), state)
    assert plain.shape == (50, 5) and plain.dtype == jnp.int32
    chex.assert_trees_all_equal(plain, greedy(odd, SMALL)(jax.random.key(0), state))
    chex.assert_trees_all_equal(plain, greedy(learner, noisy)(jax.random.key(1), state))


# Episodes of the first round, and how often they end.


def test_first_episodes_end_at_different_times(env):
    config = Config(num_envs=3200, num_steps=1, total_steps=3200, hidden=(4,), env=ENV)
    envs = init(env, config, jax.random.key(0)).envs
    left = np.asarray(envs.end - envs.t)
    counts = np.bincount(left, minlength=LENGTH + 1)
    assert left.min() == 1 and left.max() == LENGTH and counts[0] == 0
    # 3200 draws over 16 lengths: 200 +- 14 each; five standard deviations.
    assert np.abs(counts[1:] - 200).max() < 70
    assert np.asarray(envs.end).max() <= 400


def test_metrics_count_every_episode_once(env):
    state = init(env, SMALL, jax.random.key(0))
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
def test_each_row_is_in_exactly_one_block_of_an_epoch(env, monkeypatch, num_envs, num_minibatches, expected):
    config = Config(
        num_envs=num_envs, num_steps=5, total_steps=num_envs * 5, epochs=3, num_minibatches=num_minibatches,
        hidden=(4,), env=ENV, learning_rate=0.0,
    )  # fmt: skip
    assert config.minibatches == expected
    blocks = []

    def recorded(params, rows, config):
        jax.debug.callback(lambda *rows: blocks.append([np.asarray(x) for x in rows]), *rows)
        return ppo_loss(params, rows, config)

    monkeypatch.setattr(ppo, "ppo_loss", recorded)
    state = init(env, config, jax.random.key(0))
    _, metrics = jax.jit(train_update, static_argnums=2)(env, state, config)
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
    _, _, _, value, advantage, target = (np.concatenate([b[i] for b in epochs[0]]) for i in range(6))
    raw = target - value
    np.testing.assert_allclose(advantage, (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-3)


def test_default_minibatches_divide_and_are_about_8192_rows():
    for num_envs, num_steps in ((4096, 32), (1000, 32), (999, 17), (1, 1), (7, 100_000), (97, 1024)):
        config = Config(num_envs=num_envs, num_steps=num_steps, total_steps=num_envs * num_steps)
        assert num_envs % config.minibatches == 0
        assert num_envs * num_steps / config.minibatches >= min(8192, num_envs * num_steps)
    assert Config(num_envs=4096, num_steps=32).minibatches == 16


def test_chunks_divide_the_updates():
    for updates in (1, 2, 3, 5, 7, 12, 113):
        config = Config(num_envs=2, num_steps=2, total_steps=4 * updates + 3)
        assert config.num_updates == updates and updates % config.chunk == 0 and config.chunk >= 1


# One program, the same every time.


def test_an_update_keeps_every_type(env):
    state = init(env, SMALL, jax.random.key(0))
    after, metrics = jax.eval_shape(lambda e, s: train_updates(e, s, SMALL, 2), env, state)
    before = jax.eval_shape(lambda s: s, state)
    described = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(t)] for t in (before, after)]
    assert described[0] == described[1]
    assert all(x.shape == (2,) for x in metrics.values())


def trained(env: AutoReset, seed: int) -> tuple[Train, dict]:
    """The six updates of `SMALL`."""
    state = init(env, SMALL, jax.random.key(seed))
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


def test_terminated_and_truncated_reach_the_advantages(monkeypatch):
    """In the loop itself: flags of the step that ended, the value of what it saw last, and of no other step."""
    env = toy(ruin=tuple(range(0, 400, 23)))
    config = Config(num_envs=8, num_steps=40, total_steps=320, hidden=(8,), env=ENV, obs_noise=0.0, num_minibatches=1)
    seen = []

    def recorded(*args):
        jax.debug.callback(lambda *args: seen.append([np.asarray(x) for x in args]), *args[:6])
        return compute_gae(*args)

    monkeypatch.setattr(ppo, "compute_gae", recorded)
    before = init(env, config, jax.random.key(0))
    program = jax.jit(train_update, static_argnums=2)
    after, metrics = jax.block_until_ready(program(env, before, config))
    jax.effects_barrier()
    _, value, last_value, final_value, terminated, truncated = seen[0]

    def values(obs):
        obs = before.learner.observations.standardise(obs)
        return np.asarray(ActorCritic(config.hidden).apply(before.learner.params, obs)[1])

    # What the toy does next does not depend on the action: any will do to follow it.
    follow, state, cuts, ruins = jax.jit(VecEnv(env).step), before.envs, 0, 0
    for step in range(40):
        np.testing.assert_allclose(value[step], values(state.obs), rtol=1e-3, atol=1e-4)
        ruined = np.asarray(state.t) % 23 == 0
        cut = ~ruined & (np.asarray(state.t) + 1 >= np.asarray(state.end))
        np.testing.assert_array_equal(terminated[step], ruined)
        np.testing.assert_array_equal(truncated[step], cut)
        seen_last = jax.vmap(env.env.observe)(state.t + 1)
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
    env, unseen = (AutoReset(PerpEnv(telling_market(seed=seed), FREE, ENV)) for seed in (0, 7))
    model = ActorCritic(config.hidden)

    @jax.jit
    def play(env: AutoReset, learner: Learner, key: jax.Array) -> jax.Array:
        """Equity after one episode each, by the most probable action."""

        def step(state, _):
            logits, _ = model.apply(learner.params, learner.observations.standardise(state.obs))
            state = jax.vmap(env.step)(state, Policy.from_logits(logits).mode())
            return state, None

        state = jax.vmap(env.reset)(jax.random.split(key, 64))
        return jax.lax.scan(step, state, length=LENGTH)[0].episode.equity

    state = init(env, config, jax.random.key(0))
    before = np.asarray(play(unseen, state.learner, jax.random.key(1)))
    step = compile_training(env, state, config, 6)
    for _ in range(10):
        state, _ = step(env, state)
    after = np.asarray(play(unseen, state.learner, jax.random.key(1)))
    assert abs(before.mean() - 10_000) < 150
    assert after.mean() > 10_300 and after.mean() - before.mean() > 200
    assert np.mean(after > 10_000) > 0.9
    # And again, bit for bit.
    again = init(env, config, jax.random.key(0))
    for _ in range(10):
        again, _ = step(env, again)
    chex.assert_trees_all_equal(state.learner, again.learner)
