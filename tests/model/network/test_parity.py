"""One random state dict in torchvision's Mask R-CNN and in ours, on images like COCO's: the same detections and the
same losses.

The networks are thin, a ResNet-18 and heads of 64 and 128 channels: test_backbone.py compares the deeper ones.
"""

from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from model.config import ModelConfig
from model.inference.postprocess import encode
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections

from ..conftest import Record, make_batch

EXHAUSTIVE = 10**6
TORCHVISION_LOSSES = {
    "objectness": "loss_objectness",
    "rpn_box_reg": "loss_rpn_box_reg",
    "classifier": "loss_classifier",
    "box_reg": "loss_box_reg",
    "mask": "loss_mask",
}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """torchvision's network with weights that are random, but lively enough to detect things."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    heads = {
        "box_head": TwoMLPHead(256 * 7 * 7, 128),
        "box_predictor": FastRCNNPredictor(128, 91),
        "mask_head": MaskRCNNHeads(256, (64,) * 4, 1),
        "mask_predictor": MaskRCNNPredictor(64, 64, 91),
    }
    model = torchvision.models.detection.MaskRCNN(backbone, None, min_size=1, max_size=10**6, **heads)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_var", "weight")):
            buffer.uniform_(0.5, 1.5, generator=generator)
            buffer.mul_(0.3 if "bn2.weight" in name else 1.0)
        elif name.endswith(("running_mean", "bias")):
            buffer.normal_(0, 0.1, generator=generator)
    for name, parameter in model.named_parameters():
        if "rpn.head" in name:
            parameter.data.mul_(4)
        if "cls_score.weight" in name:
            parameter.data.normal_(0, 0.6, generator=generator)
        if "box_predictor.bbox_pred.weight" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def ours_like(theirs: nn.Module, **changes: object) -> MaskRCNN:
    thin = {"backbone": "resnet18", "box_head_channels": 128, "mask_head_channels": 64}
    config = ModelConfig(**thin | {"weights": "none", "conventions": "torchvision"} | changes)  # type: ignore[arg-type]
    model = MaskRCNN(config, 90)
    model.load_state_dict(theirs.state_dict())
    return model


def padded_size(records: list[Record]) -> tuple[int, int]:
    heights, widths = zip(*(record["image"].shape[1:] for record in records), strict=True)
    return -(-max(heights) // 32) * 32, -(-max(widths) // 32) * 32


def torchvision_inputs(model: nn.Module, records: list[Record]) -> list[Tensor]:
    """Images as torchvision wants them, with its resizing switched off: each keeps its size."""
    model.transform.resize = lambda image, target=None: (image, target)
    return [record["image"].float() / 255 for record in records]


def assert_same_detections(ours: Detections, n: int, theirs: dict[str, Tensor], size: tuple[int, int]) -> None:
    count = int(ours.num_detections[n])
    assert count == len(theirs["scores"])
    assert count >= 50, "the weights of this test must find something"
    torch.testing.assert_close(ours.scores[n, :count], theirs["scores"], rtol=0, atol=1e-4)
    # Two whose scores differ by less than that may change places; each still has its counterpart.
    distances = (ours.boxes[n, :count] - theirs["boxes"][:, None]).abs().amax(2)  # [theirs, ours]
    distances[ours.labels[n, :count] != theirs["labels"][:, None]] = torch.inf
    ranks = distances.argmin(1)
    assert sorted(ranks.tolist()) == list(range(count))
    torch.testing.assert_close(ours.scores[n][ranks], theirs["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.boxes[n][ranks], theirs["boxes"], rtol=0, atol=0.01)
    if ours.mask_probs is None:
        return
    # Pasting truncates corners to whole pixels, so both paste into one box: 0.001 px may lie on either side of a
    # border.
    rles = encode(ours.mask_probs[n][ranks], theirs["boxes"], size, "torchvision")
    their_rles = [coco_mask.encode(np.asfortranarray(m[0].numpy() > 0.5, dtype=np.uint8)) for m in theirs["masks"]]
    assert np.count_nonzero(coco_mask.area(their_rles)) >= 25, "and their masks must show something"
    for our_rle, their_rle in zip(rles, their_rles, strict=True):
        union = coco_mask.area(coco_mask.merge([our_rle, their_rle]))
        both = coco_mask.area(coco_mask.merge([our_rle, their_rle], intersect=True))
        assert union - both <= max(1, 0.001 * union)


@pytest.fixture(scope="module")
def detections(theirs: nn.Module, coco_records: list[Record]) -> tuple[Detections, list[dict[str, Tensor]]]:
    model = ours_like(theirs).eval()
    theirs.eval()
    with torch.inference_mode():
        batch = make_batch(coco_records, *padded_size(coco_records), with_targets=False)
        return model(batch), theirs(torchvision_inputs(theirs, coco_records))


def test_detections_are_torchvisions(
    detections: tuple[Detections, list[dict[str, Tensor]]], coco_records: list[Record]
) -> None:
    ours, theirs = detections
    for n, record in enumerate(coco_records):
        height, width = record["image"].shape[1:]
        assert_same_detections(ours, n, theirs[n], (height, width))


def test_a_batch_gives_what_its_images_give_one_by_one(
    theirs: nn.Module, detections: tuple[Detections, list[dict[str, Tensor]]], coco_records: list[Record]
) -> None:
    model = ours_like(theirs).eval()
    batched, _ = detections
    for n, record in enumerate(coco_records):
        with torch.inference_mode():
            single = model(make_batch([record], *padded_size(coco_records), with_targets=False))
        count = int(single.num_detections[0])
        assert count == int(batched.num_detections[n])
        torch.testing.assert_close(single.boxes[0, :count], batched.boxes[n, :count], rtol=0, atol=0.01)
        torch.testing.assert_close(single.scores[0, :count], batched.scores[n, :count], rtol=0, atol=1e-4)


def pycocotools_mask_targets(record: Record):  # type: ignore[no-untyped-def]
    """torchvision's `project_masks_on_boxes` resamples bitmaps; this one rasterises the polygons as Detectron does."""

    def project(_masks: Tensor, boxes: Tensor, matched_idxs: Tensor, size: int) -> Tensor:
        targets = []
        for (x1, y1, x2, y2), gt in zip(boxes.double().tolist(), matched_idxs.tolist(), strict=True):
            scale = np.array([size / max(x2 - x1, 0.1), size / max(y2 - y1, 0.1)])
            parts = [np.float32(part).astype(np.float64) for part in record["polygons"][gt]]
            parts = [((part - (x1, y1)) * scale).reshape(-1).tolist() for part in parts]
            targets.append(coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, size, size))))
        return torch.tensor(np.array(targets), dtype=torch.float32).reshape(-1, size, size)

    return project


@pytest.mark.parametrize("which", [0, 1])
def test_losses_are_torchvisions_when_all_samples_are_taken(
    theirs: nn.Module, coco_records: list[Record], which: int
) -> None:
    record = coco_records[which]
    model = ours_like(theirs, rpn_batch_size=EXHAUSTIVE, roi_batch_size=4 * 300, rpn_post_nms_top_n_train=200).train()
    batch = make_batch([record], *padded_size([record]))
    losses = model(batch)

    theirs.train()
    theirs.rpn.fg_bg_sampler.batch_size_per_image = EXHAUSTIVE
    theirs.roi_heads.fg_bg_sampler.batch_size_per_image = 4 * 300
    theirs.rpn._post_nms_top_n["training"] = 200
    height, width = record["image"].shape[1:]
    targets = {
        "boxes": record["boxes"],
        "labels": record["labels"],
        "masks": torch.zeros(len(record["labels"]), height, width, dtype=torch.uint8),
    }
    where = "torchvision.models.detection.roi_heads.project_masks_on_boxes"
    with mock.patch(where, pycocotools_mask_targets(record)):
        their_losses = theirs(torchvision_inputs(theirs, [record]), [targets])
    assert min(losses.values()) > 0.001, "each part must have something to learn"
    for name, their_name in TORCHVISION_LOSSES.items():
        torch.testing.assert_close(losses[name], their_losses[their_name], rtol=1e-4, atol=0, msg=name)


def test_loss_of_a_batch_is_the_mean_of_its_images(theirs: nn.Module, coco_records: list[Record]) -> None:
    model = ours_like(theirs).train()
    size = padded_size(coco_records[:2])
    with torch.no_grad():
        batched = model(make_batch(coco_records[:2], *size, first_seed=3))
        singles = [model(make_batch([r], *size, first_seed=3 + n)) for n, r in enumerate(coco_records[:2])]
    for name, loss in batched.items():
        torch.testing.assert_close(loss, (singles[0][name] + singles[1][name]) / 2, rtol=1e-4, atol=1e-6, msg=name)


def test_training_without_targets_is_refused(theirs: nn.Module, coco_records: list[Record]) -> None:
    batch: Batch = make_batch(coco_records[:1], *padded_size(coco_records[:1]), with_targets=False)
    with pytest.raises(ValueError, match="targets"):
        ours_like(theirs).train()(batch)
