"""Paths of checkpoints: by the pointers `last_checkpoint` and `best_checkpoint` in a run's folder. Needs no torch."""

import zipfile
from pathlib import Path

from model.errors import UserError

LAST, BEST = "last_checkpoint", "best_checkpoint"  # files in a run's folder: each holds the path of a checkpoint there
POINTERS = {"last": LAST, "best": BEST}
NO_BEST = "\n"  # content of best_checkpoint in a run in which no checkpoint is marked as the best


class CheckpointError(UserError):
    """A checkpoint is absent or cannot be read."""


def find_checkpoint(run_dir: Path, pointer: str) -> Path | None:
    """The checkpoint that a run's `last_checkpoint` or `best_checkpoint` names; None where there is none yet.

    Raises:
        CheckpointError: if the pointer names a file that is not there.
    """
    pointer_path = run_dir / pointer
    if not pointer_path.is_file() or (pointer == BEST and not has_best(run_dir)):
        return None
    path = run_dir / pointer_path.read_text(encoding="utf-8", errors="replace").strip()
    if not path.is_file():
        raise CheckpointError(
            f"{pointer_path}: must name a checkpoint of this run, got {path}, which does not exist; "
            f"put the file back, or name another in {pointer}"
        )
    return path


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return find_checkpoint(run_dir, LAST)


def has_best(run_dir: Path) -> bool:
    """True if a checkpoint of the run is marked as the best, whether or not it is still there."""
    pointer = run_dir / BEST
    return pointer.is_file() and pointer.read_text(encoding="utf-8", errors="replace") != NO_BEST


def require_checkpoint(run_dir: Path, checkpoint: str) -> Path:
    """The path of a checkpoint that must exist, and be whole as far as that shows without torch.

    Args:
        checkpoint: `last` or `best` of the run, or a path.

    Raises:
        CheckpointError: if there is none, or it is no zip archive.
    """
    path = _require_named(run_dir, checkpoint)
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: not a readable checkpoint (no zip archive, as torch.save writes them, or not to its end); "
            "use an earlier one beside it"
        )
    return path


def _require_named(run_dir: Path, checkpoint: str) -> Path:
    pointer = POINTERS.get(checkpoint)
    if pointer is None:
        require_file(Path(checkpoint))
        return Path(checkpoint)
    path = find_checkpoint(run_dir, pointer)
    if path is None:
        raise CheckpointError(
            f"{run_dir}: has no {checkpoint} checkpoint. `maskrcnn train` writes the last one there, and the best one "
            "with evaluate.every_epoch; or name the file of another checkpoint"
        )
    return path


def require_file(path: Path) -> None:
    """Refuse the path of a checkpoint that does not exist.

    Raises:
        CheckpointError: if there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; `maskrcnn train` writes them to <train.output_dir>/checkpoints"
        )
