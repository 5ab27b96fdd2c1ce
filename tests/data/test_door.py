"""Files as users have them: one series in every venue's form, real files, several symbols, and damage."""

import csv
import gzip
import io
import json
import random
import re
import zipfile
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from perpjax import AutoReset, PerpEnv, VecEnv, load_market
from perpjax.data import __main__ as command
from perpjax.data import build
from perpjax.data.contract import DataError
from perpjax.data.files.door import open_files
from perpjax.data.files.mend import mend
from perpjax.data.files.read import read_files
from perpjax.data.files.recognise import recognise
from perpjax.data.files.records import Choices
from perpjax.data.instruments import read_contracts
from perpjax.data.synthetic import synthetic_tables

START, STEP, N = 1_704_067_200_000, 900_000, 40


def make_candles() -> list[tuple]:
    """Open time, open, high, low, close (texts), base volume: 40 candles with two decimals."""
    rng, close, rows = np.random.default_rng(1), 4_213_07, []
    for i in range(N):
        open_, close = close, close + int(rng.integers(-900, 900))
        high, low = max(open_, close) + int(rng.integers(0, 300)), min(open_, close) - int(rng.integers(0, 300))
        prices = (f"{x // 100}.{x % 100:02d}" for x in (open_, high, low, close))
        rows.append((START + i * STEP, *prices, f"{rng.integers(1, 9000) / 8:g}"))
    return rows


ROWS = make_candles()


def quote(row: tuple) -> str:
    return f"{float(row[4]) * float(row[5]):.4f}"


def text(rows: list, header: str = "", separator: str = ",") -> bytes:
    lines = [header] * bool(header) + [separator.join(map(str, row)) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def as_json(value) -> bytes:
    return json.dumps(value).encode()


def arrow(time: pa.Array, name: str, write=pa.parquet.write_table, kind: pa.DataType | None = None) -> bytes:
    columns = {
        p: pa.array([float(r[i]) for r in ROWS], kind or pa.float64())
        for i, p in enumerate(("open", "high", "low", "close"), 1)
    }
    sink = io.BytesIO()
    write(pa.table({name: time, **columns, "volume": [float(r[5]) for r in ROWS]}), sink)
    return sink.getvalue()


def stamps(unit: str, zone: str | None = "UTC") -> pa.Array:
    factor = {"s": 1e-3, "ms": 1, "us": 1e3, "ns": 1e6}[unit]
    return pa.array([int(r[0] * factor) for r in ROWS], pa.timestamp(unit, zone))


def iso(ms: int, form: str = "%Y-%m-%dT%H:%M:%SZ") -> str:
    import datetime

    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime(form)


def zipped(name: str, data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, data)
    return sink.getvalue()


BINANCE = [[*r, r[0] + STEP - 1, quote(r), 7, "1", "1", "0"] for r in ROWS]
HEADER = (
    "open_time,open,high,low,close,volume,close_time,quote_volume,count,taker_buy_volume,taker_buy_quote_volume,ignore"
)
COMMA = "open,high,low,close"
FORMS = {
    "BTCUSDT-15m-2024-01.csv": text(BINANCE, HEADER),
    "BTCUSDT-15m-headerless.csv": text(BINANCE),
    "BTCUSDT-15m-micro.csv": text([[r[0] * 1000, *r[1:6], r[6] * 1000 + 999, *r[7:]] for r in BINANCE], HEADER),
    "BTCUSDT-15m-mixed.csv": text([[r[0] * (1000 if i > 9 else 1), *r[1:6], r[6], *r[7:]] for i,
        r in enumerate(BINANCE)]),
    "BTCUSDT-15m-2024-02.zip": zipped("BTCUSDT-15m-2024-02.csv", text(BINANCE, HEADER)),
    "BTCUSDT-15m.csv.gz": gzip.compress(text(BINANCE, HEADER)),
    "binance_BTCUSDT_rest.json": as_json([[r[0], *map(str, r[1:6]), *r[6:]] for r in BINANCE]),
    "ccxt_BTCUSDT.json": as_json([[r[0], *map(float, r[1:])] for r in ROWS]),
    "BTC_USDT_USDT-15m-futures.json": as_json([[r[0], *map(float, r[1:])] for r in ROWS]),
    "BTC_USDT_USDT-15m-futures.json.gz": gzip.compress(as_json([[r[0], *map(float, r[1:])] for r in ROWS])),
    "bybit_v5.json": as_json(
        {"retCode": 0, "retMsg": "OK", "result": {"category": "linear", "symbol": "BTCUSDT",
         "list": [[str(r[0]), *r[1:], quote(r)] for r in reversed(ROWS)]}}
    ),
    "okx_BTC-USDT-SWAP.json": as_json(
        {"code": "0", "msg": "", "data": [[str(r[0]), *r[1:5], str(float(r[5]) * 100), r[5], quote(r),
            "1"] for r in reversed(ROWS)]}
    ),
    "bitget_BTCUSDT.json": as_json({"code": "00000", "data": [[str(r[0]), *r[1:], quote(r)] for r in ROWS]}),
    "gateio_BTC_USDT.json": as_json([[str(r[0] // 1000), quote(r), r[4], r[2], r[3], r[1], r[5],
        "true"] for r in ROWS]),
    "hyperliquid_BTCUSDT.json": as_json(
        [{"t": r[0], "T": r[0] + STEP - 1, "s": "BTCUSDT", "i": "15m", "o": r[1], "h": r[2], "l": r[3], "c": r[4],
            "v": r[5], "n": 3} for r in ROWS]
    ),
    "deribit_BTCUSDT.json": as_json(
        {"jsonrpc": "2.0", "result": {"status": "ok", "ticks": [r[0] for r in ROWS],
         **{p: [float(r[i]) for r in ROWS] for i, p in enumerate(("open", "high", "low", "close", "volume"), 1)}}}
    ),
    "krakenfutures_BTCUSDT.json": as_json(
        {"candles": [{"time": r[0], **dict(zip(("open", "high", "low", "close", "volume"), r[1:],
            strict=True))} for r in ROWS], "more_candles": False}
    ),
    "BTCUSDT.jsonl": b"\n".join(as_json(dict(zip(("ts", "o", "h", "l", "c", "v"), r, strict=True))) for r in ROWS),
    "BTCUSDT seconds.csv": text([[r[0] // 1000, *r[1:]] for r in ROWS], f"Unix,{COMMA},Volume"),
    "BTCUSDT float seconds.csv": text([[f"{r[0] // 1000}.0", *r[1:]] for r in ROWS], f"ts,{COMMA},vol"),
    "BTCUSDT nanoseconds.csv": text([[r[0] * 10**6, *r[1:]] for r in ROWS], f"Timestamp,{COMMA.title()},Volume"),
    "BTCUSDT iso.csv": text([[iso(r[0]), *r[1:]] for r in ROWS], f"datetime,{COMMA},volume"),
    "BTCUSDT offset.csv": text([[iso(r[0] - 4 * 3_600_000, "%Y-%m-%d %H:%M:%S-04:00"), *r[1:]] for r in ROWS],
        f"date,{COMMA},volume"),
    "BTCUSDT excel.csv": b"\xef\xbb\xbf" + text(
        [[iso(r[0], "%d.%m.%Y %H:%M") + " Z", *(str(x).replace(".", ",") for x in r[1:])] for r in ROWS],
        "Zeit;Eröffnung;Hoch;Tief;Schluss;Volumen", ";",
    ),
    "BTCUSDT tabs.txt": text(ROWS, f"t\t{COMMA}\tvolume".replace(",", "\t"), "\t"),
    "cdd.csv": b"https://www.CryptoDataDownload.com\n" + text(
        [[r[0], iso(r[0], "%Y-%m-%d %H:%M:%S"), "BTCUSDT", *r[1:], quote(r)] for r in reversed(ROWS)],
        "Unix,Date,Symbol,Open,High,Low,Close,Volume BTC,Volume USDT",
    ),
    "BTCUSDT shuffled.csv": text(random.Random(3).sample(ROWS, N), f"open_time_ms,{COMMA},volume"),
    "BTCUSDT twice.csv": text([*ROWS[:9], *ROWS[5:]], f"open_time_ms,{COMMA},volume"),
    "BTCUSDT utf16.csv": text(ROWS, f"open_time_ms,{COMMA},volume").decode().encode("utf-16"),
    "BTCUSDT crlf.csv": text(ROWS, f"open_time_ms,{COMMA},volume").replace(b"\n", b"\r\n"),
    "BTCUSDT seconds.parquet": arrow(stamps("s"), "date"),
    "BTCUSDT polars.parquet": arrow(stamps("us"), "timestamp"),
    "BTCUSDT naive.parquet": arrow(stamps("ns", None), "index"),
    "BTCUSDT berlin.parquet": arrow(stamps("ms", "Europe/Berlin"), "datetime"),
    "BTCUSDT float32.parquet": arrow(stamps("ms"), "date", kind=pa.float32()),
    "BTCUSDT.feather": arrow(stamps("ns"), "date", pa.feather.write_feather),
    "BTCUSDT ints.parquet": arrow(pa.array([r[0] for r in ROWS]), "open_time_ms"),
    "wrong_suffix_BTCUSDT.csv": arrow(stamps("ms"), "date"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS, ids=lambda name: name.replace(" ", "_"))
def test_every_form_is_the_same_series(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    (raw,) = read_files([path])
    one = recognise(raw)
    mended = mend([one], Choices())
    assert (one.kind, one.symbol) == ("candles", "BTCUSDT")
    columns = zip(*ROWS, strict=True)
    for column, wanted in zip(mended.table.columns, columns, strict=True):
        np.testing.assert_array_equal(column.to_numpy(), np.array([float(x) for x in wanted]))


RATES = [(START + i * 28_800_000, f"{(-1) ** i * (i + 1)}e-5") for i in range(12)]
FUNDING = {
    "BTCUSDT-fundingRate-2024-01.csv": text([[t + 6, 8, r] for t, r in RATES],
        "calc_time,funding_interval_hours,last_funding_rate"),
    "binance_funding.json": as_json([{"symbol": "BTCUSDT", "fundingTime": t, "fundingRate": r,
        "markPrice": "1"} for t, r in RATES]),
    "bybit_funding.json": as_json(
        {"retCode": 0, "result": {"category": "linear", "list": [{"symbol": "BTCUSDT", "fundingRate": r,
            "fundingRateTimestamp": str(t)} for t, r in reversed(RATES)]}}
    ),
    "okx_funding.json": as_json(
        {"code": "0", "data": [{"instId": "BTC-USDT-SWAP", "fundingRate": "0.5", "realizedRate": r,
            "fundingTime": str(t)} for t, r in RATES]}
    ),
    "gateio_BTC_USDT_funding.json": as_json([{"t": t // 1000, "r": r} for t, r in RATES]),
    "BTC_USDT_USDT-8h-funding_rate.json": as_json([[t, float(r), 0, 0, 0, 0] for t, r in RATES]),
    "kraken_BTCUSDT_funding.json": as_json({"rates": [{"timestamp": iso(t), "fundingRate": 3.1,
        "relativeFundingRate": float(r)} for t, r in RATES]}),
    "BTCUSDT funding percent.csv": text([[iso(t), f"{float(r) * 100:.4f}%"] for t, r in RATES], "Time,Funding Rate"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNDING, ids=lambda name: name.replace(" ", "_"))
def test_every_form_is_the_same_funding(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FUNDING[name])
    one = recognise(read_files([path])[0])
    table = mend([one], Choices()).table
    assert (one.kind, one.symbol) == ("funding", "BTCUSDT")
    opens = table["time_ms"].to_numpy() // 1000 * 1000
    np.testing.assert_array_equal(opens, [t for t, _ in RATES])
    np.testing.assert_array_equal(table["funding_rate"].to_numpy(), [float(r) for _, r in RATES])


REFUSED = {
    "naive.csv": (text([[iso(r[0], "%Y-%m-%d %H:%M:%S"), *r[1:]] for r in ROWS], f"date,{COMMA},volume"),
        "--timezone"),
    "day_or_month.csv": (text([[iso(r[0], "%m/%d/%Y %H:%M:%SZ"), *r[1:]] for r in ROWS], f"date,{COMMA},volume"),
        "order of day and month"),
    "BTC-USD-SWAP.csv": (text(ROWS, f"ts,{COMMA},volume"), "inverse contract"),
    "contracts.csv": (text(ROWS, f"ts,{COMMA},volume_contracts"), "--contract-size"),
    "BTCUSDT-premiumIndexKlines-15m.csv": (text(BINANCE, HEADER), "premium price"),
    "words.csv": (text([[r[0], *r[1:5], "many"] for r in ROWS], f"ts,{COMMA},volume"),
        "row 0: volume = 'many' is not a number"),
    "hole.csv": (text([*ROWS[:3], (*ROWS[3][:4], "", "1"), *ROWS[4:]], f"ts,{COMMA},volume"),
        "row 3: close is empty"),
    "other_names.csv": (text(ROWS, "when,a,b,c,d,e"), "no column of times among when, a, b"),
    "cut.csv": (text(BINANCE, HEADER)[:-40], "fields, and the first has 12"),
    "page.zip": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>",
        "error page of the server (NoSuchKey)"),
    "lfs.feather": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "data.pkl": (b"\x80\x04\x95" + bytes(40), "is never opened"),
    "data.h5": (b"\x89HDF\r\n\x1a\n" + bytes(40), "read_hdf"),
    "error.json": (as_json({"code": -1121, "msg": "Invalid symbol."}), "Invalid symbol."),
    "empty.csv": (b"", "is empty"),
    "noise.bin": (bytes(range(256)) * 4, "no known format"),
    "prose.txt": (b"just a line of words\nand another\n", "no separator"),
    "short.parquet": (FORMS["BTCUSDT ints.parquet"][:200], "damaged or cut short"),
    "ansi\x1b[2J.csv": (text([["\x1b[31mx", *r[1:]] for r in ROWS], f"ts,{COMMA},volume"), r"\x1b[31mx"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED, ids=ascii)
def test_a_guess_or_a_fault_is_refused(tmp_path, name):
    path = tmp_path / name
    data, words = REFUSED[name]
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        mend([recognise(raw) for raw in read_files([path])], Choices())
    assert words in str(caught.value) and str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


def test_options_settle_what_was_refused(tmp_path):
    naive = tmp_path / "BTCUSDT.csv"
    naive.write_bytes(
        text([[iso(r[0] + 3_600_000, "%Y-%m-%d %H:%M"), *r[1:]] for r in ROWS], f"when,{COMMA},contracts")
    )
    choices = Choices(
        columns="time=when,open=open,high=high,low=low,close=close,contracts=contracts", timezone="Europe/Berlin",
        contract_size=0.5,
    )  # fmt: skip
    table = mend([recognise(read_files([naive])[0], choices)], choices).table
    np.testing.assert_array_equal(table["open_time_ms"].to_numpy(), [r[0] for r in ROWS])
    np.testing.assert_array_equal(table["volume"].to_numpy(), [float(r[5]) / 2 for r in ROWS])
    for stamp, why in (("2024-03-31 02:30", "does not exist"), ("2024-10-27 02:30", "occurs twice")):
        naive.write_bytes(text([[stamp, *r[1:]] for r in ROWS[:1]], f"when,{COMMA},contracts"))
        with pytest.raises(DataError, match=why):
            recognise(read_files([naive])[0], choices)


def test_error_pages_are_counted(tmp_path):
    for i in range(3):
        (tmp_path / f"BTCUSDT-15m-{i}.zip").write_bytes(REFUSED["page.zip"][0])
    (tmp_path / "BTCUSDT-15m-9.csv").write_bytes(FORMS["BTCUSDT-15m-headerless.csv"])
    with pytest.raises(DataError, match=r"15m-0.zip: is an error page .*\(3 of 4 files are such pages: remove them\)"):
        read_files([tmp_path])


def test_missing_files_are_told_first(tmp_path):
    for path, words in (
        (tmp_path / "no.csv", "no such file"),
        (tmp_path, "no file of data"),
        (tmp_path / "*.csv", "no such"),
    ):
        with pytest.raises(DataError, match=words):
            read_files([path])


# Real files.


def read_csv(path: Path, time: str, volume: str, skip: int = 0) -> tuple[int, float, float, float]:
    """Rows, first and last stamp, and the sum of the volume, with the standard library."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()[skip:]
    rows = list(csv.DictReader(lines))
    return len(rows), float(rows[0][time]), float(rows[-1][time]), sum(float(row[volume]) for row in rows)


def test_real_files_are_read_as_they_come(shared_data):
    formats = shared_data / "formats"
    for name, time, volume, scale in (
        ("F03_ALGOUSDT-1m-2025-02.csv", "open_time", "volume", 1),
        ("F17a_XRP-USDT-SWAP_1m.csv", "timestamp_ms", "volume_base", 1),
    ):
        count, first, last, total = read_csv(formats / name, time, volume)
        table = mend([recognise(read_files([formats / name])[0])], Choices()).table
        found = table["open_time_ms"].to_numpy()
        assert (len(found), found[0], found[-1]) == (count, first * scale, last * scale)
        assert table["volume"].to_numpy().sum() == pytest.approx(total, rel=1e-12)
    items = json.loads((formats / "F28_BTCUSDT_15m.json").read_text())
    table = mend([recognise(read_files([formats / "F28_BTCUSDT_15m.json"])[0])], Choices()).table
    assert table["close"].to_pylist() == [float(item[4]) for item in items]


def test_the_page_of_files_is_current(shared_data):
    """docs/data.md holds the table that the command makes."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    lines = command.describe([p for p in sorted((shared_data / "formats").iterdir()) if p.name != "PROVENANCE.md"])
    assert "\n".join(lines) in page


def test_good_markets_are_opened_without_a_word_of_doubt(shared_data):
    """The candles are those of the files, bit by bit, and so the heuristics have no false alarm on them."""
    paths = [p for p in sorted(shared_data.glob("binance-*.parquet")) if not re.search("_mark_|_funding_", p.name)]
    assert len(paths) >= 8
    for path in paths:
        beside = []
        if "BTCUSDT_perp_5m" in path.name or "ORCAUSDT" in path.name:
            symbol = path.name.split("_")[1]
            beside = [p for kind in ("mark", "funding") for p in shared_data.glob(f"binance-um_{symbol}_{kind}_*")]
        (one,) = open_files([path, *beside])
        assert one.candles.equals(pa.parquet.read_table(path).select(one.candles.column_names)), path.name
        assert len(one.moves) == 10 and (one.mark is not None) == bool(beside)


# Datasets.


def write_symbol(folder: Path, symbol: str, seed: int, bars: int, first: int = 0) -> None:
    tables = synthetic_tables("signal", seed=seed, bars=bars)
    rows = tables.candles.slice(first * 5)
    pa.parquet.write_table(rows, folder / f"{symbol}_perp_3m.parquet")
    pa.parquet.write_table(tables.funding, folder / f"{symbol}_funding.parquet")


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Two coins in one dataset; the second was listed later."""
    folder = tmp_path_factory.mktemp("many")
    write_symbol(folder, "AAAUSDT", 1, 3200)
    write_symbol(folder, "BBBUSDT", 2, 3200, first=1500)
    out = folder / "out"
    assert build.main([str(folder), "--out", str(out), "--episode-length", "48"]) == 0
    return out


def test_several_symbols_build_one_dataset(many, capsys):
    manifest = json.loads((many / "manifest.json").read_text())
    assert list(manifest["symbols"]) == ["AAAUSDT", "BBBUSDT"]
    parts = {symbol: json.loads((many / symbol / "manifest.json").read_text()) for symbol in manifest["symbols"]}
    for split in ("train", "val", "test"):
        ends = {symbol: part["splits"][split] for symbol, part in parts.items()}
        if split != "train":  # the second coin has no bar before its own warm-up
            assert ends["AAAUSDT"]["from"] == ends["BBBUSDT"]["from"]
    assert parts["AAAUSDT"]["scaler"] == parts["BBBUSDT"]["scaler"]
    train, val = (load_market(many, split=split) for split in ("train", "val"))
    assert val.symbols == ("AAAUSDT", "BBBUSDT")
    alone = load_market(many / "AAAUSDT", split="val")
    np.testing.assert_array_equal(np.asarray(val.rows)[: len(alone.rows)], np.asarray(alone.rows))
    np.testing.assert_array_equal(val.scaler_mean, train.scaler_mean)
    env = VecEnv(
        AutoReset(
            PerpEnv(val, config=PerpEnv.__dataclass_fields__["config"].default_factory().__class__(episode_length=48))
        )
    )
    state = env.reset(jax.random.split(jax.random.key(0), 64))
    assert {int(i) for i in state.instrument} == {0, 1}


def test_a_changed_symbol_is_refused(many, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(many, copy)
    shutil.rmtree(copy / "BBBUSDT")
    shutil.copytree(copy / "AAAUSDT", copy / "BBBUSDT")
    with pytest.raises(DataError, match="is not the folder that was written"):
        load_market(copy)


def test_too_few_days_are_told_with_an_episode_that_fits(tmp_path, capsys):
    write_symbol(tmp_path, "AAAUSDT", 1, 2700)
    assert build.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "28.1 days given; 101 are needed" in said and "--episode-length 151 builds from 28" in said
    assert build.main([str(tmp_path), "--episode-length", "151"]) == 0
    capsys.readouterr()
    assert build.main([str(tmp_path), "--episode-length", "153"]) == 2


def test_no_episode_starts_in_a_hole_or_spans_one(tmp_path, capsys):
    write_symbol(tmp_path, "AAAUSDT", 1, 3200)
    path = tmp_path / "AAAUSDT_perp_3m.parquet"
    table = pa.parquet.read_table(path)
    pa.parquet.write_table(pa.concat_tables([table.slice(0, 5 * 1200), table.slice(5 * 1400)]), path)
    args = [str(tmp_path), "--episode-length", "48", "--out", str(tmp_path / "out")]
    assert build.main(args) == 2 and "--allow-gaps" in capsys.readouterr().err
    assert build.main([*args, "--allow-gaps"]) == 0
    market = load_market(tmp_path / "out")
    assert market.segments.first.tolist() == [673, 1400] and market.segments.last.tolist() == [1199, 3199]


def test_one_table_is_imported(tmp_path, capsys):
    path, out = tmp_path / "bybit_v5.json", tmp_path / "out.parquet"
    path.write_bytes(FORMS["bybit_v5.json"])
    assert command.main(["import", str(path), "--out", str(out)]) == 0
    assert pa.parquet.read_table(out)["close"].to_pylist() == [float(r[4]) for r in ROWS]
    assert "BTCUSDT candles: 40 rows" in capsys.readouterr().out
    assert command.main(["import", str(path), "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


# Contracts.


def test_contracts_of_a_venue(tmp_path):
    info = {"symbols": [{"symbol": "AAAUSDT", "contractType": "PERPETUAL", "filters": [
        {"filterType": "PRICE_FILTER", "tickSize": "0.0010"}, {"filterType": "LOT_SIZE", "stepSize": "0.1",
            "maxQty": "9"},
        {"filterType": "MARKET_LOT_SIZE", "stepSize": "1", "maxQty": "5000"}, {"filterType": "MIN_NOTIONAL",
            "notional": "7"},
    ]}]}  # fmt: skip
    brackets = [{"symbol": "AAAUSDT", "brackets": [
        {"bracket": 2, "initialLeverage": 10, "notionalCap": 9000, "notionalFloor": 1000, "maintMarginRatio": 0.05,
            "cum": 30.0},
        {"bracket": 1, "initialLeverage": 25, "notionalCap": 1000, "notionalFloor": 0, "maintMarginRatio": 0.02,
            "cum": 0.0},
    ]}]  # fmt: skip
    ccxt = {"BBB/USDT:USDT": {"symbol": "BBB/USDT:USDT", "base": "BBB", "quote": "USDT", "swap": True, "linear": True,
            "contractSize": 10, "precision": {"price": 0.01, "amount": 1}, "limits": {"cost": {"min": 5},
                "amount": {"max": 100}}}}  # fmt: skip
    paths = []
    for name, value in (("info", info), ("brackets", brackets), ("ccxt", ccxt)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(value))
    found = read_contracts(paths)
    a = found["AAAUSDT"]
    assert (a.tick_size, a.step_size, a.min_notional, a.max_quantity) == (0.001, 0.1, 7.0, 5000.0)
    assert a.brackets == ((0, 1000, 25, 0.02, 0), (1000, 9000, 10, 0.05, 30))
    assert found["BBBUSDT"] == (0.01, 10.0, 5.0, 1000.0, None)
    write_symbol(tmp_path, "AAAUSDT", 1, 2700)
    files = [str(p) for p in sorted(tmp_path.glob("*.parquet"))]
    args = ["--episode-length", "48", "--tick-size", "0.1", "--out", str(tmp_path / "out")]
    assert build.main([*files, *args, "--instruments", *map(str, paths)]) == 0
    instrument = json.loads((tmp_path / "out" / "manifest.json").read_text())["instrument"]
    assert (instrument["tick_size"], instrument["min_notional"], len(instrument["brackets"])) == (0.1, 7.0, 2)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="names no contract"):
        read_contracts([tmp_path / "bad.json"])


# Damage.


def damage(data: bytes, rng: random.Random) -> bytes:
    kind, at = rng.randrange(4), rng.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9))) + data[at:]
    return data[:at] + data[at + rng.randrange(1, 200) :]


def damage_files(folder: Path, times: int) -> int:
    refused, rng = 0, random.Random(0)
    for name, data in {**FORMS, **FUNDING}.items():
        for _ in range(times):
            path = folder / name
            path.write_bytes(damage(data, rng))
            try:
                mend([recognise(raw) for raw in read_files([path])], Choices())
            except DataError as error:
                refused += 1
                assert str(error).isprintable() and name.split()[0].split(".")[0][:5] in str(error)
    return refused


def test_damaged_files_give_data_errors(tmp_path):
    assert damage_files(tmp_path, 8) > 100


@pytest.mark.slow
def test_many_damaged_files_give_data_errors(tmp_path):
    assert damage_files(tmp_path, 2000) > 10_000
