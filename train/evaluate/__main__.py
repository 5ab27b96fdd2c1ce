"""`python -m train.evaluate RUN`: one account over a split, every lot of it, its costs, and a report."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.compilation import use_cache
from train.ppo.judge import evaluate_policy
from train.ppo.load import load_policy
from train.run_folder import clean, find_run


@dataclasses.dataclass(frozen=True)
class Args:
    """Play one account over each segment of a split with the greedy policy of a run, and judge the result.

    Writes evaluation.json, equity.parquet, trades.parquet, candles.parquet and report.html. Each lot is replayed in a
    float64 twin of the simulator. Beside the policy stand buy and hold, a trend rule, a carry rule and 200 random
    traders of its kind, and the policy itself under other costs and one bar later.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run: its folder, its name in runs/, or latest."""
    split: Literal["val", "test"] = "val"
    """The split. Every look at test makes it worth less, and is counted."""
    which: Literal["best", "final"] = "best"
    """The policy: the best on validation, or the last one."""
    dataset: str | None = None
    """Another dataset of the same features."""
    out: pathlib.Path | None = None
    """Folder of the results; default RUN/evaluation-<split>."""
    cache: bool = True
    """Keep compiled programs in the user's cache folder, as `perpjax train` does."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m train.evaluate") -> int:
    """Run the command line; returns the exit status.

    0; 1 if simulator and twin disagree; 2 after one line on stderr.
    """
    args = tyro.cli(Args, args=argv, prog=prog)
    try:
        use_cache(args.cache)
        folder = find_run(args.run)
        policy = load_policy(folder, args.which)
        out = args.out or folder / f"evaluation-{args.split}"
        evaluation = evaluate_policy(policy, args.split, args.which, args.dataset)
        evaluation.save(out)
        show(evaluation.record, out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if evaluation.record["twin"]["agrees"] else 1


def show(record: dict[str, Any], out: pathlib.Path) -> None:
    """Print an evaluation: the verdict, the policy among its baselines, the costs, the stresses."""
    console = Console(highlight=False)
    for sentence in (*record["verdict"], *_other_reasons(record)):
        console.print(Text(clean(sentence)))
    console.print(_tabulate(record))
    lots = record["lots"]
    if lots["lots"]:
        exits = ", ".join(f"{n} {name}" for name, n in sorted(lots["exits"].items(), key=lambda x: -x[1]))
        console.print(Text(
            f"{lots['lots']:,} lots, {lots['lots_a_week']:.1f} a week, {lots['mean_bars']:.1f} bars each; "
            f"{100 * lots['win_rate']:.0f} % won, {lots['expectancy']:+.2f} each; exits: {exits}"
        ))  # fmt: skip
        steps = "  ".join(f"{name.replace('_', ' ')} {value:+,.2f}" for name, value in record["waterfall"].items())
        console.print(Text(f"quote currency: {steps}"))
    if record["stresses"] and lots["lots"]:
        console.print(_tabulate_stresses(record))
    refused = ", ".join(f"{n:,} {name}" for name, n in record["verdicts"].items() if name not in ("HOLD", "ACCEPTED"))
    console.print(
        Text(f"orders refused: {refused or 'none'}; in the market {100 * record['time_in_market']:.0f} % of bars")
    )
    twin = record["twin"]
    if twin["agrees"]:
        console.print(Text(
            f"the float64 twin agrees in all {twin['bars']:,} bars: equity within {twin['largest_difference']:.0e}"
        ))  # fmt: skip
    else:
        console.print(Text(f"THE FLOAT64 TWIN DISAGREES: {clean('; '.join(twin['disagreements']))}"), style="bold red")
    console.print(Text(clean(record["trials"]["note"])))
    console.print(Text(f"report: {clean(out / 'report.html')}"))


def _other_reasons(record: dict[str, Any]) -> list[str]:
    """The sentences of the diagnosis that the verdict does not have."""
    return [x["text"] for x in record["diagnosis"] if x["text"] not in record["verdict"]]


_CAPTION = "fall: the deepest from a peak. less it: difference of the two returns, with its 90 % interval."


def _tabulate(record: dict[str, Any]) -> Table:
    split = f", {record['data']['split']} split" if record["data"]["split"] else ""
    title = f"{record['policy']['name']}{split} of {record['data']['dataset']}"
    table = Table(
        title=Text(clean(title)),
        title_justify="left",
        caption=_CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("account", no_wrap=True)
    for name in ("return %", "fall %", "Sharpe", "lots", "less it %"):
        table.add_column(name, justify="right", no_wrap=True)
    overall = record["overall"]
    error = f" ± {overall['sharpe_error']:.1f}" if "sharpe_error" in overall else ""
    table.add_row("policy", *_figures(overall, record["lots"]["lots"], error), "", style="bold")
    for baseline in record["baselines"]:
        row = _figures(baseline, baseline["lots"])
        table.add_row(Text(clean(baseline["name"])), *row, _tell_difference(baseline))
    random = record["random"]
    if "place" in random:
        mean = sum(random["returns"]) / len(random["returns"])
        place = f"above {100 * random['place']:.0f} %"
        table.add_row(f"{len(random['returns'])} random traders", f"{100 * mean:+.2f}", "", "", "", place)
    return table


def _tabulate_stresses(record: dict[str, Any]) -> Table:
    table = Table(title="Played anew", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("with", min_width=20)
    for name in ("return %", "lots", "less the policy %"):
        table.add_column(name, justify="right", no_wrap=True)
    for x in record["stresses"]:
        title = clean(x["title"]) + " (ruin)" * bool(x["ruined"])
        table.add_row(Text(title), f"{100 * x['return']:+.2f}", f"{x['lots']:,}", _tell_difference(x))
    return table


def _tell_difference(found: dict[str, Any]) -> str:
    """The difference of two returns and its 90 % interval, in percent."""
    interval = found["interval"]
    spread = f" ({100 * interval[0]:+.0f} to {100 * interval[1]:+.0f})" if interval else ""
    return f"{100 * found['difference']:+.0f}{spread}"


def _figures(found: dict[str, Any], lots: int | None, error: str = "") -> list[str]:
    sharpe = f"{found['sharpe']:+.2f}{error}" if "sharpe" in found else "-"
    count = "-" if lots is None else f"{lots:,}"
    return [f"{100 * found['return']:+.2f}", f"{100 * found['max_drawdown']:.2f}", sharpe, count]


if __name__ == "__main__":
    sys.exit(main())
