"""Proximal policy optimisation, in one file: collect, estimate advantages, update, all on the device.

python -m train.ppo --num-envs 4096
python -m train.ppo --dataset path/to/dataset --total-steps 30_000_000 --seed 1
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from perpjax import AutoReset, VecEnv
from perpjax.batching import where_rows
from perpjax.observation import ACCOUNT_FEATURES
from perpjax.wrappers import EpisodeState
from train.config import Config
from train.networks import ActorCritic, Policy
from train.normalize import Moments


class Transition(NamedTuple):
    """One step of every environment."""

    obs: Float[Array, "envs obs"]
    action: Int[Array, "envs 5"]
    log_prob: Float[Array, "envs"]
    value: Float[Array, "envs"]
    reward: Float[Array, "envs"]
    terminated: Bool[Array, "envs"]
    truncated: Bool[Array, "envs"]
    final_value: Float[Array, "envs"]
    """Value of the final observation where `truncated`, 0 elsewhere."""


class Learner(NamedTuple):
    """What training changes and a checkpoint keeps."""

    params: dict
    optimiser: optax.OptState
    observations: Moments
    """Of everything the policy has seen."""
    returns: Moments
    """Of the discounted return; rewards are divided by its standard deviation."""
    update: Int[Array, ""]


class Train(NamedTuple):
    """The learner and the environments it learns from."""

    learner: Learner
    envs: EpisodeState
    discounted: Float[Array, "envs"]
    """Discounted return so far, of each environment's episode."""
    key: Array


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """Adam with clipped gradients and decaying kernels; the rate falls linearly to zero."""
    steps = config.num_updates * config.epochs * config.minibatches
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            optax.linear_schedule(config.learning_rate, 0.0, steps),
            eps=1e-5,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        ),
    )


def init_train(env: AutoReset, config: Config, key: Array) -> Train:
    """A fresh learner, and environments whose first episodes end at different times."""
    key, key_params, key_reset, key_length = jax.random.split(key, 4)
    envs = VecEnv(env).reset(jax.random.split(key_reset, config.num_envs))
    remaining = jax.random.randint(key_length, (config.num_envs,), 1, config.env.episode_length + 1)
    envs = envs.replace(end=jnp.minimum(envs.end, envs.t + remaining))
    params = ActorCritic(config.hidden).init(key_params, envs.obs[:1])
    learner = Learner(
        params=params,
        optimiser=make_optimiser(config).init(params),
        observations=Moments.empty(envs.obs.shape[1:]),
        returns=Moments.empty(()),
        update=jnp.int32(0),
    )
    return Train(learner, envs, jnp.zeros(config.num_envs), key)


def train_updates(env: AutoReset, state: Train, config: Config, updates: int) -> tuple[Train, dict[str, Array]]:
    """A number of updates; returns their metrics, each [updates]."""
    return jax.lax.scan(lambda s, _: train_update(env, s, config), state, length=updates)


def train_update(env: AutoReset, state: Train, config: Config) -> tuple[Train, dict[str, Array]]:
    """Collect `num_steps` steps of every environment and learn from them."""
    learner = state.learner
    apply = ActorCritic(config.hidden).apply

    # Every environment sees the market through a slightly different lens, drawn anew for each update: a policy that
    # has learnt single bars by heart instead of what they have in common cannot find them again.
    key, key_blur = jax.random.split(state.key)
    market_features = state.envs.obs.shape[1] - len(ACCOUNT_FEATURES)
    blur = config.obs_noise * jax.random.normal(key_blur, (config.num_envs, market_features))
    blur = jnp.pad(blur, ((0, 0), (0, len(ACCOUNT_FEATURES))))

    # COLLECT TRAJECTORIES
    def env_step(carry: tuple[EpisodeState, Array, Array], _: None):
        envs, discounted, key = carry
        key, key_action = jax.random.split(key)
        obs = learner.observations.standardise(envs.obs) + blur
        logits, value = apply(learner.params, obs)
        policy = Policy.from_logits(logits)
        action = policy.sample(key_action)
        stepped = VecEnv(env).step(envs, action)
        final_value = value_truncated(learner, config, stepped, blur)
        done = stepped.terminated | stepped.truncated
        discounted = config.gamma * discounted + stepped.reward
        step = Transition(
            envs.obs, action, policy.log_prob(action), value,
            stepped.reward, stepped.terminated, stepped.truncated, final_value,
        )  # fmt: skip
        return (stepped, jnp.where(done, 0, discounted), key), (step, discounted, count_episodes(stepped, done))

    carry = (state.envs, state.discounted, key)
    (envs, discounted, key), (steps, returns, counts) = jax.lax.scan(env_step, carry, length=config.num_steps)

    # CALCULATE ADVANTAGE
    scale = learner.returns.update(returns)
    _, last_value = apply(learner.params, learner.observations.standardise(envs.obs) + blur)
    advantage = compute_gae(
        scale.scale(steps.reward), steps.value, last_value, steps.final_value,
        steps.terminated, steps.truncated, config.gamma, config.gae_lambda,
    )  # fmt: skip
    target = advantage + steps.value
    advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)

    # UPDATE NETWORK: minibatches are blocks of environments, which stay in cache; shuffled rows do not.
    def to_blocks(x: Array) -> Array:
        blocks = x.reshape(config.num_steps, config.minibatches, -1, *x.shape[2:]).swapaxes(0, 1)
        return blocks.reshape(config.minibatches, -1, *x.shape[2:])

    obs = learner.observations.standardise(steps.obs) + blur
    batch = jax.tree.map(to_blocks, (obs, steps.action, steps.log_prob, steps.value, advantage, target))
    optimiser = make_optimiser(config)

    def learn(carry: tuple[dict, optax.OptState], block: Array):
        params, opt_state = carry
        rows = jax.tree.map(lambda x: x[block], batch)
        (_, losses), grads = jax.value_and_grad(ppo_loss, has_aux=True)(params, rows, config)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses | {"grad_norm": optax.tree.norm(grads)}

    key, key_order = jax.random.split(key)
    orders = jax.vmap(lambda k: jax.random.permutation(k, config.minibatches))(
        jax.random.split(key_order, config.epochs)
    )
    carry = (learner.params, learner.optimiser)
    (params, opt_state), losses = jax.lax.scan(learn, carry, orders.reshape(-1))

    learner = Learner(params, opt_state, learner.observations.update(steps.obs), scale, learner.update + 1)
    explained = 1 - jnp.var(target - steps.value) / (jnp.var(target) + 1e-12)
    metrics = (
        jax.tree.map(jnp.mean, losses)
        | jax.tree.map(jnp.sum, counts)
        | {
            "reward": jnp.mean(steps.reward),
            "explained_variance": explained,
            "equity": jnp.mean(envs.equity),
        }
    )
    return Train(learner, envs, discounted, key), metrics


def value_truncated(
    learner: Learner, config: Config, stepped: EpisodeState, blur: Float[Array, "envs obs"]
) -> Float[Array, "envs"]:
    """Value of the final observation where an episode was truncated, 0 elsewhere."""

    def value(_: Array, params: dict, observations: Moments, obs: Array, blur: Array) -> Array:
        return ActorCritic(config.hidden).apply(params, observations.standardise(obs) + blur)[1]

    def one(truncated: Array, obs: Array, blur: Array) -> Array:
        operands = learner.params, learner.observations, obs, blur
        return where_rows(truncated, value, jnp.float32(0), *operands)

    return jax.vmap(one)(stepped.truncated, stepped.final_obs, blur)


def compute_gae(
    reward: Float[Array, "steps envs"],
    value: Float[Array, "steps envs"],
    last_value: Float[Array, "envs"],
    final_value: Float[Array, "steps envs"],
    terminated: Bool[Array, "steps envs"],
    truncated: Bool[Array, "steps envs"],
    gamma: float,
    gae_lambda: float,
) -> Float[Array, "steps envs"]:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438).

    Args:
      value: of the observation each step acted on; last_value: of the observation after the last step.
      final_value: of an episode's final observation, read where `truncated`: the episode was cut, not lost, so its
        future still counts. Where `terminated` nothing does.
    """
    following = jnp.concatenate([value[1:], last_value[None]])
    following = jnp.where(terminated, 0, jnp.where(truncated, final_value, following))
    delta = reward + gamma * following - value
    keep = gamma * gae_lambda * ~(terminated | truncated)

    def backwards(advantage: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta_t, keep_t = step
        advantage = delta_t + keep_t * advantage
        return advantage, advantage

    return jax.lax.scan(backwards, jnp.zeros_like(last_value), (delta, keep), reverse=True)[1]


def ppo_loss(params: dict, rows: tuple[Array, ...], config: Config) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Clipped surrogate, clipped value loss and entropy (Schulman et al., 2017, arXiv 1707.06347)."""
    obs, action, log_prob_old, value_old, advantage, target = rows
    logits, value = ActorCritic(config.hidden).apply(params, obs)
    policy = Policy.from_logits(logits)
    log_ratio = policy.log_prob(action) - log_prob_old
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -jnp.mean(jnp.minimum(ratio * advantage, clipped * advantage))
    value_clipped = value_old + jnp.clip(value - value_old, -config.clip, config.clip)
    value_loss = 0.5 * jnp.mean(jnp.maximum((value - target) ** 2, (value_clipped - target) ** 2))
    entropy = jnp.mean(policy.entropy())
    loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * entropy
    return loss, {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "kl": jnp.mean(ratio - 1 - log_ratio),
        "clip_fraction": jnp.mean(jnp.abs(ratio - 1) > config.clip),
    }


def count_episodes(stepped: EpisodeState, done: Bool[Array, "envs"]) -> dict[str, Array]:
    """Sums over the episodes that this step ended; the host divides by their number."""
    episode, ledger = stepped.episode, stepped.episode.ledger

    def total(x: Array) -> Array:
        return jnp.sum(jnp.where(done, x, 0))

    return {
        "episodes": jnp.sum(done, dtype=jnp.int32),
        "episode_return": total(episode.return_),
        "episode_length": total(episode.length),
        "max_drawdown": total(episode.max_drawdown),
        "trades": total(ledger.opened),
        "liquidations": total(ledger.liquidated),
        "fees": total(ledger.fees),
        "ruined": jnp.sum(stepped.terminated, dtype=jnp.int32),
    }


def compile_training(env: AutoReset, state: Train, config: Config, updates: int):
    """`train_updates` for this configuration, compiled ahead of time, the state donated."""
    step = functools.partial(train_updates, config=config, updates=updates)
    return jax.jit(step, donate_argnums=1).lower(env, state).compile()


if __name__ == "__main__":
    from train.main import main

    main()
