"""The kernels, bytes and time of an environment step on a GPU.

    python -m benchmarks.gpu                          # counts for an H100; writes results/gpu_counted.json
    python -m benchmarks.gpu --timed                  # times on this machine's GPU; writes results/gpu_timed.json
    python -m benchmarks.gpu --training               # the bodies of an update; gpu_training_counted.json
    python -m benchmarks.gpu --num-envs 4096 --kernels

Counting ahead needs XLA's GPU compiler, but neither GPU nor driver. Install it into a virtual environment of its own,
because JAX looks for a GPU wherever it finds the plugin:

    pip install -e . && X=$(python -c 'import jax; print(jax.__version__)')
    pip install --no-deps jax-cuda13-plugin==$X jax-cuda13-pjrt==$X

The program is a rollout: a scan that draws actions, steps, and resets ended episodes. Figures are of one step. A kernel
is anything that the device is asked to do: copies and loop counters count. A conditional is one kernel and its
costliest branch. Bytes are those that kernels read and write. Of a gathered or sliced array only the part taken counts,
of an update in place only the update. Caches are ignored.

The estimate is 2.1 microseconds a kernel + bytes / 2.06 TB/s. It was fitted to rollouts on an H100 (commit 9437f76) and
is off by 10 % (root mean square).
"""

import collections
import dataclasses
import functools
import importlib.metadata
import math
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jaxtyping import Array
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.harness import RESULTS, quartiles, run_command, save
from perpjax import AutoReset, PerpEnv, State, VecEnv, load_market
from perpjax.rules.orders import sample_action

PROGRAM = "benchmarks.gpu"
LAUNCH_SECONDS, BANDWIDTH = 2.1e-6, 2.06e12
SCAN_STEPS = 128
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


# COUNT KERNELS AND BYTES

# Nothing runs for these. Those of TAKES read no more of their first operand than they return.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
TAKES = {"gather", "slice", "dynamic-slice"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of an HLO program."""

    name: str
    arrays: tuple[tuple[int, float], ...]
    """Elements, and bytes of an element, of each array of the result."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def elements(self) -> int:
        return self.arrays[0][0] if self.arrays else 0

    @property
    def bytes(self) -> float:
        return sum(elements * width for elements, width in self.arrays)

    def find(self, pattern: str) -> str:
        """Return the first group of `pattern` in the attributes, or nothing."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Kernel(NamedTuple):
    """One piece of work for the device, in bytes."""

    name: str
    read: float
    written: float
    source: str = ""
    """The operations with most instructions in it."""


def parse(text: str) -> Program:
    """Read the text of `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line):
            root, name, shape, opcode, rest = found.groups()
            depth, end = 1, 0
            while depth and end < len(rest):
                depth += {"(": 1, ")": -1}.get(rest[end], 0)
                end += 1
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            current[name] = Instruction(name, parse_shape(shape), opcode, operands, rest[end:], bool(root))
    if not entry:
        raise ValueError("this is not an HLO program: it has no ENTRY computation")
    return Program(computations, entry)


def parse_shape(shape: str) -> tuple[tuple[int, float], ...]:
    """Return elements, and bytes of an element, of each array of a shape."""
    arrays = re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]", shape)
    bits = [8 if kind == "pred" else int(re.search(r"\d+", kind).group()) for kind, _ in arrays]
    sizes = [math.prod(map(int, re.findall(r"\d+", size))) for _, size in arrays]
    return tuple((size, width / 8) for size, width in zip(sizes, bits, strict=True))


def count(program: Program, name: str) -> list[Kernel]:
    """Return the kernels of one call of a computation, and of all that it calls."""
    computation, kernels = program.computations[name], []
    for x in computation.values():
        if x.opcode in FREE or x.opcode.endswith(("-done", "-update")):
            continue
        if x.opcode in ("call", "async-start"):
            kernels += count(program, x.find(r"(?:to_apply|calls)=%?([\w.\-]+)"))
        elif x.opcode == "while":
            kernels += count_iteration(program, x) * int(x.find(r"known_trip_count\W+n\W+(\d+)") or 1)
        elif x.opcode == "conditional":
            names = re.findall(r"[\w.\-]+", x.find(r"branch_computations=\{([^}]*)\}"))
            names = names or [x.find(rf"{side}_computation=%?([\w.\-]+)") for side in ("false", "true")]
            branches = [count(program, n) for n in names]
            kernels += [Kernel(x.name, computation[x.operands[0]].bytes, 0), *max(branches, key=estimate)]
        else:
            kernels.append(count_kernel(program, computation, x))
    return kernels


def count_iteration(program: Program, loop: Instruction) -> list[Kernel]:
    """Return the kernels of one iteration. If the number of iterations is unknown, the host reads the condition."""
    kernels = count(program, loop.find(r"body=%?([\w.\-]+)"))
    if loop.find(r"(known_trip_count)"):
        return kernels
    return [*kernels, *count(program, loop.find(r"condition=%?([\w.\-]+)")), Kernel(loop.name, 1, 0)]


def count_step(program: Program) -> list[Kernel]:
    """Return the kernels of one step: an iteration of the entry's loop, or all of a program without one."""
    loops = [x for x in program.computations[program.entry].values() if x.opcode == "while"]
    return count_iteration(program, loops[0]) if loops else count(program, program.entry)


def count_kernel(program: Program, computation: Computation, x: Instruction) -> Kernel:
    """Return the kernel of one instruction."""
    if x.opcode == "copy-start":  # its result is a tuple of both buffers
        return Kernel(x.name, computation[x.operands[0]].bytes, computation[x.operands[0]].bytes, x.opcode)
    if x.opcode == "fusion":
        inside = program.computations[x.find(r"calls=%?([\w.\-]+)")]
    else:
        inside = {n: dataclasses.replace(computation[n], opcode="parameter", is_root=False) for n in x.operands}
        inside |= {x.name: dataclasses.replace(x, is_root=True)}
    work = [y.find(r'op_name="([^"]*)"') for y in inside.values() if y.opcode not in FREE | {"broadcast"}]
    scopes = collections.Counter("/".join(name.split("/")[-2:]) for name in work if name)
    return Kernel(x.name, *count_traffic(inside), ", ".join(f"{n} {times}" for n, times in scopes.most_common(4)))


def count_traffic(inside: Computation) -> tuple[float, float]:
    """Return the bytes that one kernel reads and writes: backwards from its results, the elements needed of each."""
    root = next(x for x in inside.values() if x.is_root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    need = collections.Counter({x.name: x.elements for x in results})
    updates, written = set(), 0.0
    for x in results:
        if update := find_update(inside, x):
            updates.add(update.name)
        written += sum(y.bytes for y in new_values(inside, update)) if update else x.bytes
    read = 0.0
    for x in reversed(inside.values()):
        needed = min(need[x.name], x.elements)
        if x.opcode == "parameter":
            read += x.bytes * needed / max(x.elements, 1)
        elif x.opcode != "tuple":
            for i, name in enumerate(x.operands):
                size = inside[name].elements
                if x.name in updates and i == 0:
                    # A scatter may combine its values with the old ones.
                    need[name] += sum(y.elements for y in new_values(inside, x)) if x.opcode == "scatter" else 0
                elif x.opcode in TAKES or size <= x.elements:
                    need[name] += min(size, needed)
                else:
                    need[name] += size * needed / max(x.elements, 1)
    return read, written


def find_update(inside: Computation, x: Instruction) -> Instruction | None:
    """Return the update behind a result, if it happens within the memory of a parameter."""
    x = see_through(inside, x)
    is_update = x.opcode in ("dynamic-update-slice", "scatter")
    return x if is_update and see_through(inside, inside[x.operands[0]]).opcode == "parameter" else None


def see_through(inside: Computation, x: Instruction) -> Instruction:
    """Return the operand of a chain of bitcasts."""
    while x.opcode == "bitcast":
        x = inside[x.operands[0]]
    return x


def new_values(inside: Computation, x: Instruction) -> list[Instruction]:
    """Return the values that an update puts in place."""
    names = x.operands[1:2] if x.opcode == "dynamic-update-slice" else x.operands[len(x.operands) // 2 + 1 :]
    return [inside[name] for name in names]


def total_bytes(kernels: list[Kernel]) -> float:
    """Return the bytes that cross kernel boundaries."""
    return sum(k.read + k.written for k in kernels)


def estimate(kernels: list[Kernel]) -> float:
    """Return the estimated seconds: launches, then traffic."""
    return LAUNCH_SECONDS * len(kernels) + total_bytes(kernels) / BANDWIDTH


# THE PROGRAM


def make_env(env: AutoReset) -> VecEnv:
    """Return the batch of environments, for a GPU."""
    return VecEnv(env, platform="cuda")


def reset(env: AutoReset, key: Array, num_envs: int) -> State:
    """Return the first states."""
    return make_env(env).reset(jax.random.split(key, num_envs))


def rollout(env: AutoReset, state: State, keys: Array) -> State:
    """A step for each key: draw actions, step, reset ended episodes."""

    def step(state: State, key: Array) -> tuple[State, None]:
        return make_env(env).step(state, sample_action(key, env.env.config, state.t.shape)), None

    return jax.lax.scan(step, state, keys)[0]


@functools.cache
def find_target() -> jax.sharding.Sharding:
    """Return one H100, to compile for.

    Raises:
      RuntimeError: the plugin is not installed, or its version is not that of jax.
    """
    wanted = f"pip install --no-deps {' '.join(f'{wheel}=={jax.__version__}' for wheel in WHEELS)}"
    try:
        found = {importlib.metadata.version(wheel) for wheel in WHEELS}
    except importlib.metadata.PackageNotFoundError as missing:
        raise RuntimeError(f"{missing.name} is not installed; in a virtual environment of its own: {wanted}") from None
    if found != {jax.__version__}:
        raise RuntimeError(f"the plugin has version {', '.join(found)}: {wanted}")
    # Otherwise the plugin looks for the CUDA libraries, and JAX for a GPU.
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def count_ahead(env: AutoReset, num_envs: int) -> list[Kernel]:
    """Return the kernels of a step of a rollout that is compiled for an H100; nothing is executed."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(reset, num_envs=num_envs), env, key)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), SCAN_STEPS))
    place = functools.partial(jax.ShapeDtypeStruct, sharding=find_target())
    shapes = jax.tree.map(lambda x: place(x.shape, x.dtype), (env, state, keys))
    return count_step(parse(jax.jit(rollout).lower(*shapes).compile().as_text()))


def count_update(env: AutoReset, num_envs: int) -> dict[str, list[Kernel]]:
    """Return the kernels of a training update's bodies, compiled for an H100: a rollout step, and a minibatch."""
    from train.ppo.config import Config
    from train.ppo.run import make_ppo

    config = Config(num_envs=num_envs, total_steps=100 * num_envs * Config.num_steps)
    ppo, place = make_ppo(config), functools.partial(jax.ShapeDtypeStruct, sharding=find_target())
    state = jax.eval_shape(lambda key: ppo.init(make_env(env), key), jax.eval_shape(lambda: jax.random.key(0)))
    envs, state = jax.tree.map(lambda x: place(x.shape, x.dtype), (make_env(env), state))
    program = parse(jax.jit(ppo.update).lower(envs, state).compile().as_text())
    bodies = {}
    for x in program.computations[program.entry].values():
        trips = int(x.find(r"known_trip_count\W+n\W+(\d+)") or 0) if x.opcode == "while" else 0
        name = {config.num_steps: "rollout step", config.epochs * config.minibatches: "minibatch"}.get(trips)
        if name:
            bodies[name] = count_iteration(program, x)
    return bodies


def time_steps(env: AutoReset, num_envs: int, samples: int) -> tuple[list[Kernel], list[float]]:
    """Return the kernels of a step compiled for this device, and its seconds in runs of 512 steps in a row."""
    key, draws = jax.random.split(jax.random.key(0))
    state = jax.jit(reset, static_argnums=2)(env, key, num_envs)
    keys, calls, seconds = jax.random.split(draws, SCAN_STEPS), 512 // SCAN_STEPS, []
    compiled = jax.jit(rollout, donate_argnums=1).lower(env, state, keys).compile()
    for _ in range(samples + 1):  # the first one warms up
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(calls):
            state = compiled(env, state, keys)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - began) / (calls * SCAN_STEPS))
    return count_step(parse(compiled.as_text())), seconds[1:]


# SHOW


@dataclasses.dataclass(frozen=True)
class Args:
    """The programs to count or time."""

    num_envs: tuple[int, ...] = (4096, 65536, 262144)
    """Batch sizes."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market."""
    kernels: bool = False
    """List every kernel with the operations in it."""
    training: bool = False
    """Count the bodies of a training update instead."""
    timed: bool = False
    """Time on this machine's GPU instead of counting ahead; kernels are then those of the program that ran."""
    samples: int = 7
    """Timed runs."""
    out: pathlib.Path | None = None
    """Where the result goes; default benchmarks/results/gpu_counted.json or gpu_timed.json."""

    def __post_init__(self):
        if min((*self.num_envs, self.samples), default=0) < 1:
            raise ValueError(f"num_envs is {self.num_envs}, samples {self.samples}; each must be at least 1")


def summarise(num_envs: int, kernels: list[Kernel], seconds: list[float]) -> dict[str, Any]:
    """Return one row of the result; without seconds the estimate alone."""
    row = {
        "num_envs": num_envs,
        "kernels": len(kernels),
        "bytes_per_env": round(total_bytes(kernels) / num_envs),
        "estimated_million_steps": round(num_envs / estimate(kernels) / 1e6, 1),
    }
    if seconds:
        slow, median, fast = (num_envs / s / 1e6 for s in reversed(quartiles(seconds)))
        row |= {"low": round(slow, 1), "million_steps": round(median, 1), "high": round(fast, 1)}
    return row


def tabulate(rows: list[dict[str, Any]], title: str) -> Table:
    """Return a table with a column for each entry of the rows."""
    table = Table(*rows[0], title=title, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def run(args: Args) -> None:
    """Count or time, show and save.

    Raises:
      RuntimeError: there is no GPU to time on, or no compiler to count with.
    """
    console, rows, device = Console(), [], "NVIDIA H100 80GB HBM3 (compiled for, not executed)"
    if not args.timed:
        find_target()
    elif jax.default_backend() == "gpu":
        device = jax.devices()[0].device_kind
    else:
        raise RuntimeError("JAX sees no GPU here: pip install 'jax[cuda13]' where there is one, or leave out --timed")
    env = AutoReset(PerpEnv(load_market(args.dataset)))
    if args.training:
        for num_envs in args.num_envs[:1]:
            for body, kernels in count_update(env, num_envs).items():
                row = summarise(num_envs, kernels, [])
                del row["estimated_million_steps"]
                rows.append({"body": body, **row, "estimated_us": round(1e6 * estimate(kernels), 1)})
        console.print(tabulate(rows, f"The bodies of an update on {device}"))
        save(args.out or RESULTS / "gpu_training_counted.json", PROGRAM, rows, device)
        return
    for num_envs in args.num_envs:
        with Console(stderr=True).status(f"{num_envs} environments"):
            done = time_steps(env, num_envs, args.samples) if args.timed else (count_ahead(env, num_envs), [])
        rows.append(summarise(num_envs, *done))
        if args.kernels:
            listing = [k._asdict() | {"read": round(k.read), "written": round(k.written)} for k in done[0]]
            console.print(tabulate(listing, f"{num_envs} environments; bytes of all of them"))
    console.print(tabulate(rows, f"A rollout step on {device}"))
    save(args.out or RESULTS / f"gpu_{'timed' if args.timed else 'counted'}.json", PROGRAM, rows, device)


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(run, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
