"""One page that lays several evaluations side by side."""

from collections.abc import Sequence
from typing import Any

import train.report.sections as sections
from train.report.encode import Packer
from train.report.markup import (
    COUNT,
    DASH,
    GAIN,
    MONEY,
    PERCENT,
    Markup,
    card,
    element,
    figure,
    interval,
    table,
)
from train.report.page import assemble, chart, describe, make_header
from train.report.read import Evaluation

_LOTS = (
    ("lots/win_rate", "share won", PERCENT), ("lots/expectancy", "mean net of a lot, quote", MONEY),
    ("waterfall/gross", "gross, quote", MONEY), ("waterfall/fees", "fees, quote", MONEY),
    ("waterfall/net", "net, quote", MONEY), ("time_in_market", "share of bars with a lot", PERCENT),
)  # fmt: skip


def compare_evaluations(evaluations: Sequence[Evaluation]) -> str:
    """Return the page of several evaluations."""
    records = [e.record for e in evaluations]
    names = name_apart(evaluations)
    data = {"compare": [{"name": n, "daily": sections.part(r, "daily")} for n, r in zip(names, records, strict=True)]}
    body = [
        make_header(f"{len(names)} evaluations", "The figures of each run stand in its own report."),
        make_verdicts(names, records),
        make_measures(names, records),
        card("Equity and drawdown", chart("daily", "tall"), class_="full",
             note="Cumulative return and drawdown in percent, by day. Only common days can be compared."),
        make_waterfalls(names, records),
        make_differences(names, records),
    ]  # fmt: skip
    return assemble(f"{len(names)} evaluations", body, data, Packer())


def name_apart(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return the titles; equal ones are numbered."""
    titles = [e.title for e in evaluations]
    return [f"{t} ({i + 1})" if titles.count(t) > 1 else t for i, t in enumerate(titles)]


def make_verdicts(names: Sequence[str], records: Sequence[dict[str, Any]]) -> Markup:
    """Return the verdict of each run."""
    parts = []
    for i, (name, record) in enumerate(zip(names, records, strict=True)):
        mark = element("i", class_=f"key run-{i % 8}")
        said = element("p", " ".join(sections.texts(record.get("verdict"))) or "No verdict.")
        parts.append(element("div", element("h3", mark, name), element("p", describe(record), class_="note"), said))
    return card("Verdicts", element("div", parts, class_="trellis"), class_="full lead")


def make_measures(names: Sequence[str], records: Sequence[dict[str, Any]]) -> Markup:
    """Return the table of measures, one column a run. Its numbers name the run and their place."""
    whole = list(records)
    numbered = range(len(whole))
    rows: list[list[Any]] = []
    for key, name, form in sections.MEASURES:
        rows.append([name, *(figure(whole, f"{i}/overall/{key}", form, tone=form is GAIN) for i in numbered)])
    for key, name, form in sections.INTERVALS:
        rows.append(
            [f"90 % interval, {name}", *(interval(whole, f"{i}/overall/intervals/{key}", form) for i in numbered)]
        )
    rows.append(["lots", *(figure(whole, f"{i}/lots/lots", COUNT) for i in numbered)])
    for at, name, form in _LOTS:
        rows.append([name, *(figure(whole, f"{i}/{at}", form, tone=form is MONEY) for i in numbered)])
    return card("Measures", table(("", *names), rows, "wide", "Measures of every run"), class_="full")


def make_waterfalls(names: Sequence[str], records: Sequence[dict[str, Any]]) -> Markup:
    """Return the waterfalls beside each other."""
    whole = list(records)
    ends = [x for r in records for *_, begin, end in sections.find_steps(r) for x in (begin, end)]
    parts = [
        element("div", element("h3", name), sections.draw_waterfall(whole, f"{i}/waterfall", ends))
        for i, name in enumerate(names)
    ]
    return card("From gross to net", element("div", parts, class_="trellis"), class_="full",
                note="Quote currency, all lots together. All charts have one scale.")  # fmt: skip


def make_differences(names: Sequence[str], records: Sequence[dict[str, Any]]) -> Markup:
    """Return the settings in which the runs differ."""
    rows = []
    for group in ("policy", "data", "params", "config"):
        keys = dict.fromkeys(k for r in records for k in sections.part(r, group))
        for key in keys:
            values = [sections.part(r, group) for r in records]
            shown = [sections.show_value(v[key]) if key in v else DASH for v in values]
            if len(set(shown)) > 1:
                rows.append((f"{group}: {key}", *shown))
    shown = table(("", *names), rows, "wide mono", "Settings that differ") if rows else None
    return card("Settings that differ", shown or element("p", "None.", class_="empty"), class_="full")
