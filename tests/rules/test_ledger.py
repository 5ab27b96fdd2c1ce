"""The identities of the ledger, at every one of 1000 random steps on a market that crashes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HOLD, all_bars, crash_market, expect, hand_market, order, play

from perpjax.env import PerpEnv
from perpjax.params import EnvConfig, EnvParams
from perpjax.rules.orders import CLOSE
from perpjax.state import SUMS, State, add, open_account, unrealised
from perpjax.vec import AutoReset

WILD = EnvParams(max_exposure=0.5, max_leverage=20.0, ruin_fraction=0.05, max_hold=5)
CONFIG = EnvConfig(max_lots=2, episode_length=100)
STEPS, ENVS = 125, 8


@pytest.fixture(scope="module")
def states() -> State:
    """[STEPS, ENVS] states of random play, restarted whenever an episode ends: 1000 steps."""
    env = AutoReset(PerpEnv(crash_market(), WILD, CONFIG))

    @jax.jit
    def rollout(env: AutoReset, key: jax.Array) -> State:
        def advance(state: State, key: jax.Array) -> tuple[State, State]:
            actions = jax.random.randint(key, (ENVS, 5), 0, jnp.array([3, 4, 5, 4, 5]))
            # One action in twenty closes everything.
            actions = actions.at[:, 0].set(jnp.where(jax.random.uniform(key, (ENVS,)) < 0.05, 3, actions[:, 0]))
            state = jax.vmap(lambda s, a: env.step(s, a))(state, actions)
            return state, state

        first = jax.vmap(env.reset)(jax.random.split(jax.random.key(7), ENVS))
        return jax.lax.scan(advance, first, jax.random.split(key, STEPS))[1]

    return jax.device_get(rollout(env, jax.random.key(1)))


def exact(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.asarray(high, np.float64) + np.asarray(low, np.float64)


def ledger_money(ledger) -> dict[str, np.ndarray]:
    return {n: exact(getattr(ledger, n), low) for n, low in zip(SUMS, ledger.low, strict=True)}


def test_random_play_sees_everything(states):
    ledger = states.episode.ledger
    for name in ("opened", "stopped", "targets", "timed_out", "closed", "liquidated", "ambiguous"):
        assert getattr(ledger, name).sum() > 0, name
    assert ledger.verdicts.sum((0, 1))[[0, 1, 2, 3, 4, 8]].min() > 0
    assert (states.terminated | states.truncated).sum() >= 3


def test_wallet_is_the_sum_of_its_postings(states):
    account = states.account
    money = ledger_money(account.ledger)
    wallet = exact(account.wallet, account.wallet_low)
    expected = 10_000 + money["realised"] - money["fees"] - money["funding"] - money["liquidation_losses"]
    size = 10_000 + sum(np.abs(money[n]) for n in ("realised", "fees", "funding", "liquidation_losses"))
    assert np.max(np.abs(wallet - expected) / size) < 1e-6
    # The high part is the sum, rounded.
    chex.assert_trees_all_equal(wallet.astype(np.float32), account.wallet)


def test_margins_are_covered_by_the_wallet(states):
    lots = states.account.lots
    posted = lots.margin.astype(np.float64).sum(-1)
    assert (lots.margin >= 0).all()
    assert (states.account.wallet >= posted * (1 - 1e-6) - 1e-3).all()


def test_every_lot_is_accounted_for(states):
    ledger, lots = states.account.ledger, states.account.lots
    ended = ledger.stopped + ledger.targets + ledger.timed_out + ledger.closed + ledger.liquidated
    chex.assert_trees_all_equal(ledger.opened, ended + (lots.quantity > 0).sum(-1))
    # A free slot is zero everywhere; a held one has a whole quantity, whole prices, a side and a margin.
    held = lots.quantity > 0
    for name in ("side", "quantity", "entry", "margin", "leverage", "stop", "target", "liquidation", "age"):
        leaf = getattr(lots, name)
        assert not leaf[~held].any(), name
        if name in ("quantity", "entry", "stop", "target", "liquidation"):
            chex.assert_trees_all_equal(leaf, np.round(leaf))
    assert set(np.unique(lots.side[held])) == {-1.0, 1.0}
    assert (np.abs(lots.side.sum(-1)) == held.sum(-1)).all(), "long and short at once"
    assert (lots.entry[held] >= 1).all() and (lots.age[held] >= 1).all() and (lots.leverage[held] <= 20).all()


def test_each_step_meets_one_verdict_and_opens_what_it_accepts(states):
    episode = states.episode
    chex.assert_trees_all_equal(episode.ledger.verdicts.sum(-1), episode.length)
    # ACCEPTED orders open a lot or close some.
    accepted = episode.ledger.verdicts[..., -1]
    assert (episode.ledger.opened <= accepted).all()


def test_equity_is_wallet_plus_unrealised(states):
    market, account = crash_market(), states.account
    done = states.terminated | states.truncated
    t = np.where(done, 0, states.t)
    mark = np.asarray(all_bars(market).mark_close, np.float64)[t - 1, -1]
    lots = jax.tree.map(lambda x: x.astype(np.float64), account.lots)
    floating = (lots.side * lots.quantity * (mark[..., None] - lots.entry)).sum(-1) * 1e-4
    equity = exact(account.wallet, account.wallet_low) + floating
    size = 10_000 + np.abs(floating)
    assert np.max(np.where(done, 0, np.abs(equity - states.equity) / size)) < 1e-6


def test_rewards_sum_to_the_log_of_the_equity_ratio(states):
    # Along every episode: sum of rewards = log(equity / initial), to 1e-6 of the sum of the rewards' sizes.
    for j in range(ENVS):
        total = size = 0.0
        for i in range(STEPS):
            total, size = total + float(states.reward[i, j]), size + abs(float(states.reward[i, j]))
            equity = float(states.episode.equity[i, j])
            if equity > 10:  # above the floor
                assert abs(total - np.log(equity / 10_000)) < 1e-6 * size + 1e-6, (i, j)
            np.testing.assert_allclose(states.episode.return_[i, j], total, atol=2e-5)
            if states.terminated[i, j] or states.truncated[i, j]:
                total = size = 0.0


def test_traded_notional_counts_fills():
    # 10 000 in, out at 1010: 10 100. A liquidation has no fill.
    market = hand_market(last={(2, 0): (1010, 1010, 1010, 1010)}, atr=100)
    expect(play(market, order(1), order(CLOSE))[-1], traded_notional=20_100)


def test_a_million_postings_do_not_drift():
    # 0.01 a million times on 10 000: plain float32 would be off by several units.
    amount = jnp.float32(0.01)
    total = jax.lax.fori_loop(0, 1_000_000, lambda _, x: add(x, amount), (jnp.float32(1e4), jnp.float32(0)))
    assert abs(float(exact(*total)) - (1e4 + 1e6 * float(amount))) < 1e-4
    naive = jax.lax.fori_loop(0, 1_000_000, lambda _, x: x + amount, jnp.float32(1e4))
    assert abs(float(naive) - 20_000) > 1


def test_two_float_sums_are_renormalised():
    rng = np.random.default_rng(0)
    amounts = rng.normal(size=500).astype(np.float32) * 10.0 ** rng.integers(-6, 5, 500)
    high, low = jnp.float32(0), jnp.float32(0)
    for x in amounts.astype(np.float32):
        high, low = add((high, low), jnp.float32(x))
    total = np.sum(amounts.astype(np.float32), dtype=np.float64)
    assert abs(float(exact(high, low)) - total) < 1e-9 * np.abs(amounts).sum()
    assert np.float32(exact(high, low)) == high


def test_an_idle_account_keeps_every_bit():
    states = play(hand_market(funding={3: (0.01, 1000)}), *[HOLD] * 6, params=FREE)
    for state in states:
        expect(state, wallet=10_000, wallet_low=0, equity=10_000, reward=0, fees=0, funding=0)


def test_unrealised_profit_of_lots_by_hand():
    # 3 steps bought at 90 and 5 at 110, marked at 100 with 0.5 quote a tick and step: (30 - 50) * 0.5.
    lots = open_account(jnp.float32(1000.0), 3).lots
    lots = lots.replace(side=jnp.array([1.0, 1, 0]), quantity=jnp.array([3.0, 5, 0]), entry=jnp.array([90.0, 110, 0]))
    assert float(unrealised(lots, jnp.float32(100.0), jnp.float32(0.5))) == -10
