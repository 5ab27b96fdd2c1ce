"""The trainer's arithmetic: advantages, losses, normalisation, minibatches, one trace, and learning something easy."""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HAND, assemble

from perpjax import AutoReset, EnvConfig, EnvParams, Market, PerpEnv
from perpjax._pytree import pytree
from perpjax.orders import MULTI_DISCRETE
from train import ppo
from train.config import Config
from train.evaluate import evaluate
from train.main import greedy
from train.networks import ActorCritic, Policy
from train.normalize import CLIP, Moments
from train.ppo import (
    BOOTSTRAP_ROWS,
    Learner,
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
init = jax.jit(init_train, static_argnums=1)
update = jax.jit(train_updates, static_argnums=(2, 3))
SMALL = Config(num_envs=12, num_steps=8, total_steps=12 * 8 * 6, epochs=2, num_minibatches=3, hidden=(8,), env=ENV)


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


@pytest.fixture(scope="module")
def env() -> AutoReset:
    return AutoReset(PerpEnv(telling_market(), FREE, ENV))


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


@pytest.mark.parametrize("num_envs", [1, BOOTSTRAP_ROWS, BOOTSTRAP_ROWS + 1, 200])
def test_value_truncated_is_the_value_of_the_final_observation(learner, num_envs):
    rng = np.random.default_rng(num_envs)
    final_obs, blur = (jnp.asarray(rng.normal(size=(num_envs, *learner.observations.mean.shape)), jnp.float32) for _ in "ab")
    learner = learner._replace(observations=learner.observations.update(final_obs * 3 + 1))
    seen = learner.observations.standardise(final_obs) + blur
    values = np.asarray(ActorCritic(SMALL.hidden).apply(learner.params, seen)[1])
    assert len(np.unique(values)) == num_envs
    few = jax.jit(value_truncated, static_argnums=1)
    some = (0, 1, 7, BOOTSTRAP_ROWS - 1, BOOTSTRAP_ROWS, BOOTSTRAP_ROWS + 1, num_envs)
    for count in {c for c in some if c <= num_envs}:
        truncated = np.zeros(num_envs, bool)
        truncated[rng.permutation(num_envs)[:count]] = True
        got = few(learner, SMALL, Stepped(jnp.asarray(truncated), final_obs), blur)
        np.testing.assert_allclose(got, np.where(truncated, values, 0), rtol=1e-4, atol=1e-6, err_msg=f"{count}")


# The loss.


def loss_of(ratio, advantage, value_offset=0.0, target_offset=0.0, **changes):
    """ppo_loss of one row whose probability ratio, and value relative to the old one, are given."""
    config = Config(hidden=(4,), clip=0.2, **changes)
    obs = jnp.asarray([[0.3, -1.0, 2.0]])
    params = ActorCritic(config.hidden).init(jax.random.key(3), obs)
    logits, value = ActorCritic(config.hidden).apply(params, obs)
    action = jnp.asarray([[1, 2, 3, 0, 4]])
    old = Policy.from_logits(logits).log_prob(action) - math.log(ratio)
    rows = (obs, action, old, value - value_offset, jnp.float32([advantage]), value + target_offset)
    (loss, parts), grads = jax.value_and_grad(ppo_loss, has_aux=True)(params, rows, config)
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


@pytree
class Multiplied:
    """An environment whose rewards are in another unit."""

    env: PerpEnv
    factor: jax.Array

    def reset(self, key, start=None):
        return self.env.reset(key, start)

    def step(self, state, action):
        state = self.env.step(state, action)
        return state.replace(reward=state.reward * self.factor)


def test_the_unit_of_the_reward_does_not_matter(env):
    """Rewards are divided by the spread of the discounted return, from the first update on and however few the rows."""
    learners = []
    for factor in (1.0, 1024.0):
        scaled = AutoReset(Multiplied(env.env, jnp.float32(factor)))
        state = init(scaled, SMALL, jax.random.key(0))
        state, metrics = update(scaled, state, SMALL, 2)
        learners.append(state.learner)
    one, other = learners
    assert float(other.returns.var / one.returns.var) == pytest.approx(1024.0**2, rel=1e-2)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-2, atol=1e-3)


def test_discounted_return_starts_again_with_each_episode(env):
    config = Config(num_envs=4, num_steps=8, total_steps=4 * 8, hidden=(4,), env=ENV, num_minibatches=1)
    state = init(env, config, jax.random.key(0))
    state = state._replace(envs=state.envs.replace(end=state.envs.t + jnp.asarray([1, 8, 8, 3])))
    state = state._replace(discounted=jnp.full(4, 1000.0))
    after, metrics = jax.jit(train_update, static_argnums=2)(env, state, config)
    # The first ends at step 1, the second and third at the last step, the fourth at step 3: none remembers the 1000.
    assert int(metrics["episodes"]) == 4
    np.testing.assert_array_equal(np.asarray(after.discounted)[[1, 2]], [0, 0])
    assert np.abs(np.asarray(after.discounted)).max() < 1


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
    assert np.asarray(envs.end).max() <= int(env.env.market.segments.last[0]) + 1


def test_metrics_count_every_episode_once(env):
    config = Config(num_envs=12, num_steps=8, total_steps=12 * 8 * 4, hidden=(4,), env=ENV, num_minibatches=1)
    state = init(env, config, jax.random.key(0))
    ends = np.asarray(state.envs.end - state.envs.t)
    _, metrics = update(env, state, config, 4)
    # Nobody is ruined on 1 % moves with 10 % exposure: 32 steps cut the first episode after `ends`, the next ones after
    # 16 bars each (an episode near the market's end is not shorter: its start leaves room).
    lengths = [[e, *[LENGTH] * ((32 - e) // LENGTH)] for e in ends]
    assert int(metrics["episodes"].sum()) == sum(map(len, lengths))
    assert int(metrics["episode_length"].sum()) == sum(map(sum, lengths))
    assert int(metrics["ruined"].sum()) == 0


# Minibatches.


@pytest.mark.parametrize(
    "num_envs, num_minibatches, expected",
    [(12, None, 1), (12, 3, 3), (15, 5, 5), (7, 7, 7), (9, 1, 1)],
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
        assert config.num_updates == updates and updates % config.chunk == 0 and 1 <= config.chunk


# One program, the same every time.


def test_updates_are_traced_once(env):
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(train_updates, n=1), static_argnums=(2, 3))
    state = init(env, SMALL, jax.random.key(0))
    for _ in range(3):
        state, _ = step(env, state, SMALL, 2)
    chex.assert_trees_all_equal(state.learner.update, jnp.int32(6))


def test_an_update_keeps_every_type(env):
    state = init(env, SMALL, jax.random.key(0))
    after, metrics = jax.eval_shape(lambda e, s: train_updates(e, s, SMALL, 2), env, state)
    before = jax.eval_shape(lambda s: s, state)
    described = [[(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(t)] for t in (before, after)]
    assert described[0] == described[1]
    assert all(x.shape == (2,) for x in metrics.values())


def trained(env: AutoReset, config: Config, seed: int):
    state = init(env, config, jax.random.key(seed))
    step = compile_training(env, state, config, config.chunk)
    for _ in range(config.num_updates // config.chunk):
        state, metrics = step(env, state)
    return state, metrics


def test_equal_seeds_give_equal_learners(env):
    first, metrics = trained(env, SMALL, 0)
    second, again = trained(env, SMALL, 0)
    other, _ = trained(env, SMALL, 1)
    chex.assert_trees_all_equal(first.learner, second.learner)
    chex.assert_trees_all_equal(metrics, again)
    chex.assert_tree_all_finite(first.learner)
    for a, b in zip(jax.tree.leaves(first.learner.params), jax.tree.leaves(other.learner.params), strict=True):
        assert not np.array_equal(a, b) or a.ndim == 1


def test_learning_rate_falls_to_zero(env):
    """At the end of training an update no longer moves the parameters."""
    state, _ = trained(env, SMALL, 0)
    after, _ = jax.jit(train_update, static_argnums=2)(env, state, SMALL)
    chex.assert_trees_all_equal(after.learner.params, state.learner.params)


def test_it_learns_what_a_feature_tells(env):
    """Feature 0 says where the bar goes. Whoever has seen that makes up to 0.5 % a bar, 8 % in an episode of 16."""
    config = Config(
        num_envs=128, num_steps=16, total_steps=128 * 16 * 60, hidden=(16,), env=ENV, num_minibatches=2, epochs=4,
        learning_rate=3e-3,
    )  # fmt: skip
    unseen = PerpEnv(telling_market(seed=7), FREE, ENV)
    state = init(env, config, jax.random.key(0))
    before = evaluate(unseen, greedy(state.learner, config), jax.random.key(0))
    step = compile_training(env, state, config, config.chunk)
    for _ in range(config.num_updates // config.chunk):
        state, _ = step(env, state)
    after = evaluate(unseen, greedy(state.learner, config), jax.random.key(0))
    assert abs(before.returns.mean()) < 0.01
    assert after.returns.mean() > 0.03 and after.t_stat() > 5, (before.returns.mean(), after.returns.mean())
    assert after.liquidations.sum() == 0


def test_ruin_is_the_end_of_the_future():
    """A market that only falls: longs at full exposure are ruined, and the trainer survives it without a NaN."""
    bars = 200
    edges = np.round(1e6 * 0.97 ** np.arange(bars + 1))
    opens, closes = edges[:-1], edges[1:]
    last = np.stack([opens, opens, closes, closes], -1)[:, None]
    market = assemble(
        last, np.ones((bars, 1), bool), np.zeros((bars, 2)), np.maximum(1, np.round(edges * 0.03)),
        np.zeros((bars + 1, 1)), mark=None, first=1, instrument=HAND,
    )  # fmt: skip
    params = EnvParams(max_exposure=1.0, max_leverage=50.0, ruin_fraction=0.9)
    env = AutoReset(PerpEnv(market, params, ENV))
    state, metrics = trained(env, SMALL, 0)
    assert int(metrics["ruined"].sum()) > 0
    chex.assert_tree_all_finite((state.learner, metrics))
