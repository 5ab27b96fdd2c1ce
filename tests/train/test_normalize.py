"""Running moments, and what is standardised by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.normalize import CLIP, Moments


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
