"""The distribution over `box5` actions counts each order that the environment tells apart once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax import EnvConfig, EnvParams
from perpjax.rules.orders import HOLD, LONG, SHORT, THRESHOLD, decode
from train.policies import Box5Head

pytestmark = pytest.mark.usefixtures("quick_compilation")

ENV = EnvConfig(actions="box5", opposite="close")
NONE = [0.0] * 4
SIDES = {HOLD: 0.0, LONG: 0.7, SHORT: -0.9}
SMALL = 31
"""Points of a grid over an entry's range for each of the integrals below."""


def logits_of(seed: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, Box5Head(10.0).num_logits()), jnp.float32)


@jax.jit
def mode(logits: jax.Array) -> jax.Array:
    return Box5Head(10.0).from_logits(logits).mode()


@functools.partial(jax.jit, static_argnames="max_leverage")
def log_prob(logits: jax.Array, action: jax.Array, max_leverage: float = 10.0) -> jax.Array:
    batch = jnp.broadcast_to(logits, (*action.shape[:-1], logits.shape[-1]))
    return Box5Head(max_leverage).from_logits(batch).log_prob(action)


def edges_of(max_leverage: float) -> np.ndarray:
    """Ends of the intervals of the leverage entry that mean one whole number each, by brute force."""
    entry = np.linspace(-1, 1, 200_001)[1:-1].astype(np.float32)
    action = jnp.stack([jnp.full_like(entry, x) for x in (1, 0)] + [entry] + [jnp.zeros_like(entry)] * 2)
    levels = np.asarray(jax.jit(lambda a: decode(a, EnvParams(max_leverage=max_leverage), ENV).leverage)(action))
    return np.concatenate([[-1], entry[1:][np.diff(levels) > 0], [1]])


@pytest.mark.parametrize("max_leverage", [10.0, 7.5, 1.0])
def test_probabilities_of_all_orders_sum_to_one(max_leverage):
    """Holding, and for long and short the sum over leverages times the integrals over size, stop and target."""
    logits, edges = logits_of(0), edges_of(max_leverage)
    levels = (edges[1:] + edges[:-1]) / 2
    assert len(levels) == Box5Head(max_leverage).from_logits(logits).num_levels
    x, weights = np.polynomial.legendre.leggauss(SMALL)

    @jax.jit
    def at(sides, entries):
        return log_prob(logits, jnp.concatenate([sides[..., None], entries], axis=-1), max_leverage)

    total = np.exp(at(jnp.zeros(1), jnp.zeros((1, 4))))[0]
    for side in (0.5, -0.5):
        grid = np.stack(np.meshgrid(x, levels, x, x, indexing="ij"), axis=-1).reshape(-1, 4)
        weight = np.einsum("a,b,c,d->abcd", weights, np.ones(len(levels)), weights, weights).ravel()
        total += weight @ np.exp(np.asarray(at(jnp.full(len(grid), side), jnp.asarray(grid, jnp.float32)), np.float64))
    assert total == pytest.approx(1, abs=2e-3)


def test_only_what_the_environment_reads_counts():
    """Anywhere inside one interval of direction and leverage the probability is the same, to the bit."""
    logits = logits_of(1)
    for side, places in ((HOLD, (-THRESHOLD, 0.1, THRESHOLD)), (LONG, (0.34, 1.0)), (SHORT, (-0.34, -1.0))):
        actions = jnp.asarray([[place, 0.3, 0.2, 0.1, -0.4] for place in places])
        assert len(set(np.asarray(log_prob(logits, actions)).tolist())) == 1, side
    holds = jnp.asarray([[0.2, *np.random.default_rng(i).uniform(-1, 1, 4)] for i in range(20)])
    assert len(set(np.asarray(log_prob(logits, holds)).tolist())) == 1
    # Leverage 5 is the interval [4.5, 5.5] of 1 + 9 u; the next number is another outcome.
    levers = jnp.asarray([[0.7, 0.3, 2 * (level - 1) / 9 - 1, 0.1, -0.4] for level in (4.6, 5.0, 5.4, 5.6)])
    same, other = np.split(np.asarray(log_prob(logits, levers)), [3])
    assert len(set(same.tolist())) == 1 and other[0] != same[0]


def test_draws_decode_to_orders_as_often_as_claimed():
    n, logits = 200_000, logits_of(2)
    head = Box5Head(10.0)
    drawn = jax.jit(lambda k: head.from_logits(jnp.broadcast_to(logits, (n, 11))).sample(k))(jax.random.key(0))
    assert drawn.shape == (n, 5) and drawn.dtype == jnp.float32 and float(jnp.abs(drawn).max()) < 1
    order = jax.jit(lambda a: decode(a, EnvParams(), ENV))(drawn.T)
    opens = np.asarray(order.direction) != HOLD

    def check(share: float, p: float) -> None:
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-6, (share, p)

    for side, place in SIDES.items():
        p = np.exp(np.asarray(log_prob(logits, jnp.asarray([place, 0, 0, 0, 0]))))
        if side == HOLD:
            check(np.mean(~opens), p)
    sides = np.asarray(jax.nn.softmax(logits[:3]))
    for i, side in enumerate((HOLD, LONG, SHORT)):
        check(np.mean(np.asarray(order.direction) == side), sides[i])
    # Differences of the log probability at two leverages are those of their frequencies.
    levels = jnp.asarray([[0.7, 0.0, 2 * (k - 1) / 9 - 1, 0.0, 0.0] for k in range(1, 11)])
    p = np.exp(np.asarray(log_prob(logits, levels), np.float64))
    for k in range(1, 11):
        check(np.mean(np.asarray(order.leverage) == k), p[k - 1] / p.sum())
    # Size, stop and target: shares of tenths of the range, by the integral of the density over each.
    centres = np.linspace(-1, 1, 2001)[:-1] + 5e-4
    for column in (1, 3, 4):
        points = np.zeros((2000, 5), np.float32)
        points[:, 0], points[:, column] = 0.7, centres
        p = np.exp(np.asarray(log_prob(logits, jnp.asarray(points)), np.float64)).reshape(10, 200).sum(1)
        seen = np.histogram(np.asarray(drawn[:, column]), bins=10, range=(-1, 1))[0] / n
        np.testing.assert_allclose(seen, p / p.sum(), atol=0.005)


def test_the_mean_of_the_log_probability_is_the_entropy():
    n = 100_000

    @jax.jit
    def draw(logits, key):
        policy = Box5Head(10.0).from_logits(jnp.broadcast_to(logits, (n, 11)))
        return Box5Head(10.0).from_logits(logits).entropy(), policy.log_prob(policy.sample(key))

    for seed, scale in ((0, 0.01), (1, 1.0), (2, 3.0)):
        entropy, told = (np.asarray(x) for x in draw(logits_of(seed, scale), jax.random.key(seed)))
        assert float(entropy) == pytest.approx(-told.mean(), abs=0.03 + 5 * told.std() / np.sqrt(n))


def test_the_gradient_is_that_of_differences():
    """And the mean of the score is zero: draws and log probability are of one distribution."""
    logits, action = logits_of(3), jnp.asarray([0.7, -0.3, 0.4, 0.2, -0.8])
    gradient = jax.jit(jax.grad(log_prob))(logits, action)
    step = 1e-2
    for i in range(len(logits)):
        ends = [float(log_prob(logits.at[i].add(sign * step), action)) for sign in (-1, 1)]
        assert float(gradient[i]) == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=2e-3), i
    n = 50_000
    drawn = Box5Head(10.0).from_logits(jnp.broadcast_to(logits, (n, 11))).sample(jax.random.key(0))
    scores = np.asarray(jax.jit(jax.vmap(jax.grad(log_prob), (None, 0)))(logits, drawn))
    assert (np.abs(scores.mean(0)) < 5 * scores.std(0) / np.sqrt(n)).all()


def test_a_hold_moves_no_other_entry():
    gradient = np.asarray(jax.grad(log_prob)(logits_of(4), jnp.asarray([0.1, 0.9, -0.9, 0.5, 0.2])))
    np.testing.assert_array_equal(gradient[3:], 0)
    assert np.abs(gradient[:3]).max() > 0


@pytest.mark.parametrize("max_leverage", [1.0, 2.0, 7.5, 125.0])
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_extremes_stay_finite(max_leverage, scale):
    """Also actions at the very ends, which a policy of another kind may have taken."""

    def total(logits: jax.Array, action: jax.Array) -> jax.Array:
        policy = Box5Head(max_leverage).from_logits(logits)
        return policy.log_prob(action) + policy.entropy()

    check = jax.jit(jax.value_and_grad(total))
    for seed in range(3):
        logits = logits_of(seed, scale)
        policy = Box5Head(max_leverage).from_logits(logits)
        for action in (policy.sample(jax.random.key(seed)), policy.mode(), jnp.ones(5), -jnp.ones(5)):
            assert all(np.isfinite(x).all() for x in check(logits, action))


def test_the_greedy_action_is_the_most_probable_of_each_entry():
    points = np.linspace(-1, 1, 2001)[1:-1]
    for seed in range(4):
        logits = logits_of(seed, 0.5).at[:3].set(jnp.asarray([0.0, 1.0, 0.0]))
        best = np.asarray(mode(logits))
        for column in (1, 2, 3, 4):
            actions = np.tile(best, (len(points), 1))
            actions[:, column] = points
            told = np.asarray(log_prob(logits, jnp.asarray(actions, jnp.float32)))
            assert float(log_prob(logits, jnp.asarray(best))) >= told.max() - 1e-3, (seed, column)


def test_the_greedy_direction_and_batches_of_any_shape():
    logits = jnp.asarray([[0.0, 1.0, 0.5, *NONE, *NONE], [1.0, 0.0, 0.5, *NONE, *NONE], [0.0, 0.5, 1.0, *NONE, *NONE]])
    greedy = mode(logits)
    np.testing.assert_allclose(greedy[:, [1, 3, 4]], 0, atol=1e-6)
    orders = decode(greedy.T, EnvParams(), ENV)
    np.testing.assert_array_equal(orders.direction, [LONG, HOLD, SHORT])
    wide = Box5Head(10.0).from_logits(jnp.zeros((2, 3, 11)))
    assert wide.sample(jax.random.key(0)).shape == mode(jnp.zeros((2, 3, 11))).shape == (2, 3, 5)
    assert wide.entropy().shape == wide.log_prob(jnp.zeros((2, 3, 5))).shape == (2, 3)
    assert Box5Head(10.0).from_logits(jnp.zeros(11)).sample(jax.random.key(0)).shape == (5,)
