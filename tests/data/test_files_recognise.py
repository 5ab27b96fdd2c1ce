"""Columns, units, kinds and symbols of files, each against numbers worked out beside it."""

import csv
import datetime
import decimal
import io
import json
import zipfile
import zoneinfo

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from perpjax.data.contract import DataError
from perpjax.data.files.names import normalise_symbol, read_path
from perpjax.data.files.numbers import mend_float32, read_numbers
from perpjax.data.files.read import read_files
from perpjax.data.files.recognise import recognise
from perpjax.data.files.records import CLOSED, QUOTE_VOLUME, Choices, RawTable
from perpjax.data.files.times import read_stamps

START, STEP = 1_704_067_200_000, 900_000
# Open time, open, high, low, close, base volume, volume in contracts of 0.01, quote volume.
ROWS = [
    (START + i * STEP, str(100 + i), f"{102 + i}.5", f"{99 + i}.25", str(101 + i), f"{i + 1}.5", f"{100 * i + 150}",
     f"{(i + 1.5) * (101 + i)}")
    for i in range(12)
]  # fmt: skip
PRICES = "open,high,low,close"
RATES = [(START + i * 28_800_000, f"{i + 1}e-5") for i in range(4)]


def text(rows, header=None, separator=","):
    rows = [[str(x) for x in row] for row in rows]
    names = header.split(",") if header is not None else [str(i) for i in range(len(rows[0]))]
    table = pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=names)
    return table, header is not None, {"separator": separator}


def make(rows, header=None, separator=",", **hints):
    table, has_header, more = text(rows, header, separator)
    return RawTable("f.csv", table, has_header, more | hints, ())


def make_arrow(time, name="date", kind=None, **more):
    columns = {p: [float(r[i]) for r in ROWS] for i, p in enumerate((*PRICES.split(","), "volume"), 1)}
    table = pa.table(more | {name: time} | {p: pa.array(x, kind or pa.float64()) for p, x in columns.items()})
    return RawTable("f.parquet", table, True, {}, ())


def iso(ms, form="%Y-%m-%d %H:%M:%S"):
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).strftime(form)


def check_candles(series, volume=True):
    """The series is ROWS."""
    assert series.kind == "candles"
    found = series.table
    assert found["open_time_ms"].to_pylist() == [r[0] for r in ROWS]
    for i, name in enumerate(PRICES.split(","), 1):
        assert found[name].to_pylist() == [float(r[i]) for r in ROWS]
    wanted = [float(r[5]) for r in ROWS] if volume else [None] * len(ROWS)
    assert found["volume"].to_pylist() == wanted
    assert found["row"].to_pylist() == list(range(len(ROWS)))


OKX = [[*r[:5], r[6], r[5], r[7], "1" if r is not ROWS[-1] else "0"] for r in ROWS]
CANDLES = {
    "okx_rest": make(OKX, venue="okx"),
    "okx_rest_without_venue": make(OKX),
    "okx_before_2021": make([r[:7] for r in OKX], venue="okx"),
    "okx_by_its_symbol": make([r[:7] for r in OKX], symbol="BTC-USDT-SWAP"),
    "okx_names": make(OKX, f"ts,{PRICES},vol,volCcy,volCcyQuote,confirm"),
    "okx_of_ccxt": make([r[:6] for r in ROWS], venue="okx"),
    "bybit_rest": make([[*r[:6], r[7]] for r in ROWS]),
    "trades_in_the_seventh_column": make([[*r[:6], "3"] for r in ROWS]),
    "gate_spot": make([[r[0] // 1000, r[7], r[4], r[2], r[3], r[1], r[5], "true"] for r in ROWS]),
    "hyperliquid": make([[r[0], r[0] + STEP - 1, *r[1:6]] for r in ROWS], "t,T,o,h,l,c,v"),
    "cryptodatadownload": make([[*r[:6], r[7]] for r in ROWS], f"unix,{PRICES},Volume BTC,Volume USD"),
    "index_without_a_name": make([[iso(r[0]) + "+00:00", *r[1:6]] for r in ROWS], f",{PRICES},volume"),
    "rows_counted_beside_dates": make([[i, iso(r[0]) + "Z", *r[1:6]] for i, r in enumerate(ROWS)],
        f"index,date,{PRICES},volume"),
    "rows_counted_in_parquet": make_arrow(pa.array([r[0] for r in ROWS], pa.timestamp("ms", "UTC")),
        index=pa.array(range(len(ROWS)))),
    "decimals": make_arrow(pa.array([r[0] for r in ROWS]), "ts", kind=pa.float64())._replace(
        table=pa.table({"ts": [r[0] for r in ROWS], **{p: pa.array([decimal.Decimal(r[i]) for r in ROWS],
            pa.decimal128(20, 9)) for i, p in enumerate((*PRICES.split(","), "volume"), 1)}})),
    "naive_datetime": make_arrow(pa.array([r[0] for r in ROWS], pa.timestamp("ms"))),
    "metatrader": make([[iso(r[0], "%Y.%m.%d"), iso(r[0], "%H:%M:%S") + "Z", *r[1:5], "7", r[5]] for r in ROWS],
        "<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<TICKVOL>,<VOL>"),
    "dukascopy": make([[iso(r[0] + 3_600_000, "%d.%m.%Y %H:%M:%S.000 GMT+0100"), *r[1:6]] for r in ROWS],
        "Local time,Open,High,Low,Close,Volume"),
    "dukascopy_gmt": make([[iso(r[0], "%d.%m.%Y %H:%M:%S.000"), *r[1:6]] for r in ROWS],
        "Gmt time,Open,High,Low,Close,Volume"),
    "unix_close_beside_text": make([[iso(r[0]), *r[1:6], r[0] + STEP - 1] for r in ROWS],
        f"date,{PRICES},volume,close_time"),
    "close_times_alone": make([[r[0] + STEP - 1, *r[1:6]] for r in ROWS], f"Close time,{PRICES},volume"),
    "round_close_times_alone": make([[r[0] + STEP, *r[1:6]] for r in ROWS], f"close_time,{PRICES},volume"),
    "twelve_hours": make([[iso(r[0] + 86_400_000 * 20, "%m/%d/%Y %I:%M %p Z"), *r[1:6]] for r in ROWS],
        f"Date,{PRICES},volume"),
    "decimal_commas": make([[r[0], *(x.replace(".", ",") for x in r[1:6])] for r in ROWS],
        "Zeit,Eröffnung,Hoch,Tief,Schluss,Volumen", ";"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANDLES)
def test_candles_of_every_form(name):
    raw = CANDLES[name]
    if name == "twelve_hours":
        raw = make([[iso(r[0], "%m/%d/%Y %I:%M %p"), *r[1:6]] for r in ROWS], f"date utc,{PRICES},volume")
        with pytest.raises(DataError, match="order of day and month"):
            recognise(raw)
        late = recognise(CANDLES[name]).table["open_time_ms"].to_numpy() - 20 * 86_400_000
        assert late.tolist() == [r[0] for r in ROWS]
        return
    check_candles(recognise(raw))


def test_flags_and_turnover_are_kept():
    table = recognise(CANDLES["okx_rest_without_venue"]).table
    assert table[CLOSED].to_pylist() == [True] * (len(ROWS) - 1) + [False]
    for name in ("okx_rest_without_venue", "bybit_rest", "gate_spot", "cryptodatadownload"):
        assert recognise(CANDLES[name]).table[QUOTE_VOLUME].to_pylist() == [float(r[7]) for r in ROWS]
    assert QUOTE_VOLUME not in recognise(CANDLES["trades_in_the_seventh_column"]).table.column_names


CONTRACTS = {
    "okx_names": make([[*r[:5], r[6]] for r in ROWS], f"ts,{PRICES},vol", venue="okx"),
    "gate_rest": make([[r[0] // 1000, r[6], r[4], r[2], r[3], r[1], r[7]] for r in ROWS], "t,v,c,h,l,o,sum"),
    "gate_dump": make([[r[0] // 1000, r[6], r[4], r[2], r[3], r[1]] for r in ROWS]),
    "by_name": make([[*r[:5], r[6]] for r in ROWS], f"ts,{PRICES},volume_contracts"),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_contracts_need_their_size(name):
    with pytest.raises(DataError, match="--contract-size"):
        recognise(CONTRACTS[name])
    check_candles(recognise(CONTRACTS[name], Choices(contract_size=0.01)))


NO_VOLUME = {
    "column tick_volume counts": make([[*r[:5], r[6]] for r in ROWS], f"time,{PRICES},tick_volume"),
    "column turnover is in quote currency": make([[*r[:5], r[7]] for r in ROWS], f"ts,{PRICES},turnover"),
    "column volume is in quote currency": make([[*r[:5], r[7]] for r in ROWS], f"ts,{PRICES},volume", venue="ftx"),
}


@pytest.mark.parametrize("words", NO_VOLUME)
def test_another_count_is_no_volume(words):
    series = recognise(NO_VOLUME[words])
    check_candles(series, volume=False)
    assert any(words in said for said in series.taken)


FUNDING = {
    "okx": (make([["9", r, t] for t, r in RATES], "fundingRate,realizedRate,fundingTime"), "the settled one"),
    "kraken": (make([[t, "9", r] for t, r in RATES], "timestamp,fundingRate,relativeFundingRate"), "relativeFunding"),
    "deribit": (make([[t, "9", "8", r] for t, r in RATES], "timestamp,index_price,interest_8h,interest_1h"), "_1h"),
    "gate": (make([[t // 1000, r] for t, r in RATES], "t,r"), "column r"),
    "freqtrade": (make([[t, r, 0, 0, 0, 0] for t, r in RATES], f"date,{PRICES},volume"), "column open"),
    "freqtrade_json": (make([[t, r, 0, 0, 0, 0] for t, r in RATES]), "column 2"),
    "percent": (make([[iso(t) + "Z", f"0.00{i + 1}%"] for i, (t, _) in enumerate(RATES)], "Time,Funding Rate"), "Z"),
}


@pytest.mark.parametrize("name", FUNDING)
def test_funding_of_every_form(name):
    raw, words = FUNDING[name]
    series = recognise(raw)
    assert series.kind == "funding"
    assert series.table["time_ms"].to_pylist() == [t for t, _ in RATES]
    assert series.table["funding_rate"].to_pylist() == [float(r) for _, r in RATES]
    assert name == "percent" or any(words in said for said in series.taken)


def test_a_mark_is_known_by_its_count():
    rows = [[*r[:5], 0, r[0] + STEP - 1, 0, 900, 0, 0, 0] for r in ROWS]
    assert recognise(make(rows)).kind == "mark"
    assert recognise(make([[*r[:8], 0, *r[9:]] for r in rows])).kind == "candles"  # nothing was traded
    assert recognise(make([r[:5] for r in ROWS], f"ts,{PRICES}")).kind == "candles"
    assert recognise(make([r[:5] for r in ROWS], f"ts,{PRICES}", kind="mark")).kind == "mark"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (make([[r[0], *(x.replace(".", ",") for x in r[1:5]), f"1{i}.250"] for i, r in enumerate(ROWS)],
            f"ts,{PRICES},volume", ";"), "row 0: volume = '10.250': a dot beside decimal commas"),
        (make([["1.70407E+12", *r[1:6]] for r in ROWS], f"ts,{PRICES},volume"), "shortened by a spreadsheet"),
        (make([[t, r if i else "0.01%"] for i, (t, r) in enumerate(RATES)], "Time,Funding Rate"),
            "row 1: Funding Rate = '2e-5' has no percent sign"),
        (make([[iso(r[0]), *r[1:6], r[0] + STEP + 3_599_999] for r in ROWS], f"date,{PRICES},volume,close_time"),
            "--timezone"),
        (make([[r[0], r[1], r[4], r[2], r[3], r[5]] for r in ROWS]), "no known order"),
        (make([[r[0], r[1], r[1], r[1], r[1], r[1], r[1], "true"] for r in ROWS]), "several orders"),
        (make([ROWS[0][:6]], f"Close time,{PRICES},volume"), "one stamp does not show the length"),
        (make([[*r[:6], x] for r, x in zip(ROWS, ["AAAUSDT", "BBBUSDT"] * 6, strict=True)],
            f"ts,{PRICES},volume,symbol"), "holds several symbols"),
        (make([r[:6] for r in ROWS], f"ts,{PRICES},volume", kind="premium"), "premium price"),
        (make_arrow(pa.array(range(len(ROWS))), "time"), "row 0: time = 0 is no unix time"),
    ],
)  # fmt: skip
def test_a_guess_is_refused(raw, words):
    with pytest.raises(DataError) as caught:
        recognise(raw)
    assert words in str(caught.value) and str(caught.value).startswith("f.")


def test_columns_by_hand():
    raw = make([[r[5], r[4], r[3], r[2], r[1], r[0]] for r in ROWS], "a,b,c,d,e,f")
    check_candles(recognise(raw, Choices(columns="time=f,open=e,high=d,low=c,close=b,volume=a")))
    with pytest.raises(DataError, match="no column 'x' among a, b, c"):
        recognise(raw, Choices(columns="time=x"))
    with pytest.raises(DataError, match="'when=f' is not one of"):
        recognise(raw, Choices(columns="when=f"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("BTC_USDT_USDT", "BTCUSDT"), ("BTC/USDT:USDT", "BTCUSDT"), ("BTC-USDT-SWAP", "BTCUSDT"),
        ("BTCUSDT.P", "BTCUSDT"), ("BINANCE:BTCUSDT.P", "BTCUSDT"), ("BTC-USDT", "BTCUSDT"), ("BTC/USDT", "BTCUSDT"),
        ("XBTUSDTM", "BTCUSDT"), ("ETHUSDTM", "ETHUSDT"), ("BTCUSDT_UMCBL", "BTCUSDT"), ("tBTCF0:USTF0", "BTCUSDT"),
        ("BTC_USDC-PERPETUAL", "BTCUSDC"), ("PF_XBTUSD", "BTCUSD"), ("BTC-PERP", "BTCUSD"), ("BTC/USD:USD", "BTCUSD"),
        ("1000PEPEUSDT", "1000PEPEUSDT"), ("BTCUSD", "BTCUSD"), ("BTCUSDT-PERP", "BTCUSDT"),
        *((inverse, None) for inverse in ("BTCUSD_PERP", "BTCUSD_240628", "BTC-USD-SWAP", "XBTUSD", "XBTUSDM",
            "BTC/USD:BTC", "BTC_USD_BTC", "PI_XBTUSD", "BTC-PERPETUAL", "BYBIT:BTCUSD.P", "BTCUSD_DMCBL")),
    ],
)  # fmt: skip
def test_symbols(given, wanted):
    if wanted is None:
        with pytest.raises(DataError, match="inverse contract"):
            normalise_symbol(given, "f.csv")
    else:
        assert normalise_symbol(given, "f.csv") == wanted


def test_a_symbol_stands_in_a_column():
    rows = [[*r[:6], "BTC-USDT-SWAP"] for r in ROWS]
    assert recognise(make(rows, f"ts,{PRICES},volume,instId", symbol="ETHUSDT")).symbol == "BTCUSDT"
    coin = make([[t, r, "BTC"] for t, r in RATES], "time,fundingRate,coin")
    assert recognise(coin).symbol == "BTCUSD"
    words = pa.array(["BTCUSDT"] * len(ROWS)).dictionary_encode()
    assert recognise(make_arrow(pa.array([r[0] for r in ROWS]), "ts", symbol=words)).symbol == "BTCUSDT"


def test_a_name_is_no_kind(tmp_path):
    import pathlib

    assert "kind" not in read_path(pathlib.Path("/home/mark/BTCUSDT-15m.csv"))
    assert "kind" not in read_path(pathlib.Path("data/reset_index.csv"))
    assert read_path(pathlib.Path("data/BTCUSDT_index_1m.csv"))["kind"] == "index"
    assert read_path(pathlib.Path("data/mark/BTCUSDT-15m.csv"))["kind"] == "mark"


def read_one_stamp(values, kind=None, timezone=None):
    return read_stamps(pa.chunked_array([pa.array(values, kind)]), "f", "ts", timezone, None).ms.tolist()


@hypothesis.given(
    st.lists(st.tuples(st.integers(1_230_768_000, 4_000_000_000), st.sampled_from([1, 10**3, 10**6, 10**9])),
        min_size=1, max_size=20)
)  # fmt: skip
def test_units_may_change_in_one_column(rows):
    stamps, wanted = [s * unit for s, unit in rows], [s * 1000 for s, _ in rows]
    assert read_one_stamp(stamps) == wanted
    assert read_one_stamp([str(x) for x in stamps]) == wanted
    assert read_one_stamp([float(s) for s, _ in rows]) == wanted
    assert read_one_stamp([f"{s}.0" for s, _ in rows]) == wanted


@hypothesis.given(
    st.datetimes(datetime.datetime(2010, 1, 1), datetime.datetime(2036, 1, 1)),
    st.sampled_from(["Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "UTC"]),
)
def test_zones_are_those_of_the_standard_library(naive, zone):
    naive = naive.replace(microsecond=0)
    aware = [naive.replace(tzinfo=zoneinfo.ZoneInfo(zone), fold=fold) for fold in (0, 1)]
    instants = [round(x.timestamp() * 1000) for x in aware]
    assert read_one_stamp([aware[0].isoformat()]) == [instants[0]]
    if instants[0] == instants[1]:
        assert read_one_stamp([str(naive)], timezone=zone) == [instants[0]]
    else:
        with pytest.raises(DataError, match=r"row 0: ts = .* (occurs twice|does not exist)"):
            read_one_stamp([str(naive)], timezone=zone)


def test_a_repeated_hour_is_settled_by_the_grid():
    """In London, 01:00 came twice on 2023-10-29; of settlements every 8 hours only the first fits."""
    local = ["2023-10-28 17:00", "2023-10-29 01:00", "2023-10-29 08:00", "2023-10-29 16:00"]
    wanted = [int(datetime.datetime(2023, 10, day, hour, tzinfo=datetime.UTC).timestamp()) * 1000
        for day, hour in ((28, 16), (29, 0), (29, 8), (29, 16))]  # fmt: skip
    assert read_one_stamp(local, timezone="Europe/London") == wanted
    hourly = [f"2023-10-29 {hour:02d}:00" for hour in range(6)]
    with pytest.raises(DataError, match=r"row 1: .* occurs twice"):
        read_one_stamp(hourly, timezone="Europe/London")


@hypothesis.given(
    st.lists(
        st.decimals("0.01", "99999", places=2).filter(lambda x: float(np.float32(x)) != float(x)),
        min_size=4, max_size=20,
    )
)  # fmt: skip
def test_float32_prices_come_back(decimals):
    single = np.array([float(x) for x in decimals], np.float32)
    assert read_numbers(pa.chunked_array([pa.array(single)]), "f", "x").tolist() == [float(x) for x in decimals]
    mended, changed = mend_float32({"open": single.astype(np.float64)})
    assert changed and mended["open"].tolist() == [float(x) for x in decimals]
    whole = np.array([float(x) for x in decimals])
    kept, changed = mend_float32({"open": whole})
    assert not changed and kept["open"] is whole


@hypothesis.given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9))
def test_fixed_point_numbers_are_the_nearest(values):
    for width, digits in ((8, 9), (16, 16)):
        column = pa.array([x.to_bytes(width, "little", signed=True) for x in values], pa.binary(width))
        found = read_numbers(pa.chunked_array([column]), "f", "x").tolist()
        assert found == [float(decimal.Decimal(x).scaleb(-digits)) for x in values]


@hypothesis.given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_text_is_read_as_python_reads_it(values):
    assert read_numbers(pa.chunked_array([pa.array([repr(x) for x in values])]), "f", "x").tolist() == values


CELL = st.one_of(st.text(max_size=8), st.none(), st.sampled_from(["1704067200000", "100", "1,5", "1.5", "2024-01-01Z"]))


@hypothesis.settings(max_examples=400, deadline=None)
@hypothesis.given(st.data())
def test_damage_gives_a_refusal(data):
    rows = [list(map(str, r[:6])) for r in ROWS]
    for _ in range(data.draw(st.integers(1, 3))):
        rows[data.draw(st.integers(0, 11))][data.draw(st.integers(0, 5))] = data.draw(CELL)
    names = [*f"ts,{PRICES},volume".split(",")]
    if data.draw(st.booleans()):
        names[data.draw(st.integers(0, 5))] = data.draw(st.text(max_size=6))
    hypothesis.assume(len(set(names)) == 6)
    table = pa.table([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names=names)
    hints = {"separator": data.draw(st.sampled_from([",", ";"]))}
    try:
        series = recognise(RawTable("f.csv", table, True, hints, ()))
    except DataError as error:
        assert str(error).startswith("f.csv") and str(error).isprintable()
    else:
        assert series.table.num_rows == len(ROWS)


# Real files: rows, first and last stamp, and sums, with the standard library.


def open_csv(path, skip=0):
    return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()[skip:]))


def of_csv(time, volume, factor=1):
    def read(path):
        rows = open_csv(path)
        return [round(float(r[time]) * factor) for r in rows], sum(float(r[volume]) for r in rows)

    return read


def of_lines(path, factor=1, volume=5):
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        content = archive.read(archive.namelist()[0]).decode()
    else:
        content = path.read_text()
    rows = [r for r in csv.reader(io.StringIO(content)) if r[0][0].isdigit()]
    return [int(r[0]) // factor for r in rows], sum(float(r[volume]) for r in rows)


def of_json(path, time=0, value=5):
    rows = json.loads(path.read_text())
    rows = rows["candles"] if isinstance(rows, dict) else rows
    return [int(r[time]) for r in rows], sum(float(r[value]) for r in rows)


def of_iso(time, form, zone="", value="Volume", names=None):
    def read(path):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, fieldnames=names, delimiter=";" if ";" in lines[0] else ","))
        stamps = [datetime.datetime.strptime(r[time] + zone, form + "%z" * bool(zone or "%z" not in form))
                  for r in rows]  # fmt: skip
        numbers = [r[value].replace("%", "").replace(",", ".") for r in rows]
        total = sum(decimal.Decimal(x) for x in numbers) / (100 if "%" in rows[0][value] else 1)
        return [round(x.timestamp() * 1000) for x in stamps], float(total)

    return read


def of_arrow(value):
    def read(path):
        load = pa.feather.read_table if path.suffix == ".feather" else pa.parquet.read_table
        rows = load(path).to_pylist()
        time = next(iter(rows[0]))
        return [round(r[time].timestamp() * 1000) for r in rows], sum(r[value] or 0 for r in rows)

    return read


def of_nautilus(path):
    rows = pa.parquet.read_table(path).to_pylist()
    return [r["ts_event"] // 10**6 for r in rows], sum(int.from_bytes(r["volume"], "little") for r in rows) / 1e9


BINANCE = of_csv("open_time", "volume")
REAL = [
    ("formats/D1_XRPUSDT_1m_polars.parquet", "candles", "XRPUSDT", of_arrow("volume"), None),
    ("formats/D2_APTUSDT_15m_excel.csv", "candles", "APTUSDT",
        of_iso("Datum", "%d.%m.%Y %H:%M", "+0000", "Volumen"), "UTC"),
    ("formats/F03_ALGOUSDT-1m-2025-02.csv", "candles", "ALGOUSDT", BINANCE, None),
    ("formats/F05_BTCUSDT-5m-2025-01.csv", "candles", "BTCUSDT", lambda p: of_lines(p, 1000), None),
    ("formats/F07_mark_BTCUSDT-1h-2022-01.zip", "mark", "BTCUSDT", of_lines, None),
    ("formats/F10a_BTCUSDT-fundingRate-2022-01.zip", "funding", "BTCUSDT", lambda p: of_lines(p, volume=2), None),
    ("formats/F11_Funding Rate History_BTCUSDT Perpetual_2024-08-09.csv", "funding", "BTCUSDT",
        of_iso("Time", "%Y-%m-%d %H:%M:%S", "+0000", "Funding Rate"), "UTC"),
    ("formats/F14_BTCUSDT_15.csv", "candles", "BTCUSDT", of_iso("timestamp", "%Y-%m-%d %H:%M:%S", "+0000"), "UTC"),
    ("formats/F16a_BTC_USDT_USDT-5m-futures.feather", "candles", "BTCUSDT", of_arrow("volume"), None),
    ("formats/F16b_BTC_USDT_USDT-4h-mark.feather", "mark", "BTCUSDT", of_arrow("volume"), None),
    ("formats/F17a_XRP-USDT-SWAP_1m.csv", "candles", "XRPUSDT", of_csv("timestamp_ms", "volume_base"), None),
    ("formats/F17b_XRP-USDT-SWAP_funding.csv", "funding", "XRPUSDT", of_csv("timestamp_ms", "realized_rate"), None),
    ("formats/F19_BTC_15m.json", "candles", "BTCUSD", lambda p: of_json(p, "t", "v"), None),
    ("formats/F22a_BINANCE_BTCUSDT.P, 15.csv", "candles", "BTCUSDT", of_csv("time", "Volume", 1000), None),
    ("formats/F22b_BINANCE_BTCUSDT.P, 5.csv", "candles", "BTCUSDT", of_csv("time", "Volume", 1000), None),
    ("formats/F25_BTCUSD_M15.csv", "candles", "BTCUSD", of_iso("Datetime", "%Y-%m-%d %H:%M:%S%z"), None),
    ("formats/F27a_BTC_USDT_USDT-5m-futures.json", "candles", "BTCUSDT", of_json, None),
    ("formats/F27b_BTC_USDT_USDT-8h-mark.json", "mark", "BTCUSDT", of_json, None),
    ("formats/F27c_BTC_USDT_USDT-8h-funding_rate.json", "funding", "BTCUSDT", lambda p: of_json(p, value=1), None),
    ("formats/F28_BTCUSDT_15m.json", "candles", "BTCUSDT", of_json, None),
    ("formats/F37a_bars_64-bit.parquet", "candles", "ADABTC", of_nautilus, None),
    ("formats/F40_BTCUSD_M15.csv", "candles", "BTCUSD", of_iso("time", "%Y-%m-%d %H:%M:%S", "+0000"), "UTC"),
    ("raw_samples/NEARUSDT-1m-2023-02.csv", "candles", "NEARUSDT", BINANCE, None),
    ("raw_samples/futures-um-klines-BTCUSDT-1h-2024-10-28.zip", "candles", "BTCUSDT", of_lines, None),
    ("raw_samples/spot-klines-BTCUSDT-1h-2024-10-28.zip", "candles", "BTCUSDT", of_lines, None),
    ("raw_samples/ALGO_USDT-5m-futures.json", "candles", "ALGOUSDT", of_json, None),
    ("raw_samples/BTC_USDT_USDT-3m-futures.feather", "candles", "BTCUSDT", of_arrow("volume"), None),
    ("raw_samples/BTC_USDT_USDT-8h-mark.feather", "mark", "BTCUSDT", of_arrow("volume"), None),
    ("raw_samples/BTC_USDT_USDT-8h-funding_rate.feather", "funding", "BTCUSDT", of_arrow("open"), None),
    ("raw_samples/ORCA_USDT_USDT-1h-funding_rate.feather", "funding", "ORCAUSDT", of_arrow("open"), None),
    ("raw_samples/odd/bitget_SOL_USDT_USDT-3m-futures_gaps.feather", "candles", "SOLUSDT", of_arrow("volume"), None),
    ("raw_samples/odd/okx_BTCUSDT_3m_10000_candles.csv", "candles", "BTCUSDT",
        of_iso("timestamp", "%Y-%m-%d %H:%M:%S", "+0000", "volume"), "UTC"),
    ("raw_samples/odd/tzoffset_ADAUSDT_1m.csv", "candles", "ADAUSDT", of_iso("timestamp", "%Y-%m-%d %H:%M:%S%z"), None),
    ("raw_samples/odd/headerless_mmddyyyy_BTCUSDT_3m.csv", "candles", "BTCUSDT",
        of_iso("t", "%m-%d-%YT%H:%M:%S.000%z", value="v", names=list("tohlcv")), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "symbol", "count", "zone"), REAL, ids=[row[0] for row in REAL])
def test_real_files(shared_data, name, kind, symbol, count, zone):
    path = shared_data / name
    if zone is not None:
        with pytest.raises(DataError, match=r"row 0: .* has no time zone.*--timezone"):
            recognise(read_files([path])[0])
    (raw,) = read_files([path])
    series = recognise(raw, Choices(timezone=zone))
    stamps, total = count(path)
    assert (series.kind, series.symbol) == (kind, symbol)
    assert series.table.column(0).to_pylist() == stamps
    column = {"candles": "volume", "funding": "funding_rate"}.get(kind)
    if column is not None:
        assert series.table[column].to_numpy().sum() == pytest.approx(total, rel=1e-12, abs=1e-15)
    else:
        assert total == 0 and "volume" not in series.table.column_names
    assert any("spot" in words for words in series.taken) == ("spot-klines" in name)


def test_odd_inputs(shared_data):
    """Faults of values are left to the later steps, so each file is read, and M18 is M00 again."""
    found = {}
    for path in sorted((shared_data / "odd_inputs").glob("M*")):
        series = recognise(read_files([path])[0])
        found[path.name.split("_")[0] if "funding" not in path.name else path.name] = series
        wanted = "funding" if "funding" in path.name else "mark" if "mark" in path.name else "candles"
        assert series.kind == wanted, path.name
        if path.suffix == ".csv" and "no_header" not in path.name:
            rows = open_csv(path)
            last = list(rows[0])[-1 - ("trade_count" in rows[0])]
            column = {"funding": "funding_rate", "mark": "close"}.get(wanted, "volume")
            assert series.table.column(0).to_pylist() == [int(next(iter(r.values()))) for r in rows]
            assert series.table[column].to_pylist() == [float(r[last]) for r in rows]
    assert len(found) == 16
    assert found["M18"].table.equals(found["M00"].table)
    assert "float32 prices rounded to the nearest decimal" in found["M18"].taken
    assert "float32 prices rounded to the nearest decimal" in found["M07"].taken
    # M08 holds the same candles, rounded to two decimals.
    for price in PRICES.split(","):
        np.testing.assert_allclose(found["M07"].table[price], found["M08"].table[price], atol=0.0051, rtol=0)


def test_the_ftx_file_has_no_base_volume(shared_data):
    (raw,) = read_files([shared_data / "raw_samples/odd/ftx_btc-perp-20211231-20220201_1m.csv"])
    series = recognise(raw, Choices(timezone="UTC"))
    assert series.table["volume"].null_count == len(series.table) == 45_031
    assert series.table[QUOTE_VOLUME][0].as_py() == 2300413.7295


def test_inverse_real_file(shared_data):
    (raw,) = read_files([shared_data / "formats/F12_BTCUSD_PERP_Binance_futures_CM_hour.csv"])
    with pytest.raises(DataError, match="BTCUSD_PERP is an inverse contract"):
        recognise(raw)


def test_titles_of_metatrader_are_no_error_page(tmp_path):
    path = tmp_path / "BTCUSDT_M15.csv"
    lines = ["<DATE>\t<TIME>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>"]
    lines += ["\t".join([iso(r[0], "%Y.%m.%d"), iso(r[0], "%H:%M:%S"), *r[1:5], "7", r[5], "1"]) for r in ROWS]
    path.write_text("\n".join(lines))
    (raw,) = read_files([path])
    with pytest.raises(DataError, match=r"row 0: <DATE> <TIME> = .* has no time zone"):
        recognise(raw)
    check_candles(recognise(raw, Choices(timezone="UTC")))
