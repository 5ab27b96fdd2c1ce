"""The display of a run, on terminals of many sizes, in pipes, and on outputs that fail."""

import io
import json
import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest

import train.hooks.display
from train.hooks import RunInfo
from train.hooks.display import POINTS, Display, History, draw_sparkline, pack

ROOT = pathlib.Path(train.__file__).parents[1]
RUN = RunInfo(pathlib.Path("runs/one"), "btc-1h", "MLP 64-64", "cpu", 4096, 1_000_000, 0, 0, 10_000.0)
LARGE = {"steps": 987_654_321_000, "steps_per_second": 123_456_789.0}
BARS = train.hooks.display._BARS


def make_metrics(update: int = 1, **others) -> dict:
    metrics = {"update": update, "steps": 10_000 * update, "seconds": 1.0, "steps_per_second": 10_000.0}
    episodes = {"episode_return": 0.05, "max_drawdown": 0.1, "trades": 12.0, "fees": 30.0, "slippage": 20.0}
    return metrics | episodes | {"funding": -10.0, "entropy": 1.5, "kl": 0.004} | others


def make_evaluation(value: float, best: bool = True) -> dict:
    return {"update": 1, "steps": 10_000, "windows": 8, "closed_return": value, "best": best}


class Output(io.StringIO):
    """A standard output with an encoding, that may be a terminal."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = False):
        super().__init__()
        self._encoding, self._terminal = encoding, terminal

    encoding = property(lambda self: self._encoding)

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        text.encode(self._encoding)  # as a real one, it raises for a character that it lacks
        return super().write(text)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def start(monkeypatch):
    """Starts a display on a new standard output; returns both."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train.hooks.display, "TICK_SECONDS", 1000.0)
    monkeypatch.setattr(train.hooks.display, "FRAME_SECONDS", 0.0)
    displays = []

    def start(columns=100, lines=40, term="xterm", run=RUN, state=None, **settings):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        monkeypatch.setenv("TERM", term)
        output = Output(**{"terminal": True} | settings)
        monkeypatch.setattr(sys, "stdout", output)
        display = Display(Clock())
        displays.append(display)
        if state:
            display.set_state(state)
        display.on_start(run)
        return display, output

    yield start
    for display in displays:
        display.__exit__(None, None, None)


def read_screen(output: Output) -> list[str]:
    """The lines of a tall terminal that got the output. It knows only the sequences that the panel needs."""
    screen, row = [""], 0
    for sequence, character in re.findall(r"(\x1b\[[?\d;]*[A-Za-z])|(.)", output.getvalue(), re.DOTALL):
        if sequence == "\x1b[1A":
            row -= 1
        elif sequence == "\x1b[2K":
            screen[row] = ""
        elif sequence:
            assert re.fullmatch(r"\x1b\[(\?25[lh]|[\d;]*m)", sequence), repr(sequence)
        elif character == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif character != "\r":
            assert character.isprintable(), repr(character)
            screen[row] += character
    return [line.rstrip() for line in screen if line.strip()]


def read_row(output: Output, name: str) -> str:
    (line,) = [x for x in read_screen(output) if re.match(rf"[│|] {name} ", x)]
    return line.strip("│| ")


# The panel.


def test_the_panel_shows_the_run(start):
    display, output = start()
    display.on_stage("compiling")
    assert "compiling" in read_screen(output)[2]
    display._clock.now = 83.0
    display.on_updates([make_metrics(25)])
    display.on_evaluation(make_evaluation(0.02))
    display.on_evaluation(make_evaluation(0.0123, best=False))
    screen = read_screen(output)
    assert screen[0] == "training MLP 64-64 on btc-1h in 4,096 environments"
    assert screen[1] == "on cpu, into runs/one"
    assert "training" in screen[2] and screen[3].endswith(" 25 % │")
    assert screen[4].strip("│ ") == "250,000 of 1,000,000 steps  10,000 steps/s  0:01:23 spent  0:01:15 left"
    rows = [re.sub(rf" *[{BARS}]+$", "", x.strip("│ ")).split(maxsplit=1) for x in screen[6:-1]]
    assert rows == [
        ["return", "+5.13 %"],  # exp(0.05) - 1
        ["drawdown", "10.00 %"],
        ["trades", "12.0"],
        ["costs", "0.40 %"],  # (30 + 20 - 10) of 10 000
        ["validation", "+1.23 %  best +2.00 %"],
        ["entropy", "1.500"],
        ["KL", "0.0040"],
    ]


def test_an_update_without_episodes_keeps_their_values(start):
    display, output = start()
    display.on_updates([make_metrics()])
    display.on_updates([{"update": 2, "steps": 20_000, "steps_per_second": 1e4, "entropy": 1.25}])
    assert "+5.13 %" in read_row(output, "return") and "1.250" in read_row(output, "entropy")
    assert read_row(output, "KL").split()[1] == "0.0040"


def test_the_panel_stays_and_the_last_words_follow(start):
    display, output = start()
    display.on_updates([make_metrics(100)])
    assert "left" in "".join(read_screen(output))
    display.on_end("done in runs/one\n  play it: perpjax-play runs/one")
    screen = read_screen(output)
    assert "finished" in screen[2] and "100 %" in screen[3] and "left" not in screen[4]
    assert screen[-3].startswith("╰")
    assert screen[-2:] == ["done in runs/one", "  play it: perpjax-play runs/one"]
    assert sys.stdout is output  # it was given back


def test_a_run_that_stops_early_is_not_called_finished(start):
    display, output = start()
    display.on_updates([make_metrics(99)])
    display.on_end("stopped")
    assert "ended" in read_screen(output)[2] and " 99 %" in read_screen(output)[3]


def test_messages_stand_above_the_panel_and_warnings_are_yellow(start):
    display, output = start()
    display.on_updates([make_metrics()])
    display.on_message("warning: too hot")
    display.on_message("all [bold]well[/bold]")
    print("printed elsewhere")
    screen = read_screen(output)
    assert screen[2:5] == ["warning: too hot", "all [bold]well[/bold]", "printed elsewhere"]
    assert screen[5].startswith("╭") and len([x for x in screen if x.startswith("╭")]) == 1
    assert "\x1b[33mwarning:\x1b[0m too hot" in output.getvalue()


def test_the_clock_goes_on_between_updates(start, monkeypatch):
    monkeypatch.setattr(train.hooks.display, "TICK_SECONDS", 0.01)
    display, output = start()
    display.on_updates([make_metrics(50)])
    drawn = output.getvalue().count("╭")
    display._clock.now = 20.0
    deadline = train.hooks.display.time.monotonic() + 30
    while "0:00:20 spent" not in output.getvalue() and train.hooks.display.time.monotonic() < deadline:
        train.hooks.display.time.sleep(0.01)
    assert "0:00:20 spent  0:00:30 left" in output.getvalue() and output.getvalue().count("╭") > drawn


@pytest.mark.parametrize("columns", [40, 60, 79, 80, 120])
def test_digits_are_whole_at_every_width(start, columns):
    display, output = start(columns, run=RUN._replace(total_steps=1_000_000_000_000))
    display.on_updates([make_metrics(**LARGE, episode_return=9.0, trades=123_456_789.1, fees=7e9, entropy=-12345.678)])
    display.on_evaluation(make_evaluation(-12_345.0))
    display.on_end("end")
    screen = read_screen(output)
    panel = [x for x in screen if x[0] in "╭│╰"]
    assert len({len(x) for x in panel}) == 1 and len(panel[0]) == min(columns, 100)
    text = " ".join(x.strip("│ ") for x in panel)
    assert "…" not in output.getvalue() and "..." not in output.getvalue()
    for figure in ("987,654,321,000 of 1,000,000,000,000 steps", "123,456,789 steps/s", "98 %", "0:00:00 spent"):
        assert figure in text
    for figure in ("+810,208.39 %", "123,456,789.1", "70,000,000.10 %", "-12,345.678"):
        assert figure in text
    assert "-1,234,500.00 %" in text and ("best -1,234,500.00 %" in text) == (columns > 40)
    assert (BARS[3] in text) == (columns >= 120)  # at 80 columns these numbers leave no room


@pytest.mark.parametrize(
    ("columns", "has_best", "has_sparklines"),
    [(30, False, False), (40, True, False), (79, True, False), (80, True, True)],
)
def test_columns_are_dropped_where_they_do_not_fit(start, columns, has_best, has_sparklines):
    display, output = start(columns)
    for update in range(1, 2 * POINTS):
        display.on_updates([make_metrics(update, entropy=100.0 / update)])
    display.on_evaluation(make_evaluation(0.02))
    text = "".join(read_screen(output))
    assert ("best +2.00 %" in text) == has_best and ("█" in text) == has_sparklines
    assert "+2.00 %" in read_row(output, "validation")


@pytest.mark.parametrize("columns", [1, 5, 12])
def test_absurdly_narrow_terminals_end_no_run(start, columns):
    display, output = start(columns)
    display.on_updates([make_metrics()])
    display.on_end("the end")
    assert "the end" in read_screen(output)


def test_a_low_terminal_shows_only_its_first_rows_until_the_end(start):
    display, output = start(lines=9)
    display.on_updates([make_metrics()])
    assert len([x for x in read_screen(output) if x[0] in "╭│╰"]) == 8
    display.on_end("end")
    assert read_row(output, "KL")


def test_a_terminal_without_unicode_gets_ascii(start):
    display, output = start(encoding="ascii")
    for update in range(1, 9):
        display.on_updates([make_metrics(update, entropy=9.0 - update)])
    display.on_message("größe")
    display.on_end("end")
    assert output.getvalue().isascii() and "gr??e" in read_screen(output)
    assert read_row(output, "entropy").endswith(" @#*+=-:.")
    assert "#" in read_screen(output)[4] and "--" in read_screen(output)[4]


def test_texts_from_outside_are_shown_literally(start):
    bad = "[red]x[/red]\x1b[2J"
    folder = pathlib.Path("runs") / f"{bad}\n\x9b:smile:\udc80"
    display, output = start(columns=120, run=RUN._replace(dataset=bad, folder=folder))
    display.on_stage(f"loading {bad}")
    display.on_message(f"{bad}\r\n")
    display.on_end(f"{bad}\a")
    screen = read_screen(output)
    assert screen[0] == r"training MLP 64-64 on [red]x[/red]\x1b[2J in 4,096 environments"
    assert screen[1] == r"on cpu, into runs/[red]x[/red]\x1b[2J\n\x9b:smile:\udc80"
    assert r"[red]x[/red]\x1b[2J\r\n" in screen and screen[-1] == r"[red]x[/red]\x1b[2J\x07"
    assert r"loading [red]x[/red]\x1b[2J" in output.getvalue()


def test_quick_updates_are_not_all_drawn(start, monkeypatch):
    monkeypatch.setattr(train.hooks.display, "FRAME_SECONDS", 1.0)
    display, output = start()
    for update in range(1, 41):
        display._clock.now = update / 8
        display.on_updates([make_metrics(update)])
    assert output.getvalue().count("╭") == 1 + 5 and "390,000 of" not in output.getvalue()
    display.on_end("end")
    assert "400,000 of" in read_screen(output)[4]


def test_errors_that_go_to_a_file_are_left_there(start, capsys):
    _, output = start()
    print("an error", file=sys.stderr)
    assert capsys.readouterr().err == "an error\n" and "an error" not in output.getvalue()


# Lines.


@pytest.mark.parametrize(
    ("settings", "interactive"), [({"terminal": False}, ""), ({"term": "dumb"}, ""), ({"term": "dumb"}, "1"), ({}, "0")]
)
def test_other_outputs_get_lines(start, monkeypatch, settings, interactive):
    monkeypatch.setenv("TTY_INTERACTIVE", interactive)
    monkeypatch.setenv("NO_COLOR", "1")
    display, output = start(columns=60, **settings)
    display.on_stage("compiling")
    for update in range(1, 26):
        display._clock.now = float(update)
        display.on_updates([make_metrics(update)])
    display.on_evaluation(make_evaluation(0.02))
    display.on_evaluation(make_evaluation(0.0123, best=False))
    display.on_message("warning: too hot")
    display.on_end("done\nreally")
    lines = output.getvalue().split("\n")
    assert "\x1b" not in output.getvalue()
    assert lines[:3] == ["training MLP 64-64 on btc-1h in 4,096 environments", "on cpu, into runs/one", "compiling"]
    assert [re.match(r" ?\d+ %", x).group() for x in lines[3:6]] == ["1 %", "11 %", "21 %"]  # 10 s apart
    assert lines[3] == (
        "1 %  10,000 of 1,000,000 steps  10,000 steps/s  0:00:01 spent  0:01:39 left  return +5.13 %  "
        "drawdown 10.00 %  trades 12.0  costs 0.40 %  entropy 1.500  KL 0.0040"
    )
    assert lines[6] == "warning: too hot"
    assert lines[7].startswith("25 %  250,000 of") and "validation +1.23 % (best +2.00 %)" in lines[7]
    assert lines[8:] == ["done", "really", ""]


def test_a_last_line_is_printed_once(start):
    display, output = start(terminal=False)
    display.on_updates([make_metrics(1)])
    display.on_end("done")
    display.__exit__(None, None, None)
    assert [x.split()[0] for x in output.getvalue().splitlines()[2:]] == ["1", "done"]


# A resumed run.


def test_a_resumed_run_goes_on_from_its_first_step(start):
    display, output = start(run=RUN._replace(first_update=50, first_step=500_000))
    screen = read_screen(output)
    assert screen[2] == "resumed after update 50, step 500,000"
    assert screen[4].endswith(" 50 % │") and "500,000 of 1,000,000 steps" in screen[5]
    assert "left" not in screen[5]  # this session has no speed yet
    display.on_updates([make_metrics(60, steps=600_000, steps_per_second=100_000.0)])
    assert "0:00:04 left" in read_screen(output)[5]


def test_the_table_is_resumed(start):
    first, before = start()
    for update in range(1, 101):
        first.on_updates([make_metrics(update, entropy=float(update))])
    first.on_evaluation(make_evaluation(0.02))
    state = json.loads(json.dumps(first.get_state()))
    rows = {name: read_row(before, name) for name in ("return", "validation", "entropy")}
    assert len(json.dumps(state)) < 7 * POINTS * 25
    second, after = start(state=state)
    assert {name: read_row(after, name) for name in rows} == rows
    for display in (first, second):
        display.on_updates([make_metrics(101, entropy=-500.0)])
        display.on_evaluation(make_evaluation(-0.5, best=False))
    assert second.get_state() == first.get_state()
    assert "best +2.00 %" in read_row(after, "validation")


def test_a_history_holds_the_whole_run_in_few_points():
    history = History()
    for n in range(1, 1001):
        history.add(float(n))
        points = history.get_points()
        assert min(n, POINTS // 2) <= len(points) <= POINTS and points == sorted(points)
    assert history.every == 64 and points[0] == 32.5 and points[-1] == (961 + 1000) / 2


def test_a_sparkline_spans_its_bars():
    assert draw_sparkline([0.0, 7.0, 3.0], "abcdefgh") == "ahd"
    assert draw_sparkline([2.0, 2.0], "abcdefgh") == "dd" and draw_sparkline([], "abcdefgh") == ""


def test_items_are_divided_only_if_they_must_be():
    assert pack(["12 of 34 steps", "5 steps/s"], 25) == ["12 of 34 steps  5 steps/s"]
    assert pack(["12 of 34 steps", "5 steps/s"], 24) == ["12 of 34 steps", "5 steps/s"]
    assert pack(["12 of 34 steps", "5 steps/s"], 9) == ["12 of 34", "steps", "5 steps/s"]


# Outputs that fail.

SESSION = """
import pathlib, sys, time
import train.hooks.display
from train.hooks import RunInfo
from train.hooks.display import Display
train.hooks.display.TICK_SECONDS = 0.02
train.hooks.display.LINE_SECONDS = 0.0
with Display() as display:
    display.on_start(RunInfo(pathlib.Path("runs/one"), "btc-1h", "MLP", "cpu", 8, 1000, 0, 0, 1.0))
    sys.stdin.readline()
    {fault}
    for update in range(1, 11):
        display.on_updates([{{"update": update, "steps": update * 100, "steps_per_second": 1.0, "entropy": 1.0}}])
        time.sleep(0.03)
    display.on_message("a message")
    display.on_end("the end")
print("printed after it")
sys.stdout.flush()
assert display.get_state()["values"] == {{"entropy": 1.0}}
print("all", "well", sep=" ", file=open(sys.argv[1], "w"))
"""


def run_session(tmp_path, stdout, fault: str = "pass", cut=None, prefix=()) -> None:
    """Play a session in a process of its own, and call `cut` once it has begun. It must end with status 0, silently."""
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS")}
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", SESSION.format(fault=fault), str(tmp_path / "proof")],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT), "TERM": "xterm"},
    )
    if cut:
        cut(process)
    process.stdin.write("\n")
    process.stdin.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, "")
    assert (tmp_path / "proof").read_text() == "all well\n"


def test_a_pipe_whose_reader_leaves_ends_no_run(tmp_path):
    def cut(process):
        assert process.stdout.readline() == "training MLP on btc-1h in 8 environments\n"
        process.stdout.close()

    run_session(tmp_path, subprocess.PIPE, cut=cut)


def test_a_terminal_that_goes_away_ends_no_run(tmp_path):
    """The drawing thread is then at work: its error stays silent too."""
    outer, inner = pty.openpty()

    def cut(process):
        os.close(inner)
        assert b"training MLP" in os.read(outer, 10_000)
        os.close(outer)

    run_session(tmp_path, inner, cut=cut)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_a_full_disk_ends_no_run(tmp_path):
    with open("/dev/full", "w") as full:
        run_session(tmp_path, full)


def test_no_output_at_all_ends_no_run(tmp_path):
    run_session(tmp_path, None, prefix=("sh", "-c", 'exec "$@" >&-', "sh"), fault="sys.stdout = open('/dev/null', 'w')")


def test_a_closed_output_ends_no_run(tmp_path):
    """The session prints after it, which would fail on the closed file."""
    run_session(tmp_path, subprocess.DEVNULL, fault="sys.stdout.close()")
