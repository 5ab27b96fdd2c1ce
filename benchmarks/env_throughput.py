"""How fast is a step: ours, the limit's and the rival's, in turn; and what of it can be counted.

    pip install -e '.[bench]'
    python -m benchmarks.env_throughput              # some minutes; writes benchmarks/results/env_throughput.json
    python -m benchmarks.env_throughput --quick      # a look; writes nothing

The sides step the same number of environments on the same bars:

    limit        the bare step as a loop written by hand (`benchmarks/limit.py`), a call for every step; its threads
                 are Numba's own, which sleep between calls
    spinning     the same with OpenMP's threads, which spin for some milliseconds after a call: the next one starts at
                 once, but until then nothing else has those cores, not an agent either
    bare         `VecEnv(PerpEnv)`, a jitted `lax.scan` over the steps, its state donated, the environments
                 spread over `--devices` devices: XLA counts a CPU as one, and uses two cores of it badly
    auto-reset   `VecEnv(AutoReset(PerpEnv))`, with episodes of 672 bars that end at different times
    rival        TorchTrade (`benchmarks/rival.py`), which resets itself, a call for every step

Ours have a process, and so has each other side. The limits are timed with one thread and with all, and what is faster
at that size counts. Ours with fewer than 256 environments are started with NPROC=1, as a user would do it: XLA then has
one thread and hands no kernel to another, which costs so small a batch more than its arithmetic.

The machine may be noisy, so the sides take turns, and a ratio is that of two in the same turn: the median of all turns,
with quartiles. Actions are random and drawn beforehand: a lot is asked for on every second bar, more than policies do.
The limits and `bare` take the same steps from the same accounts, which have traded before; none of these ends on the
way, since one that has ended costs nothing. Without the packages of the extra `bench`, limits and rival are left out.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import statistics
import unittest.mock
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import gpu_ahead
from benchmarks.report import RESULTS, describe_machine, describe_spread, run_command, save
from benchmarks.turns import Apart, Clock, Seconds, clock, take_turns
from perpjax import (
    AutoReset,
    EnvConfig,
    EnvParams,
    Market,
    PerpEnv,
    Segments,
    State,
    VecEnv,
    batching,
    load_market,
    slice_market,
)
from perpjax.orders import sample_action

PROGRAM = "benchmarks.env_throughput"
RESULT = RESULTS / "env_throughput.json"
SIDES = ("limit", "spinning", "bare", "auto-reset", "rival")
LIMITS = {"limit": "workqueue", "spinning": "omp"}
"""Numba's names for their threads."""
RATIOS = ("bare / limit", "bare / spinning", "auto-reset / rival")
DRAWING = "drawing "
"""Before the name of whose actions are drawn."""
NEEDS = {"limit": "numba", "spinning": "numba", "rival": "torchtrade"}
"""The package of the extra `bench` without which a side is left out."""
QUICK_ENVS = 4096
BUSY = 0.5
"""Load of others above which to warn: torch's threads wait for each other; a core taken away has cost them tenfold."""
ALONE = batching.MANY
"""Fewer environments of ours than so many are stepped by one thread."""
COUNTED = "synthetic:signal"
"""The market of everything that is counted: five candles a bar, no mark."""


@dataclasses.dataclass
class Args:
    """What to measure."""

    num_envs: tuple[int, ...] = (64, 1024, 4096, 16384, 65536)
    """Batch sizes. The goals of speed are set at 64 and 4096."""
    dataset: str = "synthetic:signal"
    """Folder or synthetic market, for the speeds; what is counted is counted on synthetic:signal."""
    repeats: int = 11
    """Timed calls of every side."""
    devices: int = os.cpu_count() or 1
    """CPU devices to spread our environments over; XLA's threads help one another less than two devices do."""
    quick: bool = False
    """At most 4096 environments and 3 repeats."""
    out: pathlib.Path | None = None
    """Where every sample goes, as JSON; default benchmarks/results/env_throughput.json, with --quick nowhere."""

    def __post_init__(self):
        if self.quick:
            self.num_envs = tuple(n for n in self.num_envs if n <= QUICK_ENVS)
            self.repeats = min(self.repeats, 3)
        else:
            self.out = self.out or RESULT
        if min(self.num_envs, default=0) < 1 or self.repeats < 1 or self.devices < 1:
            raise ValueError(
                f"num_envs is {self.num_envs}, repeats {self.repeats}, devices {self.devices}; each must be at least 1"
            )
        if uneven := [n for n in self.num_envs if n % self.devices]:
            raise ValueError(f"num_envs {uneven[0]} cannot be spread over {self.devices} devices; try --devices 1")


# MEASURE


def count_steps(num_envs: int) -> int:
    """Steps of one timed call: half a million of all environments together, where 16 to 512 of each are so many."""
    return max(16, min(512, 2**19 // num_envs))


def step_all(env: PerpEnv | AutoReset, state: State, actions: Int[Array, "steps envs 5"]) -> State:
    """The state after all steps."""
    return jax.lax.scan(lambda state, action: (VecEnv(env).step(state, action), None), state, actions)[0]


SHARED, BY_STEP = PartitionSpec(), PartitionSpec(None, "envs")
"""How the environment and the actions of all steps lie on the devices."""


@functools.cache
def all_devices() -> jax.sharding.Mesh:
    """In a row."""
    return jax.make_mesh((jax.device_count(),), ("envs",), axis_types=(jax.sharding.AxisType.Auto,))


def lay_out(state: State) -> State:
    """How the arrays of the states lie on the devices."""

    def split(axis: int, x: Array) -> PartitionSpec:
        return PartitionSpec(*[None] * (axis % x.ndim), "envs")

    return jax.tree.map(split, VecEnv.axes(state), state)


def spread(tree: Any, specs: Any) -> Any:
    """The arrays, put where `run_steps` wants them."""
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(all_devices(), spec), specs)
    return jax.device_put(tree, shardings)


@functools.partial(jax.jit, donate_argnums=1)
def run_steps(env: PerpEnv | AutoReset, state: State, actions: Int[Array, "steps envs 5"]) -> State:
    """`step_all` on all devices; the environments have nothing to tell each other."""
    by_env = lay_out(state)
    specs = (SHARED, by_env, BY_STEP)
    return jax.shard_map(step_all, mesh=all_devices(), in_specs=specs, out_specs=by_env, check_vma=False)(
        env, state, actions
    )


@functools.partial(jax.jit, static_argnums=1)
def reset_all(env: PerpEnv | AutoReset, num_envs: int) -> State:
    """Fresh ones."""
    return VecEnv(env).reset(jax.random.split(jax.random.key(0), num_envs))


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw_actions(key: Array, steps: int, num_envs: int) -> Int[Array, "steps envs 5"]:
    """Uniformly random ones."""
    draw = jax.vmap(lambda key: sample_action(key, EnvConfig()))
    return jax.vmap(draw)(jax.random.split(key, (steps, num_envs)))


class Trading(NamedTuple):
    """Accounts in the middle of trading, and what they do next."""

    env: PerpEnv | AutoReset
    state: State
    actions: Array

    @classmethod
    def begin(cls, env: PerpEnv | AutoReset, num_envs: int, steps: int) -> "Trading":
        """After `steps` steps; an auto-reset's first episodes end at different times."""
        state = reset_all(env, num_envs)
        if isinstance(env, AutoReset):
            left = jax.random.randint(jax.random.key(1), (num_envs,), 1, env.env.config.episode_length + 1)
            state = state.replace(end=jnp.minimum(state.end, state.t + left))
        before, after = (spread(draw_actions(jax.random.key(seed), steps, num_envs), BY_STEP) for seed in (2, 3))
        env = spread(env, SHARED)
        return cls(env, run_steps(env, spread(state, lay_out(state)), before), after)

    @classmethod
    def begin_bare(cls, market: Market, num_envs: int) -> "Trading":
        """`count_steps`, with episodes that last until all is timed.

        Raises:
          ValueError: on this market some are ruined before, and would be timed standing still.
        """
        steps = count_steps(num_envs)
        trading = cls.begin(PerpEnv(market, config=EnvConfig(episode_length=2 * steps + 1)), num_envs, steps)
        last = run_steps(trading.env, trading.copy(), trading.actions)
        over = float(jnp.mean(last.terminated | last.truncated))
        if over > 0.01:
            raise ValueError(f"{over:.0%} of the accounts are ruined within {2 * steps} bars; choose a calmer market")
        return trading

    def copy(self) -> State:
        """The state, to be donated."""
        return jax.tree.map(jnp.copy, self.state)

    def clock(self) -> Clock:
        """Steps from the same state, every time."""
        return clock(self.copy, lambda state: run_steps(self.env, state, self.actions))


# What a process of its own times, see `turns.Apart`.


def make_ours(dataset: str, num_envs: int, devices: int) -> dict[str, Clock]:
    """Ours, spread over so many devices."""
    prepare_jax(devices)
    market, steps = load_market(dataset), count_steps(num_envs)
    return {
        "bare": Trading.begin_bare(market, num_envs).clock(),
        "auto-reset": Trading.begin(AutoReset(PerpEnv(market)), num_envs, steps).clock(),
        f"{DRAWING}ours": clock(lambda: None, lambda _: draw_actions(jax.random.key(4), steps, num_envs)),
    }


def make_limit(name: str, dataset: str, num_envs: int) -> dict[str, Clock]:
    """A limit on one thread, and on all."""
    import numba

    from benchmarks.limit import Limit

    bare = Trading.begin_bare(load_market(dataset), num_envs)
    limit, start, rows = Limit(bare.env), VecEnv.by_row(bare.state), np.asarray(bare.actions)

    def run(threads: int) -> None:
        numba.set_num_threads(threads)
        for row in rows:
            limit.step(row)

    def on(threads: int) -> Clock:
        return clock(lambda: limit.load(start), lambda _: run(threads))

    return {f"{name} on {n}": on(n) for n in dict.fromkeys((1, numba.config.NUMBA_NUM_THREADS))}


def make_rival(dataset: str, num_envs: int) -> dict[str, Clock]:
    """The rival, on the same market."""
    from benchmarks.rival import Rival

    rival, steps = Rival(PerpEnv(load_market(dataset)), num_envs), count_steps(num_envs)
    actions = rival.draw(steps)
    return {
        "rival": clock(lambda: None, lambda _: rival.run(actions)),
        f"{DRAWING}rival": clock(lambda: None, lambda _: rival.draw(steps)),
    }


def prepare_jax(devices: int) -> None:
    """Before anything is computed. What was compiled by an earlier run must not count as compiled quickly."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)


@dataclasses.dataclass
class Speeds:
    """The sides at one batch size."""

    num_envs: int
    steps: int
    """Of every environment in one call."""
    seconds: Seconds
    """A limit's by its number of threads: "limit on 2"."""
    drawing: Seconds
    """The same number of actions."""

    def samples(self, side: str) -> list[float]:
        """Seconds of each turn, of a limit with the number of threads that is fastest; none if the side is missing."""
        choices = [x for name, x in self.seconds.items() if name.partition(" on ")[0] == side]
        return min(choices, key=statistics.median, default=[])

    def rate(self, side: str) -> float | None:
        """Median, million steps/s."""
        samples = self.samples(side)
        return self.num_envs * self.steps / statistics.median(samples) / 1e6 if samples else None

    def ratios(self, sides: str) -> list[float]:
        """How many times as fast as the other one side is, turn by turn; none if one of them is missing."""
        pairs = zip(*map(self.samples, sides.split(" / ")), strict=False)
        return [theirs / mine for mine, theirs in pairs]

    def nanoseconds_to_draw(self, side: str) -> float:
        """Median, for one action."""
        return statistics.median(self.drawing[side]) / (self.num_envs * self.steps) * 1e9


def measure_speeds(args: Args, num_envs: int, missing: dict[str, str]) -> Speeds:
    """All sides that there are, in turn."""
    few, what = num_envs < ALONE, (args.dataset, num_envs)
    with contextlib.ExitStack() as processes:

        def begin(make: Callable[..., dict[str, Clock]], *args: Any, **environment: str) -> dict[str, Clock]:
            return processes.enter_context(Apart(functools.partial(make, *args), **environment))

        clocks = {}
        for side, threads in LIMITS.items():
            if side not in missing:
                clocks |= begin(make_limit, side, *what, NUMBA_THREADING_LAYER=threads)
        clocks |= begin(make_ours, *what, 1 if few else args.devices, **({"NPROC": "1"} if few else {}))
        if "rival" not in missing:
            clocks |= begin(make_rival, *what)
        draw = {name.removeprefix(DRAWING): clocks.pop(name) for name in list(clocks) if name.startswith(DRAWING)}
        return Speeds(num_envs, count_steps(num_envs), take_turns(clocks, args.repeats), take_turns(draw, 3))


# COUNT


def compile_bare(market: Market, num_envs: int) -> jax.stages.Compiled:
    """One bare step of so many environments on one device, on 4000 bars.

    XLA counts all of a market that rows are taken from; and the body of a loop once, so all slots are computed at once.
    """
    env = PerpEnv(slice_market(market, 0, 4000))
    state = reset_all(env, num_envs)
    (action,) = draw_actions(jax.random.key(1), 1, num_envs)
    step = jax.jit(lambda env, state, action: VecEnv(env).step(state, action))
    with unittest.mock.patch.object(batching, "MANY", num_envs + 1):
        return step.lower(env, state, action).compile()


def count_bytes_accessed(compiled: jax.stages.Compiled) -> float:
    """What its kernels read and write; a gathered operand counts as what is gathered of it."""
    program = gpu_ahead.parse(compiled.as_text())
    return gpu_ahead.total_bytes(gpu_ahead.count(program, program.entry, {}))


def count_state_bytes(market: Market) -> float:
    """Of one environment, without what it observes."""
    state = jax.eval_shape(PerpEnv(market).reset, jax.random.key(0))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.replace(obs=None)))


def count_market_bytes(market: Market) -> float:
    """Of one bar, without its features."""
    return market.rows.nbytes / len(market.rows) - 4 * len(market.feature_names)


def stretch(market: Market, num_bars: int) -> Market:
    """A market of one segment whose bars are repeated or cut to be so many."""
    first, _, instrument, start = market.segments
    return market.replace(
        rows=market.rows[np.arange(num_bars + 1) % len(market.rows)],
        segments=Segments(first, jnp.full_like(first, num_bars - 1), instrument, start),
        origins=(market.origins[0]._replace(num_bars=num_bars),),
    )


def cost_of_bars(market: Market, repeats: int, bars: tuple[int, int] = (20_000, 2_000_000)) -> list[float]:
    """Nanoseconds more that a bare step of one environment takes on the longer market, turn by turn."""
    num_envs, steps = 4096, count_steps(4096)
    clocks = {str(n): Trading.begin_bare(stretch(market, n), num_envs).clock() for n in bars}
    few, many = take_turns(clocks, repeats).values()
    return [(b - a) / (num_envs * steps) * 1e9 for a, b in zip(few, many, strict=True)]


def cost_of_size(market: Market, repeats: int, sizes: tuple[int, int] = (4096, 262_144)) -> list[float]:
    """A bare step of one environment in the larger batch over one in the smaller, turn by turn."""
    clocks = {str(n): Trading.begin_bare(market, n).clock() for n in sizes}
    seconds = take_turns(clocks, repeats)
    small, large = ([x / (n * count_steps(n)) for x in seconds[str(n)]] for n in sizes)
    return [b / a for a, b in zip(small, large, strict=True)]


def seconds_to_compile(repeats: int) -> Seconds:
    """Of a bare rollout and one with auto-reset, in turns, each in a process of its own: one that has compiled much
    compiles more slowly."""
    seconds: Seconds = {"bare": [], "auto-reset": []}
    for _ in range(repeats):
        for name, samples in seconds.items():
            with Apart(functools.partial(make_compiler, name)) as clocks:
                samples.append(clocks["compile"]())
    return seconds


def make_compiler(name: str, num_envs: int = 4096, steps: int = 128) -> dict[str, Clock]:
    """Traces and compiles a rollout."""
    prepare_jax(devices=1)
    env = PerpEnv(load_market(COUNTED))
    env = AutoReset(env) if name == "auto-reset" else env
    state = reset_all(env, num_envs)
    actions = draw_actions(jax.random.key(1), steps, num_envs)
    rollout = jax.jit(step_all, donate_argnums=1)
    return {"compile": clock(lambda: (env, state, actions), lambda args: rollout.lower(*args).compile())}


def count_traces(market: Market, other: Market) -> int:
    """Traces of a rollout that goes on from its own result, then takes another market and other numbers."""
    traces = 0

    @jax.jit
    def run(env: AutoReset, state: State, actions: Array) -> State:
        nonlocal traces
        traces += 1
        return step_all(env, state, actions)

    actions = draw_actions(jax.random.key(1), 4, 64)
    for env in (AutoReset(PerpEnv(market)), AutoReset(PerpEnv(other, EnvParams(taker_fee=0.0005)))):
        state = reset_all(env, 64)
        run(env, run(env, state, actions), actions)
    return traces


# JUDGE


@dataclasses.dataclass
class Figure:
    """Something measured that may have a goal; the median of its samples counts."""

    says: str
    samples: list[float]
    """Empty if a side is missing."""
    goal: float | None = None
    stretch: float | None = None
    at_least: bool = False
    """Else at most."""
    digits: int = 0

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal."""
        if not self.samples or self.goal is None:
            return None
        median = statistics.median(self.samples)
        return median >= self.goal if self.at_least else median <= self.goal


def compare_sides(speeds: list[Speeds]) -> list[Figure]:
    """The goals of speed."""
    at = {s.num_envs: s for s in speeds}
    wanted = (
        ("bare / limit", 64, 0.3, None),
        ("bare / limit", 4096, 0.5, None),
        ("bare / spinning", 4096, None, None),
        ("auto-reset / rival", 4096, 1.3, 2.0),
    )
    return [
        Figure(
            f"{pair} at {num_envs}",
            at[num_envs].ratios(pair) if num_envs in at else [],
            goal, stretch, at_least=True, digits=2,
        )
        for pair, num_envs, goal, stretch in wanted
    ]  # fmt: skip


def count_everything(repeats: int, tell: Callable[[str], None]) -> list[Figure]:
    """The goals of size and of growth, on markets of their own."""
    market, other = (load_market(f"{COUNTED}?seed={seed}") for seed in (0, 1))
    tell("counting bytes and traces")
    num_envs = 4096
    step = compile_bare(market, num_envs)
    figures = [
        Figure("bytes accessed a bare step", [count_bytes_accessed(step) / num_envs], 6000, 4000),
        Figure("the same by XLA's cost analysis", [step.cost_analysis()["bytes accessed"] / num_envs]),
        Figure("state bytes, observation apart", [count_state_bytes(market)], 700),
        Figure("market bytes, features apart", [count_market_bytes(market)], 250),
        Figure("traces", [count_traces(market, other)], 1),
    ]
    tell("20 thousand and 2 million bars")
    figures.append(Figure("ns that 2 million bars add", cost_of_bars(market, repeats), 50, digits=1))
    tell("4096 and 262144 environments")
    figures.append(Figure("ns at 262144 / ns at 4096", cost_of_size(market, repeats), 2, digits=2))
    tell("compiling")
    for name, samples in seconds_to_compile(repeats).items():
        figures.append(Figure(f"seconds to compile 128 steps, {name}", samples, 3, digits=2))
    return figures


# SHOW


def show_speeds(speeds: list[Speeds]) -> Table:
    """Million steps/s, a line for every batch size."""
    title = "Million steps/s (medians)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in ("envs", *SIDES, *RATIOS):
        table.add_column(head.replace("-", "-\n"), justify="right")  # to fit into 80 columns
    for s in speeds:
        ratios = (s.ratios(pair) for pair in RATIOS)
        figures = *map(s.rate, SIDES), *(statistics.median(r) if r else None for r in ratios)
        table.add_row(f"{s.num_envs}", *("-" if x is None else f"{x:.2f}" for x in figures))
    return table


def show_figures(figures: list[Figure]) -> Table:
    """What is measured against what it should be."""
    table = Table(title="Goals", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in ("median (quartiles)", "goal (stretch)", "met"):
        table.add_column(head, justify="right", no_wrap=True)
    for f in figures:
        goal = "-"
        if f.goal is not None:
            goal = f"{'>=' if f.at_least else '<='} {f.goal:g}" + (f" ({f.stretch:g})" if f.stretch else "")
        met = {None: "-", True: "yes", False: "NO"}[f.met]
        table.add_row(f.says, describe_spread(f.samples, f.digits), goal, met)
    return table


def find_missing() -> dict[str, str]:
    """The sides that cannot be measured here, and why."""
    missing = {}
    for side, package in NEEDS.items():
        if importlib.util.find_spec(package) is None:
            missing[side] = f"it needs {package}: pip install -e '.[bench]'"
    if "spinning" not in missing:
        try:
            importlib.import_module("numba.np.ufunc.omppool")
        except ImportError as error:
            missing["spinning"] = f"Numba finds no OpenMP here: {error}"
    return missing


def measure(args: Args) -> None:
    """Measure, count, show, save."""
    console, progress = Console(), Console(stderr=True)
    missing = find_missing()
    for side, why in missing.items():
        progress.print(f"no {side}: {why}", markup=False)
    prepare_jax(args.devices)
    machine = describe_machine()
    if machine["load"] > BUSY:
        progress.print(
            f"the machine is busy (load {machine['load']:.1f}): threads that wait for each other suffer most"
        )
    load_market(args.dataset)  # what is wrong with it is said here, not by another process
    with progress.status("") as status:
        speeds = []
        for num_envs in args.num_envs:
            status.update(f"{num_envs} environments")
            speeds.append(measure_speeds(args, num_envs, missing))
        figures = compare_sides(speeds) + count_everything(args.repeats, status.update)
    console.print(f"{args.dataset}, jax {jax.__version__}, {machine['processor']}, {machine['cores']} cores")
    console.print(f"ours on {args.devices} CPU devices; of fewer than {ALONE} environments on one thread, NPROC=1")
    console.print(show_speeds(speeds), show_figures(figures))
    for name in speeds[0].drawing:
        drawn = [s.nanoseconds_to_draw(name) for s in speeds]
        console.print(f"Not counted: drawing an action of {name}, {min(drawn):.0f} to {max(drawn):.0f} ns.")
    if args.out:
        result = {
            "machine": machine,
            "speeds": [dataclasses.asdict(s) for s in speeds],
            "figures": [dataclasses.asdict(f) | {"met": f.met} for f in figures],
        }
        save(args.out, PROGRAM, result)
        console.print(f"saved to {args.out}")


def main(argv: list[str] | None = None) -> None:
    """See `run_command`."""
    run_command(measure, Args, PROGRAM, __doc__, argv)


if __name__ == "__main__":
    main()
