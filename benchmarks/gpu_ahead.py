"""What an H100 would run for one environment step, counted on a machine without a GPU.

In a virtual environment of its own, because JAX looks for a GPU wherever it finds the plugin:

    pip install -e . && X=$(python -c 'import jax; print(jax.__version__)')
    pip install --no-deps jax-cuda13-plugin==$X jax-cuda13-pjrt==$X      # the extra [gpu-ahead], at the version of jax
    python -m benchmarks.gpu_ahead [--num-envs 4096 65536 262144] [--kernels]

The two wheels bring XLA's GPU compiler, which needs neither driver nor CUDA if it is told what to compile for.
Nothing is executed. Kernels and bytes are counted in the compiled program; time and speed are an *estimate* from both,

    seconds = 2.1 microseconds * kernels + bytes / 2.06 TB/s

Both constants are those that fit best what rollouts took on an H100 (`benchmarks/gpu_time.py`), to 10 %. What counts:

- as a kernel: all that the device is asked to do one after the other, copies and loop counters included. A conditional
  is one, and the branch that it takes comes on top: the last, because of thousands of environments some always ask for
  what it does. `--kernels` shows what each branch costs, `--branches FUNCTION INDEX` counts another one.
- as bytes: what kernels read and write. Of an array that is gathered from or sliced what is taken from it, of an update
  in place the update. Nothing is kept in a cache between kernels, and no transaction is wider than what is asked for.

The programs: `VecEnv(PerpEnv).step`; a step of a `lax.scan` rollout, with actions drawn and ended episodes reset;
the same with a key for each environment's action ("N keys"), instead of one draw for all.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jaxtyping import Array, Float, Int
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.report import RESULTS, run_command, save
from perpjax import AutoReset, EnvConfig, PerpEnv, State, VecEnv, load_market
from perpjax.orders import sample_action

PROGRAM = "benchmarks.gpu_ahead"
RESULT = RESULTS / "gpu_ahead.json"
LAUNCH_SECONDS = 2.1e-6
"""A kernel, in a loop on the device; from Python a step is a hundred microseconds and more."""
BANDWIDTH = 2.06e12
"""Bytes a second. The memory has 3.35e12, but some kernels read rows here and there, and some compute longer than they
read."""
SCAN_STEPS = 128
GOALS = {"met": (12, 4000), "stretch": (8, 2500)}
"""At most so many kernels of a rollout step, and bytes an environment."""
WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# READ A COMPILED PROGRAM


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of an HLO program."""

    name: str
    arrays: tuple[tuple[int, float], ...]
    """Elements, and bytes of one, of each array of the result."""
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
        """The first group of `pattern` in the attributes, or nothing."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A scheduled HLO module."""

    computations: dict[str, Computation]
    entry: str
    callers: dict[str, list[str]]
    """Of each stack frame "function:line", innermost first; of a local function or lambda that which encloses it."""

    def locate(self, x: Instruction) -> list[str]:
        """Where in the source an instruction comes from, innermost first; in a step its functions' names are all."""
        scopes = re.findall(r"perpjax\.([\w.]+)", x.find(r'op_name="([^"]*)"'))
        return scopes[::-1] or self.callers.get(x.find(r"stack_frame_id=(\d+)"), [])


def parse(text: str) -> Program:
    """Read what `compiled.as_text()` prints.

    Raises:
      ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[head.group(2)] = {}
            entry = head.group(2) if head.group(1) else entry
        elif instruction := _parse_line(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not an HLO program: it has no ENTRY computation")
    return Program(computations, entry, _parse_frames(text))


def _parse_line(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line)
    if not found:
        return None
    root, name, shape, opcode, rest = found.groups()
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    operands = re.findall(r"%([\w.\-]+)", rest[:end])
    return Instruction(name, tuple(_parse_arrays(shape)), opcode, tuple(operands), rest[end:], bool(root))


def _parse_arrays(shape: str) -> Iterator[tuple[int, float]]:
    for kind, sizes in re.findall(r"\b(pred|[a-z]+\d\w*)\[([\d,<=]*)\]", shape):
        elements = 1
        for size in re.findall(r"\d+", sizes):
            elements *= int(size)
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind).group())
        yield elements, bits / 8


def _parse_frames(text: str) -> dict[str, list[str]]:
    """See `Program.callers`; the frames are tables at the head of a program."""
    names = dict(re.findall(r'^(\d+) "(.*)"$', text.partition("\nFunctionNames\n")[2].partition("\n\n")[0], re.M))
    places = re.findall(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+) line=(\d+)", text, re.M)
    labels = {place: f"{names[name]}:{line}" for place, name, line in places}
    callers: dict[str, list[str]] = {}
    for frame, place, parent in re.findall(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", text, re.M):
        # A frame comes after its parent, whose number is printed with one added.
        own = [] if "<" in labels[place] else [labels[place]]
        callers[frame] = own + callers.get(str(int(parent) - 1), [])
    return callers


# COUNT

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
"""Nothing is run for these."""
TAKES = {"gather", "slice", "dynamic-slice"}
"""These read no more of their first operand than they return."""


Branches = Mapping[str, int]
"""Which branch the conditionals take that come from a function of this name; others take their last."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Something that the device is asked to do."""

    name: str
    opcode: str
    read: float
    """Bytes."""
    written: float
    """Bytes."""
    source: str
    """Functions that most of its operations come from, with their number; of a conditional, what it chooses between."""
    depth: int = 0
    """Conditionals around it."""


def count(program: Program, name: str, branches: Branches) -> list[Kernel]:
    """The kernels of one call of a computation, those of what it calls included."""
    computation, kernels = program.computations[name], []
    for x in computation.values():
        if x.opcode in FREE or x.opcode.endswith(("-done", "-update")):
            continue
        if x.opcode in ("call", "async-start"):
            kernels += count(program, x.find(r"(?:to_apply|calls)=%?([\w.\-]+)"), branches)
        elif x.opcode == "while":
            times = int(x.find(r"known_trip_count\W+n\W+(\d+)") or 1)
            kernels += count_iteration(program, x, branches) * times
        elif x.opcode == "conditional":
            kernels += _count_conditional(program, computation, x, branches)
        else:
            kernels.append(_count_kernel(program, computation, x))
    return kernels


def count_iteration(program: Program, loop: Instruction, branches: Branches) -> list[Kernel]:
    """The kernels of one iteration. If nobody knows how many there are, the host reads the condition."""
    kernels = count(program, loop.find(r"body=%?([\w.\-]+)"), branches)
    if loop.find(r"(known_trip_count)"):
        return kernels
    asked = count(program, loop.find(r"condition=%?([\w.\-]+)"), branches)
    return [*kernels, *asked, Kernel(loop.name, "while", 1, 0, "the host reads the condition")]


def find_loops(program: Program) -> list[Instruction]:
    """The loops of the entry computation."""
    return [x for x in program.computations[program.entry].values() if x.opcode == "while"]


def _count_conditional(program: Program, computation: Computation, x: Instruction, branches: Branches) -> list[Kernel]:
    names = re.findall(r"[\w.\-]+", x.find(r"branch_computations=\{([^}]*)\}")) or [
        x.find(rf"{which}_computation=%?([\w.\-]+)") for which in ("false", "true")
    ]
    counted = [count(program, name, branches) for name in names]
    where = program.locate(x)[:2]
    functions = [place.partition(":")[0] for place in where]
    taken = next((branches[f] for f in functions if f in branches), len(counted) - 1)
    if not 0 <= taken < len(counted):
        raise ValueError(f"the conditional in {functions} has branches 0 .. {len(counted) - 1}, not {taken}")
    costs = ", ".join(f"{i}: {len(b)} kernels {total_bytes(b) / 1000:.0f} kB" for i, b in enumerate(counted))
    source = f"{' > '.join(reversed(where))} takes {taken} of {costs}"
    inside = [dataclasses.replace(k, depth=k.depth + 1) for k in counted[taken]]
    return [Kernel(x.name, x.opcode, computation[x.operands[0]].bytes, 0, source), *inside]


def _count_kernel(program: Program, computation: Computation, x: Instruction) -> Kernel:
    if x.opcode == "copy-start":
        # Its result is a tuple of both buffers.
        read = written = computation[x.operands[0]].bytes
        inside = {}
    else:
        inside = program.computations[x.find(r"calls=%?([\w.\-]+)")] if x.opcode == "fusion" else _wrap(computation, x)
        read, written = count_traffic(inside)
    return Kernel(x.name, x.opcode, read, written, _describe(program, x, inside))


def _wrap(computation: Computation, x: Instruction) -> Computation:
    """A computation of one instruction."""
    operands = {n: dataclasses.replace(computation[n], opcode="parameter", is_root=False) for n in x.operands}
    return operands | {x.name: dataclasses.replace(x, is_root=True)}


def _describe(program: Program, x: Instruction, inside: Computation) -> str:
    """See `Kernel.source`; of what the compiler added, what it is."""
    work = [y for y in inside.values() if y.opcode not in FREE | {"broadcast"}]
    places = [place for y in work for place in program.locate(y)[:1]]
    functions = collections.Counter(place.partition(":")[0] for place in places)
    if functions:
        return ", ".join(f"{name} {times}" for name, times in functions.most_common(4))
    return f"{x.opcode} of {', '.join(x.operands) or 'a constant'}"


def count_traffic(inside: Computation) -> tuple[float, float]:
    """Bytes that one kernel reads and writes.

    From the results backwards: how many elements of each instruction are needed. What is needed of a parameter is read.
    """
    root = next(x for x in inside.values() if x.is_root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    need = collections.Counter({x.name: x.elements for x in results})
    updates, written = set(), 0.0
    for x in results:
        if update := _find_update(inside, x):
            updates.add(update.name)
        written += sum(y.bytes for y in _updated(inside, update)) if update else x.bytes
    read = 0.0
    for x in reversed(inside.values()):
        needed = min(need[x.name], x.elements)
        if x.opcode == "parameter":
            read += x.bytes * needed / max(x.elements, 1)
        elif x.opcode != "tuple":
            for i, name in enumerate(x.operands):
                if x.name in updates and i == 0:
                    # A scatter may combine with what is there.
                    need[name] += sum(y.elements for y in _updated(inside, x)) if x.opcode == "scatter" else 0
                else:
                    need[name] += _elements_needed(x, needed, inside[name].elements)
    return read, written


def _elements_needed(x: Instruction, needed: float, size: int) -> float:
    """Elements of an operand that has `size` of them, for `needed` elements of x."""
    if x.opcode in TAKES or size <= x.elements:
        return min(size, needed)
    return size * needed / max(x.elements, 1)


def _find_update(inside: Computation, x: Instruction) -> Instruction | None:
    """The update that x is, if it happens within the memory of a parameter."""
    x = _see_through(inside, x)
    is_update = x.opcode in ("dynamic-update-slice", "scatter")
    return x if is_update and _see_through(inside, inside[x.operands[0]]).opcode == "parameter" else None


def _see_through(inside: Computation, x: Instruction) -> Instruction:
    while x.opcode == "bitcast":
        x = inside[x.operands[0]]
    return x


def _updated(inside: Computation, x: Instruction) -> list[Instruction]:
    """The new values of an update."""
    names = x.operands[1:2] if x.opcode == "dynamic-update-slice" else x.operands[len(x.operands) // 2 + 1 :]
    return [inside[name] for name in names]


def total_bytes(kernels: list[Kernel]) -> float:
    """Bytes that cross kernel boundaries."""
    return sum(k.read + k.written for k in kernels)


def seconds(kernels: list[Kernel]) -> float:
    """The estimate: launches, then traffic."""
    return LAUNCH_SECONDS * len(kernels) + total_bytes(kernels) / BANDWIDTH


# COMPILE FOR AN H100


@functools.cache
def find_target() -> jax.sharding.Sharding:
    """One H100, to compile for.

    Raises:
      RuntimeError: the plugin is not installed, or of another version than jax; says what to install.
    """
    wanted = " ".join(f"{wheel}=={jax.__version__}" for wheel in WHEELS)
    try:
        found = {importlib.metadata.version(wheel) for wheel in WHEELS}
    except importlib.metadata.PackageNotFoundError as missing:
        raise RuntimeError(
            f"{missing.name} is not installed; in a virtual environment of its own: pip install --no-deps {wanted}"
        ) from None
    if found != {jax.__version__}:
        raise RuntimeError(f"the plugin is of version {', '.join(found)}: pip install --no-deps {wanted}")
    # Otherwise the plugin looks for the CUDA libraries, and JAX for a GPU.
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_ahead(function: Callable, *args: Any) -> Program:
    """Compile for an H100; of the arguments only shapes and types matter."""
    target = find_target()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target), args)
    return parse(jax.jit(function).lower(*shapes).compile().as_text())


Draw = Callable[[Array, EnvConfig, int], Array]


def draw_batch(key: Array, config: EnvConfig, num_envs: int) -> Float[Array, "envs 5"] | Int[Array, "envs 5"]:
    """Random actions for all environments in one draw."""
    return sample_action(key, config, (num_envs,))


def draw_each(key: Array, config: EnvConfig, num_envs: int) -> Float[Array, "envs 5"] | Int[Array, "envs 5"]:
    """Random actions from a key for each environment."""
    return jax.vmap(lambda k: sample_action(k, config))(jax.random.split(key, num_envs))


class Case(NamedTuple):
    """A program to count, or to run."""

    env: PerpEnv | AutoReset
    """The first argument, and what the second is a batch of states of."""
    function: Callable[[PerpEnv | AutoReset, State, Array], State]
    draw: Callable[[Array], Array]
    """The third argument, from a key."""
    steps: int
    """Of one call."""


def step_case(env: PerpEnv, num_envs: int) -> Case:
    """The bare step."""
    draw = functools.partial(draw_batch, config=env.config, num_envs=num_envs)
    return Case(env, lambda env, state, actions: VecEnv(env).step(state, actions), draw, 1)


def rollout_case(env: PerpEnv, num_envs: int, draw: Draw) -> Case:
    """A rollout: draw actions, step, reset what has ended."""

    def rollout(env: AutoReset, state: State, keys: Array) -> State:
        def step(state: State, key: Array) -> tuple[State, None]:
            return VecEnv(env).step(state, draw(key, env.env.config, num_envs)), None

        return jax.lax.scan(step, state, keys)[0]

    return Case(AutoReset(env), rollout, lambda key: jax.random.split(key, SCAN_STEPS), SCAN_STEPS)


def reset_batch(env: PerpEnv | AutoReset, num_envs: int, key: Array) -> State:
    """The first states of a case."""
    return VecEnv(env).reset(jax.random.split(key, num_envs))


CASES: dict[str, Callable[[PerpEnv, int], Case]] = {
    "step": step_case,
    "rollout": functools.partial(rollout_case, draw=draw_batch),
    "rollout, N keys": functools.partial(rollout_case, draw=draw_each),
}


def count_step(program: Program, branches: Branches) -> list[Kernel]:
    """The kernels of one step of a compiled case."""
    loops = find_loops(program)
    return count_iteration(program, loops[0], branches) if loops else count(program, program.entry, branches)


def count_ahead(case: Case, num_envs: int, branches: Branches) -> list[Kernel]:
    """The same of one that is compiled for an H100 here."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(reset_batch, num_envs=num_envs), case.env, key=key)
    return count_step(compile_ahead(case.function, case.env, state, jax.eval_shape(case.draw, key)), branches)


# SHOW


@dataclasses.dataclass(frozen=True)
class Args:
    """What to count."""

    num_envs: tuple[int, ...] = (4096, 65536, 262144)
    """Batch sizes."""
    kernels: bool = False
    """List every kernel: what it reads and writes, and where in the source it comes from. Wants a wide terminal."""
    branches: dict[str, int] = dataclasses.field(default_factory=dict)
    """Which branch the conditionals take that come from a function, instead of the last: FUNCTION 1."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market."""
    out: pathlib.Path = RESULT
    """Where the result goes, every kernel included."""
    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)

    def __post_init__(self):
        if min(self.num_envs, default=0) < 1:
            raise ValueError(f"num_envs is {self.num_envs}; at least one batch of at least 1 is needed")


def summarise(program: str, num_envs: int, kernels: list[Kernel]) -> dict[str, Any]:
    """One row of the result."""
    moved = total_bytes(kernels) / num_envs
    reached = [name for name, (most, widest) in GOALS.items() if len(kernels) <= most and moved <= widest]
    return {
        "program": program,
        "num_envs": num_envs,
        "kernels": len(kernels),
        "bytes_per_env": round(moved, 1),
        "estimated_microseconds": round(seconds(kernels) * 1e6, 2),
        "estimated_million_steps_per_second": round(num_envs / seconds(kernels) / 1e6, 1),
        "goal": "" if program == "step" else ["missed", *reached][-1],
        "listing": [dataclasses.asdict(k) for k in kernels],
    }


def list_kernels(row: dict[str, Any]) -> Table:
    """A table of one program's kernels, in the order in which they run."""
    title = f"{row['program']}, {row['num_envs']} environments; bytes are per environment"
    table = Table("", "kernel", "reads", "writes", "operations from", title=title, box=SIMPLE_HEAD)
    for i in (0, 2, 3):
        table.columns[i].justify = "right"
    for i in (1, 4):
        table.columns[i].overflow = "fold"
    for i, k in enumerate(row["listing"], 1):
        read, written = (f"{k[name] / row['num_envs']:.0f}" for name in ("read", "written"))
        name = k["name"] if k["opcode"] in k["name"] else f"{k['name']} ({k['opcode']})"
        table.add_row(str(i), "  " * k["depth"] + name, read, written, k["source"])
    return table


def show(rows: list[dict[str, Any]]) -> Table:
    """The table of all programs."""
    (kernels, moved), (fewer, less) = GOALS.values()
    table = Table(
        title=f"NVIDIA H100, counted ahead. Time and speed are an estimate:\n"
        f"{LAUNCH_SECONDS * 1e6:.1f} us a kernel + bytes at {BANDWIDTH / 1e12} TB/s",
        caption=f"goal of a rollout: {kernels} kernels and {moved} bytes/env; stretch: {fewer} and {less}",
        box=SIMPLE_HEAD,
    )
    for head in ("envs", "program", "kernels", "B/env", "est. us", "est. M/s", "goal"):
        table.add_column(head, justify="left" if head in ("program", "goal") else "right")
    for row in rows:
        values = [v for name, v in row.items() if name not in ("program", "num_envs", "listing")]
        table.add_row(str(row["num_envs"]), row["program"], *map(str, values))
    return table


def run(args: Args) -> None:
    """Compile, count, show and save."""
    find_target()
    console, env, rows = Console(), PerpEnv(load_market(args.dataset), config=args.env), []
    for num_envs in args.num_envs:
        for program, make_case in CASES.items():
            with Console(stderr=True).status(f"compiling {program}, {num_envs} environments"):
                kernels = count_ahead(make_case(env, num_envs), num_envs, args.branches)
            rows.append(summarise(program, num_envs, kernels))
            if args.kernels:
                console.print(list_kernels(rows[-1]))
    console.print(show(rows))
    estimate = {"seconds_per_kernel": LAUNCH_SECONDS, "bytes_per_second": BANDWIDTH}
    save(args.out, PROGRAM, {"target": "NVIDIA H100 80GB HBM3", "estimate": estimate, "rows": rows})


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(run, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
