"""The float64 twin of the simulator: the rules of docs/semantics.md, one by one, in plain Python.

It shares no code with the simulator. Read it beside the contract. Every rounding and money threshold
goes through `self.ties` (see `ties.py`). Price levels are whole ticks and compare exactly.

Events of a step, in the order they happen (within a candle by slot):
  ("verdict", name), ("opened", slot, entry, quantity), ("closed", slot, fill), ("stopped", slot, fill),
  ("target", slot, fill), ("timed_out", slot, fill), ("liquidated", slot), ("ambiguous", slot).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from perpjax.reference.actions import decode
from perpjax.reference.outputs import observe, profit, reward
from perpjax.reference.records import (
    CLOSE,
    HOLD,
    LONG,
    Exit,
    Ledger,
    Lot,
    Order,
    TwinMarket,
    TwinParams,
    TwinState,
    Verdict,
)
from perpjax.reference.ties import Ties


class Twin:
    """One environment. `reset`, `step` and `load` change `state` in place and return it.

    `ties` holds the near-ties of the last step. `near_ties` and `flipped_ties` count since construction.
    """

    def __init__(self, market: TwinMarket, params: TwinParams):
        self.market, self.params = market, params
        self.ties = Ties()
        self.near_ties = self.flipped_ties = 0
        self.state: TwinState

    def reset(self, start: int) -> TwinState:
        """Start at decision bar `start`.

        Raises:
          ValueError: `start` is outside first .. N - 1.
        """
        m, p = self.market, self.params
        if not m.first <= start < m.bars:
            raise ValueError(f"start {start} is outside {m.first} .. {m.bars - 1}")
        end = min(start + p.episode_length, m.bars)
        slots: list[Lot | None] = [None] * p.max_lots
        self.state = TwinState(start, end, p.initial_equity, slots, Ledger(), p.initial_equity, p.initial_equity)
        self.state.obs = observe(self.state, m, p)
        return self.state

    def load(
        self, *, t: int, end: int, wallet: float, lots: Mapping[str, Any],
        ledger: Mapping[str, Any] | None = None, terminated: bool = False, truncated: bool = False,
    ) -> TwinState:  # fmt: skip
        """Load a given state at decision t.

        Args:
          t, end: bars.
          wallet: quote, the whole compensated sum (wallet + wallet_low).
          lots: the fields of `Lot` by name, each [max_lots]. A slot of quantity 0 is free.
          ledger: the entries of `Ledger` by name, `verdicts` as a sequence. None: all 0.
        """
        names = [name for name in Lot.__dataclass_fields__ if name != "settlements"]
        kinds = {name: int if name in ("side", "age") else float for name in names}
        slots: list[Lot | None] = [
            Lot(**{name: kinds[name](lots[name][i]) for name in names}) if lots["quantity"][i] != 0 else None
            for i in range(self.params.max_lots)
        ]
        entries = {name: np.asarray(x, np.float64).tolist() for name, x in (ledger or {}).items()}
        self.state = TwinState(int(t), int(end), float(wallet), slots, Ledger(**entries), 0.0, float(wallet))
        self.state.equity = self.state.wallet + self._unrealised(self._mark_before(t))
        self.state.terminated, self.state.truncated = bool(terminated), bool(truncated)
        self.state.obs = observe(self.state, self.market, self.params)
        return self.state

    def step(self, action: Any, forced: Mapping[int, float] | None = None) -> TwinState:
        """Play one bar, from decision t to decision t + 1.

        Args:
          action: box5 [5] floats, multi_discrete [5] integers, or an `Order`.
          forced: near-ties to decide as the simulator did, see `Ties`.
        """
        s, p, m = self.state, self.params, self.market
        self.ties, s.events, s.exits = Ties(forced), [], []
        if s.terminated or s.truncated:  # absorbing
            s.reward = 0.0
            return s
        t, before, equity_before = s.t, s.ledger.copy(), s.equity
        order = decode(action, p, [lot for _, lot in self._held()], self.ties)  # lots at decision time

        self._settle_funding()  # 1
        self._check_opening()  # 2
        verdict = self._trade(order)  # 3, 4, 5, 6
        s.ledger.verdicts[verdict] += 1
        s.events.append(("verdict", verdict.name))
        for k in range(m.candles):  # 7
            if m.valid[t, k]:
                self._run_candle(k)
        self._time_out()  # 8; every exit is rule 9

        mark = float(m.mark_close[t, -1])  # 10
        s.equity = s.wallet + self._unrealised(mark)
        s.largest = max(s.largest, s.wallet)
        gross = s.largest + sum(abs(self._profit(lot, mark)) for _, lot in self._held())
        ruin = p.ruin_fraction * p.initial_equity  # 11
        s.terminated = self.ties.at_most("equity <= ruin", s.equity, ruin, gross)
        s.truncated = not s.terminated and t + 1 == s.end
        s.reward = reward(s, m, p, equity_before, before)
        s.t = t + 1
        s.obs = observe(s, m, p)
        self.near_ties += self.ties.count
        self.flipped_ties += self.ties.flipped
        return s

    def liquidation_value(self) -> float:
        """Rule 10: return the wallet after closing every lot as rule 8 would at the last valid close of that bar."""
        p, m, t, worth = self.params, self.market, self.state.t - 1, self.state.wallet
        close = float(m.close[t, -1])  # an invalid candle repeats the last valid one
        slip = math.ceil(p.slippage_base * close + p.slippage_atr * float(m.atr[t]))
        for _, lot in self._held():
            gain, fee, _ = self._realise(lot, max(close - lot.side * slip, 1.0))
            worth += gain - fee
        return worth

    # Rules 1 to 6: the open of the bar

    def _settle_funding(self) -> None:
        """Rule 1."""
        s, m = self.state, self.market
        rate, price = float(m.funding_rate[s.t]), float(m.funding_price[s.t])
        if rate == 0:
            return
        for _, lot in self._held():
            payment = min(lot.side * lot.quantity * price * m.tick_value * rate, lot.margin)
            s.wallet -= payment
            lot.margin -= payment
            lot.settlements += 1
            s.ledger.funding += payment
            lot.liquidation = self._liquidation_price(lot)

    def _check_opening(self) -> None:
        """Rule 2."""
        s, m = self.state, self.market
        if not m.valid[s.t, 0]:
            return
        for slot, lot in self._held():
            if at_or_past_liquidation(lot, m.mark_open[s.t, 0]):
                self._liquidate(slot, lot, 0)

    def _trade(self, order: Order) -> Verdict:
        """Rules 3 to 5: return the first verdict that holds, and carry out an accepted order."""
        s, p, m = self.state, self.params, self.market
        d, lots = order.direction, [lot for _, lot in self._held()]
        if d == HOLD:
            return Verdict.HOLD
        if not m.valid[s.t, 0]:
            return Verdict.DATA_GAP
        open_ = float(m.open[s.t, 0])
        if d == CLOSE:  # HOLD without a lot to close: `lots` is the list before closing
            for slot, lot in self._held():
                if not self._end_at_open(slot, lot, 0):  # resting orders come first
                    self._exit_at_market("closed", slot, lot, 0, open_)
            return Verdict.ACCEPTED if lots else Verdict.HOLD
        if len(lots) == p.max_lots:
            return Verdict.MAX_LOTS
        if any(lot.side == -d for lot in lots):
            return Verdict.NO_HEDGE

        mark, posted = self._mark_before(s.t), sum(lot.margin for lot in lots)
        equity = s.wallet + self._unrealised(mark)
        available = p.max_exposure * equity - posted
        # The size of the terms that cancel in `available`, for near-ties only. The wallet is a sum itself.
        gross = p.max_exposure * (s.largest + sum(abs(self._profit(lot, mark)) for lot in lots))
        if self.ties.at_most("available <= 0", p.max_exposure * equity, posted, gross):
            return Verdict.MAX_EXPOSURE
        if self.ties.at_most("wallet <= sum(margin)", s.wallet, posted, s.largest):
            return Verdict.MAX_EXPOSURE

        leverage = min(max(order.leverage, 1.0), p.max_leverage)
        requested = order.size * available * leverage
        scale = order.size * gross * leverage
        for bracket in m.table:  # the bracket (floor, cap] that holds the requested notional
            if self.ties.at_most("requested notional <= cap", requested, bracket.cap, scale):
                leverage = min(leverage, bracket.max_leverage)
                break
        else:
            return Verdict.MAX_NOTIONAL
        stop_multiple = min(max(order.stop_multiple, 0.5), 3.0)
        target_multiple = max(min(max(order.target_multiple, 0.5), 6.0), stop_multiple)
        by_exposure = order.size * available
        by_free_money = (s.wallet - posted) / (1 + leverage * p.taker_fee)
        margin = min(by_exposure, by_free_money)
        margin_scale = order.size * gross if by_exposure <= by_free_money else s.largest

        # Rule 5
        slip = self._slip(open_)
        entry = max(open_ + d * slip, 1.0)
        step_value = max(open_ + d * self._slip(open_, "size"), 1.0) * m.tick_value
        steps_scale = margin_scale * leverage / step_value
        steps = margin * leverage / step_value
        steps += min(steps * 2.0**-22, 0.5)  # a whole quotient stays whole
        quantity = min(self.ties.floor("quantity", steps, steps_scale), m.max_steps)
        notional = quantity * step_value
        if quantity < 1 or not self.ties.at_most("min_notional <= notional", m.min_notional, notional):
            return Verdict.BELOW_MINIMUM
        atr = float(m.atr[s.t])
        stop_distance = max(slip + 1, self.ties.round("stop distance", stop_multiple * atr))
        target_distance = max(stop_distance, self.ties.round("target distance", target_multiple * atr))
        base = max(open_ + d * self._slip(open_, "levels"), 1.0)
        lot = Lot(
            side=d,
            quantity=quantity,
            entry=entry,
            margin=notional / leverage,
            leverage=leverage,
            stop=base - d * stop_distance,
            target=base + d * target_distance,
        )
        lot.liquidation = self._liquidation_price(lot)
        if at_or_past_liquidation(lot, m.mark_open[s.t, 0]):
            return Verdict.IMMEDIATE_LIQUIDATION
        slot = s.lots.index(None)  # the lowest free one
        s.lots[slot] = lot
        fee = p.taker_fee * notional
        s.wallet -= fee
        s.ledger.fees += fee
        s.ledger.traded_notional += notional
        s.ledger.slippage += d * quantity * (entry - open_) * m.tick_value
        s.ledger.opened += 1
        s.events.append(("opened", slot, entry, quantity))
        return Verdict.ACCEPTED

    def _liquidation_price(self, lot: Lot) -> float:
        """Rule 6: return L in ticks, 0 if there is none."""
        d, E, M, f = lot.side, lot.entry, lot.margin, self.market.maintenance_fee_rate
        distance, scale = math.inf, 0.0
        for bracket in self.market.table:
            m, cum = bracket.rate, bracket.amount
            cushion = (M + cum) / (lot.quantity * self.market.tick_value)
            distance_b = (cushion - (m + f) * E) / (1 - d * (m + f))
            if distance_b < distance:
                # A margin keeps the rounding of its first value, however much funding has taken since.
                terms = max(cushion, E / lot.leverage, (m + f) * E)
                distance, scale = distance_b, terms / (1 - d * (m + f))
        scale *= 1 + lot.settlements / 16  # 2^-20 covers sixteen roundings of a margin
        level = E - d * self.ties.ceil("liquidation distance", distance - E * 2.0**-22, scale)
        return max(level, 0.0) if d == LONG else level

    # Rules 7 to 9: the candles of the bar

    def _run_candle(self, k: int) -> None:
        """Rule 7, the valid candle k."""
        s, p, m = self.state, self.params, self.market
        for slot, lot in self._held():
            if self._end_at_open(slot, lot, k):
                continue
            d = lot.side
            adverse, favourable = self._extremes(d, k)
            mark_worst = (m.mark_low if d == LONG else m.mark_high)[s.t, k]
            reached = set()
            if at_or_past_liquidation(lot, mark_worst):
                reached.add("liquidated")
            if at_or_past(adverse, lot.stop, d):
                reached.add("stopped")
            if d * (favourable - lot.target) >= 1:  # one tick beyond it
                reached.add("target")
            if not reached:
                continue
            if len(reached) >= 2:
                s.ledger.ambiguous += 1
                s.events.append(("ambiguous", slot))
            self._end(next(level for level in precedence(p.intrabar, lot) if level in reached), slot, lot, k)

    def _end_at_open(self, slot: int, lot: Lot, k: int) -> bool:
        """End the lot if the open of candle k reaches one of its levels: L, then the stop, then the target."""
        s, m = self.state, self.market
        open_ = float(m.open[s.t, k])
        if at_or_past_liquidation(lot, m.mark_open[s.t, k]):
            self._end("liquidated", slot, lot, k)
        elif at_or_past(open_, lot.stop, lot.side):
            self._end("stopped", slot, lot, k)
        elif lot.side * (open_ - lot.target) >= 1:
            self._end("target", slot, lot, k)
        else:
            return False
        return True

    def _end(self, level: str, slot: int, lot: Lot, k: int) -> None:
        """The fills of rule 7."""
        if level == "liquidated":
            self._liquidate(slot, lot, k)
        elif level == "target":
            self._exit("target", slot, lot, k, lot.target, lot.target)
        else:
            open_ = float(self.market.open[self.state.t, k])
            x = min(lot.stop, open_) if lot.side == LONG else max(lot.stop, open_)
            adverse, _ = self._extremes(lot.side, k)
            depth = self.ties.ceil("stop depth", self.params.stop_depth * abs(x - adverse))
            self._exit("stopped", slot, lot, k, x, x - lot.side * (self._slip(x) + depth))

    def _time_out(self) -> None:
        """Rule 8."""
        s, m = self.state, self.market
        valid = [k for k in range(m.candles) if m.valid[s.t, k]]
        for slot, lot in self._held():
            lot.age += 1
            if lot.age >= self.params.max_hold and valid:
                self._exit_at_market("timed_out", slot, lot, valid[-1], float(m.close[s.t, valid[-1]]))

    def _exit_at_market(self, how: str, slot: int, lot: Lot, candle: int, price: float) -> None:
        self._exit(how, slot, lot, candle, price, price - lot.side * self._slip(price))

    def _exit(self, how: str, slot: int, lot: Lot, candle: int, trigger: float, fill: float) -> None:
        """Rule 9, for `how` closed, stopped, target or timed_out. The trigger is the price before any slippage."""
        s, ledger, tick_value = self.state, self.state.ledger, self.market.tick_value
        fill = max(fill, 1.0)
        notional = lot.quantity * fill * tick_value
        gain, fee, forgiven = self._realise(lot, fill)
        slippage = lot.side * lot.quantity * (trigger - fill) * tick_value
        gap_loss = lot.side * lot.quantity * (lot.stop - trigger) * tick_value if how == "stopped" else 0.0
        s.wallet += gain - fee
        ledger.realised += gain
        ledger.fees += fee
        ledger.traded_notional += notional
        ledger.slippage += slippage
        ledger.gap_losses += gap_loss
        ledger.forgiven += forgiven
        counter = "targets" if how == "target" else how
        setattr(ledger, counter, getattr(ledger, counter) + 1)
        s.lots[slot] = None
        s.events.append((how, slot, fill))
        s.exits.append(Exit(how, slot, lot, candle, fill, gain, fee, slippage, gap_loss, forgiven))

    def _realise(self, lot: Lot, fill: float) -> tuple[float, float, float]:
        """Return profit and fee of an exit at `fill`, and the money saved by the floor at -M and the fee's cap."""
        profit = self._profit(lot, fill)
        gain = max(profit, -lot.margin)
        full_fee = self.params.taker_fee * lot.quantity * fill * self.market.tick_value
        fee = min(full_fee, lot.margin + gain)
        return gain, fee, (gain - profit) + (full_fee - fee)

    def _liquidate(self, slot: int, lot: Lot, candle: int) -> None:
        """End a lot at the cost of the rest of M, once. There is no fee and no fill, so nothing is traded.

        The exit is at L, or at the bankruptcy price if that is nearer to the entry. The margin left there is forfeited.
        """
        s, price = self.state, lot.liquidation
        forfeited = lot.margin + self._profit(lot, price)
        if forfeited < 0:
            price = lot.entry - lot.side * lot.margin / (lot.quantity * self.market.tick_value)
            forfeited = 0.0
        s.wallet -= lot.margin
        s.ledger.liquidation_losses += lot.margin
        s.ledger.forfeited += forfeited
        s.ledger.liquidated += 1
        s.lots[slot] = None
        s.events.append(("liquidated", slot))
        s.exits.append(Exit("liquidated", slot, lot, candle, price, forfeited=forfeited))

    # Shared by the rules

    def _extremes(self, d: int, k: int) -> tuple[float, float]:
        """Return the adverse and the favourable extreme of candle k for a lot of side d."""
        low, high = (float(x[self.state.t, k]) for x in (self.market.low, self.market.high))
        return (low, high) if d == LONG else (high, low)

    def _held(self) -> list[tuple[int, Lot]]:
        """Return (slot, lot) of every open lot, as a new list: lots may end during a loop over it."""
        return [(slot, lot) for slot, lot in enumerate(self.state.lots) if lot is not None]

    def _slip(self, price: float, use: str = "") -> float:
        """Return `slip(p)`, ticks; `use` as in `Ties`."""
        p, atr = self.params, float(self.market.atr[self.state.t])
        return self.ties.ceil("slip", p.slippage_base * price + p.slippage_atr * atr, use=use)

    def _mark_before(self, t: int) -> float:
        return float(self.market.mark_close[t - 1, -1])

    def _profit(self, lot: Lot, price: float) -> float:
        return profit(lot, price, self.market.tick_value)

    def _unrealised(self, mark: float) -> float:
        return sum(self._profit(lot, mark) for _, lot in self._held())


def at_or_past(price: float, level: float, d: int) -> bool:
    """Return whether a price is on an adverse level or beyond it: below for a long, above for a short."""
    return bool(d * price <= d * level)


def at_or_past_liquidation(lot: Lot, mark: float) -> bool:
    return lot.liquidation > 0 and at_or_past(float(mark), lot.liquidation, lot.side)


def precedence(rule: str, lot: Lot) -> tuple[str, str, str]:
    """Return the order of a lot's levels in a candle with an open that reaches none of them (rule 7)."""
    if rule == "optimistic":
        return "target", "stopped", "liquidated"
    stop_not_beyond = lot.side * (lot.stop - lot.liquidation) >= 0  # equal counts as not beyond
    if rule == "nearest" and stop_not_beyond:
        return "stopped", "liquidated", "target"
    return "liquidated", "stopped", "target"
