"""The notebooks run from their own folder, without an error, and are thin."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra: pip install -e '.[notebooks]'")
nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra: pip install -e '.[notebooks]'")

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LINES = 25
CHECK = """assert [x.get_gid() for x in ax.lines if x.get_gid() and x.get_gid().startswith("entry")] == [
    f"entry {n}" for n in range(1, 5)
]"""
"""The picture of four long lots has four entries."""


def test_there_is_a_quickstart():
    assert FOLDER / "01_quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_is_thin(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code and notebook.cells[0].cell_type == "markdown"
    for cell in code:
        assert len(cell.source.splitlines()) <= LINES, cell.source.splitlines()[0]
        # Committed without results: they would be somebody's, of some day.
        assert not cell.outputs and cell.execution_count is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # zmq's sockets, at exit
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    for i in reversed(range(len(notebook.cells))):
        if "the life of four long lots" in notebook.cells[i].source:
            notebook.cells.insert(i + 1, nbformat.v4.new_code_cell(CHECK))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    before = sorted(FOLDER.iterdir())
    done = client.execute()
    outputs = [o for c in done.cells if c.cell_type == "code" for o in c.outputs]
    errors = [o for o in outputs if o.output_type == "error"]
    assert not errors
    assert any("image/png" in o.get("data", {}) for o in outputs)
    # It leaves nothing in the repository, and says nothing of warnings.
    assert sorted(FOLDER.iterdir()) == before
    noise = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stderr")
    assert "Warning" not in noise, noise
