"""One page of HTML that needs no network: styles, scripts and data are inside it."""

import base64
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import train.report.sections as sections
from train.report.encode import Packer
from train.report.markup import DASH, Markup, anchor, card, element, embed
from train.report.read import Evaluation
from train.report.series import pack_evaluation

STATIC = pathlib.Path(__file__).parent / "static"
SCRIPTS = ("lightweight-charts.js", "lots.js", "report.js")
CONTENTS = (
    ("Baselines", "Policy and baselines"), ("Equity", "Equity and drawdown"), ("Account", "Account by bar"),
    ("Lots", "Candles and lots"), ("Costs", "From gross to net"), ("Actions", "Actions against features"),
    ("Chance", "The role of chance"), ("Stresses", "Stresses"), ("Measures", "Measures"),
    ("Looks", "Looks at this data"), ("Settings", "Settings"),
)  # fmt: skip
"""Links at the top of the page, and the titles of the parts."""
TRADINGVIEW = "https://www.tradingview.com/"


def make_page(evaluation: Evaluation) -> str:
    """Return the page of one evaluation."""
    packer = Packer()
    data = {"record": evaluation.record, "series": pack_evaluation(evaluation, packer)}
    return assemble(evaluation.title, make_body(evaluation), data, packer)


def make_body(evaluation: Evaluation) -> list[Markup]:
    """Return the parts of the page in their order."""
    record = evaluation.record
    return [
        make_header(evaluation.title, describe(record)),
        make_contents(),
        sections.make_verdict(record),
        sections.make_tiles(record),
        sections.make_baselines(record),
        place_months(record),
        card("Equity and drawdown", chart("daily", "tall"), note="Cumulative return and drawdown in percent, by day."),
        make_account_card(),
        make_lots_card(),
        grid(
            stack(sections.make_lot_figures(record), sections.make_round_trip(record)),
            stack(make_scatter_card(), sections.make_arithmetic(record)),
        ),
        sections.make_actions(record),
        sections.make_chance(record),
        sections.make_stresses(record),
        sections.make_measures(record),
        grid(stack(sections.make_trials(record), sections.make_twin(record)), sections.make_verdicts(record)),
        sections.make_settings(record),
    ]


def write_page(path: pathlib.Path, page: str) -> pathlib.Path:
    """Write a page beside its place, rename it, and return the path."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path


def describe(record: dict[str, Any]) -> str:
    """Return the line below the title: policy, data, dates."""
    policy, data = sections.part(record, "policy"), sections.part(record, "data")
    step = policy.get("step")
    parts = [
        str(policy.get("name") or "") if policy.get("run") else "",
        f"{step:,} steps" if isinstance(step, int) else "",
        ", ".join(sections.texts(data.get("symbols"))),
        f"{data['split']} split of {data.get('dataset')}" if data.get("split") else str(data.get("dataset") or ""),
        " to ".join(sections.show_time(data.get(k))[:10] for k in ("first", "last") if data.get(k) is not None),
    ]
    return " · ".join(dict.fromkeys(p for p in parts if p))


def make_header(title: str, line: str) -> Markup:
    """Return the title, and the buttons of the page."""
    buttons = element(
        "div",
        element("button", "Theme", type="button", id="theme", title="Light, dark, or as the system"),
        element("button", "Print", type="button", id="print"),
        class_="buttons",
    )
    return element("header", element("div", element("h1", title), element("p", line, class_="note")), buttons)


def make_contents() -> Markup:
    """Return links to the main parts of the page."""
    links = [element("a", text, href=f"#{anchor(title)}") for text, title in CONTENTS]
    return element("nav", links, aria_label="Parts of the page")


def make_account_card() -> Markup:
    """Return the chart of one account: equity and exposure by bar."""
    note = "Equity in quote currency; below it the notional of the held lots over equity, short below 0."
    return card("Account by bar", chooser("account-of"), chart("account", "tall"), class_="full", note=note)


def make_lots_card() -> Markup:
    """Return the chart of candles and lots, with its buttons, and the table of lots."""
    buttons = [
        element("button", text, type="button", id=name, title=title)
        for name, text, title in (
            ("first-lot", "⇤", "First lot (Home)"), ("previous-lot", "← lot", "Previous lot (key: left, or p)"),
            ("next-lot", "lot →", "Next lot (key: right, or n)"), ("last-lot", "⇥", "Last lot (End)"),
            ("all-lots", "Whole span", "Show the whole span (key: a)"),
            ("follow-lot", "Zoom to lot", "Zoom to the chosen lot (key: z)"),
        )
    ]  # fmt: skip
    bar = element("div", chooser("lots-of"), buttons, element("output", "", id="at-lot"), class_="toolbar")
    key = element(
        "p", "▲ long and ▼ short entries. Exits: ◆ target, ✕ stop, ■ liquidation, ● closed, ○ time limit. "
        "A solid line is a gain, a dashed one a loss. Boxes: from entry to target, and from entry to stop; the dotted "
        "line is the liquidation price.", class_="note")  # fmt: skip
    drawn = element(
        "div", chart("candles", "taller", tabindex="0"), element("dl", id="lot", class_="lot"), class_="beside"
    )
    filters = element(
        "div",
        element("label", "side ", element("select", id="filter-side")),
        element("label", "exit ", element("select", id="filter-reason")),
        element("label", "net ", element("select", id="filter-net")),
        element("span", class_="spring"),
        element("button", "←", type="button", id="page-back", title="Previous page"),
        element("output", "", id="page-at"),
        element("button", "→", type="button", id="page-on", title="Next page"),
        class_="toolbar",
    )
    table = element("div", element("table", id="lots", class_="wide"), class_="scroll", tabindex="0", role="region",
                    aria_label="Table of lots")  # fmt: skip
    note = element(
        "span",
        "Prices in quote currency, times in UTC. Entry and exit prices hold the slippage, gross does not. ",
        element("span", id="short-note"),
    )
    return card("Candles and lots", bar, drawn, key, filters, table, note=note, class_="full")


def place_months(record: dict[str, Any]) -> Markup:
    """Return the waterfall, the exits and the months; many months need a column of their own."""
    waterfall, exits, months = (f(record) for f in (sections.make_waterfall, sections.make_exits, sections.make_months))
    few = len(sections.objects(record, "months")) < 7
    return grid(waterfall, stack(exits, months)) if few else grid(stack(waterfall, exits), months)


def make_scatter_card() -> Markup:
    """Return the chart of holding time against profit."""
    note = "Each point is a lot: bars held (logarithmic) against net, quote. A click shows the lot."
    return card("Holding time and profit", chart("scatter", "low"), note=note)


def chart(name: str, class_: str = "", **attributes: Any) -> Markup:
    """Return the place of a chart that a script draws."""
    told = element("noscript", element("p", "This chart needs JavaScript.", class_="empty"))
    return element("div", told, id=name, class_=f"chart {class_}".strip(), **attributes)


def chooser(name: str) -> Markup:
    """Return the list of accounts; a script fills it, and hides it if there is one account."""
    return element("label", "account ", element("select", id=name), class_="chooser")


def grid(*cards: Markup) -> Markup:
    """Return cards side by side."""
    return element("div", cards, class_="grid")


def stack(*cards: Markup) -> Markup:
    """Return cards one below the other, in one column of a grid."""
    return element("div", cards, class_="stack")


def assemble(title: str, body: Sequence[Markup], data: dict[str, Any], packer: Packer) -> str:
    """Return the page: head, body, data and scripts. A policy allows the scripts of the page alone, and no request."""
    scripts = [read(name) for name in SCRIPTS]
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    rules = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=rules),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} {DASH} perpjax"),
        Markup(f"<style>{read('report.css')}</style>"),
    )
    block = Markup(f'<script type="application/octet-stream" id="block">{packer.text()}</script>')
    code = [Markup(f"<script>{s}</script>") for s in scripts]
    link = element("a", "TradingView", href=TRADINGVIEW, rel="noopener noreferrer")
    rights = " Lightweight Charts\u2122, Copyright \u00a9 2026 TradingView, Inc., Apache License 2.0."
    foot = element("footer", "Made by perpjax. Charts by ", link, rights)
    faults = element("div", id="faults", hidden=True)
    main = element("body", element("main", body), foot, faults, embed(data, "data"), block, code)
    return f"<!doctype html>\n{element('html', head, main, lang='en')}\n"


def read(name: str) -> str:
    """Return a file of the folder static."""
    return (STATIC / name).read_text(encoding="utf-8")
