"""Proximal policy optimisation: `python -m train.ppo --help`.

    python -m train.ppo --num-envs 4096
    python -m train.ppo --dataset path/to/dataset --total-steps 30_000_000 --seed 1

`algorithm` is the algorithm, `losses` its arithmetic, `config` its settings, `run` one run from dataset to table.
"""
