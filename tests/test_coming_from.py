"""The pages for people who come from other tools: their shell blocks are run, on a small data set of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

from model.weights.published import published_detector

from . import coco_like
from .test_docs_commands import shell_blocks

ROOT = Path(__file__).resolve().parents[1]
# Small images and a short training, whatever the recipe says.
SMALL = (
    "data.min_sizes_px=[128] data.max_size_px=160 data.eval_min_size_px=128 data.eval_max_size_px=160 "
    "'data.buckets=[[128,160],[160,128],[160,160]]' data.workers=0 train.device=cpu train.batch_size=2 "
    "train.warmup_iters=1 tracking.enabled=false evaluate.batch_size=2 "
)
SHORT = {
    "finetune_small": "'train.iters_range=[3,3]'",
    "mask_rcnn_r50_fpn_v2_finetune": "train.max_iters=3 'train.lr_steps=[2]'",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """my_dataset in our layout, my_yolo with the same objects, a photo, and COCO weights of random values."""
    root = tmp_path_factory.mktemp("coming_from")
    coco_like.write(root / "coco", {"train": 8, "val": 4})
    (root / "my_dataset").mkdir()
    for split in ("train", "val"):
        shutil.copytree(root / "coco" / f"{split}2017", root / "my_dataset" / f"images_{split}")
        annotations = root / "coco" / "annotations" / f"instances_{split}2017.json"
        shutil.copy(annotations, root / "my_dataset" / f"instances_{split}.json")
        write_yolo(json.loads(annotations.read_text()), root / "coco" / f"{split}2017", root / "my_yolo", split)
    Image.open(next((root / "coco" / "val2017").glob("*.jpg"))).convert("RGB").save(root / "photo.jpg")
    cache = root / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for weights, make in (("coco", maskrcnn_resnet50_fpn), ("coco_v2", maskrcnn_resnet50_fpn_v2)):
        url = published_detector(weights, "mask").url
        torch.save(make(weights=None, weights_backbone=None).state_dict(), cache / Path(url).name)
    return root


def write_yolo(coco: dict, images: Path, folder: Path, split: str) -> None:
    """The polygons of a COCO document as Ultralytics has them: a line for each object, coordinates from 0 to 1."""
    labels = folder / "labels" / split
    labels.mkdir(parents=True)
    shutil.copytree(images, folder / "images" / split)
    numbers = {category["id"]: number for number, category in enumerate(coco["categories"])}
    for image in coco["images"]:
        sides = (image["width"], image["height"])
        lines = [
            " ".join(
                [
                    str(numbers[one["category_id"]]),
                    *(f"{v / sides[i % 2]:.6f}" for i, v in enumerate(one["segmentation"][0])),
                ]
            )
            for one in coco["annotations"]
            if one["image_id"] == image["id"] and isinstance(one["segmentation"], list)
        ]
        (labels / Path(image["file_name"]).with_suffix(".txt")).write_text("\n".join(lines))
    names = "\n".join(f"  {number}: {category['name']}" for number, category in enumerate(coco["categories"]))
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}\n")


def shortened(block: str) -> str:
    """The block with small images and a short training in what its recipe writes."""
    lines = []
    for line in block.splitlines():
        words = line.split()
        lines.append(f"{line} {SMALL} {SHORT[words[2]]}" if words[:2] == ["maskrcnn", "recipe"] else line)
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["from-detectron2.md", "from-torchvision.md", "from-ultralytics.md"])
def test_the_commands_of_the_page_lead_from_data_to_predictions(page: str, folder: Path, tmp_path: Path) -> None:
    for name in ("my_dataset", "my_yolo", "photo.jpg"):
        (tmp_path / name).symlink_to(folder / name)
    if page == "from-ultralytics.md":
        (tmp_path / "my_dataset").unlink()  # which it makes
    (block,) = shell_blocks(ROOT / "docs" / page)
    program = tmp_path / "bin" / "maskrcnn"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipelines.cli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "TORCH_HOME": str(folder / "torch"),
        "PYTHONPATH": str(ROOT),
    }
    script = f"set -e\n{shortened(block)}"
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    document = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert [image["file"] for image in document["images"]] == ["photo.jpg"]
