"""Prints the fingerprints of a rollout of 100 000 steps and of a small training run; test_determinism runs it twice."""

import json
import sys

import jax

from perpjax import AutoReset, EnvConfig, PerpEnv, VecEnv, load_market
from perpjax.audit.fingerprint import fingerprint
from perpjax.rules.orders import sample_action
from train.ppo.config import Config
from train.ppo.run import init_state, learn, make_ppo

ENVS, STEPS = 100, 1000


@jax.jit
def rollout(env: AutoReset, key: jax.Array):
    """The last states, and every reward and equity on the way."""

    def step(states, key):
        actions = jax.vmap(lambda k: sample_action(k, env.env.config))(jax.random.split(key, ENVS))
        states = jax.vmap(env.step)(states, actions)
        return states, (states.reward, states.equity)

    states = jax.vmap(env.reset)(jax.random.split(key, ENVS))
    return jax.lax.scan(step, states, jax.random.split(key, STEPS))


def main(seed: int) -> None:
    env = AutoReset(PerpEnv(load_market("synthetic:crash?bars=12000"), config=EnvConfig(episode_length=200)))
    config = Config(num_envs=64, num_steps=16, total_steps=4096, seed=seed, hidden=(16,))
    ppo, envs = make_ppo(config), VecEnv(env)
    state = learn(ppo, envs, init_state(ppo, envs))
    prints = {
        "rollout": rollout(env, jax.random.key(seed)),
        "another rollout": rollout(env, jax.random.key(seed + 1)),
        "training": state.learner,
    }
    print(json.dumps({name: fingerprint(tree) for name, tree in prints.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
