"""The ledger of looks: what is kept when writers meet, lines are damaged and folders cannot be written."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from perpjax import load_market
from perpjax.data import dataset, ledger
from perpjax.data.builder import build
from perpjax.data.dataset import find_spans, find_venues, load_dataset, open_sealed, split_by_fraction, write_dataset
from perpjax.data.ledger import Ledger, data_folder, market_spans, shared_part, spans_match
from perpjax.data.many import fit_symbols, split_symbols, write_symbols
from perpjax.data.synthetic import synthetic_tables

SPAN = {"venue": "binance", "symbol": "BTCUSDT", "first": 0, "last": 100}
ENTRY = {"kind": "opened", "spans": [SPAN]}
ROOT = pathlib.Path(ledger.__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Ledger:
    """An empty ledger of the user, in a process that has opened nothing."""
    monkeypatch.setenv("PERPJAX_DATA", str(tmp_path / "home"))
    monkeypatch.setattr(ledger, "_opened", set())
    return Ledger()


# The file.


def test_entries_come_back_in_order(home):
    assert home.entries() == []
    for i in range(3):
        entry = home.append(ENTRY | {"number": np.int64(i), "values": (np.float32(0.5), np.nan), "path": home.path})
    found = home.entries()
    assert [x["number"] for x in found] == [0, 1, 2]
    assert found[2] == entry and entry["values"] == [0.5, None] and entry["path"] == str(home.path)
    assert len({x["id"] for x in found}) == 3
    assert oct(home.path.parent.stat().st_mode)[-3:] == "700" or os.name == "nt"


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"kind": "opened"},
        ENTRY | {"spans": [{}]},
        ENTRY | {"x": object()},
        ENTRY | {"spans": [SPAN | {"first": 0.5}]},
    ],
)
def test_what_is_no_entry_is_refused(home, entry):
    with pytest.raises(ValueError, match="not an entry"):
        home.append(entry)
    assert not home.path.exists()


WRITER = """
import sys
from perpjax.data import ledger
ledger.fcntl = ledger.fcntl if sys.argv[3] == "fcntl" else None
book = ledger.Ledger(sys.argv[1])
span = {"venue": "", "symbol": "X", "first": 0, "last": 1}
for i in range(500):
    book.append({"kind": "opened", "writer": sys.argv[2], "number": i, "text": "x" * 9000, "spans": [span]})
"""


@pytest.mark.parametrize("how", ["fcntl", "without"])
def test_two_writers_lose_nothing(tmp_path, how):
    path = tmp_path / "ledger.jsonl"
    command = [sys.executable, "-W", "error", "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name, how], cwd=ROOT) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    found = Ledger(path).entries()
    for name in "ab":
        assert [x["number"] for x in found if x["writer"] == name] == list(range(500))
    assert [x.name for x in tmp_path.iterdir()] == ["ledger.jsonl"]


def test_a_cut_line_does_not_spoil_the_next(home):
    home.append(ENTRY | {"number": 0})
    with open(home.path, "ab") as file:
        file.write(b'{"kind": "opened", "spa')
    home.append(ENTRY | {"number": 1})
    with pytest.warns(UserWarning, match=r"ledger\.jsonl:2: a damaged line of the ledger, skipped"):
        assert [x["number"] for x in home.entries()] == [0, 1]


@pytest.mark.parametrize(
    "line", [b"nonsense", b"\xff\xfe", b"[]", b"3", b'{"kind": 3, "spans": []}', b'{"kind": "opened"}', b"[" * 9999,
             b'{"kind": "opened", "spans": [{"venue": "", "symbol": "X"}]}']
)  # fmt: skip
def test_a_damaged_line_loses_no_other(home, line):
    home.append(ENTRY | {"number": 0})
    with open(home.path, "ab") as file:
        file.write(line + b"\n\n")
    home.append(ENTRY | {"number": 1})
    with pytest.warns(UserWarning, match=r":2: a damaged line"):
        assert [x["number"] for x in home.entries()] == [0, 1]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    book = Ledger(tmp_path / "file" / "ledger.jsonl")
    with pytest.warns(UserWarning, match="the ledger cannot be written") as caught:
        book.append(ENTRY)
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="an administrator may write anywhere")
def test_a_read_only_folder_is_a_warning(home):
    home.append(ENTRY)
    home.path.chmod(0o400)
    home.path.parent.chmod(0o500)
    with pytest.warns(UserWarning, match="the ledger cannot be written"):
        home.append(ENTRY)
    assert len(home.entries()) == 1


def test_a_full_disk_leaves_no_part_of_a_line(home, monkeypatch):
    home.append(ENTRY)
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:10]))
    with pytest.warns(UserWarning, match="the disk is full"):
        home.append(ENTRY)
    monkeypatch.undo()
    assert len(home.entries()) == 1 and home.path.read_bytes().endswith(b"\n")


def test_a_ledger_that_cannot_be_read_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="the ledger cannot be read"):
        assert Ledger(tmp_path).entries() == []


def test_a_symlinked_ledger_stays_a_link(tmp_path):
    link, target = tmp_path / "ledger.jsonl", tmp_path / "elsewhere.jsonl"
    link.symlink_to(target)
    Ledger(link).append(ENTRY)
    Ledger(link).append(ENTRY)
    assert link.is_symlink() and len(Ledger(target).entries()) == 2


@pytest.mark.skipif(ledger.fcntl is None, reason="no fcntl")
def test_a_writer_waits_for_the_lock_and_not_for_ever(home, monkeypatch):
    home.append(ENTRY)
    other = os.open(home.path, os.O_RDWR)
    ledger.fcntl.flock(other, ledger.fcntl.LOCK_EX)
    threading.Timer(0.3, lambda: ledger.fcntl.flock(other, ledger.fcntl.LOCK_UN)).start()
    began = time.monotonic()
    home.append(ENTRY)
    assert time.monotonic() - began > 0.25
    ledger.fcntl.flock(other, ledger.fcntl.LOCK_EX)
    monkeypatch.setattr(ledger, "_PATIENCE_S", 0.1)
    home.append(ENTRY)
    assert len(home.entries()) == 3
    os.close(other)


def test_a_lock_left_behind_is_passed_over(home, monkeypatch):
    monkeypatch.setattr(ledger, "fcntl", None)
    monkeypatch.setattr(ledger, "_PATIENCE_S", 0.1)
    home.append(ENTRY)
    lock = home.path.with_name("ledger.jsonl.lock")
    lock.touch()
    home.append(ENTRY)
    assert len(home.entries()) == 2 and not lock.exists()


def test_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PERPJAX_DATA", "~/diary")
    assert data_folder() == pathlib.Path.home() / "diary"
    monkeypatch.setenv("PERPJAX_DATA", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert data_folder() == tmp_path / "xdg" / "perpjax"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert data_folder() == tmp_path / ".local/share/perpjax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_folder() == tmp_path / "Library/Application Support/perpjax"


def test_without_a_home_there_is_a_warning(monkeypatch):
    def fail():
        raise RuntimeError("no home")

    monkeypatch.setattr(ledger, "data_folder", fail)
    with pytest.warns(UserWarning, match="set PERPJAX_DATA"):
        Ledger().append(ENTRY)
    assert Ledger().entries() == []


# The same data.


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, 1.0),
        ({"first": 50, "last": 150}, 0.5),
        ({"first": 60, "last": 70}, 1.0),
        ({"first": 90, "last": 290}, 0.1),
        ({"first": 100, "last": 200}, 0.0),
        ({"first": 50, "last": 50}, 0.0),
        ({"symbol": "ETHUSDT"}, 0.0),
        ({"venue": "bybit"}, 0.0),
        ({"venue": ""}, 1.0),
    ],
)
def test_the_part_that_two_spans_share(changes, part):
    assert shared_part(SPAN, SPAN | changes) == shared_part(SPAN | changes, SPAN) == part
    assert spans_match([SPAN], [SPAN | changes]) == (part >= 0.5)


def test_an_unknown_venue_is_not_the_synthetic_one():
    assert shared_part(SPAN | {"venue": ""}, SPAN | {"venue": "synthetic"}) == 0
    assert not spans_match([], [SPAN])


# Which loading is entered.


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """A dataset of one symbol with a venue, and one of two symbols without and with one."""
    out, builts = tmp_path_factory.mktemp("datasets"), {}
    for seed, symbol in enumerate(("AAA", "BBB")):
        tables = synthetic_tables("martingale", seed=seed, bars=3000)
        numbers = {"tick_size": 0.1, "step_size": 0.001, "min_notional": 5.0, "max_quantity": 100.0}
        builts[symbol] = build(tables.candles, None, tables.funding, symbol=symbol, **numbers)
    splits = split_by_fraction(builts["AAA"].market, episode_length=96)
    scaler = dataset.fit_on_train(builts["AAA"].market, splits)
    write_dataset(builts["AAA"], splits, scaler, out / "one", episode_length=96, extra={"venue": "binance"})
    markets = {symbol: built.market for symbol, built in builts.items()}
    parts = split_symbols(markets, "2024-01-20", "2024-01-26", 96)
    extra = {"BBB": {"venue": "bybit"}}
    write_symbols(builts, parts, fit_symbols(markets, parts), out / "two", episode_length=96, extra=extra)
    return out / "one", out / "two"


def test_the_test_split_is_entered_once_a_process(home, folders):
    one, _ = folders
    for split in ("train", "val", None):
        load_market(one, split)
    assert not home.path.exists()
    market = load_market(one, "test")
    load_market(str(one), "test")
    (entry,) = home.entries()
    assert (entry["kind"], entry["split"], entry["source"]) == ("opened", "test", str(one))
    split = load_dataset(one).splits[2]
    whole = load_market(one)
    span = {"first": whole.open_time_ms(split.start), "last": whole.open_time_ms(split.stop)}
    assert entry["spans"] == find_spans(one, market) == [{"venue": "binance", "symbol": "AAA"} | span]


def test_the_evaluation_enters_nothing_by_loading(home, folders):
    with open_sealed():
        load_market(folders[0], "test")
    assert not home.path.exists()
    load_market(folders[0], "test")
    assert len(home.entries()) == 1


def test_every_symbol_has_its_span(home, folders):
    market = load_market(folders[1], "test")
    (entry,) = home.entries()
    assert [(x["venue"], x["symbol"]) for x in entry["spans"]] == [("", "AAA"), ("bybit", "BBB")]
    assert find_venues(folders[1]) == {"AAA": "", "BBB": "bybit"}
    alone = load_market(folders[1] / "BBB", "test")
    assert find_spans(folders[1] / "BBB", alone) == entry["spans"][1:]
    assert [{**x, "venue": ""} for x in entry["spans"]] == market_spans(market)


def test_synthetic_markets_are_told_by_their_names(home):
    names = ("martingale?bars=14000&seed=3", "martingale?seed=3&bars=14000", "martingale?seed=4&bars=14000")
    for name in names:
        load_market(f"synthetic:{name}", "test")
    found = [entry["spans"][0] for entry in home.entries()]
    assert [(x["venue"], x["symbol"]) for x in found] == [
        ("synthetic", "martingale?bars=14000&seed=3"),
        ("synthetic", "martingale?bars=14000&seed=4"),
    ]
    assert find_venues("synthetic:signal") == {}
    market = load_market("synthetic:martingale?bars=14000&seed=3", "val")
    assert find_spans("synthetic:martingale?seed=3&bars=14000&jump_size=2e-2", market)[0]["symbol"] == (
        "martingale?bars=14000&jump_size=0.02&seed=3"
    )


def test_a_ledger_that_fails_does_not_stop_the_loading(tmp_path, monkeypatch, folders):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERPJAX_DATA", str(tmp_path / "file"))
    monkeypatch.setattr(ledger, "_opened", set())
    with pytest.warns(UserWarning, match="the ledger cannot be written"):
        assert load_market(folders[0], "test").num_bars
    assert load_market(folders[0], "test").num_bars  # one warning a process


def test_nothing_is_entered_while_a_function_is_traced(home, folders):
    def traced(x):
        with contextlib.suppress(jax.errors.TracerArrayConversionError):  # a market is made of numbers on the host
            load_market(folders[0], "test")
        return x

    jax.jit(traced)(1.0)
    assert not home.path.exists()


def test_the_ledger_imports_no_jax():
    look = "print([x in sys.modules for x in ('jax', 'numpy')])"
    code = f"import sys, runpy; runpy.run_path({str(ledger.__file__)!r}); {look}"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[False, False]"


def test_a_line_is_plain_json(home):
    home.append(ENTRY | {"text": "ä\nb"})
    (line,) = home.path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["text"] == "ä\nb"
