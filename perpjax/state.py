"""What one environment remembers: the account, its lots and its ledger. Arrays only, market data never."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import total
from perpjax.orders import Verdict


@pytree
class Lots:
    """Fixed slots of isolated positions; a free slot has quantity 0 and zeros everywhere.

    In the state of a `VecEnv` every field is [lots, num_envs]: `lots.entry[i]` is slot i of every environment.
    `VecEnv.one(state, i)` is the state of environment i.
    """

    side: Float[Array, "lots"]
    """+1 long, -1 short, 0 free."""
    quantity: Float[Array, "lots"]
    """Whole steps."""
    entry: Float[Array, "lots"]
    """Fill price, ticks."""
    margin: Float[Array, "lots"]
    """Isolated margin, quote; funding is paid from it."""
    leverage: Float[Array, "lots"]
    stop: Float[Array, "lots"]
    """Ticks."""
    target: Float[Array, "lots"]
    """Ticks; filled when the price trades one tick beyond."""
    liquidation: Float[Array, "lots"]
    """First mark price, in ticks, at which margin balance <= maintenance; 0 for a long that has none."""
    age: Int[Array, "lots"]
    """Bars held, the opening bar counted."""


@pytree(static=("counts_axis",))
class Ledger:
    """What happened since reset. Money in quote currency, as compensated (two-float) sums."""

    fees: Float[Array, ""]
    funding: Float[Array, ""]
    """Paid (negative: received)."""
    realised: Float[Array, ""]
    """Profit of all exits but liquidations, before fees."""
    liquidation_losses: Float[Array, ""]
    traded_notional: Float[Array, ""]
    """Entries and exits; a liquidation has no fill and is not counted."""
    slippage: Float[Array, ""]
    """From the price that triggered each market fill to the fill, entries and exits."""
    gap_losses: Float[Array, ""]
    """From each stop to the candle open beyond it."""
    forgiven: Float[Array, ""]
    """What exits would have cost beyond their lots' margins: the floor of the profit and the cap of the fee."""
    low: tuple[Float[Array, ""], ...]
    """Compensations of the sums above, in the order of `SUMS`."""
    counts: Int[Array, "counts"]
    """Verdicts and events, in the order of `COUNTS`; the properties below name them."""
    counts_axis: int = -1
    """The axis of `counts` along which they lie: -2 in a `VecEnv`, where the batch is last."""

    @property
    def refused(self) -> Int[Array, "verdicts"]:
        """Orders that met each verdict of `orders.Verdict`, HOLD and ACCEPTED included."""
        return self._counts_last[..., : len(Verdict)]

    @property
    def opened(self) -> Int[Array, ""]:
        """Lots opened."""
        return self._count("opened")

    @property
    def stopped(self) -> Int[Array, ""]:
        """Lots ended by their stop."""
        return self._count("stopped")

    @property
    def targets(self) -> Int[Array, ""]:
        """Lots ended by their target."""
        return self._count("targets")

    @property
    def timed_out(self) -> Int[Array, ""]:
        """Lots held for as long as they may be."""
        return self._count("timed_out")

    @property
    def closed(self) -> Int[Array, ""]:
        """Lots closed by an order."""
        return self._count("closed")

    @property
    def liquidated(self) -> Int[Array, ""]:
        """Lots liquidated."""
        return self._count("liquidated")

    @property
    def ambiguous(self) -> Int[Array, ""]:
        """Lots that ended in a candle that reached several of their levels, with an open that decided nothing."""
        return self._count("ambiguous")

    def _count(self, name: str) -> Int[Array, ""]:
        return self._counts_last[..., COUNTS.index(name)]

    @property
    def _counts_last(self) -> Int[Array, "counts"]:
        last = self.counts.swapaxes(max(self.counts_axis, -self.counts.ndim), -1)  # one environment's have no other
        if last.shape[-1] != len(COUNTS):  # not noticed if there are as many environments
            raise ValueError(
                f"the ledger's counts have shape {self.counts.shape} and should lie along axis {self.counts_axis}; "
                "before the state of a VecEnv is taken apart by environments it takes VecEnv.by_row"
            )
        return last


SUMS = ("fees", "funding", "realised", "liquidation_losses", "traded_notional", "slippage", "gap_losses", "forgiven")
"""The ledger's sums of money."""
EVENTS = ("opened", "liquidated", "stopped", "targets", "closed", "timed_out", "ambiguous")
"""What can become of a lot, by its name in the ledger."""
COUNTS = (*Verdict, *EVENTS)
"""What `Ledger.counts` counts: what became of every order, then of every lot."""


@pytree
class Account:
    """One isolated-margin account in quote currency."""

    wallet: Float[Array, ""]
    """The whole balance, margins included."""
    wallet_low: Float[Array, ""]
    """Compensation: the balance is `wallet + wallet_low`."""
    lots: Lots
    ledger: Ledger


@pytree
class State:
    """The environment at decision t; what `reset` and `step` return."""

    t: Int[Array, ""]
    """The next bar to trade."""
    obs: Float[Array, "observation"]
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]
    equity: Float[Array, ""]
    """Wallet plus unrealised profit at the mark close of bar t - 1, quote."""
    account: Account
    key: Array
    end: Int[Array, ""]
    """The episode is truncated when t reaches this bar."""
    instrument: Int[Array, ""]
    """Row of `Market.instruments`."""


def open_account(initial_equity: Float[Array, ""], max_lots: int) -> Account:
    """An account that has done nothing yet."""

    def zeros(count: int, shape: tuple[int, ...] = ()) -> list[Array]:
        return [jnp.zeros(shape, jnp.float32) for _ in range(count)]

    lots = Lots(*zeros(8, (max_lots,)), age=jnp.zeros(max_lots, jnp.int32))
    sums, low = zeros(len(SUMS)), tuple(zeros(len(SUMS)))
    ledger = Ledger(*sums, low=low, counts=jnp.zeros(len(COUNTS), jnp.int32))
    return Account(jnp.array(initial_equity, jnp.float32), *zeros(1), lots, ledger)


Money = tuple[Float[Array, "..."], Float[Array, "..."]]
"""A two-float sum: the float32 value and what it leaves out."""


def add(total: Money, *amounts: Float[Array, "..."]) -> Money:
    """Add amounts without losing their low digits (Knuth's TwoSum, renormalised so that the high part is rounded)."""
    high, low = total
    for x in amounts:
        s = high + x
        back = s - high
        low = low + ((high - (s - back)) + (x - back))
        high = s
    s = high + low
    return s, low - (s - high)


def add_each(ledger: Ledger, **amounts: Float[Array, ""]) -> Ledger:
    """Post to the ledger's sums of money, all named."""
    sums = {n: add((getattr(ledger, n), low), amounts[n]) for n, low in zip(SUMS, ledger.low, strict=True)}
    low = tuple(low for _, low in sums.values())
    return ledger.replace(low=low, **{name: high for name, (high, _) in sums.items()})


class Holdings(NamedTuple):
    """What an account holds, summed over its lots."""

    margin: Float[Array, "..."]
    """Quote."""
    quantity: Float[Array, "..."]
    """Steps."""
    floating: Float[Array, "..."]
    """Unrealised profit: quote, but ticks times steps while lots are added up."""
    oldest: Int[Array, "..."]
    """Bars."""
    brink: Float[Array, "..."]
    """The nearest liquidation price times the side, ticks; -inf when no lot has one."""
    count: Int[Array, "..."] | None = None
    """None while lots are added up: they are counted with what became of the others."""
    side: Float[Array, "..."] | None = None
    """+1, -1, or 0 when flat: an account is never long and short at once. None while lots are added up."""

    @classmethod
    def of(cls, lot: Lots, mark: Float[Array, "..."]) -> "Holdings":
        """One lot at `mark`, in ticks; nothing if its slot is free."""
        brink = jnp.where(lot.liquidation > 0, lot.side * lot.liquidation, -jnp.inf)
        return cls(lot.margin, lot.quantity, gain(lot, mark), lot.age, brink)

    def plus(self, other: "Holdings") -> "Holdings":
        """Both, of one account."""
        added = jax.tree.map(jnp.add, self, other)
        return added._replace(oldest=jnp.maximum(self.oldest, other.oldest), brink=jnp.maximum(self.brink, other.brink))


def account_side(lots: Lots) -> Float[Array, ""]:
    """+1, -1, or 0 when flat: an account is never long and short at once."""
    return jnp.clip(total(lots.side), -1.0, 1.0)


def unrealised(lots: Lots, mark: Float[Array, ""], tick_value: Float[Array, ""]) -> Float[Array, ""]:
    """Profit of all lots at `mark` (ticks), quote currency."""
    return total(gain(lots, mark)) * tick_value


def gain(lots: Lots, mark: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of each lot, in ticks times steps."""
    return lots.side * lots.quantity * (mark - lots.entry)
