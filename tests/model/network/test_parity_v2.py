"""One random state dict in torchvision's V2 networks and in ours: the same detections, losses and running statistics.

Mask R-CNN and Faster R-CNN in full, with ResNet-50 and all widths, on an image like COCO's; few proposals are enough.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2, maskrcnn_resnet50_fpn_v2

from model.config import ModelConfig
from model.network.mask_rcnn import LOSSES, MaskRCNN

from ..conftest import Record, make_batch
from .test_parity import (
    EXHAUSTIVE,
    TORCHVISION_LOSSES,
    assert_same_detections,
    padded_size,
    pycocotools_mask_targets,
    torchvision_inputs,
)

THEIRS = {"mask": maskrcnn_resnet50_fpn_v2, "box": fasterrcnn_resnet50_fpn_v2}
V2: dict[str, Any] = {"weights": "none", "conventions": "torchvision", "box_head": "conv", "rpn_convs": 2}
PROPOSALS = 70


def ours(task: str, norm: str, **changes: Any) -> MaskRCNN:
    numbers = {"rpn_post_nms_top_n_train": PROPOSALS, "rpn_post_nms_top_n_test": PROPOSALS}
    numbers |= {"rpn_batch_size": EXHAUSTIVE, "roi_batch_size": 4 * (PROPOSALS + 20)}
    return MaskRCNN(ModelConfig(**V2 | numbers | {"task": task, "norm": norm, "head_norm": norm} | changes), 90)


def published_names(task: str) -> tuple[str, int]:
    """What torchvision says of its own: the name of the file, and the number of parameters."""
    published = get_model_weights(THEIRS[task])["COCO_V1"]
    return published.url.rpartition("/")[2], published.meta["num_params"]


@pytest.mark.parametrize(("task", "parameters"), [("mask", 46_359_409), ("box", 43_712_278)])
def test_the_networks_are_torchvisions_by_name_shape_and_number(task: str, parameters: int) -> None:
    with torch.device("meta"):
        theirs, mine = THEIRS[task](weights=None, weights_backbone=None), ours(task, "batch_norm")
    shapes = ({name: value.shape for name, value in model.state_dict().items()} for model in (theirs, mine))
    assert next(shapes) == next(shapes)
    assert sum(p.numel() for p in mine.parameters()) == parameters == published_names(task)[1]


def lively(task: str) -> nn.Module:
    """torchvision's network with random weights and statistics that detect things."""
    torch.manual_seed(0)
    options = {"rpn_post_nms_top_n_train": PROPOSALS, "rpn_post_nms_top_n_test": PROPOSALS}
    options |= {"rpn_batch_size_per_image": EXHAUSTIVE, "box_batch_size_per_image": 4 * (PROPOSALS + 20)}
    model: nn.Module = THEIRS[task](weights=None, weights_backbone=None, min_size=1, max_size=10**6, **options)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.weight.data.mul_(0.3 if name.endswith("bn3") else 1.0)
            nn.init.normal_(module.bias, 0, 0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "rpn.head" in name:
            parameter.data.mul_(4)
        if "cls_score.weight" in name:
            nn.init.normal_(parameter, 0, 0.6)
        if "box_predictor.bbox_pred.weight" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return model


def halved(record: Record) -> Record:
    """Every other pixel: our RPN computes its convolutions anew for each sampled anchor, which are all here."""
    polygons = [[part / 2 for part in parts] for parts in record["polygons"]]
    image, boxes = record["image"][:, ::2, ::2], record["boxes"] / 2
    return {"image": image, "boxes": boxes, "labels": record["labels"], "polygons": polygons}


def their_losses(theirs: nn.Module, record: Record) -> dict[str, Tensor]:
    height, width = record["image"].shape[1:]
    masks = torch.zeros(len(record["labels"]), height, width, dtype=torch.uint8)
    targets = {"boxes": record["boxes"], "labels": record["labels"], "masks": masks}
    where = "torchvision.models.detection.roi_heads.project_masks_on_boxes"
    with mock.patch(where, pycocotools_mask_targets(record)):
        losses: dict[str, Tensor] = theirs(torchvision_inputs(theirs, [record]), [targets])
    return losses


@pytest.mark.parametrize("task", ["mask", "box"])
@torch.no_grad()
def test_detections_losses_and_statistics_are_torchvisions(task: str, coco_records: list[Record]) -> None:
    record, theirs = halved(coco_records[0]), lively(task)
    size = padded_size([record])
    # As it is fine-tuned, with frozen norms, and then as it is trained from scratch.
    frozen, trained = ours(task, "frozen_batch_norm").train(), ours(task, "batch_norm").train()
    for model in (frozen, trained):
        model.load_state_dict(theirs.state_dict(), strict=model is trained)
    found = frozen.eval()(make_batch([record], *size, with_targets=False))
    height, width = record["image"].shape[1:]
    assert_same_detections(found, 0, theirs.eval()(torchvision_inputs(theirs, [record]))[0], (height, width))

    theirs.rpn.train()
    theirs.roi_heads.train()
    theirs.training = True
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for model in (frozen.train(), trained):
        losses, expected = model(make_batch([record], *size)), their_losses(theirs, record)
        assert set(losses) == set(LOSSES[task])
        assert min(losses.values()) > 0.001, "each part must have something to learn"
        for name in losses:
            torch.testing.assert_close(losses[name], expected[TORCHVISION_LOSSES[name]], rtol=1e-4, atol=1e-6, msg=name)
        theirs.train()  # for the second
    mine, others = trained.state_dict(), theirs.state_dict()
    statistics = [name for name in others if name.endswith(("running_mean", "running_var"))]
    for name in statistics:
        torch.testing.assert_close(mine[name], others[name], rtol=1e-4, atol=1e-4, msg=name)
