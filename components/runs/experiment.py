"""DVC experiments that run in a temporary clone (`dvc exp run --temp`, `--queue`), which DVC deletes afterwards.

What must outlast the clone, and what git does not bring into it, is in the user's own working tree: MLflow's database,
the raw data, the compiled operators (`cuda_ops/library.py`).
"""

import os
from pathlib import Path


def working_tree() -> Path | None:
    """The user's own counterpart of the current directory; None unless that is in the clone of an experiment."""
    root = os.environ.get("DVC_ROOT")  # DVC sets it for the commands of its stages, to the user's tree also in a clone
    here = Path.cwd()
    clone = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)
    if not root or clone is None or clone == Path(root).resolve():
        return None
    return Path(root) / here.relative_to(clone)


def in_working_tree(path: Path) -> Path:
    """The path that a relative one has in the user's tree; the same path outside of experiments."""
    return (working_tree() or Path()) / path
