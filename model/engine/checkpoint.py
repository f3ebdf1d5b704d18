"""Checkpoints: written whole or not at all, found through pointers.py, never unpickled as code.

A checkpoint holds all that continuing needs: weights, optimizer, step, configuration, classes, the data's hash, the
MLflow run. There is no generator state in it because there is none: data order, augmentation and sampling are functions
of seed and step.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.engine.pointers import BEST, LAST, CheckpointError, find_checkpoint, require_file
from model.files import make_folder, replacing, write_atomically
from model.network.mask_rcnn import MaskRCNN

_NEEDED = {"model", "config", "step"}  # keys


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and what it must be used with."""

    model: MaskRCNN  # frozen, in evaluation mode, on the device asked for
    config: dict[str, Any]  # the whole configuration, as plain data
    class_names: tuple[str, ...]  # names of labels 1, 2, …
    category_ids: tuple[int, ...]  # COCO's ids of labels 1, 2, …
    step: int
    data_hash: str
    path: Path
    max_iters: int = 0  # steps of the whole training; 0 in checkpoints of earlier versions


def save_checkpoint(run_dir: Path, step: int, state: Mapping[str, Any], *, keep_last: int = 0) -> Path:
    """Write `checkpoints/step_<step>.pt`, then point `last_checkpoint` at it, then drop the oldest.

    Args:
        keep_last: newest checkpoints to keep, beside the best; 0 keeps all.
    """
    path = run_dir / "checkpoints" / f"step_{step:07d}.pt"
    make_folder(path.parent)
    write_tensors({**state, "step": step}, path, sync=True)  # on the disk before anything points at it
    write_atomically(run_dir / LAST, f"{path.relative_to(run_dir).as_posix()}\n", sync=True)
    if keep_last:
        kept = {find_checkpoint(run_dir, BEST)}
        for old in sorted(path.parent.glob("step_*.pt"))[:-keep_last]:
            if old not in kept:
                old.unlink()
    return path


def mark_best(run_dir: Path) -> None:
    """Point `best_checkpoint` at the last checkpoint: it is never dropped."""
    write_atomically(run_dir / BEST, (run_dir / LAST).read_text(encoding="utf-8"), sync=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The stored dictionary, tensors on the CPU.

    Raises:
        CheckpointError: if the file is absent, damaged, or not a checkpoint of ours.
    """
    require_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error}); use an earlier one beside it") from error
    if not isinstance(state, dict) or not state.keys() >= _NEEDED:
        raise CheckpointError(
            f"{path}: must be a checkpoint of `maskrcnn train` (model, config, step), got something else"
        )
    return state


def is_checkpoint(path: Path) -> bool:
    """True for a checkpoint of ours, False for any other file, such as a state dict."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        return False  # who reads it as weights says why it cannot be read
    return isinstance(state, dict) and state.keys() >= _NEEDED


def load_model(path: Path, device: torch.device) -> LoadedModel:
    """The network of a checkpoint, frozen and ready to detect, with the moving average of its weights if it has one."""
    state = read_checkpoint(path)
    config, class_names = state["config"], tuple(state["class_names"])
    model = MaskRCNN(ModelConfig.model_validate_json(json.dumps(config["model"])), len(class_names))
    model.load_state_dict(state["model"] | state.get("average", {}))
    return LoadedModel(
        model=model.to_device(device).eval().requires_grad_(False),
        config=config,
        class_names=class_names,
        category_ids=tuple(state["category_ids"]),
        step=state["step"],
        data_hash=state["data_hash"],
        path=path,
        max_iters=state.get("max_iters", 0),
    )


def save_weights(loaded: LoadedModel, path: Path) -> None:
    """Write what using a network needs, and nothing that only continuing its training would; `load_model` reads it."""
    state = {
        "model": {name: tensor.cpu() for name, tensor in loaded.model.state_dict().items()},
        "config": loaded.config,
        "class_names": list(loaded.class_names),
        "category_ids": list(loaded.category_ids),
        "step": loaded.step,
        "data_hash": loaded.data_hash,
    }
    write_tensors(state, path)


def write_tensors(content: Any, path: Path, *, sync: bool = False) -> None:
    """Write a file with torch.save, whole or not at all.

    Raises:
        OSError: if the system refuses it, for example since the disk is full; torch hides that in a RuntimeError.
    """
    with replacing(path, sync=sync) as partial, partial.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(cause := error.__context__, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise
