"""Make the two pictures of the README, in about three minutes on two cores: `python docs/pictures/make.py`.

Needs `pip install -e '.[viz]'`. equity.png: a short training run and its evaluation on unseen data. bar.png: one bar
of a synthetic market, with a lot of which one candle reaches every level.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
from matplotlib.figure import Figure

from perpjax import EnvConfig, EnvParams, PerpEnv, load_market
from perpjax.audit.plotting import plot_bars
from perpjax.audit.replay import replay_lots
from perpjax.rules.orders import DIRECTIONS, LONG
from train.evaluate.plotting import plot_evaluation
from train.ppo.config import Config
from train.ppo.judge import evaluate_policy
from train.ppo.load import load_policy
from train.ppo.run import train

FOLDER = pathlib.Path(__file__).parent
MARKET, BAR = "synthetic:martingale?volatility=1.5", 8722
"""`notebooks/03_one_bar.ipynb` searches this market for such bars."""
ACTION = (DIRECTIONS.index(LONG), 0, 4, 0, 1)
"""A long at full leverage, with a stop of 0.5 and a target of 1 ATR."""
POLICY = Config(num_envs=1024, total_steps=3_000_000, report=False)


def draw_equity(path: pathlib.Path, config: Config = POLICY) -> None:
    """Train, evaluate the best policy on the test split, and write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        train(Config(**vars(config) | {"run_dir": pathlib.Path(folder) / "a short run"}))
        policy = load_policy(pathlib.Path(folder) / "a short run")
        plot_evaluation(evaluate_policy(policy, "test", "best", quick=True), path)


def draw_bar(path: pathlib.Path) -> None:
    """Write the picture of one bar, its lot and the prices of its levels and fills.

    Raises:
      ValueError: the lot does not end at its stop in this bar.
    """
    env = PerpEnv(load_market(MARKET), EnvParams(max_leverage=75), EnvConfig(intrabar="nearest"))
    states = [env.reset(jax.random.key(0), start=BAR)]
    states.append(env.step(states[0], jnp.asarray(ACTION)))
    (life,) = replay_lots(env, states, [ACTION])
    if life.exit is None or life.exit.how != "stopped":
        raise ValueError(f"bar {BAR} of {MARKET} has another end, {life.exit}: choose one as in notebooks/03_one_bar")
    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained", facecolor="white")
    ax = figure.subplots()
    plot_bars(ax, env, states, [ACTION])
    for text in list(ax.texts):
        text.remove()
    ax.get_legend().remove()
    for line in ax.lines:
        if line.get_linewidth() == 5:  # the body of a candle; a short picture has room for wide ones
            line.set(linewidth=22, alpha=0.85)
    _label(ax, life, float(env.market.instrument_at(states[0].instrument).tick_size), env.market.candles_per_bar)
    ax.set_title(
        "One decision bar. Its third candle reaches every level of a long lot, in an unknown order.\n"
        "The default rule takes the loss that lies nearest to the entry: here the stop.", loc="left", fontsize=11,
    )  # fmt: skip
    figure.savefig(path)


def _label(ax: Any, life: Any, tick: float, candles: int) -> None:
    """Write the prices beside the lines and markers, and minutes below the candles."""
    end, lot, color = life.exit, life.lot, "#0072b2"
    x = (end.candle + 1) / candles + 0.01
    places = {"target": (0.02, "bottom"), "stop": (x, "bottom"), "liquidation": (x, "top")}
    for name, (left, anchor) in places.items():
        price = getattr(lot, name) * tick
        ax.text(left, price, f"{name} {price:,.1f}", color=color, va=anchor, fontsize=10)
    style = {"color": color, "fontsize": 10, "textcoords": "offset points"}
    ax.annotate(f"entry {lot.entry * tick:,.1f}:\nopen and slippage", (0, lot.entry * tick), (12, 14), **style)
    ax.annotate(
        f"exit {end.price * tick:,.1f}:\nstop, slippage and depth", ((end.candle + 0.5) / candles, end.price * tick),
        (-12, -6), ha="right", va="top", **style,
    )  # fmt: skip
    ax.set_xticks([i / candles for i in range(candles + 1)], [f"{15 * i // candles}" for i in range(candles + 1)])
    ax.set(xlabel="minutes since the open of the bar", ylabel="price, quote currency", xlim=(-0.03, 1.03))
    ax.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("equity", "bar"), help="make one of the two")
    only = parser.parse_args().only
    for name, draw in (("bar", draw_bar), ("equity", draw_equity)):
        if only in (None, name):
            draw(FOLDER / f"{name}.png")
            print(f"docs/pictures/{name}.png")


if __name__ == "__main__":
    main()
