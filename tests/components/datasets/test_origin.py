"""Data that were prepared otherwise than the configuration of a later stage says are refused."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components import evaluate, prepare, train
from components.config import Config
from components.params import save_config
from model.data.index import CocoIndex
from model.errors import UserError


def with_data(config: Config, **values: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


@pytest.fixture
def own(trained_run: Config, tmp_path: Path) -> Config:
    """The run's configuration with four images prepared anew, whose annotations may be changed."""
    raw = trained_run.data.raw_dir
    (tmp_path / "raw" / "annotations").mkdir(parents=True)
    for folder in ("train2017", "val2017"):
        (tmp_path / "raw" / folder).symlink_to(raw / folder)
        file = f"annotations/instances_{folder}.json"
        (tmp_path / "raw" / file).write_bytes((raw / file).read_bytes())
    config = with_data(trained_run, raw_dir=tmp_path / "raw", prepared_dir=tmp_path / "prepared")
    prepare.run(config)
    shutil.copytree(trained_run.train.output_dir, tmp_path / "run")
    return config.model_copy(update={"train": config.train.model_copy(update={"output_dir": tmp_path / "run"})})


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("train_limit", 3, "train_limit 3, as set here, got 4"),
        ("val_limit", 0, "val_limit 0, as set here, got 4"),
        ("exif", "ignore", 'exif "ignore", as set here, got "auto"'),
        ("on_invalid", "skip", 'on_invalid "skip", as set here, got "error"'),
        ("val_fraction", 0.5, "val_fraction 0.5, as set here, got 0.0"),
        ("train_annotations", "b.json", 'train_annotations "b.json"'),
        ("val_images", "b", 'val_images "b"'),
        ("source", "coco2017", 'source "coco2017", as set here, got "custom"'),
    ],
)
def test_training_refuses_other_values_than_those_of_prepare(trained_run: Config, key: str, value: Any, shown: str):
    with pytest.raises(UserError) as error:
        train.run(with_data(trained_run, **{key: value}))
    assert f"must be prepared with data.{shown}" in str(error.value)
    assert "run `maskrcnn prepare` with the same value" in str(error.value)


def test_values_that_decide_nothing_and_another_place_of_the_same_data_pass(trained_run: Config, own: Config):
    index = CocoIndex.open(trained_run.data.prepared_dir, "train")
    same = {"raw_dir": own.data.raw_dir, "split_seed": 5, "workers": 3, "horizontal_flip": 0.0}
    data = trained_run.data.model_copy(update=same)
    index.require_values(data)
    index.require_annotations(data)
    path = own.data.raw_dir / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=f"{path}: must be as it was .* but is another file"):
        index.require_annotations(data)
    index.require_annotations()


def test_generated_images_are_those_of_the_values(tmp_path: Path, trained_run: Config):
    from components import download

    shapes = {"train_images": 2, "val_images": 1, "height_px": 64, "width_px": 64}
    data = {"source": "shapes", "shapes": shapes, "raw_dir": str(tmp_path / "raw"), "prepared_dir": str(tmp_path / "p")}
    config = Config.model_validate({"data": data})
    download.run(config)
    prepare.run(config)
    index = CocoIndex.open(config.data.prepared_dir, "val")
    index.require_values(config.data)
    other = config.data.shapes.model_copy(update={"seed": 1})
    with pytest.raises(UserError, match=r'must be prepared with data\.shapes \{.*"seed": 1'):
        index.require_values(config.data.model_copy(update={"shapes": other}))


@pytest.mark.parametrize(("stage", "split"), [(train, "train"), (train, "val"), (evaluate, "val")])
def test_annotations_that_have_changed_since_are_refused(
    own: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: ModuleType, split: str
):
    """By a new training, too, which is scored by those of val at its end."""
    path = own.data.raw_dir / "annotations" / f"instances_{split}2017.json"
    path.write_text(path.read_text() + "\n")
    save_config(own, tmp_path / "params.yaml")
    folder = tmp_path / ("new" if stage is train else "run")
    with pytest.raises(SystemExit) as end:
        stage.main(["--params", str(tmp_path / "params.yaml"), f"train.output_dir={folder}"])
    assert end.value.code == 2
    assert f"error: {path}: must be as it was when {tmp_path}/prepared/{split} was prepared" in capsys.readouterr().err
    assert not [*(tmp_path / "new").rglob("*.pt")]


def test_paths_that_lead_to_the_same_files_are_the_same(own: Config, tmp_path: Path):
    index, raw = CocoIndex.open(own.data.prepared_dir, "train"), own.data.raw_dir
    annotations = raw / "annotations" / "instances_train2017.json"
    for value in (str(annotations), "annotations/../annotations/instances_train2017.json"):
        index.require_values(own.data.model_copy(update={"train_annotations": value}))
    outside = own.data.model_copy(update={"train_annotations": str(tmp_path / "elsewhere.json")})
    with pytest.raises(UserError, match='train_annotations "", as set here'):
        index.require_values(outside)


def test_annotations_that_are_gone_or_have_moved_with_the_images_are_not_missed(own: Config, tmp_path: Path):
    root = tmp_path / "moved"
    root.mkdir()
    for name in ("raw", "prepared"):
        (tmp_path / name).rename(root / name)
    index = CocoIndex.open(root / "prepared", "train")
    index.require_annotations()
    path = root / "raw" / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"moved/prepared/\.\./raw/.*has changed since"):
        index.require_annotations()
    path.unlink()
    index.require_annotations()


def test_folders_of_older_versions_are_taken_as_they_are(own: Config):
    path = own.data.prepared_dir / "train" / "meta.json"
    meta = json.loads(path.read_text())
    assert {"prepared_with", "annotations"} < meta.keys()
    path.write_text(json.dumps({key: meta[key] for key in meta if key not in ("prepared_with", "annotations")}))
    index = CocoIndex.open(own.data.prepared_dir, "train")
    index.require_values(own.data.model_copy(update={"train_limit": 1}))
    index.require_annotations()
