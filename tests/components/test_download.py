"""Download over loopback: zips made of real COCO images, a server that cuts, refuses, alters and deceives."""

import hashlib
import io
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.config import Config
from components.datasets import transfer
from components.datasets.transfer import DownloadError
from components.download import run
from model.config import DataConfig, ShapesConfig
from model.errors import UserError

TRAIN, VAL, ANNOTATIONS = "/zips/train2017.zip", "/zips/val2017.zip", "/annotations/annotations_trainval2017.zip"


@dataclass
class FileServer:
    """What is served, how, and what was asked for."""

    files: dict[str, bytes]
    ranges: bool = True  # honours Range and If-Range
    etags: bool = True
    cuts: list[int] = field(default_factory=list)  # the next bodies end after so many bytes
    refusals: int = 0  # the next requests are answered 503
    url: str = ""
    requests: list[tuple[str, str, int]] = field(default_factory=list)  # (method, path, first byte)

    def bodies(self, path: str) -> list[int]:
        """The first byte of each GET of a path, in order."""
        return [first for method, asked, first in self.requests if (method, asked) == ("GET", path)]


@contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            content = server.files.get(self.path)
            if server.refusals:
                server.refusals -= 1
                return self.send_error(503)
            if content is None:
                return self.send_error(404)
            tag = f'"{hash(content)}"'
            first = 0
            if server.ranges and "Range" in self.headers and self.headers.get("If-Range") == tag:
                first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            server.requests.append((self.command, self.path, first))
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            if server.etags:
                self.send_header("ETag", tag)
            self.send_header("Content-Length", str(len(content) - first))
            self.end_headers()
            if body:
                rest = content[first:]
                self.wfile.write(rest[: server.cuts.pop(0)] if server.cuts and len(rest) > server.cuts[0] else rest)
            self.close_connection = True
            return None

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def archives(coco_like: Path) -> dict[str, bytes]:
    """Three zips as COCO's server has them, with five images a split."""

    def folder(name: str) -> bytes:
        images = sorted((coco_like / name).iterdir())[:5]
        return zipped({f"{name}/{image.name}": image.read_bytes() for image in images})

    annotations = {f"annotations/{path.name}": path.read_bytes() for path in (coco_like / "annotations").iterdir()}
    return {TRAIN: folder("train2017"), VAL: folder("val2017"), ANNOTATIONS: zipped(annotations)}


@pytest.fixture
def server(archives: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "_BACKOFF_S", (0.0, 0.0))
    with serving(FileServer(dict(archives))) as running:
        yield running


def config(raw_dir: Path, server: FileServer) -> Config:
    return Config(data=DataConfig(source="coco2017", raw_dir=raw_dir, base_url=server.url))


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".download" not in path.parts
    }


def expected(server: FileServer) -> dict[str, bytes]:
    found = {}
    for content in (server.files[TRAIN], server.files[VAL], server.files[ANNOTATIONS]):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found |= {name: archive.read(name) for name in archive.namelist()}
    return found


def test_brings_every_file_of_every_archive_and_leaves_no_zip(server: FileServer, tmp_path: Path):
    assert run(config(tmp_path, server)).changed
    assert files_below(tmp_path) == expected(server)


def test_a_second_run_asks_the_server_nothing(server: FileServer, tmp_path: Path):
    run(config(tmp_path, server))
    server.requests.clear()
    assert not run(config(tmp_path, server)).changed
    assert server.requests == []


def test_coco_unpacked_by_someone_else_is_taken_as_it_is(server: FileServer, coco_like: Path, tmp_path: Path):
    assert not run(config(coco_like, server)).changed
    assert server.requests == []
    shutil.copytree(coco_like, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for folder in [tmp_path, *(path for path in tmp_path.iterdir() if path.is_dir())]:
        folder.chmod(0o755)  # where the data is read-only, its copy is too
    next((tmp_path / "val2017").iterdir()).unlink()
    assert run(config(tmp_path, server)).changed


@pytest.mark.parametrize("text", ["[", "{}", "[]", '{"images": [{}]}', '{"images": [0]}'])
def test_annotations_of_coco_that_say_nothing_are_fetched_again(server: FileServer, tmp_path: Path, text: str):
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(text)
    assert run(config(tmp_path, server)).changed
    assert files_below(tmp_path) == expected(server)


def test_only_the_archive_whose_file_was_lost_is_fetched_again(server: FileServer, tmp_path: Path):
    run(config(tmp_path, server))
    server.requests.clear()
    next((tmp_path / "val2017").iterdir()).unlink()
    run(config(tmp_path, server))
    assert files_below(tmp_path) == expected(server)
    assert {path for method, path, _ in server.requests if method == "GET" and path in server.files} == {VAL}


def test_a_cut_connection_goes_on_from_where_it_broke(server: FileServer, tmp_path: Path):
    server.cuts = [200_000, 100_000]
    run(config(tmp_path, server))
    first, second, third = server.bodies(TRAIN)
    assert (first, second > 0, third > second) == (0, True, True)
    assert files_below(tmp_path) == expected(server)


@pytest.mark.parametrize("missing", ["ranges", "etags"])
def test_a_cut_starts_over_where_the_server_cannot_resume(server: FileServer, tmp_path: Path, missing: str):
    setattr(server, missing, False)
    server.cuts = [200_000]
    run(config(tmp_path, server))
    assert server.bodies(TRAIN) == [0, 0]
    assert files_below(tmp_path) == expected(server)


def test_a_stopped_download_is_resumed_by_the_next_run(server: FileServer, tmp_path: Path):
    server.cuts = [200_000, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"train2017.zip.*2 times in a row.*Run `maskrcnn download` again"):
        run(config(tmp_path, server))
    server.cuts = []
    server.requests.clear()
    run(config(tmp_path, server))
    assert server.bodies(TRAIN)[0] > 0
    assert files_below(tmp_path) == expected(server)


def test_a_part_of_another_version_is_not_continued(server: FileServer, tmp_path: Path, archives: dict[str, bytes]):
    server.cuts = [200_000, 0, 0, 0]
    with pytest.raises(DownloadError):
        run(config(tmp_path, server))
    server.cuts = []
    server.files[TRAIN] = archives[VAL].replace(b"val2017/", b"val2018/")
    run(config(tmp_path, server))
    assert files_below(tmp_path) == expected(server)


def test_a_server_that_is_unwell_for_a_moment_is_asked_again(server: FileServer, tmp_path: Path):
    server.refusals = 2
    assert run(config(tmp_path, server)).changed


def test_a_file_that_the_server_lacks_is_an_error_at_once(server: FileServer, tmp_path: Path):
    del server.files[VAL]
    with pytest.raises(DownloadError, match=r"val2017.zip: the server answered 404"):
        run(config(tmp_path, server))
    assert server.bodies(TRAIN) == []


def test_a_wrong_byte_is_found_by_the_published_md5(server: FileServer, tmp_path: Path):
    good = server.files[TRAIN]
    server.files[f"{TRAIN}.md5"] = f"{hashlib.md5(good).hexdigest()}  train2017.zip".encode()
    server.files[TRAIN] = good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    with pytest.raises(DownloadError, match=r"MD5 must be [0-9a-f]{32}, got [0-9a-f]{32}, twice"):
        run(config(tmp_path, server))
    assert files_below(tmp_path) == {}


def test_a_file_that_was_cut_short_is_fetched_again_though_every_name_is_there(
    server: FileServer, coco_like: Path, tmp_path: Path
):
    """All of the set is served, so that every image that the annotations name is there."""
    for path, name in ((TRAIN, "train2017"), (VAL, "val2017")):
        server.files[path] = zipped(
            {f"{name}/{image.name}": image.read_bytes() for image in (coco_like / name).iterdir()}
        )
    run(config(tmp_path, server))
    assert not run(config(tmp_path, server)).changed
    short = next((tmp_path / "val2017").iterdir())
    short.write_bytes(short.read_bytes()[:-1])
    server.requests.clear()
    assert run(config(tmp_path, server)).changed
    assert [len(server.bodies(path)) for path in (TRAIN, VAL, ANNOTATIONS)] == [0, 1, 0]
    assert files_below(tmp_path) == expected(server)


@pytest.mark.parametrize(
    ("damage", "bodies"), [("none", []), ("short", [0]), ("short, no MD5", [0]), ("one byte", [0])]
)
def test_a_zip_that_lies_there_already_serves_if_it_is_whole(
    server: FileServer, tmp_path: Path, damage: str, bodies: list[int]
):
    good = server.files[TRAIN]
    if "no MD5" not in damage:
        server.files[f"{TRAIN}.md5"] = hashlib.md5(good).hexdigest().encode()
    content = {"none": good, "one byte": b"x" + good[1:]}.get(damage, good[:-1])
    (tmp_path / "train2017.zip").write_bytes(content)
    run(config(tmp_path, server))
    assert server.bodies(TRAIN) == bodies
    assert files_below(tmp_path) == expected(server)


def test_the_official_server_must_send_the_files_whose_md5_is_known_whatever_it_publishes(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("components.datasets.archives.OFFICIAL_HOST", "127.0.0.1")
    server.files[f"{TRAIN}.md5"] = hashlib.md5(server.files[TRAIN]).hexdigest().encode()
    with pytest.raises(DownloadError, match="MD5 must be cced6f7f71b7629ddf16f17bbcfab6b2, got"):
        run(config(tmp_path, server))
    assert files_below(tmp_path) == {}


def test_a_wrong_byte_in_the_kept_part_is_mended_by_a_fresh_start(server: FileServer, tmp_path: Path):
    good = server.files[TRAIN]
    server.files[f"{TRAIN}.md5"] = hashlib.md5(good).hexdigest().encode()
    server.cuts = [200_000, 0, 0, 0]
    with pytest.raises(DownloadError):
        run(config(tmp_path, server))
    part = tmp_path / "train2017.zip.part"
    part.write_bytes(b"x" + part.read_bytes()[1:])
    server.cuts = []
    run(config(tmp_path, server))
    assert files_below(tmp_path) == expected(server)


def test_a_wrong_byte_without_md5_is_found_by_the_zips_own_checksums(server: FileServer, tmp_path: Path):
    good = server.files[TRAIN]
    server.files[TRAIN] = good[:1000] + bytes([good[1000] ^ 1]) + good[1001:]
    with pytest.raises(DownloadError, match=r"train2017.zip: must be a valid zip file, but is damaged .*was deleted"):
        run(config(tmp_path, server))
    assert files_below(tmp_path) == {}
    server.files[TRAIN] = good
    run(config(tmp_path, server))
    assert files_below(tmp_path) == expected(server)


def test_a_full_disk_leaves_no_half_stamp_and_the_zip_that_was_fetched(server: FileServer, tmp_path: Path):
    stamp = tmp_path / ".download" / "train2017.zip.json"
    stamp.parent.mkdir()
    stamp.with_name(f"partial-{stamp.name}").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"must be readable and writable, got No space left on device. Free space"):
        run(config(tmp_path, server))
    assert not stamp.exists()
    run(config(tmp_path, server))
    assert server.bodies(TRAIN) == [0]
    assert files_below(tmp_path) == expected(server)


def test_a_raw_dir_that_cannot_be_written_is_a_clear_error(server: FileServer, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        DownloadError, match=r"file.*: must be readable and writable, got (Not a directory|File exists)"
    ):
        run(config(tmp_path / "file", server))


def test_too_small_a_disk_is_reported_before_anything_is_fetched(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"GiB must be free .* got 0.0 GiB"):
        run(config(tmp_path, server))
    assert all(method == "HEAD" for method, _, _ in server.requests)


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "train2017/../../evil.jpg", "C:evil.jpg"])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(server: FileServer, tmp_path: Path, name: str):
    server.files[TRAIN] = zipped({"train2017/good.jpg": b"good", name: b"evil"})
    with pytest.raises(DownloadError, match=r"must only have files inside the folder, got .*evil\.jpg"):
        run(config(tmp_path / "raw", server))
    assert not any(path.name.endswith(".jpg") for path in tmp_path.rglob("*"))


def test_an_archive_that_holds_a_link_is_refused(server: FileServer, tmp_path: Path):
    link = zipfile.ZipInfo("train2017/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc")
    server.files[TRAIN] = buffer.getvalue()
    with pytest.raises(DownloadError, match="must only have files inside the folder, got 'train2017/link', a link"):
        run(config(tmp_path, server))


def test_a_server_that_is_not_there_is_a_clear_error(tmp_path: Path, server: FileServer):
    data = DataConfig(source="coco2014", raw_dir=tmp_path, base_url="http://127.0.0.1:1")
    with pytest.raises(DownloadError, match=r"train2014.zip: cannot be reached: .*check the network"):
        run(Config(data=data))


def test_shapes_are_generated_once(tmp_path: Path):
    shapes = ShapesConfig(train_images=2, val_images=1, height_px=64, width_px=64)
    data = DataConfig(raw_dir=tmp_path, shapes=shapes, workers=0)
    assert run(Config(data=data)).changed
    assert not run(Config(data=data)).changed
    assert (tmp_path / "train" / "000002.jpg").is_file()


def test_a_custom_folder_is_only_looked_at(tmp_path: Path):
    data = DataConfig(source="custom", raw_dir=tmp_path, val_annotations="my/val.json")
    for name in ("images_train", "images_val", "my"):
        (tmp_path / name).mkdir()
    (tmp_path / "instances_train.json").touch()
    with pytest.raises(UserError, match=r"my/val.json: no such annotation file; set data.val_annotations"):
        run(Config(data=data))
    (tmp_path / "my" / "val.json").touch()
    before = sorted(tmp_path.rglob("*"))
    assert not run(Config(data=data)).changed
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_custom_folder_is_named(tmp_path: Path):
    with pytest.raises(DownloadError, match=r"images_train: no such image folder; set data.train_images"):
        run(Config(data=DataConfig(source="custom", raw_dir=tmp_path)))


def test_a_password_of_the_mirror_is_kept_in_no_file(server: FileServer, tmp_path: Path):
    mirror = server.url.replace("http://", "http://user:secret@")
    run(Config(data=DataConfig(source="coco2017", raw_dir=tmp_path, base_url=mirror)))
    stamps = [path.read_text() for path in (tmp_path / ".download").iterdir()]
    assert len(stamps) == 3
    assert all("http://***@127.0.0.1" in text and "secret" not in text for text in stamps)
