"""perpjax: a reinforcement-learning environment for crypto perpetual futures, in JAX."""

from typing import Any

from perpjax.data import build_market, load_market
from perpjax.data.markets import concatenate_markets, slice_market
from perpjax.env import PerpEnv
from perpjax.instrument import Instrument
from perpjax.market import Market, Segments
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.bar import Bar
from perpjax.rules.orders import Order, Verdict
from perpjax.rules.risk import review
from perpjax.state import Account, Ledger, Lots, State
from perpjax.vec import AutoReset, VecEnv

__version__ = "0.1.0"

__all__ = [
    "Account", "AutoReset", "Bar", "EnvConfig", "EnvParams", "Evaluation", "Instrument", "Ledger", "Lots", "Market",
    "Order", "PerpEnv", "Segments", "State", "VecEnv", "Verdict", "build_market", "concatenate_markets", "evaluate",
    "load_market", "load_policy", "review", "slice_market",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the trainer's functions when they are asked for, even where a `train.py` of the user's shadows `train`."""
    modules = {"load_policy": "ppo.load", "evaluate": "evaluate.evaluation", "Evaluation": "evaluate.evaluation"}
    if name not in modules:
        raise AttributeError(f"module 'perpjax' has no attribute {name!r}")
    from perpjax._trainer import import_train

    return getattr(import_train(modules[name]), name)
