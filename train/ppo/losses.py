"""Advantages and the loss of PPO, as functions of arrays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from train.policies.policy import Distribution
from train.ppo.config import Hyperparameters


class Rows(NamedTuple):
    """Collected steps, ready for the update. Leading axes: [rows], or [steps, envs] for a policy with memory."""

    obs: Float[Array, "*rows obs"]
    """As the policy saw them."""
    reset: Bool[Array, "*rows"]
    """The episode begins with this observation."""
    action: Array
    log_prob: Float[Array, "*rows"]
    """Of the action, when it was taken."""
    value: Float[Array, "*rows"]
    """Of the observation, when the action was taken."""
    advantage: Float[Array, "*rows"]
    target: Float[Array, "*rows"]
    """Of the value: `value` plus the raw advantage."""


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
    """Generalised advantage estimation (Schulman et al., 2015, arXiv:1506.02438).

    Args:
      reward: of each step.
      value: of the observation before each step.
      last_value: of the observation after the last step.
      final_value: of an episode's final observation; read only where `truncated`. A truncated episode was cut by a
        time limit, so its future still counts. A terminated episode has no future.
      terminated, truncated: the step ended its episode.
      gamma: discount of a step.
      gae_lambda: 0 for one-step advantages, 1 for sums to the end of the episode.
    """
    following = jnp.concatenate([value[1:], last_value[None]])
    following = jnp.where(terminated, 0, jnp.where(truncated, final_value, following))
    delta = reward + gamma * following - value
    keep = gamma * gae_lambda * ~(terminated | truncated)

    def join(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        """The advantage at the earlier step is `delta + keep * (advantage at the later one)`."""
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    # In 5 rounds for 32 steps: a GPU takes longer for 32 small kernels than for the arithmetic.
    return jax.lax.associative_scan(join, (delta, keep), reverse=True)[0]


def ppo_loss(
    distribution: Distribution, value: Float[Array, "*rows"], rows: Rows, hyper: Hyperparameters
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Clipped surrogate, clipped value loss and entropy bonus (Schulman et al., 2017, arXiv:1707.06347).

    Args:
      distribution, value: of the current parameters, on `rows.obs`.
      rows: the collected steps.
      hyper: clip range and weights.

    Returns:
      The loss, and its parts for the metrics.
    """
    log_ratio = distribution.log_prob(rows.action) - rows.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - hyper.clip, 1 + hyper.clip)
    value_clipped = rows.value + jnp.clip(value - rows.value, -hyper.clip, hyper.clip)
    parts = {
        "policy_loss": -jnp.minimum(ratio * rows.advantage, clipped * rows.advantage),
        "value_loss": 0.5 * jnp.maximum((value - rows.target) ** 2, (value_clipped - rows.target) ** 2),
        "entropy": distribution.entropy(),
        "kl": ratio - 1 - log_ratio,
        "clip_fraction": (jnp.abs(ratio - 1) > hyper.clip).astype(ratio.dtype),
    }
    means = jnp.mean(jnp.stack(list(parts.values())).reshape(len(parts), -1), axis=1)  # one reduction for all
    means = dict(zip(parts, means, strict=True))
    loss = means["policy_loss"] + hyper.value_coef * means["value_loss"] - hyper.entropy_coef * means["entropy"]
    return loss, means
