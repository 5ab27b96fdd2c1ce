"""The picture of an evaluation shows the numbers of its files; the pictures of the README have a command."""

import importlib.util
import pathlib
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest
from evaluations import INITIAL, make_evaluation

pytest.importorskip("matplotlib", reason="needs the viz extra: pip install -e '.[viz]'")

from train.evaluate.evaluation import Evaluation
from train.evaluate.plotting import plot_evaluation
from train.report.read import read_evaluation

PICTURES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "pictures"


def find(figure, gid: str):
    """The only line of a figure with an identifier."""
    (line,) = [line for ax in figure.axes for line in ax.lines if line.get_gid() == gid]
    return line


def count_lots(figure) -> dict[str, int]:
    """The number of triangles by side and result."""
    lines = [line for line in figure.axes[1].lines if (line.get_gid() or "").startswith("lots ")]
    return {line.get_gid().removeprefix("lots "): len(line.get_xdata()) for line in lines}


def test_curves_are_those_of_the_files(tmp_path):
    make_evaluation(tmp_path)
    figure, table = plot_evaluation(tmp_path), pq.read_table(tmp_path / "equity.parquet")
    equity, line = table["equity"].to_numpy(), find(figure, "equity")
    assert np.array_equal(line.get_ydata(), equity)
    assert np.array_equal(line.get_xdata(), table["time"].to_numpy().astype("datetime64[ms]"))
    fall = find(figure, "drawdown").get_ydata()
    assert np.allclose(fall, 100 * (equity / np.maximum.accumulate(equity) - 1)) and fall.max() == 0 > fall.min()


def test_every_lot_is_one_triangle(tmp_path):
    record = make_evaluation(tmp_path, lots=90)
    figure, trades = plot_evaluation(tmp_path), pq.read_table(tmp_path / "trades.parquet")
    counts = count_lots(figure)
    assert sum(counts.values()) == trades.num_rows == record["lots"]["lots"] == 90
    open_ = np.array([x == "open" for x in trades["reason"].to_pylist()])
    long = np.array([x == "long" for x in trades["side"].to_pylist()])
    net = trades["net"].to_numpy()
    assert counts["long gain"] == (long & (net > 0) & ~open_).sum() > 0
    assert counts["short loss"] == (~long & (net <= 0) & ~open_).sum() > 0
    assert counts["long open"] + counts["short open"] == open_.sum()
    shown = find(figure, "lots long gain").get_ydata()
    chosen = long & (net > 0) & ~open_
    assert np.allclose(shown, 100 * (net / trades["notional"].to_numpy())[chosen])


def test_baselines_start_with_the_same_money(tmp_path):
    """Buy and hold ends at its return; the price at that of the market."""
    make_evaluation(tmp_path)
    found = read_evaluation(tmp_path)
    days = len(found.record["daily"]["dates"])
    for name, daily in (("market", 0.01), ("buy and hold", -0.01)):
        found.record["baselines"].append({"name": name, "daily": [daily] * days})
    figure = plot_evaluation(Evaluation(found.record, found.equity, found.trades, found.candles))
    start = found.equity["equity"][0].as_py()
    for name, factor in (("market", 1.01), ("buy and hold", 0.99)):
        curve = find(figure, name)
        assert np.allclose(curve.get_ydata(), start * factor ** np.arange(days + 1))
        assert curve.get_xdata()[-1] == find(figure, "equity").get_xdata()[-1]


def test_several_accounts_are_one_curve(tmp_path):
    """The same money in each: the mean of their growth."""
    make_evaluation(tmp_path, symbols=("AUSDT", "BUSDT"), bars=800)
    table = pq.read_table(tmp_path / "equity.parquet")
    names, values = np.array(table["account"].to_pylist()), table["equity"].to_numpy()
    parts = [values[names == name] for name in dict.fromkeys(names)]
    shown = find(plot_evaluation(tmp_path), "equity").get_ydata()
    assert np.allclose(shown, INITIAL * np.mean([part / part[0] for part in parts], axis=0))


def test_without_a_lot(tmp_path):
    make_evaluation(tmp_path, lots=0)
    figure = plot_evaluation(tmp_path, tmp_path / "flat.png")
    assert set(count_lots(figure).values()) == {0}
    assert "no lot" in [text.get_text() for text in figure.axes[1].texts]
    assert (tmp_path / "flat.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["$\\frac$ of_a_$ {run}", "策略\n\x1b[31m", "_" * 200, "<b>&amp;"])
def test_names_are_shown_as_they_are(tmp_path, name):
    """No name is a formula, a control character or a warning."""
    make_evaluation(tmp_path, policy=name, lots=10)
    figure = plot_evaluation(tmp_path, tmp_path / "picture.png")
    title = figure.axes[0].get_title(loc="left")
    if name.startswith(("$", "<")):
        assert title.startswith(f"{name} on datasets/core, val split: ")
    assert title.isprintable() and len(title) < 160
    assert [path.name for path in tmp_path.glob("*.png")] == ["picture.png"]


def test_a_folder_without_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.json: missing"):
        plot_evaluation(tmp_path)


def test_pictures_of_the_readme(tmp_path):
    """The command makes the picture of one bar anew, and both are small."""
    spec = importlib.util.spec_from_file_location("make_pictures", PICTURES / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.draw_bar(tmp_path / "bar.png")
    for name in ("bar", "equity"):
        committed = (PICTURES / f"{name}.png").read_bytes()
        assert len(committed) < 150_000
        width, height = struct.unpack(">II", committed[16:24])
        assert (width, height) == {"bar": (1100, 550), "equity": (1100, 605)}[name]
    assert struct.unpack(">II", (tmp_path / "bar.png").read_bytes()[16:24]) == (1100, 550)
