"""From tables to a `Market`: checked, put on the grid, priced in ticks, shifted by one bar, moved to the device."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from perpjax._grid import FIRST_DECISION
from perpjax._importing import import_function
from perpjax.data import grid as gr
from perpjax.data import indicators
from perpjax.data.contract import CANDLES, FUNDING, MARK, DataError, infer_interval_ms, validate
from perpjax.data.markets import find_segments, pack_rows, to_device
from perpjax.data.scaler import Scaler, choose_scaler
from perpjax.data.venues import KNOWN, find_instrument
from perpjax.instrument import EXACT, Instrument
from perpjax.market import Market, Origin

FeatureFunction = Callable[[pa.Table, pa.Table | None], pa.Table]
"""`(bars, funding or None) -> table`: float columns, one row a bar, row t from bars <= t-1, NaN only before a warm-up.
The last of the bars is the one about to open, flat at the last close with volume 0. Its row follows all of the data."""

FUNCTIONS = {"core": "perpjax.features:core_features", "price": "perpjax.features:price_features"}
"""Feature functions by short name. The builder imports one when it is asked for, as it does a user's."""

UNKNOWN = "UNKNOWN"
"""The symbol of a market without a given symbol."""

_LOG = logging.getLogger(__name__)


class Sources(NamedTuple):
    """Names of the tables in error messages."""

    candles: str = "candles"
    mark: str = "mark"
    funding: str = "funding"
    features: str = "features"


class Report(NamedTuple):
    """The builder's findings, for the printed table and for the manifest."""

    interval_ms: int
    candles: int
    """Rows given."""
    missing: int
    """Candles of the grid without a row."""
    untraded: int
    """Candles of the grid with a row of volume 0."""
    gaps: tuple[tuple[int, int], ...]
    """Open time (ms) of the first missing candle, and the number of missing candles in a row."""
    mark: str
    settlements: int
    """Number of settlements inside the candles' span."""
    funding_hours: dict[float, int]
    """Counts of the hours between settlements."""
    features: str
    notes: tuple[str, ...]
    hole_bars: int | None = None
    """See `markets.find_segments`."""


class Built(NamedTuple):
    """A market with its sources on the host."""

    market: Market
    instrument: Instrument
    """Exact floats."""
    candles: pa.Table
    mark: pa.Table | None
    funding: pa.Table | None
    features: pa.Table
    """[N + 1] float32, unscaled."""
    report: Report


def build_market(
    candles: pa.Table,
    mark: pa.Table | None = None,
    funding: pa.Table | None = None,
    instrument: Instrument | None = None,
    features: str | FeatureFunction | None = "core",
    scaler: Scaler | None = None,
    symbol: str | None = None,
) -> Market:
    """Build a market from exchange data.

    The contract (docs/semantics.md, sections "Units" and "Known at the decision") defines the treatment of every row.

    Args:
      candles, mark, funding: tables of `perpjax.data.contract`. Candles have 1, 3, 5 or 15 minutes (any length from
        one minute that divides 15). Mark candles of the same length are the mark price; coarser ones only price the
        funding. Without funding the rate is 0.
      instrument: the venue's contract, built from exact floats. By default it is found by symbol, with the tick
        inferred from the prices.
      features: "core" (the 31 of `CORE_FEATURES`), None for no features, or a function `(bars, funding) -> Table`
        of one row a bar, row t from bars <= t-1. It gets the N bars and the one about to open (`append_next_bar`).
      scaler: from `fit_scaler`. None leaves the features unscaled. Nothing is fitted here.
      symbol: the venue's name of the contract, if no instrument is given.

    Returns:
      A `Market` with one segment: bars 673 (later if the features need longer) .. N - 1. Assumptions are logged at
      level INFO.

    Raises:
      DataError: the data breaks the contract. The message names table, row and value.
    """
    built = build(candles, mark, funding, instrument, features, scaler, symbol)
    for note in built.report.notes:
        _LOG.info("%s", note)
    return built.market


def build(
    candles: pa.Table,
    mark: pa.Table | None = None,
    funding: pa.Table | None = None,
    instrument: Instrument | None = None,
    features: str | FeatureFunction | pa.Table | None = "core",
    scaler: Scaler | None = None,
    symbol: str | None = None,
    sources: Sources = Sources(),  # noqa: B008
    hole_bars: int | None = None,
    **numbers: Any,
) -> Built:
    """Build as `build_market`, with the tables and a report. Features may be a table computed before.

    Args:
      sources: names for messages.
      hole_bars: see `markets.find_segments`.
      numbers: fields of `Instrument` that override the known values of the symbol; None does not.
    """
    candles = validate(candles, CANDLES, sources.candles)
    interval_ms = infer_interval_ms(candles, sources.candles)
    instrument, instrument_note = _choose_instrument(candles, instrument, symbol, numbers, sources.candles)
    tick = instrument.tick_size
    gr.check_ticks(candles, tick, sources.candles)
    grid = gr.lay_candles(candles, interval_ms, sources.candles)
    last = gr.to_ticks(grid.prices, tick)

    marks, mark_note = None, "no mark series: the last price is the mark"
    if mark is not None:
        mark = validate(mark, MARK, sources.mark)
        mark_ms = infer_interval_ms(mark, sources.mark, MARK)
        gr.check_mark(mark, mark_ms, grid, tick, sources.mark)
        mark_note = f"mark candles of {mark_ms // 60_000} minutes only price the funding; the last price is the mark"
        if mark_ms == interval_ms:
            marks, absent = gr.lay_mark(mark, grid, tick)
            mark_note = f"mark candles of {mark_ms // 60_000} minutes, {absent} missing (last-price candles instead)"
    if funding is not None:
        funding = validate(funding, FUNDING, sources.funding)
    settled, settlements, unpriced = gr.lay_funding(funding, mark, grid, tick, sources.funding)

    bars = gr.make_bars(grid)
    table = check_features(_compute_features(features, bars, funding), len(grid.valid), sources.features)
    first = find_first_decision(table, sources.features)
    names = tuple(table.column_names)
    scaler = choose_scaler(scaler, names)
    market = Market(
        rows=to_device(pack_rows(last, marks, grid.valid, settled, known_atr(bars, tick), _as_matrix(table))),
        scaler_mean=jnp.asarray(scaler.mean, jnp.float32),
        scaler_scale=jnp.asarray(scaler.scale, jnp.float32),
        segments=find_segments(first, grid.valid.any(axis=1), hole_bars),
        instruments=jax.tree.map(lambda x: x[None], instrument.on_device()),
        candles_per_bar=grid.valid.shape[1],
        has_mark=marks is not None,
        origins=(Origin(instrument.symbol, grid.start_ms, 0, len(grid.valid)),),
        feature_names=names,
    )
    missing = sum(count for _, count in grid.gaps)
    inside = (settlements >= grid.start_ms) & (settlements < grid.end_ms)
    report = Report(
        interval_ms=interval_ms,
        candles=candles.num_rows,
        missing=missing,
        untraded=int((~grid.valid).sum()) - missing,
        gaps=grid.gaps,
        mark=mark_note,
        settlements=int(inside.sum()),
        funding_hours=_count_hours(settlements[inside]),
        features=_name_features(features),
        notes=(instrument_note, *grid.notes, mark_note, *_funding_notes(funding, mark, unpriced, int(inside.sum()))),
        hole_bars=hole_bars,
    )
    return Built(market, instrument, candles, mark, funding, table, report)


def known_atr(bars: pa.Table, tick: float) -> np.ndarray:
    """Return Wilder's ATR(14) known at the open of each bar, [N + 1] whole ticks: row t from bars <= t-1.

    It is rounded half up and at least 1. Row 0, before any bar, is 1.
    """
    high, low, close = (gr.to_ticks(bars[name].to_numpy(), tick) for name in ("high", "low", "close"))
    return np.concatenate([[1.0], np.maximum(np.floor(indicators.atr(high, low, close) + 0.5), 1.0)])


def check_features(table: pa.Table, num_bars: int, source: str = "features") -> pa.Table:
    """Return the features as float32 columns of N + 1 rows.

    Raises:
      DataError: the result is not a table, has a wrong number of rows, a column twice or a column without floats.
    """
    if not isinstance(table, pa.Table):
        raise DataError(f"{source}: is a {type(table).__name__}, not a pyarrow.Table")
    names = table.column_names
    if names and table.num_rows not in (num_bars + 1, num_bars + 2):
        raise DataError(
            f"{source}: has {table.num_rows} rows for {num_bars} bars and the one about to open, not {num_bars + 1}: "
            "row t holds the features known at the open of bar t"
        )
    table = table.slice(0, num_bars + 1)  # a function may add a row for the features after its last bar
    columns = []
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{source}: column {name!r} occurs {names.count(name)} times; give each its own name")
        if not pa.types.is_floating(table.schema.field(name).type):
            raise DataError(
                f"{source}: column {name!r} has type {table.schema.field(name).type} (row 0: {table[name][0]}); "
                "cast it to float64"
            )
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite, and is found below
            columns.append(table[name].to_numpy().astype(np.float32))
    return pa.table(columns, names=names) if names else _no_features(num_bars)


def find_first_decision(table: pa.Table, source: str = "features") -> int:
    """Return the first bar from 673 on at which every feature is finite. All must stay finite to the end.

    Raises:
      DataError: a column is not finite later on, or no bar is left for a decision.
    """
    num_bars = table.num_rows - 1
    matrix = _as_matrix(table)
    finite = np.isfinite(matrix)
    complete = finite.all(axis=1)
    first = max(FIRST_DECISION, int(complete.argmax()) if complete.any() else num_bars)
    if first >= num_bars:
        never = [name for name, ever in zip(table.column_names, finite.any(axis=0), strict=True) if not ever]
        why = f" (column {never[0]!r} is never finite)" if never else ""
        raise DataError(
            f"{source}: row {min(first, num_bars)} would be the first decision bar, but there are only {num_bars} "
            f"bars{why}; give more candles: {FIRST_DECISION} bars of 15 minutes are needed before the first decision"
        )
    if not complete[first:].all():
        row = first + int((~complete[first:]).argmax())
        column = int((~finite[row]).argmax())
        raise DataError(
            f"{source}: row {row}: {table.column_names[column]} = {matrix[row, column]} is not a finite float32 after "
            f"the warm-up, which ended at row {int(complete.argmax())}; let the feature function fill it"
        )
    return first


def _choose_instrument(
    candles: pa.Table, given: Instrument | None, symbol: str | None, numbers: dict[str, Any], source: str
) -> tuple[Instrument, str]:
    if given is not None:
        if symbol is not None and symbol != given.symbol:
            raise ValueError(f"symbol {symbol!r} and the instrument's {given.symbol!r} differ; give one of them")
        return given, f"{given.symbol}: instrument as given, tick {given.tick_size:g}, step {given.step_size:g}"
    symbol, numbers = symbol or UNKNOWN, {name: x for name, x in numbers.items() if x is not None}
    tick, origin = numbers.pop("tick_size", None), "as given"
    if tick is None:
        known = KNOWN.get(symbol, {}).get("tick_size")
        tick, origin = known, "as known"
        if known is None or not gr.fits_tick(candles, known):
            tick, distinct = gr.infer_tick(candles, source)
            origin = f"from {distinct} distinct prices"
    instrument, note = find_instrument(symbol, tick, float(np.median(candles["close"].to_numpy())))
    if numbers:
        # An unknown symbol has no limit but the largest float32 count of steps, which depends on the step.
        if "step_size" in numbers and symbol not in KNOWN:
            numbers.setdefault("max_quantity", EXACT * numbers["step_size"])
        instrument = instrument.replace(**numbers)
        shown = (f"{len(x)} brackets" if name == "brackets" else f"{name} {x:g}" for name, x in numbers.items())
        note += "; as given instead: " + ", ".join(shown)
    return instrument, f"{note}; tick {origin}"


def _compute_features(
    features: str | FeatureFunction | pa.Table | None, bars: pa.Table, funding: pa.Table | None
) -> pa.Table:
    if features is None:
        return _no_features(bars.num_rows)
    if isinstance(features, pa.Table):
        return features
    if isinstance(features, str) and features in FUNCTIONS:
        features = find_function(FUNCTIONS[features])
    if callable(features):
        return features(gr.append_next_bar(bars), funding)
    raise ValueError(
        f"features = {features!r} is none of {', '.join(FUNCTIONS)}, None and a function (bars, funding) -> Table"
    )


def find_function(spec: str) -> FeatureFunction:
    """Import the function that "module:function" names.

    Raises:
      ValueError: there is none.
    """
    if not all(spec.partition(":")):
        raise ValueError(f"features {spec!r} is not {', '.join(FUNCTIONS)}, none or module:function")
    return import_function(spec, "features")


def _name_features(features: str | FeatureFunction | pa.Table | None) -> str:
    if callable(features):
        return f"{features.__module__}:{getattr(features, '__qualname__', type(features).__name__)}"
    if isinstance(features, pa.Table):
        return "table"
    return features or "none"


def _no_features(num_bars: int) -> pa.Table:
    # A table without columns has no rows either, unless it is selected from a table with rows.
    return pa.table({"none": np.zeros(num_bars + 1, np.float32)}).select([])


def _as_matrix(table: pa.Table) -> np.ndarray:
    matrix = np.empty((table.num_rows, table.num_columns), np.float32)
    for i, column in enumerate(table.columns):
        matrix[:, i] = column.to_numpy()
    return matrix


def _count_hours(settlements: np.ndarray) -> dict[float, int]:
    hours, counts = np.unique(np.diff(settlements) / 3_600_000, return_counts=True)
    return {float(h): int(n) for h, n in zip(hours, counts, strict=True)}


def _funding_notes(funding: pa.Table | None, mark: pa.Table | None, unpriced: int, settlements: int) -> tuple[str, ...]:
    if funding is None:
        return ("no funding file: the funding rate is 0",)
    if unpriced and mark is not None:
        return (f"{unpriced} of {settlements} settlements have no mark candle at their open: priced at the last price",)
    return ("the funding is priced at the last price",) if mark is None else ()
