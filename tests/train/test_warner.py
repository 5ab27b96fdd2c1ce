"""Each warning at its threshold and just before it, and only once in a run."""

import json
import pathlib

import pytest

from train.hooks import RunInfo
from train.hooks.warner import UPDATES, Warner

EPISODES = {"trades": 10.0, "liquidations": 1.0, "fees": 30.0, "slippage": 20.0, "funding": -10.0, "gross_profit": 50.0}
"""All is well: costs of 40 and a profit of 50."""


def play(lines: list[dict], warner: Warner | None = None) -> tuple[list[str], Warner]:
    """Return the warnings of a session, and the hook."""
    said: list[str] = []
    warner = warner or Warner(said.append)
    warner.say = said.append
    warner.on_updates([{"update": i, "steps": 10 * i} | line for i, line in enumerate(lines, 1)])
    return said, warner


def play_episodes(updates: int = UPDATES, **metrics: float | None) -> list[str]:
    line = {name: value for name, value in (EPISODES | metrics).items() if value is not None}
    return play([line] * updates)[0]


def test_a_good_run_has_no_warnings():
    assert play([{"entropy": 2.0, "kl": 0.01} | EPISODES] * 50)[0] == []
    assert play([{}] * 50)[0] == []


@pytest.mark.parametrize(("entropy", "warnings"), [(0.1, 0), (0.0999, 1)])
def test_entropy_collapse(entropy, warnings):
    said, _ = play([{"entropy": 2.0}, {"entropy": 3.0}, {"entropy": entropy}])
    assert len(said) == warnings
    assert all(x.startswith("warning: update 3: entropy collapsed from 2 to") for x in said)
    assert all("raise entropy_coef" in x for x in said)


def test_a_negative_first_entropy_is_no_measure():
    assert play([{"entropy": -1.0}, {"entropy": -2.0}])[0] == []


@pytest.mark.parametrize(("kl", "warnings"), [(0.1, 0), (0.1001, 1)])
def test_kl(kl, warnings):
    said, _ = play([{"kl": 0.01}, {"kl": kl}])
    assert len(said) == warnings
    assert all("update 2: KL 0.1 is above" in x and "lower learning_rate or epochs" in x for x in said)


@pytest.mark.parametrize(("updates", "last", "warnings"), [(9, 0.0, 0), (10, 0.1, 0), (10, 0.0, 1)])
def test_no_trades(updates, last, warnings):
    """Updates without ended episodes do not count."""
    idle = EPISODES | {"trades": 0.0, "gross_profit": 0.0, "liquidations": 0.0}
    said, _ = play([idle, {}] * (updates - 1) + [idle | {"trades": last, "gross_profit": 500.0}])
    assert len(said) == warnings
    assert all("no trades in 10 updates, the policy has stopped trading" in x for x in said)


def test_one_trade_begins_the_count_anew():
    idle = EPISODES | {"trades": 0.0, "liquidations": 0.0}
    assert play([idle] * 9 + [EPISODES] + [idle] * 9)[0] == []
    assert len(play([idle] * 9 + [EPISODES] + [idle] * 10)[0]) == 1


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"gross_profit": 40.0}, None),
        ({"gross_profit": 39.9}, "costs of an episode are 40.00, above its gross profit of 39.90"),
        ({"gross_profit": 0.1}, "trade less often, or lower the costs"),
        ({"gross_profit": 0.1, "funding": -51.0}, None),
        ({"gross_profit": 39.9, "slippage": None}, None),
        ({"gross_profit": 0.0}, "trades lose before costs"),
        ({"gross_profit": -5.0}, "gross profit of an episode is -5.00 in 10 updates"),
        ({"gross_profit": None}, None),
    ],
)
def test_costs(metrics, words):
    assert play_episodes(UPDATES - 1, **metrics) == []
    said = play_episodes(**metrics)
    assert len(said) == (words is not None) and all(words in x for x in said)


def test_costs_are_judged_by_their_average():
    """Nine good updates outweigh a bad one of 139 less, and not one of 141 less."""
    lines = [EPISODES | {"gross_profit": 50.0}] * 9
    assert play([*lines, EPISODES | {"gross_profit": -49.0}])[0] == []
    assert len(play([*lines, EPISODES | {"gross_profit": -51.0}])[0]) == 1


@pytest.mark.parametrize(("liquidations", "warnings"), [(9.9, 0), (10.0, 1), (None, 0)])
def test_liquidations(liquidations, warnings):
    assert play_episodes(UPDATES - 1, liquidations=liquidations) == []
    said = play_episodes(liquidations=liquidations)
    assert len(said) == warnings and all("every lot was liquidated" in x and "lower max_leverage" in x for x in said)


BAD = [{"entropy": 2.0, "kl": 0.2} | EPISODES | {"liquidations": 10.0, "gross_profit": 1.0}]
BAD += [{"entropy": 0.01, "kl": 0.2} | BAD[0] | {"entropy": 0.01}] * 30 + [EPISODES | {"gross_profit": -1e9}]
BAD += [EPISODES | {"trades": 0.0}] * 10


def test_each_warning_is_said_once_also_after_a_resume():
    said, warner = play(BAD)
    assert len(said) == 6 and len({x.split(": ", 2)[2] for x in said}) == 6
    assert play(BAD, warner)[0] == []
    resumed = Warner(print)
    resumed.set_state(json.loads(json.dumps(warner.get_state())))
    assert play(BAD, resumed)[0] == []


@pytest.mark.parametrize("cut", range(1, len(BAD)))
def test_a_resume_loses_no_count(cut):
    said, warner = play(BAD[:cut])
    resumed = Warner(print)
    resumed.set_state(json.loads(json.dumps(warner.get_state())))
    later, _ = play(BAD[cut:], resumed)
    assert [x.split(": ", 2)[2] for x in said + later] == [x.split(": ", 2)[2] for x in play(BAD)[0]]


@pytest.mark.parametrize(("total_steps", "warnings"), [(400, 1), (401, 0)])
def test_profit_is_judged_after_a_quarter_of_the_run(total_steps, warnings):
    """The tenth update ends at step 100."""
    warner = Warner(print)
    warner.on_start(RunInfo(pathlib.Path("run"), "data", "MLP", "cpu", 1, total_steps, 0, 0, 1e4))
    said, _ = play([EPISODES | {"gross_profit": -5.0}] * UPDATES, warner)
    assert len(said) == warnings and all("trades lose before costs" in x for x in said)
