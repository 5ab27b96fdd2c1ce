"""A learnt policy in use: loaded, played, and told apart from one of other data."""

import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import perpjax
from perpjax import AutoReset, VecEnv
from perpjax.audit import path_sensitivity
from perpjax.rollout import play_windows, window_starts
from train import load_policy
from train.checkpoint import list_steps, read
from train.evaluate import measure_windows
from train.ppo.config import Config
from train.ppo.run import train

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA = "synthetic:crash?bars=12000"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run of six updates with three looks at validation; learning is fast, so the first look is no accident."""
    config = Config(
        num_envs=32, num_steps=8, total_steps=32 * 8 * 6, hidden=(8,), dataset=DATA, evaluate_every=32 * 8 * 2,
        checkpoint_every=32 * 8, run_dir=tmp_path_factory.mktemp("load") / "run", learning_rate=0.01, report=False,
        env=perpjax.EnvConfig(max_lots=2, episode_length=96),
    )  # fmt: skip
    return train(config).path


@pytest.fixture(scope="module")
def policy(run):
    return load_policy(run, "final")


def test_each_name_is_its_checkpoint(run):
    steps = list_steps(run)
    looks = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    best = max(looks, key=lambda look: look["closed_return"])
    assert load_policy(run).step == best["steps"] and load_policy(run, "final").step == steps[-1] == 32 * 8 * 6
    for step in steps:
        loaded = load_policy(run, step)
        saved = read(run, step).learner
        kernel = saved[".params['params']['actor_0']['kernel']"]
        np.testing.assert_array_equal(loaded.params["params"]["actor_0"]["kernel"], kernel)
        np.testing.assert_array_equal(loaded.observations.mean, saved[".observations.mean"])


def test_one_state_a_batch_and_jit_agree(policy):
    env = policy.env("val")
    vec = VecEnv(AutoReset(env))
    states = vec.reset(jax.random.split(jax.random.key(0), 5))
    actions, carry = policy.act(states)
    assert actions.shape == (5, 5) and carry == ()
    inside = jax.jit(lambda policy, states: policy.act(states)[0])(policy, states)
    np.testing.assert_array_equal(inside, actions)
    for i in range(5):
        alone, _ = policy.act(vec.one(states, i))
        np.testing.assert_array_equal(alone, actions[i])
    draws = {tuple(policy.act(vec.one(states, 0), jax.random.key(k))[0].tolist()) for k in range(30)}
    assert len(draws) > 5  # with a key it draws


def test_it_plays_as_the_closing_table_says(run):
    best = load_policy(run)
    env = best.env("val")
    table = json.loads((run / "evaluation.json").read_text())["policies"]["best"]
    result = measure_windows(env, best, jax.random.key(0))
    np.testing.assert_allclose(result.returns, table["returns"], rtol=1e-5, atol=1e-7)
    assert table["trades"] > 0
    episode = play_windows(env, best, jax.random.key(0), window_starts(env))
    np.testing.assert_allclose(episode.equity / 1e4 - 1, table["returns"], rtol=1e-5, atol=1e-7)
    assert "nearest" in str(path_sensitivity(env, best))


def test_other_data_is_told(run, policy, tmp_path):
    with pytest.warns(UserWarning, match="another dataset, synthetic:crash.bars=13000"):
        policy.env("val", "synthetic:crash?bars=13000")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    record = json.loads((moved / "config.json").read_text())
    record["dataset"]["val"] = "0" * 64
    (moved / "config.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="the val split of .* has changed since the training"):
        load_policy(moved).env("val")
    record["dataset"]["features"][1] = "other"
    (moved / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"feature 1 is .*, and the policy was trained with other"):
        load_policy(moved).env("val")
    state = policy.env("val").reset(jax.random.key(0))
    with pytest.raises(ValueError, match=r"an observation of 3 numbers; .* knows \d+"):
        policy.act(state.replace(obs=jnp.zeros(3)))


def test_wrong_names_are_one_line(run, tmp_path):
    for which, says in ((7, "no checkpoint of step 7; there are"), ("worst", "'best', 'final' or a number")):
        with pytest.raises(ValueError, match=says):
            load_policy(run, which)
    with pytest.raises(ValueError, match="no-such-run"):
        load_policy("no-such-run")
    moved = tmp_path / "cut"
    shutil.copytree(run, moved)
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint here"):
        load_policy(moved)


def test_a_policy_is_a_pytree_of_its_arrays(policy):
    again = jax.tree.map(lambda x: x, policy)
    chex.assert_trees_all_equal(again.params, policy.params)
    assert again.step == policy.step and str(policy.run) in str(again)
    assert perpjax.load_policy(policy.run, "final").step == policy.step
