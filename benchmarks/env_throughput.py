"""Environment steps a second, compile time apart.

    python benchmarks/env_throughput.py [--num-envs 64 1024 4096 16384] [--dataset synthetic:signal]

Every environment is auto-reset and takes uniformly random actions, drawn ahead of time so that only the environment
is timed. The policy is an honest worst case: it opens a lot on half of all bars.
"""

import dataclasses
import os
import statistics
import time

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from perpjax import AutoReset, EnvConfig, PerpEnv, load_market
from perpjax.orders import sample_action


@dataclasses.dataclass
class Args:
    """What to measure."""

    num_envs: tuple[int, ...] = (64, 1024, 4096, 16384)
    """Batch sizes."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market."""
    steps: int = 100
    """Steps of each environment in one timed call."""
    repeats: int = 7
    """Timed calls; the median counts, the fastest is shown beside it."""
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)


def measure(env: AutoReset, num_envs: int, steps: int, repeats: int) -> tuple[float, list[float]]:
    """Seconds to compile, and seconds of each timed call."""
    keys = jax.random.split(jax.random.key(0), num_envs)
    state = jax.jit(jax.vmap(env.reset))(keys)
    first = jax.random.randint(jax.random.key(1), (num_envs,), 1, env.env.config.episode_length + 1)
    state = state.replace(end=jnp.minimum(state.end, state.t + first))
    draw = jax.vmap(lambda key: sample_action(key, env.env.config))
    actions = jnp.stack([draw(k) for k in jax.random.split(jax.random.key(2), (steps, num_envs))])

    def rollout(env, state, actions):
        return jax.lax.scan(lambda s, a: (jax.vmap(env.step)(s, a), None), state, actions)[0]

    began = time.perf_counter()
    run = jax.jit(rollout, donate_argnums=1).lower(env, state, actions).compile()
    compiled = time.perf_counter() - began
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state = jax.block_until_ready(run(env, state, actions))
        seconds.append(time.perf_counter() - began)
    return compiled, seconds[1:]


def main(args: Args) -> None:
    env = AutoReset(PerpEnv(load_market(args.dataset), config=args.env))
    table = Table(
        title=f"{args.dataset}, jax {jax.__version__}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    for head in ("environments", "compile s", "million steps/s (median)", "fastest"):
        table.add_column(head, justify="right")
    for num_envs in args.num_envs:
        compiled, seconds = measure(env, num_envs, args.steps, args.repeats)
        rates = [num_envs * args.steps / s / 1e6 for s in seconds]
        table.add_row(str(num_envs), f"{compiled:.1f}", f"{statistics.median(rates):.2f}", f"{max(rates):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
