"""The environment. `step` reads like the contract: funding, opening check, orders, candles, mark, reward."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perpjax._batching import cond_any
from perpjax._pytree import pytree
from perpjax.execution import fill_exit, fill_stop
from perpjax.instrument import Instrument
from perpjax.intrabar import Exit, Hit, resolve
from perpjax.margin import funding_payment, liquidation_ticks
from perpjax.market import Bar, Market, draw_start, find_segment
from perpjax.observation import ACCOUNT_FEATURES, account_side, notional, observe_account, scale_features, unrealised
from perpjax.orders import CLOSE, decode
from perpjax.params import EnvConfig, EnvParams
from perpjax.rewards import log_return, shaped
from perpjax.risk import Exposure, Review, Verdict, review
from perpjax.state import Account, Lots, State, add, add_each, open_account


@pytree(static=("config",))
class PerpEnv:
    """Perpetual futures, one account, 15-minute decisions. A pytree: pass it to `jit` as an argument.

    Attributes:
      market: what is traded, on the device.
      params: numbers; `vmap` may vary them.
      config: static choices.

    Raises:
      ValueError: if the market has no room for one episode.
    """

    market: Market
    params: EnvParams = dataclasses.field(default_factory=EnvParams)
    config: EnvConfig = dataclasses.field(default_factory=EnvConfig)

    def __post_init__(self):
        segments, length = self.market.segments, self.config.episode_length
        if isinstance(segments.first, jax.core.Tracer) or self.market.num_starts(length):
            return
        spans = ", ".join(f"{a} .. {b}" for a, b in zip(segments.first.tolist(), segments.last.tolist(), strict=True))
        raise ValueError(
            f"the market is too short for an episode of {length} bars: the bars that may be traded are {spans}; "
            "use more data or a shorter episode_length"
        )

    @property
    def observation_size(self) -> int:
        """Length of `State.obs`."""
        return self.market.features.shape[-1] + len(ACCOUNT_FEATURES)

    def step(self, state: State, action: Array) -> State:
        """Trade at the open of bar t, live through its candles, and return the state at decision t + 1.

        Args:
          action: [5], see `orders.decode`; vmap for a batch.

        Returns:
          The next state. A terminated or truncated one is absorbing: it comes back unchanged, reward 0.
        """
        params, config = self.params, self.config
        bar, atr = self.market.bar(state.t), self.market.atr[state.t]
        instrument = self.market.instrument_at(state.instrument)
        tick_value = instrument.tick_value
        lots, ledger = state.account.lots, state.account.ledger
        order = decode(action, params, config)
        if config.opposite == "close" and config.actions == "box5":
            against = order.direction * account_side(lots) < 0
            order = order._replace(direction=jnp.where(against, CLOSE, order.direction))
        carried = unrealised(lots, bar.mark_before, tick_value)

        # 1. Funding. 2. Opening check: what the mark has already reached is gone before any order is looked at.
        at_open = jnp.any(bar.valid[0] & reached_by(bar.mark_open[0], lots))
        settles = (bar.funding_rate != 0) & (lots.quantity[0] >= 0)
        lots, opening = cond_any(
            settles | at_open, _open_bar, lambda lots, *_: (lots, Opening.nothing()), lots, bar, instrument
        )
        wallet = add((state.account.wallet, state.account.wallet_low), -opening.funding, -opening.losses)

        # 3. to 6. The order: reviewed, then closed or opened.
        side = account_side(lots)
        exposure = Exposure(
            lots=_count(lots.quantity > 0),
            slots=config.max_lots,
            side=side,
            wallet=wallet[0],
            equity=wallet[0] + unrealised(lots, bar.mark_before, tick_value),
            margin=jnp.sum(lots.margin),
        )
        verdict = review(order, exposure, bar.open[0], bar.valid[0], atr, instrument, params)
        lots = cond_any(verdict.opens, _open_lot, lambda lots, *_: lots, lots, verdict, instrument)
        entry_fee = jnp.where(verdict.opens, params.taker_fee * verdict.notional, 0)

        # 7. Candles. 8. Timeout.
        hit = cond_any(
            (exposure.lots > 0) | verdict.opens,
            functools.partial(resolve, rule=config.intrabar),
            lambda bar, lots, side: Hit.nothing(lots, bar),
            bar, lots, jnp.where(verdict.opens, verdict.side, side),
        )
        held = lots.quantity > 0
        lots = lots.replace(age=lots.age + held)
        due = held & (lots.age >= params.max_hold) & jnp.any(bar.valid)
        how = jnp.where(verdict.closes & held, Exit.CLOSED, hit.how)
        how = jnp.where((how == Exit.NONE) & due, Exit.TIMED_OUT, how)

        # 9. Exits.
        lots, exits = cond_any(jnp.any(how > 0), _settle, lambda lots, *_: (lots, Exits.nothing()), lots, how, hit.candle, bar, atr, tick_value, params)
        wallet = add(wallet, -entry_fee, exits.realised, -exits.fees, -exits.losses)

        # 10. Mark to market.
        mark = bar.mark_close[-1]
        floating = unrealised(lots, mark, tick_value)
        equity = wallet[0] + floating

        # 11. Reward and flags.
        t = state.t + 1
        posted = exits.realised - exits.fees - exits.losses - entry_fee - opening.funding - opening.losses
        terminated = equity <= params.ruin_fraction * params.initial_equity
        liquidated = opening.liquidated + exits.counts[Exit.LIQUIDATED]
        reward = log_return(posted + (floating - carried), state.equity, equity, params)
        if config.reward == "shaped":
            base = jnp.maximum(equity, 1e-6 * params.initial_equity)
            risk = notional(lots, mark, tick_value) / base * self.market.atr[t] / bar.close[-1]
            reward = shaped(reward, verdict.opens, liquidated, risk, terminated, params)

        ledger = add_each(
            ledger,
            fees=entry_fee + exits.fees,
            funding=opening.funding,
            realised=exits.realised,
            liquidation_losses=opening.losses + exits.losses,
            traded_notional=jnp.where(verdict.opens, verdict.notional, 0) + exits.notional,
        ).replace(
            opened=ledger.opened + verdict.opens,
            stopped=ledger.stopped + exits.counts[Exit.STOPPED],
            targets=ledger.targets + exits.counts[Exit.TARGET],
            timed_out=ledger.timed_out + exits.counts[Exit.TIMED_OUT],
            closed=ledger.closed + exits.counts[Exit.CLOSED],
            liquidated=ledger.liquidated + liquidated,
            refused=ledger.refused + (jnp.arange(len(Verdict)) == verdict.verdict),
            ambiguous=ledger.ambiguous + jnp.sum(jnp.where(how == hit.how, hit.ambiguous, 0)),
        )
        new = state.replace(
            t=t,
            obs=self.observe(t, observe_account(lots, equity, mark, tick_value, params)),
            reward=reward,
            terminated=terminated,
            truncated=~terminated & (t >= state.end),
            equity=equity,
            account=Account(*wallet, lots, ledger),
        )
        over = state.terminated | state.truncated
        absorbed = state.replace(reward=jnp.zeros_like(state.reward))
        return jax.tree.map(lambda old, x: jnp.where(over, old, x), absorbed, new)

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> State:
        """A fresh account at the open of a first bar.

        Args:
          key: draws the first bar, uniform over all that leave room for a whole episode.
          start: the first bar, instead. Outside the tradable bars it is an error if concrete, clipped if traced.
        """
        key, draw = jax.random.split(key)
        if start is None:
            t, segment = draw_start(self.market, draw, self.config.episode_length)
        else:
            t, segment = find_segment(self.market, jnp.asarray(start, jnp.int32))
            if not isinstance(t, jax.core.Tracer) and int(t) != int(start):
                raise ValueError(f"start = {int(start)} is not a bar that may be traded; the nearest is {int(t)}")
        row = self.market.segments.instrument[segment]
        account = open_account(self.params.initial_equity, self.config.max_lots)
        no, equity = jnp.zeros((), bool), account.wallet
        tick_value = self.market.instrument_at(row).tick_value
        return State(
            t=t,
            obs=self.observe(t, observe_account(account.lots, equity, jnp.ones_like(equity), tick_value, self.params)),
            reward=jnp.zeros((), jnp.float32),
            terminated=no,
            truncated=no,
            equity=equity,
            account=account,
            key=key,
            end=jnp.minimum(t + self.config.episode_length, self.market.segments.last[segment] + 1),
            instrument=row,
        )

    def observe(self, t: Int[Array, ""], view: Float[Array, "9"]) -> Float[Array, "observation"]:
        """What is known at the open of bar t: scaled features, then the account."""
        features = scale_features(self.market.features[t], self.market.scaler_mean, self.market.scaler_scale)
        return jnp.concatenate([features, view])


class Opening(NamedTuple):
    """What the opening of a bar took from the account, quote."""

    funding: Float[Array, ""]
    losses: Float[Array, ""]
    liquidated: Int[Array, ""]

    @classmethod
    def nothing(cls):
        return cls(jnp.float32(0), jnp.float32(0), jnp.int32(0))


class Exits(NamedTuple):
    realised: Float[Array, ""]
    fees: Float[Array, ""]
    losses: Float[Array, ""]
    notional: Float[Array, ""]
    counts: Int[Array, "exits"]

    @classmethod
    def nothing(cls):
        return cls(*[jnp.float32(0)] * 4, jnp.zeros(len(Exit), jnp.int32))


def _open_bar(lots: Lots, bar: Bar, instrument: Instrument) -> tuple[Lots, Opening]:
    paid = funding_payment(
        lots.side, lots.quantity, lots.margin, bar.funding_price, bar.funding_rate, instrument.tick_value
    )
    margin = lots.margin - paid
    moved = liquidation_ticks(lots.side, lots.entry, jnp.maximum(lots.quantity, 1), margin, instrument)
    settles = (bar.funding_rate != 0) & (lots.quantity > 0)
    lots = lots.replace(margin=margin, liquidation=jnp.where(settles, moved, lots.liquidation))
    gone = bar.valid[0] & reached_by(bar.mark_open[0], lots)
    opening = Opening(jnp.sum(paid), jnp.sum(jnp.where(gone, lots.margin, 0)), _count(gone))
    return cond_any(jnp.any(gone), _clear, lambda lots, _: lots, lots, gone), opening


def reached_by(mark, lots):
    return (lots.liquidation > 0) & (lots.side * (mark - lots.liquidation) <= 0)


def _open_lot(lots: Lots, order: Review, instrument: Instrument) -> Lots:
    """Put an accepted order in the lowest free slot."""
    liquidation = liquidation_ticks(order.side, order.entry, order.quantity, order.margin, instrument)
    here = jnp.arange(lots.quantity.shape[0]) == jnp.argmax(lots.quantity == 0)
    lot = Lots(
        order.side, order.quantity, order.entry, order.margin, order.leverage, order.stop, order.target, liquidation,
        age=jnp.zeros((), jnp.int32),
    )  # fmt: skip
    return jax.tree.map(lambda new, old: jnp.where(here, new, old), lot, lots)


def _settle(lots, how, candle, bar, atr, tick_value, params):
    at_market = jnp.where(how == Exit.CLOSED, bar.open[0], bar.close[-1])
    fill = jnp.where(how == Exit.TARGET, lots.target, fill_exit(lots.side, at_market, atr, params))
    fill = cond_any(jnp.any(how == Exit.STOPPED), _stop_fills, lambda fill, *_: fill, fill, lots, how, candle, bar, atr, params)
    filled = how > Exit.LIQUIDATED
    worth = jnp.where(filled, lots.quantity * fill * tick_value, 0)
    profit = jnp.maximum(lots.side * lots.quantity * (fill - lots.entry) * tick_value, -lots.margin)
    profit = jnp.where(filled, profit, 0)
    fees = jnp.where(filled, jnp.minimum(params.taker_fee * worth, lots.margin + profit), 0)
    lost = jnp.where(how == Exit.LIQUIDATED, lots.margin, 0)
    counts = jnp.stack([_count(how == e) for e in Exit])
    exits = Exits(jnp.sum(profit), jnp.sum(fees), jnp.sum(lost), jnp.sum(worth), counts)
    return _clear(lots, how > 0), exits


def _stop_fills(fill, lots, how, candle, bar, atr, params):
    def at_candle(path):
        return sum(jnp.where(candle == i, x, 0) for i, x in enumerate(path))
    extreme = jnp.where(lots.side > 0, at_candle(bar.low), at_candle(bar.high))
    stops = fill_stop(lots.side, lots.stop, at_candle(bar.open), extreme, atr, params)
    return jnp.where(how == Exit.STOPPED, stops, fill)


def _clear(lots: Lots, gone: Bool[Array, "lots"]) -> Lots:
    """Free the slots of the lots that ended."""
    return jax.tree.map(lambda x: jnp.where(gone, jnp.zeros_like(x), x), lots)


def _count(mask: Bool[Array, "lots"]) -> Int[Array, ""]:
    return jnp.sum(mask, dtype=jnp.int32)
