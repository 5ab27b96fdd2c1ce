"""The command line: what a run leaves behind, how it refuses, and how it is interrupted."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from perpjax import AutoReset, VecEnv
from train.checkpoint import CHECKPOINT
from train.metrics import summarise
from train.ppo.__main__ import main
from train.ppo.config import Config, ParamArgs
from train.ppo.run import init_state, load_learner, make_env, make_ppo

TINY = ("--num-envs", "16", "--num-steps", "8", "--hidden", "8", "--env.max-lots", "2", "--env.episode-length", "96")
STEPS = ("--total-steps", str(16 * 8 * 3 + 5))
SMALL_DATA = "synthetic:crash?bars=12000"


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A finished run, in this process, on wild data."""
    run_dir = tmp_path_factory.mktemp("cli") / "deep" / "run"
    main([*TINY, *STEPS, "--dataset", SMALL_DATA, "--seed", "7", "--run-dir", str(run_dir)])
    return run_dir


def read_lines(path: pathlib.Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_valid_lines(run):
    lines = read_lines(run / "metrics.jsonl")
    # 389 steps are three updates of 128; the five left over are not trained.
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert [line["steps"] for line in lines] == [128, 256, 384]
    always = {"update", "steps", "steps_per_second", "seconds", "reward", "entropy", "kl", "policy_loss", "value_loss"}
    for line in lines:
        assert always <= set(line)
        assert all(isinstance(v, int | float) and math.isfinite(v) for v in line.values())
        # What is per episode is there if an episode ended, and only then.
        for name in ("episode_return", "trades", "liquidations"):
            assert (name in line) == (line["episodes"] > 0), line
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))


def test_config_says_what_was_run(run):
    config = json.loads((run / "config.json").read_text())
    assert config["dataset"] == SMALL_DATA and config["seed"] == 7 and config["num_envs"] == 16
    assert config["env"]["episode_length"] == 96 and config["params"]["taker_fee"] == 0.0006
    assert set(config) == {f for f in Config.__dataclass_fields__}


def test_checkpoint_loads_with_the_configuration_that_was_written(run):
    saved = json.loads((run / "config.json").read_text())
    config = Config(num_envs=16, num_steps=8, total_steps=389, hidden=tuple(saved["hidden"]), dataset=saved["dataset"])
    learner = load_learner(run, make_ppo(config), make_env(config, "val"))
    assert int(learner.update) == 3
    assert float(learner.observations.count) == pytest.approx(384, rel=1e-3)


def test_a_run_leaves_nothing_else_behind(run):
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.jsonl", CHECKPOINT}


# Wrong values.


def refused(capsys, *args: str) -> str:
    """The line a wrong value is answered with; exit status 2, one line, no traceback."""
    with pytest.raises(SystemExit) as caught:
        main([*TINY, *args])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "args, says",
    [
        (["--num-envs", "0"], ["num_envs", "0", "at least 1"]),
        (["--num-envs", "-3"], ["num_envs", "-3"]),
        (["--epochs", "0"], ["epochs", "0"]),
        (["--num-minibatches", "3"], ["3", "does not divide", "16"]),
        (["--num-minibatches", "0"], ["0", "16"]),
        (["--total-steps", "100"], ["100", "16", "8", "128"]),
        (["--updates-per-chunk", "2", *STEPS], ["2", "does not divide", "3"]),
        (["--learning-rate", "-0.1"], ["learning_rate", "-0.1"]),
        (["--learning-rate", "nan"], ["learning_rate", "nan"]),
        (["--gamma", "1.5"], ["gamma", "1.5"]),
        (["--hidden", "8", "0"], ["hidden", "0"]),
        (["--max-grad-norm", "inf"], ["max_grad_norm", "inf"]),
        (["--seed", str(2**70)], ["seed", str(2**70)]),
        (["--num-envs", str(10**12)], ["num_envs", str(10**12), "int32"]),
        (["--num-steps", str(10**12)], ["num_steps", str(10**12), "int32"]),
        (["--num-envs", str(2**31), "--num-steps", "1"], ["num_envs", str(2**31), "int32"]),
        (["--total-steps", str(10**19)], ["total_steps", str(10**19), "int32"]),
        (["--epochs", str(10**12), *STEPS], ["epochs", str(10**12), "int32"]),
        (["--hidden", "16385"], ["hidden", "16385", "16384"]),
        (["--hidden", str(10**12)], ["hidden", str(10**12)]),
        (["--params.max-hold", str(2**30 + 1)], ["max_hold", str(2**30 + 1)]),
        (["--params.max-hold", str(10**400)], ["max_hold", "inf"]),
        (["--env.actions", "box5"], ["box5", "multi_discrete"]),
        (["--params.taker-fee", "0.5"], ["taker_fee", "0.5", "0.1"]),
        (["--params.max-leverage", "nan"], ["max_leverage", "nan"]),
        (["--dataset", "synthetic:nope"], ["nope", "signal", "martingale", "crash"]),
        (["--dataset", "synthetic:signal?bars=x"], ["bars", "x"]),
        (["--dataset", "nowhere/at/all"], ["nowhere/at/all", "manifest.json"]),
        (["--dataset", SMALL_DATA, "--env.episode-length", "5000"], ["5000", "too short"]),
    ],
    ids=lambda x: " ".join(x) if x and x[0].startswith("--") else "",
)
def test_wrong_values_are_one_line(capsys, tmp_path, monkeypatch, args, says):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *args)
    for words in says:
        assert words in line
    # Nothing was begun.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "good, bad, says",
    [
        # 4 minibatches of each update: the optimiser's steps.
        (dict(total_steps=2**31 - 1), dict(total_steps=2**31), "optimiser"),
        # One environment alone: its steps, and so its episodes.
        (
            dict(num_envs=1, num_minibatches=1, num_steps=8, total_steps=2**31 - 1),
            dict(num_envs=1, num_minibatches=1, num_steps=8, total_steps=2**31),
            "of each of the num_envs 1",
        ),
        # 672 + 32 bars of each environment may end in an update.
        (
            dict(num_envs=3_050_402, num_steps=32, num_minibatches=1, total_steps=10**9),
            dict(num_envs=3_050_403, num_steps=32, num_minibatches=1, total_steps=10**9),
            "episodes that end",
        ),
        (dict(hidden=(2**14,)), dict(hidden=(2**14 + 1,)), "hidden"),
        (dict(params=ParamArgs(max_hold=2**30)), dict(params=ParamArgs(max_hold=2**30 + 1)), "max_hold"),
    ],
)
def test_what_the_counters_hold(good, bad, says):
    few = dict(num_envs=4, num_steps=1, num_minibatches=4, epochs=1)
    Config(**few | good)
    with pytest.raises(ValueError, match=says):
        Config(**few | bad)


def test_steps_of_the_metrics_are_counted_by_the_host():
    config = Config(num_envs=2**20, num_steps=32, num_minibatches=1, total_steps=2**44)
    line = summarise({"episodes": np.int32(0)}, config.num_updates, config.num_updates * config.steps_per_update)
    assert line["steps"] == 2**44 and json.loads(json.dumps(line)) == line


def test_every_seed_is_its_own_run():
    """Seeds that agree in their low 32 bits begin with other keys and other parameters."""
    config = Config(num_envs=16, num_steps=8, total_steps=128, hidden=(8,), dataset=SMALL_DATA)
    envs, begun = VecEnv(AutoReset(make_env(config, "train"))), []
    for seed in (0, 2**32, -1, 2**32 - 1):
        state = init_state(make_ppo(dataclasses.replace(config, seed=seed)), envs)
        leaves = jax.random.key_data(state.key), jax.tree.leaves(state.learner.params)[1]
        begun.append([x.tobytes() for x in map(np.asarray, leaves)])
    assert all(len(set(kind)) == 4 for kind in zip(*begun, strict=True))


@pytest.mark.parametrize("option, value", [("--env.max-lots", 1025), ("--env.episode-length", 2**31)])
def test_a_choice_out_of_range_is_told_by_the_parser(capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        main([*TINY, option, str(value)])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and f"= {value} is not an integer" in err and "Traceback" not in err


def test_a_dataset_of_garbage_is_one_line(capsys, tmp_path):
    (tmp_path / "manifest.json").write_text("{not json")
    assert str(tmp_path) in refused(capsys, "--dataset", str(tmp_path))
    file = tmp_path / "candles.parquet"
    file.write_bytes(b"PAR1")
    assert str(file) in refused(capsys, "--dataset", str(file))


def test_an_existing_run_is_not_overwritten(capsys, run):
    before = (run / "metrics.jsonl").read_text()
    line = refused(capsys, *STEPS, "--dataset", SMALL_DATA, "--run-dir", str(run))
    assert str(run) in line and "already" in line
    assert (run / "metrics.jsonl").read_text() == before


def test_a_run_directory_that_cannot_be_made_is_one_line(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for where in (file, file / "below"):
        assert str(where) in refused(capsys, *STEPS, "--dataset", SMALL_DATA, "--run-dir", str(where))


def test_values_that_the_parser_refuses_are_named(capsys):
    """Of the kinds that never become a `Config`: the parser's own message, and the same exit status."""
    for args, says in (
        (["--num-envs", "many"], "many"),
        (["--env.max-lots", "0"], "max_lots = 0"),
        (["--env.intrabar", "psychic"], "pessimistic"),
        (["--nonsense", "3"], "--nonsense"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2
        assert says in "".join(capsys.readouterr()), args


def leaves(config, prefix: str = "--") -> list[str]:
    names = []
    for name, field in config.__dataclass_fields__.items():
        value = getattr(config, name)
        flag = prefix + name.replace("_", "-")
        names += leaves(value, flag + ".") if hasattr(value, "__dataclass_fields__") else [flag]
        assert field is not None
    return names


@functools.cache
def help_text() -> str:
    """`--help`, in a process of its own with a wide terminal."""
    env = os.environ | {"COLUMNS": "200", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "train.ppo", "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_explains_every_option():
    said = help_text()
    lines = [line.strip("│ ") for line in said.splitlines()]
    silent = []
    for flag in leaves(Config()):
        at = [i for i, line in enumerate(lines) if line.split()[:1] == [flag]]
        assert len(at) == 1, f"{flag} is not in the help"
        # What the option means, beside it or in the lines before the next option.
        text = [lines[at[0]].removeprefix(flag)]
        for line in lines[at[0] + 1 :]:
            if not line or line.startswith(("--", "╰")):
                break
            text.append(line)
        # Without the type or the choices before it, and the default after it, something is said.
        said = re.sub(r"^\s*(\{.*?\}|[^a-z]*)\s", "", " ".join(text)).split("(default")[0]
        if not re.search(r"[a-z]{3,}", said):
            silent.append(flag)
    assert not silent


# Ctrl-C.


def wait_for(path: pathlib.Path, process: subprocess.Popen, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no metrics line"
        time.sleep(0.1)


def test_interrupt_saves_and_exits_clean(tmp_path):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "train.ppo",
        *TINY,
        "--total-steps",
        "1_000_000_000",
    ]
    process = subprocess.Popen(
        [*command, "--dataset", SMALL_DATA, "--run-dir", str(run_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    try:
        wait_for(run_dir / "metrics.jsonl", process, 120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "Traceback" not in err + out
    assert "stopped early" in out and str(run_dir) in "".join(out.split("\n"))
    assert "trained" in out and "hold" in out and "random" in out
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["update"] for line in lines] == list(range(1, len(lines) + 1))
    config = Config(num_envs=16, num_steps=8, total_steps=128, hidden=(8,), dataset=SMALL_DATA)
    learner = load_learner(run_dir, make_ppo(config), make_env(config, "val"))
    # The checkpoint is that of the last line.
    assert int(learner.update) == len(lines)
