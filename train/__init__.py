"""Training and evaluating policies on perpjax: `python -m train.ppo --help`."""
