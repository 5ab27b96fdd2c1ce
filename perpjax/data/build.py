"""`python -m perpjax.data.build`: from files as users have them to a dataset folder, with tables of the findings."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perpjax._describe import format_time
from perpjax._grid import BAR_MS, FIRST_DECISION
from perpjax.data.builder import FUNCTIONS, Built, FeatureFunction, Sources, build, build_market, find_function
from perpjax.data.contract import DataError
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
from perpjax.data.files.door import Opened, open_files
from perpjax.data.files.records import Choices
from perpjax.data.instruments import Contract, read_contracts
from perpjax.data.many import choose_dates, fit_symbols, split_symbols, write_symbols
from perpjax.data.markets import find_traded
from perpjax.data.scaler import Scaler

__all__ = ["Args", "build_market", "main"]

HOLE_BARS = 4
"""With `--allow-gaps` so many bars in a row without a trade are a hole, which no episode spans."""
LEAST_TRADED = 0.5
"""Least share of a split's bars in which something must have traded."""
_SHOWN_GAPS = 5
_DAY_BARS = 96


@dataclasses.dataclass(frozen=True)
class Args:
    """Build a dataset from files of an exchange, of freqtrade, ccxt or TradingView, or of your own; check all of it.

    Candles, mark prices and funding are told apart by their columns, and so are several symbols. Files may be CSV,
    JSON, Parquet or Feather, alone, zipped or in folders. Nothing is guessed that could change a number: each refusal
    names the option that accepts it. Without --out nothing is written.

    python -m perpjax.data.build user_data/data/binance/futures --out datasets/all
    python -m perpjax.data.build BTCUSDT-5m-*.zip BTCUSDT-fundingRate-*.zip --out datasets/btc
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Files, folders or globs: candles of 1, 3, 5 or 15 minutes, and if you have them mark candles and funding."""
    candles: Path | None = None
    """A file of last-price candles; the same as among the files."""
    mark: Path | None = None
    """A file of mark-price candles. Those of the candles' length decide liquidations; coarser ones only price the
    funding."""
    funding: Path | None = None
    """A file of funding settlements. Without them the rate is 0."""
    symbol: str | None = None
    """The venue's name of the contract, such as BTCUSDT, if the files do not say it; of several, the one to build."""
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
    """core, price (core without volume), none, or module:function, a function (bars, funding) -> pyarrow.Table."""
    instruments: tuple[Path, ...] = ()
    """The venue's contracts: exchangeInfo and leverageBracket of Binance, or markets of ccxt, as JSON."""
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
    choices: tyro.conf.OmitArgPrefixes[Choices] = dataclasses.field(default_factory=Choices)
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
    kinds = {path: kind for kind in ("candles", "mark", "funding") if (path := getattr(args, kind)) is not None}
    paths = [*args.files, *kinds]
    if not paths:
        raise ValueError("no file given; name the files or folders to build from, or see --help")
    opened = open_files(paths, args.choices, symbol=args.symbol, kinds=kinds)
    contracts = read_contracts(args.instruments)
    builts = {one.symbol: _build(one, contracts.get(one.symbol), args) for one in opened}
    console = Console()
    for one in opened:
        console.print(tabulate_files(one))
    splits = _split(args, builts)
    scaler = _fit(builts, splits)
    extra = {one.symbol: _describe_files(one) for one in opened}
    if args.out is not None:
        names = dict(episode_length=args.episode_length, features=_feature_name(args), force=args.force)
        if len(builts) > 1:
            write_symbols(builts, splits, scaler, args.out, extra=extra, **names)
        else:
            ((symbol, built),) = builts.items()
            write_dataset(built, splits[symbol], scaler, args.out, extra=extra[symbol], **names)
    for symbol, built in builts.items():
        for table in tabulate(built, splits[symbol], args.episode_length):
            console.print(table)
    console.print("nothing written: give --out DIR" if args.out is None else f"written to {args.out}", markup=False)


def _build(one: Opened, contract: Contract | None, args: Args) -> Built:
    if one.symbol is None:
        raise ValueError(f"the symbol is not clear from {', '.join(sorted(set(one.sources.values())))}; give --symbol")
    given = ("tick_size", "step_size", "min_notional", "max_quantity", "maintenance_fee_rate")
    numbers = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    name = _feature_name(args)
    stamps = one.candles["open_time_ms"].to_numpy()
    if args.train_end is None:
        check_length(
            (int(stamps[-1]) - int(stamps[0])) // BAR_MS + 1, args.split or DEFAULT_FRACTIONS, args.episode_length
        )
    return build(
        one.candles,
        one.mark,
        one.funding,
        features=find_features(name),
        symbol=one.symbol,
        sources=Sources(*(one.sources.get(kind, kind) for kind in ("candles", "mark", "funding")), f"features {name}"),
        hole_bars=HOLE_BARS if args.choices.allow_gaps else None,
        **((contract.numbers() if contract else {}) | numbers),
    )


def _feature_name(args: Args) -> str:
    """The features; those of volume are left out where the volume is unknown."""
    unknown = args.choices.no_volume or args.choices.volume_unknown
    return "price" if unknown and args.features == "core" else args.features


def check_length(bars: int, fractions: tuple[float, float, float], episode_length: int) -> None:
    """Raise unless so many bars have room for an episode in each split.

    Raises:
      ValueError: naming the days there are, the days that are needed, and an episode that would fit.
    """
    # A split that is followed by an embargo holds an episode and the embargo of one.
    share = min(fractions[0] / 2, fractions[1] / 2, fractions[2])
    if not share > 0:
        return  # `split_by_fraction` says so
    needed = FIRST_DECISION + math.ceil(episode_length / share) + 1
    if bars >= needed:
        return
    days, fits = bars / _DAY_BARS, int((bars - FIRST_DECISION - 1) * share)
    remedy = f"; --episode-length {fits} builds from {days:.0f}" if fits >= 4 else ""
    raise ValueError(
        f"{days:.1f} days given; {math.ceil(needed / _DAY_BARS)} are needed with these splits and episodes of "
        f"{episode_length} bars ({FIRST_DECISION} bars come before the first decision){remedy}"
    )


def find_features(spec: str) -> str | FeatureFunction | None:
    """Return the features of the command line: a short name, None for "none", or the function module:function.

    An exception of the function itself becomes a `DataError`.

    Raises:
      ValueError: there is no such function.
    """
    if spec in FUNCTIONS:
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


def _split(args: Args, builts: Mapping[str, Built]) -> dict[str, tuple[Split, ...]]:
    """The splits of each symbol: by fractions or dates, and at the same dates if there are several symbols."""
    dates = (args.train_end, args.val_end)
    if dates != (None, None) and (None in dates or args.split is not None):
        raise ValueError("give --train-end and --val-end together, and no --split beside them")
    markets = {symbol: built.market for symbol, built in builts.items()}
    fractions = args.split or DEFAULT_FRACTIONS
    if len(markets) > 1:
        ends = choose_dates(markets, fractions) if dates == (None, None) else dates
        splits = split_symbols(markets, *ends, args.episode_length)
    else:
        ((symbol, market),) = markets.items()
        if dates == (None, None):
            splits = {symbol: split_by_fraction(market, fractions, args.episode_length)}
        else:
            splits = {symbol: split_by_date(market, *dates, args.episode_length)}
    for symbol, market in markets.items():
        traded = find_traded(market)
        for split in splits[symbol]:
            share = traded[split.start : split.stop].mean() if split.num_bars else 1.0
            if share < LEAST_TRADED:
                raise DataError(
                    f"{symbol}: something traded in only {share:.0%} of the bars of the {split.name} split; at least "
                    f"{LEAST_TRADED:.0%} are needed: choose other splits, or leave the symbol out"
                )
    return splits


def _fit(builts: Mapping[str, Built], splits: Mapping[str, tuple[Split, ...]]) -> Scaler:
    if len(builts) > 1:
        return fit_symbols({symbol: built.market for symbol, built in builts.items()}, splits)
    ((symbol, built),) = builts.items()
    return fit_on_train(built.market, splits[symbol])


def _describe_files(one: Opened) -> dict[str, Any]:
    """Entries of the manifest about the files."""
    moves = [{"time": format_time(time), "move": round(move, 6)} for time, move in one.moves]
    return {"venue": one.venue, "taken": [list(pair) for pair in one.words], "largest_moves": moves}


def tabulate_files(one: Opened) -> Table:
    """Return the table of the choices made for the files. Files with the same choices share a row."""
    table = Table(title=f"{one.symbol}: files", show_header=False, title_justify="left", show_lines=True)
    table.add_column(style="bold", overflow="fold", max_width=40)
    table.add_column(overflow="fold")
    groups: dict[str, list[str]] = {}
    for source, text in one.words:
        groups.setdefault(text, []).append(Path(source.partition("!")[0]).name)
    for text, names in groups.items():
        names = list(dict.fromkeys(names))
        table.add_row(Text(names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")), Text(text))
    return table


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

    traded = find_traded(market)
    cut = Table(title=f"splits, {episode_length} bars apart", title_justify="left")
    for name in ("split", "from (UTC)", "to", "bars", "traded", "episode starts"):
        cut.add_column(name, justify="left" if name in ("split", "from (UTC)", "to") else "right")
    for s in splits:
        span = (format_time(market.open_time_ms(s.start)), format_time(market.open_time_ms(s.stop)))
        in_use = f"{int(traded[s.start : s.stop].sum()):,}"
        cut.add_row(s.name, *span, f"{s.num_bars:,}", in_use, f"{s.num_starts(episode_length):,}")
    return found, cut


if __name__ == "__main__":
    sys.exit(main())
