"""The names of JAX that are not stable, and what the package needs of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perpjax.xla import Program, default_platform

CPU, GPU = Program("cpu", 8), Program("gpu", 8)


def compiled_text(program: Program) -> str:
    """A sum in a kernel of its own, which two results read."""

    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = program.own_kernel(lambda x: jnp.sin(x) + 1)(x)
        return y * 2, jnp.exp(y)

    return jax.jit(run).lower(jnp.arange(8.0)).compile().as_text()


def test_a_kernel_of_its_own_stays_a_call():
    assert "to_apply" in compiled_text(CPU) and compiled_text(CPU).count(" sine(") == 1
    assert " call(" not in compiled_text(GPU)


@pytest.mark.parametrize("program", [CPU, GPU], ids=["cpu", "gpu"])
def test_boundaries_change_no_number(program):
    x, flag = jnp.linspace(-1, 1, 9), jnp.arange(9) % 2 == 0
    got = jax.jit(lambda x, flag: program.store(program.own_kernel(lambda x, f: (x * 3, ~f))(x, flag)))(x, flag)
    np.testing.assert_array_equal(got[0], x * 3)
    np.testing.assert_array_equal(got[1], ~flag)
    assert got[1].dtype == bool


def test_the_default_platform_is_that_of_the_chosen_device():
    assert default_platform() == jax.default_backend()
    with jax.default_device(jax.devices("cpu")[0]):
        assert default_platform() == "cpu"
    with jax.default_device("cpu"):
        assert default_platform() == "cpu"
