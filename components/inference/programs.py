"""Exported programs: the network in a file for each bucket, compared with the network, and export.json."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from components.config import Config
from components.inference.agreement import beyond, differences
from components.runs.environment import git_commit
from components.runs.lock import writing
from components.runs.trained import Trained, load_trained, open_split, run_around
from cuda_ops import library
from model.config import DataConfig
from model.data.collate import collate, smallest_bucket
from model.data.dataset import CocoDataset
from model.data.index import CocoIndex
from model.data.loader import eval_batches
from model.data.transforms import resized_size
from model.engine.precision import set_float32_products
from model.errors import UserError
from model.files import replacing, write_atomically
from model.inference.export import MAX_BATCH, Detector, export_detector
from model.inference.formats import FORMATS, Detect, Format
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch

CHECKED_IMAGES = 4  # per bucket


class ExportError(UserError):
    """The network cannot be exported, or its program gives other results."""


def export(config: Config, checkpoint: str, folder: Path, file_format: str) -> list[dict[str, Any]]:
    """Export a checkpoint into a folder.

    Args:
        config: configuration of the stage.
        checkpoint: `last`, `best` or a path.
        folder: where the programs and export.json go.
        file_format: one of FORMATS.

    Returns:
        Entries of export.json.

    Raises:
        ExportError: if the operators are not compiled for train.device, or a program disagrees with the network.
        UserError: if the checkpoint or prepared data with its classes is missing.
        RunInUseError: if another stage writes into the folder, or into the run that it belongs to.
    """
    with writing(run_around(folder, config.train.output_dir), "export"):
        return _export_all(config, checkpoint, folder, file_format)


def _export_all(config: Config, checkpoint: str, folder: Path, file_format: str) -> list[dict[str, Any]]:
    if file_format == "onnx":  # one file serves every device
        config = config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
    trained = load_trained(config, checkpoint)
    device = next(trained.loaded.model.parameters()).device
    if not library.serves(device):
        raise ExportError(
            f"export: the operators must be compiled for {device.type}, got their plain torch versions, which cannot "
            "be exported; "
            f"see `python -m cuda_ops` for the reason; {library.VARIABLE} must not be `reference`"
        )
    index = open_split(trained, config.evaluate.split)
    folder.mkdir(parents=True, exist_ok=True)
    set_float32_products(device, "float32")
    programs = [_export(trained, index, bucket, folder, FORMATS[file_format]) for bucket in trained.config.data.buckets]
    content = {"format": file_format} | describe(trained, programs)
    write_atomically(folder / "export.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return programs


def describe(trained: Trained, programs: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the content of export.json."""
    data, model = trained.config.data, trained.loaded.model
    return {
        "checkpoint": trained.name,
        "step": trained.loaded.step,
        "train_data_hash": trained.loaded.data_hash,
        "commit": git_commit(),
        "torch": torch.__version__,
        "task": model.task,
        "conventions": model.conventions,  # rule for pasting masks
        "device": next(model.parameters()).device.type,
        "class_names": list(trained.loaded.class_names),
        "category_ids": list(trained.loaded.category_ids),
        "min_size_px": data.eval_min_size_px,  # shorter side of resized images, unless the longer exceeds max_size_px
        "max_size_px": data.eval_max_size_px,
        "max_batch": MAX_BATCH,
        "programs": programs,
    }


def sample(index: CocoIndex, data: DataConfig, bucket: tuple[int, int]) -> Batch | None:
    """Batch of the first images of a split that belong to a bucket; None if there are none."""
    for numbers in eval_batches(index, data, CHECKED_IMAGES, (0, 1)):
        size = resized_size(index.size(numbers[0]), data.eval_min_size_px, data.eval_max_size_px)
        if smallest_bucket([size], data.buckets) == bucket:
            dataset = CocoDataset(index, data, training=False)
            return collate([dataset[i] for i in numbers], data.buckets)
    return None


def _export(
    trained: Trained, index: CocoIndex, bucket: tuple[int, int], folder: Path, file_format: Format
) -> dict[str, Any]:
    """Write and check one program; return its entry of export.json."""
    model = trained.loaded.model
    height, width = bucket
    path = folder / f"{height}x{width}.{file_format.ending}"
    with replacing(path) as partial:
        with warnings.catch_warnings():
            # torch warns about weights in channels-last memory, but they are complete; the loaded program is checked
            # below.
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")
            file_format.save(export_detector(model, bucket), partial)
        batch = sample(index, trained.config.data, bucket)
        found, objects = ({}, 0) if batch is None else compare(model, batch, file_format.load(partial))
        if batch is not None and (far := beyond(found, file_format.tolerance)):
            raise ExportError(
                f"{path}: must agree with the network within {file_format.tolerance}, got differences of {far}"
                + _excuse(beyond(rounding(model, batch), file_format.tolerance))
            )
    return {
        "file": path.name,
        "height": height,
        "width": width,
        "checked_images": 0 if batch is None else len(batch),
        "checked_objects": objects,
        "largest_differences": found,
    }


def _excuse(noise: dict[str, float]) -> str:
    """The end of the error, where the network does not agree with itself either."""
    if not noise:
        return ""
    return (
        f". The network itself differs by {noise} where sums are taken in another order: its values are so large that "
        "float32 rounds them too coarsely, as with frozen norms or weights that were never trained. Train it, or start "
        "from pre-trained weights (model.weights)"
    )


def rounding(model: MaskRCNN, batch: Batch) -> dict[str, float]:
    """Differences of the network from itself with convolutions whose sums are in another order; see `differences`."""
    device = next(model.parameters()).device
    inputs = batch.images.to(device), batch.image_sizes.to(device)
    with torch.no_grad():
        usual = Detector(model)(*inputs)
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            other = Detector(model)(*inputs)
    return differences(usual, other, _min_score(model))[0]


def _min_score(model: MaskRCNN) -> float:
    return 0.0 if model.roi_heads is None else model.roi_heads.config.score_threshold


def compare(model: MaskRCNN, batch: Batch, detect: Detect) -> tuple[dict[str, float], int]:
    """Compare a program with the network on a batch; see `differences`."""
    device = next(model.parameters()).device
    inputs = batch.images.to(device), batch.image_sizes.to(device)
    with torch.no_grad():
        return differences(Detector(model)(*inputs), detect(*inputs), _min_score(model))
