"""The policies of the command line: every network with every head, bfloat16, one of one's own, and old settings."""

import itertools
import json
import pathlib
import re
import shutil
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import TINY, assert_same_runs, refused
from toy import LENGTH

from perpjax import AutoReset, EnvConfig, VecEnv
from perpjax.audit import path_sensitivity
from perpjax.rollout import play_windows, window_starts
from train import load_policy
from train.checkpoint import list_steps
from train.evaluate import Windows, greedy, measure_windows, t_statistic
from train.policies import ACTIVATIONS, GRU, MLP, Box5Head, describe_policy, make_policy, single_carry
from train.ppo.__main__ import main
from train.ppo.command import parse
from train.ppo.config import LATER, Config
from train.ppo.environment import make_env
from train.ppo.judge import hash_settings
from train.ppo.run import init_state, learn, make_ppo, resume

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOX5 = EnvConfig(actions="box5", opposite="close", max_lots=2, episode_length=LENGTH)
GRU_BOX5 = (
    "--network",
    "gru",
    "--gru-width",
    "6",
    "--actions",
    "box5",
    "--opposite",
    "close",
    "--compute-dtype",
    "bfloat16",
)


# What the settings make.


def test_settings_make_policies():
    assert make_policy(Config()) == MLP() == MLP((64, 64), "tanh", False)
    config = Config(network="gru", hidden=(8,), gru_width=6, activation="silu", shared_trunk=True, env=BOX5)
    assert make_policy(config) == GRU((8,), 6, "silu", True, Box5Head(10.0))
    assert describe_policy(make_policy(Config())) == "MLP hidden=(64, 64)"
    assert describe_policy(make_policy(config)).startswith(
        "GRU hidden=(8,), width=6, activation=silu, shared=True, head="
    )
    args = ["--network", "gru", "--gru-width", "6", "--hidden", "8", "--activation", "silu", "--shared-trunk"]
    assert parse([*args, "--actions", "box5", "--opposite", "close"], "train")[0].gru_width == 6
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_settings_of_earlier_versions_have_the_defaults():
    values = {name: x for name, x in Config(hidden=(8,)).to_json().items() if name not in LATER}
    assert {"network", "policy", "compute_dtype"} <= set(LATER) and not {"hidden", "seed"} & set(LATER)
    assert Config.from_json(values) == Config(hidden=(8,))


def test_the_parameters_have_the_names_of_earlier_versions():
    params = make_policy(Config()).init(jax.random.key(0), jnp.zeros((1, 3)))["params"]
    assert sorted(params) == ["actor_0", "actor_1", "actor_out", "critic_0", "critic_1", "critic_out"]


@pytest.mark.parametrize(
    "network, actions, shared",
    [("mlp", "box5", True), ("gru", "multi_discrete", False), ("gru", "box5", False), ("gru", "multi_discrete", True)],
)
def test_every_network_and_head_takes_an_update(network, actions, shared):
    """The default network has tests of its own."""
    config = Config(
        num_envs=8, num_steps=24, total_steps=8 * 24, epochs=2, num_minibatches=2, hidden=(6,), network=network,
        shared_trunk=shared, compute_dtype="bfloat16" if shared else "float32",
        env=BOX5 if actions == "box5" else EnvConfig(max_lots=2, episode_length=LENGTH),
    )  # fmt: skip
    ppo, envs = make_ppo(config), VecEnv(AutoReset(make_env(config, "val", "synthetic:crash?bars=12000")))
    state = jax.jit(ppo.init)(envs, jax.random.key(0))
    after, metrics = jax.jit(ppo.update)(envs, state)
    chex.assert_tree_all_finite((after.learner, metrics))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.learner.params, after.learner.params)
    assert min(jax.tree.leaves(moved)) > 0 and float(metrics["entropy"]) > 0
    assert float(metrics["episodes"]) > 0


@pytest.mark.parametrize("make", [MLP, lambda *a, **k: GRU(a[0], 16, *a[1:], **k)], ids=["MLP", "GRU"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bfloat16_is_close_to_float32(make, activation):
    obs = jax.random.normal(jax.random.key(1), (50, 12))
    exact, rough = (make((32,), activation, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = jax.jit(rough.init)(jax.random.key(0), obs[:1])
    chex.assert_trees_all_equal(params, jax.jit(exact.init)(jax.random.key(0), obs[:1]))
    results = [jax.jit(p.__call__)(params, p.initial_carry(50), obs, jnp.zeros(50, bool)) for p in (exact, rough)]
    for x in jax.tree.leaves((params, results)):
        assert x.dtype == jnp.float32
    (_, one, value), (_, other, close) = results
    assert 0 < float(jnp.abs(value - close).max()) < 0.1
    chex.assert_trees_all_close(one, other, atol=0.01)


def test_a_shared_trunk_learns_from_both():
    policy, obs = MLP((6,), shared=True), jnp.ones((4, 3))
    params = policy.init(jax.random.key(0), obs[:1])
    assert sorted(params["params"]) == ["actor_out", "critic_out", "trunk_0"]
    apply = lambda p: policy(p, (), obs, jnp.zeros(4, bool))[1:]  # noqa: E731
    for loss in (lambda p: apply(p)[1].sum(), lambda p: apply(p)[0].log_prob(jnp.ones((4, 5), jnp.int32)).sum()):
        assert float(jnp.abs(jax.grad(loss)(params)["params"]["trunk_0"]["kernel"]).max()) > 0


# A recurrent policy of bfloat16 and box5, from run to use.


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run of 8 updates with a checkpoint every 2."""
    folder = tmp_path_factory.mktemp("gru") / "run"
    size = ("--total-steps", "1024", "--checkpoint-every", "256", "--evaluate-every", "512")
    main([*TINY, *GRU_BOX5, *size, "--report", "--run-dir", str(folder)])
    return folder


def test_a_recurrent_run_goes_on_bit_by_bit(run, tmp_path):
    copy = pathlib.Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "evaluation.json").unlink()
    *earlier, _ = list_steps(copy)
    shutil.rmtree(copy / "checkpoints" / "1024")
    assert earlier[-1] == 768
    resume(copy)
    assert_same_runs(run, copy)


def test_a_recurrent_policy_plays_as_it_was_evaluated(run):
    policy = load_policy(run, "final")
    env = policy.env("val")
    table = json.loads((run / "evaluation.json").read_text())["policies"]["final"]
    result = measure_windows(env, policy, jax.random.key(0))
    np.testing.assert_allclose(result.returns, table["returns"], rtol=1e-5, atol=1e-7)
    episode = play_windows(env, policy, jax.random.key(0), window_starts(env))
    np.testing.assert_allclose(episode.equity / 1e4 - 1, table["returns"], rtol=1e-5, atol=1e-7)
    assert "nearest" in str(path_sensitivity(env, policy, carry=policy.initial_carry()))


def test_one_environment_and_a_batch_agree_step_by_step(run):
    policy = load_policy(run)
    many = VecEnv(AutoReset(policy.env("val")))
    states, carry = many.reset(jax.random.split(jax.random.key(0), 3)), None
    single, act, step = policy.initial_carry(), jax.jit(lambda p, s, c: p.act(s, carry=c)), jax.jit(many.step)
    for _ in range(5):
        action, single = act(policy, many.one(states, 1), single)
        actions, carry = act(policy, states, policy.initial_carry(3) if carry is None else carry)
        np.testing.assert_allclose(action, actions[1], atol=1e-3)
        assert actions.shape == (3, 5) and actions.dtype == jnp.float32
        states = step(states, actions)
    assert float(jnp.abs(carry["actor"][1]).max()) > 0


def test_init_from_takes_and_keeps_the_network(run, tmp_path, capsys):
    config, _ = parse(["--init-from", str(run), "--actions", "box5", "--opposite", "close"], "train")
    assert (config.network, config.gru_width, config.hidden) == ("gru", 6, (8,))
    new = ("--init-from", run, "--run-dir", tmp_path / "new", *TINY, "--total-steps", "128")
    line = refused(capsys, *new)
    assert "GRU" in line and "Box5Head" in line and line.count("GRU") == 2  # the new run's actions are multi_discrete
    line = refused(capsys, *new, "--network", "mlp", "--gru-width", "64", "--actions", "box5", "--opposite", "close")
    assert "GRU" in line and "MLP" in line and not (tmp_path / "new").exists()


def test_defaults_of_later_settings_leave_the_hash_of_a_run(run):
    policy = load_policy(run)
    plain = policy.replace(config=Config())
    assert hash_settings(plain) != hash_settings(policy)
    assert hash_settings(plain) == hash_settings(policy.replace(config=Config(report=False)))


# A policy of one's own.


def read_example() -> str:
    """The module of the README."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [b for b in blocks if "def make(" in b]
    return block


def test_a_policy_of_ones_own(tmp_path, monkeypatch, capsys):
    """The example of the README: trained, recorded, loaded, and missed."""
    example = read_example()
    assert len(example.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    (tmp_path / "mine_of_docs.py").write_text(example)
    main([*TINY, "--total-steps", "256", "--policy", "mine_of_docs:make", "--run-dir", "run", "--no-report"])
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["settings"]["policy"] == "mine_of_docs:make" and record["policy"].startswith("Mine")
    assert "Mine" in capsys.readouterr().out
    policy = load_policy(tmp_path / "run", "final")
    env = policy.env("val")
    actions, _ = policy.act(VecEnv(env).reset(jax.random.split(jax.random.key(0), 4)))
    assert actions.shape == (4, 5) and type(policy.policy).__name__ == "Mine"
    assert sys.path == path
    # Elsewhere the module is not there.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.delitem(sys.modules, "mine_of_docs")
    with pytest.raises(ValueError, match=r"run: .*mine_of_docs:make.*No module named 'mine_of_docs'") as caught:
        load_policy(tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert "mine_of_docs" in refused(capsys, "--resume", tmp_path / "run")


# Learning, each policy on each head: `XLA_FLAGS= pytest -m slow -s tests/train/test_policies.py`, 20 minutes.


@pytest.mark.slow
def test_every_policy_learns_the_signal():
    """On markets with other seeds: t > 3 each, and in the mean at least 0.8 of the return of the default policy."""
    jax.config.update("jax_disable_most_optimizations", False)  # it runs for longer than it compiles
    returns = {}
    for network, actions in itertools.product(("mlp", "gru"), ("multi_discrete", "box5")):
        is_box = actions == "box5"
        for seed in range(3):
            config = Config(
                num_envs=1024, seed=seed, network=network, learning_rate=3e-3 if is_box else 1e-3,
                env=EnvConfig(actions=actions, opposite="close" if is_box else "refuse"),
            )  # fmt: skip
            ppo, envs = make_ppo(config), VecEnv(AutoReset(make_env(config, "train", f"synthetic:signal?seed={seed}")))
            learner = learn(ppo, envs, init_state(ppo, envs)).learner
            unseen = make_env(config, None, f"synthetic:signal?seed={1000 + seed}")
            windows = Windows.of(unseen, jax.random.key(0), most=128)
            found = windows.play(greedy(learner, ppo.policy), single_carry(ppo.policy)).closed_returns
            returns.setdefault((network, actions), []).append(float(np.mean(found)))
            print(f"{network} {actions}, seed {seed}: {100 * np.mean(found):.2f} %, t = {t_statistic(found):.1f}")
            assert t_statistic(found) > 3
    means = {name: np.mean(values) for name, values in returns.items()}
    assert min(means.values()) >= 0.8 * means["mlp", "multi_discrete"], means
