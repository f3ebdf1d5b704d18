"""The proof that data, losses, decoding and evaluation agree: a network that learns a few images by heart scores high
on them.
"""

from pathlib import Path

import pytest

from components import evaluate, prepare, train
from components.runs.recipes import load_recipe


@pytest.mark.slow
def test_eight_images_are_learned_by_heart(best_coco: Path, tmp_path: Path) -> None:
    """ResNet-18-FPN from scratch, trained and evaluated on the first eight images of train2017, small
    objects and all.
    """
    config = load_recipe(
        "coco_tiny",
        [
            f"data.raw_dir={best_coco}", f"data.prepared_dir={tmp_path}/prepared", f"train.output_dir={tmp_path}/run",
            "data.val_images=train2017", "data.val_annotations=annotations/instances_train2017.json",
            "data.train_limit=8", "data.val_limit=8", "data.horizontal_flip=0.0", "tracking.enabled=false",
            "train.max_iters=600", "train.batch_size=4", "train.lr_batch_size=4", "train.base_lr=0.02",
            "train.warmup_iters=50",
            "train.lr_steps=[450, 550]", "train.checkpoint_period=600",
        ],
    )  # fmt: skip
    prepare.run(config)
    train.run(config, skip_test=True)
    result = evaluate.run(config)
    assert result.evaluation is not None
    assert result.evaluation.bbox["AP"] >= 0.60
    assert result.evaluation.segm["AP"] >= 0.50


# Nets that learn in minutes on two cores: most are ResNet-18 from scratch, all have small heads.
BODIES = ("convnext_tiny", "convnext_small", "swin_t", "resnext50_32x4d", "wide_resnet50_2")
ADAMW = ["train.optimizer=adamw", "train.base_lr=0.0005", "train.weight_decay=0.05", "train.schedule=cosine"]
FAMILY = {
    "c4": [
        "model.features=c4", "model.box_head=res5", "model.box_pool_size=6", "model.mask_pool_size=6",
        "model.mask_head_convs=0",
        "model.pool_sampling_ratio=0", "model.roi_batch_size=16", "train.max_iters=200", "train.lr_steps=[160, 185]",
        "train.checkpoint_period=200",
    ],
    "c5_dilated": ["model.features=c5", "model.res5_dilation=2", "model.mask_head_convs=1"],
    "fpn_group_norm_heads": ["model.box_head=conv", "model.box_head_convs=2", "model.box_head_conv_channels=64"],
    "faster_rcnn": ["model.task=box"],
    "torchvision": ["model.conventions=torchvision"],
    "adamw": ADAMW,
    **{name: [f"model.backbone={name}", *ADAMW] for name in BODIES},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("member", FAMILY)
def test_four_images_are_learned_by_heart(member: str, best_coco: Path, tmp_path: Path) -> None:
    config = load_recipe(
        "coco_tiny",
        [
            f"data.raw_dir={best_coco}", f"data.prepared_dir={tmp_path}/prepared", f"train.output_dir={tmp_path}/run",
            "data.val_images=train2017", "data.val_annotations=annotations/instances_train2017.json",
            "data.train_limit=4", "data.val_limit=4", "data.horizontal_flip=0.0", "tracking.enabled=false",
            "data.min_sizes_px=[160]", "data.max_size_px=224", "data.eval_min_size_px=160", "data.eval_max_size_px=224",
            "data.buckets=[[160, 224], [224, 160]]", "model.anchor_sizes_px=[8, 16, 32, 64, 128]",
            "model.fpn_channels=64", "model.box_head_channels=256", "model.mask_head_channels=64",
            "model.mask_head_convs=2",
            "model.roi_batch_size=32", "model.rpn_batch_size=64", "evaluate.batch_size=4", "evaluate.drawn_images=1",
            "train.max_iters=300", "train.batch_size=4", "train.lr_batch_size=4", "train.base_lr=0.02",
            "train.warmup_iters=30",
            "train.lr_steps=[240, 280]", "train.checkpoint_period=300", *FAMILY[member],
        ],
    )  # fmt: skip
    prepare.run(config)
    train.run(config, skip_test=True)
    evaluation = evaluate.run(config).evaluation
    assert evaluation is not None
    assert list(evaluation.scores) == (["bbox"] if member == "faster_rcnn" else ["bbox", "segm"])
    assert evaluation.bbox["AP"] >= 0.50
    assert evaluation.main_score >= 0.35
