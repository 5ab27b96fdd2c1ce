"""Environment steps a second: ours and TorchTrade's, in turn, in one run.

    pip install -e '.[bench]'                         # TorchTrade with torch
    python -m benchmarks.throughput                   # writes benchmarks/results/throughput.json
    python -m benchmarks.throughput --num-envs 4096 --repeats 3 --out /tmp/throughput.json

Ours is `VecEnv(AutoReset(PerpEnv))`: a jitted scan over the steps, the environments spread over `--devices` CPU
devices. Episodes of 672 bars end at different times. The rival (`benchmarks/rival.py`) resets itself too. Both step the
same number of environments on the same bars, with random actions that are drawn beforehand.

Each side has a process of its own. Fewer than 256 environments of ours get `NPROC=1` and one device, as a user would
do it: handing kernels between threads costs so small a batch more than its arithmetic. A ratio is that of two calls in
the same turn; its median and quartiles are over all turns. Without TorchTrade only ours is timed.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, Apart, Clock, clock, quartiles, run_command, save, take_turns
from perpjax import AutoReset, PerpEnv, State, VecEnv, load_market
from perpjax.rules.orders import sample_action

PROGRAM = "benchmarks.throughput"
ALONE = 256
"""Fewer environments of ours are stepped by one thread."""


@dataclasses.dataclass
class Args:
    """The programs to time."""

    num_envs: tuple[int, ...] = (64, 1024, 4096, 65536)
    """Batch sizes."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market."""
    repeats: int = 11
    """Timed calls of each side."""
    devices: int = os.cpu_count() or 1
    """CPU devices to spread our environments over."""
    out: pathlib.Path = RESULTS / "throughput.json"
    """Where the result goes."""

    def __post_init__(self):
        if min((*self.num_envs, self.repeats, self.devices), default=0) < 1:
            raise ValueError(
                f"num_envs is {self.num_envs}, repeats {self.repeats}, devices {self.devices}; each must be at least 1"
            )
        if uneven := [n for n in self.num_envs if n >= ALONE and n % self.devices]:
            raise ValueError(f"num_envs {uneven[0]} cannot be spread over {self.devices} devices; try --devices 1")


def count_steps(num_envs: int) -> int:
    """Return the steps of one timed call: half a million over all environments, 16 to 512 of each."""
    return max(16, min(512, 2**19 // num_envs))


Playing = tuple[State, Int[Array, "steps envs 5"]]
"""Accounts, and the actions of the steps to come."""


def on_devices(function: Callable[[AutoReset, Any], Playing], **options: Any) -> Callable[[AutoReset, Any], Playing]:
    """Jit `function(env, tree)` on all devices at once; the first axis of each array is the device."""

    def on_one(env: AutoReset, tree: Any) -> Playing:
        return jax.tree.map(lambda x: x[None], function(env, jax.tree.map(lambda x: x[0], tree)))

    mesh = jax.make_mesh((jax.device_count(),), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    shared, split = PartitionSpec(), PartitionSpec("device")
    spread = jax.shard_map(on_one, mesh=mesh, in_specs=(shared, split), out_specs=split, check_vma=False)
    return jax.jit(spread, **options)


def make_ours(dataset: str, num_envs: int, devices: int) -> dict[str, Clock]:
    """Return the clock of our environments; runs in a process of its own."""
    jax.config.update("jax_num_cpu_devices", devices)
    env, steps, each = AutoReset(PerpEnv(load_market(dataset))), count_steps(num_envs), num_envs // devices
    config = env.env.config

    def begin(env: AutoReset, key: Array) -> Playing:
        first, length, draw = jax.random.split(key, 3)
        state = VecEnv(env).reset(jax.random.split(first, each))
        left = jax.random.randint(length, (each,), 1, config.episode_length + 1)
        actions = jax.vmap(lambda key: sample_action(key, config, (each,)))(jax.random.split(draw, steps))
        return state.replace(end=jnp.minimum(state.end, state.t + left)), actions

    def run(env: AutoReset, playing: Playing) -> Playing:
        state, actions = playing
        return jax.lax.scan(lambda state, action: (VecEnv(env).step(state, action), None), state, actions)[0], actions

    step_all = on_devices(run, donate_argnums=1)
    playing = on_devices(begin)(env, jax.random.split(jax.random.key(0), devices))

    def step(_: None) -> Playing:
        nonlocal playing
        playing = step_all(env, playing)
        return playing

    return {"ours": clock(lambda: None, step)}


def make_rival(dataset: str, num_envs: int) -> dict[str, Clock]:
    """Return the rival's clock, on the same market; runs in a process of its own."""
    from benchmarks.rival import Rival

    rival = Rival(PerpEnv(load_market(dataset)), num_envs)
    actions = rival.draw(count_steps(num_envs))
    return {"rival": clock(lambda: None, lambda _: rival.run(actions))}


def summarise(num_envs: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return one row: million steps/s of both sides, and how many times as fast ours is."""
    total = num_envs * count_steps(num_envs) / 1e6
    row = {"num_envs": num_envs} | {side: round(total / statistics.median(x), 3) for side, x in seconds.items()}
    if "rival" in seconds:
        ratios = quartiles([b / a for a, b in zip(seconds["ours"], seconds["rival"], strict=True)])
        row |= {name: round(x, 2) for name, x in zip(("low", "ratio", "high"), ratios, strict=True)}
    return row


def measure(args: Args, num_envs: int, with_rival: bool) -> dict[str, Any]:
    """Time both sides at one batch size, in turn."""
    alone = num_envs < ALONE
    ours = functools.partial(make_ours, args.dataset, num_envs, 1 if alone else args.devices)
    with contextlib.ExitStack() as processes:
        clocks = processes.enter_context(Apart(ours, **({"NPROC": "1"} if alone else {})))
        if with_rival:
            clocks |= processes.enter_context(Apart(functools.partial(make_rival, args.dataset, num_envs)))
        return summarise(num_envs, take_turns(clocks, args.repeats))


def run(args: Args) -> None:
    """Time all batch sizes, show and save."""
    console, progress = Console(), Console(stderr=True)
    with_rival = importlib.util.find_spec("torchtrade") is not None
    if not with_rival:
        progress.print("no rival: it needs torchtrade: pip install -e '.[bench]'", markup=False)
    load_market(args.dataset)  # reports a wrong dataset here, not in another process
    table = Table(title="million steps/s (medians)", box=SIMPLE_HEAD)
    for head in ("envs", "ours", "TorchTrade", "ratio (quartiles)"):
        table.add_column(head, justify="right")
    rows = []
    for num_envs in args.num_envs:
        with progress.status(f"{num_envs} environments"):
            rows.append(measure(args, num_envs, with_rival))
        ratio = "{ratio} ({low} .. {high})".format(**rows[-1]) if with_rival else "-"
        table.add_row(str(num_envs), f"{rows[-1]['ours']:.2f}", f"{rows[-1].get('rival', '-')}", ratio)
    console.print(table)
    save(args.out, PROGRAM, rows)
    console.print(f"saved to {args.out}")


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(run, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
