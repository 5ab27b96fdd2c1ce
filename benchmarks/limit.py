"""The limit: what `PerpEnv.step` computes, as a loop written by hand for the CPU. A yardstick, not a simulator to use.

    limit = Limit(env)                  # a PerpEnv, or AutoReset(PerpEnv(...))
    limit.load(states)                  # a batch of its states, as `jax.vmap(env.reset)` returns it
    limit.step(actions)                 # [N, 5] int32, in place; compiled at the first call, a few seconds
    limit.read("account.lots.stop")     # any field of the batch, by its name in the environment's state

Same semantics and same state as the environment in its default config, float32 throughout, called once per decision
for all environments. It does what a compiler of arrays cannot: one record per environment and per lot, only lots that
are held are touched, candles are read only where the bar reached one of a lot's levels, brackets only where a lot opens
or settles and only up to the one that counts, features are scaled once and beforehand. Threads share the environments,
as many as `numba.set_num_threads` says: one is best for few, which are done before a second one has begun.
What keeps it honest is `tests/test_limit.py`: the environment's own step, compared after every step.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from perpjax import AutoReset, EnvConfig, EnvParams, Market, PerpEnv, State, Verdict
from perpjax.execution import MIN_FILL
from perpjax.margin import CEIL_SLACK
from perpjax.observation import ACCOUNT_FEATURES, scale_features
from perpjax.orders import CLOSE, DIRECTIONS, HOLD, LONG, MULTI_DISCRETE, Order, decode
from perpjax.rewards import EQUITY_FLOOR
from perpjax.risk import HALF_STEP, MAX_STOP, MAX_TARGET, MIN_STOP, MIN_TARGET, STEP_SLACK
from perpjax.state import EVENTS
from perpjax.state import SUMS as LEDGER_SUMS

CACHE_LINE = 64
MOST_LOTS = 31
"""The slots that are held are the bits of an int32."""
AHEAD, FETCHED = 4, 5 * CACHE_LINE
"""A bar is asked for so many environments before it is needed, an account twice as many; so many bytes of each."""

# Numba keeps float32 only where every operand is one: a literal 0.0 would make a double of its neighbours.
ZERO, ONE, TWO, THIRD, FIFTH, INF = (np.float32(x) for x in (0, 1, 2, 1 / 3, 1 / 5, np.inf))
SLACK, LOWEST_FILL = np.float32(CEIL_SLACK), np.float32(MIN_FILL)
OF_STEPS, HALF = np.float32(STEP_SLACK), np.float32(HALF_STEP)
SMALL = np.float32(0.1)
"""Below this the series of the logarithm is as exact as float32."""
ASKS_NOTHING, ASKS_LONG, ASKS_CLOSE = (DIRECTIONS.index(x) for x in (HOLD, LONG, CLOSE))
IDLE, DATA_GAP, MAX_LOTS, NO_HEDGE, MAX_EXPOSURE, MAX_NOTIONAL, BELOW_MINIMUM, IMMEDIATE, ACCEPTED = map(int, Verdict)
LIQUIDATED, STOPPED, TARGET = range(3)

SUMS = (*(f"ledger.{name}" for name in LEDGER_SUMS), "wallet")
FEES, FUNDING, REALISED, LOSSES, TRADED, SLIPPAGE, GAP_LOSSES, FORGIVEN, WALLET = range(len(SUMS))

LOT = np.dtype(
    [(name, "f4") for name in ("side", "quantity", "entry", "margin", "leverage", "stop", "target", "liquidation")]
    + [("age", "i4")]
)
ACTION = np.dtype([("choice", "i4", len(MULTI_DISCRETE))])
EPISODE = np.dtype(
    [("return_", "f4"), ("length", "i4")]
    + [(name, "f4") for name in ("equity", "liquidation_value", "peak", "max_drawdown")]
)

# Threads that sleep between calls. OpenMP's spin for a while: they start at once, but stall whatever else runs.
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "workqueue"

options = {"error_model": "numpy", "fastmath": {"contract"}, "boundscheck": False}
compiled, inlined = numba.njit(**options), numba.njit(**options, forceinline=True)


class Limit:
    """A batch of environments, stepped in place.

    Args:
      env: its market, parameters and config are read once. With `AutoReset` a new episode follows a finished one;
        first bars are drawn by a generator of this class, so they are others than `env` would draw.

    Raises:
      ValueError: for what the loop does not do: several instruments, parameters with a batch axis, a config that
        is not the default one but for `episode_length` and `max_lots`.
    """

    def __init__(self, env: PerpEnv | AutoReset):
        self.auto_reset = isinstance(env, AutoReset)
        plain = env.env if self.auto_reset else env
        _check(plain)
        self._market = pack_market(plain.market)
        self._rules = pack_rules(plain)
        self._layouts = (account_layout(plain.config.max_lots), view_layout(plain.market.features.shape[-1]))

    def load(self, state: State) -> None:
        """Take over a batch of states, as they are.

        Raises:
          ValueError: for one whose episode does not lie within the market.
        """
        count, bars = len(state.t), len(self._market) - 1
        outside = (np.asarray(state.t) < 1) | (np.asarray(state.t) > bars) | (np.asarray(state.end) > bars)
        if outside.any():
            i = int(outside.argmax())
            raise ValueError(
                f"state {i} is at bar {state.t[i]} of an episode to {state.end[i]}: not within 1 .. {bars}"
            )
        ended = count if self.auto_reset else 0
        self._accounts, self._views = (_aligned(count, layout) for layout in self._layouts)
        self._last, self._last_views = (_aligned(ended, layout) for layout in self._layouts)
        self._episodes = _aligned(ended, EPISODE)
        self._now = _name_fields(self._accounts, self._views)
        self._ended = {}
        if self.auto_reset:
            last = _name_fields(self._last, self._last_views)
            self._ended["final_obs"] = last["obs"]
            self._ended |= {n.replace("account", "episode"): x for n, x in last.items() if ".ledger." in n}
            self._now |= {f"episode.{name}": self._episodes[name] for name in EPISODE.names}
        for name, array in (self._now | self._ended).items():
            array[:] = read_field(state, name)
        _survey_all(self._accounts, self._market, self._rules)

    def step(self, actions: np.ndarray) -> None:
        """One decision of all environments: `multi_discrete` actions, [N, 5] int32."""
        if actions.dtype != np.int32 or actions.shape != (len(self._accounts), len(MULTI_DISCRETE)):
            shape = f"[{len(self._accounts)}, {len(MULTI_DISCRETE)}]"
            raise ValueError(f"actions are {shape} int32, not {list(actions.shape)} {actions.dtype}")
        _step_all(
            self._accounts, self._views, self._episodes, self._last, self._last_views,
            self._market, self._rules, actions.view(ACTION)[:, 0],
        )  # fmt: skip

    @property
    def fields(self) -> tuple[str, ...]:
        """The names that `read` knows: all of the environment's state but its random key and its instrument."""
        return (*self._now, *self._ended)

    def read(self, name: str) -> np.ndarray:
        """A field of the batch by its name in the environment's state, as "t", "account.wallet" or "episode.length"."""
        if name in self._now:
            return self._now[name]
        # What an auto-reset would lose is kept where an episode ended; elsewhere it is that of the running one.
        ended, running = self._ended[name], self._now[name.replace("final_", "").replace("episode", "account")]
        done = self._now["terminated"] | self._now["truncated"]
        return np.where(done.reshape(-1, *[1] * (ended.ndim - 1)), ended, running)


# What does not change, packed for the loop.


def _check(env: PerpEnv) -> None:
    config = env.config
    default = EnvConfig(max_lots=config.max_lots, episode_length=config.episode_length)
    if config != default:
        raise ValueError(f"the limit is written for the default config, not for {config}")
    if config.max_lots > MOST_LOTS:
        raise ValueError(f"max_lots = {config.max_lots} is more than the limit's {MOST_LOTS}")
    if any((x != x[:1]).any() for x in jax.tree.leaves(env.market.instruments)):
        raise ValueError(f"the limit is written for one instrument, not for {', '.join(env.market.symbols)}")
    if batched := [name for name, x in vars(env.params).items() if x.ndim]:
        raise ValueError(f"the limit is written for one set of parameters; with a batch axis: {', '.join(batched)}")


def _aligned(shape: int | tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that begin at a cache line."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + CACHE_LINE, np.uint8)
    begin = -raw.ctypes.data % CACHE_LINE
    return raw[begin : begin + size].view(dtype).reshape(shape)


@functools.cache  # numba knows a record type again at once only if it is the same object
def _padded(row: np.dtype, **aliases: str) -> np.dtype:
    """The same record in whole cache lines; `aliases` are further names of its fields."""
    names = {name: name for name in row.names} | aliases
    return np.dtype(
        {
            "names": list(names),
            "formats": [row.fields[field][0] for field in names.values()],
            "offsets": [row.fields[field][1] for field in names.values()],
            "itemsize": -(-row.itemsize // CACHE_LINE) * CACHE_LINE,
        }
    )


def account_layout(max_lots: int) -> np.dtype:
    """One environment. `sums` and `lows` are its compensated sums of money, see SUMS."""
    fields = (
        [(name, "i4") for name in ("t", "end", "held")]  # `held` has a bit for each slot
        + [(name, "?") for name in ("terminated", "truncated")]
        + [("drawn", "u2")]  # episodes begun, modulo 2^16
        + [(name, "f4") for name in ("equity", "reward")]
        # Kept so that a step need not read the lots for them; `brink` is the nearest liquidation price times the side.
        + [(name, "f4") for name in ("side", "margin", "floating", "brink", "posted")]
        + [("sums", "f4", len(SUMS)), ("lows", "f4", len(SUMS))]
        + [(name, "i4") for name in EVENTS]
        + [("refused", "i4", len(Verdict)), ("lots", LOT, max_lots)]
    )
    return _padded(np.dtype(fields))


@functools.cache
def view_layout(features: int) -> np.dtype:
    """One observation."""
    return np.dtype([("features", "f4", features), ("account", "f4", len(ACCOUNT_FEATURES))])


def read_field(state: State, name: str) -> np.ndarray:
    """A field of a batch of the environment's states, by its name in them; a tuple of arrays as columns."""
    value = operator.attrgetter(name)(state)
    return np.stack(value, axis=-1) if isinstance(value, tuple) else np.asarray(value)


def _name_fields(accounts: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
    """Where each field of the environment's state lies."""
    fields = {name: accounts[name] for name in ("t", "end", "terminated", "truncated", "equity", "reward")}
    fields["obs"] = views.view(np.float32).reshape(len(views), -1)
    fields |= {f"account.{name}": accounts["sums"][:, i] for i, name in enumerate(SUMS)}
    fields |= {"account.wallet_low": accounts["lows"][:, WALLET], "account.ledger.low": accounts["lows"][:, :WALLET]}
    fields |= {f"account.ledger.{name}": accounts[name] for name in (*EVENTS, "refused")}
    return fields | {f"account.lots.{name}": accounts["lots"][name] for name in LOT.names}


def bar_layout(candles: int, features: int, has_mark: bool) -> np.dtype:
    """A row of the packed market: a bar, and the features known after it. Without a mark the last price is the mark."""
    prices = [(name, "f4", candles) for name in ("open", "high", "low")]
    prices = np.dtype(prices + [(name, "f4") for name in ("highest", "lowest", "close")])
    bar = [(name, "f4") for name in ("atr", "funding_rate", "funding_price", "before")]
    bar += [("tradable", "i4"), ("alive", "i4"), ("last", prices), ("features", "f4", features)]
    return _padded(np.dtype([*bar, ("mark", prices)])) if has_mark else _padded(np.dtype(bar), mark="last")


def pack_market(market: Market) -> np.ndarray:
    """The market's rows as `bar_layout` has them. A candle that is not valid has extremes that reach no level."""
    bars = jax.tree.map(np.asarray, jax.jit(jax.vmap(Market.bar, (None, 0)))(market, jnp.arange(len(market.rows) - 1)))
    table = _aligned(len(market.rows), bar_layout(market.candles_per_bar, market.features.shape[-1], market.has_mark))
    rows = table[:-1]
    rows["atr"], rows["funding_rate"], rows["funding_price"] = bars.atr, bars.funding_rate, bars.funding_price
    rows["before"], rows["tradable"], rows["alive"] = bars.mark_before, bars.valid[:, 0], bars.valid.any(1)
    for series, prefix in (("last", ""), ("mark", "mark_")):
        opens, highs, lows, closes = (getattr(bars, prefix + name) for name in ("open", "high", "low", "close"))
        prices = rows[series]
        prices["open"], prices["close"] = opens, closes[:, -1]
        prices["high"], prices["low"] = np.where(bars.valid, highs, -np.inf), np.where(bars.valid, lows, np.inf)
        prices["highest"], prices["lowest"] = prices["high"].max(1), prices["low"].min(1)
    scaled = jax.jit(jax.vmap(scale_features, (0, None, None)))
    rows["features"] = scaled(market.features, market.scaler_mean, market.scaler_scale)[1:]
    table["before"][-1] = bars.mark_close[-1, -1]  # no bar follows, but an account may end there
    return table


def pack_rules(env: PerpEnv) -> np.ndarray:
    """Parameters, instrument, codec and where episodes may begin: one record."""
    config, instrument = env.config, env.market.instrument
    p = jax.tree.map(np.asarray, env.params)
    orders = _decode_all(env.params, config)
    segments = jax.tree.map(np.asarray, env.market.segments)
    room = np.maximum(segments.last + 2 - config.episode_length - segments.first, 0)
    brackets = np.asarray(instrument.brackets)
    values = {
        **{name: getattr(p, name) for name in ("taker_fee", "slippage_base", "slippage_atr", "stop_depth")},
        **{name: getattr(p, name) for name in ("max_exposure", "max_hold", "initial_equity")},
        **{name: getattr(instrument, name) for name in ("tick_value", "max_steps", "min_notional")},
        "ruin": p.ruin_fraction * p.initial_equity,
        "floor": np.float32(EQUITY_FLOOR) * p.initial_equity,
        "base": np.float32(1e-6) * p.initial_equity,
        "a_lot": np.float32(1 / config.max_lots),
        "a_bar": np.float32(1 / p.max_hold),
        "all_held": np.int32(2**config.max_lots - 1),
        "size": orders.size,
        "leverage": np.clip(orders.leverage, 1, p.max_leverage),
        "stop": np.clip(orders.stop_multiple, MIN_STOP, MAX_STOP),
        "target": np.clip(orders.target_multiple, MIN_TARGET, MAX_TARGET),
        "above": brackets[:, 0],
        "most": brackets[:, 2],
        "cap": brackets[-1, 1],
        **dict(zip(("rate", "amount", "of_long", "of_short"), np.asarray(instrument.maintenance).T, strict=True)),
        "episode_length": np.int32(config.episode_length),
        "last": segments.last,
        "upto": np.cumsum(room, dtype=np.int32),  # first bars of this segment and those before it
    }
    values = {name: np.asarray(x) for name, x in values.items()}
    rules = _aligned(1, _padded(np.dtype([(name, x.dtype, x.shape) for name, x in values.items()])))
    for name, x in values.items():
        rules[name] = x
    return rules


def _decode_all(params: EnvParams, config: EnvConfig) -> Order:
    """What each choice of each entry of an action means: as many rows as an entry has choices at most."""
    choices = jnp.broadcast_to(jnp.arange(max(MULTI_DISCRETE), dtype=jnp.int32)[:, None], (max(MULTI_DISCRETE), 5))
    return jax.tree.map(np.asarray, jax.vmap(lambda action: decode(action, params, config))(choices))


# The loop. `a` is an account, `lot` one of its lots, `bar` and `rules` rows of `pack_market` and `pack_rules`.


@inlined
def _post(a, entry, amount):
    """Add to one of the sums of money, as `perpjax.state.add` does."""
    high, low = a.sums[entry], a.lows[entry]
    total = high + amount
    back = total - high
    low += (high - (total - back)) + (amount - back)
    high = total + low
    a.sums[entry] = high
    a.lows[entry] = low - (high - total)


@inlined
def _pay(a, entry, amount):
    """Post to the ledger what the wallet pays."""
    _post(a, entry, amount)
    _post(a, WALLET, -amount)
    a.posted -= amount


@inlined
def _slip(rules, bar, price):
    return np.ceil(rules.slippage_base * price + rules.slippage_atr * bar.atr)


@compiled
def _liquidation_price(rules, side, entry, quantity, margin):
    """Maintenance is convex: over the brackets the distance falls, then rises."""
    per_tick = ONE / (quantity * rules.tick_value)
    free = margin * per_tick
    distance = INF
    for i in range(len(rules.rate)):
        rate = rules.rate[i]
        slope = rules.of_long[i] if side > ZERO else rules.of_short[i]
        nearer = (free + rules.amount[i] * per_tick - rate * entry) * slope
        if nearer > distance:
            break
        distance = nearer
    return max(entry - side * np.ceil(distance - entry * SLACK), ZERO)


@inlined
def _brink(side, level):
    """The signed mark at or below which a lot with this liquidation price is liquidated."""
    return side * level if level > ZERO else -INF


@inlined
def _free(a, slot):
    a.held &= ~(1 << slot)
    lot = a.lots[slot]
    lot.side = lot.quantity = lot.entry = lot.margin = ZERO
    lot.leverage = lot.stop = lot.target = lot.liquidation = ZERO
    lot.age = 0


@compiled
def _liquidate(a, slot):
    _pay(a, LOSSES, a.lots[slot].margin)
    a.liquidated += 1
    _free(a, slot)


@inlined
def _realise(lot, rules, fill):
    """Profit and fee of an exit, which together never cost more than the margin, and what that forgives."""
    fee = rules.taker_fee * (lot.quantity * fill * rules.tick_value)
    profit = lot.side * lot.quantity * (fill - lot.entry) * rules.tick_value
    floored = max(profit, -lot.margin)
    return floored, min(fee, lot.margin + floored), max(fee - profit - lot.margin, ZERO)


@compiled
def _sell(a, slot, rules, trigger, fill):
    """Any other exit. The trigger is the price before slippage."""
    lot = a.lots[slot]
    profit, fee, forgiven = _realise(lot, rules, fill)
    worth = lot.quantity * rules.tick_value
    _pay(a, FEES, fee)
    _post(a, REALISED, profit)
    _post(a, WALLET, profit)
    a.posted += profit
    _post(a, TRADED, worth * fill)
    if fill != trigger:
        _post(a, SLIPPAGE, worth * (lot.side * (trigger - fill)))
    if forgiven > ZERO:
        _post(a, FORGIVEN, forgiven)
    _free(a, slot)


@inlined
def _fill_exit(a, rules, bar, price):
    return max(price - a.side * _slip(rules, bar, price), LOWEST_FILL)


@inlined
def _sell_at_market(a, slot, rules, bar, price):
    _sell(a, slot, rules, price, _fill_exit(a, rules, bar, price))


@inlined
def _stop_out(a, slot, rules, bar, k):
    """The worse of stop and candle open, slippage, and part of the way to the candle's adverse extreme."""
    lot, side = a.lots[slot], a.side
    trigger = side * min(side * lot.stop, side * bar.last.open[k])
    depth = np.ceil(rules.stop_depth * abs(trigger - (bar.last.low[k] if side > ZERO else bar.last.high[k])))
    if trigger != lot.stop:
        _post(a, GAP_LOSSES, lot.quantity * rules.tick_value * (side * (lot.stop - trigger)))
    a.stopped += 1
    _sell(a, slot, rules, trigger, max(trigger - side * (_slip(rules, bar, trigger) + depth), LOWEST_FILL))


@inlined
def _take_profit(a, slot, rules):
    target = a.lots[slot].target
    a.targets += 1
    _sell(a, slot, rules, target, target)


@compiled
def _survey(a, mark, rules):
    """What is kept of the lots, afresh."""
    a.side = a.margin = a.floating = ZERO
    a.brink = -INF
    for slot in range(len(a.lots)):
        lot = a.lots[slot]
        if lot.quantity > ZERO:
            a.side = lot.side
            a.margin += lot.margin
            a.floating += lot.side * lot.quantity * (mark - lot.entry) * rules.tick_value
            a.brink = max(a.brink, _brink(lot.side, lot.liquidation))


@compiled
def _open_bar(a, bar, rules):
    """Funding, then what the mark's open liquidates."""
    for slot in range(len(a.lots)):
        lot = a.lots[slot]
        if lot.quantity > ZERO:
            if bar.funding_rate != ZERO:
                value = lot.side * lot.quantity * bar.funding_price * rules.tick_value
                paid = min(value * bar.funding_rate, lot.margin)
                _pay(a, FUNDING, paid)
                lot.margin -= paid
                lot.liquidation = _liquidation_price(rules, lot.side, lot.entry, lot.quantity, lot.margin)
            if bar.tradable and lot.side * bar.mark.open[0] <= _brink(lot.side, lot.liquidation):
                _liquidate(a, slot)
    _survey(a, bar.before, rules)


@inlined
def _choose(values, index):
    return values[min(max(index, 0), len(values) - 1)]


@inlined
def _trade(a, bar, rules, action):
    """Review the order and fill it; its verdict."""
    if action[0] <= ASKS_NOTHING:
        return IDLE
    if not bar.tradable:
        return DATA_GAP
    if action[0] >= ASKS_CLOSE:
        return _close(a, bar, rules)
    if a.held == rules.all_held:
        return MAX_LOTS
    side = ONE if action[0] == ASKS_LONG else -ONE
    if a.side == -side:
        return NO_HEDGE
    return _open(a, bar, rules, action, side)


@compiled
def _close(a, bar, rules):
    """A resting stop or target that the open has reached comes before the order."""
    if a.held == 0:
        return IDLE
    price = bar.last.open[0]
    slot, rest = 0, a.held
    while rest:
        if rest & 1:
            lot = a.lots[slot]
            if a.side * price <= a.side * lot.stop:
                _stop_out(a, slot, rules, bar, 0)
            elif a.side * price > a.side * lot.target:
                _take_profit(a, slot, rules)
            else:
                _sell_at_market(a, slot, rules, bar, price)
                a.closed += 1
        slot, rest = slot + 1, rest >> 1
    return ACCEPTED


@inlined
def _open(a, bar, rules, action, side):
    available = rules.max_exposure * (a.sums[WALLET] + a.floating) - a.margin
    free = a.sums[WALLET] - a.margin
    if available <= ZERO or free <= ZERO:
        return MAX_EXPOSURE
    size, leverage = _choose(rules.size, action[1]), _choose(rules.leverage, action[2])
    wanted = size * available * leverage
    if wanted > rules.cap:
        return MAX_NOTIONAL
    for i in range(len(rules.above)):
        if wanted <= rules.above[i]:
            break
        leverage = min(leverage, rules.most[i])
    price = bar.last.open[0]
    slip = _slip(rules, bar, price)
    entry = max(price + side * slip, LOWEST_FILL)
    step_notional = entry * rules.tick_value
    margin = min(size * available, free / (ONE + leverage * rules.taker_fee))
    steps = margin * leverage / step_notional
    quantity = min(np.floor(steps + min(steps * OF_STEPS, HALF)), rules.max_steps)
    notional = quantity * step_notional
    if quantity < ONE or notional < rules.min_notional:
        return BELOW_MINIMUM
    posted = notional / leverage
    level = _liquidation_price(rules, side, entry, quantity, posted)
    if side * bar.mark.open[0] <= _brink(side, level):
        return IMMEDIATE
    stop = max(slip + ONE, np.rint(_choose(rules.stop, action[3]) * bar.atr))
    slot = 0
    while a.held >> slot & 1:
        slot += 1
    lot = a.lots[slot]
    lot.side, lot.quantity, lot.entry, lot.leverage = side, quantity, entry, leverage
    lot.margin, lot.liquidation = posted, level
    lot.stop = entry - side * stop
    lot.target = entry + side * max(stop, np.rint(_choose(rules.target, action[4]) * bar.atr))
    a.held |= 1 << slot
    a.side = side
    a.opened += 1
    _pay(a, FEES, rules.taker_fee * notional)
    _post(a, TRADED, notional)
    _post(a, SLIPPAGE, side * quantity * (entry - price) * rules.tick_value)
    return ACCEPTED


@compiled
def _end_in_candle(a, slot, bar, rules):
    """The first candle that reached a level of the lot ends it; there is one."""
    lot, side = a.lots[slot], a.side
    stop, beyond, brink = side * lot.stop, side * lot.target + ONE, _brink(side, lot.liquidation)
    long = side > ZERO
    k = 0
    while True:
        adverse = bar.last.low[k] if long else bar.last.high[k]
        liquidates = side * (bar.mark.low[k] if long else bar.mark.high[k]) <= brink
        stops = side * adverse <= stop
        reaches = side * (bar.last.high[k] if long else bar.last.low[k]) >= beyond
        if liquidates or stops or reaches:
            break
        k += 1
    price = bar.last.open[k]
    if side * bar.mark.open[k] <= brink:
        how = LIQUIDATED
    elif side * price <= stop:
        how = STOPPED
    elif side * price >= beyond:
        how = TARGET
    else:
        a.ambiguous += (liquidates and stops) or (reaches and (liquidates or stops))
        how = STOPPED if stops and (stop >= brink or not liquidates) else LIQUIDATED if liquidates else TARGET
    if how == LIQUIDATED:
        _liquidate(a, slot)
    elif how == STOPPED:
        _stop_out(a, slot, rules, bar, k)
    else:
        _take_profit(a, slot, rules)


@inlined
def _hold_through(a, bar, rules):
    """The candles, the timeout and the mark; how many lots are left, their steps, and the age of the oldest."""
    side = a.side
    if side > ZERO:
        worst, best, mark_worst = bar.last.lowest, bar.last.highest, bar.mark.lowest
    else:
        worst, best, mark_worst = -bar.last.highest, -bar.last.lowest, -bar.mark.highest
    count, oldest, quantity, margin, profit, nearest = 0, 0, ZERO, ZERO, ZERO, -INF
    slot, rest = 0, a.held
    while rest:
        if rest & 1:
            lot = a.lots[slot]
            lot.age += 1
            brink = _brink(side, lot.liquidation)
            if worst <= side * lot.stop or best >= side * lot.target + ONE or mark_worst <= brink:
                _end_in_candle(a, slot, bar, rules)
            elif lot.age >= rules.max_hold and bar.alive:
                _sell_at_market(a, slot, rules, bar, bar.last.close)
                a.timed_out += 1
            else:
                count += 1
                oldest = max(oldest, lot.age)
                quantity += lot.quantity
                margin += lot.margin
                profit += side * lot.quantity * (bar.mark.close - lot.entry)
                nearest = max(nearest, brink)
        slot, rest = slot + 1, rest >> 1
    if count == 0:
        a.side = ZERO
    a.margin, a.floating, a.brink = margin, profit * rules.tick_value, nearest
    return count, quantity, oldest


@inlined
def _log_return(delta, before, after, floor):
    base = max(before, floor)
    if before < floor or after < floor:
        delta = max(after, floor) - base
    x = delta / base
    if abs(x) > SMALL:
        return np.log1p(x)
    s = x / (TWO + x)
    square = s * s
    return TWO * s * (ONE + square * (THIRD + square * FIFTH))


@inlined
def _observe(a, view, bar, mark, rules, count, quantity, oldest):
    for i in range(len(bar.features)):
        view.features[i] = bar.features[i]
    per_equity = ONE / max(a.equity, rules.base)
    view.account[0] = np.float32(count) * rules.a_lot
    view.account[1] = a.side
    view.account[2] = a.margin * per_equity
    view.account[3] = quantity * mark * rules.tick_value * per_equity
    view.account[4] = a.floating * per_equity
    view.account[5] = np.float32(oldest) * rules.a_bar
    view.account[6] = np.float32(max(rules.max_hold - oldest, 0)) * rules.a_bar if count else ZERO
    view.account[7] = (a.side * mark - a.brink) / mark if a.brink > -INF else ONE
    view.account[8] = (rules.max_exposure * a.equity - a.margin) * per_equity


@inlined
def _step(a, view, bar, rules, action):
    before, carried = a.equity, a.floating
    a.posted = ZERO
    if a.held and (bar.funding_rate != ZERO or (bar.tradable and a.side * bar.mark.open[0] <= a.brink)):
        _open_bar(a, bar, rules)
    a.refused[_trade(a, bar, rules, action)] += 1
    count, quantity, oldest = _hold_through(a, bar, rules)
    a.equity = a.sums[WALLET] + a.floating
    a.reward = _log_return(a.posted + (a.floating - carried), before, a.equity, rules.floor)
    a.t += 1
    a.terminated = a.equity <= rules.ruin
    a.truncated = not a.terminated and a.t >= a.end
    _observe(a, view, bar, bar.mark.close, rules, count, quantity, oldest)


@compiled
def _liquidation_value(a, bar, rules):
    """Equity after closing every lot at the close of the bar that was last."""
    price = bar.last.close
    fill, gained = _fill_exit(a, rules, bar, price), ZERO
    for slot in range(len(a.lots)):
        lot = a.lots[slot]
        if lot.quantity > ZERO:
            profit, fee, _ = _realise(lot, rules, fill)
            gained += profit - fee
    return a.sums[WALLET] + gained


@inlined
def _follow(episode, a, started, before):
    """The statistics of `AutoReset`."""
    if started:
        episode.return_ = episode.max_drawdown = ZERO
        episode.length = 0
        episode.peak = before
    episode.return_ += a.reward
    episode.length += 1
    episode.equity = episode.liquidation_value = a.equity
    episode.peak = max(episode.peak, a.equity)
    episode.max_drawdown = max(episode.max_drawdown, ONE - a.equity / episode.peak)


@inlined
def _mix(x):
    """Bits of a counter, well mixed: the finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled
def _restart(a, view, market, rules, number):
    """A fresh account at a first bar, uniform over all; reward and flags stay those of the step."""
    a.drawn += 1
    counter = np.uint64(number) << np.uint64(16) | np.uint64(a.drawn)
    bits = _mix(counter * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    draw = np.int64(bits % np.uint64(rules.upto[len(rules.upto) - 1]))
    segment = 0
    while draw >= rules.upto[segment]:
        segment += 1
    a.end = rules.last[segment] + 2 - (rules.upto[segment] - draw)
    a.t = a.end - rules.episode_length
    for slot in range(len(a.lots)):
        _free(a, slot)
    for i in range(len(a.sums)):
        a.sums[i] = a.lows[i] = ZERO
    for i in range(len(a.refused)):
        a.refused[i] = 0
    a.opened = a.stopped = a.targets = a.timed_out = a.closed = a.liquidated = a.ambiguous = 0
    a.side = a.margin = a.floating = ZERO
    a.brink = -INF
    a.sums[WALLET] = a.equity = rules.initial_equity
    _observe(a, view, market[a.t - 1], ONE, rules, 0, ZERO, 0)


@intrinsic
def _fetch(_, row):
    """Ask for the beginning of a record before it is needed: a bar, or an account and its first lots."""

    def generate(context, builder, signature, arguments):
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        begin = builder.bitcast(arguments[0], byte)
        for offset in range(0, min(row.size, FETCHED), CACHE_LINE):
            line = builder.gep(begin, [ir.Constant(ir.IntType(64), offset)])
            builder.call(function, [line, *(ir.Constant(number, x) for x in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(row), generate


@compiled
def _step_some(accounts, views, episodes, last, last_views, market, rules, actions, begin, end):
    auto_reset = len(episodes) > 0
    for i in range(begin, end):
        a = accounts[i]
        _fetch(accounts[min(i + 2 * AHEAD, end - 1)])
        _fetch(market[accounts[min(i + AHEAD, end - 1)].t])
        started, before = a.terminated or a.truncated, a.equity
        if started and not auto_reset:
            a.reward = ZERO
            continue
        bar = market[a.t]
        _step(a, views[i], bar, rules[0], actions[i].choice)
        if auto_reset:
            _follow(episodes[i], a, started, before)
            if a.terminated or a.truncated:
                episodes[i].liquidation_value = _liquidation_value(a, bar, rules[0])
                last[i], last_views[i] = a, views[i]
                _restart(a, views[i], market, rules[0], i)


@numba.njit(parallel=True, boundscheck=False)
def _step_all(accounts, views, episodes, last, last_views, market, rules, actions):
    n, parts = len(accounts), numba.get_num_threads()
    if parts == 1:
        _step_some(accounts, views, episodes, last, last_views, market, rules, actions, 0, n)
        return
    for p in numba.prange(parts):
        begin, end = p * n // parts, (p + 1) * n // parts
        _step_some(accounts, views, episodes, last, last_views, market, rules, actions, begin, end)


@compiled
def _survey_all(accounts, market, rules):
    for i in range(len(accounts)):
        a = accounts[i]
        a.held = 0
        for slot in range(len(a.lots)):
            if a.lots[slot].quantity > ZERO:
                a.held |= 1 << slot
        _survey(a, market[a.t].before, rules[0])
