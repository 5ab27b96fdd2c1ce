"""The arithmetic of PPO: advantages and losses, by hand and against their definitions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax.rules.orders import MULTI_DISCRETE
from train.policies import MLP
from train.ppo.config import Config
from train.ppo.losses import Rows, compute_gae, ppo_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")


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


# The loss.


@functools.partial(jax.jit, static_argnums=4)
def differentiate(ratio, advantage, value_offset, target_offset, config):
    obs = jnp.asarray([[0.3, -1.0, 2.0]])
    policy, reset = MLP(config.hidden), jnp.zeros(1, bool)
    params = policy.init(jax.random.key(3), obs)
    _, distribution, value = policy(params, (), obs, reset)
    action = jnp.asarray([[1, 2, 3, 0, 4]])
    old = distribution.log_prob(action) - jnp.log(ratio)
    rows = Rows(obs, reset, action, old, value - value_offset, advantage[None], value + target_offset)

    def loss(params):
        return ppo_loss(*policy(params, (), rows.obs, rows.reset)[1:], rows, config)

    return jax.value_and_grad(loss, has_aux=True)(params)


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
