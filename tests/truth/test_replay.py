"""Every lot that lived, by the twin's replay, and its picture: hand-made markets, every number worked out by hand.

See `markets`: a long of size 1 at 10x, opened at 1000, has its stop at 980, its target at 1060 and L = 909. The
quantity is a tenth of the wallet, rounded down, for 10 quote of notional a step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markets import CONFIG, FREE, HAND, HOLD, crash_market, hand_market, order, play, reset, step

from perpjax.audit.draws import draw_actions
from perpjax.audit.replay import LotLife, replay_lots
from perpjax.data.markets import concatenate_markets
from perpjax.env import PerpEnv
from perpjax.params import EnvConfig, EnvParams
from perpjax.vec import VecEnv

pytestmark = pytest.mark.usefixtures("quick_compilation")

LONG, SHORT, CLOSE = order(1), order(-1), order(2)
PARAMS = FREE.replace(max_hold=3)
LENGTH = dataclasses.replace(CONFIG, episode_length=14)
ACTIONS = [LONG, LONG, HOLD, LONG, HOLD, HOLD, SHORT, HOLD, LONG, HOLD, LONG, CLOSE, LONG]
MARKET = hand_market(
    bars=16,
    both={
        (1, 1): (1000, 1005, 975, 1000),  # bar 1 opens and stops
        (3, 2): (1000, 1061, 1000, 1000),  # the target, one tick beyond it
        (6, 2): (1000, 1007, 1000, 1007),  # the third bar of a lot: it times out
        (8, 0): (1030, 1030, 1000, 1000),  # beyond the short's stop at 1020
        (10, 1): (1000, 1000, 905, 1000),  # beyond the liquidation price, and the stop at 980 that comes first
        (12, 0): (1000, 1003, 1000, 1000),
    },
    mark={(10, 1): (909.5, 1000, 905, 1000)},  # the mark opens between the price of before the funding and of after
    funding={10: (0.001, 1000)},
)
# Slot, side, quantity, entry, stop, target, bar of entry, liquidation prices, bar and candle of the end, how, fill.
LIVES = [
    (0, 1, 1000, 1000, 980, 1060, 1, [909], 1, 1, "stopped", 980),
    (0, 1, 980, 1000, 980, 1060, 2, [909, 909], 3, 2, "target", 1060),  # 10 000 - 200
    (0, 1, 1038, 1000, 980, 1060, 4, [909, 909, 909], 6, 2, "timed_out", 1007),  # 9800 + 588
    (0, -1, 1046, 1000, 1020, 940, 7, [1090, 1090], 8, 0, "stopped", 1030),  # 10 388 + 72.66
    # 10 460.66 - 313.8. Funding takes a tick of the cushion: L = 1000 - ceil((99 - 10) / 0.99).
    (0, 1, 1014, 1000, 980, 1060, 9, [909, 910], 10, 1, "liquidated", 910),
    (0, 1, 913, 1000, 980, 1060, 11, [909, 909], 12, 0, "closed", 1000),  # 10 146.86 - 1014
    (0, 1, 913, 1000, 980, 1060, 13, [909], None, None, None, None),
]


def read(life: LotLife) -> tuple:
    """As in LIVES."""
    lot, end = life.lot, life.exit
    ended = (end.candle, end.how, end.price) if end else (None, None, None)
    levels = (lot.side, lot.quantity, lot.entry, lot.stop, lot.target)
    return (life.slot, *levels, life.entry_bar, life.liquidations, life.exit_bar, *ended)


@pytest.fixture(scope="module")
def env():
    return PerpEnv(MARKET, PARAMS, LENGTH)


@pytest.fixture(scope="module")
def states():
    return play(MARKET, *ACTIONS, params=PARAMS, config=LENGTH)


def test_every_lot_by_hand(env, states):
    lives = replay_lots(env, states, ACTIONS)
    assert [read(life) for life in lives] == LIVES
    np.testing.assert_allclose([x.lot.margin for x in lives], [1000, 980, 1038, 1046, 1014, 913, 913], rtol=1e-6)
    assert all(life.lot.age == 0 and life.lot.liquidation == life.liquidations[0] for life in lives)
    gains = [life.exit.realised for life in lives[:-1]]
    np.testing.assert_allclose(gains, [-200, 588, 72.66, -313.8, 0, 0], rtol=1e-6)
    # The mark close of 1000 repeats to the end: equity has no open profit.
    lost = 1014 - 10.14  # what funding left of the margin
    assert float(states[-1].equity) == pytest.approx(10_000 + sum(gains) - 10.14 - lost, abs=1e-2)


def test_lots_held_in_the_first_state_are_known(env, states):
    lives = replay_lots(env, states[9:], ACTIONS[9:])  # the first is at bar 10, with the fifth lot in it
    assert [read(life) for life in lives] == [(*LIVES[4][:7], [910], *LIVES[4][8:]), *LIVES[5:]]
    assert lives[0].lot.age == 1 and lives[0].lot.liquidation == 909


def test_a_single_state_has_the_lots_held_in_it(env, states):
    (life,) = replay_lots(env, states[5:6], [])
    assert read(life) == (*LIVES[2][:7], [], None, None, None, None)
    assert replay_lots(env, states[:1], []) == []


def test_a_slot_taken_again_in_the_bar_that_freed_it():
    """Bar 2 opens at 905: L, 909, is gone by then; the lot opened there, at 905, stops at 885 in the same bar."""
    after = {(t, k): (905, 905, 905, 905) for t in range(2, 8) for k in range(3)}
    market = hand_market(both=after | {(2, 2): (905, 905, 880, 905)})
    lives = replay_lots(PerpEnv(market, FREE, CONFIG), play(market, LONG, LONG, HOLD), [LONG, LONG, HOLD])
    assert [read(life)[6:] for life in lives] == [
        (1, [909, 909], 2, 0, "liquidated", 909),
        (2, [905 - 83], 2, 2, "stopped", 885),  # (90.5 - 9.05) / 0.99 = 82.3
    ]
    assert [life.slot for life in lives] == [0, 0] and lives[1].lot.age == 0


def test_several_lots_at_once_end_in_the_order_of_their_slots():
    half = order(1, size=0.5)
    market = hand_market(both={(3, 1): (1000, 1000, 979, 1000)})
    actions = [half, half, HOLD]
    lives = replay_lots(PerpEnv(market, FREE, CONFIG), play(market, *actions), actions)
    assert [read(life)[6:] for life in lives] == [
        (1, [909, 909, 909], 3, 1, "stopped", 980),
        (2, [909, 909], 3, 1, "stopped", 980),
    ]
    assert [(life.slot, life.lot.quantity) for life in lives] == [(0, 500), (1, 250)]


def test_a_market_of_several_origins():
    """The second symbol, whose tick is ten times as dear, so that a tenth of the steps are bought."""
    dear = dataclasses.replace(HAND, symbol="DEAR", tick_size=10.0)
    both = concatenate_markets([MARKET, hand_market(both={(2, 1): (1000, 1000, 979, 1000)}, instrument=dear)])
    start = 17 + 1
    states = play(both, LONG, HOLD, HOLD, config=CONFIG, start=start)
    (life,) = replay_lots(PerpEnv(both, FREE, CONFIG), states, [LONG, HOLD, HOLD])
    assert read(life) == (0, 1, 100, 1000, 980, 1060, start, [909, 909], start + 1, 1, "stopped", 980)


def test_a_wild_episode_accounts_for_every_lot():
    config, rng = EnvConfig(episode_length=150), np.random.default_rng(3)
    env = PerpEnv(crash_market(bars=900), EnvParams(max_exposure=0.5, max_hold=12), config)
    actions, states = draw_actions(rng, config, 150, 1)[:, 0], [reset(env, 700)]
    for action in actions:
        states.append(step(env, states[-1], jnp.asarray(action)))
    lives, ledger, lots = replay_lots(env, states, actions), states[-1].account.ledger, states[-1].account.lots
    assert len(lives) == ledger.opened > 20
    assert [life.entry_bar for life in lives] == sorted(life.entry_bar for life in lives)
    counts = {"stopped": "stopped", "target": "targets", "timed_out": "timed_out", "closed": "closed"}
    for how, name in (counts | {"liquidated": "liquidated"}).items():
        assert sum(life.exit is not None and life.exit.how == how for life in lives) == getattr(ledger, name), how
    held = {life.slot: life.lot.entry for life in lives if life.exit is None}
    assert held == {i: float(x) for i, x in enumerate(lots.entry) if lots.quantity[i] > 0}
    assert any(life.exit_bar == life.entry_bar for life in lives)


def test_a_disagreement_is_an_error_that_names_the_bar(env, states):
    wrong = list(states)
    lots = wrong[6].account.lots
    lots = lots.replace(stop=lots.stop.at[0].add(1))  # after bar 6, in which the third lot timed out
    wrong[6] = wrong[6].replace(account=wrong[6].account.replace(lots=lots))
    with pytest.raises(ValueError, match=r"disagree in bar 6: slot 0, .*stop"):
        replay_lots(env, wrong, ACTIONS)
    with pytest.raises(ValueError, match=r"disagree in bar 2: slot 0"):
        replay_lots(env, states, [LONG, HOLD, *ACTIONS[2:]])
    with pytest.raises(ValueError, match=r"disagree in bar 3: "):
        replay_lots(env.replace(market=hand_market(bars=16)), states[1:], ACTIONS[1:])


def test_states_that_are_no_episode_are_refused(env, states):
    with pytest.raises(ValueError, match=r"states 2 and 3 are at bars 3 and 5"):
        replay_lots(env, [*states[:3], *states[4:]], [*ACTIONS[:3], *ACTIONS[4:]])
    with pytest.raises(ValueError, match="14 states and 12 actions"):
        replay_lots(env, states, ACTIONS[:-1])
    batch = VecEnv(env).reset(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"\(2,\) environments"):
        replay_lots(env, [batch], [])


def test_after_its_end_an_episode_stands_still():
    short = dataclasses.replace(CONFIG, episode_length=3)
    market, actions = hand_market(), [LONG, HOLD, HOLD, HOLD, CLOSE]
    (life,) = replay_lots(PerpEnv(market, FREE, short), play(market, *actions, config=short), actions)
    assert life.exit is None and life.liquidations == [909] * 3


# The picture


def drawn(ax, kind: str) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of the lines of one kind, by the number of their lot."""
    lines = [line for line in ax.lines if (line.get_gid() or "").startswith(kind + " ")]
    return {x.get_gid().split()[-1]: tuple(np.asarray(v).tolist() for v in x.get_data(orig=True)) for x in lines}


@pytest.fixture
def ax():
    figure = pytest.importorskip("matplotlib.figure", reason="needs the viz extra: pip install -e '.[viz]'").Figure()
    return figure.add_subplot()


def test_every_lot_is_drawn_where_it_lived(ax, env, states):
    from perpjax.audit.plotting import plot_bars

    plot_bars(ax, env, states, ACTIONS)
    entries = {str(n): ([life[6] - 1], [life[3]]) for n, life in enumerate(LIVES, 1)}
    assert drawn(ax, "entry") == entries
    # In the middle of the candle, a third of a bar; the first bar is bar 1.
    assert drawn(ax, "exit stopped") == {"1": ([0.5], [980]), "4": ([7 + 0.5 / 3], [1030])}
    assert drawn(ax, "exit target") == {"2": ([2 + 2.5 / 3], [1060])}
    assert drawn(ax, "target")["2"] == ([1, 2, 3], [1060] * 3)
    assert drawn(ax, "exit timed_out") == {"3": ([5 + 2.5 / 3], [1007])}
    assert drawn(ax, "exit liquidated") == {"5": ([9.5], [910])}
    assert drawn(ax, "exit closed") == {"6": ([11 + 0.5 / 3], [1000])}
    assert drawn(ax, "stop")["1"] == ([0, 2 / 3], [980, 980])
    assert drawn(ax, "liquidation")["5"] == ([8, 9, 9 + 2 / 3], [909, 910, 910])
    assert drawn(ax, "liquidation")["7"] == ([12, 13], [909, 909])
    # Of lots that follow each other nothing is moved aside.
    stops = [x for x in ax.lines if (x.get_gid() or "").startswith("stop ")]
    heights = {x.get_transform().transform((0, 980.0))[1] for x in stops}
    assert len(stops) == len(LIVES) and len(heights) == 1
    assert [x.get_text() for x in ax.get_xticklabels()] == [str(t) for t in range(1, 15)]


def test_levels_far_away_do_not_squash_the_candles(ax, env, states):
    """Only bars 2 and 3: candles of 1000 to 1061, so that levels from 969.5 to 1091.5 are shown, and L = 909 is not."""
    from perpjax.audit.plotting import plot_bars

    plot_bars(ax, env, states[1:4], ACTIONS[1:3])
    margin = 0.12 * (1061 - 980)
    np.testing.assert_allclose(ax.get_ylim(), (980 - margin, 1061 + margin))
    assert [x.get_text() for x in ax.texts if x.get_gid() == "edge 1"] == ["↓ 1 liquidation 909"]


def test_lots_that_share_everything_are_told_apart(ax):
    """Two lots of one entry, one stop and one fill."""
    from perpjax.audit.plotting import plot_bars

    actions = [order(1, size=0.5), order(1, size=0.5), HOLD]
    market = hand_market(both={(3, 1): (1000, 1000, 979, 1000)})
    plot_bars(ax, PerpEnv(market, FREE, CONFIG), play(market, *actions), actions)
    assert drawn(ax, "exit stopped") == {"1": ([2.5], [980]), "2": ([2.5], [980])}
    one, two = (x for x in ax.lines if (x.get_gid() or "").startswith("exit "))
    assert one.get_color() != two.get_color()
    assert one.get_markersize() < two.get_markersize() and one.get_zorder() > two.get_zorder()
    numbers = [x for x in ax.texts if x.get_gid().startswith("number") and x.xy == (2.5, 980)]
    assert [x.get_text() for x in numbers] == ["1", "2"] and numbers[0].xyann != numbers[1].xyann
    ax.figure.canvas.draw()
    one, two = (x for x in ax.lines if (x.get_gid() or "").startswith("stop "))
    pixels = [x.get_transform().transform((1.5, 980.0))[1] for x in (one, two)]
    assert pixels[1] - pixels[0] == pytest.approx(1.5 / 72 * ax.figure.dpi)


def test_a_lot_held_before_the_picture_begins_at_its_edge(ax, env, states):
    from perpjax.audit.plotting import plot_bars

    plot_bars(ax, env, states[9:], ACTIONS[9:])
    assert drawn(ax, "entry") == {"1": ([0], [1000]), "2": ([1], [1000]), "3": ([3], [1000])}
    faces = [x.get_markerfacecolor() for x in ax.lines if (x.get_gid() or "").startswith("entry")]
    assert faces[0] == "white" and "white" not in faces[1:]
    assert drawn(ax, "liquidation")["1"] == ([0, 2 / 3], [910, 910])


def test_the_legend_names_what_is_there(ax, env, states):
    from perpjax.audit.plotting import plot_bars

    plot_bars(ax, env, states[:4], ACTIONS[:3])
    ends, lots = ["exit: stopped", "exit: target"], ["lot 1, long", "lot 2, long"]
    labels = [x.get_text() for x in ax.get_legend().get_texts()]
    assert labels == ["entry", *ends, "stop", "target", "liquidation", *lots]


def test_what_disagrees_is_not_drawn(ax, env, states):
    from perpjax.audit.plotting import plot_bars

    with pytest.raises(ValueError, match="disagree in bar 2"):
        plot_bars(ax, env, states, [LONG, HOLD, *ACTIONS[2:]])
    assert not ax.lines


def test_no_bar_is_drawn_after_the_end_of_the_episode(ax):
    from perpjax.audit.plotting import plot_bars

    short = dataclasses.replace(CONFIG, episode_length=3)
    market, actions = hand_market(), [LONG, HOLD, HOLD, HOLD, CLOSE]
    env, states = PerpEnv(market, FREE, short), play(market, *actions, config=short)
    plot_bars(ax, env, states, actions)
    assert [x.get_text() for x in ax.get_xticklabels()] == ["1", "2", "3", "4"]
    assert drawn(ax, "stop") == {"1": ([0, 1, 2, 3], [980] * 4)}
    with pytest.raises(ValueError, match="no bar lies between"):
        plot_bars(ax, env, states[3:], actions[3:])
