"""How fast a GPU really steps: the programs that `gpu_ahead` counts, run on the GPU of this machine.

    pip install -e . 'jax[cuda13]'
    python -m benchmarks.gpu_time                    # a few minutes; writes benchmarks/results/gpu_time.json
    python -m benchmarks.gpu_time --num-envs 4096    # a look

A program is compiled, its kernels and bytes are counted in what XLA made of it for this very device, and it is run:
calls in a row that nobody waits for until the last, so what the host does for one overlaps with the device's work on
the one before. A step of the bare program is a call; of a rollout 128 are. Warmed up first; actions as in `gpu_ahead`.

From all rollouts come the two constants of the estimate, launch and bandwidth, fitted to

    seconds = launch * kernels + bytes / bandwidth

by least squares of the relative errors.
"""

import dataclasses
import functools
import pathlib
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_ahead import CASES, Case, Kernel, count_step, parse, reset_batch, seconds, total_bytes
from benchmarks.report import RESULTS, describe_machine, describe_spread, run_command, save
from perpjax import EnvConfig, PerpEnv, load_market

PROGRAM = "benchmarks.gpu_time"
RESULT = RESULTS / "gpu_time.json"


@dataclasses.dataclass(frozen=True)
class Args:
    """What to run."""

    num_envs: tuple[int, ...] = (4096, 16384, 65536, 262144, 1048576)
    """Batch sizes."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market."""
    samples: int = 7
    """Timed runs of every program."""
    steps: int = 512
    """Steps of each environment in one of them, at least."""
    out: pathlib.Path = RESULT
    """Where the result goes, every sample included."""
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)

    def __post_init__(self):
        if min(self.num_envs, default=0) < 1 or self.samples < 1 or self.steps < 1:
            raise ValueError(
                f"num_envs is {self.num_envs}, samples {self.samples}, steps {self.steps}; each must be at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Timed:
    """What one program took."""

    program: str
    num_envs: int
    compile_seconds: float
    kernels: list[Kernel]
    """Of a step."""
    samples: list[float]
    """Seconds a step."""

    @property
    def rates(self) -> list[float]:
        """Million environment steps a second."""
        return [self.num_envs / s / 1e6 for s in self.samples]


def measure(program: str, case: Case, num_envs: int, samples: int, steps: int) -> Timed:
    """Compile, count, warm up and time."""
    key, draws = jax.random.split(jax.random.key(0))
    state = jax.jit(functools.partial(reset_batch, num_envs=num_envs))(case.env, key=key)
    third = jax.jit(case.draw)(draws)
    began = time.perf_counter()
    compiled = jax.jit(case.function, donate_argnums=1).lower(case.env, state, third).compile()
    compile_seconds = time.perf_counter() - began
    calls, spent = -(-steps // case.steps), []
    for _ in range(samples + 1):
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(calls):
            state = compiled(case.env, state, third)
        jax.block_until_ready(state)
        spent.append((time.perf_counter() - began) / (calls * case.steps))
    return Timed(program, num_envs, compile_seconds, count_step(parse(compiled.as_text()), {}), spent[1:])


class Constants(NamedTuple):
    """Of the estimate."""

    launch_seconds: float
    """A kernel."""
    bandwidth: float
    """Bytes a second."""
    error: float
    """Root mean square of what the estimate is off, relative to what was measured."""


def fit(timed: list[Timed]) -> Constants | None:
    """The constants that explain best what these took; nothing if they are too few, or explained by one alone.

    A weight of one over the measured time makes every error relative.
    """
    if not timed:
        return None
    measured = np.array([statistics.median(t.samples) for t in timed])
    terms = np.array([(len(t.kernels), total_bytes(t.kernels)) for t in timed])
    relative = terms / measured[:, None]
    (launch, slowness), _, rank, _ = np.linalg.lstsq(relative, np.ones(len(timed)))
    if rank < 2 or launch <= 0 or slowness <= 0:
        return None
    return Constants(launch, 1 / slowness, float(np.sqrt(np.mean((relative @ (launch, slowness) - 1) ** 2))))


def show(timed: list[Timed], device: str) -> Table:
    """The table of all programs."""
    table = Table(title=f"Measured on {device}", box=SIMPLE_HEAD)
    heads = ("envs", "program", "kernels", "B/env", "us a step", "estimated", "million steps/s", "compiled in s")
    for head in heads:
        table.add_column(head, justify="left" if head == "program" else "right")
    for t in timed:
        microseconds = statistics.median(t.samples) * 1e6
        table.add_row(
            f"{t.num_envs}", t.program, f"{len(t.kernels)}", f"{total_bytes(t.kernels) / t.num_envs:.0f}",
            f"{microseconds:.1f}", f"{seconds(t.kernels) * 1e6:.1f}", describe_spread(t.rates, 1),
            f"{t.compile_seconds:.1f}",
        )  # fmt: skip
    return table


def run(args: Args) -> None:
    """Time all programs at all sizes, show and save.

    Raises:
      RuntimeError: there is no GPU.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        raise RuntimeError(
            "JAX sees no GPU here: pip install 'jax[cuda13]' where there is one, or count without one: "
            "python -m benchmarks.gpu_ahead"
        )
    console, timed = Console(), []
    env = PerpEnv(load_market(args.dataset), config=args.env)
    with Console(stderr=True).status("") as status:
        for num_envs in args.num_envs:
            for program, make_case in CASES.items():
                status.update(f"{program}, {num_envs} environments")
                timed.append(measure(program, make_case(env, num_envs), num_envs, args.samples, args.steps))
    constants = fit([t for t in timed if t.program != "step"])
    console.print(show(timed, device.device_kind))
    if constants:
        console.print(
            f"Rollouts fit {constants.launch_seconds * 1e6:.2f} us a kernel and {constants.bandwidth / 1e12:.2f} TB/s, "
            f"to {constants.error:.0%}."
        )
    result = {
        "machine": describe_machine(),
        "fitted": constants._asdict() if constants else None,
        "rows": [dataclasses.asdict(t) for t in timed],
    }
    save(args.out, PROGRAM, result)
    console.print(f"saved to {args.out}")


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(run, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
