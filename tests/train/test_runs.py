"""Runs are found, listed, shown and compared; also damaged, hostile and unfinished ones."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest
from rich.cells import cell_len

from train.run_tables import show_command, show_number, show_steps
from train.runs import Run, find_run, main

ROOT = pathlib.Path(__file__).resolve().parents[2]
UPDATE = 4096 * 32
FIGURES = {"return": 0.0123, "closed_return": 0.0125, "max_drawdown": 0.0213, "trades": 12.3, "liquidations": 0.02,
           "fees": 0.00231, "slippage": 0.00112, "funding": -0.0001}  # fmt: skip


def make_run(
    folder: pathlib.Path,
    name: str,
    updates: int = 114,
    ended: bool = True,
    began: str = "2026-11-28T08:15:49Z",
    **other,
) -> pathlib.Path:
    """A run folder as the trainer writes it: 114 updates of 131072 steps are a whole run."""
    path = folder / name
    (path / "checkpoints").mkdir(parents=True)
    settings = {"dataset": "synthetic:signal", "num_envs": 4096, "num_steps": 32, "total_steps": 15_000_000, "seed": 0,
                "hidden": [64, 64], "learning_rate": 0.001, "env": {"episode_length": 672},
                "params": {"taker_fee": 0.0006}, "run_dir": str(path)} | other  # fmt: skip
    session = {
        "command": ["/x/train/ppo/__main__.py", "--seed", "0"], "began": began, "first_step": 0,
        "device": "cpu (2 cores)", "versions": {"perpjax": "0.1.0", "jax": "0.10.0"}, "commit": "6874288",
    }  # fmt: skip
    dataset = {
        "name": settings["dataset"],
        "train": "ab" * 32,
        "val": "cd" * 32,
        "features": ["f1"],
        "symbols": ["BTC"],
    }
    record = {"settings": settings, "policy": "MLP 64-64", "dataset": dataset, "sessions": [session]}
    write(path / "config.json", {"format": 1} | session | record)
    lines = [{"update": i, "steps": i * UPDATE, "steps_per_second": 62415.5, "episode_return": 0.001 * i}
             for i in range(1, updates + 1)]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    looks = [{"update": i, "steps": i * UPDATE, "windows": 64, "best": i <= 48} | FIGURES | {"closed_return": i / 1e4}
             for i in range(6, updates + 1, 6)]  # fmt: skip
    (path / "evaluations.jsonl").write_text("".join(json.dumps(look) + "\n" for look in looks))
    (path / "checkpoints" / str(updates * UPDATE)).mkdir()
    (path / "checkpoints" / "131072.orbax-checkpoint-tmp").mkdir()
    if ended:
        learnt = FIGURES | {"standard_error": 0.00123, "t": 10.0, "returns": [0.0123]}
        policies = {"best": learnt | {"step": 60 * UPDATE, "closed_return": 0.0234},
                    "final": learnt | {"step": updates * UPDATE, "closed_return": 0.0211},
                    "flat": learnt | {"t": None, "standard_error": None}}  # fmt: skip
        write(path / "evaluation.json", {"split": "val", "windows": 93, "bars": 672, "policies": policies})
    return path


def write(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value))


def call(capsys, monkeypatch, *args: object, width: int = 140) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", str(width))
    status = main([str(arg) for arg in args])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture
def say(capsys, monkeypatch):
    """Runs a command line: (exit status, stdout, stderr)."""
    return lambda *args, width=140: call(capsys, monkeypatch, *args, width=width)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, and the process in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Finding.


def test_a_run_is_found_by_path_name_beginning_and_latest(elsewhere):
    runs = pathlib.Path("runs")
    for name in ("a-seed0-20261128-081549", "a-seed1-20261128-081549", "b"):
        make_run(runs, name)
    make_run(elsewhere, "far")
    assert find_run("b") == find_run("runs/b") == find_run(runs / "b") == runs / "b"
    assert find_run("a-seed1") == runs / "a-seed1-20261128-081549"
    assert find_run("far") == pathlib.Path("far") and find_run(elsewhere / "far") == elsewhere / "far"
    (runs / "latest").symlink_to("b", target_is_directory=True)
    assert find_run("latest") == find_run("runs/latest") == runs / "b"
    (runs / "latest").unlink()
    (runs / "latest").write_text("a-seed0-20261128-081549\n")
    assert find_run("latest") == runs / "a-seed0-20261128-081549"


def test_a_run_that_is_not_found_names_the_nearest(elsewhere):
    with pytest.raises(ValueError, match=r"no run x: runs has no runs; `python -m train\.ppo` makes one"):
        find_run("x")
    runs = pathlib.Path("runs")
    for i in range(7):
        make_run(runs, f"a{i}")
    for name, says in (
        ("b3", "no run b3: runs has .*a3.*; see `python -m train.runs list`"),
        ("a", "a begins the names of 7 runs: runs has .*, ...; see"),
        ("", "no run ''"),
        ("latest", "runs/latest is not there: runs has a"),
        ("runs", "no run runs"),
        ("./runs", "runs is not the folder of a run"),
        ("runs/gone", "no run runs/gone"),
        ("\x1b[2J", r"no run \\x1b\[2J"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            find_run(name)
        assert len(re.findall(r"\ba\d\b", str(caught.value))) <= 5 and "\x1b" not in str(caught.value)
    (runs / "latest").symlink_to("gone")
    with pytest.raises(ValueError, match="runs/latest points to gone, which is not there"):
        find_run("latest")
    with pytest.raises(ValueError, match="list --dir other"):
        make_run(pathlib.Path("other"), "c")
        find_run("d", "other")


# Reading.


def test_a_run_is_read(tmp_path):
    run = Run(make_run(tmp_path, "a"))
    assert run.settings()["total_steps"] == 15_000_000 and run.config()["device"] == "cpu (2 cores)"
    assert [line["update"] for line in run.metrics()] == list(range(1, 115)) and len(run.evaluations()) == 19
    assert run.closing()["policies"]["final"]["step"] == 114 * UPDATE
    assert run.checkpoint_steps() == [114 * UPDATE] and run.status() == "finished"


def test_the_status_counts_whole_updates(tmp_path):
    assert Run(make_run(tmp_path, "a", updates=57, ended=False)).status() == "50 % done"
    assert Run(make_run(tmp_path, "b", updates=113, ended=False)).status() == "99 % done"
    assert Run(make_run(tmp_path, "c", updates=114, ended=False)).status() == "100 % done"
    resumed = make_run(tmp_path, "d", total_steps=30_000_000)
    with open(resumed / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"steps": 171 * UPDATE}) + "\n")
    assert Run(resumed).status() == "75 % done"  # evaluation.json is that of the first end, after 114 updates
    (tmp_path / "d" / "metrics.jsonl").unlink()
    (tmp_path / "d" / "evaluation.json").unlink()
    assert Run(resumed).status() == "0 % done" and Run(resumed).metrics() == []


def test_a_cut_last_line_is_left_out(tmp_path):
    run = Run(make_run(tmp_path, "a", ended=False))
    text = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(text[:-20])
    assert len(run.metrics()) == 113 and run.cuts() == ["metrics.jsonl, line 114: cut"]
    (run.path / "metrics.jsonl").write_text(text[:-1])  # whole but for the line's end
    assert len(run.metrics()) == 114 and run.cuts() == []


DAMAGES = [
    ("config.json", None, "config.json: missing"),
    ("config.json", b"", "config.json, line 1: empty"),
    ("config.json", b'{"format": 1,\n"settings": {', "config.json, line 2: not JSON"),
    ("config.json", b"[]", "config.json, line 1: not a JSON object"),
    ("config.json", b'{"format": 2}', "config.json: format is 2; this version of perpjax reads format 1"),
    ("config.json", b'{"format": 1}', "config.json: it has no settings"),
    ("config.json", b'{\n"a": "\xff"}', "config.json, line 2: not UTF-8 text"),
    ("metrics.jsonl", b'{"steps": 1}\n{"ste\n{"steps": 3}\n', "metrics.jsonl, line 2: not JSON"),
    ("metrics.jsonl", b'{"steps": 1}\n{"update": 2}\n', "metrics.jsonl, line 2: it has no number of steps"),
    ("metrics.jsonl", b'{"steps": 1}\n\0\0\0\n', "metrics.jsonl, line 2: not JSON"),
    ("metrics.jsonl", b"[" * 100_000 + b"\n", "metrics.jsonl, line 1: not JSON"),
    ("evaluations.jsonl", b"7\n", "evaluations.jsonl, line 1: not a JSON object"),
    ("evaluation.json", b"{}", "evaluation.json: it has no policies"),
    ("evaluation.json", b'{"policies": {"final": 3}}', "evaluation.json: policy final is not a JSON object"),
]


@pytest.mark.parametrize("name, content, says", DAMAGES, ids=[says for _, _, says in DAMAGES])
def test_damage_is_one_line_and_a_row(tmp_path, say, name, content, says):
    make_run(tmp_path, "whole")
    path = make_run(tmp_path, "torn") / name
    path.unlink() if content is None else path.write_bytes(content)
    for command in (("show", "torn"), ("compare", "whole", "torn")):
        status, out, err = say(*command, "--dir", tmp_path)
        assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
        assert f"torn/{says}" in err
    status, out, err = say("list", "--dir", tmp_path, width=200)
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line.split()[:1] != ["run"]}
    assert (status, err) == (0, "") and "damaged" in rows["torn"] and "finished" in rows["whole"]
    line = re.search(r", line (\d)", says)
    assert (f"{name}:{line[1]}" if line else name) in " ".join(out.split())


# Listing.


def test_a_list_is_newest_first_with_figures(tmp_path, say):
    make_run(tmp_path, "old", began="2026-11-27T08:15:49Z")
    make_run(tmp_path, "new", updates=57, ended=False, began="2026-11-28T08:15:49Z")
    (tmp_path / "latest").symlink_to("new")
    (tmp_path / "ladder-20261128-081549").mkdir()
    (tmp_path / "notes.txt").write_text("")
    status, out, _ = say("list", "--dir", tmp_path)
    _, _, new, old, *notes = out.splitlines()
    assert status == 0
    assert " ".join(new.split()) == (
        "* new synthetic:signal 2026-11-28 08:15 7.47M / 14.9M 62,416 +0.480 6.29M - 50 % done"
    )
    assert " ".join(old.split()) == (
        "old synthetic:signal 2026-11-27 08:15 14.9M / 14.9M 62,416 +2.340 7.86M +2.110 finished"
    )
    assert "its figure is too good" in " ".join(notes) and "*: latest" in " ".join(notes)


def test_no_runs_name_the_command_that_makes_one(elsewhere, say):
    assert say("list") == (0, "no runs in runs: python -m train.ppo makes one\n", "")
    (elsewhere / "file").write_text("")
    status, _, err = say("list", "--dir", "file")
    assert status == 2 and err.startswith("error: ") and "file" in err


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_no_number_is_cut_at_any_width(tmp_path, say, width):
    names = [f"synthetic-signal-seed{i}-20261128-081549" for i in range(3)]
    for i, name in enumerate(names):
        make_run(
            tmp_path, name, ended=i != 1, seed=i, dataset="/a/dataset/with/a/very/long/name/in/a/folder" * (i == 2)
        )
    (tmp_path / names[1] / "metrics.jsonl").write_text('{"steps": 1}\n7')
    _, out, _ = say("list", "--dir", tmp_path, width=width)
    assert {*names, "+2.340", "+2.110", "metrics.jsonl:2"} <= set(re.findall(r"[-+.:\w]+", out))
    assert all(cell_len(line) <= max(width, 2 + len(names[0])) for line in out.splitlines())
    assert (out.split()[:4] == ["run", "best", "%", "final"]) is (width == 80)  # no room for others; below, no table
    assert ("No room here for steps/s, began, dataset, steps, at step" in " ".join(out.split())) is (width == 80)
    _, out, _ = say("compare", *names, "--dir", tmp_path, width=width)
    assert out.count("+2.340") == out.count("+2.110") == 2 and out.count("12.3") == 5
    assert all(cell_len(line) <= max(width, 7 + len(names[0])) for line in out.splitlines())
    _, out, _ = say("show", names[0], "--dir", tmp_path, width=width)
    assert {"+2.340", "+2.110", "14,942,208", "0.0006", "15000000"} <= set(re.findall(r"[-+.,:\w]*\w", out))


def test_hostile_names_are_escaped(tmp_path, say):
    name = "[red]x\x1b[2J"
    path = make_run(tmp_path, name, dataset="[bold]\x1b]0;y\x07\u202e", ended=False)
    (path / "metrics.jsonl").write_text('{"steps": 131072, "[blink]\\u001b[5m": 1.0}\n')
    make_run(tmp_path, "$_x", dataset="[/]")
    for command in (("list",), ("show", name), ("compare", name, "$_x"), ("show", "[red]y")):
        status, out, err = say(*command, "--dir", tmp_path, width=200)
        assert status == (2 if command[-1] == "[red]y" else 0)
        assert r"[red]x\x1b[2J" in out + err
        assert not re.search(r"[^\n -~─±]", out + err), command
    assert r"[bold]\x1b]0;y\x07\u202e" in say("list", "--dir", tmp_path, width=200)[1]


def test_the_list_starts_without_jax(tmp_path):
    make_run(tmp_path, "a")
    code = f"""
import sys, train.runs
assert train.runs.main(["list", "--dir", {str(tmp_path)!r}]) == 0
train.runs.Run(train.runs.find_run("a", {str(tmp_path)!r})).status()
print(sorted({{"jax", "jaxlib", "numpy", "perpjax", "orbax", "matplotlib"}} & set(sys.modules)))
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 5  # 0.2 s on an idle machine


# Showing.


def test_show_tells_all(elsewhere, say):
    make_run(pathlib.Path("runs"), "a run", seed=7, hidden=[128, 32], gamma=0.99, extra=3)
    status, out, _ = say("show", "a run", width=100)
    flat = " ".join(out.split())
    assert status == 0
    for fact in (
        "state finished; 14,942,208 of 14,942,208 steps, 114 updates", "checkpoints 14,942,208", "policy MLP 64-64",
        "train hash " + "ab" * 32, "val hash " + "cd" * 32, "device cpu (2 cores)",
        "versions perpjax 0.1.0, jax 0.10.0",
        "commit 6874288", "2026-11-28 08:15 UTC, from step 0", "python -m train.ppo --seed 0",
        "hidden 128 32 default 64 64",
        "seed 7 default 0", "extra 3 not a setting of this version", "episode_return 0.114",
        "93 windows x 672 bars", "best final flat", "return, lots closed, % +2.340 +2.110 +1.250", "t +10.0 +10.0 -",
        "Best was chosen on this split, so its figure is too good; final was not.",
        "python -m train.ppo --resume 'a run' --total-steps 30000000",
        'from train import load_policy policy = load_policy("a run")',
    ):  # fmt: skip
        assert fact in flat, fact
    others = flat.partition("The others")[2].partition("Newest update")[0]
    assert "gamma 0.99" in others and "env.episode_length 672" in others and "hidden" not in others


def test_hold_of_an_older_run_is_shown_as_flat(elsewhere, say):
    closing = make_run(pathlib.Path("runs"), "a") / "evaluation.json"
    closing.write_text(closing.read_text().replace('"flat"', '"hold"'))
    assert "best final flat" in " ".join(say("show", "a")[1].split())


def test_show_of_a_run_that_was_killed(elsewhere, say):
    path = make_run(pathlib.Path("runs"), "a", updates=57, ended=False)
    (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text()[:-9])
    flat = " ".join(say("show", "a")[1].split())
    assert "state 49 % done; 7,340,032 of 14,942,208 steps, 56 updates; metrics.jsonl, line 57: cut" in flat
    assert "Validation so far: 9 looks, mean of 64 windows best newest 6.29M 7.08M" in flat
    assert "python -m train.ppo --resume a Load" in flat
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (path / name).unlink()
    flat = " ".join(say("show", "a")[1].split())
    assert "0 % done; 0 of 14,942,208 steps" in flat and "no look at it yet" in flat


def test_every_setting_of_a_run_without_options_is_a_default(tmp_path, say):
    from train.ppo.config import Config

    path = make_run(tmp_path, "a")
    config = json.loads((path / "config.json").read_text())
    write(path / "config.json", config | {"settings": Config().to_json()})
    _, out, _ = say("show", "a", "--dir", tmp_path)
    assert "All settings have their defaults" in out and "Settings that differ" not in out


def test_a_command_is_shown_as_it_was_typed():
    assert show_command(["/x/train/ppo/__main__.py", "--dataset", "a b"]) == "python -m train.ppo --dataset 'a b'"
    assert show_command(["/usr/bin/perpjax", "train"]) == "perpjax train"
    assert show_command(["study.py", "\x1b"]) == r"study.py '\x1b'"
    assert show_command(None) == show_command([]) == "-"


def test_numbers_keep_three_digits():
    assert [show_steps(n) for n in (0, 999, 1000, 131072, 4_587_520, 14_942_208, 2 * 10**9, None, 1.5)] == [
        "0", "999", "1.00k", "131k", "4.59M", "14.9M", "2.00G", "-", "-",
    ]  # fmt: skip
    assert [show_number(x, "{:.1f}".format) for x in (1, float("nan"), 10**400, True, "7", None)] == ["1.0", *"-----"]


# Comparing.


def test_only_differences_are_compared(tmp_path, say):
    make_run(tmp_path, "a")
    other = make_run(tmp_path, "b", updates=57, ended=False, seed=1, env={"episode_length": 96})
    config = json.loads((other / "config.json").read_text())
    config["versions"]["jax"], config["dataset"]["val"] = "0.11.0", "ee" * 32
    write(other / "config.json", config)
    status, out, _ = say("compare", "a", "b", "--dir", tmp_path)
    flat = " ".join(out.split())
    assert status == 0
    differ, _, rest = flat.partition("Circumstances that differ")
    assert re.findall(r"(\S+) (\d+) (\d+)", differ) == [("seed", "0", "1"), ("env.episode_length", "672", "96")]
    assert "jax 0.10.0 0.11.0" in rest and "val hash cdcdcdcdcdcd eeeeeeeeeeee" in rest and "train hash" not in flat
    assert "status finished 50 % done" in rest and "final: return, lots closed, % +2.110 -" in rest
    assert "best: return, lots closed, % +2.340 +0.480" in rest and "too good" in rest
    assert "The validation data differ: these figures do not compare." in rest


def test_equal_settings_are_told(tmp_path, say):
    for name in "ab":
        make_run(tmp_path, name)  # run_dir differs: it is a place
    _, out, _ = say("compare", "a", "b", "--dir", tmp_path)
    assert "The settings are exactly the same" in out and "differ" not in out
    status, _, err = say("compare", "a", "--dir", tmp_path)
    assert status == 2 and err == "error: 1 run to compare; name at least 2\n"


def test_a_comparison_is_drawn(tmp_path, say):
    pytest.importorskip("matplotlib", reason="needs the viz extra: pip install -e '.[viz]'")
    names = ["_a$^", "b", "empty"]
    for name in names:
        make_run(tmp_path, name)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (tmp_path / "empty" / name).write_text("")
    picture = tmp_path / "x.png"
    status, out, _ = say("compare", *names, "--dir", tmp_path, "--plot", picture)
    assert status == 0 and "picture saved to" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))
    for plot, says in (("x.jpg", "must end in .png"), (tmp_path / "gone" / "x.png", "is not there")):
        status, out, err = say("compare", *names, "--dir", tmp_path, "--plot", plot)
        assert (status, out) == (2, "") and says in err


def test_curves_have_the_names_of_the_runs(tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="needs the viz extra: pip install -e '.[viz]'")
    from train.plotting import Curves, draw_runs

    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, path, **_: (drawn.append(self), path.write_text("")))
        draw_runs(tmp_path / "x.png", [Curves("_a$", [(0, 1.0)], [(0, 0.1), (5, 0.2)]), Curves("b", [(0, 2.0)], [])])
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [r" _a\$", "b"]
    upper, lower = drawn[0].axes
    assert [list(line.get_ydata()) for line in upper.lines[:2]] == [[1.0], [2.0]]
    assert upper.get_ylabel() == "% of initial equity" and lower.get_xlabel() == "environment steps"


def test_a_picture_without_matplotlib_names_the_remedy(tmp_path, say, monkeypatch):
    for name in "ab":
        make_run(tmp_path, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, out, err = say("compare", "a", "b", "--dir", tmp_path, "--plot", tmp_path / "x.png")
    assert (status, out, err) == (2, "", "error: --plot needs matplotlib: pip install 'perpjax[viz]'\n")


# The command line.


def test_a_reader_that_goes_is_no_error(tmp_path):
    path = make_run(tmp_path, "a")
    record = json.loads((path / "config.json").read_text())
    record["dataset"]["features"] = [f"feature_{i}" for i in range(30_000)]  # more than a pipe holds
    write(path / "config.json", record)
    command = [sys.executable, "-m", "train.runs", "show", "a", "--dir", str(tmp_path)]
    # Without a buffer Python takes a write that the reader cut short for a whole one.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, cwd=ROOT, env=environment) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_a_terminal_without_unicode(tmp_path):
    make_run(tmp_path, "ä")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "train.runs", "show", "ä", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and rb"\xe4" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [(), ("list",), ("show",), ("compare",)])
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"], prog="perpjax runs")
    out = capsys.readouterr().out
    assert caught.value.code == 0 and " ".join(["usage: perpjax runs", *command]) in out
    assert "the newest first" in out if command in ((), ("list",)) else "Folder of the runs." in out
