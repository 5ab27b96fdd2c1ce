"""Policies with memory: the update replays what the rollout did, and memory ends with the episode."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import LENGTH, recall, toy

from perpjax import EnvConfig
from train.evaluate import greedy
from train.loop import compile_chunk
from train.policies import GRU, MLP, MultiDiscrete, Policy, single_carry
from train.ppo.algorithm import PPO
from train.ppo.config import Config
from train.state import TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS, ENVS = 40, 6
CONFIG = Config(
    num_envs=ENVS, num_steps=STEPS, total_steps=ENVS * STEPS * 2, epochs=2, num_minibatches=3, learning_rate=0.0,
    env=EnvConfig(max_lots=2, episode_length=LENGTH),
)  # fmt: skip
RUINS = tuple(range(0, 400, 23))


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """`h' = tanh(U h + W obs)`, from `h = start` at the first observation of an episode; it counts the steps too."""

    size: int = 4
    start: float = 0.5

    def init(self, key, obs):
        keys, out = jax.random.split(key, 4), MultiDiscrete.num_logits()
        shapes = {"U": (self.size, self.size), "W": (obs.shape[-1], self.size), "actor": (self.size, out)}
        shapes["critic"] = (self.size, 1)
        return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def initial_carry(self, num_envs):
        return {"h": jnp.full((num_envs, self.size), self.start), "age": jnp.zeros(num_envs, jnp.int32)}

    def __call__(self, params, carry, obs, reset):
        h = jnp.tanh(jnp.where(reset[..., None], self.start, carry["h"]) @ params["U"] + obs @ params["W"])
        carry = {"h": h, "age": jnp.where(reset, 0, carry["age"]) + 1}
        return carry, MultiDiscrete.from_logits(h @ params["actor"]), (h @ params["critic"])[..., 0]


@dataclasses.dataclass(frozen=True)
class Clock:
    """Its value is the number of steps since the last reset: exact in float32."""

    def init(self, key, obs):
        return {"logits": jnp.zeros(MultiDiscrete.num_logits())}

    def initial_carry(self, num_envs):
        return jnp.zeros(num_envs)

    def __call__(self, params, carry, obs, reset):
        age = jnp.where(reset, 0, carry) + 1
        logits = jnp.broadcast_to(params["logits"], (*age.shape, MultiDiscrete.num_logits()))
        return age, MultiDiscrete.from_logits(logits), age


SMALL_GRU = GRU((6,), 5)


def name(x: object) -> str:
    return str(x) if isinstance(x, int) else type(x).__name__


@pytest.fixture(scope="module")
def envs():
    return toy(ruin=RUINS)


def run(envs, ppo: PPO, updates: int) -> tuple[TrainState, list[dict]]:
    """A few updates, and what the loss was given in each minibatch of the last one."""
    seen = []

    def recorded(distribution, value, rows, config):
        told = {"log_prob": distribution.log_prob(rows.action), "value": value, "rows": rows}
        jax.debug.callback(lambda told: seen.append(jax.tree.map(np.asarray, told)), told)
        return ppo.loss(distribution, value, rows, config)

    recording = dataclasses.replace(ppo, loss=recorded)
    state, update = jax.jit(ppo.init)(envs, jax.random.key(0)), jax.jit(recording.update)
    for _ in range(updates):
        seen.clear()
        state, _ = jax.block_until_ready(update(envs, state))
        jax.effects_barrier()
    return state, seen


@pytest.mark.parametrize("policy, updates", [(Recurrent(), 1), (Recurrent(), 2), (SMALL_GRU, 2)], ids=name)
def test_the_update_repeats_the_rollout_across_episodes(envs, policy, updates):
    """With a learning rate of 0, log probabilities and values are those of the rollout, in every step.

    The second update begins in the midst of episodes, with the memory that the first one left.
    """
    _, seen = run(envs, PPO(CONFIG, policy), updates)
    assert len(seen) == CONFIG.epochs * CONFIG.minibatches
    for block in seen:
        rows = block["rows"]
        assert rows.obs.shape[:2] == rows.reset.shape == (STEPS, ENVS // CONFIG.minibatches)
        assert rows.reset[1:].any(axis=0).all() and not rows.reset.all()
        np.testing.assert_allclose(block["log_prob"], rows.log_prob, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(block["value"], rows.value, rtol=1e-4, atol=1e-4)


def test_memory_is_reset_at_the_same_step_to_the_bit(envs):
    """The age of the episode: in the rollout, in the update, and in the environment's own count."""
    state, seen = run(envs, PPO(CONFIG, Clock()), 2)
    for block in seen:
        np.testing.assert_array_equal(block["value"], block["rows"].value)
        reset, age = block["rows"].reset, block["rows"].value
        np.testing.assert_array_equal(age[1:], np.where(reset[1:], 1, age[:-1] + 1))
        assert (age[0] > 1).any() and not reset[0].all()  # the second rollout begins in the midst of episodes
    np.testing.assert_array_equal(state.carry, state.envs.episode.length)


@pytest.mark.parametrize("policy, shift", [(Recurrent(), -1), (Recurrent(), 1), (SMALL_GRU, 1)], ids=name)
def test_a_reset_one_step_off_would_be_noticed(envs, policy, shift):
    """The fault itself: the update resets the memory a step too late, or too early."""

    class Shifted(PPO):
        def replay(self, params, carry, rows):
            return super().replay(params, carry, rows._replace(reset=jnp.roll(rows.reset, shift, axis=0)))

    _, seen = run(envs, Shifted(CONFIG, policy), 1)
    errors = [np.abs(block["value"] - block["rows"].value).max() for block in seen]
    assert min(errors) > 0.01


def test_memory_begins_with_each_episode_and_lasts_over_updates(envs):
    """The policy's own count of steps is the age of the episode."""
    state, _ = run(envs, PPO(CONFIG, Recurrent()), 2)
    ended = np.asarray(state.envs.terminated | state.envs.truncated)
    age, length = np.asarray(state.carry["age"]), np.asarray(state.envs.episode.length)
    np.testing.assert_array_equal(age, length)
    assert not ended.all() and age[~ended].min() > 0 and len(set(age)) > 1


def test_truncated_episodes_are_valued_with_their_own_memory(envs):
    """The value of a final observation continues the episode: it is not the first step of a new one."""
    given, config = [], dataclasses.replace(CONFIG, obs_noise=0.0)

    def recorded(*args):
        jax.debug.callback(lambda *args: given.append([np.asarray(x) for x in args]), *args[:6])
        return plain.gae(*args)

    plain = PPO(config, Recurrent())
    before = jax.jit(plain.init)(envs, jax.random.key(0))
    ppo = dataclasses.replace(plain, gae=recorded)
    jax.block_until_ready(jax.jit(ppo.update)(envs, before))
    jax.effects_barrier()
    _, value, _, final_value, _, truncated = given[0]
    params, standardise = before.learner.params, before.learner.observations.standardise
    step, policy = jax.jit(envs.step), jax.jit(plain.policy.__call__)
    state, carry, cuts, no = before.envs, before.carry, 0, jnp.zeros(ENVS, bool)
    for t in range(STEPS):
        # What the toy does next does not depend on the action.
        carry, _, expected = policy(params, carry, standardise(state.obs), state.terminated | state.truncated)
        np.testing.assert_allclose(value[t], expected, rtol=1e-3, atol=1e-4)
        state = step(state, jnp.zeros((ENVS, 5), jnp.int32))
        final = policy(params, carry, standardise(state.final_obs), no)[2]
        np.testing.assert_allclose(final_value[t], np.where(truncated[t], final, 0), rtol=1e-3, atol=1e-4)
        cuts += truncated[t].sum()
    assert cuts > 3


@pytest.mark.parametrize("policy", [Recurrent(), SMALL_GRU], ids=name)
def test_it_learns_through_time(envs, policy):
    """The gradient reaches every weight, the recurrent ones too."""
    ppo = PPO(dataclasses.replace(CONFIG, learning_rate=1e-3), policy)
    state = jax.jit(ppo.init)(envs, jax.random.key(0))
    after, metrics = jax.jit(ppo.update)(envs, state)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.learner.params, after.learner.params)
    assert min(jax.tree.leaves(moved)) > 0
    chex.assert_tree_all_finite((after.learner, metrics))


def test_the_greedy_policy_carries_its_memory(envs):
    """One environment after the other, and a batch of them, through an auto-reset."""
    ppo = PPO(CONFIG, Recurrent())
    learner = jax.jit(ppo.init)(envs, jax.random.key(0)).learner
    act, key = greedy(learner, ppo.policy), jax.random.key(1)
    state, carry = jax.jit(envs.reset)(jax.random.split(key, 3)), ppo.policy.initial_carry(3)
    single, alone, step = single_carry(ppo.policy), jax.jit(act), jax.jit(envs.step)
    ages = []
    for _ in range(LENGTH + 4):
        one, single = alone(key, envs.one(state, 1), single)
        action, carry = alone(key, state, carry)
        np.testing.assert_array_equal(one, action[1])
        np.testing.assert_allclose(single["h"], carry["h"][1], rtol=1e-5)
        ages.append(int(single["age"]))
        state = step(state, action)
    # At the latest after LENGTH bars an episode ends, and the age is 1 again.
    begins = [i for i, age in enumerate(ages) if age == 1]
    assert begins[0] == 0 and len(begins) > 1
    assert ages == [i - max(b for b in begins if b <= i) + 1 for i in range(len(ages))]


# A task that needs memory.


def recall_share(policy: Policy) -> float:
    """Learn to answer at the last of 5 steps with the side shown at the first; return the mean reward of an answer."""
    config = Config(
        num_envs=64, num_steps=20, total_steps=64 * 20 * 60, epochs=4, num_minibatches=2, learning_rate=1e-2,
        weight_decay=0.0, obs_noise=0.0, env=EnvConfig(max_lots=2, episode_length=5),
    )  # fmt: skip
    envs, ppo = recall(5), PPO(config, policy)
    state = jax.jit(ppo.init)(envs, jax.random.key(0))
    state, _ = compile_chunk(ppo.update, envs, state, 60)(envs, state, jnp.int32(60))
    act, carry = greedy(state.learner, policy), policy.initial_carry(64)
    states = jax.jit(envs.reset)(jax.random.split(jax.random.key(1), 64))

    def step(loop, _):
        states, carry = loop
        action, carry = act(jax.random.key(0), states, carry)
        states = envs.step(states, action)
        return (states, carry), states.reward

    return 5 * float(jax.jit(lambda loop: jax.lax.scan(step, loop, length=20)[1])((states, carry)).mean())


def test_gru_learns_to_remember_and_a_perceptron_cannot():
    assert recall_share(GRU((8,), 8)) > 0.95
    assert abs(recall_share(MLP((16,)))) < 0.4  # 64 draws of a sign
