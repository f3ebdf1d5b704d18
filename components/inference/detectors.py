"""Detectors to predict with, from weights alone: those that torchvision publishes, or a file without configuration."""

from collections.abc import Sequence
from pathlib import Path

import torch

from model.config import TORCHVISIONS_DETECTORS, DataConfig, ModelConfig, TrainConfig
from model.engine.checkpoint import LoadedModel
from model.network.mask_rcnn import MaskRCNN
from model.weights.architecture import read_architecture
from model.weights.conventions import OLD_NAMES
from model.weights.file import WeightsError, read_stored_weights
from model.weights.load import WeightsReport, absorb_eps, fit_weights, load_coco, rows_of_classes
from model.weights.published import COCO_CLASSES, COCO_ROWS, published_config, published_detector

_SHOWN = 3  # names of tensors in an error


def load_detector(weights: str, device: torch.device, class_names: Sequence[str] = ()) -> LoadedModel:
    """Load a network from weights that carry no configuration; image sizes are COCO's usual 800 and 1333 px.

    Args:
        weights: coco, coco_v2, or the path of a detector's state dict, by torchvision, Detectron2 or their like.
        class_names: names of labels 1, 2, …; by default COCO's 80, where the file has so many classes or torchvision's
            91 rows, else `class 1`, `class 2`, …

    Raises:
        WeightsError: if the file is absent, damaged, not a whole detector, or of another architecture; or class_names
            are not as many as its classes.
    """
    if weights in TORCHVISIONS_DETECTORS:
        config, names = published_config(weights), COCO_CLASSES
        model = MaskRCNN(config, len(names))
        _require_all(load_coco(model, config, list(names.values()), list(names)))
        return _loaded(model, config, names, device, published_detector(weights, config.task).cache)
    stored = read_stored_weights(Path(weights))
    config, named, count = read_architecture(stored, weights)
    if OLD_NAMES in stored.tensors:
        absorb_eps(named.tensors)
    names = _classes(count, class_names, weights)
    if len(names) < count:
        named.tensors.update(rows_of_classes(named.tensors, list(names)))
    model = MaskRCNN(config, len(names))
    _require_all(fit_weights(model, named, weights))
    return _loaded(model, config, names, device, Path(weights))


def _require_all(report: WeightsReport) -> None:
    if report.initialised:
        raise WeightsError(
            f"{report.source}: must hold all weights to predict with, but {len(report.initialised)} are absent or of "
            f"another shape: {', '.join(list(report.initialised)[:_SHOWN])}, …"
        )


def _classes(count: int, class_names: Sequence[str], weights: str) -> dict[int, str]:
    """Names of classes by COCO's ids."""
    if class_names:
        if len(set(class_names)) != len(class_names):
            raise WeightsError(f"{weights}: class_names must be unique, got {', '.join(class_names)}")
        if len(class_names) != count:
            raise WeightsError(f"{weights}: class_names must name its {count} classes, got {len(class_names)}")
        return dict(enumerate(class_names, 1))
    if count in (len(COCO_CLASSES), COCO_ROWS - 1):
        return COCO_CLASSES
    return {number: f"class {number}" for number in range(1, count + 1)}


def _loaded(
    model: MaskRCNN, config: ModelConfig, names: dict[int, str], device: torch.device, path: Path
) -> LoadedModel:
    sections = {"model": config, "data": DataConfig(), "train": TrainConfig()}
    return LoadedModel(
        model=model.to_device(device).eval().requires_grad_(False),
        config={name: section.model_dump(mode="json") for name, section in sections.items()},
        class_names=tuple(names.values()),
        category_ids=tuple(names),
        step=0,
        data_hash="",
        path=path,
    )
