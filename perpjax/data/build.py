"""`python -m perpjax.data.build`: from files of candles to a dataset folder, with a table of the findings."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perpjax._describe import format_time
from perpjax.data.builder import Built, FeatureFunction, Sources, build, build_market, find_function
from perpjax.data.contract import DataError, read_table
from perpjax.data.dataset import (
    DEFAULT_FRACTIONS,
    EPISODE_LENGTH,
    Split,
    check_out,
    fit_on_train,
    split_by_date,
    split_by_fraction,
    write_dataset,
)

__all__ = ["Args", "build_market", "main"]

_SYMBOL = re.compile(r"[A-Z0-9]+(?:USDT|USDC|USD)")
_SHOWN_GAPS = 5


@dataclasses.dataclass(frozen=True)
class Args:
    """Build a dataset of one perpetual from its candles, check all data, and print the findings.

    Files are Parquet, Feather or CSV. Candles: open_time_ms (int64, UTC), open, high, low, close, volume. Mark: the
    columns of candles without volume. Funding: time_ms, funding_rate. Without --out nothing is written.
    """

    candles: Path
    """Last-price candles of 1, 3, 5 or 15 minutes."""
    mark: Path | None = None
    """Mark-price candles. Those of the candles' length decide liquidations; coarser ones only price the funding."""
    funding: Path | None = None
    """Funding settlements. Without them the rate is 0."""
    symbol: str | None = None
    """The venue's name of the contract, such as BTCUSDT; taken from the file names if they agree on one."""
    out: Path | None = None
    """Folder to write the dataset to."""
    split: tuple[float, float, float] | None = None
    """Fractions of the decision bars for train, val and test, in time order (default 0.7 0.15 0.15)."""
    train_end: str | None = None
    """Instead of fractions: the first day (00:00 UTC) after training, such as 2025-06-01."""
    val_end: str | None = None
    """The first day after validation."""
    episode_length: int = EPISODE_LENGTH
    """Bars of an episode; the embargo between two splits has the same length."""
    features: str = "core"
    """core, none, or module:function, a function (bars, funding) -> pyarrow.Table."""
    tick_size: float | None = None
    """Price grid; by default the symbol's known tick, or else the grid of the prices."""
    step_size: float | None = None
    """Quantity grid, base currency."""
    min_notional: float | None = None
    """Smallest order, quote currency."""
    max_quantity: float | None = None
    """Largest market order, base currency."""
    maintenance_fee_rate: float | None = None
    """Closing fee inside the maintenance requirement: 0 on Binance and Bybit, the taker fee on OKX, Gate, Bitget."""
    force: bool = False
    """Replace the dataset in the folder."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m perpjax.data.build") -> int:
    """Run the command line; returns the exit status: 0, or 2 after one line on stderr."""
    args = tyro.cli(Args, args=argv, prog=prog)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _run(args: Args) -> None:
    if args.out is not None:
        check_out(args.out, args.force)
    symbol, notes = args.symbol, []
    if symbol is None:
        symbol = guess_symbol([p for p in (args.candles, args.mark, args.funding) if p is not None])
        notes = [f"symbol {symbol} taken from the file names"]
    built = build(
        read_table(args.candles),
        None if args.mark is None else read_table(args.mark),
        None if args.funding is None else read_table(args.funding),
        features=find_features(args.features),
        symbol=symbol,
        sources=Sources(str(args.candles), str(args.mark), str(args.funding), f"features {args.features}"),
        tick_size=args.tick_size,
        step_size=args.step_size,
        min_notional=args.min_notional,
        max_quantity=args.max_quantity,
        maintenance_fee_rate=args.maintenance_fee_rate,
    )
    built = built._replace(report=built.report._replace(notes=(*notes, *built.report.notes)))
    splits = _split(args, built)
    scaler = fit_on_train(built.market, splits)
    console = Console()
    if args.out is not None:
        write_dataset(
            built,
            splits,
            scaler,
            args.out,
            episode_length=args.episode_length,
            features=args.features,
            force=args.force,
        )
    for table in tabulate(built, splits, args.episode_length):
        console.print(table)
    console.print("nothing written: give --out DIR" if args.out is None else f"written to {args.out}", markup=False)


def guess_symbol(paths: list[Path]) -> str:
    """Return the one symbol in the names of the files.

    Raises:
      ValueError: there is no symbol, or there are several.
    """
    words = [word for path in paths for word in re.split(r"[^A-Za-z0-9]+", path.stem.upper())]
    found = sorted({word for word in words if _SYMBOL.fullmatch(word)})
    if len(found) != 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"the symbol is not clear from {names} ({', '.join(found) or 'none found'}); give --symbol")
    return found[0]


def find_features(spec: str) -> str | FeatureFunction | None:
    """Return the features of the command line: "core", None for "none", or the function named module:function.

    An exception of the function itself becomes a `DataError`.

    Raises:
      ValueError: there is no such function.
    """
    if spec == "core":
        return spec
    if spec == "none":
        return None
    function = find_function(spec)

    def call(bars: pa.Table, funding: pa.Table | None) -> pa.Table:
        try:
            return function(bars, funding)
        except Exception as error:
            raise DataError(f"features {spec}: raised {type(error).__name__}: {error}") from error

    return call


def _split(args: Args, built: Built) -> tuple[Split, ...]:
    dates = (args.train_end, args.val_end)
    if dates == (None, None):
        return split_by_fraction(built.market, args.split or DEFAULT_FRACTIONS, args.episode_length)
    if None in dates or args.split is not None:
        raise ValueError("give --train-end and --val-end together, and no --split beside them")
    return split_by_date(built.market, args.train_end, args.val_end, args.episode_length)


def tabulate(built: Built, splits: tuple[Split, ...], episode_length: int) -> tuple[Table, Table]:
    """Return the tables of the findings and of the splits."""
    market, report, instrument = built.market, built.report, built.instrument
    bars, k = market.num_bars, market.candles_per_bar
    found = Table(title=f"{instrument.symbol}", show_header=False, title_justify="left")
    found.add_column(style="bold", no_wrap=True)
    found.add_column()

    def add(name: str, text: str) -> None:
        found.add_row(name, Text(text))

    add("span (UTC)", f"{format_time(market.start_ms)} to {format_time(market.open_time_ms(bars))}")
    add("bars", f"{bars:,} of 15 minutes, each of K = {k} candles of {report.interval_ms / 60_000:g} minutes")
    shown = ", ".join(f"{format_time(start)} ({count:,})" for start, count in report.gaps[:_SHOWN_GAPS])
    more = f" and {len(report.gaps) - _SHOWN_GAPS:,} more" if len(report.gaps) > _SHOWN_GAPS else ""
    add("gaps", f"{len(report.gaps):,}" + (f": from {shown}{more}" if shown else ""))
    add("invalid candles", f"{report.missing:,} missing, {report.untraded:,} without volume")
    add("tick, step", f"{instrument.tick_size:g}, {instrument.step_size:g}")
    add("limits", f"at least {instrument.min_notional:g} notional, at most {instrument.max_quantity:g} in one order")
    hours = ", ".join(f"{h:g} h ({n:,})" for h, n in sorted(report.funding_hours.items(), key=lambda x: -x[1]))
    add("funding", f"{report.settlements:,} settlements" + (f", every {hours}" if hours else ""))
    add("features", f"{len(market.feature_names)} columns; first decision bar {int(market.segments.first[0])}")
    add("notes", "\n".join(report.notes))

    cut = Table(title=f"splits, {episode_length} bars apart", title_justify="left")
    for name in ("split", "from (UTC)", "to", "bars", "episode starts"):
        cut.add_column(name, justify="right" if name in ("bars", "episode starts") else "left")
    for s in splits:
        span = (format_time(market.open_time_ms(s.start)), format_time(market.open_time_ms(s.stop)))
        cut.add_row(s.name, *span, f"{s.stop - s.start:,}", f"{s.num_starts(episode_length):,}")
    return found, cut


if __name__ == "__main__":
    sys.exit(main())
