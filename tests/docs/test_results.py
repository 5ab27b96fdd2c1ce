"""The page of results is the one that its program writes."""

import json

import pytest

from benchmarks.harness import save
from benchmarks.results import PAGE, RESULTS, Line, describe, write_page


def test_the_page_is_written_by_its_program():
    assert PAGE.read_text() == write_page()
    assert len(PAGE.read_text().splitlines()) <= 60


def test_results_have_one_row_a_line():
    for path in RESULTS.glob("*.json"):
        rows = json.loads(path.read_text())["rows"]
        assert path.read_text().count("\n  {") == len(rows), path


@pytest.mark.parametrize(
    ("at_least", "goal", "met"), [(True, 2, "yes"), (True, 3, "no"), (False, 2, "yes"), (False, 1, "no")]
)
def test_a_goal_is_a_minimum_or_a_maximum(tmp_path, at_least, goal, met):
    save(tmp_path / "x.json", "benchmarks.x", [{"n": 1, "ratio": 2.0, "low": 1.5, "high": 2.5}, {"n": 2}])
    result = json.loads((tmp_path / "x.json").read_text())
    cells = describe(Line("x", {"n": 1}, "ratio", "faster", goal, at_least), result).split(" | ")
    assert cells[1] == "2.0 (1.5 .. 2.5)" and cells[3] == met
    missing = describe(Line("x", {"n": 2}, "ratio", "faster", goal, at_least), result).split(" | ")
    assert missing[1] == "not measured" and missing[3] == ""
    with pytest.raises(ValueError, match="0 rows"):
        describe(Line("x", {"n": 3}, "ratio", "faster"), result)
