"""One simulator state against one twin: what must be equal, and how far money may be apart."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from perpjax.market import Market
from perpjax.params import EnvConfig, EnvParams
from perpjax.reference import Lot, Twin, TwinMarket, TwinParams, step_like
from perpjax.reference.outputs import profit
from perpjax.rules.orders import Verdict
from perpjax.state import EVENTS, SUMS, State

LEVELS = ("side", "quantity", "entry", "stop", "target", "liquidation", "age")
MONEY = SUMS

POSTED = 3e-7
"""How far a posting may differ, relative to the products it is made of: float32 rounds each by 6e-8. A fill that is
one tick off moves more than that."""
MARGIN = 1e-6
"""The same of a margin, from which every funding payment was subtracted in float32."""
CARRIED = 1e-6
"""How far wallet and equity may drift apart over an episode, relative to the largest that the account has
been (what was lost to rounding then stays lost); ten times that over 100 000 bars."""


def twin_market(market: Market) -> TwinMarket:
    """A market of one symbol and one segment for the twin, holding the simulator's float32 values exactly.

    The rows are taken apart here by their layout (`pack_rows`), not by the simulator's own `Market.bar`.
    """
    rows, k, instrument = np.asarray(market.candles, np.float64), market.candles_per_bar, market.instrument
    series = rows[:, : -k - 3].reshape(len(rows), -1, 4, k)  # the last price, then the mark if there is one
    prices = {name: series[:, 0, i] for i, name in enumerate(("open", "high", "low", "close"))}
    prices |= {f"mark_{name}": series[:, -1, i] for i, name in enumerate(tuple(prices))}
    return TwinMarket(
        **prices,
        valid=rows[:, -k - 3 : -3] > 0,
        funding_rate=rows[:, -3],
        funding_price=rows[:, -2],
        atr=np.asarray(market.atr, np.float64),
        features=np.asarray(market.features, np.float64),
        feature_mean=np.asarray(market.scaler_mean, np.float64),
        feature_scale=np.asarray(market.scaler_scale, np.float64),
        tick_value=float(instrument.tick_value),
        min_notional=float(instrument.min_notional),
        max_steps=float(instrument.max_steps),
        maintenance_fee_rate=float(instrument.maintenance_fee_rate),
        brackets=np.asarray(instrument.brackets, np.float64),
        first=int(market.segments.first[0]),
    )


def twin_params(params: EnvParams, config: EnvConfig) -> TwinParams:
    """The same numbers and choices for the twin."""
    numbers = {f.name: np.asarray(getattr(params, f.name)).item() for f in dataclasses.fields(params)}
    return TwinParams(**numbers, **dataclasses.asdict(config))


class Seen:
    """What the simulator did, as plain numbers: states [rows] of one environment."""

    def __init__(self, states: State):
        lots, ledger = states.account.lots, states.account.ledger
        self.levels = np.stack([getattr(lots, name) for name in LEVELS], -1).astype(np.float64).tolist()
        self.margins = lots.margin.astype(np.float64).tolist()
        self.counts = np.stack([getattr(ledger, name) for name in EVENTS], -1).tolist()
        self.refused = ledger.refused.tolist()
        sums = np.stack([getattr(ledger, name) for name in MONEY], -1).astype(np.float64) + np.stack(ledger.low, -1)
        self.wallet = states.account.wallet.astype(np.float64) + states.account.wallet_low
        self.money = np.column_stack([sums, self.wallet]).tolist()
        self.flags = list(zip(*(x.tolist() for x in (states.t, states.terminated, states.truncated)), strict=True))
        self.equity, self.reward, self.obs = (x.astype(np.float64) for x in (states.equity, states.reward, states.obs))


def disagreement(twin: Twin, seen: Seen, row: int, before: "Before") -> str:
    """The first thing in which the twin's last step and one of the simulator's differ, or nothing.

    Args:
      row: of the state after the step; before: `look` at the twin before it.
    """
    told, ledger = twin.state, twin.state.ledger
    levels = [[float(getattr(lot, name)) for name in LEVELS] if lot else [0.0] * len(LEVELS) for lot in told.lots]
    if levels != seen.levels[row]:
        slot = next(i for i, (a, b) in enumerate(zip(levels, seen.levels[row], strict=True)) if a != b)
        return f"slot {slot}, {', '.join(LEVELS)}: {levels[slot]} and {seen.levels[row][slot]}"
    counts = [getattr(ledger, name) for name in EVENTS]
    if counts != seen.counts[row]:
        return f"{', '.join(EVENTS)}: {counts} and {seen.counts[row]}"
    if ledger.refused != seen.refused[row]:
        return f"verdicts: {ledger.refused} and {seen.refused[row]}"
    if (told.t, told.terminated, told.truncated) != seen.flags[row]:
        return f"clock and flags: {(told.t, told.terminated, told.truncated)} and {seen.flags[row]}"
    for lot, margin in zip(told.lots, seen.margins[row], strict=True):
        if lot and abs(lot.margin - margin) > MARGIN * margin_scale(lot, twin):
            return f"margin: {lot.margin} and {margin}"
    moved = [after - then for after, then in zip(read_money(twin), before.money, strict=True)]
    emptied = emptied_margins(twin, before, moved[MONEY.index("funding")])
    for name, own, after, then in zip((*MONEY, "wallet"), moved, seen.money[row], seen.money[row - 1], strict=True):
        # Gains of several exits may cancel: they are taken to be of up to 2 % of what was traded.
        size = abs(own) + 0.02 * moved[MONEY.index("traded_notional")]
        if name in ("fees", "forgiven"):  # an exit's fee may be what its loss has left of the margin
            size += abs(moved[MONEY.index("realised")])
        if name in ("fees", "realised", "forgiven"):
            size += emptied * MARGIN / POSTED
        if name in ("funding", "liquidation_losses", "wallet"):  # they may take all that is left of a margin
            size += before.margins * MARGIN / POSTED + sum(map(abs, moved[:4]))
        if abs(own - (after - then)) > POSTED * size + 1e-10 * twin.params.initial_equity:
            return f"{name}: moved by {own} and {after - then}"
    return ""


class Before(NamedTuple):
    """The twin's money at the start of a step."""

    money: list[float]
    """The ledger's sums and the wallet."""
    margins: float
    """What the lots' margins are rounded against."""
    lots: list[Lot | None]
    """The twin's, which a step of a copy leaves alone."""


def margin_scale(lot: Lot, twin: Twin) -> float:
    """A margin has the rounding of what was posted, however much of it funding has taken since."""
    return max(lot.margin, lot.quantity * lot.entry * twin.market.tick_value / lot.leverage)


def emptied_margins(twin: Twin, before: Before, funding: float) -> float:
    """What the margins are rounded against of the lots whose exit took all that was left of them.

    Their loss, or their fee, is what was left, and so has the rounding of the margin and not only its own.

    Args:
      funding: paid in the step; before its exit a lot had at least its margin of before less that.
    """
    tick_value, size = twin.market.tick_value, 0.0
    for event in twin.state.events:
        lot = before.lots[event[1]] if len(event) == 3 else None  # an exit: how, slot, fill
        if lot:
            fee = twin.params.taker_fee * lot.quantity * event[2] * tick_value
            if profit(lot, event[2], tick_value) - fee <= max(funding, 0.0) - lot.margin:
                size += margin_scale(lot, twin)
    return size


def look(twin: Twin) -> Before:
    """What `disagreement` needs to know of the state before a step."""
    lots = twin.state.lots
    return Before(read_money(twin), sum(margin_scale(lot, twin) for lot in lots if lot), lots)


def read_money(twin: Twin) -> list[float]:
    """The ledger's sums and the wallet."""
    return [*(getattr(twin.state.ledger, name) for name in MONEY), twin.state.wallet]


def take_over(twin: Twin, states: State, seen: Seen) -> None:
    """Put the twin into the first of states [rows], as it is; `seen` holds the same states."""
    ledger = dict(zip(MONEY, seen.money[0], strict=False)) | dict(zip(EVENTS, seen.counts[0], strict=True))
    t, terminated, truncated = seen.flags[0]
    twin.load(
        t=t, end=states.end[0], wallet=seen.wallet[0],
        lots={name: x[0] for name, x in vars(states.account.lots).items()},
        ledger=ledger | {"refused": seen.refused[0]}, terminated=terminated, truncated=truncated,
    )  # fmt: skip
    twin.state.reward = seen.reward[0]


def lead(twin: Twin, seen: Seen, actions: Iterable[np.ndarray]) -> Iterator[str]:
    """Lead the twin from the first of the states in `seen` to the last, or to the end of the episode.

    Args:
      twin: in the first state; actions: [steps, 5].

    Yields:
      After each step the disagreement, or nothing. A disagreement is the last.
    """
    for i, action in enumerate(actions):
        if twin.state.terminated or twin.state.truncated:
            break
        before = look(twin)
        if step_like(twin, action, lambda t, i=i, b=before: not disagreement(t, seen, i + 1, b)):
            yield ""
        else:
            why = disagreement(twin, seen, i + 1, before)
            yield f"{why}; {twin.params}, {twin.state.events}"
            break


def follow(twin: Twin, states: State, actions: np.ndarray) -> tuple[int, float, float, str]:
    """Lead the twin through an episode that the simulator has played.

    Args:
      states: [steps + 1]; actions: [steps, 5].

    Returns:
      Steps, the largest errors of wallet and equity relative to the largest equity so far,
      and the first disagreement, if there was one.
    """
    seen = Seen(states)
    twin.reset(seen.flags[0][0])
    told = [tell(twin)]
    for why in lead(twin, seen, actions):
        if why:
            steps = len(told) - 1
            return steps, 0.0, 0.0, f"bar {seen.flags[steps][0]}: {why}"
        told.append(tell(twin))
    steps = len(told) - 1
    return steps, *compare_numbers(told, seen, twin.params, max(1, steps / 10_000))


def compare_numbers(
    told: list[tuple[float, float, float, np.ndarray]], seen: Seen, params: TwinParams, longer: float = 1.0
) -> tuple[float, float, str]:
    """Wallet, equity, reward and observation of a run of states.

    Args:
      told: the twin's, of as many of the first states in `seen`.
      longer: by how much more than `CARRIED` wallet and equity may be apart.

    Returns:
      The largest errors of wallet and equity relative to the largest equity so far, and what is too far apart.
    """
    n = len(told)
    wallet, equity, reward, obs = (np.array(x) for x in zip(*told, strict=True))
    size = np.maximum.accumulate(np.maximum(np.abs(equity), params.initial_equity))
    wallet_error = np.abs(wallet - seen.wallet[:n]) / size
    equity_error = np.abs(equity - seen.equity[:n]) / size
    # The rewards and the account's numbers are ratios: near ruin they show what float32 loses of the initial equity.
    noise = 1e-6 * (1 + size / np.maximum(equity, 1e-6 * params.initial_equity))
    reward_error = np.abs(reward - seen.reward[:n]) / (1 + np.abs(reward))
    obs_error = (np.abs(obs - seen.obs[:n]) / (1 + np.abs(obs))).max(axis=1)
    for name, error, limit in (
        ("wallet", wallet_error, CARRIED * longer),
        ("equity", equity_error, CARRIED * longer),
        ("reward", reward_error, 2 * np.maximum(noise, np.roll(noise, 1))),
        ("observation", obs_error, 10 * noise),
    ):
        if (error > limit).any():
            i = int((error > limit).argmax())
            why = f"{name} after {i} steps differs by {error[i]:.1e}, relative; {params}"
            return wallet_error.max(), equity_error.max(), why
    return wallet_error.max(), equity_error.max(), ""


def tell(twin: Twin) -> tuple[float, float, float, np.ndarray]:
    """The twin's wallet, equity, reward and observation."""
    s = twin.state
    return s.wallet, s.equity, s.reward, s.obs


def read_events(twin: Twin) -> Counter:
    """Counts of the ledger and of the verdicts."""
    ledger = twin.state.ledger
    verdicts = zip(Verdict, ledger.refused, strict=True)
    return Counter({name: getattr(ledger, name) for name in EVENTS} | {v.name: n for v, n in verdicts})
