"""The audit of the environment: the real one is clean, planted looks ahead are found in the leaf where they show."""

import dataclasses
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import HOLD, all_bars, crash_market

from perpjax import AutoReset, EnvConfig, EnvParams, PerpEnv, VecEnv, build_market, concatenate_markets
from perpjax._pytree import pytree
from perpjax.audit import audit_env
from perpjax.audit.environment import ALTERATIONS, alter_market
from perpjax.data import read_table
from perpjax.market import Market
from perpjax.rules.orders import sample_action
from perpjax.state import State
from perpjax.vec import unwrapped

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = EnvConfig(max_lots=3, episode_length=100)
PARAMS = EnvParams(max_exposure=0.5, ruin_fraction=0.0)


@pytest.fixture(scope="module")
def crash() -> Market:
    return crash_market(bars=900)


CONFIGS = [
    EnvConfig(actions=a, intrabar=i, reward=r, opposite=o, max_lots=3, episode_length=100)
    for (a, i), (r, o) in zip(
        itertools.product(("multi_discrete", "box5"), ("nearest", "pessimistic", "optimistic")),
        itertools.cycle([("log_return", "refuse"), ("shaped", "close"), ("shaped", "refuse")]),
        strict=False,
    )
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.actions}-{c.intrabar}-{c.reward}-{c.opposite}")
def test_the_environment_is_clean(crash, config):
    found = audit_env(PerpEnv(crash, PARAMS, config))
    assert found.accused == () and found.remarks == ()
    assert {"obs", "reward", "equity", "account.lots.stop", "account.ledger.low.0", "key"} <= {
        i.name for i in found.items
    }


def test_the_environment_is_clean_on_real_data(shared_data):
    candles, funding, mark = (
        read_table(shared_data / f"binance-um_ORCAUSDT_{name}_20241231_20260219.parquet")
        for name in ("perp_3m", "funding", "mark_1h")
    )
    market = build_market(candles.slice(0, 900 * 5), mark, funding.slice(0, 100), symbol="ORCAUSDT")
    found = audit_env(PerpEnv(market, PARAMS, CONFIG))
    assert found.accused == () and found.remarks == ()


def test_several_segments_and_a_subclass_that_is_no_pytree(crash):
    class Renamed(PerpEnv):
        pass

    markets = concatenate_markets([crash, crash_market(bars=800, seed=2)])
    found = audit_env(Renamed(markets, PARAMS, CONFIG), num_envs=8)
    assert found.accused == () and found.remarks == ()
    assert found.subject == "Renamed" and found.bars == 1700


# Planted faults.


@pytree(static=("config",))
class SeesNextFeatures(PerpEnv):
    def observe(self, t, view):
        return PerpEnv.observe(self, t + 1, view)


@pytree(static=("config",))
class RewardsNextClose(PerpEnv):
    def step(self, state, action):
        new = PerpEnv.step(self, state, action)
        bar = self.market.bar(new.t)
        return new.replace(reward=new.reward + jnp.log(bar.close[-1] / bar.open[0]))


@pytree(static=("config",))
class EndsBeforeACrash(PerpEnv):
    def step(self, state, action):
        new = PerpEnv.step(self, state, action)
        bar = self.market.bar(new.t)
        return new.replace(terminated=new.terminated | (bar.low.min() < 0.8 * bar.open[0]))


def next_atr(market: Market) -> Market:
    """Slippage, stops and targets in bar t by the ATR known at T_(t+1)."""
    return market.with_columns(atr=jnp.roll(market.atr, -1))


def next_funding(market: Market) -> Market:
    """What is settled at the open of bar t + 1 is charged at that of bar t."""
    c = market.candles
    return market.with_columns(candles=c.at[:, -3:-1].set(jnp.roll(c[:, -3:-1], -1, axis=0)))


def next_candles(market: Market) -> Market:
    """Highs and lows of bar t reach as far as those of bar t + 1: its exits are decided there."""
    c, k = market.candles, market.candles_per_bar
    later = jnp.roll(c, -1, axis=0)
    for block in (0, 4 * k):
        high, low = slice(block + k, block + 2 * k), slice(block + 2 * k, block + 3 * k)
        c = c.at[:, high].max(later[:, high]).at[:, low].min(later[:, low])
    return market.with_columns(candles=c)


def next_gap(market: Market) -> Market:
    """No order is filled before a bar without candles."""
    c, k = market.candles, market.candles_per_bar
    valid = slice(len(c[0]) - k - 3, len(c[0]) - 3)
    return market.with_columns(candles=c.at[:, valid].multiply(jnp.roll(c[:, valid], -1, axis=0)))


def next_mark(market: Market) -> Market:
    """The account at decision t is marked to the close of bar t."""
    c, k = market.candles, market.candles_per_bar
    return market.with_columns(candles=c.at[:, 8 * k - 1].set(jnp.roll(c[:, 8 * k - 1], -1)))


def stepping_in(peek) -> type[PerpEnv]:
    """An environment that steps in a market that was looked at ahead."""

    @pytree(static=("config",))
    class Peeking(PerpEnv):
        def step(self, state, action):
            return PerpEnv.step(PerpEnv(peek(self.market), self.params, self.config), state, action)

    return Peeking


@pytest.mark.parametrize(
    ("fault", "shows_in", "stays_clean"),
    [
        (RewardsNextClose, {"reward"}, {"obs", "equity"}),
        (EndsBeforeACrash, {"terminated"}, {"account.lots.side"}),
        (stepping_in(next_atr), {"account.lots.stop", "account.lots.entry", "equity"}, {"end"}),
        (stepping_in(next_funding), {"account.ledger.funding", "reward"}, {"account.lots.entry", "account.lots.stop"}),
        (stepping_in(next_candles), {"account.lots.quantity", "account.ledger.stopped"}, {"end"}),
        (stepping_in(next_gap), {"account.ledger.verdicts"}, {"end"}),
        (stepping_in(next_mark), {"equity", "obs", "reward"}, {"end"}),
    ],
    ids=["reward", "ending", "atr", "funding", "candles", "gap", "mark"],
)
def test_planted_faults_are_found(crash, fault, shows_in, stays_clean):
    found = audit_env(fault(crash, PARAMS, CONFIG))
    assert shows_in <= set(found.accused)
    assert not stays_clean & set(found.accused)
    for name in shows_in:
        move = found[name].movement
        assert move.bar <= move.cut and move.ahead == 1 and move.rows > 0 and move.amount > 0


def test_an_observation_of_the_next_features(crash):
    before = jax.tree.map(np.array, crash)
    env = SeesNextFeatures(crash, PARAMS, CONFIG)
    found = audit_env(env, cuts=[673, 800], num_envs=4)
    assert found.accused == ("obs",)
    item = found["obs"]
    # The first start that sees an altered row, at the cut itself; the two features lie before the account's numbers.
    assert (item.movement.bar, item.movement.cut, item.movement.ahead) == (673, 673, 1)
    assert item.remarks == ("entries 0, 1",)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["accused"] == ["obs"]
    assert "obs" in str(found) and "accused" in str(found)
    # The same again from the same seed, and the market is as it was.
    assert audit_env(env, cuts=[673, 800], num_envs=4) == found
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(crash), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_happens_inside_the_bar_is_no_look_ahead(crash):
    """An entry filled at the bar's close is a wrong rule, not a leak into what is known before the bar."""

    def opens_at_the_close(market: Market) -> Market:
        c, k = market.candles, market.candles_per_bar
        return market.with_columns(candles=c.at[:, :1].set(c[:, 4 * k - 1 : 4 * k]))

    assert audit_env(stepping_in(opens_at_the_close)(crash, PARAMS, CONFIG)).accused == ()


# Wrappers.


@dataclasses.dataclass(frozen=True)
class Renamed:
    """A user's wrapper, which is no pytree: costs a little reward in each step, or looks at the next bar's close."""

    env: Any
    peeks: bool = False

    def reset(self, key, start=None):
        return self.env.reset(key, start)

    def step(self, state, action):
        new = self.env.step(state, action)
        close = unwrapped(self).market.bar(new.t).close[-1] if self.peeks else 0.0
        return new.replace(reward=new.reward - 1e-3 - 1e-9 * close)


def test_an_auto_reset_is_left_out(crash):
    env = PerpEnv(crash, PARAMS, CONFIG)
    found = audit_env(env, num_envs=4)
    assert found.accused == () and found.subject == "PerpEnv"
    for wrapped in (AutoReset(env), VecEnv(AutoReset(env)), AutoReset(AutoReset(env))):
        assert audit_env(wrapped, num_envs=4) == found


def test_a_wrapper_of_the_user_is_audited(crash):
    env = PerpEnv(crash, PARAMS, CONFIG)
    for inner in (env, AutoReset(env)):
        found = audit_env(AutoReset(Renamed(inner)), num_envs=4)
        assert found.accused == () and found.remarks == () and found.subject == "Renamed"
        assert audit_env(AutoReset(Renamed(inner, peeks=True)), num_envs=4).accused == ("reward",)
    assert audit_env(Renamed(Renamed(env, peeks=True)), num_envs=4).accused == ("reward",)


# The audit's power, and its arguments.


def test_it_says_when_there_was_nothing_to_see(crash):
    env = PerpEnv(crash, PARAMS, CONFIG)
    found = audit_env(env, policy=lambda key, state, carry: (jnp.asarray(HOLD), carry), cuts=[800])
    assert found.accused == () and len(found.remarks) == 2
    assert "no lot was opened" in found.remarks[0] and "never differed" in found.remarks[1]


def test_wrong_arguments_are_errors(crash):
    env = PerpEnv(crash, PARAMS, CONFIG)
    for cut in (672, 900):
        with pytest.raises(ValueError, match=f"start = {cut}"):
            audit_env(env, cuts=[cut])
    with pytest.raises(ValueError, match="num_envs = 0"):
        audit_env(env, num_envs=0)
    with pytest.raises(ValueError, match="seed is -1; it must be an integer in"):
        audit_env(env, seed=-1)


@pytest.mark.parametrize("has_mark", [True, False])
@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_markets_keep_the_past_and_stay_well_formed(alteration, has_mark):
    market, cut = crash_market(bars=720, has_mark=has_mark), 690
    late = cut + ALTERATIONS[alteration]
    altered = alter_market(market, cut, alteration, np.random.default_rng(0))
    before, after = (jax.tree.map(np.asarray, all_bars(m)) for m in (market, altered))
    prices = [f"{kind}{x}" for kind in ("", "mark_") for x in ("open", "high", "low", "close")]
    for name in (*prices, "valid", "funding_rate", "funding_price", "mark_before", "atr", "atr_after"):
        a, b = getattr(before, name), getattr(after, name)
        known = {"mark_before": cut + 1, "atr": late, "atr_after": late - 1}.get(name, cut)
        np.testing.assert_array_equal(a[:known], b[:known])
        assert not np.array_equal(a[known:], b[known:]), name
    for name in ("atr", "features"):
        a, b = (np.asarray(getattr(m, name)) for m in (market, altered))
        np.testing.assert_array_equal(a[:late], b[:late])
        assert (a[late:] != b[late:]).mean() > 0.8
    for kind in ("", "mark_"):
        open_, high, low, close = (getattr(after, f"{kind}{x}") for x in ("open", "high", "low", "close"))
        for x in (open_, close):
            assert (low <= x).all() and (x <= high).all()
        assert (low >= 1).all() and (high == np.round(high)).all()
    np.testing.assert_array_equal(after.mark_before[1:], after.mark_close[:-1, -1])
    np.testing.assert_array_equal(after.funding_price[cut:], after.mark_open[cut:, 0])
    close, valid = after.close.ravel(), after.valid.ravel()
    for x in (after.open, after.high, after.low, after.close):
        np.testing.assert_array_equal(x.ravel()[1:][~valid[1:]], close[:-1][~valid[1:]])
    assert (np.asarray(altered.atr) >= 1).all()


@pytest.mark.parametrize("actions", ["multi_discrete", "box5"])
def test_orders_are_decided_at_the_open(actions):
    """Verdict, size, fill and levels of an order in bar t do not see the rest of bar t."""
    t, rng = 740, np.random.default_rng(0)
    market = crash_market(bars=800, seed=4)
    env = PerpEnv(market, EnvParams(max_exposure=0.5), EnvConfig(actions=actions, episode_length=100, max_lots=4))
    k, row = market.candles_per_bar, np.asarray(market.candles[t])
    candles = np.array(alter_market(market, t, "perturbed", rng).candles)
    for series in (0, 4 * k):  # the last price, then the mark: the first candle's open stays, the rest moves a little
        moved = np.round(row[series : series + 4 * k].reshape(4, k) * rng.uniform(0.998, 1.002, k))
        candles[t, series : series + 4 * k] = moved.ravel()
        first = candles[t, series : series + 4 * k].reshape(4, k)[:, 0]
        first[0] = row[series]
        first[1], first[2] = max(first[1], first[0]), min(first[2], first[0])
    candles[t, -k - 3], candles[t, -3:-1] = row[-k - 3], row[-3:-1]  # valid, and what is settled at the open
    other = market.with_columns(candles, market.atr.at[t + 1 :].multiply(3))

    def walk(env: PerpEnv, key: jax.Array) -> State:
        def step(state, key):
            return env.step(state, sample_action(key, env.config)), None

        state, _ = jax.lax.scan(step, env.reset(key, t - 20), jax.random.split(key, 20))
        return state

    keys = jax.random.split(jax.random.key(1), 256)
    states = jax.jit(jax.vmap(walk, (None, 0)))(env, keys)
    step = jax.jit(jax.vmap(lambda env, s, key: env.step(s, sample_action(key, env.config)), (None, 0, 0)))
    a, b = (jax.device_get(step(env.replace(market=m), states, keys).account) for m in (market, other))
    np.testing.assert_array_equal(a.ledger.verdicts, b.ledger.verdicts)
    np.testing.assert_array_equal(a.ledger.opened, b.ledger.opened)
    new = (a.lots.age == 1) & (b.lots.age == 1)
    assert new.sum() > 5 and (a.wallet != b.wallet).any()
    for name in ("side", "quantity", "entry", "margin", "leverage", "stop", "target", "liquidation"):
        np.testing.assert_array_equal(getattr(a.lots, name)[new], getattr(b.lots, name)[new], err_msg=name)
