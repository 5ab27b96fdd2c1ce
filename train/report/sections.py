"""The parts of the page that need no script, from evaluation.json alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

import train.report.bars as bars
from train.report.markup import (
    COUNT,
    DASH,
    GAIN,
    MONEY,
    PERCENT,
    RATIO,
    SIGNED,
    TIMES,
    Form,
    Markup,
    card,
    element,
    empty,
    explain,
    figure,
    fixed,
    interval,
    is_number,
    join,
    look_up,
    short,
    table,
)

Json = dict[str, Any]

MEASURES: tuple[tuple[str, str, Form], ...] = (
    ("return", "return", GAIN),
    ("annual_return", "return a year", GAIN),
    ("max_drawdown", "largest drawdown", PERCENT),
    ("longest_drawdown_days", "longest drawdown, days", COUNT),
    ("volatility", "volatility a year", PERCENT),
    ("sharpe", "Sharpe ratio, a year", SIGNED),
    ("sharpe_error", "its standard error", RATIO),
    ("sortino", "Sortino ratio, a year", SIGNED),
    ("calmar", "Calmar ratio", SIGNED),
    ("days", "days", COUNT),
)
"""Of one curve: the key, the name and the format."""
INTERVALS = (
    ("return", "return", GAIN),
    ("sharpe", "Sharpe ratio", SIGNED),
    ("max_drawdown", "largest drawdown", PERCENT),
)
LOTS: tuple[tuple[str, str, Form], ...] = (
    ("lots", "lots", COUNT),
    ("lots_a_week", "lots a week", fixed(1)),
    ("turnover_a_week", "turnover a week, quote", COUNT),
    ("win_rate", "share won", PERCENT),
    ("profit_factor", "profit factor", RATIO),
    ("expectancy", "mean net of a lot, quote", MONEY),
    ("tail_loss", "mean of the worst 5 %, quote", MONEY),
    ("mean_bars", "mean bars held", fixed(1)),
    ("median_bars", "median bars held", fixed(1)),
    ("long", "long lots", COUNT),
    ("best_three_net", "net of the three best, quote", MONEY),
    ("open_net", "net of lots still open, quote", MONEY),
)
TRIP = (
    ("gross", "gross", 1), ("cost", "slippage, gap losses and fees", -1), ("funding", "funding paid", -1),
    ("liquidation", "lost at liquidations", -1),
)  # fmt: skip
FEATURES = 12
"""So many features are shown at once."""
STEPS = {
    "gross": "gross", "slippage": "slippage", "gap_losses": "gap losses", "fees": "fees", "funding": "funding",
    "forfeited": "forfeited margin", "forgiven": "forgiven losses", "net": "net",
}  # fmt: skip
REASONS = {
    "stopped": "stop", "target": "target", "liquidated": "liquidation", "closed": "closed by policy",
    "timed_out": "time limit", "open": "still open",
}  # fmt: skip


def texts(value: Any) -> list[str]:
    """Return the texts of a list, or of one text."""
    return [str(x) for x in value] if isinstance(value, list) else [str(value)] if value else []


def objects(record: Json, name: str) -> list[Json]:
    """Return a list of objects, empty if the record has none. Another element counts as an empty object."""
    found = record.get(name)
    return [x if isinstance(x, dict) else {} for x in found] if isinstance(found, list) else []


def numbers(value: Any) -> list[float]:
    """Return the numbers of a list."""
    return [x for x in value if is_number(x)] if isinstance(value, list) else []


def part(record: Any, name: str) -> Json:
    """Return an object of the record, empty if it has none."""
    found = record.get(name) if isinstance(record, dict) else None
    return found if isinstance(found, dict) else {}


# The top of the page.


def make_verdict(record: Json) -> Markup:
    """Return the sentences of the verdict, and the diagnosis."""
    sentences = texts(record.get("verdict"))
    found = objects(record, "diagnosis")
    items = [element("li", element("b", str(d.get("rule", "")).replace("_", " ")), " ", str(d.get("text", "")))
             for d in found]  # fmt: skip
    said = element("p", " ".join(sentences), class_="verdict") if sentences else empty("evaluation.json has no verdict")
    warned = element("ul", items, class_="diagnosis") if items else None
    return element("section", element("h2", "Verdict"), said, warned, class_="card lead", id="verdict")


def make_tiles(record: Json) -> Markup:
    """Return the figures that are asked for first."""
    error = figure(record, "overall/sharpe_error")
    tiles = (
        ("return", figure(record, "overall/return", GAIN, tone=True),
         ("90 %: ", interval(record, "overall/intervals/return", GAIN))),
        ("largest drawdown", figure(record, "overall/max_drawdown", PERCENT),
         ("90 %: ", interval(record, "overall/intervals/max_drawdown", PERCENT))),
        ("Sharpe ratio", figure(record, "overall/sharpe", SIGNED), ("standard error ", error)),
        ("lots", figure(record, "lots/lots", COUNT), (figure(record, "lots/lots_a_week", fixed(1)), " a week")),
        ("share won", figure(record, "lots/win_rate", PERCENT),
         ("profit factor ", figure(record, "lots/profit_factor"))),
        ("in the market", figure(record, "time_in_market", PERCENT),
         ("mean notional ", figure(record, "exposure/mean_notional", fixed(2, unit=f" {TIMES} equity")))),
    )  # fmt: skip
    cells = [
        element(
            "div",
            element("span", name, class_="label"),
            element("strong", value),
            element("small", more),
            class_="tile",
        )
        for name, value, more in tiles
    ]
    return element("section", cells, class_="tiles", aria_label="Key figures")


def make_baselines(record: Json) -> Markup:
    """Return the table of the policy against every baseline, with the intervals drawn."""
    listed = objects(record, "baselines")
    rows = [(
        element("b", "policy"), figure(record, "overall/return", GAIN, tone=True),
        figure(record, "overall/max_drawdown", PERCENT),
        join([figure(record, "overall/sharpe", SIGNED), " ± ", figure(record, "overall/sharpe_error")]),
        figure(record, "lots/lots", COUNT), "", "", "",
    )]  # fmt: skip
    ends = [x for one in listed for x in numbers(one.get("interval"))]
    axis = bars.cover(ends)
    for i, one in enumerate(listed):
        at = f"baselines/{i}"
        name = [str(one.get("title") or one.get("name"))]
        if ruined := texts(one.get("ended")).count("ruin"):
            name += [" ", element("span", "ruin" if ruined < 2 else f"{ruined} ruined", class_="badge")]
        rows.append((
            join(name), figure(record, f"{at}/return", GAIN, tone=True), figure(record, f"{at}/max_drawdown", PERCENT),
            figure(record, f"{at}/sharpe", SIGNED), figure(record, f"{at}/lots", COUNT),
            figure(record, f"{at}/difference", GAIN, tone=True), interval(record, f"{at}/interval", GAIN),
            draw_interval(axis, one),
        ))  # fmt: skip
    head = ("", "return", "drawdown", "Sharpe ± error", "lots", "policy less it", "90 % interval", "")
    note = "The difference is that of the two returns. If its interval holds 0, chance may have made it."
    market = element("p", "The price returned ", figure(record, "market_return", GAIN, tone=True), ".", class_="note")
    lines = [table(head, rows, "wide", "The policy against every baseline"), market]
    return card("Policy and baselines", lines if listed else [*lines, empty("No baseline was played.")], note=note)


def draw_interval(axis: bars.Span, one: Json) -> Markup:
    """Return the interval and the difference as a bar with a point."""
    ends, middle = one.get("interval"), one.get("difference")
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)) and is_number(middle)):
        return bars.track(axis)
    kind = "up" if ends[0] > 0 else "down" if ends[1] < 0 else "even"
    return bars.track(axis, bars.block(axis, *ends, f"thin {kind}"), bars.dot(axis, middle, kind))


# Costs and lots.


def make_waterfall(record: Json, at: str = "waterfall", title: str = "From gross to net") -> Markup:
    """Return the steps from the gross to the net of all lots."""
    return card(
        title,
        draw_waterfall(record, at),
        note="Quote currency, all lots together. Gross is at untouched prices, and costs count as losses.",
    )


def find_steps(record: Any, at: str = "waterfall") -> list[tuple[str, str, float, float]]:
    """Return key, name, begin and end of each step from the gross to the net."""
    found, reached = [], 0.0
    for key, name in STEPS.items():
        x = look_up(record, f"{at}/{key}")
        if is_number(x):
            begin = 0.0 if key == "net" else reached
            reached = begin + x
            found.append((key, name, begin, reached))
    return found


def draw_waterfall(record: Any, at: str = "waterfall", ends: Sequence[float] | None = None) -> Markup:
    """Return the steps as floating bars; `ends` are the numbers that the scale must hold, by default the steps."""
    steps = find_steps(record, at)
    if not steps:
        return empty("evaluation.json has no waterfall.")
    axis = bars.cover(ends if ends is not None else [x for *_, begin, end in steps for x in (begin, end)])
    lines = []
    for key, name, begin, end in steps:
        kind = bars.tone(end - begin) + (" total" if key in ("gross", "net") else "")
        drawn = bars.track(axis, bars.block(axis, begin, end, kind))
        lines.append((name, drawn, figure(record, f"{at}/{key}", MONEY, tone=True)))
    return join([bars.rows(lines, "waterfall", "From gross to net"), bars.scale_line(axis, COUNT, "quote")])


def make_exits(record: Json) -> Markup:
    """Return the lots by reason of exit."""
    exits = {k: n for k, n in part(part(record, "lots"), "exits").items() if is_number(n)}
    if not exits:
        return card("Exits by reason", empty("No lot was opened."))
    axis = bars.Span(0, max(exits.values()) or 1)
    lines = [
        (REASONS.get(key, key), bars.track(axis, bars.block(axis, 0, n, "plain")),
         figure(record, f"lots/exits/{key}", COUNT))
        for key, n in sorted(exits.items(), key=lambda item: -item[1])
    ]  # fmt: skip
    return card("Exits by reason", bars.rows(lines, label="Lots by reason of exit"), note="Number of lots.")


def make_months(record: Json) -> Markup:
    """Return the table of months, the market beside the policy."""
    months = objects(record, "months")
    if not months:
        return card("Months", empty("The evaluation has no month."))
    values = [x for m in months for x in (m.get("return"), m.get("market")) if is_number(x)]
    axis = bars.cover(values)
    rows = []
    for i, month in enumerate(months):
        own, market = month.get("return"), month.get("market")
        marks = [bars.block(axis, 0, own, bars.tone(own))] if is_number(own) else []
        marks += [bars.tick(axis, market, "market")] if is_number(market) else []
        rows.append((str(month.get("month")), figure(record, f"months/{i}/return", GAIN, tone=True),
                     figure(record, f"months/{i}/market", GAIN, tone=True), bars.track(axis, *marks)))  # fmt: skip
    note = "The bar is the policy, the upright line the return of the price."
    return card("Months", table(("month", "policy", "market", ""), rows, "wide", "Returns by month"), note=note)


def make_lot_figures(record: Json) -> Markup:
    """Return the figures of all lots."""
    if not look_up(record, "lots/lots"):
        return card("Lots in numbers", empty("No lot was opened."))
    rows = [(name, figure(record, f"lots/{key}", form, tone=form is MONEY)) for key, name, form in LOTS]
    rows += [
        (f"mean notional in the market, {TIMES} equity", figure(record, "exposure/mean_notional")),
        (f"largest notional, {TIMES} equity", figure(record, "exposure/largest")),
        (
            "median share of the bar's traded value",
            figure(record, "volume/median_share", fixed(3, factor=100, unit=" %")),
        ),
        ("largest share of it", figure(record, "volume/largest_share", fixed(3, factor=100, unit=" %"))),
    ]
    return card("Lots in numbers", table(("", ""), rows, "pairs", "Figures of the lots"))


def make_round_trip(record: Json) -> Markup:
    """Return the way of a mean lot, in basis points of its notional."""
    point, plain = fixed(2, sign=True, unit=" bp"), fixed(2, unit=" bp")
    found = [(k, name, sign, look_up(record, f"round_trip/{k}")) for k, name, sign in TRIP]
    found = [(k, name, sign * x) for k, name, sign, x in found if is_number(x)]
    typical = look_up(record, "round_trip/typical_cost")
    axis = bars.cover([*(x for *_, x in found), -typical if is_number(typical) else 0.0])
    lines = []
    for k, name, x in found:
        number = figure(record, f"round_trip/{k}", point if k == "gross" else plain)
        lines.append((name, bars.track(axis, bars.block(axis, 0, x, bars.tone(x))), number))
    if is_number(typical):
        drawn = bars.track(axis, bars.block(axis, 0, -typical, "plain"))
        lines.append(("cost at the median bar", drawn, figure(record, "round_trip/typical_cost", plain)))
    shown = bars.rows(lines, label="A mean lot") if lines else empty("not in evaluation.json")
    explored = None
    if is_number(look_up(record, "round_trip/explored_gross")):
        explored = element("p", "The orders that the policy draws at random: ",
                           figure(record, "round_trip/explored_lots", COUNT), " lots with a mean gross of ",
                           figure(record, "round_trip/explored_gross", point), ".", class_="note")  # fmt: skip
    note = "Basis points of the notional. A bar to the left is a cost; the number is its amount."
    return card("A mean lot", shown, explored, note=note)


# Chance.


def make_actions(record: Json) -> Markup:
    """Return the shares of long, short and flat bars in five bins of each feature, the steepest features first."""
    listed = objects(record, "actions")
    if not listed:
        return card("Actions against features", empty("evaluation.json has no actions."))
    charts = [_draw_feature(record, i) for i in sorted(range(len(listed)), key=lambda i: -_measure_tilt(listed[i]))]
    key = [element("span", element("i", class_=f"key act-{s}"), s) for s in ("long", "flat", "short")]
    note = join(["Share of the bars that are long, flat and short, in five bins of a feature. The features with the "
                 "largest change come first. ", element("span", key, class_="legend")])  # fmt: skip
    shown, rest = charts[:FEATURES], charts[FEATURES:]
    told = element("summary", f"{len(rest)} more features")
    more = element("details", told, element("div", rest, class_="trellis")) if rest else None
    return card("Actions against features", element("div", shown, class_="trellis"), more, note=note, class_="full")


def _measure_tilt(one: Json) -> float:
    """The range of long less short over the bins."""
    pairs = [(look_up(one, f"long/{k}"), look_up(one, f"short/{k}")) for k in range(5)]
    tilts = [x - y for x, y in pairs if is_number(x) and is_number(y)]
    return max(tilts) - min(tilts) if tilts else 0.0


def _draw_feature(record: Json, i: int) -> Markup:
    """The bins of one feature."""
    axis, lines, one = bars.Span(0, 1), [], objects(record, "actions")[i]
    for k in range(5):
        shares = [look_up(one, f"{side}/{k}") for side in ("long", "flat", "short")]
        if not all(map(is_number, shares)):
            continue
        reached, marks = 0.0, []
        for side, x in zip(("long", "flat", "short"), shares, strict=True):
            marks.append(bars.block(axis, reached, reached + x, f"act-{side}", f"{side} {100 * x:.1f} %"))
            reached += x
        low, high = (look_up(one, f"edges/{k + j}") for j in (0, 1))
        ends = f"{short(low)} \u2026 {short(high)}" if is_number(low) and is_number(high) else f"bin {k + 1}"
        long, sold = (figure(record, f"actions/{i}/{side}/{k}", fixed(0, factor=100)) for side in ("long", "short"))
        lines.append((ends, bars.track(axis, *marks, zero=False), join([long, " / ", sold, " %"])))
    name, far = str(one.get("feature")), one.get("outside")
    strange = None
    if is_number(far) and far > 0:
        share = figure(record, f"actions/{i}/outside", fixed(2, factor=100, unit=" %"))
        strange = element(
            "p", share, " of the bars lie beyond 6 standard deviations of the training split.", class_="note"
        )
    return element("div", element("h3", name), bars.rows(lines, "stacked", f"Actions by {name}"), strange)


def make_chance(record: Json) -> Markup:
    """Return the windows, shifted starts and random draws as distributions, with the policy's place."""
    total = look_up(record, "overall/return")
    parts = []
    for key, title, told in (
        ("windows", "windows without overlap", "bars each"),
        ("shifted", "shifted starts", "bars between starts"),
        ("random", "random draws", ""),
    ):
        values = numbers(part(record, key).get("returns"))
        if not values:
            parts.append(element("div", element("h3", title), empty(explain(record, f"{key}/returns"))))
            continue
        own = is_number(total) and key != "windows"
        axis = bars.cover([*values, *([total] if own else [])], zero=False)
        middle = float(np.median(values))
        marks = [bars.tick(axis, middle, "median", f"median {100 * middle:+.2f} %")]
        marks += [bars.tick(axis, total, "own", f"policy {100 * total:+.2f} %")] if own else []
        marks += [bars.tick(axis, 0, "nought")] if axis.low < 0 < axis.high else []
        drawn = bars.histogram(values, axis, "plain", title=f"Returns of {len(values)} {title}", marks=marks)
        ends = element("div", element("span", GAIN(axis.low)), element("span", GAIN(axis.high)), class_="scale")
        lost = sum(x < 0 for x in values)
        said: list[Any] = [f"{len(values)} {title}"]
        if told and is_number(look_up(record, f"{key}/bars")):
            said += [", ", figure(record, f"{key}/bars", COUNT), " ", told]
        said += [f"; median {GAIN(middle)}, {lost} below zero."]
        if key == "random":
            place = figure(record, "random/place", fixed(0, factor=100, unit=" %"))
            said += [" The policy lies above ", place, " of them. One drawn lot stands for "]
            said += [figure(record, "random/lots_per_spell", fixed(1)), " of the policy's lots that overlap."]
        elif own:
            said += [" The line is the policy's return."]
        parts.append(element("div", element("h3", title), drawn, ends, element("p", join(said), class_="note")))
    note = (
        "Returns of the same policy in other spans, and of random traders with its entry rate, sides, times and size. "
        "Shifted starts overlap almost wholly: they show the weight of the path, and are no trials of their own."
    )
    return card("The role of chance", element("div", parts, class_="trellis"), note=note, class_="full")


def make_stresses(record: Json) -> Markup:
    """Return the other costs, intrabar rules and delays, with intervals."""
    listed = objects(record, "stresses")
    if not listed:
        return card("Stresses", empty("evaluation.json has no stresses."))
    axis = bars.cover([x for s in listed for x in (*numbers(s.get("interval")), *numbers([s.get("difference")]))])
    rows = [
        (str(one.get("title") or one.get("name")), figure(record, f"stresses/{i}/return", GAIN, tone=True),
         figure(record, f"stresses/{i}/lots", COUNT), figure(record, f"stresses/{i}/difference", GAIN, tone=True),
         interval(record, f"stresses/{i}/interval", GAIN), draw_interval(axis, one))
        for i, one in enumerate(listed)
    ]  # fmt: skip
    head = ("the policy played again with", "return", "lots", "difference", "90 % interval", "")
    note = (
        "Each line is a new run of the same policy. Other fills lead to other states, so it trades differently. "
        "With late decisions it does not see its order on the way, and may order twice."
    )
    return card("Stresses", table(head, rows, "wide", "The policy under stress"), note=note, class_="full")


def make_arithmetic(record: Json) -> Markup:
    """Return the net of the recorded lots with other costs, and the delay."""
    nets = {k: x for k, x in part(record, "arithmetic").items() if is_number(x)}
    axis = bars.cover(list(nets.values()))
    lines = [(f"costs {TIMES} {k}", bars.track(axis, bars.block(axis, 0, x, bars.tone(x))),
              figure(record, f"arithmetic/{k}", MONEY, tone=True)) for k, x in nets.items()]  # fmt: skip
    drawn = bars.rows(lines, label="Net by cost") if lines else empty("There are no lots to count again.")
    basis = fixed(2, sign=True, unit=" bp")
    move, minutes = (
        figure(record, "latency/first_move", basis, tone=True),
        figure(record, "latency/candle_minutes", COUNT),
    )
    moved = element(
        "p", "In the first ", minutes, " minutes of a lot the price moves ", move, " in its direction (90 %: ",
        interval(record, "latency/interval", basis), "). An order that is late by so much misses this move.",
    )  # fmt: skip
    if not is_number(look_up(record, "latency/first_move")):
        moved = empty(f"Latency: {explain(record, 'latency/first_move')}")
    return card("Arithmetic of costs, and latency", drawn, element("h3", "Latency"), moved,
                note="Net of the recorded lots with k times their costs, quote. The lots stay the same.")  # fmt: skip


# The record.


def make_verdicts(record: Json) -> Markup:
    """Return the orders by verdict."""
    found = {k: n for k, n in part(record, "verdicts").items() if is_number(n)}
    rows = [(k.lower().replace("_", " "), figure(record, f"verdicts/{k}", COUNT)) for k in found]
    shown = table(("verdict", "orders"), rows, "pairs", "Orders by verdict") if rows else empty("There are no orders.")
    return card("Orders by verdict", shown, note="All but hold and accepted were refused.")


def make_measures(record: Json) -> Markup:
    """Return the measures of all curves, their intervals, and the reasons for missing ones."""
    accounts = objects(record, "accounts")
    curves = [("overall", "overall")] + [(f"accounts/{i}", str(a.get("name"))) for i, a in enumerate(accounts)]
    rows: list[list[Any]] = []
    for key, name, form in MEASURES:
        rows.append([name, *(figure(record, f"{at}/{key}", form, tone=form is GAIN) for at, _ in curves)])
    for key, name, form in INTERVALS:
        rows.append([f"90 % interval, {name}", *(interval(record, f"{at}/intervals/{key}", form) for at, _ in curves)])
    for key in ("bars", "first", "last", "ended"):
        cells: list[Any] = [show_time(look_up(record, f"{at}/{key}")) for at, _ in curves[1:]]
        if key == "bars":
            cells = [figure(record, f"{at}/bars", COUNT) for at, _ in curves[1:]]
        if key == "ended":
            cells = [str(look_up(record, f"{at}/ended") or DASH) for at, _ in curves[1:]]
        rows.append([key, element("span", ""), *cells])
    reasons = []
    for at, name in curves:
        absent = part(look_up(record, at), "absent")
        reasons += [element("li", f"{name}: {k.replace('_', ' ')}: {why}") for k, why in absent.items()]
    for key, value in record.items():
        absent = value.get("absent") if isinstance(value, dict) and key != "overall" else None
        told = absent.items() if isinstance(absent, dict) else [("", absent)] if isinstance(absent, str) else []
        reasons += [element("li", ": ".join(x.replace("_", " ") for x in (key, k) if x), f": {why}") for k, why in told]
    missing = [element("h3", "Missing figures"), element("ul", reasons, class_="reasons")] if reasons else None
    note = "Intervals hold 90 % of a stationary block bootstrap of the daily returns."
    return card("Measures", table(("", *(n for _, n in curves)), rows, "wide", "Measures of every curve"), missing,
                note=note, class_="full")  # fmt: skip


def show_time(value: Any) -> str:
    """Return a time, given as milliseconds or as text, up to its minutes."""
    if is_number(value):
        return str(np.datetime64(int(value), "ms")).replace("T", " ")[:16]
    return str(value).replace("T", " ")[:16] if value is not None else DASH


def make_trials(record: Json) -> Markup:
    """Return the looks at the data, and the agreement with the twin."""
    trials = part(record, "trials")
    rows = [
        ("number of this look at the split", figure(record, "trials/look", COUNT)),
        ("policies seen on validation", figure(record, "trials/trials", COUNT)),
        ("of them different in effect", figure(record, "trials/effective", fixed(1))),
        ("probability that the Sharpe ratio is above 0", figure(record, "trials/probabilistic_sharpe")),
        ("the same, for the best of all policies", figure(record, "trials/deflated_sharpe")),
        ("times the test split was opened", figure(record, "trials/opened", COUNT)),
    ]
    said = [element("p", str(trials["note"]), class_="note")] if trials.get("note") else []
    if trials.get("ledger"):
        said.append(element("p", "Ledger: ", element("code", str(trials["ledger"])), class_="note"))
    shown = table(("", ""), rows, "pairs", "Looks at the data") if trials else empty("evaluation.json has no trials.")
    return card("Looks at this data", shown, said)


def make_twin(record: Json) -> Markup:
    """Return the line on the float64 twin."""
    twin = part(record, "twin")
    if not twin:
        return card("Check by the twin", empty("evaluation.json has no twin."))
    agrees, relative = twin.get("agrees") is True, fixed(1, factor=1e6, unit=" ppm")
    mark = element("b", "\u2713 agrees" if agrees else "\u2717 differs", class_="gain" if agrees else "loss")
    said = element(
        "p", mark, ": the float64 twin played ", figure(record, "twin/bars", COUNT), " bars and ",
        figure(record, "twin/lots", COUNT), " lots. The largest difference of equity is ",
        figure(record, "twin/largest_difference", relative), " of the initial equity. ",
        "The net of the lots less the change of equity is ", figure(record, "twin/lots_less_equity", relative), ".",
    )  # fmt: skip
    faults = [element("li", text) for text in texts(twin.get("disagreements"))]
    ends = (
        [element("p", "The lots end where they differ:"), element("ul", faults, class_="reasons")] if faults else None
    )
    return card("Check by the twin", said, ends)


def make_settings(record: Json) -> Markup:
    """Return the parameters, the configuration, and the checksum."""
    parts = []
    for key, title in (("params", "Parameters"), ("config", "Configuration"), ("data", "Data"), ("policy", "Policy")):
        rows = [(str(k), show_value(v)) for k, v in part(record, key).items()]
        body = table(("", ""), rows, "pairs mono", title) if rows else empty("not in evaluation.json")
        parts.append(element("div", element("h3", title), body))
    sha = element("p", "SHA-256 of the figures: ", element("code", str(record.get("sha256") or DASH), class_="sha"),
                  class_="note")  # fmt: skip
    return card("Settings", element("div", parts, class_="trellis quad"), sha, class_="full")


def show_value(value: Any) -> str:
    """Return a setting as text."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(show_value, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)
