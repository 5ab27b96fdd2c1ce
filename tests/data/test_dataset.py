"""Datasets on disk: splits without leaks, a round trip to the bit, and refusal of everything that is not whole."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from perpjax._grid import FIRST_DECISION
from perpjax.data import DataError, fit_scaler, load_market
from perpjax.data.build import find_features, main
from perpjax.data.builder import build
from perpjax.data.contract import BAR_MS
from perpjax.data.dataset import (
    SPLIT_NAMES,
    Split,
    cut_split,
    fit_on_train,
    load_dataset,
    split_by_date,
    split_by_fraction,
    write_dataset,
)
from perpjax.data.scaler import attach_scaler
from perpjax.instrument import Instrument

T0 = 1_704_067_200_000  # 2024-01-01 00:00 UTC
PRICES = ("open", "high", "low", "close")
BARS = 1_073  # 400 decision bars
EPISODE = 20


def candle_columns(bars=BARS, seed=0) -> dict[str, np.ndarray]:
    """Candles of 3 minutes in ticks of 0.1."""
    rng = np.random.default_rng(seed)
    n = 5 * bars
    close = 300_000 + rng.integers(-20, 21, n).cumsum()
    open_ = np.concatenate([[300_000], close[:-1]])
    high = np.maximum(open_, close) + rng.integers(0, 10, n)
    low = np.minimum(open_, close) - rng.integers(0, 10, n)
    prices = {name: np.round(x * 0.1, 8) for name, x in zip(PRICES, (open_, high, low, close), strict=True)}
    return {"open_time_ms": T0 + 180_000 * np.arange(n), **prices, "volume": rng.uniform(1.0, 9.0, n)}


def tables(bars=BARS) -> dict[str, pa.Table]:
    """Candles with a hole, mark candles with another, and 8-hour funding."""
    columns, rng = candle_columns(bars), np.random.default_rng(1)
    columns["volume"][1_000:1_007] = 0.0  # nothing traded, so nothing moved
    for name in PRICES:
        columns[name][1_000:1_007] = columns["close"][999]
    mark = {name: columns[name] + (0 if name == "open_time_ms" else 0.03) for name in ("open_time_ms", *PRICES)}
    stamps = T0 + 8 * 3_600_000 * np.arange(bars // 32 + 1) + 3
    return {
        "candles": pa.table(columns).filter(~np.isin(np.arange(5 * bars), [2_000, 2_001])),
        "mark": pa.table(mark).filter(np.arange(5 * bars) != 3_000),
        "funding": pa.table({"time_ms": stamps, "funding_rate": rng.normal(0, 1e-4, len(stamps))}),
    }


def _same_bits(a, b):
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def assert_identical(one, two):
    """Bit for bit, and on the host as well."""
    jax.tree.map(lambda a, b: _same_bits(np.asarray(a), np.asarray(b)), one, two)
    for name in ("origins", "feature_names", "candles_per_bar", "has_mark"):
        assert getattr(one, name) == getattr(two, name)


@pytest.fixture(scope="module")
def market():
    return build(pa.table(candle_columns()), instrument=Instrument()).market


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / f"BTCUSDT_{name}.parquet" for name in ("candles", "mark", "funding")}
    for name, table in tables().items():
        pa.parquet.write_table(table, paths[name])
    return paths


def arguments(files, *more) -> list[str]:
    given = [str(x) for name, path in files.items() for x in (f"--{name}", path)]
    return [*given, "--episode-length", str(EPISODE), *map(str, more)]


@pytest.fixture(scope="module")
def dataset(files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("datasets") / "btc"
    assert main(arguments(files, "--out", out)) == 0
    return out


@pytest.fixture
def copy(dataset, tmp_path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


# --- splits ----------------------------------------------------------------------------------------------------


def test_splits_are_fractions_in_order_with_an_embargo_of_one_episode(market):
    # Decision bars 673 .. 1072 are 400: 70 % end before 953, 85 % before 1013; 20 bars are missing before each.
    splits = split_by_fraction(market, episode_length=EPISODE)
    assert splits == (Split("train", 673, 933), Split("val", 953, 993), Split("test", 1013, 1073))
    # An episode of 20 bars that starts at 673 .. 913 fits into 673 .. 932.
    assert [s.num_starts(EPISODE) for s in splits] == [241, 21, 41]
    for split in splits:
        cut = cut_split(market, split)
        assert cut.num_starts(EPISODE) == split.num_starts(EPISODE)
        assert cut.segments.first.tolist() == [FIRST_DECISION]
        assert cut.num_bars == FIRST_DECISION + split.stop - split.start
        assert cut.open_time_ms(FIRST_DECISION) == market.open_time_ms(split.start)
        rows = slice(split.start - FIRST_DECISION, split.stop)
        np.testing.assert_array_equal(cut.candles, market.candles[rows])
        np.testing.assert_array_equal(cut.features[FIRST_DECISION:], market.features[split.start : split.stop + 1])


def test_splits_by_date(market):
    # Day d begins with bar 96 d (d = 0 is 2024-01-01): the 9th is bar 768, the 11th bar 960.
    splits = split_by_date(market, "2024-01-09", "2024-01-11", EPISODE)
    assert splits == (Split("train", 673, 748), Split("val", 768, 940), Split("test", 960, 1073))


@pytest.mark.parametrize(
    ("dates", "words"),
    [
        (("2024-01-09", "tomorrow"), "val end 'tomorrow' is not a date such as 2025-06-01"),
        (
            ("2024-01-05", "2024-01-09"),
            "train end 2024-01-05 is not inside the data; .* 2024-01-08 00:15 to 2024-01-12",
        ),
        (("2024-01-09", "2024-01-13"), "val end 2024-01-13 is not inside the data"),
        (("2024-01-10", "2024-01-09"), "train end 2024-01-10 is not before val end 2024-01-09"),
        (("2024-01-09", "2024-01-09"), "is not before"),
    ],
)
def test_dates_outside_the_data_or_out_of_order_are_refused(market, dates, words):
    with pytest.raises(ValueError, match=words):
        split_by_date(market, *dates, EPISODE)


def test_splits_without_an_episode_or_of_odd_fractions_are_refused(market):
    # Of 60 validation bars an episode and its embargo need 31 + 31.
    assert split_by_fraction(market, episode_length=30)[1].num_starts(30) == 1
    with pytest.raises(
        ValueError, match="the val split has no room for an episode of 31 bars: it has 29 decision bars"
    ):
        split_by_fraction(market, episode_length=31)
    for fractions in ((0.7, 0.2, 0.2), (1.0, 0.0, 0.0), (0.9, 0.2, -0.1), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ValueError, match="are not three positive numbers that sum to 1"):
            split_by_fraction(market, fractions, EPISODE)
    with pytest.raises(ValueError, match="episode length 0"):
        split_by_fraction(market, episode_length=0)


def test_a_longer_warm_up_moves_the_splits():
    def features(bars, funding):
        x = np.arange(bars.num_rows + 1, dtype=np.float64)
        return pa.table({"x": np.where(x < 800, np.nan, x)})

    market = build(pa.table(candle_columns()), instrument=Instrument(), features=features).market
    splits = split_by_fraction(market, episode_length=EPISODE)
    assert splits[0].start == 800
    cut = cut_split(market, splits[0])
    assert cut.segments.first.tolist() == [FIRST_DECISION] and float(cut.features[FIRST_DECISION, 0]) == 800
    assert np.isfinite(cut.features[FIRST_DECISION:]).all()


def test_what_comes_after_a_split_moves_neither_it_nor_the_scaler():
    """PITFALLS 15: everything after the training split is another market, its arrays do not move by a bit."""
    columns = candle_columns()
    whole = build(pa.table(columns), instrument=Instrument()).market
    splits = split_by_fraction(whole, episode_length=EPISODE)
    for i, split in enumerate(splits[:2]):
        changed = {name: x.copy() for name, x in columns.items()}
        for name in (*PRICES, "volume"):
            changed[name][5 * split.stop :] = np.round(changed[name][5 * split.stop :] * 3, 1)
        other = build(pa.table(changed), instrument=Instrument()).market
        assert (np.asarray(other.features[split.stop + 1 :]) != np.asarray(whole.features[split.stop + 1 :])).any()
        scalers = [fit_on_train(m, splits) for m in (whole, other)]
        cuts = [cut_split(attach_scaler(m, s), split) for m, s in zip((whole, other), scalers, strict=True)]
        assert_identical(*cuts)
        assert i or scalers[0].scale.tobytes() == scalers[1].scale.tobytes()


# --- the folder ------------------------------------------------------------------------------------------------


def test_a_dataset_comes_back_to_the_bit(dataset, files):
    built = build(**tables(), symbol="BTCUSDT")
    assert built.market.has_mark and built.report.missing == 2 and built.report.untraded == 7
    splits = split_by_fraction(built.market, episode_length=EPISODE)
    scaler = fit_scaler(built.market, range(673, 933))
    market = attach_scaler(built.market, scaler)
    assert_identical(load_market(dataset), market)
    assert_identical(load_market(str(dataset)), market)
    for name, split in zip(SPLIT_NAMES, splits, strict=True):
        assert_identical(load_market(dataset, name), cut_split(market, split))
    assert load_dataset(dataset).splits == splits
    scaled = (np.asarray(market.features[673:933], np.float64) - market.scaler_mean) / market.scaler_scale
    varies = scaled.std(axis=0) > 0
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(axis=0)[varies], 1, rtol=1e-4)


def test_the_manifest_says_what_is_there(dataset):
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["instrument"]["tick_size"] == 0.1 and len(manifest["instrument"]["brackets"]) == 12
    assert manifest["span"] == {"start": "2024-01-01 00:00", "end": "2024-01-12 04:15", "start_ms": T0}
    assert (manifest["candles_per_bar"], manifest["num_bars"], manifest["interval_ms"]) == (5, BARS, 180_000)
    # Candle 2000 opens 100 hours after the start.
    assert manifest["gaps"] == [{"from": "2024-01-05 04:00", "candles": 2}]
    assert manifest["splits"]["val"] == {
        "start": 953, "stop": 993, "from": "2024-01-10 22:15", "to": "2024-01-11 08:15", "episode_starts": 21,
    }  # fmt: skip
    assert manifest["features"] == "core" and len(manifest["scaler"]) == 31
    assert sorted(manifest["files"]) == [f"{name}.parquet" for name in ("candles", "features", "funding", "mark")]
    assert sorted(p.name for p in dataset.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert str(dataset.parent) not in json.dumps(manifest)


@pytest.mark.parametrize("name", ["candles", "mark", "funding", "features"])
def test_a_changed_or_missing_file_is_refused_by_name(copy, name):
    path = copy / f"{name}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}.parquet: is not the file that was written \(SHA-256"):
        load_market(copy)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}.parquet: is missing"):
        load_market(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m | {"schema_version": 3}, "has schema version 3, this perpjax reads 1 and 2; upgrade perpjax"),
        (lambda m: m | {"schema_version": 0}, "has schema version 0, .*; build the dataset again"),
        (lambda m: m | {"num_bars": 5}, "was changed after it was written"),
        (lambda m: {"files": {}}, "is not a manifest"),
        (lambda m: [], "is not a manifest"),
    ],
)
def test_a_manifest_of_another_version_or_changed_by_hand_is_refused(copy, change, words):
    path = copy / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=f"manifest.json: {words}"):
        load_market(copy)


def test_a_broken_or_missing_manifest_is_refused(copy):
    path = copy / "manifest.json"
    path.write_text(path.read_text()[:-50])
    with pytest.raises(DataError, match=r"manifest.json: is not a manifest"):
        load_market(copy)
    path.unlink()
    with pytest.raises(DataError, match=r"copy: is not a dataset \(manifest.json is missing\).*synthetic:"):
        load_market(copy)
    with pytest.raises(DataError, match="nowhere: is not a dataset"):
        load_market(copy / "nowhere")


def test_a_failed_write_leaves_nothing_behind(tmp_path, market, monkeypatch):
    built = build(**tables(), symbol="BTCUSDT")
    splits = split_by_fraction(built.market, episode_length=EPISODE)
    scaler = fit_on_train(built.market, splits)
    bad = scaler._replace(mean=np.full(31, np.nan))  # found when the manifest, the last file, is written
    with pytest.raises(ValueError, match="JSON"):
        write_dataset(built, splits, bad, tmp_path / "new", episode_length=EPISODE)
    assert list(tmp_path.iterdir()) == []
    write_dataset(built, splits, scaler, tmp_path / "new", episode_length=EPISODE)
    before = load_market(tmp_path / "new")
    with pytest.raises(ValueError, match="JSON"):
        write_dataset(built, splits, bad, tmp_path / "new", episode_length=EPISODE, force=True)

    def refuse(self, target):
        if self.name == "new" and self.parent.name.startswith("."):
            raise OSError("disk on fire")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="on fire"):
        write_dataset(built, splits, scaler, tmp_path / "new", episode_length=EPISODE, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    assert_identical(load_market(tmp_path / "new"), before)


# --- the command line ------------------------------------------------------------------------------------------


def test_the_command_line_shows_what_it_found_and_writes_only_where_told(files, tmp_path, capsys):
    assert main(arguments(files)) == 0
    shown = capsys.readouterr().out
    for words in (
        "BTCUSDT",
        "K = 5",
        "1: from 2024-01-05 04:00 (2)",
        "2 missing, 7 without volume",
        "241",
        "nothing written",
    ):
        assert words in shown
    out = tmp_path / "a" / "b"
    assert main(arguments(files, "--out", out, "--split", 0.5, 0.25, 0.25, "--tick-size", 0.05)) == 0
    assert [s.start for s in load_dataset(out).splits] == [673, 873, 973]
    assert float(load_market(out).instrument.tick_size) == np.float32(0.05)
    assert main(arguments(files, "--out", out)) == 2
    assert "exists; choose another folder, or replace it with --force" in capsys.readouterr().err
    dates = ("--train-end", "2024-01-09", "--val-end", "2024-01-11")
    assert main(arguments(files, "--out", out, "--force", *dates, "--features", "none")) == 0
    assert [s.start for s in load_dataset(out).splits] == [673, 768, 960]
    assert load_market(out, "val").features.shape == (673 + 172 + 1, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    assert main(arguments(files, "--out", tmp_path / "mine", "--force")) == 2
    assert "exists and is not a dataset" in capsys.readouterr().err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


def test_a_feature_function_of_the_users_is_needed_once(files, tmp_path, monkeypatch, capsys):
    source = "import pyarrow as pa\ndef two(bars, funding):\n    n = bars.num_rows + 1\n"
    (tmp_path / "mine.py").write_text(
        source + "    return pa.table({'a': [0.5] * n, 'b': [float(i) for i in range(n)]})\n"
        "def fails(bars, funding):\n    raise KeyError('nope')\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    assert main(arguments(files, "--out", out, "--features", "mine:two")) == 0
    (tmp_path / "mine.py").unlink()
    monkeypatch.delitem(sys.modules, "mine")
    market = load_market(out)
    assert market.feature_names == ("a", "b") and market.scaler_scale[0] == 1
    assert json.loads((out / "manifest.json").read_text())["features"] == "mine:two"
    (tmp_path / "mine2.py").write_text("def fails(bars, funding):\n    raise KeyError('nope')\nnumber = 3\n")
    for spec, words in [
        ("mine2:fails", "features mine2:fails: raised KeyError: 'nope'"),
        ("mine2:number", "is a int, not a function"),
        ("mine2:absent", "has no attribute 'absent'"),
        ("nomodule:f", "No module named 'nomodule'"),
        ("fancy", "'fancy' is not core, price, none or module:function"),
    ]:
        assert main(arguments(files, "--features", spec)) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--symbol", "BTCUSDT", "--candles", "nowhere.parquet"), "nowhere.parquet: no such file"),
        (("--tick-size", "0.7"), "candles.parquet: row 0: open = 30000.0 is not a multiple of the tick 0.7"),
        (("--step-size", "-1"), "step_size must be a finite positive number"),
        (("--split", "0.5", "0.5", "0.5"), "are not three positive numbers that sum to 1"),
        (("--train-end", "2024-01-09"), "give --train-end and --val-end together"),
        (("--episode-length", "300"), "11.2 days given; 49 are needed with these splits and episodes of 300 bars"),
    ],
)
def test_mistakes_are_one_line_and_status_2(files, tmp_path, capsys, more, words):
    assert main(arguments(files, "--out", tmp_path / "out", *more)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_the_scaler_is_fitted_on_traded_bars():
    columns = candle_columns()
    still = slice(5 * 700, 5 * 720)  # twenty training bars without a trade
    columns["volume"][still] = 0.0
    for name in PRICES:
        columns[name][still] = columns["close"][still.start - 1]
    market = build(pa.table(columns), instrument=Instrument()).market
    splits = split_by_fraction(market, episode_length=EPISODE)
    scaler = fit_on_train(market, splits)
    rows = [t for t in range(splits[0].start, splits[0].stop) if not 700 <= t < 720]
    np.testing.assert_allclose(scaler.mean, np.asarray(market.features, np.float64)[rows].mean(axis=0), rtol=1e-12)


def test_features_by_name():
    assert find_features("none") is None and find_features("core") == "core" and find_features("price") == "price"
    with pytest.raises(ValueError, match="is not core, price, none or module:function"):
        find_features("volume")


# --- synthetic -------------------------------------------------------------------------------------------------


def test_synthetic_markets_load_by_name_once_per_process():
    market = load_market("synthetic:signal")
    assert load_market("synthetic:signal") is market
    assert market.num_bars == 35_040
    train, val, test = (load_market("synthetic:signal", name) for name in SPLIT_NAMES)
    assert train.num_starts(672) > 20_000 and min(val.num_starts(672), test.num_starts(672)) > 3_000
    # 34367 decision bars: the validation set begins after 70 % of them.
    assert val.open_time_ms(FIRST_DECISION) == market.start_ms + BAR_MS * (673 + 24_056)
    np.testing.assert_array_equal(train.scaler_mean, val.scaler_mean)
    scaled = (np.asarray(train.features[673:-1], np.float64) - train.scaler_mean) / train.scaler_scale
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-3)
    for source, split, words in [
        ("synthetic:nonsense", None, "'nonsense' is not one of"),
        ("synthetic:signal", "training", "split 'training' is not one of train, val, test"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_market(source, split)
