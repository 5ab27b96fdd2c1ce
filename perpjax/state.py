"""The memory of one environment: the account, its lots and its ledger. Arrays only, market data never."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perpjax._arrays import total
from perpjax._describe import format_values, is_concrete
from perpjax._pytree import pytree
from perpjax.rules.orders import Verdict


@pytree(static=("slot_axis",))
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
    slot_axis: int = -1
    """The axis of the slots (static): -2 in the state of a `VecEnv`."""


LOT_FIELDS = ("side", "quantity", "entry", "margin", "leverage", "stop", "target", "liquidation", "age")
"""The arrays of `Lots`."""


@pytree(static=("verdict_axis",))
class Ledger:
    """The sums and counts since reset. Money in quote currency, as compensated (two-float) sums."""

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
    """Cost of exits beyond their lots' margins: the floor of the profit and the cap of the fee."""
    low: tuple[Float[Array, ""], ...]
    """Compensations of the sums above, in the order of `SUMS`."""
    opened: Int[Array, ""]
    """Lots opened."""
    liquidated: Int[Array, ""]
    """Lots liquidated."""
    stopped: Int[Array, ""]
    """Lots ended by their stop."""
    targets: Int[Array, ""]
    """Lots ended by their target."""
    closed: Int[Array, ""]
    """Lots closed by an order."""
    timed_out: Int[Array, ""]
    """Lots held for as long as they may be."""
    ambiguous: Int[Array, ""]
    """Lots that ended in a candle that reached several of their levels, with an open that decided nothing."""
    verdicts: Int[Array, "verdicts"]
    """Orders that met each `Verdict`, HOLD and ACCEPTED included."""
    verdict_axis: int = -1
    """The axis of `verdicts` (static): -2 in the state of a `VecEnv`."""


SUMS = ("fees", "funding", "realised", "liquidation_losses", "traded_notional", "slippage", "gap_losses", "forgiven")
"""The ledger's sums of money."""
EVENTS = ("opened", "liquidated", "stopped", "targets", "closed", "timed_out", "ambiguous")
"""The ledger's counts of lots."""


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
    """The environment at decision t, as `reset` and `step` return it."""

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

    def __repr__(self) -> str:
        name, account = type(self).__name__, self.account
        if account is None or not is_concrete(self.t, self.equity, account.wallet, account.lots.quantity):
            return f"{name} of arrays that have no numbers yet"
        over = np.asarray(self.terminated) | np.asarray(self.truncated)
        held, ledger = (np.asarray(account.lots.quantity) > 0).sum(), account.ledger
        of = f"{np.size(self.t):,} environments" if np.ndim(self.t) else "one environment"
        return (
            f"{name} of {of}: bar {format_values(self.t)}, {over.sum():,} over\n"
            f"  equity {format_values(self.equity)}, wallet {format_values(account.wallet)}, {held:,} lots held\n"
            f"  since reset: {np.sum(ledger.opened):,} lots opened, {np.sum(ledger.liquidated):,} liquidated, "
            f"fees {format_values(ledger.fees)}, funding {format_values(ledger.funding)}"
        )


def open_account(initial_equity: Float[Array, ""], max_lots: int) -> Account:
    """An account that has done nothing yet."""

    def zeros(dtype: jnp.dtype, *shape: int) -> Array:
        return jnp.zeros(shape, dtype)

    lots = Lots(*(zeros(jnp.float32, max_lots) for _ in range(8)), age=zeros(jnp.int32, max_lots))
    ledger = Ledger(
        **{name: zeros(jnp.float32) for name in SUMS},
        low=tuple(zeros(jnp.float32) for _ in SUMS),
        **{name: zeros(jnp.int32) for name in EVENTS},
        verdicts=zeros(jnp.int32, len(Verdict)),
    )
    return Account(jnp.array(initial_equity, jnp.float32), zeros(jnp.float32), lots, ledger)


Money = tuple[Float[Array, "..."], Float[Array, "..."]]
"""A two-float sum: the float32 value and its rounding error."""


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


def post(ledger: Ledger, amounts: dict[str, Float[Array, ""]], counts: dict[str, Int[Array, ""]]) -> Ledger:
    """The ledger after some amounts of money, one for each of `SUMS`, and some counts, one for each of `EVENTS`."""
    sums = {n: add((getattr(ledger, n), low), amounts[n]) for n, low in zip(SUMS, ledger.low, strict=True)}
    return ledger.replace(
        low=tuple(low for _, low in sums.values()),
        **{name: high for name, (high, _) in sums.items()},
        **{name: getattr(ledger, name) + counts[name] for name in EVENTS},
    )


def account_side(lots: Lots) -> Float[Array, ""]:
    """+1, -1, or 0 when flat: an account is never long and short at once."""
    axis = max(lots.slot_axis, -lots.side.ndim)  # under `jax.vmap` one environment of a VecEnv has no other
    return jnp.clip(total(jnp.moveaxis(lots.side, axis, 0)), -1.0, 1.0)


def unrealised(lots: Lots, mark: Float[Array, ""], tick_value: Float[Array, ""]) -> Float[Array, ""]:
    """Profit of all lots at `mark` (ticks), quote currency."""
    return total(gain(lots, mark)) * tick_value


def gain(lots: Lots, mark: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of each lot, in ticks times steps."""
    return lots.side * lots.quantity * (mark - lots.entry)
