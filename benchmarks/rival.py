"""The rival: TorchTrade's batched environment with stops and targets, set up as fast as it goes.

    pip install torch --index-url https://download.pytorch.org/whl/cpu    # or pip brings the one for CUDA
    pip install -e '.[bench]'
    rival = Rival(env, num_envs=4096)    # fees, leverage, account and episode as in `env`, and its market
    rival.run(rival.draw(steps=100))

`VectorizedSequentialTradingEnvSLTP` simulates one position and one candle a bar, in PyTorch operations over the batch.
Every open choice is made in its favour:

- Steps are asked for as TorchRL's collectors do (`step_and_maybe_reset`, which resets ended episodes), under
  `torch.inference_mode`, with a thread for each core.
- It observes one candle of five numbers. Its default window of ten is slower.
- A position takes a tenth of the account, like ours. With its default, the whole account at leverage 10, random
  policies are ruined within two hundred bars, and every reset rebuilds the observation of the whole batch.
- Its episodes begin and end at the same time: one step in 672 pays for resets.
"""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import torch
from torchtrade.envs.offline.vectorized_sequential_sltp import (
    VectorizedSequentialTradingEnvSLTP,
    VectorizedSequentialTradingEnvSLTPConfig,
)

from perpjax import Market, PerpEnv


class Rival:
    """TorchTrade on the market of `env`, with its fee, slippage, leverage, account and episode length."""

    def __init__(self, env: PerpEnv, num_envs: int, seed: int = 0):
        params = env.params
        config = VectorizedSequentialTradingEnvSLTPConfig(
            num_envs=num_envs,
            time_frames="15Min",
            execute_on="15Min",
            window_sizes=1,
            leverage=int(params.max_leverage),
            transaction_fee=float(params.taker_fee),
            slippage=float(params.slippage_base),
            initial_cash=float(params.initial_equity),
            position_fraction=float(params.max_exposure),
            bankrupt_threshold=float(params.ruin_fraction),
            max_traj_length=env.config.episode_length,
            seed=seed,
        )
        torch.set_num_threads(os.cpu_count() or 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            self._env = VectorizedSequentialTradingEnvSLTP(tabulate_bars(env.market), config)
        with torch.inference_mode():
            self._state = self._env.reset()

    def draw(self, steps: int) -> torch.Tensor:
        """Return random actions [steps, environments]: hold, or long or short with one of nine stop-target pairs."""
        return torch.randint(0, self._env.action_spec.space.n, (steps, *self._env.batch_size))

    def run(self, actions: torch.Tensor) -> None:
        """Step once for each row of actions."""
        with torch.inference_mode():
            for action in actions:
                self._state["action"] = action
                _, self._state = self._env.step_and_maybe_reset(self._state)


def tabulate_bars(market: Market) -> pd.DataFrame:
    """Return the bars of the market's first symbol, in quote currency; a market keeps no volume, so it is 1."""
    origin = market.origins[0]
    bars = jax.vmap(market.bar)(origin.row + jnp.arange(origin.num_bars))
    tick = float(market.instrument.tick_size)
    opened, high, low, close = (np.asarray(x, np.float64) * tick for x in (bars.open, bars.high, bars.low, bars.close))
    return pd.DataFrame(
        {
            "timestamp": pd.date_range(pd.Timestamp(origin.start_ms, unit="ms"), periods=len(close), freq="15min"),
            "open": opened[:, 0],
            "high": high.max(axis=1),
            "low": low.min(axis=1),
            "close": close[:, -1],
            "volume": 1.0,
        }
    )
