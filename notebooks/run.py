"""Execute the notebooks and save their outputs: `python notebooks/run.py`, or the names of some of them.

Needs `pip install -e '.[notebooks]'`. Everything that differs from day to day is left out of the files.
"""

import argparse
import os
import pathlib

import nbclient
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
SECONDS = 600
"""Most seconds of a cell."""


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """Return a notebook with its outputs, executed in its own folder.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources=where, record_timing=False
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "data" in output and "image/png" in output.data:
                output.data = {"image/png": output.data["image/png"]}  # without the text of its size
    return notebook


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as 01_quickstart; default all")
    names = parser.parse_args().names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    os.environ.pop("MPLBACKEND", None)  # any other than the kernel's own shows no picture
    for name in names:
        path = FOLDER / f"{pathlib.Path(name).stem}.ipynb"
        notebook = execute(path)
        nbformat.write(notebook, path)
        print(f"notebooks/{path.name}")


if __name__ == "__main__":
    main()
