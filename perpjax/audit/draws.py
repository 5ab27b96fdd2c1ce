"""Random accounts and orders for parity tests and fuzzing: round numbers, extremes, and values in between."""

import numpy as np

from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.orders import hold_action

CONFIGS = (
    EnvConfig(),
    EnvConfig(actions="box5", reward="shaped", opposite="close", max_lots=4),
    EnvConfig(intrabar="pessimistic", reward="shaped", opposite="close", max_lots=3),
    EnvConfig(actions="box5", intrabar="pessimistic"),
    EnvConfig(intrabar="optimistic", max_lots=1),
    EnvConfig(actions="box5", intrabar="optimistic", reward="shaped", opposite="close"),
)
"""Both codecs under all three intrabar rules; the other choices are spread over them."""


def draw_params(rng: np.random.Generator, count: int) -> EnvParams:
    """Draw parameters of `count` environments, [count]: round numbers, extremes and values in between."""

    def pick(*choices: float) -> np.ndarray:
        return rng.choice(choices, count)

    return EnvParams(
        initial_equity=pick(10_000.0, 500.0, 3e6),
        taker_fee=pick(6e-4, 0.0, 2e-3, rng.uniform(0, 1e-3)),
        slippage_base=pick(2e-4, 0.0, 3e-3, rng.uniform(0, 1e-3)),
        slippage_atr=pick(0.1, 0.0, rng.uniform(0, 0.5)),
        stop_depth=pick(0.1, 0.0, 0.5, 1.0),
        max_exposure=pick(0.1, 1.0, rng.uniform(0.02, 1)),
        max_leverage=pick(10.0, 50.0, 7.5, 125.0, 1.0),
        max_hold=pick(192, 20, 3, 2000),
        ruin_fraction=pick(0.1, 0.5, 0.0),
        entry_penalty=pick(2e-4, 0.0),
        risk_penalty=pick(0.1, 0.0, 1.0),
        liquidation_penalty=pick(5e-3, 0.1),
        ruin_penalty=pick(0.1, 1.0),
    )


def draw_actions(rng: np.random.Generator, config: EnvConfig, steps: int, count: int) -> np.ndarray:
    """Draw actions [steps, count, 5] of accounts that trade at every bar or rarely, on both sides or mostly on one."""
    shape = (steps, count)
    side, bias, calm = rng.choice([-1, 1], count), rng.random(count), rng.choice([0.0, 0.5, 0.95], count)
    idle, biased = rng.random(shape) < calm, rng.random(shape) < bias
    if config.actions == "box5":
        actions = rng.uniform(-1.2, 1.2, (*shape, 5)).astype(np.float32)
        actions[..., 0] = np.where(biased, side * np.abs(actions[..., 0]), actions[..., 0])
        broken = rng.random(shape) < 0.02
        actions[broken, rng.integers(0, 5, broken.sum())] = rng.choice([np.nan, np.inf], broken.sum())
    else:
        actions = rng.integers(-1, [5, 5, 6, 5, 6], (*shape, 5)).astype(np.int32)
        opening = (actions[..., 0] >= 3) & (rng.random(shape) < 0.8)  # closes are rarer
        actions[..., 0] = np.where(opening | biased & (actions[..., 0] > 0), np.where(side > 0, 1, 2), actions[..., 0])
    actions[idle] = np.asarray(hold_action(config))
    return actions
