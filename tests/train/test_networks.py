"""The policy's distribution over *effective* actions, against brute force over all 1 600 of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax import EnvParams
from perpjax.params import EnvConfig
from perpjax.rules.orders import CLOSE, DIRECTIONS, HOLD, MULTI_DISCRETE, decode
from train.policies.heads import MultiDiscrete
from train.policies.mlp import ActorCritic

ALL = np.array(list(itertools.product(*map(range, MULTI_DISCRETE))), np.int32)
OPENS = np.isin(np.array(DIRECTIONS)[ALL[:, 0]], (HOLD, CLOSE), invert=True)
# What the environment sees of an action: of hold and close only the direction.
SEEN = np.where(np.arange(5)[None] == 0, ALL, np.where(OPENS[:, None], ALL, 0))
EFFECTIVE, FIRST, INVERSE = np.unique(SEEN, axis=0, return_index=True, return_inverse=True)
SPLITS = np.cumsum(MULTI_DISCRETE)[:-1]

log_prob = jax.jit(lambda logits, action: MultiDiscrete.from_logits(logits).log_prob(action))
entropy = jax.jit(lambda logits: MultiDiscrete.from_logits(logits).entropy())
sample = jax.jit(lambda logits, key: MultiDiscrete.from_logits(logits).sample(key))
mode = jax.jit(lambda logits: MultiDiscrete.from_logits(logits).mode())


def random_logits(seed: int, scale: float = 1.5, batch: tuple[int, ...] = ()) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, (*batch, sum(MULTI_DISCRETE))), jnp.float32)


def brute_force(logits: np.ndarray) -> np.ndarray:
    """Probability of each effective action: the product over the entries that count, float64."""
    each = []
    for x in np.split(np.asarray(logits, np.float64), SPLITS):
        p = np.exp(x - x.max())
        each.append(p / p.sum())
    joint = np.prod([p[ALL[:, i]] for i, p in enumerate(each)], axis=0)
    # What is ignored is summed out: all 400 ways to say "hold" are one action.
    return np.bincount(INVERSE.ravel(), joint)


def test_there_are_as_many_effective_actions_as_the_environment_tells_apart():
    # hold, close, and two directions x 4 sizes x 5 leverages x 4 stops x 5 targets
    assert len(EFFECTIVE) == 2 + 2 * 4 * 5 * 4 * 5 == 802


def test_the_environment_ignores_what_the_policy_masks():
    """The mask belongs to the codec's directions: hold and close mean the same whatever follows."""
    orders = jax.vmap(lambda a: decode(a, EnvParams(), EnvConfig()))(jnp.asarray(ALL))
    np.testing.assert_array_equal(np.abs(np.asarray(orders.direction)) == 1, OPENS)


@pytest.mark.parametrize("scale", [0.01, 1.5, 20.0])
def test_log_prob_is_that_of_the_effective_action(scale):
    logits = random_logits(0, scale)
    expected = brute_force(logits)
    assert expected.sum() == pytest.approx(1)
    got = np.asarray(log_prob(jnp.broadcast_to(logits, (len(ALL), logits.size)), jnp.asarray(ALL)), np.float64)
    # Equal for all actions that mean the same, and the distinct ones sum to 1.
    np.testing.assert_allclose(got, got[FIRST][INVERSE.ravel()], atol=0)
    assert np.exp(got[FIRST]).sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.exp(got[FIRST]), expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.5, 20.0])
def test_entropy_is_that_of_the_effective_actions(scale):
    for seed in range(5):
        logits = random_logits(seed, scale)
        p = brute_force(logits)
        expected = -np.sum(p * np.log(np.maximum(p, 1e-300)))
        assert float(entropy(logits)) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_entropy_of_extremes():
    # Uniform logits: hold has 1/4, so not all 802 are equally likely. log 4 + 2/4 (log 4 + log 5 + log 4 + log 5)
    expected = np.log(4) + 0.5 * np.log(4 * 5 * 4 * 5)
    assert float(entropy(jnp.zeros(sum(MULTI_DISCRETE)))) == pytest.approx(expected, rel=1e-6)
    # Certain to hold: the rest may be as uniform as it likes, there is nothing left to choose.
    held = jnp.zeros(sum(MULTI_DISCRETE)).at[DIRECTIONS.index(HOLD)].set(200.0)
    assert float(entropy(held)) == pytest.approx(0, abs=1e-6)
    assert bool(jnp.isfinite(jax.grad(lambda x: MultiDiscrete.from_logits(x).entropy())(held)).all())


def test_ignored_entries_have_no_gradient():
    """An action that holds must not move the logits of size, leverage, stop or target."""
    gradient = jax.grad(lambda logits, action: MultiDiscrete.from_logits(logits).log_prob(action))
    logits, offset = random_logits(3), SPLITS[0]
    for name, direction in (("hold", HOLD), ("close", CLOSE)):
        grad = gradient(logits, jnp.asarray([DIRECTIONS.index(direction), 1, 2, 3, 4]))
        np.testing.assert_array_equal(grad[offset:], 0, err_msg=name)
        assert float(jnp.abs(grad[:offset]).max()) > 0
    grad = gradient(logits, jnp.asarray([DIRECTIONS.index(1), 1, 2, 3, 4]))
    assert all(float(jnp.abs(x).max()) > 0 for x in jnp.split(grad, SPLITS))


def test_sampling_follows_the_probabilities():
    n = 200_000
    logits = random_logits(4, 0.7)
    drawn = np.asarray(sample(jnp.broadcast_to(logits, (n, logits.size)), jax.random.key(0)))
    assert drawn.dtype == np.int32 and drawn.shape == (n, 5)
    assert (drawn >= 0).all() and (drawn < np.array(MULTI_DISCRETE)).all()
    # Each entry for itself: five standard errors.
    for i, x in enumerate(np.split(np.asarray(logits, np.float64), SPLITS)):
        p = np.exp(x) / np.exp(x).sum()
        seen = np.bincount(drawn[:, i], minlength=len(p)) / n
        assert (np.abs(seen - p) < 5 * np.sqrt(p * (1 - p) / n)).all(), (i, seen, p)
    # All five together, as effective actions: chi-square over 802 cells has mean 801, standard deviation 40.
    counts = np.bincount(INVERSE.ravel()[np.ravel_multi_index(drawn.T, MULTI_DISCRETE)], minlength=len(EFFECTIVE))
    expected = n * brute_force(logits)
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 801 + 6 * 40, chi


def test_sampling_entries_are_independent_draws():
    """One uniform number for each entry: were it one for all, size and leverage would rise together."""
    drawn = np.asarray(sample(jnp.zeros((50_000, sum(MULTI_DISCRETE))), jax.random.key(1)))
    correlation = np.corrcoef(drawn.T) - np.eye(5)
    assert np.abs(correlation).max() < 5 / np.sqrt(50_000)


def test_certain_choices_are_always_drawn():
    logits = jnp.full((1000, sum(MULTI_DISCRETE)), -1e9)
    picks = [np.random.default_rng(i).integers(0, n, 1000) for i, n in enumerate(MULTI_DISCRETE)]
    offsets = np.concatenate([[0], SPLITS])
    for offset, pick in zip(offsets, picks, strict=True):
        logits = logits.at[np.arange(1000), offset + pick].set(1e9)
    np.testing.assert_array_equal(sample(logits, jax.random.key(0)), np.stack(picks, -1))
    np.testing.assert_array_equal(mode(logits), np.stack(picks, -1))


def test_mode_is_the_most_probable_of_each_entry():
    logits = random_logits(5, batch=(64,))
    expected = np.stack([np.argmax(x, -1) for x in np.split(np.asarray(logits), SPLITS, axis=-1)], -1)
    got = mode(logits)
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == jnp.int32


def test_batches_of_any_shape():
    logits = random_logits(6, batch=(2, 3))
    policy = MultiDiscrete.from_logits(logits)
    action = policy.sample(jax.random.key(0))
    assert action.shape == (2, 3, 5) and policy.log_prob(action).shape == policy.entropy().shape == (2, 3)
    one = MultiDiscrete.from_logits(logits[1, 2])
    assert float(one.log_prob(action[1, 2])) == pytest.approx(float(policy.log_prob(action)[1, 2]), rel=1e-6)


def test_trunks_are_separate_and_the_first_policy_is_almost_uniform():
    model = ActorCritic((16, 8))
    obs = jax.random.normal(jax.random.key(1), (5, 12))
    params = jax.jit(model.init)(jax.random.key(0), obs)
    logits, value = model.apply(params, obs)
    assert logits.shape == (5, sum(MULTI_DISCRETE)) and value.shape == (5,)
    assert float(jnp.abs(logits).max()) < 0.1
    by_value = jax.grad(lambda p: model.apply(p, obs)[1].sum())(params)["params"]
    by_logits = jax.grad(lambda p: (model.apply(p, obs)[0] ** 2).sum())(params)["params"]
    for name in by_value:
        moves = [float(max(jnp.abs(x).max() for x in jax.tree.leaves(g[name]))) > 0 for g in (by_value, by_logits)]
        assert moves == [name.startswith("critic"), name.startswith("actor")], name
