"""Does a feature function look ahead? It runs on other futures, and the rows known before them must not change.

The audit finds a dependence of row t on bars >= t, or on settlements after T_t, if it appears in one of some hundred
comparisons. `cut_parts` lists the cuts. A leak in other rows or on other data stays unseen, for example a leak on one
day of the year.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax._describe import format_time
from perpjax._grid import BAR_MS, FIRST_DECISION
from perpjax.audit.alterations import ALTERATIONS, Series, make_gaps
from perpjax.audit.report import Audit, Item, Movement
from perpjax.data import grid as gr
from perpjax.data.builder import FeatureFunction, check_features
from perpjax.data.contract import CANDLES, FUNDING, DataError, infer_interval_ms, validate
from perpjax.data.seeds import check_seed, seed_words
from perpjax.features import append_next_bar, core_features

NOISE = 1e-9
"""A movement within this fraction of the column's spread is rounding, not information.

Float64 rounds at 1e-16. Sums over a year of bars lose six digits, and so do differences of prices ten thousand times
their size. Smaller movements could not be read anyway: features are stored in float32, which rounds at 6e-8.
"""

_DAY, _WEEK = 96, 672  # bars
_MONDAY_MS = 4 * _DAY * BAR_MS  # 1970-01-05 was a Monday
_EARLY = (1, 2, 3, 5, 8, 13, 21, 50, 100, 300, 600)
_DRAWN, _GAPS = 6, 6


class Output(NamedTuple):
    """The columns of a feature function, unrounded."""

    names: tuple[str, ...]
    values: np.ndarray
    """[rows, F] float64."""
    resolution: np.ndarray
    """[F] relative rounding of each column's type."""


class Part(NamedTuple):
    """A part of the data, the function's output on it, and the cuts at which its future is altered."""

    name: str
    first: int
    """Its first bar, counted in the whole data."""
    series: Series
    cuts: tuple[int, ...]
    """Bars, counted in the part."""
    base: Output
    spread: np.ndarray
    """[F] see `_measure_spread`."""


class Trial(NamedTuple):
    """One comparison."""

    part: Part
    cut: int
    alteration: str


def audit_features(
    fn: FeatureFunction | str,
    candles: pa.Table,
    funding: pa.Table | None = None,
    *,
    cuts: Sequence[int] | None = None,
    seed: int = 0,
    track: Callable[[Sequence[Trial]], Iterable[Trial]] = iter,
) -> Audit:
    """Judge every column of a feature function: does a value known at T_t change if only later data changes?

    The function is called as `build_market` calls it: on the whole data, on parts of it, and with gaps made in it.
    It is called again with the bars from a cut on, and the settlements after its open, perturbed, left out or shuffled.

    Args:
      fn: `(bars, funding) -> table`, as for `build_market`; or "core".
      candles, funding: tables of `perpjax.data.contract`.
      cuts: bars at which the whole data is cut, instead of those drawn with `seed`.
      track: wraps the list of trials while they run, to show progress.

    Returns:
      One item for each column. It is accused, with the movement of largest look-ahead; or clean; or undecided, if two
      calls on the same input differ. Columns that are constant, or not finite after their first finite value, get a
      remark.

    Raises:
      DataError: candles or funding break the contract or are too few, or the function raises or returns no such
        table. The message names the input.
      ValueError: a cut outside the data, or a negative seed.
    """
    seed = check_seed(seed)
    fn = core_features if fn == "core" else fn
    if not callable(fn):
        raise ValueError(f'fn = {fn!r} is neither "core" nor a function (bars, funding) -> Table')
    series = lay_series(candles, funding)
    base = call(fn, series, "all bars")
    bars, warm = series.bars.num_rows, _find_warm_up(base)
    if bars < warm + 2 * _DAY:
        raise DataError(
            f"candles: {bars} bars of 15 minutes are too few to audit features that warm up for {warm}; "
            f"give {warm + 2 * _DAY} or more"
        )
    parts = cut_parts(fn, series, base, warm, np.random.default_rng(seed), cuts)
    # A function may fail on less than its warm-up, and the builder never passes it less.
    trials = [
        Trial(part, cut, alteration)
        for part in parts
        for cut in part.cuts
        for alteration in ALTERATIONS
        if alteration != "truncated" or cut >= warm
    ]
    found: dict[str, Movement] = {}
    for i, trial in enumerate(track(trials)):
        for name, movement in run_trial(fn, trial, np.random.default_rng(seed_words(seed, i))):
            if name not in found or found[name].ahead < movement.ahead:
                found[name] = movement
    # Last, to find a function that remembers its earlier calls.
    steady = _same(base.values, call(fn, series, "all bars, again").values).all(axis=0)
    return Audit(
        subject=f"{fn.__module__}:{getattr(fn, '__qualname__', type(fn).__name__)}",
        bars=bars,
        seed=seed,
        comparisons=len(trials),
        items=tuple(_judge(base, i, bool(steady[i]), found.get(name)) for i, name in enumerate(base.names)),
        remarks=() if steady.all() else ("not the same from call to call",),
    )


def lay_series(candles: pa.Table, funding: pa.Table | None) -> Series:
    """Return bars and settlements as the builder makes them from candles and funding.

    Raises:
      DataError: either table breaks the contract.
    """
    candles = validate(candles, CANDLES, "candles")
    grid = gr.lay_candles(candles, infer_interval_ms(candles))
    if funding is not None:
        funding = validate(funding, FUNDING, "funding")
        gr.lay_funding(funding, None, grid, tick=1.0)  # only for its checks
    return Series(gr.make_bars(grid), funding)


def call(fn: FeatureFunction, series: Series, label: str) -> Output:
    """Return the function's columns on a series, N + 1 rows, checked as the builder checks them.

    Raises:
      DataError: the function raises, or its table is refused. The message names the input by `label`.
    """
    bars = series.bars.num_rows
    try:
        table = fn(append_next_bar(series.bars), series.funding)
    except Exception as error:
        what = str(error) if isinstance(error, DataError) else f"the function raised {type(error).__name__}: {error}"
        raise DataError(f"on {label} ({bars} bars): {what}") from error
    names = tuple(check_features(table, bars, f"on {label}").column_names)
    if not names:
        raise DataError(f"on {label}: the table has no columns; there is nothing to audit")
    columns = [table[name].to_numpy()[: bars + 1] for name in names]
    resolution = np.array([np.finfo(x.dtype).eps for x in columns], np.float64)
    return Output(names, np.column_stack(columns).astype(np.float64), resolution)


def cut_parts(
    fn: FeatureFunction,
    series: Series,
    base: Output,
    warm: int,
    rng: np.random.Generator,
    cuts: Sequence[int] | None = None,
) -> list[Part]:
    """Return the audited parts with their cuts. All but the first are as short as the warm-up allows.

    - All bars: cut at random bars, before and after the largest move, and at the end.
    - The first bars: cut early, inside the warm-up rows that a back-fill would fill.
    - Bars with gaps, from the middle: cut just before, inside and after the gaps, and after the jumps that follow.
    - A day's bars: cut at each of the 96 bars of the last Monday, or of the last day if there is no Monday. These cuts
      meet every phase of a resampling by hours or days. They also meet a look-ahead of a single bar, once a day or at
      the beginning of a week.
    """
    bars = series.bars.num_rows
    if cuts is None:
        largest = 1 + int(np.abs(np.diff(np.log(series.bars["close"].to_numpy()))).argmax())
        drawn = rng.integers(warm, bars - 1, _DRAWN)
        cuts = sorted({*drawn.tolist(), largest, min(largest + 1, bars - 1), bars - 2, bars - 1})
    elif outside := [cut for cut in cuts if not 0 < cut < bars]:
        raise ValueError(f"cut = {outside[0]} is not a bar from 1 to {bars - 1}")

    length = min(warm + _WEEK, bars)
    middle = (bars - length) // 2
    gappy, gaps = make_gaps(series.cut_out(middle, middle + length), rng)
    around = [cut for start, stop in gaps[-_GAPS:] for cut in (start, (start + stop) // 2, stop, stop + 1)]

    days = np.arange(warm + 1, bars - _DAY)
    mondays = days[(series.clock(0) + BAR_MS * days - _MONDAY_MS) % (_WEEK * BAR_MS) == 0]
    day = int(mondays[-1]) if len(mondays) else bars - 1 - _DAY
    first = day - warm - 1

    chosen = (
        ("the first bars", 0, series.cut_out(0, length), _EARLY),
        ("bars with gaps", middle, gappy, around),
        ("a day's bars", first, series.cut_out(first, day + _DAY + 1), range(day - first, day - first + _DAY)),
    )
    parts = [Part("all bars", 0, series, tuple(cuts), base, _measure_spread(base))]
    for name, at, some, where in chosen:
        output = call(fn, some, name)
        parts.append(Part(name, at, some, tuple(where), output, _measure_spread(output)))
    return parts


def run_trial(fn: FeatureFunction, trial: Trial, rng: np.random.Generator) -> list[tuple[str, Movement]]:
    """Return every column that moved at or before the cut, with its movement."""
    part, cut, alteration = trial
    output = call(
        fn, ALTERATIONS[alteration](part.series, cut, rng), f"{part.name}, {alteration} from bar {part.first + cut} on"
    )
    if output.names != part.base.names:
        raise DataError(f"{part.name}, {alteration}: the columns are {output.names}, not {part.base.names}")
    before, after = part.base.values[: cut + 1], output.values[: cut + 1]
    with np.errstate(invalid="ignore"):  # the difference of two infinities
        amount = np.abs(after - before)
    noise = NOISE * part.spread + 8 * part.base.resolution * np.abs(before)
    moved = ~_same(before, after) & ~(np.isfinite(amount) & (amount <= noise))
    return [
        (part.base.names[i], _describe(trial, i, moved[:, i], amount[:, i])) for i in moved.any(axis=0).nonzero()[0]
    ]


def _describe(trial: Trial, column: int, moved: np.ndarray, amount: np.ndarray) -> Movement:
    part, row = trial.part, int(moved.argmax())
    largest, spread = float(amount[moved].max()), float(part.spread[column])  # NaN if a value came or went
    return Movement(
        bar=part.first + row,
        time=format_time(part.series.clock(row)),
        cut=part.first + trial.cut,
        ahead=trial.cut - row + 1,
        alteration=f"{trial.alteration}, {part.name}",
        rows=int(moved.sum()),
        amount=largest if np.isfinite(largest) else None,
        spreads=largest / spread if np.isfinite(largest) and spread > 0 else None,
    )


def _judge(base: Output, column: int, steady: bool, movement: Movement | None) -> Item:
    name, remarks = base.names[column], _remark(base.values[:, column])
    if not steady:
        return Item(name, "undecided", ("two calls on the same input differ", *remarks))
    return Item(name, "clean" if movement is None else "accused", remarks, movement)


def _remark(values: np.ndarray) -> tuple[str, ...]:
    """Return remarks on a column that do not concern look-ahead."""
    finite = _is_stored(values)
    if not finite.any():
        return ("non-finite: in every row",)
    first, remarks = int(finite.argmax()), []
    if (bad := ~finite[first:]).any():
        remarks.append(
            f"non-finite: {bad.sum()} rows after row {first}, its first value; the first is row {first + bad.argmax()}"
        )
    if np.ptp(values[finite]) == 0:
        remarks.append(f"constant: {values[first]:g}")
    return tuple(remarks)


def _find_warm_up(output: Output) -> int:
    """Return the first row from 673 on in which every column with any value has one."""
    return max(FIRST_DECISION, *(int(x.argmax()) for x in _is_stored(output.values).T))


def _measure_spread(output: Output) -> np.ndarray:
    """Return the standard deviation of each column, or its estimate from the quartiles if smaller; 0 if constant, [F].

    An outlier must not hide movements of the other rows.
    """
    spreads = np.zeros(len(output.names))
    for i, values in enumerate(output.values.T):
        stored = values[_is_stored(values)]
        if len(stored):
            low, high = np.percentile(stored, [25, 75])
            quartiles = (high - low) / 1.349  # of a normal distribution
            spreads[i] = min(stored.std(), quartiles) if quartiles > 0 else stored.std()
    return spreads


def _is_stored(values: np.ndarray) -> np.ndarray:
    """Return where the value is finite in float32, the type of the market."""
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(np.float32))


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))
