"""The predict stage on files of many kinds, with an untrained network."""

import json
import os
import re
import resource
import shutil
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from components import predict
from components.config import Config
from components.inference.entries import entries_in
from components.params import save_config
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import last_checkpoint
from model.errors import UserError


@pytest.fixture(scope="module")
def config(trained_run: Config) -> Config:
    """Untrained heads are unsure, so everything is written."""
    return trained_run.model_copy(update={"predict": trained_run.predict.model_copy(update={"score_threshold": 0.0})})


@pytest.fixture
def photo(coco_like: Path) -> Path:
    return sorted((coco_like / "val2017").glob("*.jpg"))[0]


def test_an_image_named_like_an_override_is_an_image(
    config: Config, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(photo, "v1.x=2.jpg")
    save_config(config, tmp_path / "params.yaml")
    predict.main(["v1.x=2.jpg", "data.workers=1"])
    (entry,) = json.loads((tmp_path / "predictions" / "predictions.json").read_text())["images"]
    assert entry["file"] == "v1.x=2.jpg"


def test_images_that_look_black_are_named(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A picture of 12 bits in 16, read without data.pixel_range."""
    ramp = np.linspace(0, 4095, 96 * 96).reshape(96, 96)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 16).astype(np.uint8)).save(tmp_path / "plain.png")
    predict.run(config, [tmp_path / "deep.png", tmp_path / "plain.png"], output=tmp_path / "out")
    warning = f"warning: 1 images look black, such as {tmp_path}/deep.png; images of more than 8 bits are read with the"
    assert warning in capsys.readouterr().err


@pytest.fixture
def folder(photo: Path, tmp_path: Path) -> Path:
    """Landscape, portrait, gray, palette and transparent images, one of them deeper, beside a text."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    image = Image.open(photo).convert("RGB").resize((200, 120))
    image.save(root / "wide.jpg")
    image.rotate(90, expand=True).save(root / "tall.png")
    image.convert("L").save(root / "gray.webp")
    image.convert("P").save(root / "palette.gif")
    image.convert("RGBA").save(root / "deep" / "wide.jpg", format="PNG")
    (root / "notes.txt").write_text("no image")
    return root


def document(output: Path) -> dict[str, Any]:
    return json.loads((output / "predictions.json").read_text())


def test_folder_is_searched_and_every_image_drawn(config: Config, folder: Path, tmp_path: Path) -> None:
    result = predict.run(config, [folder], output=tmp_path / "out")
    drawn = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert drawn == {"predictions.json", "wide.jpg", "tall.png", "gray.png", "palette.png", "deep/wide.jpg"}
    files = [image["file"] for image in document(tmp_path / "out")["images"]]
    assert files == sorted(str(path) for path in folder.rglob("*.*") if path.suffix != ".txt")
    assert result.unreadable == []


def test_entry_describes_objects_in_pixels_of_the_file(config: Config, folder: Path, tmp_path: Path) -> None:
    predict.run(config, [folder / "tall.png"], output=tmp_path / "out")
    (image,) = document(tmp_path / "out")["images"]
    assert image["size"] == [200, 120]
    assert len(image["detections"]) > 0
    for found in image["detections"]:
        x1, y1, x2, y2 = found["bbox"]
        assert 0 <= x1 < x2 <= 120.01
        assert 0 <= y1 < y2 <= 200.01
        assert coco_mask.decode(found["segmentation"]).shape == (200, 120)
        assert found["class"]
    scores = [found["score"] for found in image["detections"]]
    assert scores == sorted(scores, reverse=True)


def test_only_sure_detections_are_written(config: Config, photo: Path, tmp_path: Path) -> None:
    predict.run(config, [photo], output=tmp_path / "all")
    scores = [found["score"] for found in document(tmp_path / "all")["images"][0]["detections"]]
    threshold = float(np.median(scores))
    strict = config.model_copy(update={"predict": config.predict.model_copy(update={"score_threshold": threshold})})
    predict.run(strict, [photo], output=tmp_path / "sure")
    kept = [found["score"] for found in document(tmp_path / "sure")["images"][0]["detections"]]
    assert kept == [score for score in scores if score >= threshold]
    assert 0 < len(kept) < len(scores)


def test_the_dtype_is_that_of_training_or_the_one_asked_for(config: Config, photo: Path, tmp_path: Path) -> None:
    found = {}
    for dtype in ("trained", "float32", "bfloat16"):
        settings = config.predict.model_copy(update={"dtype": dtype})
        predict.run(config.model_copy(update={"predict": settings}), [photo], output=tmp_path / dtype)
        found[dtype] = [one["score"] for one in document(tmp_path / dtype)["images"][0]["detections"]]
    assert config.train.dtype == "float32"
    assert found["trained"] == found["float32"] != found["bfloat16"]
    np.testing.assert_allclose(found["bfloat16"][0], found["float32"][0], rtol=0.05)


def test_exif_orientation_is_obeyed(config: Config, photo: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(photo).convert("RGB").resize((200, 120)).save(tmp_path / "turned.jpg", exif=exif)
    predict.run(config, [tmp_path / "turned.jpg"], output=tmp_path / "out")
    assert document(tmp_path / "out")["images"][0]["size"] == [200, 120]


def test_unreadable_file_is_named_and_the_rest_predicted(
    config: Config, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jpg").write_bytes((folder / "wide.jpg").read_bytes()[:300])
    (folder / "fake.png").write_text("no image")
    save_config(config, tmp_path / "params.yaml")
    with pytest.raises(SystemExit) as end:
        predict.main(["--params", str(tmp_path / "params.yaml"), "--output", str(tmp_path / "out"), str(folder)])
    assert end.value.code == 1
    assert [Path(image["file"]).name for image in document(tmp_path / "out")["unreadable"]] == [
        "broken.jpg",
        "fake.png",
    ]
    assert len(document(tmp_path / "out")["images"]) == 5
    assert "broken.jpg" in capsys.readouterr().out


def test_a_name_that_is_not_utf_8_loses_nothing(config: Config, folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"f\xfcr.jpg")
    (folder / "wide.jpg").rename(folder / name)
    result = predict.run(config, [folder / name, folder / "tall.png"], output=tmp_path / "out")
    assert [image["file"] for image in document(tmp_path / "out")["images"]] == [
        f"{folder}/f\\udcfcr.jpg", f"{folder}/tall.png"
    ]  # fmt: skip
    assert (tmp_path / "out" / name).is_file()
    assert len(result.images) == 2


def test_a_name_of_the_greatest_length_is_predicted(config: Config, photo: Path, tmp_path: Path) -> None:
    name = "x" * 251 + ".jpg"
    shutil.copy(photo, tmp_path / name)
    settings = config.predict.model_copy(update={"crop": True, "masks": "png"})
    result = predict.run(config.model_copy(update={"predict": settings}), [tmp_path / name], output=tmp_path / "out")
    (entry,) = result.images
    assert Path(entry["file"]).name == name
    assert (tmp_path / "out" / entry["drawing"]).is_file()
    assert (tmp_path / "out" / entry["detections"][0]["crop"]).is_file()


def test_an_error_keeps_the_predictions_before_it(config: Config, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "wide.jpg").mkdir(parents=True)  # where the second drawing must go
    one = config.model_copy(update={"predict": config.predict.model_copy(update={"batch_size": 1})})
    with pytest.raises(IsADirectoryError):
        predict.run(one, [folder / "tall.png", folder / "wide.jpg"], output=tmp_path / "out")
    assert [Path(image["file"]).name for image in document(tmp_path / "out")["images"]] == ["tall.png"]


def test_what_a_killed_call_had_found_is_kept_and_named_by_the_next(
    config: Config, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name in ("predictions.part.jsonl.old-1", "predictions.part.jsonl.old-2"):
        child = os.fork()
        if not child:
            out.mkdir(exist_ok=True)
            with entries_in(out, "step.pt", []) as entries:
                for i in range(3):
                    entries.add(i, {"file": f"{i}.jpg", "detections": []})
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        predict.run(config, [folder / "tall.png"], output=out)
        assert f"{out / name} has its predictions of 3 images" in capsys.readouterr().err
        lines = (out / name).read_text().splitlines()
        assert [json.loads(line)["file"] for line in lines] == ["0.jpg", "1.jpg", "2.jpg"]
    assert not (out / "predictions.part.jsonl").exists()
    assert len(document(out)["images"]) == 1


def test_a_full_disk_leaves_whole_lines_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for the disk: it, too, writes what still fits, and then no more."""
    entry = {"file": "x" * 440, "detections": [{}, {}]}

    def fill() -> None:
        with entries_in(tmp_path, "step.pt", []) as entries:
            for i in range(9):
                entries.add(i, entry)

    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="File too large"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    part = tmp_path / "predictions.part.jsonl"
    assert f"{part} has the predictions of 2 images" in capsys.readouterr().err
    assert [json.loads(line) for line in part.read_text().splitlines()] == [entry, entry]
    assert [path.name for path in tmp_path.iterdir()] == [part.name], "no half of predictions.json"


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    tracemalloc.start()
    with entries_in(tmp_path, "step.pt", []) as entries:
        for i in reversed(range(300)):
            entries.add(i, {"file": str(i), "detections": [{"counts": "x" * 10_000}]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [image["file"] for image in document(tmp_path)["images"]] == [str(i) for i in range(300)]
    assert peak < 1_000_000 < 300 * 10_000


def test_images_of_one_name_get_drawings_of_their_own(config: Config, folder: Path, tmp_path: Path) -> None:
    predict.run(config, [folder / "wide.jpg", folder / "deep" / "wide.jpg"], output=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jpg")) == ["wide.jpg", "wide_2.jpg"]


def test_without_an_image_some_of_the_val_split_are_taken(config: Config) -> None:
    two = config.model_copy(update={"predict": config.predict.model_copy(update={"images": 2})})
    result = predict.run(two)
    assert result.output == config.train.output_dir / "predictions"
    assert len(list(result.output.glob("*.jpg"))) == len(result.images) == 2


def test_own_images_are_drawn_here_and_leave_the_run_alone(
    config: Config, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """<run>/predictions is the output of the pipeline's predict stage; a change there would make it run again."""
    monkeypatch.chdir(tmp_path)
    assert predict.run(config, [folder / "tall.png"]).output == Path("predictions")
    assert (tmp_path / "predictions" / "tall.png").is_file()


def test_folder_that_was_named_keeps_what_else_it_holds(config: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    predict.run(config, output=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert len(document(tmp_path)["images"]) == 4


def test_overrides_and_images_stand_in_any_order(config: Config, folder: Path, tmp_path: Path) -> None:
    save_config(config, tmp_path / "params.yaml")
    arguments = ["predict.batch_size=1", str(folder / "wide.jpg"), "--output", str(tmp_path / "out")]
    predict.main(["--params", str(tmp_path / "params.yaml"), *arguments, "predict.score_threshold=1.0"])
    assert document(tmp_path / "out")["images"][0]["detections"] == []


def test_drawings_never_replace_the_images(config: Config, folder: Path) -> None:
    before = (folder / "wide.jpg").read_bytes()
    with pytest.raises(UserError, match="replace the images"):
        predict.run(config, [folder / "wide.jpg"], output=folder)
    assert (folder / "wide.jpg").read_bytes() == before


def test_drawings_of_an_earlier_call_are_not_searched(config: Config, folder: Path) -> None:
    predict.run(config, [folder], output=folder / "out")
    again = predict.run(config, [folder], output=folder / "out")
    assert len(again.images) == 5


@pytest.mark.parametrize(("name", "message"), [("absent.jpg", "does not exist"), ("empty", "has none")])
def test_path_without_images_is_an_error(config: Config, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        predict.run(config, [tmp_path / name])


def weights_file(config: Config, path: Path) -> Path:
    """The weights of the run's checkpoint alone."""
    checkpoint = last_checkpoint(config.train.output_dir)
    assert checkpoint is not None
    torch.save(read_checkpoint(checkpoint)["model"], path)
    return path


def test_in_an_empty_folder_weights_and_an_image_are_enough(
    config: Config, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = weights_file(config, tmp_path / "weights.pth")
    checkpoint = last_checkpoint(config.train.output_dir)
    for words in (
        ["--weights", str(weights)],
        ["--weights", str(config.train.output_dir)],
        ["--checkpoint", str(checkpoint)],
    ):
        predict.main([str(photo), *words, "--threshold", "0", "--output", "out"])
        found = document(tmp_path / "out")
        assert found["images"][0]["detections"], words
        assert "objects with a score of 0 or more in 1 image: out" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "weights.pth"]


def test_without_parameter_file_and_weights_the_error_names_both(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, says in (
        ([], r"params\.yaml: no such parameter file.*--weights \(coco needs no run\)"),
        (["--checkpoint", "best"], r"params\.yaml: no such parameter file"),
        (["--weights", "coco", "--params", "other.yaml"], r"other\.yaml: no such parameter file"),
    ):
        with pytest.raises(SystemExit) as end:
            predict.main([str(photo), *words])
        assert end.value.code == 2
        assert re.search(says, capsys.readouterr().err), words
    with pytest.raises(UserError, match="--weights: must be used with images, got none"):
        predict.run(Config(), weights="coco")


def with_settings(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"predict": config.predict.model_copy(update=settings)})


def test_masks_are_the_same_in_each_form(config: Config, photo: Path, tmp_path: Path) -> None:
    forms = {}
    for masks in ("rle", "polygons", "png"):
        predict.run(with_settings(config, masks=masks), [photo], output=tmp_path / masks)
        (forms[masks],) = document(tmp_path / masks)["images"]
    height, width = forms["rle"]["size"]
    drawing = forms["png"]["drawing"]
    assert len(list((tmp_path / "png" / f"{drawing}.masks").iterdir())) == len(forms["rle"]["detections"]) > 3
    for number, (rle, polygons, png) in enumerate(
        zip(*(form["detections"] for form in forms.values()), strict=True), 1
    ):
        expected = coco_mask.decode(rle["segmentation"])
        parts = coco_mask.frPyObjects(polygons["segmentation"], height, width) if polygons["segmentation"] else []
        assert (coco_mask.decode(coco_mask.merge(parts)) == expected).all() if parts else not expected.any()
        assert png["mask"] == f"{drawing}.masks/{number:03}.png"
        assert (np.asarray(Image.open(tmp_path / "png" / png["mask"])) == 255 * expected).all()
        assert "segmentation" not in png
        assert rle["category_id"] == polygons["category_id"]


def test_crops_show_each_object_alone_and_those_of_an_earlier_call_go(
    config: Config, photo: Path, tmp_path: Path
) -> None:
    predict.run(with_settings(config, crop=True), [photo], output=tmp_path)
    (image,) = document(tmp_path)["images"]
    pixels = np.asarray(Image.open(photo).convert("RGB"))
    one = image["detections"][0]
    crop = np.asarray(Image.open(tmp_path / one["crop"]))
    x1, y1 = (int(value) for value in one["bbox"][:2])
    mask = coco_mask.decode(one["segmentation"])[y1 : y1 + crop.shape[0], x1 : x1 + crop.shape[1]]
    assert (crop[..., 3] == 255 * mask).all()
    assert (crop[..., :3] == pixels[y1 : y1 + crop.shape[0], x1 : x1 + crop.shape[1]]).all()
    scores = [found["score"] for found in image["detections"]]
    predict.run(with_settings(config, crop=True, score_threshold=scores[1]), [photo], output=tmp_path)
    assert len(list((tmp_path / one["crop"]).parent.iterdir())) == sum(score >= scores[1] for score in scores)


def test_only_classes_that_were_asked_for_are_written(
    config: Config, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.run(config, [photo], output=tmp_path / "all")
    everything = document(tmp_path / "all")["images"][0]["detections"]
    wanted = everything[0]["class"]
    assert any(one["class"] != wanted for one in everything)
    save_config(config, tmp_path / "params.yaml")
    words = ["--params", str(tmp_path / "params.yaml"), "--output", str(tmp_path / "some"), str(photo)]
    predict.main([*words, "--classes", f" {wanted} "])
    assert document(tmp_path / "some")["images"][0]["detections"] == [
        one for one in everything if one["class"] == wanted
    ]
    with pytest.raises(SystemExit):
        predict.main([*words, "--classes", f"{wanted},{wanted}x"])
    assert f"classes: must be classes of this network, got {wanted}x; did you mean {wanted}?" in capsys.readouterr().err


def test_an_image_that_pillow_finds_too_large_is_predicted_in_tiles(
    config: Config, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = Image.open(photo).width * Image.open(photo).height
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels // 2 - 1)  # it refuses twice as many
    (refused,) = predict.run(config, [photo], output=tmp_path / "whole").unreadable
    assert "maskrcnn predict reads it with --tile" in refused["reason"]
    assert predict.run(with_settings(config, tile_px=64), [photo], output=tmp_path / "tiles").count == 1
    assert pixels // 2 - 1 == Image.MAX_IMAGE_PIXELS


def test_a_large_image_is_predicted_in_tiles_too(config: Config, photo: Path, tmp_path: Path) -> None:
    """Nine photos in one: each is seen as large as if it were alone."""
    small = np.asarray(Image.open(photo).convert("RGB").resize((120, 90)))
    Image.fromarray(np.tile(small, (3, 3, 1))).save(tmp_path / "large.png")
    predict.run(config, [tmp_path / "large.png"], output=tmp_path / "whole")
    height, width = small.shape[:2]
    predict.run(with_settings(config, tile_px=max(height, width)), [tmp_path / "large.png"], output=tmp_path / "tiles")
    save_config(config, tmp_path / "params.yaml")
    words = ["--params", str(tmp_path / "params.yaml"), "--tile", str(max(height, width)), "--tiles-only"]
    predict.main([*words, str(tmp_path / "large.png"), "--output", str(tmp_path / "only")])
    only = document(tmp_path / "only")["images"][0]["detections"]
    whole, tiles = (document(tmp_path / name)["images"][0]["detections"] for name in ("whole", "tiles"))
    assert len(whole) < len(only) <= len(tiles)
    assert max(one["bbox"][2] - one["bbox"][0] for one in only) <= max(height, width) + 1 or len(only) < len(tiles)
    assert all(one["segmentation"]["size"] == [3 * height, 3 * width] for one in tiles)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threshold", "70"], r"^error: --threshold 70: predict\.score_threshold: must be .*, or best, got 70\n$"),
        (["--threshold", "high"], r"^error: --threshold high: .* must be from 0 to 1, or best, got 'high'\n$"),
        (["--masks", "jpg"], r"^error: --masks jpg: predict\.masks: "),
        (["--tile", "-1"], r"^error: --tile -1: "),
        (["--tile", "1"], r"^error: --tile 1: .*must be 0, for no tiles, or at least 32"),
        (["--tile", "512", "--overlap", "0"], r"^error: --overlap 0: "),
        (["predict.tile_px=1"], r"^error: override 'predict\.tile_px=1': "),
        (["--weights", "/dev/null"], r"got /dev/null, which is a pipe or a device$"),
    ],
)
def test_an_option_out_of_range_is_named(
    words: list[str],
    says: str,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        predict.main([str(photo), "--weights", "coco", *words])
    assert end.value.code == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "predictions").exists()


def test_each_class_has_its_own_best_threshold(
    config: Config, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict.run(config, [photo], output=tmp_path / "all")
    (everything,) = (image["detections"] for image in document(tmp_path / "all")["images"])
    label = everything[0]["class"]
    own = [one["score"] for one in everything if one["class"] == label]
    others = [one["score"] for one in everything if one["class"] != label]
    thresholds = {label: own[len(own) // 2], "all": others[len(others) // 2]}
    run = tmp_path / "run"
    shutil.copytree(config.train.output_dir, run)
    point = {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    best = {
        "all": point | {"threshold": thresholds["all"]},
        "per_class": {label: point | {"threshold": thresholds[label]}},
    }
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    analysis = {"checkpoint": checkpoint.relative_to(run).as_posix(), "data_hash": "", "best": best}
    (run / "analysis.json").write_text(json.dumps(analysis))
    settings = with_settings(config, score_threshold="best")
    predict.run(settings, [photo], weights=str(run), output=tmp_path / "best")
    expected = [one for one in everything if one["score"] >= thresholds.get(one["class"], thresholds["all"])]
    assert document(tmp_path / "best")["images"][0]["detections"] == expected
    assert 1 < len(expected) < len(everything)
    assert "warning" not in capsys.readouterr().err
    (run / "analysis.json").write_text(json.dumps(analysis | {"test_time": {"flip": True}}))
    predict.run(settings, [photo], weights=str(run), output=tmp_path / "best")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the best thresholds were found with evaluate.flip=true; predict makes other")
    predict.run(config, [photo], weights=str(run), output=tmp_path / "best")
    assert "warning" not in capsys.readouterr().err, "a number is a number"


def test_with_weights_another_programs_parameter_file_is_not_read(
    config: Config, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text("train: {lr: 0.1}\nprepare: yes\n")
    words = [str(photo), "--weights", str(config.train.output_dir), "--threshold", "0"]
    predict.main([*words, "--output", "out"])
    assert document(tmp_path / "out")["images"][0]["detections"]
    with pytest.raises(SystemExit) as end:
        predict.main([*words, "--params", "./params.yaml", "train.base_lr=1"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("dog, person", ("dog", "person")),
        ("traffic light,person", ("traffic light", "person")),
        ('"bolt, large",nut', ("bolt, large", "nut")),
        ('5" pipe', ('5" pipe',)),
    ],
)
def test_names_of_classes_may_have_commas_within_quotes(
    value: str, names: tuple[str, ...], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[tuple[str, ...]] = []

    def note(config: Config, *_args: Any, **_options: Any) -> predict.PredictResult:
        wanted.append(config.predict.classes)
        return predict.PredictResult(Path(), 0, 0)

    monkeypatch.setattr(predict, "run", note)
    predict.main([str(photo), "--weights", "coco", "--classes", value])
    assert wanted == [names]


def test_images_where_crops_go_are_refused_and_other_files_there_stay(
    config: Config, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = with_settings(config, crop=True)
    predict.run(some, [photo], output=tmp_path / "out")
    crops = tmp_path / "out" / f"{photo.name}.crops"
    crop = min(crops.iterdir())
    for inputs in ([photo, crop], [photo, crops]):
        with pytest.raises(UserError, match=r"001\.png: must not be where the crops or masks of another image go"):
            predict.run(some, inputs, output=tmp_path / "out")
    assert crop.is_file()
    (crops / "notes.txt").write_text("mine")
    predict.run(config, [photo], output=tmp_path / "out")
    assert [path.name for path in crops.iterdir()] == ["notes.txt"]


def test_settings_of_tiles_without_tiles_are_refused(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["--tiles-only"], ["--overlap", "0.3"]):
        with pytest.raises(SystemExit):
            predict.main([str(photo), "--weights", "coco", *words])
        assert "--overlap and --tiles-only: must be used with --tile" in capsys.readouterr().err
