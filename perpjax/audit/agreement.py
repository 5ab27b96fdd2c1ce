"""Comparison of one simulator state with one twin: exact for levels and counts, within bounds for money."""

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
from perpjax.state import EVENTS, LOT_FIELDS, SUMS, State

LEVELS = ("side", "quantity", "entry", "stop", "target", "liquidation", "age")
MONEY = SUMS

POSTED = 3e-7
"""Bound on the difference of a posting, relative to its products: float32 rounds each product by 6e-8. A fill one tick
off exceeds the bound."""
MARGIN = 1e-6
"""Bound on the difference of a margin: every funding payment was subtracted from it in float32."""
CARRIED = 1e-6
"""Bound on the drift of wallet and equity over an episode, relative to the largest equity so far. A rounding error is
never recovered. Over 100 000 bars the bound is ten times as large."""


def twin_market(market: Market) -> TwinMarket:
    """Return the twin's market for a market of one symbol and one segment, with the exact float32 values.

    The rows are split here by their layout (`pack_rows`), not by the simulator's own `Market.bar`.
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
        brackets=np.unique(
            np.asarray(instrument.brackets, np.float64), axis=0
        ),  # several symbols: the first may repeat
        first=int(market.segments.first[0]),
    )


def twin_params(params: EnvParams, config: EnvConfig) -> TwinParams:
    """Return the parameters and static choices for the twin."""
    numbers = {f.name: np.asarray(getattr(params, f.name)).item() for f in dataclasses.fields(params)}
    return TwinParams(**numbers, **dataclasses.asdict(config))


class Seen:
    """The simulator's states [rows] of one environment, as plain numbers."""

    def __init__(self, states: State):
        lots, ledger = states.account.lots, states.account.ledger
        self.levels = np.stack([getattr(lots, name) for name in LEVELS], -1).astype(np.float64).tolist()
        self.margins = lots.margin.astype(np.float64).tolist()
        self.counts = np.stack([getattr(ledger, name) for name in EVENTS], -1).tolist()
        self.verdicts = ledger.verdicts.tolist()
        sums = np.stack([getattr(ledger, name) for name in MONEY], -1).astype(np.float64) + np.stack(ledger.low, -1)
        self.wallet = states.account.wallet.astype(np.float64) + states.account.wallet_low
        self.money = np.column_stack([sums, self.wallet]).tolist()
        self.flags = list(zip(*(x.tolist() for x in (states.t, states.terminated, states.truncated)), strict=True))
        self.equity, self.reward, self.obs = (x.astype(np.float64) for x in (states.equity, states.reward, states.obs))


def disagreement(twin: Twin, seen: Seen, row: int, before: "Before") -> str:
    """Return the first difference between the twin's last step and the simulator's, or an empty string.

    Args:
      row: row of the state after the step.
      before: `look` at the twin before the step.
    """
    told, ledger = twin.state, twin.state.ledger
    levels = [[float(getattr(lot, name)) for name in LEVELS] if lot else [0.0] * len(LEVELS) for lot in told.lots]
    if levels != seen.levels[row]:
        slot = next(i for i, (a, b) in enumerate(zip(levels, seen.levels[row], strict=True)) if a != b)
        return f"slot {slot}, {', '.join(LEVELS)}: {levels[slot]} and {seen.levels[row][slot]}"
    counts = [getattr(ledger, name) for name in EVENTS]
    if counts != seen.counts[row]:
        return f"{', '.join(EVENTS)}: {counts} and {seen.counts[row]}"
    if ledger.verdicts != seen.verdicts[row]:
        return f"verdicts: {ledger.verdicts} and {seen.verdicts[row]}"
    if (told.t, told.terminated, told.truncated) != seen.flags[row]:
        return f"clock and flags: {(told.t, told.terminated, told.truncated)} and {seen.flags[row]}"
    for lot, margin in zip(told.lots, seen.margins[row], strict=True):
        if lot and abs(lot.margin - margin) > MARGIN * margin_scale(lot, twin):
            return f"margin: {lot.margin} and {margin}"
    moved = [after - then for after, then in zip(read_money(twin), before.money, strict=True)]
    emptied = emptied_margins(twin, before, moved[MONEY.index("funding")])
    for name, own, after, then in zip((*MONEY, "wallet"), moved, seen.money[row], seen.money[row - 1], strict=True):
        # Gains of several exits may cancel: their size is taken as up to 2 % of the traded notional.
        size = abs(own) + 0.02 * moved[MONEY.index("traded_notional")]
        if name in ("fees", "forgiven"):  # an exit's fee may be the rest of the margin after its loss
            size += abs(moved[MONEY.index("realised")])
        if name in ("fees", "realised", "forgiven"):
            size += emptied * MARGIN / POSTED
        if name in ("funding", "liquidation_losses", "wallet"):  # they may take the rest of a margin
            size += before.margins * MARGIN / POSTED + sum(map(abs, moved[:4]))
        if abs(own - (after - then)) > POSTED * size + 1e-10 * twin.params.initial_equity:
            return f"{name}: moved by {own} and {after - then}"
    return ""


class Before(NamedTuple):
    """The twin's money at the start of a step."""

    money: list[float]
    """The ledger's sums and the wallet."""
    margins: float
    """Scale of the rounding of the lots' margins."""
    lots: list[Lot | None]
    """The twin's lots. A step of a copy of the state does not change them."""


def margin_scale(lot: Lot, twin: Twin) -> float:
    """Return the scale of a margin's rounding: the posted margin, however much funding has taken since."""
    return max(lot.margin, lot.quantity * lot.entry * twin.market.tick_value / lot.leverage)


def emptied_margins(twin: Twin, before: Before, funding: float) -> float:
    """Return the sum of `margin_scale` over the lots that lost their whole remaining margin at an exit.

    Loss or fee of such an exit is the remaining margin. It has the rounding of the margin, not only its own.

    Args:
      funding: paid in the step. At its exit a lot had at least its earlier margin less this amount.
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
    """Record the state before a step, for `disagreement`."""
    lots = twin.state.lots
    return Before(read_money(twin), sum(margin_scale(lot, twin) for lot in lots if lot), lots)


def read_money(twin: Twin) -> list[float]:
    """Return the ledger's sums and the wallet."""
    return [*(getattr(twin.state.ledger, name) for name in MONEY), twin.state.wallet]


def take_over(twin: Twin, states: State, seen: Seen) -> None:
    """Load the first of the states [rows] into the twin; `seen` holds the same states."""
    ledger = dict(zip(MONEY, seen.money[0], strict=False)) | dict(zip(EVENTS, seen.counts[0], strict=True))
    t, terminated, truncated = seen.flags[0]
    twin.load(
        t=t, end=states.end[0], wallet=seen.wallet[0],
        lots={name: getattr(states.account.lots, name)[0] for name in LOT_FIELDS},
        ledger=ledger | {"verdicts": seen.verdicts[0]}, terminated=terminated, truncated=truncated,
    )  # fmt: skip
    twin.state.reward = seen.reward[0]


def lead(twin: Twin, seen: Seen, actions: Iterable[np.ndarray]) -> Iterator[str]:
    """Lead the twin from the first of the states in `seen` to the last, or to the end of the episode.

    Args:
      twin: in the first state.
      actions: [steps, 5].

    Yields:
      The disagreement after each step, or an empty string. Nothing follows a disagreement.
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
      states: [steps + 1].
      actions: [steps, 5].

    Returns:
      The number of steps, the largest errors of wallet and equity relative to the largest equity so far,
      and the first disagreement or an empty string.
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
    """Compare wallet, equity, reward and observation over consecutive states.

    Args:
      told: the twin's numbers, for the first states in `seen`.
      longer: factor on the bound `CARRIED` of wallet and equity.

    Returns:
      The largest errors of wallet and equity relative to the largest equity so far, and the first number out of bounds.
    """
    n = len(told)
    wallet, equity, reward, obs = (np.array(x) for x in zip(*told, strict=True))
    size = np.maximum.accumulate(np.maximum(np.abs(equity), params.initial_equity))
    wallet_error = np.abs(wallet - seen.wallet[:n]) / size
    equity_error = np.abs(equity - seen.equity[:n]) / size
    # Rewards and account numbers are ratios: near ruin they magnify the float32 rounding of the initial equity.
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
    """Return the twin's wallet, equity, reward and observation."""
    s = twin.state
    return s.wallet, s.equity, s.reward, s.obs


def read_events(twin: Twin) -> Counter:
    """Return the counts of the ledger and of the verdicts."""
    ledger = twin.state.ledger
    verdicts = zip(Verdict, ledger.verdicts, strict=True)
    return Counter({name: getattr(ledger, name) for name in EVENTS} | {v.name: n for v, n in verdicts})
