"""What one environment remembers: the account, its lots and its ledger. Arrays only, market data never."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import total
from perpjax.orders import Verdict


@pytree
class Lots:
    """Fixed slots of isolated positions; a free slot has quantity 0 and zeros everywhere."""

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


@pytree
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
    low: tuple[Float[Array, ""], ...]
    """Compensations of the five sums above, in their order."""
    opened: Int[Array, ""]
    stopped: Int[Array, ""]
    targets: Int[Array, ""]
    timed_out: Int[Array, ""]
    closed: Int[Array, ""]
    liquidated: Int[Array, ""]
    refused: Int[Array, "verdicts"]
    """Orders that met each verdict of `orders.Verdict`, HOLD and ACCEPTED included."""
    ambiguous: Int[Array, ""]
    """Lots that ended in a candle that reached several of their levels, with an open that decided nothing."""


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
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    empty = jnp.zeros(max_lots, jnp.float32)
    lots = Lots(*[empty] * 8, age=jnp.zeros(max_lots, jnp.int32))
    ledger = Ledger(
        *[zero] * 5,
        low=(zero,) * 5,
        opened=none, stopped=none, targets=none, timed_out=none, closed=none, liquidated=none,
        refused=jnp.zeros(len(Verdict), jnp.int32),
        ambiguous=none,
    )  # fmt: skip
    return Account(jnp.asarray(initial_equity, jnp.float32), zero, lots, ledger)


Money = tuple[Float[Array, "..."], Float[Array, "..."]]
"""A two-float sum: the float32 value and what it leaves out."""


def add(total: Money, *amounts: Float[Array, "..."]) -> Money:
    """Add amounts without losing their low digits (Knuth's TwoSum, renormalised so that the high part is rounded)."""
    high, low = total
    for x in amounts:
        s = high + x
        back = s - high
        low = low + ((high - (s - back)) + (x - back))
        high = s + low
        low = low - (high - s)
    return high, low


def add_each(ledger: Ledger, **amounts: Float[Array, ""]) -> Ledger:
    """Post to the ledger's five sums of money, all named."""
    names = ("fees", "funding", "realised", "liquidation_losses", "traded_notional")
    sums = {n: add((getattr(ledger, n), low), amounts[n]) for n, low in zip(names, ledger.low, strict=True)}
    low = tuple(low for _, low in sums.values())
    return ledger.replace(low=low, **{name: high for name, (high, _) in sums.items()})


def account_side(lots: Lots) -> Float[Array, ""]:
    """+1, -1, or 0 when flat: an account is never long and short at once."""
    return jnp.clip(total(lots.side), -1.0, 1.0)


def unrealised(lots: Lots, mark: Float[Array, ""], tick_value: Float[Array, ""]) -> Float[Array, ""]:
    """Profit of all lots at `mark` (ticks), quote currency."""
    return total(lots.side * lots.quantity * (mark - lots.entry)) * tick_value


def notional(lots: Lots, mark: Float[Array, ""], tick_value: Float[Array, ""]) -> Float[Array, ""]:
    """Value of all lots at `mark` (ticks), quote currency."""
    return total(lots.quantity) * mark * tick_value
