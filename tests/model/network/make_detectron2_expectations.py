"""What Detectron2 detects with given weights in given images, stored for test_detectron2.py.

    python tests/model/network/make_detectron2_expectations.py

Needs Detectron2 (its Python part is enough); writes detectron2_expectations.npz beside this file. Weights and images
are not stored: both are drawn from generators seeded by their names, here and in the test. Networks are Detectron2's
R50-C4, -DC5, -FPN and -FPN with group norm, but for narrow fully connected layers and few proposals.
"""

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor, nn

STORED = Path(__file__).with_name("detectron2_expectations.npz")
NUM_CLASSES = 5
DETECTIONS = 10
SIZES = ((160, 192), (128, 224))  # multiples of every stride: only FPN pads
ORIGINAL_SIZES = ((231, 401), (128, 75))  # of the images that these were resized from: other factors on either axis
COMMON = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "TEST.DETECTIONS_PER_IMAGE": 2 * DETECTIONS,  # some are empty
}
HEADS = {
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 14,
}
FPN = HEADS | {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "c4": {},
    "c5": HEADS
    | {
        "MODEL.RESNETS.OUT_FEATURES": ["res5"],
        "MODEL.RESNETS.RES5_DILATION": 2,
        "MODEL.RPN.IN_FEATURES": ["res5"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["res5"],
    },
    "fpn": FPN,
    "gn": FPN
    | {
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FPN.NORM": "GN",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.NORM": "GN",
        "MODEL.ROI_MASK_HEAD.NORM": "GN",
    },
}


def draw_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights by Detectron2's names: random, and lively enough to detect things. RandomState's stream is frozen for
    ever.
    """
    weights = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith(("running_var", "norm.weight")):
            value = random.uniform(0.5, 1.5, shape) * (0.3 if "conv3.norm.weight" in name else 1.0)
        elif len(shape) == 1:
            value = random.standard_normal(shape) * 0.1
        else:
            value = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        gain = {
            **{f"{kind}{level}.weight": 0.3 for kind in ("fpn_lateral", "fpn_output") for level in (2, 3, 4, 5)},
            "stem.conv1.weight": 0.01,
            "objectness_logits.weight": 0.3,
            "anchor_deltas.weight": 0.5,
            "cls_score.weight": 0.15,
            "bbox_pred.weight": 0.5,
        }
        value *= next((factor for ending, factor in gain.items() if name.endswith(ending)), 1.0)
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


def draw_image(size: tuple[int, int]) -> Tensor:
    """[3, height, width] uint8 RGB: smooth blots."""
    random = np.random.RandomState(size[0])
    coarse = torch.from_numpy(random.uniform(-60, 315, (1, 3, size[0] // 16, size[1] // 16)).astype(np.float32))
    image = nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=True)
    return image[0].clamp(0, 255).round().to(torch.uint8)


def detect(layout: str) -> dict[str, Any]:
    """Detectron2's state dict's shapes, and its detections of each image: arrays by name."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.modeling.postprocessing import detector_postprocess

    cfg = get_cfg()
    for key, value in (COMMON | LAYOUTS[layout]).items():
        cfg.merge_from_list([key, value])
    model = build_model(cfg).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(draw_weights(shapes))
    found: dict[str, Any] = {f"{layout}/shapes": json.dumps(shapes)}
    for i, size in enumerate(SIZES):
        image = draw_image(size).flip(0).float()  # its images are BGR
        with torch.no_grad():
            (instances,) = model.inference([{"image": image}], do_postprocess=False)
        instances = instances[instances.pred_boxes.nonempty()][:DETECTIONS]  # as its post-processing leaves them
        masks = (instances.pred_masks * 255).round()
        instances.pred_masks = masks / 255  # as the test reads them
        pasted = detector_postprocess(copy.deepcopy(instances), *ORIGINAL_SIZES[i])  # scales boxes in place
        assert len(pasted) == len(instances)
        codes = [coco_mask.encode(np.asfortranarray(mask)) for mask in pasted.pred_masks.numpy()]
        found |= {
            f"{layout}/{i}/boxes": instances.pred_boxes.tensor.numpy(),
            f"{layout}/{i}/scores": instances.scores.numpy(),
            f"{layout}/{i}/classes": instances.pred_classes.numpy(),  # from 0
            f"{layout}/{i}/original_boxes": pasted.pred_boxes.tensor.numpy(),
            f"{layout}/{i}/codes": np.array([code["counts"].decode() for code in codes]),
            f"{layout}/{i}/masks": masks[:, 0].byte().numpy(),
        }
        print(layout, size, len(instances), instances.scores.numpy().round(3))
    return found


def main() -> None:
    """Write the file anew."""
    stored: dict[str, Any] = {}
    for layout in LAYOUTS:
        stored |= detect(layout)
    np.savez_compressed(STORED, **stored)
    print(f"{STORED}: {STORED.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
