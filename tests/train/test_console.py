"""The console script works beside a foreign `train.py`, and passes its arguments on."""

import importlib
import os
import pathlib
import subprocess
import sys
import textwrap
import tomllib

import pytest

from perpjax.cli import COMMANDS, main

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def hostile(tmp_path):
    """A folder with the user's own train.py, which says so and is no package."""
    (tmp_path / "train.py").write_text("print('FOREIGN')\nvalue = 7\n")
    return tmp_path


def run(where: pathlib.Path, *args: str, path: tuple[pathlib.Path, ...] = ()) -> subprocess.CompletedProcess:
    """Python in a folder; `path` is first on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "COLUMNS": "100"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=where, env=environment)


def test_the_trap_is_there(hostile):
    assert run(hostile, "-m", "train.runs", "list").returncode != 0


@pytest.mark.parametrize("path", [False, True])
def test_commands_run_beside_a_foreign_train(hostile, path):
    first = (hostile,) if path else ()
    done = run(hostile, "-m", "perpjax.cli", "runs", "list", path=first)
    assert (done.returncode, done.stdout, done.stderr) == (0, "no runs in runs: python -m train.ppo makes one\n", "")
    done = run(hostile, "-m", "perpjax.cli", "train", "--help", path=first)
    assert done.returncode == 0 and "usage: perpjax train " in done.stdout and "FOREIGN" not in done.stdout, done.stderr
    assert "--learning-rate" in done.stdout
    done = run(hostile, "-m", "perpjax.cli", "train", "--total-steps", "7", path=first)
    assert done.returncode == 2 and done.stderr.startswith("error: total_steps is 7"), done.stderr


def test_the_trainer_is_imported_beside_a_foreign_one(hostile):
    code = """
    import sys, train
    from perpjax._trainer import import_train, use_trainer
    foreign = train
    runs = import_train("runs")
    config = import_train("ppo.config")
    assert runs.find_run and config.Config().seed == 0
    assert import_train("runs") is runs and import_train("ppo.config") is config
    assert import_train().ppo.config is config and runs.Run is import_train("run_folder").Run
    assert sys.modules["train"] is foreign and foreign.value == 7
    assert [name for name in sys.modules if name.startswith("train.")] == []
    with use_trainer():
        with use_trainer():
            from train.runs import Run
        import train
        assert Run is runs.Run and train is import_train()
    import train
    assert train is foreign
    try:
        import_train("no_such")
    except ModuleNotFoundError as error:
        assert "train.no_such" in str(error)
    else:
        raise AssertionError
    assert sys.modules["train"] is foreign
    print("done")
    """
    done = run(hostile, "-c", textwrap.dedent(code))
    assert (done.returncode, done.stdout) == (0, "FOREIGN\ndone\n"), done.stderr


def test_a_foreign_train_that_is_not_imported_stays_so(hostile):
    code = """
    import sys
    from perpjax._trainer import import_train
    runs = import_train("runs")
    assert "train" not in sys.modules and runs is import_train("runs")
    import train
    assert train.value == 7
    """
    done = run(hostile, "-c", textwrap.dedent(code))
    assert (done.returncode, done.stdout) == (0, "FOREIGN\n"), done.stderr


def test_without_a_foreign_one_the_modules_are_the_usual_ones(tmp_path):
    code = """
    from perpjax._trainer import import_train
    runs = import_train("runs")
    import train.runs
    assert runs is train.runs and import_train() is train
    """
    done = run(tmp_path, "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_the_trainer_is_found_where_the_name_is_barred(tmp_path):
    code = """
    import sys
    from perpjax._trainer import import_train
    sys.modules["train"] = None
    assert import_train("runs").find_run and sys.modules["train"] is None
    """
    done = run(tmp_path, "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_the_table_of_commands(capsys, args):
    assert main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    for name, (_, sentence) in COMMANDS.items():
        assert [name, *sentence.split()] in [line.split() for line in lines]


def test_version(capsys):
    assert main(["--version"]) == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert capsys.readouterr().out == f"perpjax {project['version']}\n"
    assert project["scripts"] == {"perpjax": "perpjax.cli:main"}


@pytest.mark.parametrize("name, near", [("trian", "train"), ("run", "runs"), ("audti", "audit"), ("\x1b[2J", "")])
def test_an_unknown_command_names_the_nearest(capsys, name, near):
    assert main([name, "--help"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "\x1b" not in said.err
    assert said.err.startswith("error: perpjax has no command ") and f"the nearest is {near}" in said.err


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_are_passed_on(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    said = capsys.readouterr()
    assert caught.value.code == 0 and f"usage: perpjax {name} " in said.out
    with pytest.raises(SystemExit) as caught:
        needed = {"audit": ("core", "--dataset", "x"), "evaluate": ("latest",)}.get(name, ())
        main([name, *needed, "--no-such-option", "1"])
    assert caught.value.code == 2 and "--no-such-option" in capsys.readouterr().err


def test_the_exit_status_is_that_of_the_command(capsys, tmp_path):
    assert main(["runs", "list", "--dir", str(tmp_path)]) == 0
    assert main(["runs", "show", "x", "--dir", str(tmp_path)]) == 2
    assert main(["build", "--candles", str(tmp_path / "gone.csv")]) == 2
    assert "gone.csv" in capsys.readouterr().err


def test_every_module_command_of_the_packages_has_a_name():
    """A module that can be run with `python -m` is a command here."""
    sources = [path for package in ("perpjax", "train") for path in (ROOT / package).rglob("*.py")]
    runnable = {path for path in sources if 'if __name__ == "__main__":' in path.read_text()}
    modules = {pathlib.Path(importlib.import_module(module).__file__) for module, _ in COMMANDS.values()}
    assert runnable - {ROOT / "perpjax" / "cli.py"} == modules
