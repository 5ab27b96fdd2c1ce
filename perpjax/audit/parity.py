"""Comparison of the simulator with the float64 twin: random episodes on any market, every step compared.

python -m perpjax.audit.parity --episodes 1000
python -m perpjax.audit.parity --dataset datasets/orca synthetic:crash --episodes 10000 --workers 2
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from perpjax._grid import FIRST_DECISION
from perpjax.audit.agreement import (
    Seen,
    compare_numbers,
    disagreement,
    follow,
    look,
    read_events,
    take_over,
    tell,
    twin_market,
    twin_params,
)
from perpjax.audit.draws import CONFIGS, draw_actions, draw_params
from perpjax.data.dataset import load_market
from perpjax.data.markets import slice_market
from perpjax.data.seeds import check_seed
from perpjax.env import PerpEnv
from perpjax.market import Market
from perpjax.params import EnvConfig
from perpjax.reference import Twin, step_like
from perpjax.state import State

MOST_TASKS = 1_000_003
"""Bound on the tasks of a run. The seed of a task is this times the run's seed, plus the task's number: no two runs
share a seed."""
MOST_WORKERS = 256
BATCH = 32
"""Episodes played together, on one drawn window of the market."""
SINGLE_STEPS = 20
"""States drawn from each episode, each for one step from exactly equal states."""


class Outcome(NamedTuple):
    """Results of a number of episodes."""

    episodes: int
    steps: int
    near_ties: int
    flipped: int
    """Near-ties that float32 decided the other way."""
    wallet_error: float
    """Largest difference, relative to the largest equity of the account so far."""
    equity_error: float
    events: Counter
    """Counts of the ledger, and of verdicts, over all episodes."""
    disagreements: tuple[str, ...]

    def __add__(self, other: "Outcome") -> "Outcome":
        sums = (a + b for a, b in zip(self[:4], other[:4], strict=True))
        worst = (max(a, b) for a, b in zip(self[4:6], other[4:6], strict=True))
        return Outcome(*sums, *worst, self.events + other.events, self.disagreements + other.disagreements)


NOTHING = Outcome(0, 0, 0, 0, 0.0, 0.0, Counter(), ())


@jax.jit
def step_each(env: PerpEnv, states: State, actions: jax.Array) -> State:
    """Step each state [count] once with its own parameters; every leaf of `env.params` is [count]."""
    return jax.vmap(lambda params, s, a: env.replace(params=params).step(s, a))(env.params, states, actions)


@jax.jit
def record(env: PerpEnv, starts: jax.Array, actions: jax.Array) -> State:
    """Return the states of one episode for each start, [steps + 1, count]; every leaf of `env.params` is [count]."""

    def step(states: State, action: jax.Array) -> tuple[State, State]:
        states = step_each(env, states, action)
        return states, states

    first = jax.vmap(lambda params, t: env.replace(params=params).reset(jax.random.key(0), t))(env.params, starts)
    _, rest = jax.lax.scan(step, first, actions)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)


def compare_episodes(env: PerpEnv, starts: np.ndarray, actions: np.ndarray) -> tuple[Outcome, State]:
    """Play whole episodes in simulator and twin.

    Args:
      env: an environment on a market of one symbol and one segment, with every leaf of its parameters [count].
      starts: [count] first bars.
      actions: [steps, count, 5].

    Returns:
      The outcome, and the simulator's states [steps + 1, count].
    """
    states = record(env, jnp.asarray(starts), jnp.asarray(actions))
    host = to_host(states)
    market, total = twin_market(env.market), NOTHING
    for i in range(len(starts)):
        twin = Twin(market, twin_params(take(env.params, i), env.config))
        steps, *errors, why = follow(twin, jax.tree.map(lambda x, i=i: x[:, i], host), actions[:, i])
        counts, wrong = read_events(twin), (why,) if why else ()
        total += Outcome(1, steps, twin.near_ties, twin.flipped_ties, *errors, counts, wrong)
    return total, states


def compare_steps(env: PerpEnv, states: State, actions: np.ndarray) -> Outcome:
    """Compare one step from each of the given states [count], loaded into the twin.

    Args:
      env: an environment with every leaf of `env.params` [count].
      states: [count].
      actions: [count, 5].
    """
    after, states = to_host(step_each(env, states, jnp.asarray(actions))), to_host(states)
    market, total = twin_market(env.market), NOTHING
    pairs = jax.tree.map(lambda a, b: np.stack([a, b], 1), states, after)
    for i, action in enumerate(actions):
        pair = take(pairs, i)
        seen = Seen(pair)
        twin = Twin(market, twin_params(take(env.params, i), env.config))
        take_over(twin, pair, seen)
        before, told = look(twin), tell(twin)
        if step_like(twin, action, lambda t, b=before, s=seen: not disagreement(t, s, 1, b)):
            *errors, why = compare_numbers([told, tell(twin)], seen, twin.params)
        else:
            errors, why = (0.0, 0.0), f"{disagreement(twin, seen, 1, before)}; {twin.params}"
        wrong = (f"one step at bar {pair.t[0]}: {why}",) if why else ()
        total += Outcome(0, 1, twin.near_ties, twin.flipped_ties, *errors, Counter(), wrong)
    return total


def compare(market: Market, config: EnvConfig, episodes: int, seed: int = 0) -> Outcome:
    """Compare drawn episodes on a market of one symbol, and single steps from states drawn from them.

    Args:
      market: the source of a drawn window of two episodes.
      config: the static choices, with the length of the episodes.
    """
    rng, length = np.random.default_rng(seed), config.episode_length
    window = min(market.num_bars, FIRST_DECISION + 2 * length)
    earliest = min(max(0, int(market.segments.first[0]) - FIRST_DECISION), market.num_bars - window)
    begin = int(rng.integers(earliest, market.num_bars - window + 1))
    market = slice_market(market, begin, begin + window)
    env = PerpEnv(market, draw_params(rng, episodes), config)
    first, last = (int(x[0]) for x in (market.segments.first, market.segments.last))
    starts = rng.integers(first, last + 2 - length, episodes)
    starts[rng.random(episodes) < 0.1] = last - length // 2  # the market ends before the episode does
    outcome, states = compare_episodes(env, starts, draw_actions(rng, config, length, episodes))
    columns = np.repeat(np.arange(episodes), SINGLE_STEPS)
    alive = np.asarray(~(states.terminated | states.truncated)).sum(axis=0)
    rows = rng.integers(0, alive[columns])
    one_each = env.replace(params=jax.tree.map(lambda x: x[columns], env.params))
    drawn = jax.tree.map(lambda x: x[rows, columns], states)
    return outcome + compare_steps(one_each, drawn, draw_actions(rng, config, 1, len(rows))[0])


def take(tree: Any, i: int) -> Any:
    """Return row i of every leaf."""
    return jax.tree.map(lambda x: x[i], tree)


def to_host(states: State) -> State:
    """Return the states as numpy arrays, with keys as plain integers."""
    return jax.device_get(states.replace(key=jax.random.key_data(states.key)))


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare the simulator with its float64 twin on random episodes; exit status 1 if they disagree.

    Orders, fees, slippage, exposure, leverage and accounts are drawn. Both action codecs, the three intrabar rules
    and the other static choices take turns. The twin shares no code with the simulator and takes the same float32
    inputs. Every level of every lot, every count, verdict and flag must be equal. Every posting must be equal to
    float32 precision, and wallet and equity within 1e-6 of the largest equity so far, to the end. Near-ties
    (docs/semantics.md, section "Units") are decided as the simulator decided them, and counted.
    """

    dataset: tuple[str, ...] = ("synthetic:crash", "synthetic:signal", "synthetic:martingale")
    """Folders written by `python -m perpjax.data.build`, or synthetic markets; they take equal shares."""
    episodes: int = 600
    """Episodes in total; rounded up to whole batches."""
    length: int = 672
    """Bars of an episode."""
    seed: int = 0
    """Seed of all draws."""
    workers: int = 1
    """Number of processes."""


class Task(NamedTuple):
    """One batch of episodes."""

    dataset: str
    config: EnvConfig
    seed: int
    episodes: int


def main(argv: Sequence[str] | None = None, prog: str = "python -m perpjax.audit.parity") -> int:
    """Run the command line; returns the exit status."""
    args = tyro.cli(Args, args=argv, prog=prog)
    # Parent and workers share the device: by default each would claim most of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        outcomes = run(args)
    except BrokenProcessPool:
        print("error: a worker process died; it was killed, or ran out of memory: try fewer --workers", file=sys.stderr)
        return 2
    except Exception as error:
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        print(f"error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_outcomes(outcomes)
    return int(any(o.disagreements for o in outcomes.values()))


def plan(args: Args) -> list[Task]:
    """Return the batches of a run, each with a seed of its own.

    Raises:
      ValueError: a number is out of range, or a dataset is unknown.
    """
    for name, value in (("episodes", args.episodes), ("length", args.length), ("workers", args.workers)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_seed(args.seed)
    if args.workers > MOST_WORKERS:
        raise ValueError(f"workers is {args.workers}; it must be at most {MOST_WORKERS}, because each is a process")
    most = BATCH * (MOST_TASKS - len(args.dataset))
    if args.episodes > most:
        raise ValueError(f"episodes is {args.episodes}; it must be at most {most}, because each batch has its own seed")
    config = EnvConfig(episode_length=args.length)
    for dataset in args.dataset:  # a wrong name or length is found before anything runs
        PerpEnv(load(dataset), config=config)
    batches = -(-max(args.episodes // BATCH, min(args.episodes, len(CONFIGS))) // len(args.dataset))
    size = -(-args.episodes // (batches * len(args.dataset)))
    pairs = itertools.product(args.dataset, range(batches))
    configs = [dataclasses.replace(c, episode_length=args.length) for c in CONFIGS]
    return [
        Task(dataset, configs[i % len(configs)], args.seed * MOST_TASKS + i, size)
        for i, (dataset, _) in enumerate(pairs)
    ]


def run(args: Args) -> dict[str, Outcome]:
    """Return the outcome on each dataset. An exception in a worker ends all workers at once.

    Raises:
      BrokenProcessPool: a worker process died.
    """
    tasks, others = plan(args), multiprocessing.active_children()
    outcomes = dict.fromkeys(args.dataset, NOTHING)
    context = multiprocessing.get_context("spawn")
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[found]}"))
    with (
        ProcessPoolExecutor(args.workers, mp_context=context) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("episodes", total=sum(task.episodes for task in tasks), found="")
        try:
            for future in as_completed([pool.submit(run_task, t) for t in tasks]):
                task, outcome = future.result()
                outcomes[task.dataset] += outcome
                found = sum(len(o.disagreements) for o in outcomes.values())
                progress.update(bar, advance=task.episodes, found=f"{found} disagreements")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            progress.disable = True  # nothing but the error is printed
            workers = [process for process in multiprocessing.active_children() if process not in others]
            for process in workers:
                process.kill()
            for process in workers:
                process.join(5)
            raise
    return outcomes


def run_task(task: Task) -> tuple[Task, Outcome]:
    """Run one batch, in a worker."""
    return task, compare(load(task.dataset), task.config, task.episodes, task.seed)


@functools.cache
def load(dataset: str) -> Market:
    """Load the whole market of a dataset."""
    return load_market(dataset)


def print_outcomes(outcomes: dict[str, Outcome]) -> None:
    """Print the table, the events, and the first disagreements."""
    console = Console()
    caption = "in brackets: near-ties that float32 decided the other way"
    table = Table(title="simulator and float64 twin", caption=caption, box=SIMPLE_HEAD)
    table.add_column("dataset", overflow="fold")
    for name in ("episodes", "steps", "near-ties", "error", "wrong"):
        table.add_column(name, justify="right", no_wrap=True)
    total = sum(outcomes.values(), NOTHING)
    for name, o in (*outcomes.items(), ("all", total)):
        error = f"{max(o.wallet_error, o.equity_error):.1e}"
        ties = f"{o.near_ties:,} ({o.flipped:,})"
        table.add_row(name, f"{o.episodes:,}", f"{o.steps:,}", ties, error, str(len(o.disagreements)))
    console.print(table)
    console.print(", ".join(f"{name} {n:,}" for name, n in total.events.items()))
    for why in total.disagreements[:5]:
        console.print(why, markup=False)


if __name__ == "__main__":
    sys.exit(main())
