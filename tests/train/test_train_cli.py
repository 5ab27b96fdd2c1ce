"""The command line: what a run leaves behind, and how it refuses."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import numpy as np
import processes
import pytest
from processes import DATA as SMALL_DATA
from processes import TINY, environ, read_lines

from perpjax import AutoReset, VecEnv
from train.checkpoint import list_steps
from train.metrics import summarise
from train.ppo.__main__ import main
from train.ppo.command import Command, parse
from train.ppo.config import Config, ParamArgs
from train.ppo.environment import make_env
from train.ppo.load import load_policy
from train.ppo.run import init_state, make_ppo
from train.record import create_folder, point_latest, remove_unused

STEPS = ("--total-steps", str(16 * 8 * 3 + 5))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A finished run, in this process, on wild data."""
    run_dir = tmp_path_factory.mktemp("cli") / "deep" / "run"
    main([*TINY, *STEPS, "--seed", "7", "--run-dir", str(run_dir)])
    return run_dir


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
    record = json.loads((run / "config.json").read_text())
    settings = record["settings"]
    assert settings["dataset"] == SMALL_DATA and settings["seed"] == 7 and settings["num_envs"] == 16
    assert settings["env"]["episode_length"] == 96 and settings["params"]["taker_fee"] == 0.0006
    assert set(settings) == {f for f in Config.__dataclass_fields__}
    assert Config.from_json(settings).num_updates == 3
    assert record["dataset"]["name"] == SMALL_DATA and len(record["dataset"]["train"]) == 64
    assert [session["first_step"] for session in record["sessions"]] == [0]


def test_evaluation_is_whole_json(run):
    """Of every policy the means over the windows are those of the listed returns."""
    text = (run / "evaluation.json").read_text()
    record = json.loads(text, parse_constant=lambda c: pytest.fail(c))
    assert record["split"] == "val" and record["bars"] == 96
    assert set(record["policies"]) == {"best", "final", "flat", "random"}
    for name, policy in record["policies"].items():
        assert len(policy["returns"]) == record["windows"] > 1
        assert policy["return"] == pytest.approx(np.mean(policy["returns"]), abs=1e-9)
        assert ("step" in policy) == (name in ("best", "final"))
    flat = record["policies"]["flat"]
    assert flat["return"] == flat["trades"] == 0 and flat["t"] is None and flat["standard_error"] == 0
    assert record["policies"]["final"]["step"] == 384


def test_the_policy_loads(run):
    final = load_policy(run, "final")
    assert final.step == 384 and float(final.observations.count) == pytest.approx(384, rel=1e-3)
    best = max(read_lines(run / "evaluations.jsonl"), key=lambda look: look["closed_return"])
    assert load_policy(run).step == best["steps"]


def test_a_run_leaves_nothing_else_behind(run):
    names = {"config.json", "metrics.jsonl", "evaluations.jsonl", "evaluation.json", "checkpoints"}
    assert {p.name for p in run.iterdir()} == names
    assert all(p.name.isdecimal() for p in (run / "checkpoints").iterdir()) and list_steps(run)[-1] == 384
    assert os.readlink(run.parent / "latest") == run.name
    assert {p.name for p in run.parent.iterdir()} == {"latest", run.name}


# The run folder.


@pytest.mark.parametrize("given", [False, True])
def test_runs_of_one_second_never_share_a_folder(tmp_path, monkeypatch, given):
    """Eight at once: eight folders with one name and a number, or one winner of a given folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.record.time.strftime", lambda form, *now: "20250101-000000")
    barrier, made, refused = threading.Barrier(8), [], []

    def make():
        barrier.wait()
        try:
            made.append(create_folder(pathlib.Path("mine") if given else None, "data-seed0"))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if given:
        assert made == [pathlib.Path("mine")] and len(refused) == 7 and all("mine" in text for text in refused)
    else:
        stem = "data-seed0-20250101-000000"
        assert {p.name for p in made} == {stem, *(f"{stem}-{i}" for i in range(2, 9))} and not refused


def test_an_unused_folder_is_removed_and_a_used_one_is_not(tmp_path):
    for name, used in (("new", None), ("metrics", "metrics.jsonl"), ("saved", "checkpoints")):
        folder = create_folder(tmp_path / name, "")
        (folder / "metrics.jsonl").write_text("{}\n" if used == "metrics.jsonl" else "")
        if used == "checkpoints":
            (folder / "checkpoints").mkdir()
        remove_unused(folder)
        assert folder.exists() == (used is not None) and (folder / "config.json").exists() == (used is not None)
    # A file of the user's stays.
    folder = create_folder(tmp_path / "notes", "")
    (folder / "notes.txt").touch()
    remove_unused(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_latest_is_only_a_convenience(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        point_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == tmp_path / name

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "symlink_to", refuse)
        point_latest(tmp_path / "a")
        assert (tmp_path / "latest").read_text() == "a\n"
        patch.setattr(os, "replace", refuse)
        point_latest(tmp_path / "b")
    assert (tmp_path / "latest").read_text() == "a\n"
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    point_latest(tmp_path / "a")
    assert (tmp_path / "latest").is_dir() and not (tmp_path / "latest").is_symlink()


# Options.


def test_counts_and_basis_points():
    config, resumed = parse(["--total-steps", "3e6", "--num-envs", "1_024", "--taker-fee", "4bp"], "train")
    assert (config.total_steps, config.num_envs, config.params.taker_fee) == (3_000_000, 1024, 0.0004)
    assert resumed is None
    assert parse(["--taker-fee", "0.0004"], "train")[0] == parse(["--taker-fee", "4bp"], "train")[0]


def test_earlier_flags_still_work():
    new = ["--max-lots", "3", "--episode-length", "96", "--taker-fee", "0.001", "--max-hold", "5"]
    old = ["--env.max-lots", "3", "--env.episode-length=96", "--params.taker-fee", "0.001", "--params.max-hold", "5"]
    assert parse(old, "train") == parse(new, "train")
    assert parse(old, "train")[0].env.max_lots == 3


def test_options_and_settings_are_the_same():
    """Every setting goes through the command line and config.json unchanged."""
    config, _ = parse(["--max-lots", "3", "--taker-fee", "4bp", "--hidden", "9", "7", "--run-dir", "x"], "train")
    assert Command.of(config).to_config() == config
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    for odd in ({"new": 1}, {}):
        values = config.to_json() | odd
        if not odd:
            del values["gamma"]
        with pytest.raises(ValueError, match="new is an unknown setting" if odd else "gamma is a missing setting"):
            Config.from_json(values)


# Wrong values.


def refused(capsys, *args: str) -> str:
    """The line a wrong value is answered with; exit status 2, one line, no traceback."""
    return processes.refused(capsys, *TINY, *args)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--num-envs", "0"], ["num_envs", "0", "at least 1"]),
        (["--num-envs", "-3"], ["num_envs", "-3"]),
        (["--epochs", "0"], ["epochs", "0"]),
        (["--num-minibatches", "3"], ["3", "does not divide", "16"]),
        (["--num-minibatches", "0"], ["0", "16"]),
        (["--total-steps", "100"], ["100", "16", "8", "128"]),
        (["--updates-per-chunk", "0", *STEPS], ["updates_per_chunk", "0", "at least 1"]),
        (["--checkpoint-every", "0", *STEPS], ["checkpoint_every", "0", "at least 1"]),
        (["--evaluate-every", "-1", *STEPS], ["evaluate_every", "-1", "at least 0"]),
        (["--init-from", "nowhere"], ["nowhere"]),
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
        (["--max-hold", str(2**30 + 1)], ["max_hold", str(2**30 + 1)]),
        (["--max-hold", str(10**400)], ["max_hold", "inf"]),
        (["--actions", "box5"], ["box5", "refuse", "--opposite close"]),
        (["--gru-width", "8"], ["gru_width", "8", "mlp"]),
        (["--network", "gru", "--gru-width", "0"], ["gru_width", "0"]),
        (["--network", "gru", "--policy", "mine:net"], ["gru", "mine:net"]),
        (["--policy", "mine"], ["mine", "module:function"]),
        (["--policy", "no_such_module:net"], ["no_such_module:net", "No module named"]),
        (["--policy", "math:pi"], ["math:pi", "float"]),
        (["--policy", "copy:copy"], ["copy:copy", "Config", "lacks init"]),
        (["--taker-fee", "0.5"], ["taker_fee", "0.5", "0.1"]),
        (["--max-leverage", "nan"], ["max_leverage", "nan"]),
        (["--dataset", "synthetic:nope"], ["nope", "signal", "martingale", "crash"]),
        (["--dataset", "synthetic:signal?bars=x"], ["bars", "x"]),
        (["--dataset", "nowhere/at/all"], ["nowhere/at/all", "manifest.json"]),
        (["--dataset", SMALL_DATA, "--episode-length", "5000"], ["5000", "too short"]),
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


@pytest.mark.parametrize("option, value", [("--max-lots", 1025), ("--episode-length", 2**31)])
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
        (["--max-lots", "0"], "max_lots = 0"),
        (["--intrabar", "psychic"], "pessimistic"),
        (["--nonsense", "3"], "--nonsense"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 2
        assert says in "".join(capsys.readouterr()), args


@functools.cache
def help_text() -> str:
    """`--help`, in a process of its own, in one column."""
    env = environ() | {"COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-m", "train.ppo", "--help"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_explains_every_option():
    said = help_text()
    lines = [line.strip("│ ") for line in said.splitlines()]
    silent = []
    for name in Command().values():
        flag = "--" + name.replace("_", "-")
        at = [i for i, line in enumerate(lines) if line.split(",")[0].split()[:1] == [flag]]
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
