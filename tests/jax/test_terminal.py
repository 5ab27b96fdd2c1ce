"""The terminal contract: what an episode's end returns, with AutoReset and without."""

import dataclasses
import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import FREE, HOLD, crash_market, expect, hand_market, order

from perpjax.env import PerpEnv
from perpjax.params import EnvConfig, EnvParams
from perpjax.state import State
from perpjax.vec import AutoReset, EpisodeState, VecEnv

CONFIG = EnvConfig(max_lots=3, episode_length=2)
_step = jax.jit(lambda env, state, action: env.step(state, action))
_reset = jax.jit(lambda env, key, start: env.reset(key, start))


def run(env: AutoReset, *actions: np.ndarray, start: int = 1) -> list[EpisodeState]:
    states = [_reset(env, jax.random.key(3), start)]
    for action in actions:
        states.append(_step(env, states[-1], jnp.asarray(action)))
    return states


def test_three_episode_ends_in_a_row():
    # Episodes of 2 bars: steps 2, 4 and 6 end one. A long is opened in the first bar of each.
    env = AutoReset(PerpEnv(hand_market(atr=100), FREE, CONFIG))
    long = order(1)
    states = run(env, long, HOLD, long, HOLD, long, HOLD, long)
    assert [bool(s.truncated) for s in states] == [False, False, True, False, True, False, True, False]
    assert not any(bool(s.terminated) for s in states)
    for i in (2, 4, 6):
        fresh = states[i]
        # The state is the fresh episode's: flat, a new start; the flags are the finished step's.
        expect(fresh, wallet=10_000, equity=10_000, open_lots=0, opened=0)
        assert 1 <= int(fresh.t) <= 6 and int(fresh.end) == int(fresh.t) + 2
        # final_obs shows the lot that was held; the fresh observation is flat at the new start.
        chex.assert_trees_all_close(np.asarray(fresh.final_obs[1:3]), np.float32([1 / 3, 1]))
        assert not np.asarray(fresh.obs[1:3]).any()
        assert float(fresh.obs[0]) == float(fresh.t)
        assert float(fresh.final_obs[0]) == float(states[i - 1].t) + 1
        assert int(fresh.episode.length) == 2 and int(fresh.episode.ledger.opened) == 1
    for i in (1, 3, 5, 7):
        # Not absorbed: the next step moved the fresh episode on by one bar, with its own statistics.
        assert int(states[i].t) == int(states[i - 1].t) + 1 and int(states[i].episode.length) == 1
        expect(states[i], open_lots=1, opened=1)
        chex.assert_trees_all_equal(states[i].obs, states[i].final_obs)
    # The key stays, and is folded with the number of the episode.
    assert [int(s.resets) for s in states] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({np.asarray(jax.random.key_data(s.key)).tobytes() for s in states}) == 1


@pytest.mark.parametrize("side", [1, -1], ids=["long", "short"])
def test_liquidation_value_closes_what_is_open_at_the_end(side):
    # E = 1000 without slippage at entry; 1000 steps, 10 quote a tick. The last valid close is 1024, slip(1024) = 21:
    # a long is closed at 1003 and a short at 1045; the fee is 1/512 of 10 030 or 10 450. The mark is 1050.
    last = {(2, 0): (1000, 1024, 1000, 1024)}
    mark = {(2, k): (1000, 1050, 1000, 1050) for k in range(3)}
    market = hand_market(last=last, mark=mark, invalid=[(2, 1), (2, 2)], atr=10)
    action = order(side, stop=3.0, target=6.0)
    costly = FREE.replace(slippage_base=1 / 64, slippage_atr=0.5, taker_fee=1 / 512)
    env = PerpEnv(market, FREE, CONFIG)
    opened = env.step(env.reset(jax.random.key(0), 1), action)
    expect(opened, lot_entry=1000, lot_quantity=1000, wallet=10_000)
    plain = PerpEnv(market, costly, CONFIG).step(opened, HOLD)
    episodes = AutoReset(PerpEnv(market, costly, CONFIG))
    begun = episodes.reset(jax.random.key(0), 1)
    begun = begun.replace(**{name: getattr(opened, name) for name in ("t", "obs", "equity", "account")})
    ended = episodes.step(begun, HOLD)
    worth = 10_000 + 30 - 10_030 / 512 if side > 0 else 10_000 - 450 - 10_450 / 512
    np.testing.assert_allclose(ended.episode.liquidation_value, worth, rtol=1e-7)
    np.testing.assert_allclose(ended.episode.equity, 10_000 + 500 * side, rtol=1e-7)
    np.testing.assert_allclose(episodes.env.liquidation_value(plain), worth, rtol=1e-7)
    # Before its end an episode says its equity; the next one begins with its own.
    assert float(begun.episode.liquidation_value) == float(begun.episode.equity)
    assert float(ended.equity) == 10_000
    # The same in a batch, slot by slot and all at once; what is lost beyond the margin is not paid here either.
    for size in (3, 256):
        many = VecEnv(episodes)
        state = many.reset(jax.random.split(jax.random.key(0), size), np.full(size, 1))
        for step in (action, HOLD):
            state = many.step(state, np.broadcast_to(step, (size, 5)))
        one = episodes.step(episodes.step(episodes.reset(jax.random.key(0), 1), action), HOLD)
        np.testing.assert_allclose(state.episode.liquidation_value, float(one.episode.liquidation_value), rtol=1e-6)
        if side > 0:  # the short is stopped
            assert float(one.episode.liquidation_value) < float(one.episode.equity)


def test_nothing_is_lost_beyond_the_margin_when_everything_is_closed():
    # The last price ends at 700, the mark stays: 3000 lost on paper, 1000 of margin.
    market = hand_market(last={(2, 2): (1000, 1000, 700, 700)}, atr=200)
    env = PerpEnv(market, FREE.replace(taker_fee=1 / 512), CONFIG)
    state = env.step(env.step(env.reset(jax.random.key(0), 1), order(1, stop=3.0)), HOLD)
    margin = float(state.account.lots.margin[0])
    np.testing.assert_allclose(env.liquidation_value(state), float(state.account.wallet) - margin, rtol=1e-7)
    assert float(env.liquidation_value(env.reset(jax.random.key(0), 1))) == 10_000


def donate(state: State) -> None:
    """Give a state away, as a training loop does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some arrays cannot be reused, which is said
        jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(state))


def test_every_public_state_can_be_donated():
    plain = PerpEnv(crash_market(bars=760), EnvParams(), EnvConfig(max_lots=2, episode_length=3))
    keys, one = jax.random.split(jax.random.key(0), 2), jax.random.key(1)
    for env, key, starts in (
        (plain, one, 700), (AutoReset(plain), one, 700), (VecEnv(plain), keys, np.full(2, 700)),
        (VecEnv(AutoReset(plain)), keys, np.full(2, 700)),
    ):  # fmt: skip
        for wrap in (lambda f: f, jax.jit):
            reset, step = wrap(env.reset), wrap(env.step)
            donate(reset(key))
            action = np.broadcast_to(order(1), (2, 5) if isinstance(env, VecEnv) else (5,))
            for steps in range(4):  # the third ends an episode
                state = reset(key, starts)
                for _ in range(steps):
                    state = step(state, action)
                donate(state)
        if isinstance(env, VecEnv):
            donate(VecEnv.by_row(env.reset(key)))
            donate(VecEnv.one(env.reset(key), 1))
    donate(jax.vmap(AutoReset(plain).reset)(keys))
    # The key that was given is not given away with the state.
    jax.random.key_data(keys), jax.random.key_data(one)


def test_every_reset_draws_anew():
    env, envs, first = AutoReset(PerpEnv(crash_market(bars=802, first=1), FREE, CONFIG)), 256, []
    starts = env.env.market.num_starts(CONFIG.episode_length)
    state = jax.vmap(env.reset)(jax.random.split(jax.random.key(0), envs))
    step = jax.jit(jax.vmap(AutoReset.step, (None, 0, 0)))
    for _ in range(4):
        first.append(np.asarray(state.t))
        for _ in range(CONFIG.episode_length):
            state = step(env, state, jnp.zeros((envs, 5), jnp.int32))
    # By chance one in `starts` is drawn again, by the same environment or by its neighbour.
    for before, after in itertools.pairwise(first):
        assert starts == 800 and (after == before).mean() < 0.03 and (after == np.roll(before, 1)).mean() < 0.03
    # 1 024 draws, an eighth of them in each eighth of the bars, to 5 sigma.
    eighths = np.histogram(first, np.linspace(1, 1 + starts, 9))[0]
    assert np.abs(eighths - 128).max() < 5 * np.sqrt(128 * 7 / 8), eighths


def test_a_ruined_episode_ends_terminated_with_its_own_reward():
    # Liquidated in bar 2: log(0.9), equity 9000 <= 0.95 * 10 000. The bar is also the last of the episode:
    # terminated, not truncated.
    params = FREE.replace(ruin_fraction=0.95)
    market = hand_market(mark={(2, 1): (900, 900, 900, 900)}, atr=100)
    env = AutoReset(PerpEnv(market, params, CONFIG))
    ended, moved = run(env, order(1, stop=3.0), HOLD, HOLD)[-2:]
    expect(ended, reward=np.log(0.9), terminated=True, truncated=False, wallet=10_000, liquidated=0)
    episode = ended.episode
    assert int(episode.ledger.liquidated) == 1 and int(episode.length) == 2
    np.testing.assert_allclose([episode.return_, episode.equity, episode.peak, episode.max_drawdown],
                               [np.log(0.9), 9000, 10_000, 0.1], rtol=1e-5)  # fmt: skip
    expect(moved, reward=0, terminated=False, truncated=False)
    assert float(moved.episode.return_) == 0 and int(moved.episode.length) == 1


def test_episode_statistics():
    # Marks close at +20 and -30 ticks of 10 quote: equity 10 200 and 9700. Return log(0.97), fall 500 / 10 200.
    mark = {(1, 2): (1000, 1020, 1000, 1020), (2, 2): (1000, 1000, 970, 970)}
    env = AutoReset(PerpEnv(hand_market(mark=mark, atr=100), FREE, CONFIG))
    states = run(env, order(1, stop=3.0), HOLD)
    np.testing.assert_allclose([float(s.episode.max_drawdown) for s in states], [0, 0, 500 / 10_200], rtol=1e-5)
    np.testing.assert_allclose([float(s.episode.return_) for s in states], np.log([1, 1.02, 0.97]), rtol=1e-5)
    last = states[-1].episode
    np.testing.assert_allclose([last.equity, last.peak], [9_700, 10_200], rtol=1e-5)
    assert int(last.length) == 2 and bool(states[-1].truncated)


@pytest.mark.parametrize("episodes_before", [0, 1])
def test_a_fall_in_the_first_bar_is_a_drawdown(episodes_before):
    # The mark closes every bar 50 ticks down: a long opened in the first bar of an episode loses 500 of 10 000 at
    # once. The peak is the equity the episode began with, in the first episode and in those an auto-reset began.
    mark = {(t, 2): (1000, 1000, 950, 950) for t in range(8)}
    env = AutoReset(PerpEnv(hand_market(mark=mark, atr=100), FREE, CONFIG))
    state = run(env, *[HOLD] * (2 * episodes_before), order(1, stop=3.0))[-1]
    expect(state, equity=9_500)
    np.testing.assert_allclose([state.episode.peak, state.episode.max_drawdown], [10_000, 0.05], rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class OtherFees:
    """A wrapper that draws the initial equity at each reset, as a randomised environment would."""

    env: PerpEnv

    def step(self, state: State, action: jax.Array) -> State:
        return self.env.step(state, action)

    def reset(self, key: jax.Array, start=None) -> State:
        equity = jax.random.randint(key, (), 1, 100).astype(jnp.float32) * 1000
        params = self.env.params.replace(initial_equity=equity)
        return dataclasses.replace(self.env, params=params).reset(key, start)


jax.tree_util.register_dataclass(OtherFees, ["env"], [])


def test_reset_goes_through_the_wrapped_environment():
    env = AutoReset(OtherFees(PerpEnv(hand_market(), FREE, CONFIG)))
    states = run(env, *[HOLD] * 8)
    assert len({float(s.equity) for s in states[2::2]}) >= 3  # each episode's own
    for before, after in zip(states[2:-1:2], states[3::2], strict=True):
        assert float(before.account.wallet) == float(after.account.wallet)


def test_auto_reset_in_a_batch():
    market = crash_market(bars=700 + 60)
    params = EnvParams(max_exposure=1.0, max_leverage=50.0, ruin_fraction=0.9)
    env = AutoReset(PerpEnv(market, params, EnvConfig(episode_length=12, max_lots=3)))

    @jax.jit
    def rollout(env: AutoReset, keys: jax.Array) -> tuple[EpisodeState, EpisodeState]:
        def advance(states, key):
            actions = jax.random.randint(key, (16, 5), 0, jnp.array([3, 4, 5, 4, 5]))
            states = jax.vmap(AutoReset.step, (None, 0, 0))(env, states, actions)
            return states, states

        first = jax.vmap(env.reset)(keys)
        return first, jax.lax.scan(advance, first, jax.random.split(jax.random.key(5), 40))[1]

    first, states = jax.device_get(rollout(env, jax.random.split(jax.random.key(0), 16)))
    chex.assert_tree_all_finite((states.obs, states.final_obs, states.reward, vars(states.episode)["max_drawdown"]))
    done = states.terminated | states.truncated
    assert (
        states.terminated.sum() > 3 and states.truncated.sum() > 3 and not (states.terminated & states.truncated).any()
    )
    # Lengths count from one after each end, and an episode never exceeds its 12 bars.
    length = np.zeros(16, int)
    before = first.t
    for i in range(40):
        length += 1
        chex.assert_trees_all_equal(states.episode.length[i], length.astype(np.int32))
        moved = ~done[i]
        assert (states.t[i][moved] == before[moved] + 1).all()
        # A done row is fresh: a new start within 673 .. N - 12, flat, without a past.
        fresh = done[i]
        assert ((states.t[i][fresh] >= 673) & (states.t[i][fresh] <= 760 - 12)).all()
        assert (states.account.wallet[i][fresh] == 10_000).all() and (states.account.ledger.opened[i][fresh] == 0).all()
        assert (states.episode.equity[i][states.terminated[i]] <= 9_000).all()
        assert (length[states.truncated[i]] == 12).all()
        length[fresh] = 0
        before = states.t[i]


def test_the_wrapped_state_has_every_field():
    names = set(EpisodeState.__dataclass_fields__)
    assert names == set(State.__dataclass_fields__) | {"final_obs", "episode", "resets"}
    state = _reset(AutoReset(PerpEnv(hand_market(), FREE, CONFIG)), jax.random.key(0), 1)
    assert isinstance(state, State) and isinstance(state, EpisodeState)
    chex.assert_trees_all_equal(state.final_obs, state.obs)
