"""`python -m train.evaluate RUN`: one account over a split, every lot of it, and its costs."""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perpjax.rules.orders import Verdict
from train.checkpoint import write_json
from train.evaluate.account import Played, play_account
from train.evaluate.lots import find_lots
from train.evaluate.measures import count_verdicts, make_waterfall, measure_equity, measure_lots
from train.ppo.load import LoadedPolicy, load_policy
from train.run_folder import find_run

KEY = 0


@dataclasses.dataclass(frozen=True)
class Args:
    """Play one account over each segment of a split with the greedy policy of a run, and write down every lot.

    Writes evaluation.json, equity.parquet and trades.parquet. Each lot is replayed in a float64 twin of the simulator,
    and the two must agree.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run: its folder, its name in runs/, or latest."""
    split: Literal["val", "test"] = "val"
    """The split. Every look at test makes it worth less."""
    which: Literal["best", "final"] = "best"
    """The policy: the best on validation, or the last one."""
    dataset: str | None = None
    """Another dataset of the same features."""
    out: pathlib.Path | None = None
    """Folder of the results; default RUN/evaluation-<split>."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m train.evaluate") -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on stderr."""
    args = tyro.cli(Args, args=argv, prog=prog)
    try:
        folder = find_run(args.run)
        policy = load_policy(folder, args.which)
        out = args.out or folder / f"evaluation-{args.split}"
        record = evaluate_policy(policy, args.split, out, args.dataset)
        show(record, out)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def evaluate_policy(policy: LoadedPolicy, split: str, out: pathlib.Path, dataset: str | None = None) -> dict[str, Any]:
    """Evaluate a policy on a split, write the three files, and return the content of evaluation.json.

    Raises:
      ValueError: the dataset does not fit, or the twin disagrees with the simulator.
      OSError: the folder cannot be written.
    """
    env = policy.env(split, dataset)
    played = play_account(env, policy, jax.random.key(KEY))
    lots, equity = find_lots(played), tabulate_equity(played)
    initial = float(env.params.initial_equity)
    days = sum(float(account.times()[-1] - account.times()[0]) for account in played) / 86_400_000
    net, moved = float(np.sum(lots["net"].to_numpy())), sum(float(a.states.equity[-1]) - initial for a in played)
    accounts = {f"{a.symbol} {i}" if len(played) > 1 else a.symbol: a for i, a in enumerate(played)}
    record = {
        "run": policy.run.name, "step": policy.step, "split": split, "dataset": dataset or policy.config.dataset,
        "accounts": {name: measure_equity(a.times(), a.states.equity.astype(float)) for name, a in accounts.items()},
        "lots": measure_lots(lots, days), "waterfall": make_waterfall(lots),
        "verdicts": count_verdicts([a.states.account.ledger for a in played], [v.name for v in Verdict]),
        "time_in_market": float(np.mean(np.concatenate([a.states.account.lots.quantity.any(axis=1) for a in played]))),
        "twin": {"steps": sum(a.steps for a in played), "lots_less_equity": (net - moved) / initial},
    }  # fmt: skip
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    out.mkdir(parents=True, exist_ok=True)
    for name, table in (("trades", lots), ("equity", equity)):
        temporary = out / f"{name}.parquet.tmp"
        pa.parquet.write_table(table, temporary, compression="zstd")
        temporary.replace(out / f"{name}.parquet")
    write_json(out / "evaluation.json", record)
    return record


def tabulate_equity(played: Sequence[Played]) -> pa.Table:
    """Return one row for each bar of each account: time, symbol, equity, wallet, lots held and notional at entry."""
    parts = []
    for account in played:
        states, lots = account.states, account.states.account.lots
        times = pa.array(account.times(), pa.timestamp("ms", "UTC"))
        columns = {
            "time": times, "symbol": pa.array([account.symbol] * len(times)), "equity": states.equity.astype(float),
            "wallet": states.account.wallet.astype(float), "lots": (lots.quantity > 0).sum(axis=1).astype(np.int32),
            "notional": (lots.margin * lots.leverage * np.sign(lots.side)).sum(axis=1).astype(float),
        }  # fmt: skip
        parts.append(pa.table(columns))
    return pa.concat_tables(parts)


def show(record: dict[str, Any], out: pathlib.Path) -> None:
    """Print the tables of an evaluation."""
    console = Console(highlight=False)
    title = f"{record['run']} after {record['step']:,} steps, {record['split']} split of {record['dataset']}"
    table = Table(title=Text(title), title_justify="left")
    names = ("return %", "drawdown %", "Sharpe", "± s.e.", "Sortino", "days")
    table.add_column("account")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name, m in record["accounts"].items():
        cells = (100 * m["return"], 100 * m["max_drawdown"], m.get("sharpe"), m.get("sharpe_error"), m.get("sortino"))
        table.add_row(name, *("-" if x is None else f"{x:+.2f}" for x in cells), f"{m['days']:.0f}")
    console.print(table)
    lots = record["lots"]
    if lots["lots"]:
        exits = ", ".join(f"{n} {name}" for name, n in sorted(lots["exits"].items(), key=lambda x: -x[1]))
        console.print(Text(
            f"{lots['lots']:,} lots, {lots['lots_a_week']:.1f} a week, {lots['mean_bars']:.1f} bars each; "
            f"{100 * lots['win_rate']:.0f} % won, {lots['expectancy']:+.2f} each; exits: {exits}"
        ))  # fmt: skip
        steps = "  ".join(f"{name.replace('_', ' ')} {value:+,.2f}" for name, value in record["waterfall"].items())
        console.print(Text(f"quote currency: {steps}"))
    else:
        console.print("no lot was opened")
    refused = ", ".join(f"{n:,} {name}" for name, n in record["verdicts"].items() if name not in ("HOLD", "ACCEPTED"))
    console.print(
        Text(f"orders refused: {refused or 'none'}; in the market {100 * record['time_in_market']:.0f} % of bars")
    )
    console.print(Text(f"the float64 twin agrees in all {record['twin']['steps']:,} bars; written to {out}"))


if __name__ == "__main__":
    sys.exit(main())
