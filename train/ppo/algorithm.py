"""Proximal policy optimisation: collect steps, estimate advantages, update the policy; all on the device.

`PPO` is data. The policy, the advantage estimator and the loss are fields, which `dataclasses.replace` exchanges. It is
a pytree of its hyperparameters, so `jax.jit` of a function of a `PPO` compiles once for all their values.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from perpjax import VecEnv
from perpjax.vec import Env, EpisodeState, unwrapped
from perpjax.xla import Program, default_platform, where_rows
from train.metrics import count_episodes, measure_exposure
from train.normalize import Moments
from train.policies.policy import Carry, Distribution, Params, Policy
from train.ppo.config import Config, Hyperparameters
from train.ppo.losses import Rows, compute_gae, ppo_loss
from train.state import Learner, TrainState

Metrics = dict[str, Array]


class Transition(NamedTuple):
    """One step of every environment."""

    obs: Float[Array, "envs obs"]
    """Before standardisation."""
    reset: Bool[Array, "envs"]
    """The episode begins with `obs`."""
    action: Array
    log_prob: Float[Array, "envs"]
    value: Float[Array, "envs"]
    reward: Float[Array, "envs"]
    terminated: Bool[Array, "envs"]
    truncated: Bool[Array, "envs"]
    final_value: Float[Array, "envs"]
    """Value of the final observation where `truncated`, 0 elsewhere."""


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class PPO:
    """The algorithm. `envs` is a `VecEnv` of auto-reset environments in every method.

    Attributes:
      config: all numbers.
      policy: see `train.policies`.
      gae: as `compute_gae`.
      loss: as `ppo_loss`.
    """

    config: Config
    policy: Policy
    gae: Callable[..., Float[Array, "steps envs"]] = compute_gae
    loss: Callable[[Distribution, Array, Rows, Hyperparameters], tuple[Array, Metrics]] = ppo_loss

    @functools.cached_property
    def hyper(self) -> Hyperparameters:
        """The hyperparameters: numbers, or traced values under `jit`."""
        return self.config.hyperparameters

    def tree_flatten(self) -> tuple[tuple[Hyperparameters], "PPO"]:
        """See `jax.tree_util.register_pytree_node_class`."""
        return (self.hyper,), self

    @classmethod
    def tree_unflatten(cls, ppo: "PPO", children: tuple[Hyperparameters]) -> "PPO":
        """See `jax.tree_util.register_pytree_node_class`."""
        other = dataclasses.replace(ppo)
        other.__dict__["hyper"] = children[0]
        return other

    def init(self, envs: VecEnv, key: Array) -> TrainState:
        """Return a fresh learner, and environments whose first episodes end at different times."""
        config = self.config
        key, key_params, key_reset, key_length = jax.random.split(key, 4)
        states = envs.reset(jax.random.split(key_reset, config.num_envs))
        remaining = jax.random.randint(key_length, (config.num_envs,), 1, config.env.episode_length + 1)
        states = states.replace(end=jnp.minimum(states.end, states.t + remaining))
        params = self.policy.init(key_params, states.obs[:1])
        learner = Learner(
            params=params,
            optimiser=make_optimiser(self.hyper, params).init(ravel_pytree(params)[0]),
            observations=Moments.empty(states.obs.shape[1:]),
            returns=Moments.empty(()),
            update=jnp.int32(0),
        )
        carry = self.policy.initial_carry(config.num_envs)
        return TrainState(learner, states, carry, jnp.zeros(config.num_envs), key)

    def update(self, envs: VecEnv, state: TrainState) -> tuple[TrainState, Metrics]:
        """Collect `num_steps` steps of every environment and learn from them.

        Returns:
          The next state, and the metrics of this update; those of episodes are sums (`train.metrics`).
        """
        learner, first_carry = state.learner, state.carry
        key, key_noise = jax.random.split(state.key)
        noise = draw_noise(key_noise, envs, state.envs.obs.shape, self.hyper.obs_noise)

        state, steps, returns, counts = self.collect(envs, state._replace(key=key), noise)
        scale = learner.returns.update(returns)
        rows = self.estimate(state, steps, scale, noise)
        key, key_order = jax.random.split(state.key)
        params, optimiser, losses = self.improve(learner, first_carry, rows, key_order)

        learner = Learner(params, optimiser, learner.observations.update(steps.obs), scale, learner.update + 1)
        explained = 1 - jnp.var(rows.target - rows.value) / (jnp.var(rows.target) + 1e-12)
        metrics = (
            jax.tree.map(jnp.mean, losses)
            | jax.tree.map(jnp.sum, counts)
            | {
                "reward": jnp.mean(steps.reward),
                "explained_variance": explained,
                "equity": jnp.mean(state.envs.equity),
                "exposure": measure_exposure(state.envs),
            }
        )
        return state._replace(learner=learner, key=key), metrics

    def collect(
        self, envs: VecEnv, state: TrainState, noise: Float[Array, "envs obs"]
    ) -> tuple[TrainState, Transition, Float[Array, "steps envs"], Metrics]:
        """Play `num_steps` steps of every environment.

        Returns:
          The state afterwards, the steps, the discounted return after each of them, and the sums over the ended
          episodes of each environment.
        """
        learner, gamma = state.learner, self.hyper.gamma

        def step(loop: tuple, _: None) -> tuple:
            (states, carry, discounted, key), counts = loop
            key, key_action = jax.random.split(key)
            reset = begins_episode(states)
            obs = learner.observations.standardise(states.obs) + noise
            carry, distribution, value = self.policy(learner.params, carry, obs, reset)
            action = distribution.sample(key_action)
            stepped = envs.step(states, action)
            program = envs.program(stepped)
            final_value = value_truncated(self.policy, learner, carry, stepped, noise, program)
            done = stepped.terminated | stepped.truncated
            discounted = gamma * discounted + stepped.reward
            transition = Transition(
                states.obs, reset, action, distribution.log_prob(action), value,
                stepped.reward, stepped.terminated, stepped.truncated, final_value,
            )  # fmt: skip
            counts = jax.tree.map(jnp.add, counts, count_episodes(stepped))
            return ((stepped, carry, jnp.where(done, 0, discounted), key), counts), (transition, discounted)

        loop = state.envs, state.carry, state.discounted, state.key
        zeros = jax.tree.map(jnp.zeros_like, count_episodes(state.envs))
        (loop, counts), (steps, returns) = jax.lax.scan(step, (loop, zeros), length=self.config.num_steps)
        return TrainState(learner, *loop), steps, returns, counts

    def estimate(self, state: TrainState, steps: Transition, scale: Moments, noise: Float[Array, "envs obs"]) -> Rows:
        """Return the steps with their standardised advantages, [steps, envs].

        Args:
          state: after the last step.
          scale: moments of the discounted return; rewards are divided by its standard deviation.
        """
        learner, hyper = state.learner, self.hyper
        obs = learner.observations.standardise(state.envs.obs) + noise
        _, _, last_value = self.policy(learner.params, state.carry, obs, begins_episode(state.envs))
        advantage = self.gae(
            scale.scale(steps.reward), steps.value, last_value, steps.final_value,
            steps.terminated, steps.truncated, hyper.gamma, hyper.gae_lambda,
        )  # fmt: skip
        target = advantage + steps.value
        advantage = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
        obs = learner.observations.standardise(steps.obs) + noise
        return Rows(obs, steps.reset, steps.action, steps.log_prob, steps.value, advantage, target)

    def improve(
        self, learner: Learner, carry: Carry, rows: Rows, key: Array
    ) -> tuple[Params, optax.OptState, dict[str, Float[Array, "minibatches"]]]:
        """Pass `epochs` times over the rows, a minibatch at a time, in random order.

        A minibatch is a block of environments, which stays in cache; shuffled rows do not. For a policy with memory it
        has the axes [steps, envs] and begins with the memory at the start of the rollout. Otherwise it is flat.

        Args:
          carry: the policy's memory before the first step.
        """
        config, optimiser = self.config, make_optimiser(self.hyper, learner.params)
        has_memory = bool(jax.tree.leaves(carry))

        def to_blocks(x: Array) -> Array:
            blocks = x.reshape(config.num_steps, config.minibatches, -1, *x.shape[2:]).swapaxes(0, 1)
            return blocks if has_memory else blocks.reshape(config.minibatches, -1, *x.shape[2:])

        blocks = jax.tree.map(to_blocks, rows)
        carries = jax.tree.map(lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), carry)

        # One vector of all parameters: a GPU takes longer to launch ten small kernels than for their arithmetic.
        vector, unravel = ravel_pytree(learner.params)
        names: list[str] = []

        def compute_loss(vector: Array, carry: Carry, rows: Rows) -> tuple[Array, Metrics]:
            distribution, value = self.replay(unravel(vector), carry, rows)
            return self.loss(distribution, value, rows, self.hyper)

        def learn(loop: tuple[Array, optax.OptState], block: Array) -> tuple:
            vector, opt_state = loop
            carry, rows = jax.tree.map(lambda x: x[block], (carries, blocks))
            (_, losses), grads = jax.value_and_grad(compute_loss, has_aux=True)(vector, carry, rows)
            updates, opt_state = optimiser.update(grads, opt_state, vector)
            losses |= {"grad_norm": optax.tree.norm(grads)}
            names[:] = losses  # known once the loss is traced
            return (optax.apply_updates(vector, updates), opt_state), jnp.stack(list(losses.values()))

        orders = jax.vmap(lambda k: jax.random.permutation(k, config.minibatches))(jax.random.split(key, config.epochs))
        (vector, optimiser), losses = jax.lax.scan(learn, (vector, learner.optimiser), orders.reshape(-1))
        return unravel(vector), optimiser, dict(zip(names, losses.T, strict=True))

    def replay(self, params: Params, carry: Carry, rows: Rows) -> tuple[Distribution, Array]:
        """Return distribution and value of every row under other parameters.

        A policy with memory goes through the steps one by one and resets its memory where the rollout did.
        """
        if not jax.tree.leaves(carry):
            return self.policy(params, carry, rows.obs, rows.reset)[1:]

        def step(carry: Carry, row: tuple[Array, Array]) -> tuple[Carry, tuple[Distribution, Array]]:
            carry, distribution, value = self.policy(params, carry, *row)
            return carry, (distribution, value)

        return jax.lax.scan(step, carry, (rows.obs, rows.reset))[1]


def make_optimiser(hyper: Hyperparameters, params: Params) -> optax.GradientTransformation:
    """Return Adam with clipped gradients and decoupled weight decay of matrices; the rate falls linearly to zero.

    It works on the vector of all parameters, as `ravel_pytree` makes it.
    """
    decay, _ = ravel_pytree(jax.tree.map(lambda x: jnp.full(x.shape, hyper.weight_decay * (x.ndim > 1)), params))

    def rate(count: Array) -> Array:  # `optax.linear_schedule` wants its numbers before tracing
        return hyper.learning_rate * jnp.maximum(1 - count / hyper.minibatches, 0)

    return optax.chain(optax.clip_by_global_norm(hyper.max_grad_norm), optax.adamw(rate, eps=1e-5, weight_decay=decay))


def draw_noise(key: Array, envs: Env, shape: tuple[int, int], scale: float) -> Float[Array, "envs obs"]:
    """Draw noise on the market features, one constant vector per environment and update; 0 on all other entries.

    Every environment sees a slightly distorted market, so a policy cannot recognise single bars that it memorised.

    Args:
      envs: says how many of the first entries of an observation are market features.
      shape: of the observations, [envs, obs].
      scale: standard deviation, in units of the standardised features.
    """
    num_envs, size = shape
    market_features = unwrapped(envs).num_market_features
    noise = scale * jax.random.normal(key, (num_envs, market_features))
    return jnp.pad(noise, ((0, 0), (0, size - market_features)))


def begins_episode(states: EpisodeState) -> Bool[Array, "envs"]:
    """Return where the current observation is the first of its episode, after an auto-reset."""
    return states.terminated | states.truncated


def value_truncated(
    policy: Policy,
    learner: Learner,
    carry: Carry,
    stepped: EpisodeState,
    noise: Float[Array, "envs obs"],
    program: Program | None = None,
) -> Float[Array, "envs"]:
    """Return the value of the final observation where an episode was truncated, 0 elsewhere.

    Args:
      carry: the policy's memory after the step; the final observation still belongs to its episode.
      program: the program that this becomes part of; by default one for the default device.
    """

    def value(_: Array, params: Params, observations: Moments, carry: Carry, obs: Array, noise: Array) -> Array:
        return policy(params, carry, observations.standardise(obs) + noise, jnp.zeros((), bool))[2]

    operands = learner.params, learner.observations, carry, stepped.final_obs, noise
    program = program or Program(default_platform(), len(noise))
    axes = 0, None, None, 0, 0, 0
    return where_rows(stepped.truncated, value, jnp.zeros(len(noise)), *operands, program=program, axes=axes)
