"""The state of a training run: all that a resumed run needs."""

from typing import NamedTuple

import optax
from jaxtyping import Array, Float, Int

from perpjax.vec import EpisodeState
from train.normalize import Moments
from train.policies.policy import Carry, Params


class Learner(NamedTuple):
    """The learnt part of the state, which a checkpoint keeps."""

    params: Params
    optimiser: optax.OptState
    observations: Moments
    """Of all observations so far; the policy sees standardised ones."""
    returns: Moments
    """Of the discounted return. Rewards are divided by its standard deviation."""
    update: Int[Array, ""]
    """Updates so far."""


class TrainState(NamedTuple):
    """The learner, and the environments from which it learns."""

    learner: Learner
    envs: EpisodeState
    """States of all environments."""
    carry: Carry
    """The policy's memory of each environment, before the current observation; `()` without memory."""
    discounted: Float[Array, "envs"]
    """Discounted return so far of each environment's episode."""
    key: Array
    """Source of all further random numbers."""
