"""The environments of a training run."""

import dataclasses

from perpjax import EnvParams, Market, PerpEnv, load_market
from train.ppo.config import Config


def make_env(config: Config, split: str, dataset: str | None = None) -> PerpEnv:
    """Return the environment of one split of the configured dataset, or of another one."""
    return wrap_market(load_market(dataset or config.dataset, split=split), config)


def wrap_market(market: Market, config: Config) -> PerpEnv:
    """Return the environment of a market, with the configured numbers and choices."""
    return PerpEnv(market, EnvParams(**dataclasses.asdict(config.params)), config.env)
