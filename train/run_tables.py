"""The tables of `python -m train.runs`. Everything that comes from a file is escaped."""

import json
import math
import pathlib
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from train.run_folder import CONFIG, Run, clean, count_total, describe_status, is_count, read_latest, read_part

Json = dict[str, Any]

TOO_GOOD = "best was chosen on this split, so its figure is too good; final was not."
_PLACES = ("run_dir",)
"""Settings that name a place; two runs that differ in them alone have the same settings."""
_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("closed_return", "return, lots closed, %", lambda x: f"{100 * x:+.3f}"),
    ("return", "return %", lambda x: f"{100 * x:+.3f}"),
    ("standard_error", "± s.e. %", lambda x: f"{100 * x:.3f}"),
    ("t", "t", lambda x: f"{x:+.1f}"),
    ("max_drawdown", "drawdown %", lambda x: f"{100 * x:.2f}"),
    ("trades", "trades", lambda x: f"{x:.1f}"),
    ("fees", "fees %", lambda x: f"{100 * x:.3f}"),
    ("slippage", "slippage %", lambda x: f"{100 * x:.3f}"),
    ("funding", "funding %", lambda x: f"{100 * x:+.3f}"),
    ("liquidations", "lots liquidated", lambda x: f"{x:.2f}"),
)
_GAP = 3
"""Characters between two columns of a table."""
_WIDEST = 30
"""A value wider than this is folded where several runs stand side by side."""


# Values.


def show_number(value: Any, form: Callable[[float], str]) -> str:
    """Return the number, or a dash if a JSON value is none, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    try:
        return form(float(value)) if math.isfinite(value) else "-"
    except OverflowError:
        return "-"


def show_steps(value: Any) -> str:
    """Return a number of steps with three digits, such as "4.59M"."""
    if not is_count(value):
        return "-"
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.{max(0, 3 - len(str(value // size)))}f}{unit}"
    return str(value)


def show_value(value: Any) -> str:
    """Return a setting as the command line takes it; None as "none"."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list) and value and all(not isinstance(x, list | dict) for x in value):
        return " ".join(map(show_value, value))
    return clean(json.dumps(value))


def show_time(value: Any) -> str:
    """Return the first minutes of a time, such as "2026-11-28 08:15"."""
    return clean(str(value).replace("T", " ")[:16])


def flatten(settings: Json, prefix: str = "") -> Json:
    """Return the settings under their dotted names, such as `env.episode_length`."""
    flat: Json = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name: value}
    return flat


def name_run(run: Run) -> str:
    """Return the shortest name under which a command finds the run: the folder's name, or its path."""
    return run.name if run.path.parent == pathlib.Path("runs") else str(run.path)


# List.


class _Column(NamedTuple):
    head: str
    cells: list[str]
    justify: str = "left"

    @property
    def width(self) -> int:
        return max(cell_len(line) for text in (self.head, *self.cells) for line in text.split("\n"))


_LEFT_OUT = ("steps/s", "began", "dataset", "steps", "at step")
"""Columns that a narrow terminal has no room for, the first to go first."""


def print_list(console: Console, runs: Sequence[Run], folder: pathlib.Path) -> None:
    """Print a row for each run. A damaged file is named in the row; the other figures are shown all the same."""
    rows = [_read_row(run) for run in runs]
    latest = read_latest(folder)
    names = [("* " if run.name == latest else "  ") + clean(run.name) for run in runs]
    heads = ("dataset", "began", "steps", "steps/s", "best %", "at step", "final %")
    columns = {"run": _Column("  run", names)}
    for head in heads:
        columns[head] = _Column(head, [row[head] for row in rows], "left" if head in ("dataset", "began") else "right")
    status = [row["status"] for row in rows]
    least = max(len(word) for text in ("status", *status) for word in text.split())
    left_out = []
    for head in _LEFT_OUT:
        if _sum_widths(columns.values()) + least > console.width:
            left_out.append(head)
            del columns[head]
    room = console.width - _sum_widths(columns.values())
    if room >= least:
        table = _make_table()
        for column in columns.values():
            table.add_column(Text(column.head), justify=column.justify, no_wrap=True, min_width=column.width)
        table.add_column("status", width=min(room, max(map(len, ("status", *status)))))
        for i, text in enumerate(status):
            table.add_row(*(Text(column.cells[i]) for column in columns.values()), Text(text))
        console.print(table)
    else:
        for name, row in zip(names, rows, strict=True):
            facts = [row["status"], *(f"{head} {row[head]}" for head in ("best %", "final %") if row[head] != "-")]
            console.print(Text(name), soft_wrap=True)
            console.print(Padding(Text("; ".join(facts)), (0, 0, 0, 4), expand=False))
    note = "best, final: mean return on validation, all lots closed, % of initial equity. " + _sentence(TOO_GOOD)
    marked = " *: latest." if latest in [run.name for run in runs] else ""
    narrow = f" No room here for {', '.join(left_out)}: `show` has them." if left_out and room >= least else ""
    console.print(Text(note + marked + narrow, style="dim"))


def _read_row(run: Run) -> dict[str, str]:
    faults: list[str] = []

    def read(part: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return part()
        except (ValueError, OSError) as error:
            fault = _shorten(error, run)
            if fault not in faults:
                faults.append(fault)
            return otherwise

    config = read(run.config, {})
    settings = read(lambda: read_part(config, "settings", run.path / CONFIG) if config else {}, {})
    metrics, looks = read(run.metrics, None), read(run.evaluations, [])
    closing, cuts = read(run.closing, None), read(run.cuts, [])
    newest = metrics[-1] if metrics else {} if metrics is None else {"steps": 0}
    best, final = find_best(looks, closing) or {}, (closing or {}).get("policies", {}).get("final", {})
    form = _FIGURES[0][2]
    status = describe_status(settings, metrics or [], closing)
    if faults:
        status = "damaged: " + "; ".join(faults)
    elif cuts:
        status = f"{status}; cut: {', '.join(_place(cut) for cut in cuts)}"
    return {
        "dataset": show_value(settings["dataset"]) if isinstance(settings.get("dataset"), str) else "-",
        "began": show_time(run.began()),
        "steps": f"{show_steps(newest.get('steps'))} / {show_steps(count_total(settings))}",
        "steps/s": show_number(newest.get("steps_per_second"), lambda x: f"{x:,.0f}"),
        "best %": show_number(best.get("closed_return"), form),
        "at step": show_steps(best.get("step")),
        "final %": show_number(final.get("closed_return"), form),
        "status": status,
    }


def find_best(looks: Sequence[Json], closing: Json | None) -> Json | None:
    """Return the figures of the best policy on validation: from the comparison at the end, or from the last best look.

    Its `step` is the number of environment steps.
    """
    if closing is not None and "best" in closing["policies"]:
        return closing["policies"]["best"]
    marked = [look for look in looks if look.get("best") is True]
    return marked[-1] | {"step": marked[-1]["steps"]} if marked else None


def _shorten(error: Exception, run: Run) -> str:
    """The message without the folder, which the row names already."""
    if isinstance(error, OSError):
        return clean(f"{pathlib.Path(error.filename or '?').name}: {error.strerror}")
    return _place(str(error).replace(clean(run.path) + "/", "", 1))


def _place(fault: str) -> str:
    """Such as "metrics.jsonl:7" of "metrics.jsonl, line 7: not JSON"; `show` gives the reason."""
    found = re.match(r"(.+), line (\d+): ", fault + " ")
    return f"{found[1]}:{found[2]}" if found else fault


# Show.


def print_run(console: Console, run: Run, defaults: Json) -> None:
    """Print everything about one run.

    Args:
      defaults: the settings of a run without options.

    Raises:
      ValueError: a file is damaged. Nothing is printed then. The message names file and line.
    """
    config, settings, metrics, looks = run.config(), run.settings(), run.metrics(), run.evaluations()
    closing, cuts, checkpoints = run.closing(), run.cuts(), run.checkpoint_steps()
    status = describe_status(settings, metrics, closing)
    _print_lines(console, clean(run.name), [], bold=True)
    _print_facts(console, _state_facts(run, config, settings, metrics, checkpoints, status, cuts))
    _print_sessions(console, config)
    _print_settings(console, flatten(settings), flatten(defaults))
    if metrics:
        figures = [f"{clean(name)} {_figure(value)}" for name, value in metrics[-1].items()]
        _print_flow(console, "Newest update", figures)
    _print_validation(console, looks, closing)
    name = name_run(run)
    go_on = f"python -m train.ppo --resume {shlex.quote(name)}"
    if status == "finished":
        total = settings.get("total_steps")
        go_on += f" --total-steps {2 * total if is_count(total) else 'N'}"
    heading = "Train on, with more steps" if status == "finished" else "Go on with the training"
    _print_lines(console, heading, [go_on])
    text = json.dumps(name, ensure_ascii=False)
    _print_lines(console, "Load the policy", ["from train import load_policy", f"policy = load_policy({text})"])


def _state_facts(
    run: Run, config: Json, settings: Json, metrics: list[Json], checkpoints: list[int], status: str, cuts: list[str]
) -> list[tuple[str, str]]:
    done, total = (metrics[-1]["steps"] if metrics else 0), count_total(settings)
    state = f"{status}; {done:,} of {'?' if total is None else format(total, ',')} steps"
    if metrics and is_count(metrics[-1].get("update")):
        state += f", {metrics[-1]['update']:,} updates"
    dataset = config.get("dataset") if isinstance(config.get("dataset"), dict) else {}
    features = dataset.get("features")
    facts = [
        ("folder", clean(run.path)),
        ("state", "; ".join([state, *cuts])),
        ("checkpoints", ", ".join(f"{step:,}" for step in checkpoints) or "none"),
        ("policy", show_value(config.get("policy"))),
        ("dataset", show_value(dataset.get("name"))),
        *((f"{split} hash", show_value(dataset[split])) for split in ("train", "val") if split in dataset),
        ("symbols", show_value(dataset.get("symbols"))),
        ("features", f"{len(features)}: {', '.join(map(show_value, features))}" if isinstance(features, list) else "-"),
        ("device", show_value(config.get("device"))),
        ("versions", _describe_versions(config)),
        ("commit", show_value(config.get("commit"))),
    ]
    return facts


def _describe_versions(record: Json) -> str:
    versions = record.get("versions")
    if not isinstance(versions, dict):
        return "-"
    return ", ".join(f"{clean(name)} {show_value(version)}" for name, version in versions.items())


def _print_sessions(console: Console, config: Json) -> None:
    sessions = config.get("sessions")
    sessions = [s for s in sessions if isinstance(s, dict)] if isinstance(sessions, list) else []
    lines = []
    for session in sessions or [config]:
        step = show_number(session.get("first_step", 0), "{:,.0f}".format)
        told = f"{show_time(session.get('began'))} UTC, from step {step}"
        for name, known in (("device", show_value), ("versions", lambda _, s=session: _describe_versions(s))):
            if name in session and session[name] != config.get(name):
                told += f", {name} {known(session[name])}"
        lines += [told, "  " + show_command(session.get("command"))]
    _print_lines(console, "Commands", lines)


def show_command(argv: Any) -> str:
    """Return a recorded command line as it is typed."""
    if not isinstance(argv, list) or not argv:
        return "-"
    first, *rest = map(str, argv)
    path = pathlib.PurePath(first)
    typed = [first]
    if path.name == "__main__.py" and len(path.parts) >= 3:
        typed = ["python", "-m", ".".join(path.parts[-3:-1])]
    elif path.name in ("perpjax", "perpjax.exe"):
        typed = ["perpjax"]
    return clean(shlex.join([*typed, *rest]))


def _print_settings(console: Console, flat: Json, known: Json) -> None:
    other = {name: value for name, value in flat.items() if name not in known or not _equal(value, known[name])}
    heading = "Settings that differ from the defaults" if other else "All settings have their defaults"
    console.print(_head(heading))
    if other:
        table = Table.grid(padding=(0, _GAP, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in other.items():
            default = f"default {show_value(known[name])}" if name in known else "not a setting of this version"
            table.add_row(Text(clean(name)), Text.assemble(show_value(value), (f"   {default}", "dim")))
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
    same = [f"{clean(name)} {show_value(value)}" for name, value in flat.items() if name not in other]
    _print_flow(console, "The others", same)


def _print_validation(console: Console, looks: list[Json], closing: Json | None) -> None:
    if closing is not None:
        policies = closing["policies"]
        size = f"{_figure(closing.get('windows'))} windows x {_figure(closing.get('bars'))} bars"
        heads = [
            clean(name) + (f"\n{show_steps(figures['step'])}" if "step" in figures else "\n")
            for name, figures in policies.items()
        ]
        columns, title = list(policies.values()), f"Validation at the end: mean of {size}"
    elif looks:
        best, newest = find_best(looks, None), looks[-1]
        columns = [newest] if best is None else [best, newest]
        heads = [f"{'newest' if x is newest else 'best'}\n{show_steps(x['steps'])}" for x in columns]
        title = f"Validation so far: {len(looks)} looks, mean of {_figure(newest.get('windows'))} windows"
    else:
        console.print(_head("Validation: no look at it yet"))
        return
    console.print(_head(title))
    _print_by_run(console, _figure_rows(columns), heads)
    note = "% of initial equity; drawdown: of the peak."
    if any(head.startswith("best") for head in heads):
        note += " " + _sentence(TOO_GOOD if closing is not None else TOO_GOOD.partition("; ")[0] + ".")
    console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2), expand=False))


def _figure_rows(columns: Sequence[Json], prefix: str = "") -> list[tuple[str, list[str]]]:
    rows = [(prefix + head, [show_number(c.get(name), form) for c in columns]) for name, head, form in _FIGURES]
    return [(head, cells) for head, cells in rows if any(cell != "-" for cell in cells)]


# Compare.


def print_comparison(console: Console, runs: Sequence[Run]) -> None:
    """Print the settings that differ, the circumstances that differ, and the figures, a column for each run.

    Raises:
      ValueError: a file is damaged. Nothing is printed then. The message names file and line.
    """
    configs = [run.config() for run in runs]
    flats = [flatten(run.settings()) for run in runs]
    closings, looks = [run.closing() for run in runs], [run.evaluations() for run in runs]
    status = [describe_status(run.settings(), run.metrics(), c) for run, c in zip(runs, closings, strict=True)]
    heads = _name_columns(console, [clean(run.name) for run in runs])

    names = dict.fromkeys(name for flat in flats for name in flat if name not in _PLACES)
    rows = [(clean(name), [show_value(f[name]) if name in f else "-" for f in flats])
            for name in names if not _all_equal([f.get(name, ...) for f in flats])]  # fmt: skip
    console.print(_head("Settings that differ" if rows else "The settings are exactly the same"))
    if rows:
        _print_by_run(console, rows, heads)
    facts = [_facts(config) for config in configs]
    names = dict.fromkeys(name for fact in facts for name in fact)
    rows = [(name, [fact.get(name, "-") for fact in facts]) for name in names
            if not _all_equal([fact.get(name) for fact in facts])]  # fmt: skip
    if rows:
        console.print(_head("Circumstances that differ"))
        _print_by_run(console, rows, heads)
    finals = [(c or {}).get("policies", {}).get("final", {}) for c in closings]
    bests = [find_best(of, c) or {} for of, c in zip(looks, closings, strict=True)]
    rows = [("status", status)]
    for label, columns in (("final", finals), ("best", bests)):
        rows += [(f"{label}: steps", [show_steps(c.get("step")) for c in columns])] if any(columns) else []
        rows += _figure_rows(columns, f"{label}: ")
    console.print(_head("Validation"))
    _print_by_run(console, rows, heads)
    notes = ["% of initial equity; drawdown: of the peak."]
    notes += [_sentence(TOO_GOOD)] if any(bests) else []
    if any(bests) and None in closings:
        notes += ["Before the end of a run best is a mean over fewer windows."]
    if not _all_equal([fact.get("val hash") for fact in facts]):
        notes += ["The validation data differ: these figures do not compare."]
    console.print(Padding(Text(" ".join(notes), style="dim"), (0, 0, 0, 2), expand=False))


def _facts(config: Json) -> dict[str, str]:
    versions, dataset = (config.get(x) if isinstance(config.get(x), dict) else {} for x in ("versions", "dataset"))
    facts = {clean(name): show_value(version) for name, version in versions.items()}
    facts |= {"device": show_value(config.get("device")), "commit": show_value(config.get("commit"))[:12]}
    return facts | {f"{split} hash": show_value(dataset[split])[:12] for split in ("train", "val") if split in dataset}


def _equal(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same; 1 and 1.0 are, and true and 1 are not."""
    return a is b or (a == b and isinstance(a, bool) == isinstance(b, bool))


def _all_equal(values: Sequence[Any]) -> bool:
    return all(_equal(value, values[0]) for value in values)


def _name_columns(console: Console, names: list[str]) -> list[str]:
    """The names of the runs, or numbers with a legend if the names are too wide for columns."""
    longest_label = len("final: return, lots closed, %")
    if 2 + longest_label + sum(cell_len(name) + _GAP for name in names) <= console.width:
        return names
    heads = [f"run {i}" for i in range(1, len(names) + 1)]
    for head, name in zip(heads, names, strict=True):
        console.print(Text(f"{head}: {name}"), soft_wrap=True)
    return heads


# Layout.


def _make_table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))


def _sum_widths(columns: Iterable[_Column]) -> int:
    """Width of these columns and of the gap after each."""
    return sum(column.width + _GAP for column in columns)


def _head(text: str) -> Text:
    return Text("\n" + text, style="bold")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _figure(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return show_number(value, lambda x: f"{x:,.1f}" if 1000 <= abs(x) < 1e9 else f"{x:.4g}")
    return show_value(value)


def _print_lines(console: Console, heading: str, lines: list[str], bold: bool = False) -> None:
    """Lines to copy: none is broken."""
    console.print(Text(heading, style="bold") if bold else _head(heading), soft_wrap=True)
    for line in lines:
        console.print(Text("  " + clean(line)), soft_wrap=True)


def _print_facts(console: Console, facts: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def _print_flow(console: Console, heading: str, items: list[str]) -> None:
    if items:
        columns = Columns([Text(item, overflow="fold") for item in items], padding=(0, _GAP), column_first=True)
        console.print(Group(_head(heading), Padding(columns, (0, 0, 0, 2), expand=False)))


def _print_by_run(console: Console, rows: list[tuple[str, list[str]]], heads: list[str]) -> None:
    """A table with a column for each run: as many as fit side by side, the others below."""
    columns = [_Column(head, [cells[i] for _, cells in rows], "right") for i, head in enumerate(heads)]
    first = max(cell_len(name) for name, _ in rows)
    room = console.width - 2 - first
    widths = [min(c.width, max(_WIDEST, cell_len(c.head)), max(1, room - _GAP)) for c in columns]
    begin = 0
    while begin < len(columns):
        end = begin + 1
        while end < len(columns) and sum(w + _GAP for w in widths[begin : end + 1]) <= room:
            end += 1
        table = _make_table()
        table.add_column("", no_wrap=True)
        for column, width in zip(columns[begin:end], widths[begin:end], strict=True):
            table.add_column(Text(column.head), justify="right", min_width=width, max_width=width, overflow="fold")
        for i, (name, _) in enumerate(rows):
            table.add_row(Text(name), *(Text(column.cells[i]) for column in columns[begin:end]))
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
        if end < len(columns):
            console.print()
        begin = end
