"""The environment. `PerpEnv.trade` is one bar, in the order of docs/semantics.md."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax._arrays import total
from perpjax._describe import format_values, is_concrete
from perpjax._pytree import pytree
from perpjax.instrument import Instrument
from perpjax.market import Market, find_segment, pick_start
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.bar import Bar
from perpjax.rules.execution import fill_exit
from perpjax.rules.exits import LiveThrough, open_lot, realise
from perpjax.rules.intrabar import signed_paths
from perpjax.rules.margin import OpeningTotals, SettleAndCheck, liquidation_ticks
from perpjax.rules.observation import ACCOUNT_FEATURES, observe_account, observe_nothing, scale_features
from perpjax.rules.orders import CLOSE, ActionLike, Verdict, check_action, decode
from perpjax.rules.rewards import REWARDS, Outcome
from perpjax.rules.risk import Exposure, Review, is_ruined, review
from perpjax.state import EVENTS, Account, Money, State, account_side, add, open_account, post
from perpjax.vec import VecEnv, as_one, env_axes, step_batch, step_rows, with_layout
from perpjax.xla import Program, batched_by, default_platform, each_row, in_chunks, over_lots
from perpjax.xla.over_lots import NO_SLOT, Insert

SHOWN = ("initial_equity", "taker_fee", "slippage_base", "slippage_atr", "max_exposure", "max_leverage")
"""Parameters that `print` shows."""
COSTS = ("slippage", "gap_losses", "forgiven")
"""The ledger's sums that explain others and are not posted to the wallet."""


@pytree(static=("config",), subclasses=True)
class PerpEnv:
    """Perpetual futures, one account, 15-minute decisions. A pytree: pass it to `jit` as an argument.

    A subclass may have its own `observe` or `reward`, or wrap `step`; it is a pytree, too.

    Attributes:
      market: candles and features, on the device.
      params: numbers; `vmap` may vary them.
      config: static choices.

    Raises:
      ValueError: if the market has no room for one episode.
    """

    market: Market
    params: EnvParams = dataclasses.field(default_factory=EnvParams)
    config: EnvConfig = dataclasses.field(default_factory=EnvConfig)

    def __post_init__(self):
        length = self.config.episode_length
        if isinstance(self.market.segments.first, jax.core.Tracer) or self.market.num_starts(length):
            return
        raise ValueError(
            f"the market is too short for an episode of {length} bars: the bars that may be traded are "
            f"{self._tradable()}; use more data or a shorter episode_length"
        )

    def __repr__(self) -> str:
        config, params = self.config, self.params
        numbers = (f"{name} {format_values(getattr(params, name))}" for name in SHOWN if is_concrete(params.taker_fee))
        return (
            f"{type(self).__name__}: {config.actions} actions, {config.max_lots} lots, episodes of "
            f"{config.episode_length} bars, reward {config.reward}, intrabar {config.intrabar}\n"
            f"  {', '.join(numbers)}\n  {self.market}"
        )

    @property
    def observation_size(self) -> int:
        """Length of `State.obs`."""
        return self.market.scaler_mean.shape[-1] + len(ACCOUNT_FEATURES)

    @property
    def num_market_features(self) -> int:
        """How many of the first entries of `State.obs` are market features; the others describe the account."""
        return self.market.scaler_mean.shape[-1]

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> State:
        """A fresh account at the open of a first bar.

        Args:
          key: draws the first bar, uniform over all that leave room for a whole episode.
          start: the first bar, instead. Outside the tradable bars it is an error if concrete, clipped if traced.
        """
        self.params.check_batch(None)
        if start is None:
            # A fresh key is 64 random bits, of which 32 do: a second hash costs more than the rest of a reset.
            bits = jax.random.key_data(jax.random.fold_in(key, 0))[0]
            t, segment = pick_start(self.market, bits, self.config.episode_length)
        else:
            if not isinstance(start, jax.core.Tracer):
                self.check_start(start)
            t, segment = find_segment(self.market, jnp.asarray(start, jnp.int32))
        return State(
            t=t,
            obs=self.observe(t, observe_nothing(self.params)),
            reward=jnp.zeros((), jnp.float32),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            equity=jnp.array(self.params.initial_equity),
            account=open_account(self.params.initial_equity, self.config.max_lots),
            key=jnp.array(key),
            end=jnp.minimum(t + self.config.episode_length - 1, self.market.segments.last[segment]) + 1,
            instrument=self.market.segments.instrument[segment],
        )

    def step(self, state: State, action: ActionLike) -> State:
        """Trade at the open of bar t, live through its candles, and return the state at decision t + 1.

        The bar itself is `trade`. The functions between are about batches and compilation.

        Args:
          action: [5], see `orders.decode`; vmap for a batch, or step a `VecEnv`.

        Returns:
          The next state. A terminated or truncated one is absorbing: it comes back unchanged, reward 0.

        Raises:
          ValueError: if the action has another shape or is not of the codec's type.
        """
        if jnp.ndim(state.t):
            raise ValueError(f"a state of {jnp.shape(state.t)} environments; step a VecEnv, or use jax.vmap")
        new = _step_one(self, as_one(state.replace(key=None)), check_action(action, self.config))
        return as_one(new.replace(key=state.key), state.account.lots.slot_axis)

    def step_batch(self, state: State, action: Array, program: Program) -> State:
        """`step` of one environment or of a batch. `VecEnv` calls it.

        Args:
          state: of either layout of lots, see `Lots.slot_axis`.
          action: [..., 5].
          program: the program that the step becomes part of.
        """
        action = check_action(jnp.moveaxis(action, -1, 0), self.config, batch=True)
        layout = state.account.lots.slot_axis
        state = with_layout(state.replace(obs=None), layout if program.num_envs is None else -2)
        axes = env_axes(self), VecEnv.axes(state), -1
        new, view = in_chunks(type(self).trade, self, state, action, program, axes)
        new = with_layout(new, layout)
        t = self.market.prefetch_known(new.t, view[0], program)
        return new.replace(obs=self._each_env(type(self).observe, program, (0, t), (-1, view)))

    def trade(self, state: State, action: Array, program: Program) -> tuple[State, Float[Array, "9 ..."]]:
        """One bar, in the order of the contract: the next state without its observation, and that of the account."""
        params, config = self.params, self.config
        kernel = program.own_kernel
        # An episode that is over stays at its last bar, in which nothing trades any more.
        over = state.terminated | state.truncated
        t = jnp.where(over, state.t, state.t + 1)
        bar = self.market.bar(t - 1, halted=over, program=program)
        instrument = self.market.instrument_at(state.instrument)
        tick_value = instrument.tick_value
        account, wallet = state.account, (state.account.wallet, state.account.wallet_low)

        # 1. Funding: `SettleAndCheck.settle` for each lot. 2. Opening check: `SettleAndCheck.is_liquidated`. A lot that
        # the mark has already reached is gone before any order is looked at.
        lots, opening, free_slot = over_lots(SettleAndCheck(bar, instrument), account.lots, program)
        wallet = kernel(_pay)(wallet, (opening.funding, opening.losses))

        # 3. to 6. The order is decoded, sized and judged. A lot that opens has its levels before the first candle.
        order = self._review(action, account, opening, wallet[0], bar, instrument, program)
        entry = Insert(open_lot(order), jnp.where(order.opens, free_slot, NO_SLOT))

        # 7. Candles. 8. Timeout. 9. Exits: `LiveThrough.outcome`, `trigger`, `fill` for each lot, after CLOSE (3.).
        paths = kernel(functools.partial(signed_paths, each_candle=each_row(program)))(bar, order.side)
        rule = LiveThrough(bar, paths, order, tick_value, params, config.intrabar)
        lots, totals, _ = over_lots(rule, lots, program, insert=entry)
        wallet = kernel(_pay)(wallet, (order.fee, totals.fees, totals.losses), (totals.realised,))

        # 10. Mark to market.
        equity = jnp.where(over, state.equity, wallet[0] + totals.unrealised * tick_value)

        # 11. Reward and flags.
        terminated = jnp.where(over, state.terminated, is_ruined(equity, params))
        truncated = jnp.where(over, state.truncated, ~terminated & (t >= state.end))
        posted = totals.realised - totals.fees - totals.losses - order.fee - opening.funding - opening.losses
        outcome = Outcome(
            change=posted + (totals.unrealised - opening.unrealised_before) * tick_value,
            before=state.equity,
            after=equity,
            opened=order.opens,
            liquidated=opening.events["liquidated"] + totals.events["liquidated"],
            notional=totals.quantity * bar.mark_close[-1] * tick_value,
            move=bar.atr_after / bar.close[-1],
            ruined=terminated,
        )
        reward = jnp.where(over, 0, self._each_env(type(self).reward, program, (0, outcome)))

        observe = kernel(functools.partial(observe_account, slots=config.max_lots))
        view = observe(totals, order.side, equity, bar, tick_value, params)
        amounts = {
            "fees": order.fee + totals.fees,
            "funding": opening.funding,
            "realised": totals.realised,
            "liquidation_losses": opening.losses + totals.losses,
            "traded_notional": order.notional + totals.notional,
            "slippage": order.slippage(bar.open[0], tick_value) + totals.slippage,
            "gap_losses": totals.gap_losses,
            "forgiven": totals.forgiven,
        }
        # The observation, the flags and the ledger need not read the lots again.
        view, equity, terminated, truncated, reward, costs, events = program.store(
            (view, equity, terminated, truncated, reward, [amounts[name] for name in COSTS], totals.events)
        )
        amounts |= dict(zip(COSTS, costs, strict=True))
        counts = {name: events[name] for name in EVENTS if name != "opened"} | {"opened": order.opens}
        counts["liquidated"] += opening.events["liquidated"]
        ledger = post(account.ledger, amounts, counts)
        codes = np.arange(len(Verdict), dtype=np.int32).reshape(-1, *[1] * over.ndim)
        verdicts = ledger.verdicts + (codes == jnp.where(over, -1, order.verdict))
        new = state.replace(
            t=t,
            obs=None,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            equity=equity,
            account=Account(*wallet, lots, ledger.replace(verdicts=verdicts)),
        )
        return new, jnp.stack(view)

    def _review(
        self,
        action: Array,
        account: Account,
        opening: OpeningTotals,
        wallet: Float[Array, "..."],
        bar: Bar,
        instrument: Instrument,
        program: Program,
    ) -> Review:
        """`risk.review` of an action. The order finds the account after the opening check."""
        params, config, kernel = self.params, self.config, program.own_kernel
        held_before = account_side(account.lots) if config.opposite == "close" else None

        @kernel
        def review_order(action: Array) -> Review:
            order = decode(action, params, config)
            if held_before is not None:  # a direction against the lots held before the check is a close
                closes = order.direction * held_before < 0
                order = order._replace(direction=jnp.where(closes, CLOSE, order.direction))
            equity = wallet + opening.unrealised * instrument.tick_value
            exposure = Exposure(opening.events["held"], config.max_lots, opening.side, wallet, equity, opening.margin)
            return review(
                order, exposure, bar.open[0], bar.mark_open[0], bar.is_valid(0), bar.atr, instrument, params,
                liquidation=kernel(liquidation_ticks),
            )  # fmt: skip

        return review_order(action)

    def reward(self, outcome: Outcome) -> Float[Array, ""]:
        """The reward of one step; `EnvConfig.reward` names the function. A subclass may have its own."""
        return REWARDS[self.config.reward](outcome, self.params)

    def observe(self, t: Int[Array, ""], view: Float[Array, "9"]) -> Float[Array, "observation"]:
        """The observation at the open of bar t: scaled features, then the account. A subclass may have its own.

        Args:
          view: the nine numbers of `observation.observe_account`.
        """
        known = self.market.known(t)
        features = scale_features(known, self.market.scaler_mean, self.market.scaler_scale)
        return jnp.concatenate([features, view])

    def _each_env(self, function: Callable[..., Array], program: Program, *args: tuple[int, Any]) -> Array:
        """A method of one environment, for each of a batch; the arguments come with their batch axes."""
        axes, values = zip(*args, strict=True)
        if program.num_envs is None:
            return function(self, *values)
        return jax.vmap(function, (env_axes(self), *axes))(self, *values)

    def liquidation_value(self, state: State) -> Float[Array, ""]:
        """Equity after closing every lot at the last valid close, with slippage and fee; quote.

        Args:
          state: of one environment. The close is that of bar t - 1, and the ATR that of its open, as in a timeout.

        Raises:
          ValueError: for a batch of states.
        """
        if jnp.ndim(state.t):
            raise ValueError(
                f"a state of {jnp.shape(state.t)} environments; use jax.vmap, or VecEnv.one for one of them"
            )
        lots, (close, atr) = state.account.lots, self.market.last_close(state.t - 1)
        tick_value = self.market.instrument_at(state.instrument).tick_value
        fill = fill_exit(account_side(lots), close, atr, self.params)
        profit, fee, _ = realise(lots, fill, tick_value, self.params)
        return state.account.wallet + total(profit - fee)

    def check_start(self, start: int | Int[np.ndarray, "..."]) -> None:
        """Raise unless every first bar may be traded. A traced `reset` can only clip; ask here before it.

        Raises:
          ValueError: naming the first bar that is not an integer within a segment, and the bars that are.
        """
        first, last = self.market.segments.first, self.market.segments.last
        if isinstance(first, jax.core.Tracer):
            return
        starts = np.atleast_1d(start)
        inside = ((np.asarray(first) <= starts[:, None]) & (starts[:, None] <= np.asarray(last))).any(axis=1)
        inside &= np.issubdtype(starts.dtype, np.integer)
        if not inside.all():
            raise ValueError(
                f"start = {starts[~inside][0]} is not a bar that may be traded; those are {self._tradable()}"
            )

    def _tradable(self) -> str:
        spans = zip(self.market.segments.first.tolist(), self.market.segments.last.tolist(), strict=True)
        return ", ".join(f"{first} .. {last}" for first, last in spans)


def _pay(wallet: Money, paid: tuple[Array, ...], received: tuple[Array, ...] = ()) -> Money:
    """One amount after the other: a sum of amounts would lose digits that the ledger keeps."""
    return add(wallet, *(-x for x in paid), *received)


@batched_by(step_rows(lambda env, *args: step_batch(VecEnv(env).program(args[0]))(env, *args)))
def _step_one(env: PerpEnv, state: State, action: Array) -> State:
    return env.step_batch(state, action, Program(default_platform()))
