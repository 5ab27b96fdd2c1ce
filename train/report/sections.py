"""The parts of the page that need no script, from evaluation.json alone."""

from typing import Any

import numpy as np

from train.report import bars
from train.report.markup import (
    COUNT,
    DASH,
    GAIN,
    MONEY,
    PERCENT,
    RATIO,
    SIGNED,
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
INTERVALS = (("return", "return", GAIN), ("sharpe", "Sharpe ratio", SIGNED), ("max_drawdown", "largest drawdown", PERCENT))
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
    ("long", "share of long lots", PERCENT),
    ("best_three", "share of the three best in all gains", PERCENT),
)
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
    """Return a list of objects, empty if the record has none."""
    found = record.get(name)
    return [x for x in found if isinstance(x, dict)] if isinstance(found, list) else []


def part(record: Json, name: str) -> Json:
    """Return an object of the record, empty if it has none."""
    found = record.get(name)
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
         ("mean notional ", figure(record, "exposure/mean_notional", fixed(2, unit=" × equity")))),
    )  # fmt: skip
    cells = [element("div", element("span", n, class_="label"), element("strong", v), element("small", s), class_="tile")
             for n, v, s in tiles]  # fmt: skip
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
    ends = [x for b in listed for x in (b.get("interval") or []) if is_number(x)]
    axis = bars.cover(ends)
    for i, one in enumerate(listed):
        at = f"baselines/{i}"
        ended = one.get("ended")
        name = [str(one.get("title") or one.get("name"))]
        if ended and ended != "the segment's end":
            name += [" ", element("span", str(ended), class_="badge")]
        rows.append((
            join(name), figure(record, f"{at}/return", GAIN, tone=True), figure(record, f"{at}/max_drawdown", PERCENT),
            figure(record, f"{at}/sharpe", SIGNED), figure(record, f"{at}/lots", COUNT),
            figure(record, f"{at}/difference", GAIN, tone=True), interval(record, f"{at}/interval", GAIN),
            draw_interval(axis, one),
        ))  # fmt: skip
    head = ("", "return", "drawdown", "Sharpe ± error", "lots", "policy less it", "90 % interval", "")
    note = "The difference is the sum of the daily returns, policy less baseline. An interval that holds 0 proves no edge."
    lines = [table(head, rows, "wide", "The policy against every baseline")]
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
    return card(title, draw_waterfall(record, at), note="Quote currency, all lots together. Costs count as losses.")


def draw_waterfall(record: Json, at: str = "waterfall") -> Markup:
    """Return the steps as floating bars."""
    steps = [(key, name, look_up(record, f"{at}/{key}")) for key, name in STEPS.items()]
    steps = [(key, name, x) for key, name, x in steps if is_number(x)]
    if not steps:
        return empty("evaluation.json has no waterfall.")
    shown, reached = [], 0.0
    for key, name, x in steps:
        begin = 0.0 if key == "net" else reached
        shown.append((key, name, begin, begin + x))
        reached = begin + x
    axis = bars.cover([x for *_, begin, end in shown for x in (begin, end)])
    lines = []
    for key, name, begin, end in shown:
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
        ("mean notional in the market, × equity", figure(record, "exposure/mean_notional")),
        ("largest notional, × equity", figure(record, "exposure/largest")),
        ("median share of the bar's traded value", figure(record, "volume/median_share", fixed(3, factor=100, unit=" %"))),
        ("largest share of it", figure(record, "volume/largest_share", fixed(3, factor=100, unit=" %"))),
    ]
    return card("Lots in numbers", table(("", ""), rows, "pairs", "Figures of the lots"))


# Chance.


def make_actions(record: Json) -> Markup:
    """Return the shares of long, short and flat bars in five bins of each feature."""
    listed = objects(record, "actions")
    if not listed:
        return card("Actions against features", empty("evaluation.json has no actions."))
    axis, charts = bars.Span(0, 1), []
    for i, one in enumerate(listed):
        edges, lines = one.get("edges") or [], []
        for k in range(5):
            shares = [look_up(one, f"{side}/{k}") for side in ("long", "short", "flat")]
            if not all(map(is_number, shares)):
                continue
            reached, marks = 0.0, []
            for side, x in zip(("long", "flat", "short"), (shares[0], shares[2], shares[1]), strict=True):
                marks.append(bars.block(axis, reached, reached + x, f"act-{side}", f"{side} {100 * x:.1f} %"))
                reached += x
            ends = f"{short(edges[k])} to {short(edges[k + 1])}" if len(edges) > k + 1 else f"bin {k + 1}"
            number = join([figure(record, f"actions/{i}/{s}/{k}", fixed(0, factor=100)) for s in ("long",)]), " / ", join(
                [figure(record, f"actions/{i}/short/{k}", fixed(0, factor=100))]), " %"
            lines.append((ends, bars.track(axis, *marks, zero=False), number))
        name = str(one.get("feature"))
        charts.append(element("div", element("h3", name), bars.rows(lines, "stacked", f"Actions by {name}")))
    key = [element("span", element("i", class_=f"key act-{s}"), s) for s in ("long", "flat", "short")]
    note = join(["Share of the bars that are long, flat and short, in five bins of a feature. ",
                 element("span", key, class_="legend")])  # fmt: skip
    return card("Actions against features", element("div", charts, class_="trellis"), note=note, class_="full")


def make_chance(record: Json) -> Markup:
    """Return the windows, shifted starts and random draws as distributions, with the policy's place."""
    total = look_up(record, "overall/return")
    parts = []
    for key, title, told in (
        ("windows", "windows without overlap", "bars each"),
        ("shifted", "shifted starts", "bars between starts"),
        ("random", "random draws", ""),
    ):
        values = [x for x in part(record, key).get("returns") or [] if is_number(x)]
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
            said += [" The policy lies above ", figure(record, "random/place", fixed(0, factor=100, unit=" %")),
                     " of them. Their mean daily return is ", figure(record, "random/daily_mean", fixed(3, True, 100, " %")), "."]  # fmt: skip
        elif own:
            said += [" The line is the policy's return."]
        parts.append(element("div", element("h3", title), drawn, ends, element("p", join(said), class_="note")))
    note = "Returns of the same policy in other spans, and of orders drawn at random. The dashed line is the median."
    return card("The role of chance", element("div", parts, class_="trellis"), note=note, class_="full")


def make_stresses(record: Json) -> Markup:
    """Return the other costs, intrabar rules and delays, with intervals."""
    listed = objects(record, "stresses")
    if not listed:
        return card("Stresses", empty("evaluation.json has no stresses."))
    axis = bars.cover([x for s in listed for x in [*(s.get("interval") or []), s.get("difference")] if is_number(x)])
    rows = [
        (str(one.get("title") or one.get("name")), figure(record, f"stresses/{i}/return", GAIN, tone=True),
         figure(record, f"stresses/{i}/lots", COUNT), figure(record, f"stresses/{i}/difference", GAIN, tone=True),
         interval(record, f"stresses/{i}/interval", GAIN), draw_interval(axis, one))
        for i, one in enumerate(listed)
    ]  # fmt: skip
    head = ("the policy played again with", "return", "lots", "difference", "90 % interval", "")
    note = "Each line is a new run of the same policy. Other fills lead to other states, and the policy then trades differently."
    return card("Stresses", table(head, rows, "wide", "The policy under stress"), note=note, class_="full")


def make_arithmetic(record: Json) -> Markup:
    """Return the net of the recorded lots with other costs, and the delay."""
    nets = {k: x for k, x in part(record, "arithmetic").items() if is_number(x)}
    axis = bars.cover(list(nets.values()))
    lines = [(f"costs × {k}", bars.track(axis, bars.block(axis, 0, x, bars.tone(x))),
              figure(record, f"arithmetic/{k}", MONEY, tone=True)) for k, x in nets.items()]  # fmt: skip
    drawn = bars.rows(lines, label="Net by cost") if lines else empty(explain(record, "arithmetic/net"))
    basis = fixed(2, sign=True, unit=" bp")
    moved = element("p", "After a decision the price moves ", figure(record, "latency/first_move", basis, tone=True),
                    " in the first ", figure(record, "latency/candle_minutes", COUNT), " minutes, in the lot's direction "
                    "(90 %: ", interval(record, "latency/interval", basis), "). A late order gains or loses it.")  # fmt: skip
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
        absent = part(look_up(record, at) or {}, "absent")
        reasons += [element("li", f"{name}: {k.replace('_', ' ')}: {why}") for k, why in absent.items()]
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
    agrees = twin.get("agrees")
    mark = {True: "✓ agrees", False: "✗ differs"}.get(agrees, DASH)
    relative = fixed(1, factor=1e6, unit=" ppm")
    return card(
        "Check by the twin",
        element("p", element("b", mark, class_="gain" if agrees is True else "loss"), ": the float64 twin played ",
                figure(record, "twin/bars", COUNT), " bars and ", figure(record, "twin/lots", COUNT), " lots. The largest "
                "difference of equity is ", figure(record, "twin/largest_difference", relative), " of the initial "
                "equity. The lots less the change of equity leave ", figure(record, "twin/lots_less_equity", relative), "."),
    )  # fmt: skip


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
