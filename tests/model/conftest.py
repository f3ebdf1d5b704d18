"""Batches of images like COCO's and small networks for the tests of the network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from model.config import ModelConfig
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Polygons, Targets

Record = dict[str, Any]  # image [3, h, w] uint8, boxes [n, 4], labels [n], polygons: list of lists of [v, 2] arrays


def pack(parts_of_instances: list[list[np.ndarray]]) -> Polygons:
    """Polygons of instances, each a list of parts."""
    parts = [part for instance in parts_of_instances for part in instance]
    counts = [len(instance) for instance in parts_of_instances]
    vertices = [sum(len(part) for part in instance) for instance in parts_of_instances]
    return Polygons(
        xy=torch.tensor(np.concatenate(parts or [np.zeros((0, 2))]), dtype=torch.float32),
        part_offsets=torch.tensor(np.cumsum([0] + [len(part) for part in parts]), dtype=torch.int32),
        instance_offsets=torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32),
        max_vertices=max([1, *vertices]),
        max_parts=max([1, *counts]),
    )


def make_batch(records: list[Record], height: int, width: int, with_targets: bool = True, first_seed: int = 7) -> Batch:
    """Records padded to one bucket."""
    images = torch.zeros(len(records), 3, height, width, dtype=torch.uint8)
    sizes = torch.tensor([record["image"].shape[1:] for record in records], dtype=torch.int32)
    for image, record in zip(images, records, strict=True):
        image[:, : record["image"].shape[1], : record["image"].shape[2]] = record["image"]
    rows = max(8, *(len(record["labels"]) for record in records))
    gt_boxes, gt_labels = torch.zeros(len(records), rows, 4), torch.zeros(len(records), rows, dtype=torch.int64)
    instances: list[list[np.ndarray]] = []
    for n, record in enumerate(records):
        count = len(record["labels"])
        gt_boxes[n, :count], gt_labels[n, :count] = record["boxes"], record["labels"]
        instances += record["polygons"] + [[] for _ in range(rows - count)]
    num_gt = torch.tensor([len(record["labels"]) for record in records], dtype=torch.int32)
    return Batch(
        images=images,
        image_sizes=sizes,
        original_sizes=sizes,
        image_ids=torch.arange(len(records)),
        seeds=torch.arange(len(records)) + first_seed,
        targets=Targets(gt_boxes, gt_labels, num_gt, pack(instances)) if with_targets else None,
    )


@pytest.fixture(scope="session")
def coco_records(coco_like: Path) -> list[Record]:
    """Three images, two wide and one tall, about 320 px, with the polygons of their 3 to 8 objects."""
    document = json.loads((coco_like / "annotations/instances_train2017.json").read_text())
    chosen: list[Record] = []
    wanted = [True, False, True]  # wide?
    for info in document["images"]:
        annotations = [a for a in document["annotations"] if a["image_id"] == info["id"] and not a["iscrowd"]]
        if not 3 <= len(annotations) <= 8 or (info["width"] > info["height"]) != wanted[len(chosen)]:
            continue
        chosen.append(_record(coco_like / "train2017" / info["file_name"], info, annotations))
        if len(chosen) == len(wanted):
            return chosen
    raise AssertionError("coco_like has no three such images")


def _record(path: Path, info: dict[str, Any], annotations: list[dict[str, Any]]) -> Record:
    height, width = info["height"] // 2, info["width"] // 2
    pixels = np.array(Image.open(path).convert("RGB").resize((width, height)))
    scale = np.array([width / info["width"], height / info["height"]])
    boxes = np.array([a["bbox"] for a in annotations]) * np.tile(scale, 2)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "image": torch.from_numpy(pixels).permute(2, 0, 1),
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor([a["category_id"] for a in annotations]),
        "polygons": [[np.array(p).reshape(-1, 2) * scale for p in a["segmentation"]] for a in annotations],
    }


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """A network small enough to differentiate in a blink."""

    def build(**changes: Any) -> ModelConfig:
        small = {
            "weights": "none",
            "norm": "group_norm",
            "fpn_channels": 32,
            "box_head_channels": 32,
            "mask_head_channels": 32,
            "mask_head_convs": 1,
            "anchor_sizes_px": (16, 32, 64, 128, 256),
            "rpn_pre_nms_top_n_train": 50,
            "rpn_post_nms_top_n_train": 50,
            "rpn_pre_nms_top_n_test": 50,
            "rpn_post_nms_top_n_test": 20,
            "roi_batch_size": 32,
        }
        body = {} if "backbone" in changes else {"backbone": "resnet18", "stem_channels": 32}
        return ModelConfig(**(small | body | changes))

    return build


@pytest.fixture(scope="session")
def shapes_batch() -> Callable[..., Batch]:
    """Images of noise with triangles as ground truth: enough to compute losses."""

    def build(images: int = 2, size: int = 64, seed: int = 0, **options: Any) -> Batch:
        generator = np.random.default_rng(seed)
        records = []
        for _ in range(images):
            count = int(generator.integers(1, 4))
            corners = generator.uniform(2, size / 2, (count, 2))
            boxes = np.concatenate([corners, corners + generator.uniform(8, size / 2 - 2, (count, 2))], 1)
            records.append(
                {
                    "image": torch.from_numpy(generator.integers(0, 256, (3, size, size), dtype=np.uint8)),
                    "boxes": torch.tensor(boxes, dtype=torch.float32),
                    "labels": torch.from_numpy(generator.integers(1, 4, count)),
                    "polygons": [[np.array([(x1, y2), ((x1 + x2) / 2, y1), (x2, y2)])] for x1, y1, x2, y2 in boxes],
                }
            )
        return make_batch(records, size, size, **options)

    return build


@pytest.fixture(scope="session")
def losses_on_fake_cuda() -> Callable[[MaskRCNN, Batch], dict[str, torch.Tensor]]:
    """The losses as a GPU would compute them, with shapes and devices but no values: no GPU is needed, and none can be
    asked.
    """

    def compute(model: MaskRCNN, batch: Batch) -> dict[str, torch.Tensor]:
        mode = FakeTensorMode()

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            with mode:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        state = {name: fake(p).requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
        state |= {name: fake(buffer) for name, buffer in model.named_buffers()}
        with mode:
            losses: dict[str, torch.Tensor] = functional_call(model, state, (batch.map(fake),))
        return losses

    return compute
