"""Run docs/tour.ipynb and keep what it shows: `make tour`, after a change of the notebook or of what stages print.

It trains, so it takes eight minutes on 2 cores. Data and run are made in a temporary folder. The second of two runs is
kept: its training continues from the end of the first, so that no times of this machine are shown. MLflow is off, since
it logs the creation of its database.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from model.files import write_atomically

NOTEBOOK = Path(__file__).parent / "tour.ipynb"
OVERRIDES = "tracking.enabled=false"


def run(folder: Path, overrides: str) -> nbformat.NotebookNode:
    """Run the notebook from its first cell to its last; return it with its outputs.

    Args:
        folder: folder for data and runs.
        overrides: of the recipe, as words of a shell.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = dict(notebook.metadata)
    root = str(NOTEBOOK.parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    settings = {**os.environ, "TOUR_DIR": str(folder), "TOUR_OVERRIDES": overrides, "PYTHONPATH": path}
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False).execute(env=settings)
    notebook.metadata = nbformat.from_dict(metadata)  # without the version of this Python
    return notebook


def main() -> None:
    """Command line of this script."""
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), OVERRIDES)
        write_atomically(NOTEBOOK, nbformat.writes(run(Path(folder), OVERRIDES)) + "\n")


if __name__ == "__main__":
    main()
