"""The proof that data, losses, decoding and evaluation agree: a network that learns eight real images by heart scores high on them."""

from pathlib import Path

import pytest

from components import evaluate, prepare, train
from components.config import load_config

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "coco_tiny.yaml"


@pytest.mark.slow
def test_eight_real_images_are_learned_by_heart(coco_tiny: Path, tmp_path: Path) -> None:
    """ResNet-18-FPN from scratch, trained and evaluated on the first eight images of train2017, small objects and all."""
    config = load_config(
        RECIPE,
        [
            f"data.raw_dir={coco_tiny}", f"data.prepared_dir={tmp_path}/prepared", f"train.output_dir={tmp_path}/run",
            "data.val_images=train2017", "data.val_annotations=annotations/instances_train2017.json",
            "data.train_limit=8", "data.val_limit=8", "data.horizontal_flip=0.0", "tracking.enabled=false",
            "train.max_iters=600", "train.batch_size=4", "train.lr_batch_size=4", "train.base_lr=0.02", "train.warmup_iters=50",
            "train.lr_steps=[450, 550]", "train.checkpoint_period=600",
        ],
    )  # fmt: skip
    prepare.run(config)
    train.run(config, skip_test=True)
    result = evaluate.run(config)
    assert result.evaluation is not None
    assert result.evaluation.bbox["AP"] >= 0.60
    assert result.evaluation.segm["AP"] >= 0.50
