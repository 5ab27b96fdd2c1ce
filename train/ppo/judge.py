"""The evaluation of a run's policy on a split of its data."""

import dataclasses
import hashlib
import json

from perpjax import PerpEnv
from perpjax.data.dataset import find_spans, open_sealed
from train.evaluate.evaluation import Evaluation, evaluate, read_traded
from train.ppo.config import LATER, Config
from train.ppo.load import LoadedPolicy

UNRELATED = ("run_dir", "report", "tensorboard", "checkpoint_every", "updates_per_chunk", "cache")
"""Settings that change no policy."""


def evaluate_policy(
    policy: LoadedPolicy,
    split: str,
    which: str | None = None,
    dataset: str | None = None,
    *,
    env: PerpEnv | None = None,
    quick: bool = False,
) -> Evaluation:
    """Evaluate a policy on a split of its dataset, or of another one.

    Args:
      policy: of a run.
      split: "val" or "test".
      which: "best" or "final", for the report.
      dataset: another dataset of the same features.
      env: of this split, if it is loaded already.
      quick: as in `evaluate`.

    Raises:
      ValueError: the dataset does not fit.
    """
    with open_sealed():
        env = env or policy.env(split, dataset)
    place = policy.locate(dataset)
    return evaluate(
        env,
        policy,
        name=policy.run.name,
        dataset=dataset or policy.config.dataset,
        split=split,
        traded=read_traded(place, env.market.symbols),
        spans=find_spans(place, env.market),
        facts={"run": policy.run.name, "which": which, "step": policy.step, "settings": hash_settings(policy)},
        quick=quick,
    )


def hash_settings(policy: LoadedPolicy) -> str:
    """Return the SHA-256 of the settings of a run, its seed among them."""
    # A setting that came later leaves the hash as it was, if it has its default.
    later = {f.name: f.default for f in dataclasses.fields(Config) if f.name in LATER}
    settings = {
        name: x
        for name, x in policy.config.to_json().items()
        if name not in UNRELATED and (name not in later or x != later[name])
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
