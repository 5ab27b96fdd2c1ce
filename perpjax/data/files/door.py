"""From files to the tables of each symbol: read, recognise, mend and judge, with the words for it."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax.data.contract import DataError
from perpjax.data.files.judge import judge
from perpjax.data.files.mend import Mended, mend
from perpjax.data.files.read import read_files
from perpjax.data.files.recognise import recognise
from perpjax.data.files.records import Choices, Kind, Series

KINDS: tuple[Kind, ...] = ("candles", "mark", "funding")


class Opened(NamedTuple):
    """The tables of one symbol, as the builder wants them."""

    symbol: str | None
    venue: str | None
    candles: pa.Table
    mark: pa.Table | None
    funding: pa.Table | None
    sources: Mapping[Kind, str]
    """Names of the tables for messages."""
    words: tuple[tuple[str, str], ...]
    """The choices and mendings: (file or kind, sentence)."""
    moves: tuple[tuple[int, float], ...]
    """The ten largest moves of a candle: open time (ms), and the fraction of the price."""


def open_files(
    paths: Sequence[Path],
    choices: Choices = Choices(),  # noqa: B008
    *,
    symbol: str | None = None,
    kinds: Mapping[Path, Kind] | None = None,
) -> list[Opened]:
    """Return the tables of every symbol in some files and folders, sorted by symbol.

    Args:
      paths: files, folders and globs.
      choices: guesses that the user has made or accepts.
      symbol: the symbol of all files; without it each file says its own.
      kinds: files with a kind that the user has said.

    Raises:
      DataError: a file cannot be read, or a guess would be needed that could change a number.
    """
    series = [recognise(raw, choices) for raw in read_files(paths)]
    for given, kind in (kinds or {}).items():
        for one in (s for s in read_named(series, given) if s.kind != kind):
            raise DataError(f"{one.source}: holds {one.kind}, and was given as {kind}; give it without the option")
    return [_open_symbol(name, parts, choices) for name, parts in group_by_symbol(series, symbol).items()]


def read_named(series: Sequence[Series], path: Path) -> list[Series]:
    """Return the series that come from a file, or from below a folder."""
    return [s for s in series if s.source == str(path) or s.source.startswith((f"{path}!", f"{path}/"))]


def group_by_symbol(series: Sequence[Series], symbol: str | None = None) -> dict[str | None, list[Series]]:
    """Return the series of each symbol, sorted by name. A series without a symbol belongs to the only one there is.

    Raises:
      DataError: a series has no symbol and there are several, or no symbol has candles.
    """
    names = sorted({s.symbol for s in series if s.symbol is not None})
    if symbol is not None:
        if names and names != [symbol] and symbol not in names:
            raise DataError(f"symbol {symbol} is in none of the files; they hold {', '.join(names)}")
        return {symbol: [s for s in series if s.symbol in (None, symbol)]}
    groups: dict[str | None, list[Series]] = {name: [] for name in names or [None]}
    for one in series:
        if one.symbol is None and len(names) > 1:
            raise DataError(
                f"{one.source}: its symbol is not clear, and the other files hold {', '.join(names)}; "
                "put the symbol into its name, or build this symbol alone with --symbol"
            )
        groups[one.symbol if one.symbol is not None else next(iter(groups))].append(one)
    for name, parts in groups.items():
        if not any(s.kind == "candles" for s in parts):
            kinds = " and ".join(sorted({s.kind for s in parts}))
            raise DataError(
                f"{parts[0].source}: {kinds} alone{f' of {name}' if name else ''}; give candles of the last price, too"
            )
    return groups


def group_kinds(series: Sequence[Series]) -> dict[tuple[str | None, Kind], list[Series]]:
    """Return the series of each symbol and kind."""
    groups: dict[tuple[str | None, Kind], list[Series]] = {}
    for one in series:
        groups.setdefault((one.symbol, one.kind), []).append(one)
    return groups


def _open_symbol(name: str | None, parts: list[Series], choices: Choices) -> Opened:
    words = [(one.source, "; ".join(one.taken)) for one in parts]
    mended: dict[Kind, Mended] = {}
    for kind in KINDS:
        of_kind = [one for one in parts if one.kind == kind]
        if kind != "funding":
            of_kind, passed = _choose_length(of_kind)
            words += [(one.source, "passed over: another file has finer candles") for one in passed]
        if of_kind:
            mended[kind] = mend(of_kind, choices)
            words += [(kind, text) for text in mended[kind].words]
    judged = judge(mended["candles"], mended.get("mark"), mended.get("funding"), name, choices)
    words += [("together", text) for text in judged.words]
    venues = collections.Counter(one.venue for one in parts if one.venue)
    return Opened(
        symbol=name,
        venue=venues.most_common(1)[0][0] if venues else None,
        candles=judged.candles,
        mark=judged.mark,
        funding=judged.funding,
        sources={kind: one.source for kind, one in mended.items()},
        words=tuple(words),
        moves=tuple(judged.moves),
    )


def _choose_length(parts: list[Series]) -> tuple[list[Series], list[Series]]:
    """The files with the shortest candles, and the others: a folder may hold 5-minute and 1-hour candles."""
    lengths = [_usual_step(one.table["open_time_ms"].to_numpy()) for one in parts]
    known = [length for length in lengths if length]
    shortest = min(known, default=0)
    chosen = [one for one, length in zip(parts, lengths, strict=True) if length in (0, shortest)]
    return chosen, [one for one in parts if all(one is not other for other in chosen)]


def _usual_step(stamps: np.ndarray) -> int:
    """The most frequent distance between stamps, ms; 0 with fewer than two."""
    steps = np.abs(np.diff(np.sort(stamps)))
    steps, counts = np.unique(steps[steps > 0], return_counts=True)
    return int(steps[counts.argmax()]) if len(steps) else 0
