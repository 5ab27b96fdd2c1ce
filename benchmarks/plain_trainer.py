"""A PPO trainer written the plain way, a yardstick for ours.

    python -m benchmarks.training --peer benchmarks/plain_trainer.py

In the manner of PureJaxRL: rows shuffled before each pass, a plain `jax.vmap` of the environment, two trunks,
`jax.random.categorical` for each entry, and `optax.adam`. It has no value of truncated observations, no statistics of
observations or rewards, no noise and no metrics. Sizes, network and loss are those of our trainer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from perpjax import AutoReset
from perpjax.rules.orders import MULTI_DISCRETE

GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2


class Network(nn.Module):
    """Two trunks of 64-64."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[list[Array], Array]:
        def trunk(width: int, scale: float) -> Array:
            y = x
            for _ in range(2):
                y = nn.tanh(nn.Dense(64, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))(y))
            return nn.Dense(width, kernel_init=nn.initializers.orthogonal(scale))(y)

        logits = jnp.split(trunk(sum(MULTI_DISCRETE), 0.01), np.cumsum(MULTI_DISCRETE)[:-1], axis=-1)
        return [jax.nn.log_softmax(part) for part in logits], trunk(1, 1.0)[..., 0]


class Step(NamedTuple):
    """One step of every environment."""

    obs: Array
    action: Array
    log_prob: Array
    value: Array
    reward: Array
    done: Array


def log_prob_of(log_probs: list[Array], action: Array) -> Array:
    """Return the log probability of all five entries."""
    return sum(jnp.take_along_axis(p, action[..., i, None], -1)[..., 0] for i, p in enumerate(log_probs))


def make(
    env: AutoReset, num_envs: int, num_steps: int, epochs: int, minibatches: int, updates: int
) -> tuple[Callable[[Array], Any], Callable[[Any], Any]]:
    """Return `init(key)`, the first state, and `train(state)`, all updates; see `benchmarks.training`."""
    network, optimiser = Network(), optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3, eps=1e-5))

    def init(key: Array) -> tuple:
        states = jax.vmap(env.reset)(jax.random.split(key, num_envs))
        params = network.init(key, states.obs[:1])
        return params, optimiser.init(params), states, key

    def loss(params: Any, rows: Step, advantage: Array, target: Array) -> Array:
        log_probs, value = network.apply(params, rows.obs)
        ratio = jnp.exp(log_prob_of(log_probs, rows.action) - rows.log_prob)
        scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = rows.value + jnp.clip(value - rows.value, -CLIP, CLIP)
        policy = -jnp.minimum(ratio * scaled, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * scaled).mean()
        entropy = sum(-(jnp.exp(p) * p).sum(-1) for p in log_probs).mean()
        return policy + 0.25 * jnp.maximum((value - target) ** 2, (clipped - target) ** 2).mean() - 0.003 * entropy

    def update(state: tuple, _: None) -> tuple:
        params, opt_state, states, key = state

        def step(loop: tuple, _: None) -> tuple:
            states, key = loop
            key, *keys = jax.random.split(key, 6)
            log_probs, value = network.apply(params, states.obs)
            drawn = [jax.random.categorical(k, p) for k, p in zip(keys, log_probs, strict=True)]
            action = jnp.stack(drawn, -1).astype(jnp.int32)
            stepped = jax.vmap(env.step)(states, action)
            done = stepped.terminated | stepped.truncated
            return (stepped, key), Step(states.obs, action, log_prob_of(log_probs, action), value, stepped.reward, done)

        (states, key), steps = jax.lax.scan(step, (states, key), None, num_steps)
        last = network.apply(params, states.obs)[1]

        def backwards(loop: tuple, step: Step) -> tuple:
            advantage, following = loop
            delta = step.reward + GAMMA * following * (1 - step.done) - step.value
            advantage = delta + GAMMA * LAMBDA * (1 - step.done) * advantage
            return (advantage, step.value), advantage

        _, advantage = jax.lax.scan(backwards, (jnp.zeros_like(last), last), steps, reverse=True)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (steps, advantage, advantage + steps.value))

        def epoch(loop: tuple, _: None) -> tuple:
            params, opt_state, key = loop
            key, shuffle = jax.random.split(key)
            order = jax.random.permutation(shuffle, num_envs * num_steps)
            batches = jax.tree.map(lambda x: x[order].reshape(minibatches, -1, *x.shape[1:]), rows)

            def learn(loop: tuple, batch: tuple) -> tuple:
                params, opt_state = loop
                changes, opt_state = optimiser.update(jax.grad(loss)(params, *batch), opt_state, params)
                return (optax.apply_updates(params, changes), opt_state), None

            (params, opt_state), _ = jax.lax.scan(learn, (params, opt_state), batches)
            return (params, opt_state, key), None

        (params, opt_state, key), _ = jax.lax.scan(epoch, (params, opt_state, key), None, epochs)
        return (params, opt_state, states, key), steps.reward.mean()

    return init, lambda state: jax.lax.scan(update, state, None, updates)
