"""The Python door: networks by word, images of any form, and what is found in other tools' forms."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

import maskrcnn
from components.runs.thresholds import Thresholds
from model.config import DataConfig, ModelConfig, TrainConfig
from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN

CLASSES = ("nut", "bolt", "screw")
SMALL = {"fpn_channels": 32, "box_head_channels": 32, "mask_head_channels": 32, "mask_head_convs": 1}
DATA = DataConfig(
    min_sizes_px=(64,), max_size_px=96, eval_min_size_px=64, eval_max_size_px=96, buckets=((64, 96), (96, 64))
)


def checkpoint(path: Path, **changes: Any) -> Path:
    """A checkpoint of an untrained network, unsure of all classes."""
    config = ModelConfig(
        backbone="resnet18",
        stem_channels=32,
        weights="none",
        norm="group_norm",
        detections_per_image=20,
        **SMALL,
        **changes,
    )
    sections = {"model": config, "data": DATA, "train": TrainConfig()}
    torch.manual_seed(0)
    state = {
        "model": MaskRCNN(config, len(CLASSES)).state_dict(),
        "config": {name: section.model_dump(mode="json") for name, section in sections.items()},
        "class_names": list(CLASSES),
        "category_ids": [3, 5, 8],
        "step": 1,
        "data_hash": "",
    }
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> maskrcnn.Model:
    return maskrcnn.load(checkpoint(tmp_path_factory.mktemp("python") / "net.pt"), device="cpu")


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)


def same(one: maskrcnn.Found, other: maskrcnn.Found) -> bool:
    return list(one) == list(other) and (one.pixels == other.pixels).all()


def test_an_image_may_be_given_in_any_form(model: maskrcnn.Model, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(pixels).save(path := tmp_path / "image.png")
    found = model(pixels, threshold=0.0)
    assert len(found) == 20
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    entry = next(os.scandir(tmp_path))
    for image in (str(path), path, entry, path.read_bytes(), Image.open(path), tensor, tensor / 255):
        assert same(model(image, threshold=0.0), found), type(image)
    Image.fromarray(transparent := np.dstack([pixels, pixels[..., 0]])).save(tmp_path / "transparent.png")
    for image in (transparent, tmp_path / "transparent.png"):  # alpha is dropped
        assert same(model(image, threshold=0.0), found)
    gray = pixels[..., 0]
    assert same(model(gray, threshold=0.0), model(np.stack([gray] * 3, axis=2), threshold=0.0))


def test_a_turned_photo_is_upright_as_a_file_and_as_a_picture(
    model: maskrcnn.Model, pixels: NDArray[np.uint8], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path := tmp_path / "turned.png", exif=exif)
    assert model(path).size == model(Image.open(path)).size == (120, 80)


def test_a_list_gives_a_list_in_its_order_and_a_stream_takes_images_as_it_goes(
    model: maskrcnn.Model, pixels: NDArray[np.uint8]
) -> None:
    images = [np.roll(pixels if i % 3 else pixels.transpose(1, 0, 2), i, axis=0) for i in range(7)]
    alone = [model(image, threshold=0.0) for image in images]
    found = model(images, threshold=0.0)
    assert [one.size for one in found] == [image.shape[:2] for image in images]
    for one, other in zip(found, alone, strict=True):
        assert np.allclose(one.boxes, other.boxes, atol=0.01)
    taken: list[int] = []
    stream = model.stream((taken.append(i) or image for i, image in enumerate(images * 9)))
    next(stream)
    assert len(taken) == 32
    assert len(list(stream)) == 62
    assert model([]) == []


def test_a_stream_keeps_frames_of_which_its_caller_reuses_the_memory(
    model: maskrcnn.Model, pixels: NDArray[np.uint8]
) -> None:
    """Such as the buffer of a camera, whose frames are read ahead; as a tensor it may share the array's memory."""
    buffer = pixels.copy()

    def frames(as_given: Callable[[NDArray[np.uint8]], Any]) -> Iterator[Any]:
        for value in (0, 100, 200):
            buffer[:] = value
            yield as_given(buffer)

    for as_given in (np.asarray, lambda array: torch.from_numpy(array).permute(2, 0, 1)):
        assert [one.pixels.max() for one in model.stream(frames(as_given))] == [0, 100, 200]


def test_a_threshold_holds_for_its_own_call_alone(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    """One thread or task may be in the middle of a call, with another threshold, when another begins."""
    alone = [len(model(pixels, threshold=threshold)) for threshold in (0.0, 0.9)]
    calls = [
        model._predictor.objects([(0, pixels), (1, pixels)], batch_size=1, score_threshold=threshold)
        for threshold in (0.0, 0.9)
    ]
    in_turn = [[len(objects) for _, objects in pair] for pair in zip(*calls, strict=True)]
    assert in_turn == [alone, alone]
    assert alone[0] > alone[1]


def test_names_of_classes_are_for_weights_without_them(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "net.pt")
    with pytest.raises(
        UserError, match=r"class_names: must be left out, as .*net\.pt has names of its own: nut, bolt, screw"
    ):
        maskrcnn.load(path, class_names=["a", "b", "c"])
    torch.save(torch.load(path)["model"], path)
    with pytest.raises(UserError, match="class_names must be unique, got a, a, b"):
        maskrcnn.load(path, class_names=["a", "a", "b"])
    with pytest.raises(ValueError, match="class_names: must be a list of names, got 'abc'"):
        maskrcnn.load(path, class_names="abc")


def test_an_instance_has_its_mask_in_each_form(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    found = model(pixels, threshold=0.0)
    assert found.masks is not None
    assert found.masks.shape == (20, 80, 120)
    assert found.boxes.shape == (20, 4)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    for one, mask in zip(found, found.masks, strict=True):
        assert one.label == CLASSES[one.class_index]
        assert one.category_id == (3, 5, 8)[one.class_index]
        assert (one.mask == mask).all()
        parts = [polygon.ravel().tolist() for polygon in one.polygons or []]
        assert not parts or (coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, 80, 120))) == mask).all()
        assert bool(parts) == mask.any()


def test_results_in_cocos_format_are_those_of_pycocotools(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    found = model(pixels, threshold=0.0)
    for one, result in zip(found, found.to_coco(image_id=17), strict=True):
        x1, y1, x2, y2 = one.box
        assert result == {
            "image_id": 17, "category_id": one.category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": one.score,
            "segmentation": one.rle,
        }  # fmt: skip


def test_classes_threshold_and_tiles_choose_what_is_found(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    found = model(pixels, threshold=0.0)
    label = found[0].label
    assert list(model(pixels, threshold=0.0, classes=[label])) == [one for one in found if one.label == label]
    sure = float(np.sort(found.scores)[-5])
    assert len(model(pixels, threshold=sure)) == 5
    large = np.tile(pixels, (3, 3, 1))
    with_whole, tiles = (len(model(large, threshold=0.0, tile=120, whole=whole)) for whole in (True, False))
    assert with_whole >= tiles > 20


def test_a_network_without_masks_has_boxes_alone(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    found = maskrcnn.load(checkpoint(tmp_path / "net.pt", task="box"))(pixels, threshold=0.0)
    assert len(found) > 0
    assert (found.masks, found[0].mask, found[0].polygons, found[0].rle) == (None, None, None, None)
    assert "segmentation" not in found.to_coco()[0]
    assert found.draw().size == (600, 400)


def test_nothing_found_has_empty_arrays(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    found = model(pixels, threshold=1.0)
    assert (len(found), found.boxes.shape, found.to_coco()) == (0, (0, 4), [])
    assert found.masks is not None
    assert found.masks.shape == (0, 80, 120)
    assert repr(found) == "<nothing in 120 × 80 px>"


def test_a_drawing_and_a_slice_show_what_they_hold(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    found = model(pixels, threshold=0.0)
    first = found[:1]
    assert len(first) == 1
    assert repr(first) == f"<1 {found[0].label} in 120 × 80 px>"
    plain = np.asarray(model(pixels, threshold=1.0).draw())
    assert (np.asarray(first.draw()) != plain).any()


def test_supervision_gets_what_was_found(
    model: maskrcnn.Model, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class with the fields of supervision's Detections stands for it where it is not installed."""
    try:
        import supervision  # noqa: F401
    except ImportError:
        stand_in = ModuleType("supervision")
        stand_in.Detections = lambda **fields: type("Detections", (), fields)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "supervision", stand_in)
    found = model(pixels, threshold=0.0)
    detections = found.to_supervision()
    assert np.allclose(detections.xyxy, found.boxes)
    assert (detections.mask == found.masks).all()
    assert detections.class_id.tolist() == [one.class_index for one in found]
    assert detections.data["class_name"].tolist() == found.labels


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"\[height, width\] uint8, RGB or RGBA, got \[4, 5, 2\] uint8; OpenCV's BGR"),
        (np.zeros((4, 5, 3), np.float32), r"got \[4, 5, 3\] float32; floats from 0 to 1 become uint8 by \(255 \* im"),
        (np.zeros((0, 5, 3), np.uint8), r"got \[0, 5, 3\]"),
        (torch.zeros(4, 5, 3), r"\[3, height, width\]"),
        (torch.full((3, 4, 5), 2.0), "values from 0 to 1, got 2 to 2"),
        (torch.full((3, 4, 5), float("nan")), "values from 0 to 1, got nan"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "uint8 or float"),
        (None, "got NoneType"),
        (Image.new("RGB", (0, 5)), "must have a pixel, got one of 0 × 5 px"),
    ],
)
def test_what_is_no_image_is_refused(model: maskrcnn.Model, image: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model(image)


def test_what_cannot_be_read_is_named(model: maskrcnn.Model, pixels: NDArray[np.uint8], tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no image")
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for image, says in (
        (tmp_path / "notes.jpg", r"notes\.jpg: must be an image, but"),
        (tmp_path / "absent.jpg", r"absent\.jpg: must be an image, but does not exist"),
        ("https://example.org/cat.jpg", "URLs are not fetched"),
        (b"no image", "images: must be the bytes of an image file, but"),
        (
            Image.open(tmp_path / "cut.png"),
            r"images: .*cut\.png must be a picture that can be read as RGB, but .*trunc",
        ),
    ):
        with pytest.raises(UserError, match=says):
            model(image)


@pytest.mark.parametrize(("option", "value"), [
        ("threshold", 1.5), ("threshold", None), ("threshold", "high"), ("tile", -1), ("tile", 1), ("tile", 99.5),
        ("tile", "1024"), ("overlap", 0.0), ("overlap", 1.0), ("overlap", None), ("classes", "nut"), ("classes", None),
    ],
)  # fmt: skip
def test_an_option_of_another_kind_or_range_is_refused(
    model: maskrcnn.Model, pixels: NDArray[np.uint8], option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"^{option}: must be .*, got {value}$"):
        model(pixels, **{option: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="classes: must be classes of this network, got nutt; did you mean nut"):
        model(pixels, classes=["nutt"])


def test_to_import_it_needs_no_torch() -> None:
    code = "import sys, maskrcnn; print(*{'torch', 'mlflow', 'components'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.split() == []


def test_thresholds_that_were_found_otherwise_are_a_warning(
    model: maskrcnn.Model, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Thresholds(0.3, {}, {"flip": True})
    monkeypatch.setattr(model, "_network", replace(model._network, registered=best))
    with pytest.warns(UserWarning, match=r"found with evaluate\.flip=true"):
        model(pixels, threshold="best")


def test_defaults_are_those_of_the_command() -> None:
    from components.config import PredictConfig

    settings = PredictConfig()
    assert (maskrcnn.load.__kwdefaults__ or {})["batch_size"] == settings.batch_size
    assert (maskrcnn.load.__kwdefaults__ or {})["dtype"] == settings.dtype
    defaults = maskrcnn.Model.stream.__kwdefaults__
    assert defaults == {
        "threshold": settings.score_threshold, "classes": settings.classes, "tile": settings.tile_px,
        "overlap": settings.tile_overlap, "whole": settings.tile_whole,
    }  # fmt: skip


def test_a_network_computes_in_the_dtype_asked_for(tmp_path: Path, pixels: NDArray[np.uint8]) -> None:
    network = checkpoint(tmp_path / "net.pt")
    scores = [
        maskrcnn.load(network, device="cpu", dtype=dtype)(pixels, threshold=0.0).scores
        for dtype in ("trained", "float32", "bfloat16")
    ]
    assert scores[0].tolist() == scores[1].tolist() != scores[2].tolist()
    np.testing.assert_allclose(scores[2][0], scores[0][0], rtol=0.05)
    with pytest.raises(UserError, match=r"predict\.dtype: .*'float32'"):
        maskrcnn.load(network, device="cpu", dtype="half")  # type: ignore[arg-type]


def test_instances_are_chosen_by_a_condition_or_by_numbers(model: maskrcnn.Model, pixels: NDArray[np.uint8]) -> None:
    found = model(pixels, threshold=0.0)
    sure = found[found.scores >= found.scores[4]]
    assert list(sure) == list(found[:5]) == list(found[[0, 1, 2, 3, 4]])
    assert len(found[found.scores > 1]) == 0
    assert found[-1] == list(found)[-1]


def test_a_device_that_is_not_here_and_a_path_to_stream_are_refused(model: maskrcnn.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: must be auto, cpu, cuda or cuda:N, got gpu"):
        maskrcnn.load("coco", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(
            ValueError, match="device: must be cpu or auto where torch finds no GPU, as here, got cuda:1"
        ):
            maskrcnn.load("coco", device="cuda:1")
    with pytest.raises(ValueError, match="images: must be several to stream, got 'clip'"):
        next(model.stream("clip"))
