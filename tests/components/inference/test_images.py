"""Files that `maskrcnn predict` takes, passes over and refuses."""

import os
from pathlib import Path

import pytest

from components.inference.images import described, find_images, input_path
from model.errors import UserError


def test_folders_are_searched_and_the_rest_is_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    names = ("a.JPG", "b.jfif", "c.jpe", "d.mpo", "e.avif", "notes.txt", "film.mp4", "README", ".hidden.jpg", "x.txt")
    for path in [
        *(folder / name for name in names),
        folder / ".git" / "f.jpg",
        elsewhere / "g.png",
        folder / "h" / "i.bmp",
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "h" / "back").symlink_to(folder)  # a loop
    found = find_images([folder], tmp_path / "out")
    relative = [source.path.relative_to(folder).as_posix() for source in found.sources]
    assert relative == ["a.JPG", "b.jfif", "c.jpe", "d.mpo", "e.avif", "h/i.bmp", "linked/g.png"]
    assert described(found.passed_over) == "2 × .txt, 2 × hidden, 1 × .mp4, 1 × without extension"


def test_output_may_lie_above_or_within_the_input_but_not_replace_it(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "out").mkdir(parents=True)
    for name in ("a.jpg", "out/a.jpg"):
        (folder / name).touch()
    for output in (folder / "out", tmp_path):
        drawings = [source.drawing.as_posix() for source in find_images([folder], output).sources]
        assert drawings == (["a.jpg"] if output != tmp_path else ["a.jpg", "out/a.jpg"])
    for output in (folder, folder / "out" / ".."):
        with pytest.raises(UserError, match=r"--output .*: drawings would replace the images; set another folder"):
            find_images([folder], output)
    with pytest.raises(UserError, match="must be a folder for the drawings, but is a file"):
        find_images([folder], folder / "a.jpg")


def test_urls_and_folders_without_images_say_what_to_do(tmp_path: Path) -> None:
    for url in ("https://example.com/a.jpg", "s3://bucket/a.jpg"):
        with pytest.raises(UserError, match=f"^{url}: must be .* URLs are not fetched, download the image first"):
            input_path(url)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg: must be a file or a folder, but is a pipe or a device"):
        find_images([tmp_path / "pipe.jpg"], tmp_path / "out")
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").touch()
    with pytest.raises(UserError, match=r"films: must hold images .*, but has none, only 1 × \.mp4"):
        find_images([tmp_path / "films"], tmp_path / "out")


def test_names_of_the_greatest_length_get_shorter_drawings_of_their_own(tmp_path: Path) -> None:
    names = ["x" * 251 + ".jpg", "x" * 250 + "y.jpg", "猫" * 83 + ".tif"]
    for name in names:
        (tmp_path / name).touch()
    drawings = [source.drawing.name for source in find_images([tmp_path], tmp_path / "out").sources]
    assert sorted(drawings) == sorted(["x" * 230 + ".jpg", "x" * 230 + "_2.jpg", "猫" * 76 + ".png"])


def test_a_drawing_is_not_named_like_a_folder_of_drawings(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    for name in ("a.tif", "a.png/b.jpg"):
        (tmp_path / name).touch()
    drawings = [source.drawing.as_posix() for source in find_images([tmp_path], tmp_path / "out").sources]
    assert drawings == ["a.png/b.jpg", "a_2.png"]


def test_a_link_that_leads_to_itself_is_one_unreadable_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    assert [source.path.name for source in find_images([tmp_path], tmp_path / "out").sources] == ["a.jpg", "b.jpg"]
    (tmp_path / "loop").symlink_to("loop")
    for output in (tmp_path / "loop", tmp_path / "loop" / "out"):
        assert len(find_images([tmp_path], output).sources) == 2
