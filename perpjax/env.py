"""The environment. `_trade` reads like the contract: funding, opening check, orders, candles, mark, reward."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from perpjax._pytree import pytree
from perpjax.batching import batch_last, end_kernel, stage, total
from perpjax.execution import fill_exit
from perpjax.instrument import Instrument
from perpjax.lots import Life, count, live, open_lot, realise, take_stock
from perpjax.margin import Opening, open_bar
from perpjax.market import Market, PackedBar, find_segment, pick_start
from perpjax.moments import Tally
from perpjax.observation import ACCOUNT_FEATURES, observe_account, observe_nothing, scale_features
from perpjax.orders import CLOSE, ActionLike, check_action, decode
from perpjax.params import EnvConfig, EnvParams
from perpjax.rewards import log_return, shaped
from perpjax.risk import Exposure, Review, is_ruined, review
from perpjax.state import Account, Holdings, Money, State, account_side, add, add_each, open_account


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
        length = self.config.episode_length
        if isinstance(self.market.segments.first, jax.core.Tracer) or self.market.num_starts(length):
            return
        raise ValueError(
            f"the market is too short for an episode of {length} bars: the bars that may be traded are "
            f"{self._tradable()}; use more data or a shorter episode_length"
        )

    @property
    def observation_size(self) -> int:
        """Length of `State.obs`."""
        return self.market.scaler_mean.shape[-1] + len(ACCOUNT_FEATURES)

    @property
    def num_market_features(self) -> int:
        """How many of the first entries of `State.obs` are market features; the others describe the account."""
        return self.market.scaler_mean.shape[-1]

    def step(self, state: State, action: ActionLike) -> State:
        """Trade at the open of bar t, live through its candles, and return the state at decision t + 1.

        Args:
          action: [5], see `orders.decode`; vmap for a batch.

        Returns:
          The next state. A terminated or truncated one is absorbing: it comes back unchanged, reward 0.

        Raises:
          ValueError: if the action has another shape or is not of the codec's type.
        """
        action = check_action(action, self.config)
        plain = PerpEnv(self.market, self.params, self.config)  # a subclass need not be a pytree
        new, view = plain._trade(state.replace(obs=None), action)
        return new.replace(obs=self.observe(self.market.ask_for_known(new.t, after=view[0]), view))

    @batch_last(extra=jax.ShapeDtypeStruct((len(ACCOUNT_FEATURES),), jnp.float32))
    def _trade(self, state: State, action: Array) -> tuple[State, Float[Array, "9 ..."]]:
        """Section 3 of the contract, in its order. The next state, and what its observation says of the account."""
        params, config = self.params, self.config
        # An episode that is over stays at its last bar, in which nothing trades any more.
        over = state.terminated | state.truncated
        t = jnp.where(over, state.t, state.t + 1)
        bar = self.market.packed_bar(t - 1, halted=over)
        instrument = self.market.instrument_at(state.instrument)
        tick_value = instrument.tick_value
        account = state.account
        against = account_side(account.lots) if config.opposite == "close" else None

        # 1. Funding. 2. Opening check: what the mark has already reached is gone before any order is looked at.
        lots, used, opening = open_bar(account.lots, bar, instrument)
        wallet = _post((account.wallet, account.wallet_low), (opening.funding, opening.losses), ())

        # 3. to 6. The order is reviewed; what it opens has its levels before the first candle.
        order = _review(config)(action, against, opening, wallet[0], bar, instrument, params)
        entry = open_lot(order, opening.free)

        # 7. Candles. 8. Timeout. 9. Exits. A lot that was closed at the open sees no candle.
        life = Life(order, entry, bar, tick_value, config.intrabar, config.max_lots, params)
        lots, exits, held = live(lots, used, life)
        wallet = _post(wallet, (order.fee, exits.fees, exits.losses), (exits.realised,))

        # 10. Mark to market.
        equity = jnp.where(over, state.equity, wallet[0] + held.floating * tick_value)

        # 11. Reward and flags.
        terminated = jnp.where(over, state.terminated, is_ruined(equity, params))
        truncated = jnp.where(over, state.truncated, ~terminated & (t >= state.end))
        posted = exits.realised - exits.fees - exits.losses - order.fee - opening.funding - opening.losses
        gained = (held.floating - opening.carried) * tick_value
        reward = log_return(posted + gained, state.equity, equity, params)
        if config.reward == "shaped":
            now = bar.unpack()
            exposed, move = held.quantity * now.mark_close[-1] * tick_value, now.atr_after / now.close[-1]
            liquidated = opening.liquidated + exits.events["liquidated"]
            reward = shaped(reward, order.opens, liquidated, exposed, move, equity, terminated, params)
        reward = jnp.where(over, 0, reward)

        view = _observe(held, exits.events, order.side, config.max_lots, equity, bar, tick_value, params)
        slippage = order.slippage(bar.unpack().open[0], tick_value) + exits.slippage
        costs = slippage, exits.gap_losses, exits.forgiven
        # What follows need not read the lots again.
        view, equity, terminated, truncated, reward, events, costs = end_kernel(
            (view, equity, terminated, truncated, reward, exits.events, costs)
        )
        slippage, gap_losses, forgiven = costs
        ledger = add_each(
            account.ledger,
            fees=order.fee + exits.fees,
            funding=opening.funding,
            realised=exits.realised,
            liquidation_losses=opening.losses + exits.losses,
            traded_notional=order.notional + exits.notional,
            slippage=slippage,
            gap_losses=gap_losses,
            forgiven=forgiven,
        )
        verdict = jnp.where(over, -1, order.verdict)
        happened = count(verdict, order.opens, opening.liquidated, events)
        ledger = ledger.replace(counts=ledger.counts + happened)
        new = state.replace(
            t=t,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            equity=equity,
            account=Account(*wallet, lots, ledger),
        )
        return new, jnp.stack(view)

    def reset(self, key: Array, start: int | Int[Array, ""] | None = None) -> State:
        """A fresh account at the open of a first bar.

        Args:
          key: draws the first bar, uniform over all that leave room for a whole episode.
          start: the first bar, instead. Outside the tradable bars it is an error if concrete, clipped if traced.
        """
        if start is None:
            # A fresh key is 64 random bits, of which 32 do: a second hash costs more than the rest of a reset.
            bits = jax.random.key_data(jax.random.fold_in(key, 0))[0]
            t, segment = pick_start(self.market, bits, self.config.episode_length)
        else:
            if not isinstance(start, jax.core.Tracer):
                self.check_start(start)
            t, segment = find_segment(self.market, jnp.asarray(start, jnp.int32))
        row = self.market.segments.instrument[segment]
        account = open_account(self.params.initial_equity, self.config.max_lots)
        return State(
            t=t,
            obs=self.observe(t, observe_nothing(self.params)),
            reward=jnp.zeros((), jnp.float32),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            equity=jnp.array(self.params.initial_equity),
            account=account,
            key=jnp.array(key),
            end=jnp.minimum(t + self.config.episode_length - 1, self.market.segments.last[segment]) + 1,
            instrument=row,
        )

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
          ValueError: naming the first bar that is not an integer within a segment, and what is.
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

    def observe(self, t: Int[Array, ""], view: Float[Array, "9"]) -> Float[Array, "observation"]:
        """What is known at the open of bar t: scaled features, then the account."""
        known = self.market.known(t)
        features = scale_features(known, self.market.scaler_mean, self.market.scaler_scale)
        return jnp.concatenate([features, view])


@stage
def _post(wallet: Money, paid: tuple[Array, ...], received: tuple[Array, ...]) -> Money:
    """One amount after the other: what is added up first loses digits that the ledger keeps."""
    return add(wallet, *(-x for x in paid), *received)


@functools.cache
def _review(config: EnvConfig) -> Callable[..., Review]:
    @stage
    def review_order(
        action: Array,
        against: Float[Array, "..."] | None,
        opening: Opening,
        wallet: Float[Array, "..."],
        packed: PackedBar,
        instrument: Instrument,
        params: EnvParams,
    ) -> Review:
        """What becomes of an action; against a side, if one is given, it closes. Its side is then the account's."""
        order, bar = decode(action, params, config), packed.unpack()
        if against is not None:
            closes = order.direction * against < 0
            order = order._replace(direction=jnp.where(closes, CLOSE, order.direction))
        exposure = Exposure(
            lots=opening.count,
            slots=config.max_lots,
            side=opening.side,
            wallet=wallet,
            equity=wallet + opening.floating * instrument.tick_value,
            margin=opening.margin,
        )
        order = review(order, exposure, bar.open[0], bar.mark_open[0], bar.valid[0], bar.atr, instrument, params)
        return order._replace(side=jnp.where(order.opens, order.side, opening.side))

    return review_order


@stage
def _observe(
    held: Holdings,
    events: Tally,
    side: Float[Array, "..."],
    slots: int,
    equity: Float[Array, "..."],
    packed: PackedBar,
    tick_value: Float[Array, "..."],
    params: EnvParams,
) -> list[Float[Array, "..."]]:
    held = take_stock(held, events, side, tick_value)
    return observe_account(held, slots, equity, packed.unpack().mark_close[-1], tick_value, params)
