"""Options of the command line: numbers as people write them, groups in order, memory that is not there."""

import dataclasses

import pytest

from train import memory
from train.ppo.command import Command, parse
from train.ppo.config import Config
from train.ppo.run import train


def config(*args: str) -> Config:
    return parse(list(args), "train")[0]


@pytest.mark.parametrize(
    "text, number", [("3e6", 3_000_000), ("15_000_000", 15_000_000), ("2.5e6", 2_500_000), ("4000000", 4_000_000)]
)
def test_counts(text, number):
    assert config("--total-steps", text).total_steps == number
    assert config("--evaluate-every", text, "--checkpoint-every", text).evaluate_every == number


@pytest.mark.parametrize("text", ["1.5", "3e-1", "many", "nan", "1e400", "3e6x", ""])
def test_counts_that_are_none(text, capsys):
    with pytest.raises(SystemExit) as caught:
        config("--total-steps", text)
    assert caught.value.code == 2 and "whole number" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("text, fee", [("6bp", 0.0006), ("2.5BP", 0.00025), ("0.001", 0.001), ("0bp", 0.0)])
def test_costs_in_basis_points(text, fee):
    assert config("--taker-fee", text, "--slippage-base", text).params.taker_fee == fee


def test_a_cost_out_of_range_or_of_another_form(capsys):
    with pytest.raises(ValueError, match=r"taker_fee = 0.2 is not in \[0, 0.1\]"):
        config("--taker-fee", "2000bp")
    with pytest.raises(SystemExit):
        config("--taker-fee", "6 percent")
    assert "basis points" in " ".join("".join(capsys.readouterr()).split())


def test_options_make_settings_and_settings_make_options():
    given = config("--num-envs", "8", "--num-steps", "4", "--hidden", "8", "9", "--max-lots", "3", "--max-hold", "7")
    assert (given.hidden, given.env.max_lots, given.params.max_hold) == ((8, 9), 3, 7)
    assert Command.of(given).to_config() == given
    assert Config.from_json(given.to_json()) == given
    assert Command().to_config() == Config()
    # Earlier commands gave the environment's options with a prefix.
    assert config("--env.max-lots", "3", "--params.max-hold=7").env.max_lots == 3


def test_groups_stand_in_order(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "train")
    said = capsys.readouterr().out
    groups = ("run", "market-and-costs", "limits", "reward", "network", "ppo", "machine")
    places = [said.index(f"{name} options") for name in groups]
    assert places == sorted(places)


@pytest.mark.parametrize("change", [{"colour": 1}, {"gamma": None}, {"params": {"nonsense": 1}}, {"num_envs": 0}])
def test_settings_of_another_program_are_refused(change):
    values = Config().to_json() | change
    values = {name: value for name, value in values.items() if value is not None or name != "gamma"}
    with pytest.raises(ValueError):
        Config.from_json(values)


def test_a_run_that_cannot_fit_says_so(tmp_path, monkeypatch):
    small = Config(
        num_envs=16, num_steps=8, total_steps=256, hidden=(8,), dataset="synthetic:crash?bars=12000",
        run_dir=tmp_path / "run",
    )  # fmt: skip
    there = {"bytes": 1000}
    monkeypatch.setattr(memory, "device_bytes", lambda: there["bytes"])
    with pytest.raises(
        ValueError, match=r"at least, before anything is compiled\) and the device has .* lower num_envs"
    ):
        train(small)
    assert not (tmp_path / "run").exists()
    # More than the stored steps, less than the program: the market alone is larger.
    there["bytes"] = 300_000
    with pytest.raises(ValueError, match=r"the compiled program\) and the device has"):
        train(dataclasses.replace(small, evaluate_every=0))
    assert not (tmp_path / "run").exists()
