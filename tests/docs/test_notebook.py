"""The notebooks have outputs without a trace of their machine, run from their own folder, and are thin."""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra: pip install -e '.[notebooks]'")
nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra: pip install -e '.[notebooks]'")

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LINES = 25
BYTES = 300_000
STEPS = 20_000
"""Environment steps of a training run here. The committed outputs are those of a longer one."""
TRACES = re.compile(
    r"/(root|tmp|home|work|Users|var|usr|opt)/|[A-Z]:\\\\|steps/s|Warning|warning:|Traceback|object at 0x|cpu \("
)
CHECKS = {
    "01_quickstart": ["assert evaluation.trades.num_rows == evaluation.record['lots']['lots']"],
    "02_your_market": [
        "assert (folder / 'report.html').stat().st_size > 10_000",
        "assert abs(steps['net'] - sum(evaluation.trades['net'].to_pylist())) < 1e-6",
    ],
    "03_one_bar": [
        "assert [life.exit.how for life in lives.values()] == ['stopped', 'liquidated', 'target']",
        "assert stop - slippage - depth == lives['nearest'].exit.price",
        "assert [x.get_gid() for x in ax.lines if (x.get_gid() or '').startswith('entry')]"
        " == [f'entry {n}' for n in range(1, 5)]",
    ],
}
"""Statements after the last cell of each notebook."""


def list_outputs(notebook) -> list:
    return [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == sorted(CHECKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_thin(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code and notebook.cells[0].cell_type == "markdown"
    for cell in code:
        assert len(cell.source.splitlines()) <= LINES, cell.source.splitlines()[0]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_has_clean_outputs(path):
    """Those of one run from the first cell to the last: `python notebooks/run.py`."""
    notebook, text = nbformat.read(path, as_version=4), path.read_text()
    assert len(text) < BYTES
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert all(c.metadata == {} for c in notebook.cells)
    outputs = list_outputs(notebook)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    for output in outputs:
        shown = [output.get("text", ""), *(x for kind, x in output.get("data", {}).items() if kind != "image/png")]
        for part in shown:
            assert not TRACES.search(str(part)), TRACES.search(str(part))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # zmq's sockets, at exit
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path, monkeypatch, tmp_path):
    """The same cells, with a short training."""
    monkeypatch.setenv("PERPJAX_STEPS", str(STEPS))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # any other than the kernel's own shows no picture
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(check) for check in CHECKS[path.stem]]
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    before = sorted(FOLDER.rglob("*"))
    outputs = list_outputs(client.execute())
    assert not [o for o in outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    # It leaves nothing in the repository, and says nothing of warnings.
    assert sorted(FOLDER.rglob("*")) == before
    noise = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "Warning" not in noise, noise
