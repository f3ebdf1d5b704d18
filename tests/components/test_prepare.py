"""Prepare: a whole custom data set in, index, ground truth and report out; bad records refused or dropped."""

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from components.config import Config
from components.datasets.report import split_report
from components.prepare import PrepareResult, _summary, main, run
from model.config import AugmentConfig, DataConfig, ShapesConfig
from model.data.annotations import CocoFile, ImageRecord, Instance
from model.data.coco_json import AnnotationError
from model.data.dataset import CocoDataset, read_indexed
from model.data.findings import Finding
from model.data.index import CocoIndex
from model.data.loader import train_loader
from model.data.synthetic import write_shapes
from model.errors import UserError
from model.files import SlowFileError
from model.inference.colors import class_color

CATEGORIES = [{"id": 7, "name": "猫"}, {"id": 2, "name": "dog"}]


def annotation(image_id: int, annotation_id: int, **changes: Any) -> dict[str, Any]:
    triangle = [[2, 2, 12, 2, 12, 12]]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 7,
        "bbox": [2, 2, 10, 10],
        "segmentation": triangle,
        "iscrowd": 0,
        "area": 50,
    } | changes


class Custom:
    """A folder in NVIDIA's hierarchy: three images of 16 × 24 a split, an annotation each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees: dict[str, dict[str, Any]] = {}
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            (root / f"images_{split}").mkdir(parents=True)
            for i in (1, 2, 3):
                noise = rng.integers(0, 255, (16, 24, 3), dtype=np.uint8)
                Image.fromarray(noise).save(root / f"images_{split}" / f"{i}.jpg")
            self.trees[split] = {
                "images": [{"id": i, "file_name": f"{i}.jpg", "height": 16, "width": 24} for i in (1, 2, 3)],
                "annotations": [annotation(i, 10 * i) for i in (1, 2, 3)],
                "categories": CATEGORIES,
            }

    @property
    def train(self) -> dict[str, Any]:
        return self.trees["train"]

    def data(self, **changes: Any) -> DataConfig:
        values = {
            "source": "custom",
            "raw_dir": self.root,
            "prepared_dir": self.root.parent / "prepared",
            "workers": 0,
        } | changes
        return DataConfig(**values)

    def prepare(self, **changes: Any) -> PrepareResult:
        for split, tree in self.trees.items():
            (self.root / f"instances_{split}.json").write_text(json.dumps(tree))
        return run(Config(data=self.data(**changes)))


@pytest.fixture
def custom(tmp_path: Path) -> Custom:
    return Custom(tmp_path / "raw")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_writes_index_ground_truth_and_report(custom: Custom):
    result = custom.prepare()
    index = CocoIndex.open(result.prepared_dir, "train")
    assert index.image_ids.tolist() == [1, 2, 3]
    assert (index.category_ids, index.class_names) == ((2, 7), ("dog", "猫"))
    assert index.instances(0).labels.tolist() == [2]
    report = json.loads((result.prepared_dir / "report.json").read_text())
    assert report["train"]["per_class"] == {"dog": 0, "猫": 3}
    assert report["train"]["data_hash"] == index.data_hash
    with Image.open(result.prepared_dir / "report.png") as image:
        samples = np.asarray(image.convert("RGB"))[image.height // 3 :]
    assert (samples == class_color(2)).all(axis=2).sum() > 1150  # outlines alone have 1,036; the rest are labels
    assert not (samples == class_color(1)).all(axis=2).any()
    assert sorted(path.name for path in result.prepared_dir.iterdir()) == [
        "problems.csv",
        "report.json",
        "report.png",
        "train",
        "train.json",
        "val",
        "val.json",
    ]


def test_the_picture_shortens_names_that_tables_have_whole(custom: Custom):
    name = f"begins {'x' * 300} ends"
    for tree in custom.trees.values():
        tree["categories"] = [{"id": 7, "name": name}]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, if the name leaves no room for the charts
        result = custom.prepare()
    assert json.loads((result.prepared_dir / "report.json").read_text())["train"]["per_class"] == {name: 3}


def test_with_augmentation_a_picture_shows_what_training_will_see(custom: Custom):
    small: dict[str, Any] = {"min_sizes_px": (64,), "max_size_px": 96, "buckets": ((96, 96),)}
    small |= {"eval_min_size_px": 64, "eval_max_size_px": 96}
    shown = []
    for augment in (AugmentConfig(vertical_flip=0.5), AugmentConfig(copy_paste=1.0)):
        path = custom.prepare(**small, augment=augment).prepared_dir / "augmented.png"
        with Image.open(path) as image:
            shown.append((np.asarray(image.convert("RGB")) == class_color(2)).all(axis=2).sum())
    plain, pasted = shown
    assert pasted > 1.3 * plain > 0


def test_coco_and_its_ground_truth_agree(either_coco: Path, tmp_path: Path):
    data = DataConfig(source="coco2017", raw_dir=either_coco, prepared_dir=tmp_path, train_limit=4, workers=2)
    result = run(Config(data=data))
    ours = COCO(str(CocoIndex.open(tmp_path, "val").ground_truth_path))
    original = COCO(str(either_coco / "annotations" / "instances_val2017.json"))
    assert result.splits["val"].instances + result.splits["val"].crowds == len(original.anns)
    assert result.splits["train"].images == 4
    keys = ("bbox", "area", "iscrowd", "segmentation", "category_id")
    assert {i: [a[key] for key in keys] for i, a in ours.anns.items()} == {
        i: [a[key] for key in keys] for i, a in original.anns.items()
    }


def test_generated_shapes_pass_unchanged(tmp_path: Path):
    shapes = ShapesConfig(train_images=4, val_images=2, crowd_probability=1.0)
    write_shapes(shapes, tmp_path / "raw")
    result = run(
        Config(data=DataConfig(raw_dir=tmp_path / "raw", prepared_dir=tmp_path / "prepared", shapes=shapes, workers=0))
    )
    assert (result.splits["train"].images, result.splits["val"].images) == (4, 2)
    assert result.splits["train"].crowds == 4
    assert result.splits["train"].dropped == {}


def truncated(custom: Custom) -> None:
    cut(custom.root / "images_train" / "2.jpg")


def missing(custom: Custom) -> None:
    (custom.root / "images_train" / "2.jpg").unlink()


def size(custom: Custom) -> None:
    custom.train["images"][1]["width"] = 25


def box(custom: Custom) -> None:
    custom.train["annotations"][1]["bbox"] = [2, 2, 0, 10]


def category(custom: Custom) -> None:
    custom.train["annotations"][1]["category_id"] = 3


def image_id(custom: Custom) -> None:
    custom.train["annotations"][1]["image_id"] = 99


def image_twice(custom: Custom) -> None:
    custom.train["images"].append(custom.train["images"][1])


FAULTS = {  # what is done, what the error says, its name in the report, (images, instances) that are left
    truncated: (r"image 2: .*2.jpg cannot be decoded: .*truncated", "unreadable file", (2, 2)),
    missing: (r"image 2: .*2.jpg does not exist", "missing file", (2, 2)),
    size: (r"image 2: .*2.jpg is 16 × 24 .* say 16 × 25", "wrong size", (2, 2)),
    box: (r"annotation 20 of image 2: bbox \[2, 2, 0, 10\] has no area", "box without area", (3, 2)),
    category: (r"annotation 20 of image 2: category_id 3 is not", "unknown category", (3, 2)),
    image_id: (r"annotation 20 of image 99: image_id 99 is not", "unknown image id", (3, 2)),
    image_twice: (r"image 2: id occurs twice", "duplicate image id", (3, 3)),
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_bad_record_is_an_error_that_names_file_id_and_reason(custom: Custom, damage: Any):
    damage(custom)
    with pytest.raises(AnnotationError, match=FAULTS[damage][0]) as error:
        custom.prepare()
    assert str(error.value).startswith("unusable records: 1\n" + str(custom.root / "instances_train.json"))
    assert str(error.value).endswith("data.on_invalid=skip.")
    assert [path.name for path in custom.root.parent.iterdir() if "prepared" in path.name] == ["prepared.problems.csv"]


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_bad_record_is_dropped_and_counted_where_asked(custom: Custom, damage: Any):
    damage(custom)
    _, kind, (images, instances) = FAULTS[damage]
    result = custom.prepare(on_invalid="skip")
    report = result.splits["train"]
    assert (report.images, report.instances, report.dropped) == (images, instances, {kind: 1})
    truth = COCO(str(result.prepared_dir / "train.json"))
    assert (len(truth.imgs), len(truth.anns)) == (images, instances)


def test_an_image_is_empty_if_it_never_had_an_annotation(custom: Custom):
    custom.train["annotations"] = [annotation(1, 10), annotation(2, 20, bbox=[2, 2, 0, 10])]
    result = custom.prepare(on_invalid="skip")
    index = CocoIndex.open(result.prepared_dir, "train")
    assert index.has_instances.tolist() == [True, False, False]
    assert index.is_empty.tolist() == [False, False, True]
    data = custom.data(
        keep_empty_images=True, min_sizes_px=(64,), max_size_px=96, buckets=((64, 96), (800, 1344), (1344, 800))
    )
    batches = islice(train_loader(index, data, batch_size=1, seed=0), 2)
    assert sorted((int(batch.image_ids[0]), int(batch.targets.num_gt[0])) for batch in batches) == [(1, 1), (3, 0)]


def test_the_first_ten_offenders_are_listed_and_a_file_has_all_until_they_are_fixed(custom: Custom):
    custom.train["annotations"] = [annotation(1, i, bbox=[0, 0, 0, 0]) for i in range(13)]
    custom.train["annotations"] += [annotation(2, 13, bbox=[20, 2, 4, 4])]
    with pytest.raises(AnnotationError) as error:
        custom.prepare()
    lines = str(error.value).splitlines()
    assert lines[0] == "unusable records: 13"
    assert ["annotation 9 of" in line for line in lines].index(True) == 10
    assert lines[11] == "… and 3 more"
    path = custom.data().prepared_dir.with_name("prepared.problems.csv")
    assert lines[12] == "warning: 1 × bbox not around its segmentation"
    assert lines[13].startswith(f"All are in {path}.")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["severity"], row["kind"]) for row in rows[:13]] == [("error", "box without area")] * 13
    assert [row["severity"] for row in rows[13:]] == ["warning"]
    assert rows[12]["where"].endswith("annotation 12 of image 1")
    custom.train["annotations"] = [annotation(1, 1)]
    custom.prepare()
    assert not path.exists()


def test_broken_json_is_reported_with_the_position(custom: Custom):
    custom.prepare()
    (custom.root / "instances_val.json").write_text('{"images": [')
    with pytest.raises(AnnotationError, match=r"instances_val.json: line 1, column 13"):
        run(Config(data=custom.data()))


def test_splits_with_different_categories_are_an_error(custom: Custom):
    custom.trees["val"]["categories"] = [*CATEGORIES, {"id": 9, "name": "bird"}]
    with pytest.raises(
        AnnotationError, match=r"must be those of .*instances_train.json; they differ in .*\(9, 'bird'\)"
    ):
        custom.prepare()


def test_a_missing_image_folder_is_an_error(custom: Custom):
    with pytest.raises(AnnotationError, match=r"nowhere: no such image folder.* or data.val_images"):
        custom.prepare(val_images="nowhere")


def test_missing_files_of_a_custom_set_show_what_is_there(custom: Custom):
    (custom.root / "labels").mkdir()
    (custom.root / "labels" / "1.txt").write_text("0 0.5 0.5 0.2 0.1\n")
    (custom.root / "labels" / "1.json").write_text('{"shapes": [], "imagePath": "1.jpg"}')
    with pytest.raises(AnnotationError) as error:
        run(Config(data=custom.data()))
    assert "instances_train.json: no such annotation file; put it there, or set data.raw_dir" in str(error.value)
    assert "The folder has images_train/, images_val/, labels/." in str(error.value)
    assert "Found there: YOLO's text, a file for each image; `maskrcnn import yolo" in str(error.value)
    assert "Found there: a file of labelme" in str(error.value)
    assert "download" not in str(error.value)
    with pytest.raises(
        AnnotationError, match=r"instances_train2017.json: no such .* Fetch it with `maskrcnn download`"
    ):
        run(Config(data=custom.data(source="coco2017")))
    with pytest.raises(AnnotationError, match=r"There is no folder .*nowhere\."):
        run(Config(data=custom.data(raw_dir="nowhere")))


def test_paths_of_ones_own_are_taken(custom: Custom):
    (custom.root / "images_val").rename(custom.root / "my images")
    custom.prepare(val_images="my images", val_annotations="instances_train.json")
    assert CocoIndex.open(custom.data().prepared_dir, "val").image_path(0) == custom.root / "my images" / "1.jpg"


def test_limits_take_the_first_images_and_leave_bad_ones_past_them_alone(custom: Custom):
    missing(custom)
    result = custom.prepare(train_limit=1)
    assert (result.splits["train"].images, result.splits["train"].instances, result.splits["val"].images) == (1, 1, 3)


def test_one_file_is_split_by_a_fraction_of_its_images(custom: Custom):
    result = custom.prepare(val_fraction=0.4)
    train, val = (CocoIndex.open(result.prepared_dir, split).image_ids.tolist() for split in ("train", "val"))
    assert (sorted(train + val), len(val)) == ([1, 2, 3], 1)
    assert CocoIndex.open(result.prepared_dir, "val").image_path(0) == custom.root / "images_train" / f"{val[0]}.jpg"
    first = {split: report.data_hash for split, report in result.splits.items()}
    other = custom.prepare(val_fraction=0.4, split_seed=2)  # a run on another split has other data
    assert all(report.data_hash != first[split] for split, report in other.splits.items())


def test_limits_of_a_split_file_count_images_of_the_split(custom: Custom):
    result = custom.prepare(val_fraction=0.4, train_limit=2, val_limit=2)
    assert [report.images for report in result.splits.values()] == [2, 1]


def test_a_fault_of_a_split_file_is_reported_once(custom: Custom):
    custom.train["annotations"].append(annotation(9, 90))
    with pytest.raises(AnnotationError, match=r"^unusable records: 1\n.*image_id 9 is not among the images"):
        custom.prepare(val_fraction=0.4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"val_annotations": "instances_val.json"}, "val_fraction takes val .* but val_annotations names others"),
        ({"val_images": "a", "val_annotations": "b"}, "val_images and val_annotations names others"),
        ({"source": "coco2017"}, "val_fraction must be 0 for coco2017, which has its own val"),
        ({"val_fraction": 1.0}, "less than 1"),
    ],
)
def test_two_sources_of_val_contradict_each_other(changes: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        DataConfig(**{"source": "custom", "val_fraction": 0.2} | changes)


def test_the_hash_follows_annotations_and_pixels_but_not_the_place(custom: Custom, tmp_path: Path):
    first = custom.prepare().splits["train"].data_hash
    assert custom.prepare(prepared_dir=tmp_path / "again").splits["train"].data_hash == first
    shutil.copy(custom.root / "images_val" / "1.jpg", custom.root / "images_train" / "1.jpg")
    second = custom.prepare().splits["train"].data_hash
    custom.train["annotations"][0]["bbox"] = [2, 2, 10, 9]
    third = custom.prepare().splits["train"].data_hash
    assert len({first, second, third}) == 3


def test_area_and_iscrowd_are_filled_in_where_a_file_leaves_them_out(custom: Custom):
    del custom.train["annotations"][0]["area"], custom.train["annotations"][0]["iscrowd"]
    custom.train["annotations"][1] |= {"area": None, "segmentation": {"size": [16, 24], "counts": [16, 32, 336]}}
    truth = COCO(str(custom.prepare().prepared_dir / "train.json"))
    assert truth.anns[10]["iscrowd"] == 0
    assert truth.anns[10]["area"] == truth.annToMask(truth.anns[10]).sum() == 45
    assert truth.anns[20]["area"] == 32


def test_images_of_every_kind_come_out_as_annotated(custom: Custom):
    folder = custom.root / "images_train"
    gray = np.full((16, 24), 100, dtype=np.uint8)
    kinds = {
        "gray.png": Image.fromarray(gray),
        "深い.png": Image.fromarray(gray.astype(np.uint16) * 256),
        "ünïcode alpha.png": Image.fromarray(gray).convert("RGBA"),
        "palette.png": Image.fromarray(gray).convert("P"),
        "cmyk.jpg": Image.fromarray(gray).convert("RGB").convert("CMYK"),
    }
    for name, image in kinds.items():
        image.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gray.T).save(folder / "turned.jpg", exif=exif)
    names = [*kinds, "turned.jpg"]
    custom.train["images"] = [
        {"id": i, "file_name": name, "height": 16, "width": 24} for i, name in enumerate(names, 1)
    ]
    custom.prepare()
    index = CocoIndex.open(custom.data().prepared_dir, "train")
    dataset = CocoDataset(index, custom.data(), training=False)
    for i, name in enumerate(names):
        image = dataset[i].image
        assert index.image_path(i).name == name
        assert image.shape[0] / image.shape[1] == pytest.approx(16 / 24, abs=0.01)
        assert np.abs(image.astype(int) - 100).max() <= 3


def test_images_are_decoded_as_they_were_checked(custom: Custom):
    folder, values = custom.root / "images_train", np.linspace(0, 4095, 16 * 24, dtype=np.uint16).reshape(16, 24)
    Image.fromarray(values).save(folder / "deep.tif")
    exif = Image.Exif()
    for name, orientation in (("2.jpg", 6), ("3.jpg", 3)):
        exif[0x0112] = orientation
        with Image.open(folder / name) as image:
            image.save(folder / name, exif=exif)
    custom.train["images"][0]["file_name"] = "images\\DEEP.tif"
    black = custom.prepare(on_invalid="mend")
    report, index = black.splits["train"], CocoIndex.open(black.prepared_dir, "train")
    assert (report.repaired, report.warnings) == ({"file name": 1}, {"pixel range": 1, "EXIF rotation": 1})
    assert index.image_path(0) == folder / "deep.tif"
    assert index.apply_exif.tolist() == [True, False, False]
    assert read_indexed(index, 0).max() == 15
    with Image.open(folder / "3.jpg") as stored:
        assert np.abs(read_indexed(index, 2).astype(int) - np.asarray(stored)).mean() < 2
    bright = custom.prepare(on_invalid="mend", pixel_range=(0, 4095))
    index = CocoIndex.open(bright.prepared_dir, "train")
    assert (read_indexed(index, 0).min(), read_indexed(index, 0).max()) == (0, 255)
    assert bright.splits["train"].warnings == {"EXIF rotation": 1}
    assert bright.splits["train"].data_hash != report.data_hash
    index.require_pixel_range((0, 4095))
    with pytest.raises(UserError, match=r"must be prepared with data.pixel_range \[\], got \[0, 4095\]"):
        index.require_pixel_range(())


def test_boxes_that_the_frame_cuts_are_counted(custom: Custom):
    custom.train["annotations"][0]["bbox"] = [20, 2, 10, 10]
    result = custom.prepare()
    assert result.splits["train"].clipped_boxes == 1
    assert CocoIndex.open(result.prepared_dir, "train").instances(0).boxes.tolist() == [[20, 2, 24, 12]]


def test_sizes_come_from_the_files_and_names_are_drawn_as_they_are_and_a_test_set_may_be_empty(custom: Custom):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((24, 16, 3), 200, dtype=np.uint8)).save(custom.root / "images_train" / "1.jpg", exif=exif)
    for image in custom.train["images"]:
        image |= {"height": None, "width": None}
    custom.train["images"][2]["file_name"] = "3.jpg" * 1000
    custom.train["images"][1]["file_name"] = "2.JPG"
    with pytest.raises(AnnotationError, match=r"image 2: .*2\.JPG does not exist; it probably means 2\.jpg") as error:
        custom.prepare()
    assert "image 3: " in str(error.value)
    assert "File name too long" in str(error.value)
    custom.train["images"][2]["file_name"] = "3.jpg"
    for split, tree in custom.trees.items():
        tree["categories"] = [{"id": 7, "name": "$x_$ [/b]"}]
        tree["annotations"] = tree["annotations"] if split == "train" else []
    result = custom.prepare(on_invalid="mend")
    index = CocoIndex.open(result.prepared_dir, "train")
    assert index.sizes.tolist() == [[16, 24]] * 3
    train, val = result.splits["train"], result.splits["val"]
    assert (train.repaired, train.warnings, val.warnings) == (
        {"no size": 3, "file name": 1},
        {},
        {"no instances": 1},
    )


def test_training_data_without_an_instance_are_refused_before_images_are_opened(custom: Custom):
    for entry in custom.train["annotations"]:
        entry["segmentation"] = []
    missing(custom)
    with pytest.raises(
        AnnotationError,
        match=r"got none in 3 images, 3 records dropped \(no segmentation\)\. The first: .*Repair them\.$",
    ):
        custom.prepare(on_invalid="skip")
    with pytest.raises(AnnotationError, match="unusable records: 3\n"):
        custom.prepare()
    custom.train["annotations"] = []
    with pytest.raises(AnnotationError, match=r"got none in 3 images\. Add annotations\.$"):
        custom.prepare()
    limited = (
        r"got none in 2 images\. Add annotations, or raise data\.train_limit, which is 2 \(0 takes all images\)\.$"
    )
    with pytest.raises(AnnotationError, match=limited):
        custom.prepare(train_limit=2)


def test_a_size_that_cannot_be_read_in_time_is_an_error(
    custom: Custom, leased: Callable[[Path], AbstractContextManager[None]]
):
    custom.train["images"][0] |= {"height": None, "width": None}
    with (
        leased(custom.root / "images_train" / "1.jpg"),
        pytest.raises(SlowFileError, match=r"1\.jpg: could not be read within 0\.2 s"),
    ):
        custom.prepare(timeout_s=0.2)


def test_a_failed_run_leaves_the_last_good_one(custom: Custom):
    good = custom.prepare()
    before = (good.prepared_dir / "report.json").read_bytes()
    box(custom)
    with pytest.raises(AnnotationError):
        custom.prepare()
    assert (good.prepared_dir / "report.json").read_bytes() == before
    assert custom.prepare(on_invalid="skip").splits["train"].instances == 2
    assert [path.name for path in custom.root.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_of_someone_else_is_not_replaced(custom: Custom, tmp_path: Path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.txt").touch()
    with pytest.raises(AnnotationError, match=r"but has other files; set data\.prepared_dir"):
        custom.prepare()
    assert (tmp_path / "prepared" / "thesis.txt").exists()


def test_a_file_is_not_replaced_and_that_is_said_before_the_images_are_checked(custom: Custom, tmp_path: Path):
    (tmp_path / "prepared").write_text("thesis")
    box(custom)  # is found later
    with pytest.raises(AnnotationError, match=r"prepared: must be empty .*but is a file"):
        custom.prepare()
    assert [path.name for path in tmp_path.iterdir() if "prepared" in path.name] == ["prepared"]
    assert (tmp_path / "prepared").read_text() == "thesis"


def test_the_command_prints_counts_and_the_report(custom: Custom, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    box(custom)
    custom.prepare(on_invalid="skip")
    (tmp_path / "params.yaml").write_text(json.dumps({"data": custom.data().model_dump(mode="json")}))
    with pytest.raises(SystemExit) as exit_status:
        main(["--params", str(tmp_path / "params.yaml")])
    assert exit_status.value.code == 2
    assert "error: unusable records: 1" in capsys.readouterr().err
    main(["--params", str(tmp_path / "params.yaml"), "data.on_invalid=skip"])
    output = capsys.readouterr().out
    assert "train: 3 images (1 without instances), 2 instances, 0 crowds, dropped 1 (box without area)" in output
    assert str(tmp_path / "prepared" / "report.png") in output
    assert f"{tmp_path / 'prepared' / 'problems.csv'} has every dropped" in output


def test_objects_are_counted_by_cocos_sizes():
    """By the side of a square of equal area, from 32 and from 96 px on."""
    boxes = [(0.0, 0.0, side * 2, side / 2) for side in (31.9, 32.0, 95.9, 96.0, 200.0)]
    instances = [Instance(1, box, [], is_crowd=False, was_clipped=False) for box in boxes]
    images = {1: ImageRecord(1, "a.jpg", 500, 500)}
    coco = CocoFile(Path("a.json"), {1: "a"}, images, {1: instances}, {1: []}, [])
    assert split_report(coco, "hash").per_size == {"small": 1, "medium": 2, "large": 2}


def test_warnings_are_counted_by_kind_with_an_example():
    findings = [Finding(kind, f"text {n}", f"image {n}", "warning") for n, kind in enumerate("abb")]
    coco = CocoFile(Path("a.json"), {}, {}, {}, {}, [*findings, Finding("c", "text", "image 9", "repaired")])
    report = split_report(coco, "hash")
    assert list(report.warnings.items()) == [("b", 2), ("a", 1)]
    assert (report.dropped, report.repaired, report.examples["b"]) == ({}, {"c": 1}, "image 1: text 1")
    lines = list(_summary(PrepareResult(Path("prepared"), {"val": report})))
    assert lines[:3] == [
        "val: 0 images, 0 instances, 0 crowds",
        "repaired: val: 1 × c, such as image 9: text",
        "warning: val: 2 × b, such as image 1: text 1",
    ]
