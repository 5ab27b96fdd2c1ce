"""Does a feature function look ahead? It is run on other futures, and what was known before them must not move.

What is found: every dependence of row t on bars >= t or on settlements after T_t that shows itself in one of some
hundred comparisons; see `cut_parts` for where the cuts lie. What is not: a leak that acts only in rows and on data
that are not among them, for example on one day of the year.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from perpjax._grid import BAR_MS, FIRST_DECISION
from perpjax._seed import check_seed, seed_words
from perpjax.audit.alterations import ALTERATIONS, Series, make_gaps
from perpjax.audit.report import Audit, Item, Movement
from perpjax.data import grid as gr
from perpjax.data.builder import FeatureFunction, check_features
from perpjax.data.contract import CANDLES, FUNDING, DataError, infer_interval_ms, validate
from perpjax.data.dataset import format_time
from perpjax.features import append_next_bar, core_features

NOISE = 1e-9
"""A movement within this fraction of the column's spread is rounding, not information.

Float64 rounds at 1e-16; sums over a year of bars, and differences of prices ten thousand times larger than they, lose
six digits of that. What is smaller could not be read anyway: features are stored in float32, which rounds at 6e-8.
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
    """[F] the relative rounding of each column's type."""


class Part(NamedTuple):
    """A stretch of the data, what the function makes of it, and where its future is to be altered."""

    name: str
    first: int
    """Its first bar, in bars of all data."""
    series: Series
    cuts: tuple[int, ...]
    """In bars of the part."""
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
    """Judge every column of a feature function: does anything known at T_t move when only the time after it changes?

    The function is called as `build_market` calls it, on all of the data, on parts of it, with gaps made in it, and
    each time again with every bar from a cut on and every settlement after its open perturbed, left out, or shuffled.

    Args:
      fn: `(bars, funding) -> table`, as for `build_market`; or "core".
      candles, funding: tables of `perpjax.data.contract`.
      cuts: bars to cut the whole data at, instead of those drawn with `seed`.
      track: wraps the list of trials while they run, to show progress.

    Returns:
      An item a column: accused with the movement that looked furthest ahead, clean, or undecided where two calls on
      the same input differ. Columns that are constant, or not finite after their first finite value, are remarked.

    Raises:
      DataError: candles or funding break the contract or are too few; the function raises or does not return such a
        table; the message says on which input.
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
            f"candles: {bars} bars of 15 minutes are too few to audit what warms up for {warm}; "
            f"give {warm + 2 * _DAY} or more"
        )
    parts = cut_parts(fn, series, base, warm, np.random.default_rng(seed), cuts)
    # A function may need its warm-up to run at all, and the builder never gives it less.
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
    # Last, so that a function that remembers its earlier calls is found out too.
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
    """Bars and settlements as the builder makes them of candles and funding.

    Raises:
      DataError: either table breaks the contract.
    """
    candles = validate(candles, CANDLES, "candles")
    grid = gr.lay_candles(candles, infer_interval_ms(candles))
    if funding is not None:
        funding = validate(funding, FUNDING, "funding")
        gr.lay_funding(funding, None, grid, tick=1.0)  # for what it refuses
    return Series(gr.make_bars(grid), funding)


def call(fn: FeatureFunction, series: Series, label: str) -> Output:
    """The columns that the function makes of a series, N + 1 rows, checked as the builder checks them.

    Raises:
      DataError: saying on which input, by `label`.
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
    """What is audited, and where it is cut; most of it is as short as the warm-up allows, whatever the data's length.

    - All bars: at random bars, before and after the largest move, and at the end.
    - The first bars: early, inside the warm-ups that a back-fill fills.
    - Bars with gaps, from the middle: just before, inside and after gaps made in them, and after the jumps that follow.
    - A day's bars: at each of the 96 of a Monday, the last one if there is one. So every phase of a resampling by hours
      or days is met, and what looks ahead by a single bar, once a day or when a week begins.
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
    """Every column that moved at or before the cut, and how."""
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
    """What is odd about a column, whether it looks ahead or not."""
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
    """The first row from 673 on in which every column has a value that ever has one."""
    return max(FIRST_DECISION, *(int(x.argmax()) for x in _is_stored(output.values).T))


def _measure_spread(output: Output) -> np.ndarray:
    """Standard deviation of each column, or its estimate from the quartiles where that is less; 0 if constant, [F].

    An outlier must not hide what happens beside it.
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
    """Where the market, which holds float32, has a finite value."""
    with np.errstate(over="ignore"):
        return np.isfinite(values.astype(np.float32))


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b) | (np.isnan(a) & np.isnan(b))
