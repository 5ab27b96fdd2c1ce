"""Actions decoded to orders, against literal numbers; the effects of an order are tested in test_rules.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, hand_market

from perpjax import AutoReset, PerpEnv, VecEnv
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.orders import CLOSE, HOLD, LONG, MULTI_DISCRETE, SHORT, Verdict, decode, hold_action, sample_action

KINDS = ("box5", "multi_discrete")


def decoded(kind: str, *action: float, max_leverage: float = 10.0) -> list[float]:
    """Direction, size, leverage, stop and target multiple."""
    dtype = jnp.float32 if kind == "box5" else jnp.int32
    return [float(x) for x in decode(jnp.array(action, dtype), EnvParams(max_leverage=max_leverage), EnvConfig(kind))]


def test_codes_are_those_of_the_contract():
    # What is logged, stored or sent is the number, so it must not move.
    assert (HOLD, LONG, SHORT, CLOSE) == (0, 1, -1, 2)
    assert [(v.name, v.value) for v in Verdict] == [
        ("HOLD", 0), ("DATA_GAP", 1), ("MAX_LOTS", 2), ("NO_HEDGE", 3), ("MAX_EXPOSURE", 4), ("MAX_NOTIONAL", 5),
        ("BELOW_MINIMUM", 6), ("IMMEDIATE_LIQUIDATION", 7), ("ACCEPTED", 8),
    ]  # fmt: skip
    assert MULTI_DISCRETE == (4, 4, 5, 4, 5)


@pytest.mark.parametrize("column, values", [
    (0, [0, 1, -1, 2]), (1, [0.25, 0.5, 0.75, 1]), (2, [1, 2, 3, 5, 10]), (3, [0.5, 1, 2, 3]), (4, [0.5, 1, 2, 4, 6]),
])  # fmt: skip
def test_each_entry_of_multi_discrete_has_its_own_table(column, values):
    # The other entries stay 0: hold, 0.25, 1, 0.5, 0.5.
    first = [0, 0.25, 1, 0.5, 0.5]
    for index, value in enumerate(values):
        action = [index if i == column else 0 for i in range(5)]
        assert decoded("multi_discrete", *action) == [value if i == column else first[i] for i in range(5)]


@pytest.mark.parametrize("column, low, high", [(1, 0, 1), (2, 1, 10), (3, 0.5, 3), (4, 0.5, 6)])
def test_each_entry_of_box5_has_its_own_range(column, low, high):
    # The other entries stay at -1: short, nothing, 1x, 0.5, 0.5. In quarters of the range; leverage 1 + 9 / 4 = 3.25
    # -> 3, 5.5 -> 6 and 7.75 -> 8.
    first = [-1, 0, 1, 0.5, 0.5]
    for quarter in range(5):
        action = [quarter / 2 - 1 if i == column else -1 for i in range(5)]
        value = low + (high - low) * quarter / 4
        expected = round(value) if column == 2 else value
        assert decoded("box5", *action) == [expected if i == column else first[i] for i in range(5)]
    # 1 + 0.5 * (2 - 1) = 1.5 -> 2 and 1 + 0.5 * (4 - 1) = 2.5 -> 2: half to even.
    assert [decoded("box5", 0, 0, 0, 0, 0, max_leverage=x)[2] for x in (2, 4)] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_hold_is_an_action_like_those_that_are_sampled(kind):
    config = EnvConfig(kind)
    hold, drawn = hold_action(config), sample_action(jax.random.key(0), config)
    assert (hold.shape, hold.dtype) == (drawn.shape, drawn.dtype)
    assert drawn.dtype == (jnp.float32 if kind == "box5" else jnp.int32)
    assert not np.any(hold) and decoded(kind, *hold)[0] == HOLD


def test_one_entry_that_is_not_finite_makes_the_order_hold():
    action, config = jnp.array([-1, 1, 1, 1, 1], jnp.float32), EnvConfig("box5")
    assert int(decode(action, EnvParams(), config).direction) == SHORT
    for i in range(5):
        assert int(decode(action.at[i].set(jnp.nan), EnvParams(), config).direction) == HOLD


SHORTS = {"box5": [-1.0, 1.0, 1.0, 1.0, 1.0], "multi_discrete": [2, 3, 4, 3, 4]}


@pytest.mark.parametrize("kind", KINDS)
def test_actions_of_the_codecs_kind_are_taken_in_any_form(kind):
    config, numbers = EnvConfig(kind), SHORTS[kind]
    wanted = decode(jnp.asarray(numbers), EnvParams(), config)
    kinds = ("f2", "f4", "f8") if kind == "box5" else ("i1", "u1", "i2", "i4", "u4", "i8", "u8")
    forms = [numbers, tuple(numbers), [np.float64(x) if kind == "box5" else np.int64(x) for x in numbers]]
    forms += [np.array(numbers, dtype) for dtype in kinds]
    forms += [[jnp.asarray(x) for x in numbers]]
    if kind == "box5":
        forms += [[-1, 1.0, 1, 1, 1], jnp.asarray(numbers, jnp.bfloat16)]  # some whole numbers among floats
    for action in forms:
        assert [float(x) for x in decode(action, EnvParams(), config)] == [float(x) for x in wanted]
        step = jax.jit(lambda a: decode(a, EnvParams(), config))
        assert [float(x) for x in step(action)] == [float(x) for x in wanted]


@pytest.mark.parametrize("kind, given, called", [
    ("box5", [2, 3, 0, 3, 4], "int"), ("box5", [True] * 5, "bool"), ("multi_discrete", [True] * 5, "bool"),
    ("multi_discrete", [2.0, 3.0, 0.0, 3.0, 4.0], "float"), ("multi_discrete", [1j] * 5, "complex"),
])  # fmt: skip
def test_actions_of_another_kind_are_refused_where_the_step_is_traced(kind, given, called):
    config = EnvConfig(kind, max_lots=3, episode_length=6)
    env = PerpEnv(hand_market(), FREE, config)
    state = env.reset(jax.random.key(0), 1)
    for action in (given, np.array(given), jnp.array(given)):
        with pytest.raises(ValueError, match=f"an action of {kind} .* not of {called}"):
            jax.eval_shape(lambda a: env.step(state, a), action)
        with pytest.raises(ValueError, match=f"an action of {kind} .* not of {called}"):
            env.step(state, action)
    batch = jnp.array([given])
    many = VecEnv(AutoReset(env))
    with pytest.raises(ValueError, match=f"an action of {kind} .* not of {called}"):
        many.step(many.reset(jax.random.split(jax.random.key(0), 1)), batch)


ONE = jnp.int32(1)


@pytest.mark.parametrize("action", [
    [1, 2], [[1] * 5] * 5, 3, [], ["a"] * 5, None, [[1, 2], [3]], {"a": 1}, {"a": ONE}, [ONE, None, 0, 0, 0],
])  # fmt: skip
def test_what_is_no_action_is_one_line(action):
    env = PerpEnv(hand_market(), FREE, EnvConfig(max_lots=3, episode_length=6))
    with pytest.raises(ValueError, match="an action ") as caught:
        env.step(env.reset(jax.random.key(0), 1), action)
    assert "\n" not in str(caught.value)


def test_integers_out_of_range_are_the_nearest_choice():
    for dtype in (np.int8, np.int32, np.int64, np.uint32, np.uint64):
        top = np.iinfo(dtype).max
        for large in (99, top):
            got = decode(np.full(5, large, dtype), EnvParams(), EnvConfig())
            assert [float(x) for x in got] == [CLOSE, 1, 10, 3, 6]
    for action in ([2**63, 99, 2**70, 9, 9], [jnp.int32(9), 99, np.int64(2**40), 9, 9]):
        assert [float(x) for x in decode(action, EnvParams(), EnvConfig())] == [CLOSE, 1, 10, 3, 6]
    for dtype in (np.int8, np.int32, np.int64):
        got = decode(np.full(5, np.iinfo(dtype).min, dtype), EnvParams(), EnvConfig())
        assert [float(x) for x in got] == [HOLD, 0.25, 1, 0.5, 0.5]


def test_finite_numbers_beyond_float32_are_clipped():
    config = EnvConfig("box5")
    for dtype in (np.float64, np.longdouble):
        got = decode(np.array([1e300, -1e300, 1e39, 1, 1], dtype), EnvParams(), config)
        assert [float(x) for x in got] == [LONG, 0, 10, 3, 6]
    assert int(decode(np.array([np.inf, 1, 1, 1, 1]), EnvParams(), config).direction) == HOLD
