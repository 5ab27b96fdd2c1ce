"""The console script `perpjax`: one name for every command, also in a folder that holds a `train.py` of its own."""

import contextlib
import difflib
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence

from perpjax import __version__
from perpjax._trainer import use_trainer

COMMANDS = {
    "train": ("train.ppo.__main__", "Train a PPO policy, or go on with a run."),
    "runs": ("train.runs", "List, show and compare the runs of the trainer."),
    "evaluate": ("train.evaluate.__main__", "Play a run's policy over a split, and write down every lot."),
    "report": ("train.report.__main__", "Write the HTML report of an evaluation, or compare several."),
    "ladder": ("train.ladder.__main__", "Check the trainer on five small worlds with a known answer."),
    "build": ("perpjax.data.build", "Build a dataset from files of candles, and print the findings."),
    "data": ("perpjax.data.__main__", "Make one table out of files, or list the files and their contents."),
    "audit": ("perpjax.audit.__main__", "Find the columns of a feature function that look ahead."),
    "parity": ("perpjax.audit.parity", "Compare the simulator with its float64 twin, step by step."),
    "fuzz": ("perpjax.audit.fuzz", "Check the invariants of an account in random episodes."),
}
"""By name: the module, and one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the arguments after its name, and return the exit status; 2 for a wrong name."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        return _say(_describe_commands())
    if args[0] == "--version":
        return _say(f"perpjax {__version__}")
    name, *rest = args
    if name not in COMMANDS:
        (near,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        shown = ascii(name)[1:-1][:40]
        print(f"error: perpjax has no command {shown}; the nearest is {near}; see perpjax --help", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    # The user's own functions, such as those of `build --features train:f`, may lie in a module `train`.
    with use_trainer() if module.startswith("train.") else contextlib.nullcontext():
        return importlib.import_module(module).main(rest, prog=f"perpjax {name}") or 0


def _describe_commands() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: perpjax COMMAND [OPTIONS]",
            "",
            *textwrap.wrap("Train and audit trading policies on crypto perpetual futures.", 78),
            "",
            *(f"  {name:{width}}  {sentence}" for name, (_, sentence) in COMMANDS.items()),
            "",
            "perpjax COMMAND --help has the options of a command. perpjax --version prints the version.",
        ]
    )


def _say(text: str) -> int:
    """Print to a reader that may have gone, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
