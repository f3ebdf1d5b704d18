"""The generated data set: honest COCO, the same for one seed, never overwriting what is not its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from model.config import ShapesConfig
from model.data.scene import CLASS_NAMES
from model.data.synthetic import draw_scene, holds_other_shapes, write_shapes
from model.errors import UserError

SMALL = ShapesConfig(train_images=3, val_images=3, height_px=64, width_px=96)
CROWDED = ShapesConfig(crowd_probability=1.0)


def decode(annotation: dict, shape: tuple[int, int]) -> np.ndarray:
    rle = coco_mask.frPyObjects(annotation["segmentation"], *shape)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, list[dict]]]:
    return [draw_scene(CROWDED, np.random.default_rng(k)) for k in range(30)]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_writes_images_of_the_size_that_the_json_says(tmp_path: Path):
    write_shapes(SMALL, tmp_path)
    for split in ("train", "val"):
        coco = json.loads((tmp_path / "annotations" / f"instances_{split}.json").read_text())
        assert len(coco["images"]) == 3
        assert [category["name"] for category in coco["categories"]] == list(CLASS_NAMES)
        assert {annotation["image_id"] for annotation in coco["annotations"]} == {1, 2, 3}
        for image in coco["images"]:
            assert Image.open(tmp_path / split / image["file_name"]).size == (96, 64)


def test_the_same_seed_gives_the_same_bytes_in_any_process(tmp_path: Path):
    write_shapes(SMALL, tmp_path / "here", workers=0)
    write_shapes(SMALL, tmp_path / "elsewhere", workers=1)
    assert contents(tmp_path / "here") == contents(tmp_path / "elsewhere")


def test_splits_and_seeds_have_no_image_in_common(tmp_path: Path):
    write_shapes(SMALL, tmp_path / "a")
    write_shapes(SMALL.model_copy(update={"seed": 1}), tmp_path / "b")
    images = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(images) == len(set(images)) == 12


def test_outlines_are_of_what_can_be_seen(scenes):
    for pixels, annotations in scenes:
        masks = [decode(a, pixels.shape[:2]) for a in annotations if not a["iscrowd"]]
        assert np.sum(masks, axis=0).max() == 1  # no pixel shows two shapes
        assert all(mask.sum() >= 16 for mask in masks)


def test_boxes_and_areas_are_those_of_the_masks(scenes):
    for pixels, annotations in scenes:
        for annotation in annotations:
            mask = decode(annotation, pixels.shape[:2])
            x, y, width, height = annotation["bbox"]
            assert mask.sum() == annotation["area"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert mask[:, [x, x + width - 1]].any(axis=0).all()
            assert mask[[y, y + height - 1]].any(axis=1).all()


def test_there_is_something_of_everything(scenes):
    annotations = [annotation for _, of_image in scenes for annotation in of_image]
    ordinary = [annotation for annotation in annotations if not annotation["iscrowd"]]
    sides = np.sqrt([annotation["area"] for annotation in ordinary])
    assert {annotation["category_id"] for annotation in ordinary} == {1, 2, 3, 4, 5}
    assert sides.min() < 16
    assert sides.max() > 48
    assert any(len(annotation["segmentation"]) > 1 for annotation in ordinary)
    assert sum(annotation["iscrowd"] for annotation in annotations) > 20


def test_shapes_differ_from_the_ground(scenes):
    for pixels, annotations in scenes:
        for annotation in annotations:
            if annotation["iscrowd"]:
                continue
            mask = decode(annotation, pixels.shape[:2])
            ground = ~np.any([decode(a, pixels.shape[:2]) for a in annotations], axis=0)
            assert np.linalg.norm(pixels[mask].mean(axis=0) - pixels[ground].mean(axis=0)) > 40


def test_a_complete_data_set_is_left_alone(tmp_path: Path):
    assert write_shapes(SMALL, tmp_path)
    (tmp_path / "train" / "000001.jpg").write_bytes(b"touched")
    assert not write_shapes(SMALL, tmp_path)
    assert (tmp_path / "train" / "000001.jpg").read_bytes() == b"touched"


def test_another_configuration_is_made_anew_without_leftovers(tmp_path: Path):
    write_shapes(SMALL, tmp_path)
    assert write_shapes(SMALL.model_copy(update={"train_images": 1}), tmp_path)
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["000001.jpg"]


def test_an_interrupted_data_set_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(SMALL, tmp_path)
    assert write_shapes(SMALL, tmp_path)
    assert len(list((tmp_path / "val").iterdir())) == 3


def test_a_damaged_marker_is_an_error(tmp_path: Path):
    for content in ("", "[]", "3"):
        (tmp_path / "shapes.json").write_text(content)
        for use in (write_shapes, holds_other_shapes):
            with pytest.raises(UserError, match=r"shapes\.json: .*; delete .* to generate the data set anew"):
                use(SMALL, tmp_path)


@pytest.mark.parametrize("name", ["train/mine.jpg", "annotations/instances_val.json"])
def test_files_of_someone_else_are_not_overwritten(tmp_path: Path, name: str):
    mine = tmp_path / name
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="already exists and was not made by"):
        write_shapes(SMALL, tmp_path)
    assert mine.read_text() == "mine"


def test_a_seed_draws_what_it_always_drew(scenes):
    """Results of years are of the same images: means of colours to within 0.03 of 255, annotations to the pixel.
    scenes.json was written by this code.
    """
    expected = json.loads(Path(__file__).with_name("scenes.json").read_text())
    for (pixels, annotations), stored in zip(scenes, expected, strict=False):
        assert [[a["category_id"], a["iscrowd"], a["area"], *a["bbox"]] for a in annotations] == stored["annotations"]
        thumbnail = pixels.reshape(4, pixels.shape[0] // 4, 4, pixels.shape[1] // 4, 3)
        np.testing.assert_allclose(thumbnail.mean((1, 3)), stored["colours"], atol=0.03)
        np.testing.assert_allclose(thumbnail.std((1, 3)), stored["contrast"], atol=0.03)
