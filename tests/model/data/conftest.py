"""A prepared index of images like COCO's, made once."""

from pathlib import Path

import pytest

from components.config import Config
from components.prepare import run
from model.config import DataConfig
from model.data.index import CocoIndex


@pytest.fixture(scope="session")
def coco_data(coco_like: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """48 + 8 images, prepared; loaded at a small size in this process."""
    data = DataConfig(
        source="coco2017",
        raw_dir=coco_like,
        prepared_dir=tmp_path_factory.mktemp("data") / "prepared",
        val_limit=8,
        min_sizes_px=(96, 128),
        max_size_px=192,
        eval_min_size_px=128,
        eval_max_size_px=192,
        buckets=((128, 160), (128, 192), (160, 128), (192, 128)),
        workers=0,
    )
    run(Config(data=data))
    return data


@pytest.fixture(scope="session")
def train_index(coco_data: DataConfig) -> CocoIndex:
    return CocoIndex.open(coco_data.prepared_dir, "train")
