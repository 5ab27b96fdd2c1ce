"""Random steps by the million, each checked on the device.

python -m perpjax.audit.fuzz --steps 1_000_000_000
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Int
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from perpjax.audit.draws import CONFIGS, draw_params
from perpjax.data.dataset import load_market
from perpjax.data.seeds import check_seed, seed_key
from perpjax.env import PerpEnv
from perpjax.market import Market
from perpjax.params import EnvConfig
from perpjax.rules.orders import hold_action, sample_action
from perpjax.state import SUMS, Ledger, Lots, State, add, unrealised
from perpjax.vec import env_axes
from perpjax.xla import Program, default_platform, where_rows

CHUNK = 256
"""Steps of every environment in one call from the host."""
CALM = (0.0, 0.5, 0.97)
"""Probability of HOLD; each value for a third of the environments."""
MONEY = 1e-6
"""Bound on the float32 error of a sum of money, relative to its largest term."""
MAX_SEED = 2**60
"""Largest seed of a run. Each static choice takes a seed of its own: a multiple of the run's seed plus its number."""
_ENDS = ("stopped", "targets", "timed_out", "closed", "liquidated")


def check_step(env: PerpEnv, before: State, after: State) -> dict[str, Bool[Array, ""]]:
    """Check the invariants of any step from a state that is not over: the result maps names to booleans.

    The last check says that lots cost no more than their margins and fees, in sum. The free money, which is not posted
    as margin, falls only by margin and entry fee of the new lot. The other lots cannot lower it.
    """
    params, market = env.params, env.market
    lots, ledger = after.account.lots, after.account.ledger
    wallet, held = after.account.wallet, lots.quantity > 0
    tick_value = market.instrument_at(after.instrument).tick_value
    mark = market.bar(before.t).mark_close[-1]  # there may be no bar at after.t
    account = jnp.maximum(jnp.maximum(before.account.wallet, before.equity), wallet)
    moved = jnp.sum(lots.quantity * jnp.abs(mark - lots.entry)) * tick_value
    size = jnp.maximum(params.initial_equity, account) + moved

    opened = ledger.opened - before.account.ledger.opened
    new = held & (lots.age == 1)
    free, was_free = (s.account.wallet - jnp.sum(s.account.lots.margin) for s in (after, before))
    paid = jnp.sum(jnp.where(new, lots.margin + params.taker_fee * lots.quantity * lots.entry * tick_value, 0))
    stillborn = opened > jnp.sum(new)  # opened and ended in one bar: its margin was at most the free money
    floor = 1e-3 * params.initial_equity
    gain = jnp.log(jnp.maximum(after.equity, floor) / jnp.maximum(before.equity, floor))
    noise = MONEY * (10 + 2 * size / jnp.maximum(jnp.minimum(before.equity, after.equity), floor))
    return {
        "all numbers finite": _all_finite(after),
        "quantities, margins, ages not negative": _not_negative(lots),
        "levels and quantities whole": _are_whole(lots),
        "free slots empty, one side": _are_tidy(lots, held),
        "leverage within its limit": jnp.all(~held | (lots.leverage >= 1) & (lots.leverage <= params.max_leverage)),
        "counts and fees never fall": _never_fall(before.account.ledger, ledger),
        "opened = ended + held": ledger.opened == sum(getattr(ledger, n) for n in _ENDS) + jnp.sum(held),
        "one verdict an order": jnp.sum(ledger.verdicts) == jnp.sum(before.account.ledger.verdicts) + 1,
        "wallet = initial + realised - fees - funding - losses": _balances(after, params.initial_equity),
        "equity = wallet + unrealised": jnp.abs(after.equity - wallet - unrealised(lots, mark, tick_value))
        <= MONEY * size,
        "clock and flags": (after.t == before.t + 1)
        & (after.terminated == (after.equity <= params.ruin_fraction * params.initial_equity))
        & (after.truncated == (~after.terminated & (after.t >= after.end))),
        "reward = log return, less penalties": jnp.where(
            env.config.reward == "log_return", jnp.abs(after.reward - gain) <= noise, after.reward <= gain + noise
        ),
        "free money not negative": free >= -MONEY * size,
        "lots cost no more than margins and fees": stillborn | (free >= was_free - paid - MONEY * size),
    }


def _all_finite(state: State) -> Bool[Array, ""]:
    leaves = jax.tree.leaves(state.replace(key=None))
    return functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(x)) for x in leaves))


def _not_negative(lots: Lots) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([lots.quantity, lots.margin, lots.leverage]) >= 0) & jnp.all(lots.age >= 0)


def _are_whole(lots: Lots) -> Bool[Array, ""]:
    numbers = jnp.stack([lots.quantity, lots.entry, lots.stop, lots.target, lots.liquidation])
    return jnp.all(numbers == jnp.round(numbers))


def _are_tidy(lots: Lots, held: Bool[Array, "lots"]) -> Bool[Array, ""]:
    empty = functools.reduce(jnp.logical_and, (jnp.all(held | (x == 0)) for x in jax.tree.leaves(lots)))
    sides = jnp.abs(jnp.sum(lots.side)) == jnp.sum(held)
    return empty & sides & jnp.all(~held | (jnp.abs(lots.side) == 1))


def _never_fall(before: Ledger, after: Ledger) -> Bool[Array, ""]:
    money = (name for name in SUMS if name not in ("funding", "realised"))
    names = (*_ENDS, "opened", "ambiguous", "verdicts", *money)
    return functools.reduce(jnp.logical_and, (jnp.all(getattr(after, n) >= getattr(before, n)) for n in names))


def _balances(state: State, initial: Array) -> Bool[Array, ""]:
    """Check the wallet in two-float arithmetic. A step's fees and losses were each summed in float32 before posting."""
    a, ledger = state.account, state.account.ledger
    low = dict(zip(SUMS, ledger.low, strict=True))
    paid = ("fees", "funding", "liquidation_losses")
    rest, _ = add(
        (a.wallet, a.wallet_low), -initial, -ledger.realised, *(getattr(ledger, name) for name in paid),
        -low["realised"], *(low[name] for name in paid),
    )  # fmt: skip
    exact = initial + jnp.abs(ledger.realised) + jnp.abs(ledger.funding)
    return jnp.abs(rest) <= 1e-10 * exact + 1e-7 * (ledger.fees + ledger.liquidation_losses)


class Tally(NamedTuple):
    """Counts of a run."""

    steps: int
    episodes: int
    ruined: int
    liquidated: int
    broken: dict[str, int]
    """Number of failures of each check."""

    def __add__(self, other: "Tally") -> "Tally":
        broken = {n: self.broken.get(n, 0) + other.broken.get(n, 0) for n in other.broken | self.broken}
        return Tally(*(a + b for a, b in zip(self[:4], other[:4], strict=True)), broken)


NOTHING = Tally(0, 0, 0, 0, {})


@functools.partial(jax.jit, static_argnames="steps")
def play(env: PerpEnv, states: State, calm: Array, key: Array, steps: int) -> tuple[State, Int[Array, "3"], dict]:
    """Play random orders in every environment; `env.params` and `calm` are [envs].

    Returns:
      The states; the numbers of ended episodes, ruined episodes and liquidated lots; the failures of each check.
    """

    program = Program(default_platform(), calm.shape[0])

    def one(env: PerpEnv, state: State, calm: Array, key: Array):
        key_idle, key_action, key_reset = jax.random.split(key, 3)
        action = sample_action(key_action, env.config)
        action = jnp.where(jax.random.uniform(key_idle) < calm, hold_action(env.config), action)
        after = env.step(state, action)
        failed = {name: ~holds for name, holds in check_step(env, state, after).items()}
        liquidated = after.account.ledger.liquidated - state.account.ledger.liquidated
        done = after.terminated | after.truncated
        return after, key_reset, done, jnp.stack([done, after.terminated, liquidated]).astype(jnp.int32), failed

    def step(states: State, key: Array):
        keys, axes = jax.random.split(key, calm.shape[0]), env_axes(env)
        after, resets, done, events, failed = jax.vmap(one, (axes, 0, 0, 0))(env, states, calm, keys)
        states = where_rows(
            done, lambda _, env, key: env.reset(key), after, env, resets, program=program, axes=(0, axes, 0)
        )
        return states, (jnp.sum(events, axis=0), jax.tree.map(jnp.sum, failed))

    states, (events, failed) = jax.lax.scan(step, states, jax.random.split(key, steps))
    return states, jnp.sum(events, axis=0), jax.tree.map(lambda x: jnp.sum(x, axis=0), failed)


def check_envs(num_envs: int, max_lots: int) -> None:
    """Raise unless a chunk's counts fit int32: an account ends at most the lots it held and one for each step."""
    most = (2**31 - 1) // (CHUNK + max_lots)
    if not 1 <= num_envs <= most:
        raise ValueError(f"num_envs is {num_envs}; it must be in [1, {most}], because a chunk's counts are int32")


def fuzz(
    market: Market,
    config: EnvConfig,
    steps: int,
    num_envs: int = 4096,
    seed: int = 0,
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Play at least `steps` random steps with drawn parameters, and count the failures.

    Args:
      progress: called with the tally of each chunk.
    """
    check_envs(num_envs, config.max_lots)
    env = PerpEnv(market, draw_params(np.random.default_rng(check_seed(seed)), num_envs), config)
    key, key_reset = jax.random.split(seed_key(seed))
    reset = jax.jit(jax.vmap(PerpEnv.reset, (env_axes(env), 0)))
    states = reset(env, jax.random.split(key_reset, num_envs))
    calm = jnp.resize(jnp.array(CALM), num_envs)
    total, chunk = NOTHING, max(1, min(CHUNK, -(-steps // num_envs)))
    while total.steps < steps:
        key, key_chunk = jax.random.split(key)
        states, events, failed = play(env, states, calm, key_chunk, chunk)
        tally = Tally(chunk * num_envs, *events.tolist(), {name: int(n) for name, n in failed.items()})
        total += tally
        progress(tally)
    return total


@dataclasses.dataclass(frozen=True)
class Args:
    """Play random steps on random accounts and check each of them; exit status 1 if a check fails.

    No number may become infinite or NaN, and no quantity negative. The ledger must add up to the wallet, and wallet and
    unrealised profit to equity. Opened lots must equal ended and held lots. Rewards must be the log return. No lot may
    cost more than its margin and fees. Fees, slippage, exposure, leverage and accounts are drawn. Both action codecs
    and the three intrabar rules take turns on every dataset.
    """

    steps: int = 20_000_000
    """Steps in total; rounded up to whole chunks."""
    dataset: tuple[str, ...] = ("synthetic:crash", "synthetic:signal", "synthetic:martingale")
    """Synthetic markets, or folders written by `python -m perpjax.data.build`; they take equal shares."""
    num_envs: int = 4096
    """Environments stepped together."""
    seed: int = 0
    """Seed of all draws."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m perpjax.audit.fuzz") -> int:
    """Run the command line; returns the exit status."""
    args = tyro.cli(Args, args=argv, prog=prog)
    try:
        tallies = run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_tallies(tallies)
    return int(any(sum(t.broken.values()) for t in tallies.values()))


def run(args: Args) -> dict[str, Tally]:
    """Return the tally of each dataset."""
    if args.steps < 1:
        raise ValueError(f"steps is {args.steps}; it must be at least 1")
    check_seed(args.seed, high=MAX_SEED)
    for config in CONFIGS:
        check_envs(args.num_envs, config.max_lots)
    markets = {dataset: load_market(dataset) for dataset in args.dataset}
    each = -(-args.steps // (len(markets) * len(CONFIGS)))
    tallies = dict.fromkeys(markets, NOTHING)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[found]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("steps", total=each * len(markets) * len(CONFIGS), found="")
        for i, config in enumerate(CONFIGS):
            for dataset, market in markets.items():

                def tell(tally: Tally, dataset: str = dataset) -> None:
                    tallies[dataset] += tally
                    broken = sum(sum(t.broken.values()) for t in tallies.values())
                    progress.update(bar, advance=tally.steps, found=f"{broken} broken")

                fuzz(market, config, each, args.num_envs, args.seed * len(CONFIGS) + i, tell)
    return tallies


def print_tallies(tallies: dict[str, Tally]) -> None:
    """Print the table, and each check with its number of failures."""
    console, table, total = Console(), Table(title="random steps"), sum(tallies.values(), NOTHING)
    table.add_column("dataset", overflow="fold", min_width=22)
    for name in ("steps", "episodes", "ruined", "liquidated"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tally in (*tallies.items(), ("all", total)):
        table.add_row(name, *(f"{n:,}" for n in tally[:4]))
    console.print(table)
    for name, count in total.broken.items():
        console.print(f"{'failed ' + format(count, ',') + ' times' if count else 'always'}: {name}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
