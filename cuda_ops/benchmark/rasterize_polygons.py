"""Mask targets of 100 RoIs from outlines of 40 vertices, beside Detectron2's way: one by one, by pycocotools."""

import math

import numpy as np
import pycocotools.mask as coco_mask
import torch

import cuda_ops
from cuda_ops.benchmark import Case, random_boxes
from cuda_ops.operators.rasterize_polygons import Polygons


def cases(device: torch.device) -> list[Case]:
    boxes, angles = random_boxes(100, device=device), torch.linspace(0, 2 * math.pi, 41)[:40]
    circle = torch.stack((angles.cos(), angles.sin()), -1).to(device)
    outlines = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2 + circle * (boxes[:, None, 2:] - boxes[:, None, :2]) * 0.55
    offsets = torch.arange(101, dtype=torch.int32, device=device)
    polygons = Polygons(outlines.reshape(-1, 2), offsets * 40, offsets, max_vertices=40, max_parts=1)
    rows = torch.arange(100, device=device)[None]
    host_boxes, host_outlines = boxes.double().cpu().numpy(), outlines.double().cpu().numpy()

    def theirs() -> list[np.ndarray]:
        masks = []
        for box, outline in zip(host_boxes, host_outlines, strict=True):
            scale = 28 / np.maximum(box[2:] - box[:2], 0.1)
            rles = coco_mask.frPyObjects([((outline - box[:2]) * scale).flatten()], 28, 28)
            masks.append(coco_mask.decode(coco_mask.merge(rles)))
        return masks

    case = Case(
        "rasterize_polygons, 100 RoIs",
        lambda: cuda_ops.rasterize_polygons(boxes[None], rows, polygons, 28),
        "detectron2's path",
        theirs,
    )
    return [case]
