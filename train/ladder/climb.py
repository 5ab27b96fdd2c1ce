"""Run the rungs of the ladder, judge them, write and print the verdicts."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import perpjax
from perpjax import AutoReset, PerpEnv, VecEnv
from train.checkpoint import write_json
from train.hooks.display import Display
from train.ladder.faults import Fault, plant
from train.ladder.markets import UNSEEN
from train.ladder.plotting import draw_verdicts
from train.ladder.rungs import Figures, Run, Rung, Verdict, all_rungs, judge
from train.ppo.config import Config
from train.ppo.run import describe_run, init_state, learn, make_ppo
from train.state import Learner

RungName = Literal["martingale", "signal", "leak", "costs", "ruin"]
CAUGHT_BY: dict[Fault, tuple[RungName, ...]] = {
    "advantage-sign": ("ruin",),
    "stale-observations": ("leak",),
    "bootstrap-at-liquidation": ("ruin",),
}
"""Rungs that catch each fault."""
RESULTS = "results.json"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Train on five small worlds with a known answer, and check that the trainer finds it.

    martingale: prices are unpredictable; stay out. signal: earn 80 % of the best causal policy. leak: a feature shows
    the future; earn 90 % of the best possible, and the audit accuses the feature. costs: fees and slippage are doubled;
    trade less. ruin: an episode ends early; avoid it. Seed i trains on market i. Its greedy policy is judged on a
    market that it has never seen. Prints a table and writes results.json and ladder.png; exit status 1 if a rung fails.

    --broken all plants three faults in the trainer, one at a time, and shows that the rungs notice them.
    """

    rungs: tuple[RungName, ...] = ()
    """Rungs to run. Default: all; with --broken those that catch the fault. `costs` needs `signal` and runs it too."""
    seeds: int = 5
    """Number of seeds of every rung: 0 .. n - 1."""
    total_steps: int | None = None
    """Environment steps of a run. Default: each rung's own (6 million; `ruin` 3 million)."""
    network: Literal["mlp", "gru"] = "mlp"
    """Network of the policy, as in `perpjax train`."""
    broken: Fault | Literal["all"] | None = None
    """Fault to plant in the trainer; exit status 1 if its rungs do not notice."""
    out: pathlib.Path | None = None
    """Folder of the results; default runs/ladder-<time>. Finished runs in it are not repeated."""
    cache: bool = True
    """Keep compiled programs in the user's cache folder, as `perpjax train` does."""

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be at least 1")
        if self.seeds > UNSEEN:
            raise ValueError(f"seeds is {self.seeds}; it must be at most {UNSEEN}: market {UNSEEN} judges seed 0")


def climb(settings: Settings, ladder: Sequence[Rung] | None = None) -> bool:
    """Run, judge, write and print.

    Args:
      ladder: the rungs from which `settings` chooses; `all_rungs()` by default.

    Returns:
      Whether all rungs hold. With a planted fault: whether each faulty trainer fails one of its rungs.
    """
    faults = get_args(Fault) if settings.broken == "all" else (settings.broken,)
    plan = {fault: choose_rungs(settings, fault, ladder) for fault in faults}
    out = settings.out or pathlib.Path("runs") / f"ladder-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = read_runs(out)
    out.mkdir(parents=True, exist_ok=True)
    total, done = settings.seeds * sum(map(len, plan.values())), 0
    verdicts: dict[str, list[Verdict]] = {}
    for fault, rungs in plan.items():
        for rung in rungs:
            for seed in range(settings.seeds):
                done += 1
                print(f"[{done}/{total}] {_key(fault, rung.name, seed)}: {rung.asks}", file=sys.stderr, flush=True)
                run_once(runs, fault, rung, seed, out)
                write_json(out / RESULTS, _to_json(runs, verdicts))
            figures = [runs[_key(fault, rung.name, seed)]["figures"] for seed in range(settings.seeds)]
            verdicts.setdefault(fault or "whole", []).extend(judge(rung, figures))
    write_json(out / RESULTS, _to_json(runs, verdicts))
    print_verdicts(verdicts)
    if importlib.util.find_spec("matplotlib"):
        draw_verdicts(out / "ladder.png", verdicts)
    else:
        print("no picture without matplotlib: pip install 'perpjax[viz]'", file=sys.stderr)
    print(f"saved to {out}")
    return all(all(v.passed for v in of) == (name == "whole") for name, of in verdicts.items())


def choose_rungs(settings: Settings, fault: Fault | None, ladder: Sequence[Rung] | None = None) -> list[Rung]:
    """Return the rungs to climb, in order, with those that the chosen ones are compared with."""
    ladder = all_rungs() if ladder is None else ladder
    names = set(settings.rungs or (CAUGHT_BY[fault] if fault else get_args(RungName)))
    names |= {rung.after for rung in ladder if rung.name in names}
    changes = {"network": settings.network}
    if settings.total_steps is not None:
        changes["total_steps"] = settings.total_steps
    return [
        dataclasses.replace(rung, config=dataclasses.replace(rung.config, **changes))
        for rung in ladder
        if rung.name in names
    ]


def run_once(runs: dict[str, Any], fault: Fault | None, rung: Rung, seed: int, out: pathlib.Path) -> None:
    """Train and measure one seed of a rung, unless `runs` already holds it with the same settings."""
    config = dataclasses.replace(rung.config, seed=seed)
    key, described = _key(fault, rung.name, seed), json.loads(json.dumps(config.to_json()))
    if runs.get(key, {}).get("config") == described:
        return
    earlier: Figures = runs[_key(fault, rung.after, seed)]["figures"] if rung.after else {}

    def train(env: PerpEnv, config: Config) -> Learner:
        ppo, envs = plant(fault, make_ppo(config), VecEnv(AutoReset(env)))
        with Display() as display:
            display.on_start(describe_run(config, f"rung {rung.name}", out))
            display.on_stage("compiling")
            return learn(ppo, envs, init_state(ppo, envs), (display,)).learner

    began = time.monotonic()
    figures = rung.measure(Run(config, train, earlier))
    runs[key] = {"figures": figures, "seconds": round(time.monotonic() - began, 1), "config": described}


def read_runs(out: pathlib.Path) -> dict[str, Any]:
    """Return the finished runs of an output folder, by name.

    Raises:
      ValueError: the results file was not written by this program.
    """
    path = out / RESULTS
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a ladder's results ({error!r}); name another folder") from error


def print_verdicts(verdicts: dict[str, list[Verdict]]) -> None:
    """Print a table for each trainer, with a line for each check."""
    console = Console(file=sys.stdout)
    for trainer, of in verdicts.items():
        title = f"{trainer} trainer, greedy on unseen markets, {len(of[0].values)} seeds"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for head in ("rung", "measured", "must be", "mean (min .. max)", ""):
            table.add_column(head, no_wrap=head != "measured")
        for v in of:
            spread = f"{v.mean:.3f} ({min(v.values):.3f} .. {max(v.values):.3f})"
            told = f"{'holds' if v.passed else 'FAILS'} {v.seeds_passed}/{len(v.values)}"
            table.add_row(v.rung, v.check.says, describe_range(v), spread, told)
        console.print(table)


def describe_range(v: Verdict) -> str:
    """Format the range of a check, such as "0.60 .. 0.85" or ">= 0.90"."""
    low, high = v.check.low, v.check.high
    if math.isfinite(low) and math.isfinite(high):
        return f"{low:g} .. {high:g}"
    return f">= {low:g}" if math.isfinite(low) else f"<= {high:g}"


def _key(fault: Fault | None, rung: str, seed: int) -> str:
    return f"{fault or 'whole'}/{rung}/{seed}"


def _to_json(runs: dict[str, Any], verdicts: dict[str, list[Verdict]]) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "jax": jax.__version__, "perpjax": perpjax.__version__}
    judged = [
        {"trainer": trainer, "rung": v.rung, "measured": v.check.says, "must be": describe_range(v)}
        | {"mean": v.mean, "values": v.values, "passed": v.passed}
        for trainer, of in verdicts.items()
        for v in of
    ]
    return {"versions": versions, "device": jax.devices()[0].platform, "verdicts": judged, "runs": runs}
