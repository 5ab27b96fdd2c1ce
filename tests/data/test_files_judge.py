"""Does `judge` refuse each fault with number, usual number and option, and pass every good file?"""

import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from series import make_series, read_series
from test_files_mend import HOUR, MINUTE, START, candles, pick, rates, walk

from perpjax.data.contract import CANDLES, FUNDING, DataError, validate
from perpjax.data.files.judge import judge
from perpjax.data.files.mend import mend
from perpjax.data.files.records import Choices

PLAIN = Choices()
DAY = 24 * HOUR


def look(columns, mark=None, funding=None, symbol="XYZUSDT", **choices):
    """The judgement of series or columns."""
    chosen = Choices(**choices)
    series = [
        candles(columns) if isinstance(columns, dict) else columns,
        make_series("mark", mark, source="m.csv") if isinstance(mark, dict) else mark,
        funding,
    ]
    return judge(*(None if x is None else mend([x], chosen) for x in series), symbol, chosen)


def refuse(words, *tables, accepted_by=None, **rest):
    """Check the refusal's words, and that its option accepts."""
    with pytest.raises(DataError) as caught:
        look(*tables, **rest)
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    if accepted_by:
        for name, value in accepted_by.items():
            option = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            assert option in str(caught.value)
        return look(*tables, **rest, **accepted_by)


def make_mark(columns):
    """A mark series two ticks around the last price."""
    shift = 1 + 1e-4 * np.sin(np.arange(len(columns["open"])))
    return {n: x if n == "open_time_ms" else x * shift for n, x in columns.items() if n != "volume"}


def settle(count=60, hours=8, seed=0, start=START):
    """Stamps and Binance-like rates of 8 decimals, a third of them the base rate."""
    rng = np.random.default_rng(seed)
    rate = np.round(rng.normal(5e-5, 4e-5, count), 8)
    rate[rng.random(count) < 0.4] = 1e-4
    return start + np.arange(count) * hours * HOUR, rate


def test_good_tables_pass_unchanged():
    columns, (stamps, rate) = walk(1000), settle(11)
    judged = look(columns, make_mark(columns), rates(stamps, rate))
    assert judged.words == () and judged.has_volume
    assert judged.candles.equals(mend([candles(columns)], PLAIN).table)
    assert validate(judged.candles, CANDLES) and validate(judged.funding, FUNDING)
    assert len(judged.moves) == 10
    assert [abs(x) for _, x in judged.moves] == sorted((abs(x) for _, x in judged.moves), reverse=True)


# Common span and ends


def test_candles_are_cut_to_the_common_span():
    columns = walk(900)
    stamps, rate = settle(6, start=START + 2 * DAY - 8 * HOUR)
    judged = look(columns, pick(make_mark(columns), np.s_[20:880]), rates(stamps, rate))
    assert judged.words == ("cut to 2023-11-16 16:00 UTC .. 2023-11-18 01:15 UTC, where all three files are",)
    assert judged.candles["open_time_ms"][0].as_py() == int(stamps[0])
    refuse(["no time in common"], columns, pick(make_mark(walk(30, start=START + 90 * DAY)), np.s_[:]))


def test_coarser_mark_and_funding_may_miss_eight_hours():
    columns = walk(900)
    hourly = make_mark(pick(columns, np.s_[84:800:12]))
    assert look(columns, hourly).words == ()
    assert "where both files are" in look(columns, pick(hourly, np.s_[12:])).words[0]


def test_finer_mark_is_aggregated():
    columns = walk(900, 1)
    coarse = pick(columns, np.s_[::5])
    for name, f in (("high", np.max), ("low", np.min)):
        coarse[name] = f(columns[name].reshape(-1, 5), axis=1)
    coarse["close"] = columns["close"][4::5]
    judged = look(coarse, make_mark(columns))
    assert judged.words == ("mark candles of 1 minute aggregated to 5 minutes",)
    assert judged.mark.num_rows == judged.candles.num_rows == 180


def test_untraded_candles_at_the_end_are_dropped():
    columns = walk(100)
    for name in ("open", "high", "low", "close"):
        columns[name][90:] = columns["close"][89]
    columns["volume"][90:] = 0
    judged = look(columns)
    assert judged.candles.num_rows == 90 and judged.words == ("10 candles at the end without a trade dropped",)
    refuse(["all 100 rows", "mark, index and premium"], columns | {"volume": np.zeros(100)})


# Volume


def test_no_volume_needs_an_option():
    columns = {n: x for n, x in walk().items() if n != "volume"}
    judged = refuse(["no volume column"], columns, accepted_by={"no_volume": True})
    assert not judged.has_volume and (judged.candles["volume"].to_numpy() == 1).all()


def test_candles_that_moved_without_volume():
    columns = walk(200)
    columns["volume"][[5, 6]] = 0
    assert look(columns).words == ()
    columns["volume"][7] = 0
    judged = refuse(["3 candles moved", "row 5", "usually none"], columns, accepted_by={"volume_unknown": True})
    assert (judged.candles["volume"].to_numpy() > 0).all() and "3 candles of unknown volume" in judged.words[0]


def test_flat_outages_are_no_moves():
    columns = walk(200)
    for name in ("open", "high", "low", "close"):
        columns[name][50:70] = columns["close"][49]
    columns["volume"][50:70] = 0
    assert look(columns).words == ()


def test_turnover_as_volume():
    columns = walk(200)
    quote = columns["volume"] * columns["close"]
    assert look(columns | {"quote_volume": quote}).words == ()
    wrong = columns | {"volume": quote, "quote_volume": quote}
    refuse(["quote volume / volume = 1,", "turnover"], wrong, accepted_by={"volume_unknown": True})
    huge = columns | {"volume": columns["volume"] * 1e6}
    assert "looks like turnover" in look(huge).words[0]
    refuse(["volume x price", "turnover"], huge, symbol="ETHUSDT", accepted_by={"volume_unknown": True})


# Symbol and shape


@pytest.mark.parametrize("symbol", ["BTCUSDT", "BTC-USDT-SWAP", "BTC_USDT", "BTCUSDT.P", "BTC"])
def test_price_of_a_known_symbol(symbol):
    refuse(["median price", "3000 .. 500000"], walk(), symbol=symbol, accepted_by={"accept_symbol": True})


def test_heikin_ashi_and_sampled_candles():
    columns = walk(300)
    ashi = {n: x.copy() for n, x in columns.items()}
    ashi["close"] = (columns["open"] + columns["high"] + columns["low"] + columns["close"]) / 4
    for i in range(1, 300):
        ashi["open"][i] = (ashi["open"][i - 1] + ashi["close"][i - 1]) / 2
    ashi["high"] = np.maximum.reduce([columns["high"], ashi["open"], ashi["close"]])
    ashi["low"] = np.minimum.reduce([columns["low"], ashi["open"], ashi["close"]])
    refuse(["Heikin-Ashi", "usually"], ashi, accepted_by={"accept_candles": True})
    sampled = {n: x.copy() for n, x in columns.items()}
    sampled["open"] = np.where(np.random.default_rng(3).random(300) < 0.5, columns["low"], columns["high"])
    refuse(["ranges away from the last close"], sampled, accepted_by={"accept_candles": True})


# Gaps


def test_gaps():
    columns = walk(2000)
    assert look(pick(columns, np.r_[0:500, 590:2000])).words == ()
    refuse(["101 of 2000", "5.0%|5.1%"], pick(columns, np.r_[0:500, 601:2000]), accepted_by={"allow_gaps": True})
    columns = walk(20_000)
    refuse(["24.1 h"], pick(columns, np.r_[0:500, 789:20_000]), accepted_by={"allow_gaps": True})
    weekend = ((columns["open_time_ms"] // DAY + 3) % 7) >= 5
    refuse(["weekend.s. have no candle", "broker"], pick(columns, ~weekend), accepted_by={"allow_gaps": True})


# Mark


def test_mark_of_another_coin():
    columns = walk(300)
    mark = {n: x if n == "open_time_ms" else x * 1.03 for n, x in make_mark(columns).items()}
    refuse(["another coin", "3.0%"], columns, mark, accepted_by={"accept_mark": True})
    refuse(["given twice"], columns, {n: x for n, x in columns.items() if n != "volume"},
           accepted_by={"accept_mark": True})  # fmt: skip


@pytest.mark.parametrize("shift", [HOUR, -HOUR, 5 * MINUTE, -8 * HOUR])
def test_shifted_mark(shift):
    columns = walk(3000)
    mark = make_mark(columns)
    mark["open_time_ms"] = mark["open_time_ms"] + shift
    side = "earlier" if shift > 0 else "later"
    refuse(["fits the last price better", side], columns, mark, accepted_by={"accept_mark": True})


def test_mark_with_holes():
    columns = walk(1000)
    assert look(columns, pick(make_mark(columns), np.r_[0:400, 440:1000])).words == ()
    refuse(["covers 94.0%"], columns, pick(make_mark(columns), np.r_[0:400, 460:1000]),
           accepted_by={"accept_mark": True})  # fmt: skip


# Jumps


@pytest.mark.parametrize("name, factor", [("low", 0.001), ("low", 0.4), ("high", 10)])
def test_bad_prints(name, factor):
    columns = walk(300)
    columns[name][100] *= factor
    judged = refuse(["row 100", f"{name} = ", "bad print"], columns, accepted_by={"accept_jumps": True})
    assert judged.moves[0][0] == columns["open_time_ms"][100]
    mark = make_mark(columns)  # a mark that went the same way confirms
    assert look(columns, mark).words == ()
    columns["volume"][100] = 20 * np.median(columns["volume"])
    assert look(columns).words == ()


def test_a_fall_that_stays_is_no_bad_print():
    columns = walk(300)
    for name in ("open", "high", "low", "close"):
        columns[name][101:] *= 0.4
    columns["close"][100] *= 0.4
    columns["low"][100] *= 0.3
    assert look(columns).words == ()


def test_redenomination():
    columns = walk(300)
    for name in ("open", "high", "low", "close"):
        columns[name][150:] *= 1000
    refuse(["row 150", r"10\^3", "redenomination"], columns, accepted_by={"accept_jumps": True})


# Funding


@pytest.mark.parametrize("unit, factor, remedy", [("percent", 100, "divide percent by 100"),
                                                  ("bp", 10_000, "divide basis points by 10 000")])  # fmt: skip
def test_units_of_rates(unit, factor, remedy):
    stamps, rate = settle(60)
    scaled = [float(f"{x * factor:.10g}") for x in rate]
    columns = walk(1900, 15)
    judged = refuse([remedy, "usually 0.0001"], columns, None, rates(stamps, scaled), accepted_by={"rate_unit": unit})
    np.testing.assert_array_equal(judged.funding["funding_rate"].to_numpy(), rate)
    spread = np.round(np.random.default_rng(5).normal(0, 1e-3, 60), 8)  # no base rate, of another coin
    assert look(columns, None, rates(stamps, spread)).words == ()


def test_percent_without_base_rates():
    columns, rng = walk(2000, 15), np.random.default_rng(7)
    stamps, _ = settle(60)
    refuse(["percent"], columns, None, rates(stamps, np.round(rng.normal(0, 0.004, 60), 6)))
    fine = np.where(np.arange(60) % 3 == 0, 0.01, rng.normal(0, 0.005, 60))  # OKX: 12 decimals, base rate often
    refuse(["percent"], columns, None, rates(stamps, fine))
    big = {n: x if n in ("open_time_ms", "volume") else x * 30 for n, x in columns.items()}
    refuse(["percent"], big, None, rates(stamps, rng.normal(0, 0.006, 60)), symbol="BTCUSDT")
    refuse(["percent"], columns, None, rates(stamps, rng.normal(0, 0.1, 60)))


def test_a_repeated_rate():
    columns = walk(4000, 15)
    stamps, _ = settle(100)
    refuse(["repeated on all 60"], columns, None, rates(stamps[:60], 1.7e-4), accepted_by={"accept_funding": True})
    refuse(["repeated on all 100 rows"], columns, None, rates(stamps, 1e-4), accepted_by={"accept_funding": True})
    assert look(walk(2000, 15), None, rates(stamps[:70], 1e-4)).words == ()  # as long as in BTCUSDT
    _, rate = settle(100)
    hourly = stamps[0] + np.arange(800) * HOUR
    filled = rates(hourly, np.repeat(rate, 8))
    refuse(["changes only every 8 h"], columns, None, filled, accepted_by={"accept_funding": True})
    half = rates(stamps[0] + np.arange(99) * HOUR // 2, settle(99)[1])
    refuse(["30 minutes after the settlement before"], columns, None, half, accepted_by={"accept_funding": True})


def test_a_missing_settlement():
    columns = walk(2000, 15)
    for hours, count in ((8, 60), (1, 480)):
        stamps, rate = settle(count, hours)
        kept = np.arange(count) != 20
        refuse(["row 20 ", f"usually {hours} h", "is missing"], columns, None, rates(stamps[kept], rate[kept]),
               accepted_by={"accept_funding": True})  # fmt: skip


def test_a_missing_second_settlement():
    stamps, rate = settle(60)
    kept = np.arange(60) != 1
    refuse(["row 1 ", "comes 16 h", "usually 8 h"], walk(1900, 15), None, rates(stamps[kept], rate[kept]),
           accepted_by={"accept_funding": True})  # fmt: skip


def test_a_changing_interval_is_fine():
    steps = np.repeat([8, 4, 2, 4, 1, 4], [20, 30, 20, 10, 52, 20])
    stamps = START + np.concatenate([[0], np.cumsum(steps)]) * HOUR
    assert look(walk(2000, 15), None, rates(stamps, settle(len(stamps))[1])).words == ()


def test_settlements_in_local_time():
    stamps, rate = settle(60)
    local = rates(stamps + HOUR * (np.arange(60) > 20) + 0, rate)
    refuse(["1, 9, 17 h", "--timezone"], walk(2000, 15), None, local, accepted_by={"accept_funding": True})


# Real files

PAIRS = [
    ("binance-um_BTCUSDT_perp_5m_20230101_20241231.parquet", "BTCUSDT"),
    ("binance-um_BTCUSDT_perp_15m-native_20230101_20241231.parquet", "BTCUSDT"),
    ("binance-um_BTCUSDT_perp_1m_20230718_20230817.parquet", "BTCUSDT"),
    ("binance-spot_BTCUSDT_3m_20221201_20231001.parquet", "BTCUSDT"),
    ("binance-um_ORCAUSDT_perp_3m_20241231_20260219.parquet", "ORCAUSDT"),
    ("binance-um_NEARUSDT_perp_3m_20250704_20251231.parquet", "NEARUSDT"),
    ("binance-um_NEARUSDT_perp_15m-native_20250704_20251231.parquet", "NEARUSDT"),
    ("binance-um_NEARUSDT_perp_1m_202308_202310.parquet", "NEARUSDT"),
]
ALONE = [
    "raw_samples/NEARUSDT-1m-2023-02.csv", "raw_samples/ALGO_USDT-5m-futures.json",
    "raw_samples/odd/okx_BTCUSDT_3m_10000_candles.csv", "raw_samples/odd/headerless_mmddyyyy_BTCUSDT_3m.csv",
    "raw_samples/odd/tzoffset_ADAUSDT_1m.csv", "raw_samples/odd/ftx_btc-perp-20211231-20220201_1m.csv",
    "formats/F03_ALGOUSDT-1m-2025-02.csv", "formats/F05_BTCUSDT-5m-2025-01.csv", "formats/F14_BTCUSDT_15.csv",
    "formats/F17a_XRP-USDT-SWAP_1m.csv", "formats/F19_BTC_15m.json", "formats/F22a_BINANCE_BTCUSDT.P, 15.csv",
    "formats/F22b_BINANCE_BTCUSDT.P, 5.csv", "formats/F28_BTCUSDT_15m.json", "odd_inputs/M00_BTCUSDT.csv",
    "odd_inputs/M14_BTCUSDT_no_header.csv", "odd_inputs/M17_BTCUSDT_last_candle_unfinished.csv",
    "odd_inputs/M18_BTCUSDT_float32.parquet", "odd_inputs/M20_BTCUSDT.csv",
]  # fmt: skip
TRIPLES = [
    [f"raw_samples/BTC_USDT_USDT-{x}.feather" for x in ("3m-futures", "8h-mark", "8h-funding_rate")],
    [f"formats/F27{x}.json" for x in ("a_BTC_USDT_USDT-5m-futures", "b_BTC_USDT_USDT-8h-mark",
                                      "c_BTC_USDT_USDT-8h-funding_rate")],
    ["formats/F16a_BTC_USDT_USDT-5m-futures.feather", "formats/F16b_BTC_USDT_USDT-4h-mark.feather", None],
    ["formats/F17a_XRP-USDT-SWAP_1m.csv", None, "formats/F17b_XRP-USDT-SWAP_funding.csv"],
]  # fmt: skip


def read_others(folder, symbol):
    mark, funding = (sorted(folder.glob(f"binance-um_{symbol}_{kind}_*.parquet")) for kind in ("mark", "funding"))
    return (read_series(mark[0], "mark") if mark else None, read_series(funding[0], "funding") if funding else None)


@pytest.mark.parametrize("name, symbol", PAIRS)
def test_good_markets_pass_byte_for_byte(shared_data, name, symbol):
    series = read_series(shared_data / name)
    judged = look(series, *read_others(shared_data, symbol), symbol=symbol)
    assert judged.words == ()
    assert judged.candles.equals(series.table.select(CANDLES.names))


@pytest.mark.parametrize("name", ALONE)
def test_good_files_alone_pass(shared_data, name):
    series = read_series(shared_data / name)
    assert look(series, symbol=series.symbol).has_volume


@pytest.mark.parametrize("names", TRIPLES)
def test_good_files_together_pass(shared_data, names):
    kinds = ("candles", "mark", "funding")
    assert look(*(n and read_series(shared_data / n, k) for n, k in zip(names, kinds, strict=True)), symbol=None)


@pytest.mark.parametrize("name, symbol", [x for x in PAIRS if "5m" not in x[0] or "15m" in x[0]])
def test_good_windows_pass(shared_data, name, symbol):
    """A user has three weeks, or a month and a half: the rules hold in windows as in the whole."""
    series = read_series(shared_data / name)
    mark, funding = read_others(shared_data, symbol)
    stamps = series.table["open_time_ms"].to_numpy()
    for days in (4, 21, 45):
        for start in np.arange(stamps[0], stamps[-1] - days * DAY, max(days, 15) * DAY):
            cut = slice_series(series, start, start + days * DAY)
            others = [x and slice_series(x, start, start + days * DAY) for x in (mark, funding)]
            try:
                look(cut, *others, symbol=symbol)
            except DataError as error:
                raise AssertionError(f"{days} days: {error}") from error


def slice_series(series, start, end):
    stamps = series.table.column(0).to_numpy()
    low, high = np.searchsorted(stamps, [start, end])
    return series._replace(table=series.table.slice(low, high - low))


def test_a_spot_outage_and_a_shared_crash_pass(shared_data):
    # 2025-10-10: 60 % within minutes, confirmed by volume even without the mark.
    for name, symbol in PAIRS[4:7]:
        assert abs(look(read_series(shared_data / name), symbol=symbol).moves[0][1]) > 0.3


ODD = [
    ("M05_mark_of_another_coin.csv", "mark", "M00_BTCUSDT.csv", "another coin", "accept_mark", True),
    ("M01_BTCUSDT_funding_percent.csv", "funding", "M00_BTCUSDT.csv", "divide percent by 100", "rate_unit", "percent"),
    ("M03_BTCUSDT_funding_bps.csv", "funding", "M00_BTCUSDT.csv", "divide basis points by 10 000", "rate_unit", "bp"),
    ("M20_BTCUSDT_funding_1h_one_missing.csv", "funding", "M20_BTCUSDT.csv", "2025-10-30 20:00 UTC is missing",
     "accept_funding", True),
    ("M08_BTCUSD_moving_candles_without_volume.csv", None, None, "3 candles moved", "volume_unknown", True),
    ("M07_BTCUSD_float32_prices.csv", None, None, "3 candles moved", "volume_unknown", True),
    ("M10_NEARUSDT_89_percent_missing.csv", None, None, "480 of 539 candles are missing .89.1%", "allow_gaps", True),
    ("M11_BTCUSDT_bad_print.csv", None, None, "row 30 .2023-01-01 07:30 UTC.: low = 0.1", "accept_jumps", True),
    ("M16_BTCUSDT_quote_volume.csv", None, None, "volume x price is 2.3e.13", "volume_unknown", True),
]  # fmt: skip


@pytest.mark.parametrize("name, kind, partner, word, option, value", ODD)
def test_odd_inputs_are_refused(shared_data, name, kind, partner, word, option, value):
    odd = shared_data / "odd_inputs"
    series = read_series(odd / name, kind or "candles")
    main = read_series(odd / partner) if partner else series
    tables = [main, series if kind == "mark" else None, series if kind == "funding" else None]
    judged = refuse([word], *tables, symbol=main.symbol, accepted_by={option: value})
    if name.startswith("M01"):
        assert judged.funding["funding_rate"].to_pylist() == [1e-4, 1e-4]
    if name.startswith("M03"):
        assert judged.funding["funding_rate"].to_pylist() == [0.003, 0.003]


def test_other_real_faults_are_refused(shared_data):
    refuse(["14 candles moved"], read_series(shared_data / "formats/F25_BTCUSD_M15.csv"))
    refuse(["1 weekend"], read_series(shared_data / "formats/F40_BTCUSD_M15.csv"), symbol="BTCUSD")
    gaps = shared_data / "raw_samples/odd/bitget_SOL_USDT_USDT-3m-futures_gaps.feather"
    refuse(["164801 of 219757"], read_series(gaps), accepted_by={"allow_gaps": True})
    candles_, (mark, _) = read_series(shared_data / PAIRS[0][0]), read_others(shared_data, "BTCUSDT")
    other = read_series(shared_data / "binance-um_ORCAUSDT_mark_1h_20241231_20260219.parquet", "mark")
    orca = read_series(shared_data / PAIRS[4][0])
    for lag in (HOUR, -HOUR, 8 * HOUR):
        moved = mark._replace(table=mark.table.set_column(0, mark.table.schema.field(0), move(mark, lag)))
        refuse(["fits the last price better"], candles_, moved, symbol="BTCUSDT")
    moved = orca._replace(table=orca.table.set_column(0, orca.table.schema.field(0), move(orca, 3 * MINUTE)))
    refuse(["better 3 minutes earlier|better 3 minutes later"], moved, other, symbol="ORCAUSDT")
    refuse(["median price"], orca, symbol="BTCUSDT")
    for factor, word in ((100, "percent"), (10_000, "basis points")):
        for name, symbol in (PAIRS[0], PAIRS[4]):
            series = read_others(shared_data, symbol)[1]
            scaled = series.table["funding_rate"].to_numpy() * factor
            table = series.table.set_column(1, series.table.schema.field(1), [scaled])
            refuse([word], read_series(shared_data / name), None, series._replace(table=table), symbol=symbol)


def move(series, lag):
    return [series.table.column(0).to_numpy() + lag]


def test_local_hours_of_a_web_export(shared_data):
    lines = next((shared_data / "formats").glob("F11_*.csv")).read_text("utf-8-sig").splitlines()[1:]
    cells = [line.strip('"').split('","') for line in lines]
    stamps = np.array([c[0] for c in cells], "datetime64[ms]").astype(np.int64)
    series = rates(stamps, np.array([float(c[3].strip('%"')) / 100 for c in cells]))
    refuse(["1, 9, 17 h"], read_series(shared_data / PAIRS[0][0]), None, series, symbol="BTCUSDT")


def test_every_option_of_a_refusal_exists():
    names = {f.name for f in dataclasses.fields(Choices)}
    text = Path(sys.modules[judge.__module__].__file__).read_text()
    for option in set(re.findall(r"--([a-z]+(?:-[a-z]+)*)", text)):
        assert option.replace("-", "_") in names, option
