"""Datasets of several symbols: a folder of one dataset a symbol, split at the same UTC dates, with one scaler.

Splits by fractions of each symbol would put the same days of correlated coins into training and validation.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perpjax.data.builder import Built
from perpjax.data.contract import BAR_MS
from perpjax.data.dataset import (
    DEFAULT_FRACTIONS,
    MANY_VERSION,
    SPLIT_NAMES,
    Split,
    parse_midnight,
    replacing,
    training_rows,
    write_files,
    write_manifest,
)
from perpjax.data.markets import concatenate_markets
from perpjax.data.scaler import Scaler, attach_scaler, fit_scaler_on
from perpjax.market import Market

_DAY_MS = 86_400_000


def choose_dates(
    markets: Mapping[str, Market], fractions: tuple[float, float, float] = DEFAULT_FRACTIONS
) -> tuple[str, str]:
    """Return the first days after training and after validation, by fractions of the span of all symbols."""
    opens = [market.open_time_ms(int(market.segments.first[0])) for market in markets.values()]
    ends = [market.open_time_ms(market.num_bars) for market in markets.values()]
    first, span = min(opens), max(ends) - min(opens)
    cuts = (first + fractions[0] * span, first + (fractions[0] + fractions[1]) * span)
    days = (datetime.datetime.fromtimestamp(round(cut / _DAY_MS) * 86_400, datetime.UTC) for cut in cuts)
    train_end, val_end = (f"{day:%Y-%m-%d}" for day in days)
    return train_end, val_end


def split_symbols(
    markets: Mapping[str, Market], train_end: str, val_end: str, episode_length: int
) -> dict[str, tuple[Split, ...]]:
    """Split every symbol at the same UTC midnights, with an embargo of one episode before each.

    A symbol may lack a split: one that was listed later has no bar in training.

    Raises:
      ValueError: a text is not a date, the dates are out of order, or no symbol has room for an episode in a split.
    """
    ends = [parse_midnight("train end", train_end), parse_midnight("val end", val_end)]
    if ends[0] >= ends[1]:
        raise ValueError(f"train end {train_end} is not before val end {val_end}")
    splits = {}
    for symbol, market in markets.items():
        first, bars = int(market.segments.first[0]), market.num_bars
        cuts = [min(max((end - market.start_ms) // BAR_MS, first), bars) for end in ends]
        stops = (cuts[0] - episode_length, cuts[1] - episode_length, bars)
        parts = zip(SPLIT_NAMES, (first, *cuts), stops, strict=True)
        # A stub without room for one episode is left out.
        splits[symbol] = tuple(Split(name, a, b if b - a >= episode_length else a) for name, a, b in parts)
    for i, name in enumerate(SPLIT_NAMES):
        if not any(parts[i].num_bars for parts in splits.values()):
            raise ValueError(
                f"no symbol has room for an episode of {episode_length} bars in the {name} split, which is cut at "
                f"{train_end} and {val_end}; use more candles, shorter episodes or other dates"
            )
    return splits


def fit_symbols(markets: Mapping[str, Market], splits: Mapping[str, tuple[Split, ...]]) -> Scaler:
    """Fit one scaler on the traded training bars of all symbols."""
    parts = [(market, training_rows(market, splits[symbol])) for symbol, market in markets.items()]
    return fit_scaler_on([(market, rows) for market, rows in parts if len(rows)])


def write_symbols(
    builts: Mapping[str, Built],
    splits: Mapping[str, tuple[Split, ...]],
    scaler: Scaler,
    out: Path,
    *,
    episode_length: int,
    features: str | None = None,
    force: bool = False,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write a dataset of several symbols, whole or not at all, and return its manifest.

    Args:
      extra: more entries of each symbol's manifest.

    Raises:
      DataError: the folder exists.
      ValueError: the symbols do not fit together, such as candles of different lengths.
    """
    # What cannot be loaded is not written.
    concatenate_markets([attach_scaler(built.market, scaler) for built in builts.values()])
    with replacing(out, force) as new:
        digests = {}
        for symbol, built in builts.items():
            (new / symbol).mkdir()
            manifest = write_files(
                built,
                splits[symbol],
                scaler,
                new / symbol,
                episode_length=episode_length,
                features=features,
                extra=(extra or {}).get(symbol),
            )
            digests[symbol] = manifest["manifest_sha256"]
        return write_manifest(
            new,
            {
                "schema_version": MANY_VERSION,
                "symbols": digests,
                "episode_length": episode_length,
                "features": features,
                "splits": {
                    name: {symbol: parts[i].num_starts(episode_length) for symbol, parts in splits.items()}
                    for i, name in enumerate(SPLIT_NAMES)
                },
            },
        )
