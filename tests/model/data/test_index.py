"""The memory-mapped index; the oracle is pycocotools over the original JSON."""

import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from model.config import DataConfig
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, spread, write_index
from model.errors import UserError


@pytest.fixture(scope="module")
def oracle(coco_like: Path) -> COCO:
    return COCO(str(coco_like / "annotations" / "instances_train2017.json"))


def test_holds_every_annotation_of_every_image(train_index: CocoIndex, oracle: COCO):
    assert train_index.image_ids.tolist() == sorted(oracle.imgs)
    for i, image_id in enumerate(train_index.image_ids.tolist()):
        annotations = oracle.loadAnns(oracle.getAnnIds([image_id]))
        instances = train_index.instances(i)
        boxes = np.array([a["bbox"] for a in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(instances.boxes, boxes, atol=0.2)  # COCO's boxes leave the frame by as much
        assert [train_index.category_ids[label - 1] for label in instances.labels] == [
            a["category_id"] for a in annotations
        ]
        assert instances.is_crowd.tolist() == [bool(a["iscrowd"]) for a in annotations]
        assert bool(train_index.has_instances[i]) == any(not a["iscrowd"] for a in annotations)


def test_holds_every_polygon(train_index: CocoIndex, oracle: COCO):
    for i, image_id in enumerate(train_index.image_ids.tolist()):
        instances = train_index.instances(i)
        for k, annotation in enumerate(oracle.loadAnns(oracle.getAnnIds([image_id]))):
            first, last = instances.instance_offsets[k : k + 2]
            parts = [instances.xy[slice(*instances.part_offsets[t : t + 2])].ravel() for t in range(first, last)]
            expected = [] if annotation["iscrowd"] else annotation["segmentation"]
            assert len(parts) == len(expected)
            assert all(np.array_equal(part, np.float32(polygon)) for part, polygon in zip(parts, expected, strict=True))


def test_knows_files_sizes_and_classes(train_index: CocoIndex, oracle: COCO, coco_like: Path):
    assert len(train_index) == len(oracle.imgs)
    for i, image_id in enumerate(train_index.image_ids.tolist()):
        record = oracle.imgs[image_id]
        assert train_index.image_path(i) == coco_like / "train2017" / record["file_name"]
        assert train_index.size(i) == (record["height"], record["width"])
    assert train_index.class_names[:2] == ("person", "bicycle")
    assert (len(train_index.class_names), train_index.category_ids[-1]) == (80, 90)


def test_arrays_are_mapped_and_not_to_be_written(train_index: CocoIndex):
    with pytest.raises(ValueError, match="read-only"):
        train_index.instances(0).boxes[0, 0] = 1


def test_a_pickled_index_is_small_and_the_same(train_index: CocoIndex):
    pickled = pickle.dumps(train_index)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert np.array_equal(copy.instances(3).xy, train_index.instances(3).xy)


def test_images_are_found_when_the_tree_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    raw, prepared = Path("old/raw"), Path("old/prepared")
    (raw / "train").mkdir(parents=True)
    record = ImageRecord(id=7, file_name="ü/图.jpg", height=4, width=6)
    image = IndexedImage(record, apply_exif=False, instances=[])
    location = images_location(raw, Path("train"), prepared)
    write_index(prepared / "train", [image], categories={1: "a"}, data_hash="0", origin=location)
    assert CocoIndex.open(prepared, "train").image_path(0) == raw / "train" / "ü/图.jpg"
    Path("old").rename("new")
    found = CocoIndex.open(Path("new/prepared"), "train").image_path(0)
    assert found.resolve() == tmp_path / "new/raw/train/ü/图.jpg"


def test_prepared_data_of_another_project_have_their_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """This one has images at the same relative path; prepared data that were moved alone fall back on them."""
    raw, prepared = Path("data/raw"), Path("data/prepared")
    for project in ("this", "other"):
        (tmp_path / project / raw / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    image = IndexedImage(ImageRecord(id=7, file_name="a.jpg", height=4, width=6), apply_exif=False, instances=[])
    origin = images_location(raw, Path("train"), prepared)
    write_index(prepared / "train", [image], categories={1: "a"}, data_hash="0", origin=origin)
    monkeypatch.chdir(tmp_path / "this")
    found = CocoIndex.open(Path("../other") / prepared, "train").image_path(0)
    assert found.resolve() == tmp_path / "other" / raw / "train" / "a.jpg"
    (tmp_path / "other" / prepared).rename("prepared")
    assert CocoIndex.open(Path("prepared"), "train").image_path(0) == raw / "train" / "a.jpg"


def test_a_split_without_any_annotation_can_be_opened(tmp_path: Path):
    images = [IndexedImage(ImageRecord(i, f"{i}.jpg", 4, 6), False, []) for i in (1, 2)]
    write_index(
        tmp_path / "val",
        images,
        categories={1: "a"},
        data_hash="0",
        origin=images_location(tmp_path, Path(), tmp_path),
    )
    index = CocoIndex.open(tmp_path, "val")
    assert (index.has_instances.tolist(), index.is_empty.tolist()) == ([False, False], [True, True])
    assert index.instances(1).boxes.shape == (0, 4)
    assert index.instances(1).xy.shape == (0, 2)


def test_a_damaged_index_is_told_with_the_way_out(tmp_path: Path):
    location = images_location(tmp_path, Path(), tmp_path)
    images = [IndexedImage(ImageRecord(1, "a.jpg", 4, 6), False, [])]
    write_index(tmp_path / "val", images, categories={1: "a"}, data_hash="0", origin=location)
    for name in ("meta.json", "boxes.npy"):
        path = tmp_path / "val" / name
        whole = path.read_bytes()
        for damaged in (b"", b"{}", b"[]", b"\xff", whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=r"val: must hold prepared data .*Run `maskrcnn prepare` again"):
                CocoIndex.open(tmp_path, "val")
        path.write_bytes(whole)
    (tmp_path / "val" / "xy.npy").unlink()
    with pytest.raises(UserError, match=r"xy\.npy"):
        CocoIndex.open(tmp_path, "val")


def test_data_are_not_called_damaged_when_no_more_files_can_be_opened(tmp_path: Path):
    location = images_location(tmp_path, Path(), tmp_path)
    images = [IndexedImage(ImageRecord(1, "a.jpg", 4, 6), False, [])]
    write_index(tmp_path / "val", images, categories={1: "a"}, data_hash="0", origin=location)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            CocoIndex.open(tmp_path, "val")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_crowd_alone_is_nothing_to_learn(tmp_path: Path):
    crowd = Instance(category_id=1, box=(0, 0, 2, 2), polygons=[], is_crowd=True, was_clipped=False)
    images = [IndexedImage(ImageRecord(1, "a.jpg", 4, 6), False, [crowd])]
    write_index(
        tmp_path / "val",
        images,
        categories={1: "a"},
        data_hash="0",
        origin=images_location(tmp_path, Path(), tmp_path),
    )
    index = CocoIndex.open(tmp_path, "val")
    assert (index.has_instances.tolist(), index.is_empty.tolist()) == ([False], [False])


def test_an_index_that_is_not_there_names_the_command(tmp_path: Path, coco_data: DataConfig):
    with pytest.raises(UserError, match="Run `maskrcnn prepare`"):
        CocoIndex.open(tmp_path, "train")
    shutil.copytree(coco_data.prepared_dir / "val", tmp_path / "val")
    with pytest.raises(UserError, match=r"train: must hold prepared data"):
        CocoIndex.open(tmp_path, "train")


def test_what_is_drawn_is_spread_over_the_split_with_both_ends() -> None:
    assert spread(101, 3) == [0, 50, 100]
    assert spread(2, 5) == [0, 1]
