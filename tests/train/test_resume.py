"""A run goes on from its checkpoint bit by bit, after a stop and after `kill -9`, or says in one line why it cannot."""

import json
import pathlib
import random
import shutil
import signal

import jax
import numpy as np
import pytest
from processes import TINY, TWENTY, assert_same_runs, finish, read_lines, refused, run, run_and_kill, start

from perpjax import AutoReset, VecEnv
from train.checkpoint import Checkpoints, Snapshot, list_steps, read
from train.hooks import Hook
from train.ppo.__main__ import main
from train.ppo.command import parse
from train.ppo.config import Config
from train.ppo.environment import make_env
from train.ppo.run import _Session, resume, train

pytestmark = pytest.mark.usefixtures("quick_compilation", "compile_once")


@pytest.fixture
def copy(reference, tmp_path) -> pathlib.Path:
    """The reference run, to be damaged."""
    return pathlib.Path(shutil.copytree(reference, tmp_path / "copy"))


def cut_back(folder: pathlib.Path, step: int) -> None:
    """Make a run one that was killed soon after a checkpoint."""
    (folder / "evaluation.json").unlink()
    for later in list_steps(folder):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))


# Bit by bit.


def test_the_reference_covers_the_hard_cases(reference):
    """Episodes end in most updates, the best is not among the newest, and a new best comes late enough."""
    lines, looks = read_lines(reference / "metrics.jsonl"), read_lines(reference / "evaluations.jsonl")
    assert [line["update"] for line in lines] == list(range(1, 21))
    assert sum(line["episodes"] > 0 for line in lines) > 10
    best = [look["steps"] for look in looks if look["best"]][-1]
    assert best == 768 and [look["update"] for look in looks] == list(range(2, 21, 2))
    assert list_steps(reference) == [best, 1536, 2048, 2560]
    assert read(reference, 2560).host["progress"]["best"]["steps"] == best


def test_stopped_and_resumed_is_as_in_one_go(reference, cache, tmp_path):
    """Three processes: one is the reference, one is stopped by a signal, one goes on."""
    folder = tmp_path / "run"
    process = start(*TWENTY, "--run-dir", folder, cache=cache)
    for line in process.stdout:
        if "of 2,560 steps" in line:  # the first chunk
            process.terminate()
            break
    out, err = finish(process)
    assert process.returncode == 128 + signal.SIGTERM and not err, (out, err)
    assert f"--resume {folder}" in out
    done = read_lines(folder / "metrics.jsonl")[-1]["steps"]
    assert 128 <= done < 2560 and list_steps(folder)[-1] == done
    run("--resume", folder, cache=cache)
    assert_same_runs(reference, folder)


def test_killed_thrice_is_as_in_one_go(reference, cache, tmp_path):
    """`kill -9` at three moments of one run: before its best policy, and twice later, wherever that is in a save."""
    folder, generator = tmp_path / "run", random.Random(0)
    first = run_and_kill(5, generator.uniform(0, 0.02), *TWENTY, "--run-dir", folder, cache=cache)
    assert first == -signal.SIGKILL and list_steps(folder)
    again = [run_and_kill(u, generator.uniform(0, 0.2), "--resume", folder, cache=cache) for u in (9, 13)]
    assert again == [-signal.SIGKILL] * 2
    assert len(read_lines(folder / "metrics.jsonl")) < 20
    run("--resume", folder, cache=cache)
    assert_same_runs(reference, folder)
    sessions = json.loads((folder / "config.json").read_text())["sessions"]
    assert len(sessions) == 4 and sessions[0]["first_step"] == 0 and sessions[-1]["first_step"] >= 512


@pytest.mark.slow
def test_killed_at_twenty_moments(reference, tmp_path):
    """Twenty runs, each killed once anywhere between its first update and its end. Every process compiles anew."""
    generator, killed = random.Random(1), 0
    for i in range(20):
        folder = tmp_path / str(i)
        status = run_and_kill(generator.randint(1, 19), generator.uniform(0, 1.5), *TWENTY, "--run-dir", folder)
        if status == 0:
            continue
        killed += 1
        if not list_steps(folder):
            process = start("--resume", folder)
            assert "no checkpoint here" in finish(process)[1] and process.returncode == 2
        elif (folder / "evaluation.json").exists():
            process = start("--resume", folder)
            assert "has ended" in finish(process)[1] and process.returncode == 2
            assert_same_runs(reference, folder)
        else:
            run("--resume", folder)
            assert_same_runs(reference, folder)
    assert killed >= 15


def test_lines_after_the_checkpoint_are_written_again(reference, copy):
    """Also half a line, and one that a crash has filled with zeros."""
    cut_back(copy, 2048)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"update": 21, "steps": 2688')
    with open(copy / "evaluations.jsonl", "ab") as file:
        file.write(bytes(100) + b"\n")
    resume(copy)
    assert_same_runs(reference, copy)


def test_a_run_killed_in_its_closing_evaluation_gets_it(reference, copy):
    (copy / "evaluation.json").unlink()
    (copy / "evaluation.json.tmp").write_text('{"split": "va')
    resume(copy)
    assert_same_runs(reference, copy)


def test_hooks_get_their_state_back(copy):
    cut_back(copy, 2048)

    class Counts(Hook):
        def __init__(self):
            self.updates, self.given = 0, None

        def on_updates(self, metrics):
            self.updates += len(metrics)

        def get_state(self):
            return {"updates": self.updates}

        def set_state(self, state):
            self.given = state

    first, second = Counts(), Counts()
    resume(copy, hooks=[first])
    assert first.updates == 4 and first.given is None
    (copy / "evaluation.json").unlink()
    resume(copy, hooks=[second])
    assert second.updates == 0 and second.given == {"updates": 4}


# Longer runs.


def test_a_longer_end_is_told_and_ends_anew(copy, capsys):
    """The learning rate at update 20 of 24 is a sixth of 1e-3. The evaluation of the shorter run is not the end's."""
    before = json.loads((copy / "evaluation.json").read_text())
    main(["--resume", str(copy), "--total-steps", "3072", "--checkpoint-every", "256"])
    said = " ".join(capsys.readouterr().out.split())
    assert "total_steps is 3,072 instead of 2,565: the learning rate starts anew at 0.000167, where it was 0" in said
    assert [line["update"] for line in read_lines(copy / "metrics.jsonl")] == list(range(1, 25))
    after = json.loads((copy / "evaluation.json").read_text())
    assert before["policies"]["final"]["step"] == 2560 and after["policies"]["final"]["step"] == 3072
    # The last three are kept and the best, whichever session they are from.
    best = read(copy, 3072).host["progress"]["best"]["steps"]
    assert list_steps(copy) == sorted({best, 2560, 2816, 3072})
    # Killed in its closing evaluation, it has the old one.
    (copy / "evaluation.json").write_text(json.dumps(before))
    resume(copy)
    assert json.loads((copy / "evaluation.json").read_text()) == after
    assert "has ended" in refused(capsys, "--resume", copy)
    line = refused(capsys, "--resume", copy, "--total-steps", "2565")
    assert "total_steps is 2,565" in line and "3,072" in line


# Refusals.


def test_an_ended_run_is_refused(copy, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = refused(capsys, "--resume", copy)
    assert f"{copy} has ended" in line and "2,560 of 2,565 steps" in line and "--total-steps" in line
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_run_without_a_checkpoint_is_refused(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    assert f"{copy}: no checkpoint here" in refused(capsys, "--resume", copy)
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "512.orbax-checkpoint-tmp").mkdir()
    assert "no checkpoint here" in refused(capsys, "--resume", copy)


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert str(tmp_path / "nowhere") in refused(capsys, "--resume", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(capsys, "--resume", tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    "name, option",
    [
        ("learning_rate", ["--learning-rate", "0.5"]),
        ("seed", ["--seed", "8"]),
        ("num_envs", ["--num-envs", "32"]),
        ("hidden", ["--hidden", "8", "8"]),
        ("taker_fee", ["--taker-fee", "5bp"]),
        ("max_lots", ["--max-lots", "3"]),
        ("dataset", ["--dataset", "synthetic:signal"]),
        ("run_dir", ["--run-dir", "elsewhere"]),
        ("init_from", ["--init-from", "elsewhere"]),
    ],
)
def test_another_setting_is_refused_by_name(reference, capsys, name, option):
    line = refused(capsys, "--resume", reference, *option)
    assert line.startswith(f"error: {name} is ") and str(reference) in line and "--init-from" in line


def test_a_setting_given_again_is_not_another(reference, capsys):
    """It gets as far as the end of the run."""
    again = ["--learning-rate", "1e-3", "--max-lots", "2", "--taker-fee", "6bp", "--seed", "12", "--env.max-lots", "2"]
    assert "has ended" in refused(capsys, "--resume", reference, *again)


# Damage.


def resume_after(folder: pathlib.Path, capsys) -> str:
    """Go on, and return what was said, on one line."""
    resume(folder)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return " ".join((out + err).split())


def damage(folder: pathlib.Path, step: int, how: str) -> None:
    """Damage a checkpoint of a copy of the reference."""
    newest = folder / "checkpoints" / str(step)
    host = newest / "host" / "metadata"
    if how == "truncated":
        data = max((p for p in (newest / "loop").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "host truncated":
        host.write_bytes(host.read_bytes()[:100])
    elif how == "older":
        host.write_text(json.dumps(json.loads(host.read_text()) | {"format": 0}))
    elif how == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    elif how == "another step":
        shutil.rmtree(newest)
        shutil.copytree(folder / "checkpoints" / "768", newest)
    elif how == "counters":
        host.write_text(json.dumps(json.loads(host.read_text()) | {"progress": {"steps": step}}))
    elif how == "foreign":  # whole, of a larger network
        found = read(folder, step)
        name = max(found.learner, key=lambda name: found.learner[name].size)
        shutil.rmtree(newest)
        wider = found.learner | {name: np.concatenate([found.learner[name]] * 2)}
        (elsewhere := folder.parent / f"foreign-{step}").mkdir()
        checkpoints = Checkpoints(elsewhere)
        checkpoints.save(step, Snapshot(wider, found.loop, found.host))
        checkpoints.close()
        (elsewhere / "checkpoints" / str(step)).rename(newest)
    elif how == "no hooks":
        host.write_text(json.dumps({k: v for k, v in json.loads(host.read_text()).items() if k != "hooks"}))


def read_as_resumed(folder: pathlib.Path) -> _Session:
    """A session that has read its checkpoint, and has not begun to train."""
    config = Config.from_json(json.loads((folder / "config.json").read_text())["settings"])
    session = _Session(config, (), folder)
    session._read(jax.eval_shape(session.ppo.init, VecEnv(AutoReset(make_env(config, "train"))), jax.random.key(0)))
    return session


@pytest.mark.parametrize(
    "hows", [("truncated", "host truncated", "older"), ("empty", "another step", "counters"), ("no hooks", "foreign")]
)
def test_damaged_checkpoints_are_named_and_the_one_before_is_used(copy, hows):
    (copy / "evaluation.json").unlink()
    steps = list_steps(copy)[::-1]
    for step, how in zip(steps, hows, strict=False):
        damage(copy, step, how)
    session = read_as_resumed(copy)
    assert session.progress.steps == steps[len(hows)] and len(session.messages) == len(hows)
    for step, text in zip(steps, session.messages, strict=False):
        assert text.startswith(f"{copy}/checkpoints/{step}: ") and "\n" not in text
        assert text.endswith(f"; the one of step {steps[len(hows)]} is used")


def test_a_run_goes_on_from_the_one_before(reference, copy, capsys):
    """The newest is truncated; another run's lies after it, at no moment of this run, and must not stay."""
    (copy / "evaluation.json").unlink()
    damage(copy, 2560, "truncated")
    shutil.copytree(copy / "checkpoints" / "2048", copy / "checkpoints" / "5120")
    damage(copy, 5120, "foreign")
    said = resume_after(copy, capsys).replace(" ", "")
    for step in (2560, 5120):
        assert said.count(f"{copy}/checkpoints/{step}:") == 1
    assert said.count("theoneofstep2048isused") == 2
    assert_same_runs(reference, copy)


def test_only_damaged_checkpoints_are_one_line(copy, capsys):
    (copy / "evaluation.json").unlink()
    for step in list_steps(copy):
        (copy / "checkpoints" / str(step) / "host" / "metadata").write_text("{")
    line = refused(capsys, "--resume", copy)
    assert f"{copy}/checkpoints/2560: not a whole checkpoint of perpjax" in line


def test_a_damaged_best_leaves_the_final_policy(copy, capsys):
    (copy / "evaluation.json").unlink()
    (copy / "checkpoints" / "768" / "host" / "metadata").write_text("{")
    said = resume_after(copy, capsys).replace(" ", "")
    assert f"{copy}/checkpoints/768:notawholecheckpoint" in said
    assert set(json.loads((copy / "evaluation.json").read_text())["policies"]) == {"final", "flat", "random"}


# A new run that begins with the policy of another.


def test_init_from_begins_with_the_best_policy(reference, tmp_path):
    """With a learning rate of 0 the parameters stay, and the count of the statistics grows by one update."""
    config, _ = parse(
        [*TINY, "--dataset", "synthetic:martingale?bars=12000", "--init-from", str(reference), "--total-steps", "128",
         "--learning-rate", "0", "--run-dir", str(tmp_path / "new")], "train",
    )  # fmt: skip
    train(config)
    best, new = read(reference, 768).learner, read(tmp_path / "new", 128).learner
    names = [name for name in best if name.startswith(".params")]
    assert names and all(best[name].tobytes() == new[name].tobytes() for name in names)
    assert best[".observations.count"] == pytest.approx(768, rel=1e-2)
    assert new[".observations.count"] == pytest.approx(768 + 128, rel=1e-2)
    assert int(new[".update"]) == 1
    # It is not the policy of the end.
    assert any(read(reference, 2560).learner[name].tobytes() != best[name].tobytes() for name in names)


def test_init_from_takes_the_network_of_the_run(reference, tmp_path, capsys):
    config, _ = parse(["--init-from", str(reference)], "train")
    assert config.hidden == (8,)
    folder = tmp_path / "new"
    line = refused(
        capsys, *TINY, "--hidden", "16", "--total-steps", "128", "--init-from", reference, "--run-dir", folder
    )
    assert "init_from" in line and str(reference) in line and "8" in line and "16" in line
    assert not folder.exists()


def test_evaluate_every_0_keeps_no_best(tmp_path, capsys):
    folder = tmp_path / "run"
    args = [*TINY, "--total-steps", "640", "--evaluate-every", "0", "--checkpoint-every", "128"]
    config, _ = parse([*args, "--run-dir", str(folder)], "train")
    train(config)
    assert read_lines(folder / "evaluations.jsonl") == []
    assert list_steps(folder) == [384, 512, 640]
    assert read(folder, 640).host["progress"]["best"] is None
    whole = json.loads((folder / "evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(whole["policies"]) == {"final", "flat", "random"}
    assert not list(folder.glob("*.tmp"))
    line = refused(capsys, *args, "--init-from", folder, "--run-dir", tmp_path / "other")
    assert "validation" in line
