"""Datasets on disk: a folder of Parquet files and a manifest, its splits by time, and its `Market`."""

import contextlib
import contextvars
import datetime
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from perpjax._describe import format_time, is_concrete
from perpjax._grid import FIRST_DECISION
from perpjax.data import synthetic
from perpjax.data.builder import Built, Sources, build
from perpjax.data.contract import BAR_MS, DataError
from perpjax.data.ledger import enter_opened, market_spans
from perpjax.data.markets import concatenate_markets, find_traded, slice_market
from perpjax.data.scaler import Scaler, attach_scaler, fit_scaler
from perpjax.instrument import Instrument
from perpjax.market import Market
from perpjax.params import EnvConfig

SCHEMA_VERSION = 1
"""Version of the manifest and its files. It is raised whenever an older reader would misread a newer folder."""
MANY_VERSION = 2
"""Version of the manifest of several symbols: each has its folder of version 1, see `perpjax.data.many`."""
MANIFEST = "manifest.json"
SPLIT_NAMES = ("train", "val", "test")
DEFAULT_FRACTIONS = (0.70, 0.15, 0.15)
EPISODE_LENGTH = EnvConfig.episode_length
"""Bars of the environment's default episode, and so of the default embargo between splits."""

SEALED = ("test",)
"""Splits whose loading enters the ledger."""

_sealed_open: contextvars.ContextVar[bool] = contextvars.ContextVar("_sealed_open", default=False)
_SYNTHETIC = "synthetic:"
_INSTRUMENT_FIELDS = ("tick_size", "step_size", "min_notional", "max_quantity", "maintenance_fee_rate")


class Split(NamedTuple):
    """Decision bars start .. stop - 1 of a market."""

    name: str
    start: int
    stop: int

    @property
    def num_bars(self) -> int:
        """Number of decision bars."""
        return max(self.stop - self.start, 0)

    def num_starts(self, episode_length: int) -> int:
        """Count the first bars that leave room for a whole episode."""
        return max(self.stop - self.start - episode_length + 1, 0)


class Dataset(NamedTuple):
    """A market with its scaler attached, and the splits of its bars."""

    market: Market
    splits: tuple[Split, ...]


def split_by_fraction(
    market: Market, fractions: tuple[float, float, float] = DEFAULT_FRACTIONS, episode_length: int = EPISODE_LENGTH
) -> tuple[Split, ...]:
    """Split the decision bars by fractions into train, val and test, in order, with an embargo of one episode between.

    Raises:
      ValueError: the fractions are not positive or do not sum to 1, or a split has no room for an episode.
    """
    if len(fractions) != 3 or not min(fractions) > 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(
            f"split fractions {' '.join(map(str, fractions))} are not three positive numbers that sum to 1"
        )
    first = int(market.segments.first[0])
    bars = market.num_bars - first
    # A millionth of a bar is added: 0.7 + 0.15 is a little under 0.85.
    train, val = int(fractions[0] * bars + 1e-6), int((fractions[0] + fractions[1]) * bars + 1e-6)
    return _embargo(first, (first + train, first + val), market.num_bars, episode_length)


def split_by_date(
    market: Market, train_end: str, val_end: str, episode_length: int = EPISODE_LENGTH
) -> tuple[Split, ...]:
    """Split by date: train before `train_end`, val before `val_end`, test after. ISO dates mean 00:00 UTC.

    Raises:
      ValueError: a text is not a date, or a date is outside the data or out of order. Also if a split has no room for
        an episode.
    """
    first = int(market.segments.first[0])
    bars = []
    for name, text in (("train end", train_end), ("val end", val_end)):
        bars.append((parse_midnight(name, text) - market.start_ms) // BAR_MS)
        if not first < bars[-1] < market.num_bars:
            raise ValueError(
                f"{name} {text} is not inside the data; its decision bars go from "
                f"{format_time(market.open_time_ms(first))} to {format_time(market.open_time_ms(market.num_bars - 1))}"
            )
    if bars[0] >= bars[1]:
        raise ValueError(f"train end {train_end} is not before val end {val_end}")
    return _embargo(first, (bars[0], bars[1]), market.num_bars, episode_length)


def parse_midnight(name: str, text: str) -> int:
    """Return 00:00 UTC of an ISO date, ms.

    Raises:
      ValueError: the text is no date. The message has the name.
    """
    try:
        date = datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r} is not a date such as 2025-06-01") from error
    return int(datetime.datetime.combine(date, datetime.time(), datetime.UTC).timestamp()) * 1000


def _embargo(first: int, ends: tuple[int, int], num_bars: int, episode_length: int) -> tuple[Split, ...]:
    if episode_length < 1:
        raise ValueError(f"episode length {episode_length} is not a positive number of bars")
    stops = (ends[0] - episode_length, ends[1] - episode_length, num_bars)
    splits = tuple(map(Split, SPLIT_NAMES, (first, *ends), stops))
    for split in splits:
        if not split.num_starts(episode_length):
            embargo = "" if split.name == "test" else f" after an embargo of {episode_length} bars"
            raise ValueError(
                f"the {split.name} split has no room for an episode of {episode_length} bars: it has "
                f"{max(split.stop - split.start, 0)} decision bars{embargo} (bars {first} .. {num_bars - 1} are split "
                f"at {ends[0]} and {ends[1]}); use more candles, shorter episodes or other splits"
            )
    return splits


def cut_split(market: Market, split: Split) -> Market:
    """Return the market of one split: decision bars from 673 on, after 673 bars of history."""
    return slice_market(market, split.start - FIRST_DECISION, split.stop)


def fit_on_train(market: Market, splits: tuple[Split, ...]) -> Scaler:
    """Fit the scaler on the training split's decision bars that traded, and on no others."""
    return fit_scaler(market, training_rows(market, splits))


def training_rows(market: Market, splits: tuple[Split, ...]) -> np.ndarray:
    """Return the decision bars of the training split in which something traded; all of them if nothing did."""
    train = splits[0]
    traded = find_traded(market)[train.start : train.stop]
    return train.start + (np.flatnonzero(traded) if traded.any() else np.arange(train.stop - train.start))


def load_market(source: str | os.PathLike[str], split: str | None = None) -> Market:
    """Load the market of a dataset folder, or of "synthetic:NAME", with the scaler of its training split attached.

    Args:
      source: a folder written by `python -m perpjax.data.build`, or "synthetic:signal" (martingale, crash): one
        year, split 70/15/15, built once per process. "synthetic:signal?seed=3&bars=70080&drift=0.0006" sets
        parameters of `synthetic_tables`.
      split: "train", "val", "test", or None for all bars. A split's decision bars start at 673, and it holds
        no data from after its end. The test split is sealed: each process that loads it leaves an entry in the user's
        ledger, see docs/evaluation.md.

    Raises:
      DataError: there is no dataset, or a file is missing, changed or written by another version.
      ValueError: the split or the synthetic market is unknown.
    """
    if split is not None and split not in SPLIT_NAMES:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLIT_NAMES)}, or None for all")
    market = _load_split(source, split)
    if split in SEALED and not _sealed_open.get() and is_concrete(market.segments.first):
        enter_opened(str(source), split, find_spans(source, market))
    return market


def _load_split(source: str | os.PathLike[str], split: str | None) -> Market:
    name = str(source)
    if name.startswith(_SYNTHETIC):
        return _choose_split(_load_synthetic(name.removeprefix(_SYNTHETIC)), split)
    folder = Path(source)
    symbols = read_manifest(folder).get("symbols")
    if symbols is None:
        return _choose_split(load_dataset(folder), split)
    return load_symbols(folder, symbols, split)


@contextlib.contextmanager
def open_sealed() -> Iterator[None]:
    """A context for the evaluation alone: `load_market` enters nothing, for the evaluation enters its own look."""
    token = _sealed_open.set(True)
    try:
        yield
    finally:
        _sealed_open.reset(token)


def find_spans(source: str | os.PathLike[str], market: Market) -> list[dict[str, Any]]:
    """Return the spans of a loaded market, the key of its looks in the ledger: venue, symbol and decision bars.

    Args:
      source: as in `load_market`. All synthetic markets lie in one span, so the symbol of one is its whole name.
    """
    spans = market_spans(market, find_venues(source))
    if str(source).startswith(_SYNTHETIC):
        name, _, query = str(source).removeprefix(_SYNTHETIC).partition("?")
        symbol = synthetic.name_market(name, **_parse_query(query))
        return [span | {"venue": "synthetic", "symbol": symbol} for span in spans]
    return spans


def find_venues(source: str | os.PathLike[str]) -> dict[str, str]:
    """Return the venue of each symbol of a dataset, "" where its files did not tell; nothing of a synthetic market."""
    if str(source).startswith(_SYNTHETIC):
        return {}
    folder = Path(source)
    manifest = read_manifest(folder)
    if "symbols" in manifest:
        return {symbol: read_manifest(folder / symbol).get("venue") or "" for symbol in manifest["symbols"]}
    return {manifest["instrument"]["symbol"]: manifest.get("venue") or ""}


def _choose_split(dataset: Dataset, split: str | None) -> Market:
    if split is None:
        return dataset.market
    return cut_split(dataset.market, dataset.splits[SPLIT_NAMES.index(split)])


def load_symbols(folder: Path, symbols: dict[str, str], split: str | None) -> Market:
    """Return one market of several symbols: those with a bar of the split.

    Args:
      symbols: SHA-256 of each symbol's manifest, by its folder's name.

    Raises:
      DataError: a symbol's folder was changed.
    """
    markets = []
    for symbol, digest in symbols.items():
        if read_manifest(folder / symbol)["manifest_sha256"] != digest:
            raise DataError(f"{folder / symbol}: is not the folder that was written; build the dataset again")
        dataset = load_dataset(folder / symbol)
        if split is None or dataset.splits[SPLIT_NAMES.index(split)].num_bars:
            markets.append(_choose_split(dataset, split))
    return concatenate_markets(markets)


def load_tables(source: str | os.PathLike[str]) -> dict[str, pa.Table | None]:
    """Load the tables of a market: `candles`, and `mark` and `funding` or None.

    Args:
      source: as in `load_market`, with its errors.
    """
    name = str(source)
    if name.startswith(_SYNTHETIC):
        tables = synthetic_by_query(name.removeprefix(_SYNTHETIC))
        return {"candles": tables.candles, "mark": tables.mark, "funding": tables.funding}
    folder = Path(source)
    _need_one_symbol(folder, manifest := read_manifest(folder))
    tables = _read_files(folder, manifest)
    return {name: tables.get(name) for name in ("candles", "mark", "funding")}


def _parse_query(query: str) -> dict[str, int | float]:
    """Return the numbers of "seed=3&bars=70080" by name."""
    numbers: dict[str, int | float] = {}
    for part in filter(None, query.split("&")):
        name, _, text = part.partition("=")
        try:
            numbers[name] = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            raise ValueError(f"synthetic market: {part!r} is not name=number, as in ?seed=3&bars=70080") from None
    return numbers


def synthetic_by_query(name: str) -> synthetic.Tables:
    """Return the tables of "NAME" or "NAME?seed=3&bars=70080"."""
    name, _, query = name.partition("?")
    return synthetic.synthetic_tables(name, **_parse_query(query))


@functools.lru_cache(maxsize=4)
def _load_synthetic(name: str) -> Dataset:
    tables = synthetic_by_query(name)
    market = build(tables.candles, tables.mark, tables.funding, tables.instrument).market
    splits = split_by_fraction(market)
    return Dataset(attach_scaler(market, fit_on_train(market, splits)), splits)


def load_dataset(folder: Path) -> Dataset:
    """Load a dataset folder of one symbol and verify every file. See `load_market` for the errors."""
    manifest = read_manifest(folder)
    _need_one_symbol(folder, manifest)
    tables = _read_files(folder, manifest)
    names = tuple(manifest["scaler"])
    pairs = np.array([[x["mean"], x["scale"]] for x in manifest["scaler"].values()]).reshape(-1, 2)
    built = build(
        tables["candles"],
        tables.get("mark"),
        tables.get("funding"),
        Instrument(**manifest["instrument"]),
        tables.get("features"),
        Scaler(names, pairs[:, 0], pairs[:, 1]),
        hole_bars=manifest.get("hole_bars"),
        sources=Sources(*(str(folder / f"{stem}.parquet") for stem in Sources._fields)),
    )
    splits = tuple(Split(name, s["start"], s["stop"]) for name, s in manifest["splits"].items())
    found = {"num_bars": built.market.num_bars, "candles_per_bar": built.market.candles_per_bar}
    for name, value in found.items():
        if manifest[name] != value:
            raise DataError(f"{folder}: rebuilt with {name} = {value}, not {manifest[name]}; build the dataset again")
    return Dataset(built.market, splits)


def _need_one_symbol(folder: Path, manifest: dict[str, Any]) -> None:
    if "symbols" in manifest:
        raise DataError(
            f"{folder}: holds several symbols; name one: {', '.join(str(folder / s) for s in manifest['symbols'])}"
        )


def _read_files(folder: Path, manifest: dict[str, Any]) -> dict[str, pa.Table]:
    """Return the tables of a dataset by the stem of their files, every file verified."""
    tables = {}
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: is missing; the dataset is incomplete, build it again")
        data = path.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != digest:
            raise DataError(
                f"{path}: is not the file that was written (SHA-256 {found[:12]}..., not {digest[:12]}...); "
                "build the dataset again"
            )
        tables[path.stem] = pa.parquet.read_table(pa.BufferReader(data))
    return tables


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and verify the manifest of a dataset folder.

    Raises:
      DataError: there is no dataset, or its manifest was changed or written by another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder}: is not a dataset ({MANIFEST} is missing); write one with "
            f"`python -m perpjax.data.build --candles FILE --out DIR`, or use synthetic:{'|'.join(synthetic.NAMES)}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is not a manifest ({error!r}); build the dataset again") from error
    if version not in (SCHEMA_VERSION, MANY_VERSION):
        remedy = "upgrade perpjax" if isinstance(version, int) and version > MANY_VERSION else "build the dataset again"
        raise DataError(
            f"{path}: has schema version {version!r}, this perpjax reads {SCHEMA_VERSION} and {MANY_VERSION}; {remedy}"
        )
    if manifest.get("manifest_sha256") != _manifest_digest(manifest):
        raise DataError(f"{path}: was changed after it was written (its own SHA-256 differs); build the dataset again")
    return manifest


def _manifest_digest(manifest: dict[str, Any]) -> str:
    body = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def write_dataset(
    built: Built,
    splits: tuple[Split, ...],
    scaler: Scaler,
    out: Path,
    *,
    episode_length: int = EPISODE_LENGTH,
    features: str | None = None,
    force: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a dataset folder, whole or not at all, and return its manifest.

    All files are written to a sibling folder first, which is then renamed.

    Args:
      features: name of the feature function in the manifest.
      force: replace an existing dataset. Only a dataset or an empty folder is ever replaced.
      extra: more entries of the manifest.

    Raises:
      DataError: the folder exists.
    """
    with replacing(out, force) as new:
        return write_files(built, splits, scaler, new, episode_length=episode_length, features=features, extra=extra)


def write_files(
    built: Built,
    splits: tuple[Split, ...],
    scaler: Scaler,
    folder: Path,
    *,
    episode_length: int = EPISODE_LENGTH,
    features: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the tables and the manifest of one symbol into an empty folder, and return the manifest."""
    tables = {"candles": built.candles, "mark": built.mark, "funding": built.funding}
    if built.features.num_columns:
        tables["features"] = built.features
    digests = {}
    for stem, table in tables.items():
        if table is not None:
            path = folder / f"{stem}.parquet"
            pa.parquet.write_table(table, path, compression="zstd")
            digests[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = _describe(built, splits, scaler, digests, episode_length, features or built.report.features)
    return write_manifest(folder, manifest | dict(extra or {}))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write a manifest with its own hash, and return it."""
    manifest["manifest_sha256"] = _manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return manifest


@contextlib.contextmanager
def replacing(out: Path, force: bool) -> Iterator[Path]:
    """A context that gives an empty folder, and renames it to `out` at its end; an error leaves `out` as it was."""
    check_out(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        new = scratch / "new"
        new.mkdir()  # a folder with the usual permissions: mkdtemp's own is closed to other users
        yield new
        _put_in_place(new, out, scratch / "old", force)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(new: Path, out: Path, old: Path, force: bool) -> None:
    check_out(out, force)
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def check_out(out: Path, force: bool) -> None:
    """Raise unless a dataset may be written to `out`."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise DataError(f"{out}: exists and is not a dataset; choose another folder")
    if any(out.iterdir()) and not force:
        raise DataError(f"{out}: exists; choose another folder, or replace it with --force")


def _describe(
    built: Built, splits: tuple[Split, ...], scaler: Scaler, digests: dict[str, str], episode_length: int, features: str
) -> dict[str, Any]:
    market, report, instrument = built.market, built.report, built.instrument

    def time(t: int) -> str:
        return format_time(market.open_time_ms(t))

    return {
        "schema_version": SCHEMA_VERSION,
        "instrument": {
            "symbol": instrument.symbol,
            **{name: getattr(instrument, name) for name in _INSTRUMENT_FIELDS},
            "brackets": np.asarray(instrument.brackets).tolist(),
        },
        "span": {"start": time(0), "end": time(market.num_bars), "start_ms": market.start_ms},
        "interval_ms": report.interval_ms,
        "candles_per_bar": market.candles_per_bar,
        "num_bars": market.num_bars,
        "first_decision": int(market.segments.first[0]),
        "mark": report.mark,
        "funding": {
            "settlements": report.settlements,
            "hours_between": {f"{hours:g}": count for hours, count in report.funding_hours.items()},
        },
        "hole_bars": report.hole_bars,
        "gaps": [{"from": format_time(start), "candles": count} for start, count in report.gaps],
        "missing_candles": report.missing,
        "untraded_candles": report.untraded,
        "notes": list(report.notes),
        "episode_length": episode_length,
        "splits": {
            s.name: {
                "start": s.start,
                "stop": s.stop,
                "from": time(s.start),
                "to": time(s.stop),
                "episode_starts": s.num_starts(episode_length),
            }
            for s in splits
        },
        "features": features,
        "scaler": {
            name: {"mean": float(mean), "scale": float(scale)}
            for name, mean, scale in zip(scaler.names, scaler.mean, scaler.scale, strict=True)
        },
        "files": digests,
    }
