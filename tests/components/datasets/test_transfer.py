"""Transfer of one file from servers that are busy, full of errors, endless, or of two minds about the version."""

import gzip
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from components.datasets import transfer
from components.datasets.transfer import DownloadError, RemoteFile, fetch, look_up, part_of, published_md5

BODY = bytes(range(251)) * 800  # 200,800 bytes
SIZE = len(BODY)
TAG, DATE = '"v1"', "Sat, 28 Nov 2026 10:00:00 GMT"
MANY = 40  # requests after which every server is good, so that an endless download ends and the test fails

Answer = Callable[[BaseHTTPRequestHandler, int], None]  # to a GET from that byte on, 0 without a range


class Server:
    """Answers of GET and HEAD, and the Range of each GET."""

    def __init__(self, get: Answer, head: Answer | None = None):
        self.get, self.head = get, head or (lambda handler, _: send(handler, BODY))
        self.ranges: list[str | None] = []
        self.url = ""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            server.head(self, 0)
            self.close_connection = True

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            server.ranges.append(asked)
            answer = good if len(server.ranges) > MANY else server.get
            answer(self, int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0)
            self.close_connection = True

        def log_message(self, *args: Any) -> None:
            pass

    class Http(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:  # the client went away
            pass

    http = Http(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/f.zip"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, body: bytes = b"", status: int = 200, /, **headers: str | None) -> None:
    """Answer with headers (`content_length=None` leaves it out)."""
    handler.send_response(status)
    for name, value in ({"content_length": str(len(body))} | headers).items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def good(handler: BaseHTTPRequestHandler, start: int) -> None:
    if start:
        send(handler, BODY[start:], 206, content_range=f"bytes {start}-{SIZE - 1}/{SIZE}", etag=TAG)
    else:
        send(handler, BODY, etag=TAG)


def cut_at(end: int, **headers: str | None) -> Answer:
    """Serve the whole file, but break off."""
    return lambda handler, _: send(handler, BODY[:end], content_length=str(SIZE), **headers)


def resuming(rest: Answer, whole: Answer = good) -> Answer:
    """Answer a range by `rest`, and a request without one by `whole`."""
    return lambda handler, start: (rest if start else whole)(handler, start)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(transfer, "_BACKOFF_S", (0.0, 0.0, 0.0))


def bring(server: Server, target: Path) -> None:
    fetch(RemoteFile(server.url, SIZE), target, md5=None, progress=lambda done, total: None)


def keep(target: Path, content: bytes, validator: bytes | None = TAG.encode()) -> Path:
    """Lay down an incomplete file."""
    target.parent.mkdir()
    part = part_of(target)
    part.write_bytes(content)
    if validator is not None:
        part.with_name(f"{part.name}.validator").write_bytes(validator)
    return part


def test_a_server_without_progress_is_given_up(tmp_path: Path):
    ends = iter([90_000, 50_000] * MANY)  # always the whole, cut now later, now sooner
    answers: dict[str, tuple[Answer, str]] = {
        "shorter": (lambda h, _: send(h, BODY[:100_000]), f"announced {SIZE} bytes, but sends 100000"),
        "shorter, length unknown": (lambda h, _: send(h, BODY[:1000], content_length=None), "the answer ended early"),
        "empty rest": (
            resuming(
                lambda h, start: send(h, b"", 206, content_range=f"bytes {start}-{SIZE - 1}/{SIZE}"),
                cut_at(100, etag=TAG),
            ),
            f"the answer ended early.* 100 of {SIZE} bytes are kept.* to continue from there",
        ),
        "no rest": (
            resuming(lambda h, _: send(h, b"", 416), cut_at(100, etag=TAG)),
            "answered 416 .* to start anew",
        ),
        "compressed, shorter": (
            lambda h, _: send(h, gzip.compress(BODY[:1000]), content_encoding="gzip", etag=TAG),
            "the answer ended early.* to start anew",
        ),
        "not compressed": (lambda h, _: send(h, BODY, content_encoding="gzip"), "failed to decode"),
        "sooner and later": (lambda h, _: cut_at(next(ends))(h, 0), "the connection broke"),
        "nothing": (cut_at(0), "the connection broke"),
    }
    for name, (answer, message) in answers.items():
        with (
            serving(Server(answer)) as server,
            pytest.raises(DownloadError, match=message) as error,
        ):
            bring(server, tmp_path / "f.zip")
        assert "3 times in a row" in str(error.value), name
        assert len(server.ranges) <= 8, name
        for left in tmp_path.iterdir():
            left.unlink()


def test_an_endless_body_is_read_no_further_than_announced(tmp_path: Path):
    sent = 0

    def endless(handler: BaseHTTPRequestHandler, _: int) -> None:
        nonlocal sent
        send(handler, content_length=None)
        while sent < 1 << 26:
            sent += handler.wfile.write(b"x" * (1 << 16))

    with serving(Server(endless)) as server:
        with pytest.raises(DownloadError, match=f"announced {SIZE} bytes but sent more"):
            bring(server, tmp_path / "f.zip")
        with pytest.raises(DownloadError, match="must begin with an MD5"):
            published_md5(server.url)
    assert sent < 1 << 25
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_outlasts_a_server_that_is_busy(tmp_path: Path):
    answers: dict[str, Answer] = {
        str(status): lambda h, _, status=status: send(h, b"", status) for status in (404, 429, 500, 503)
    }
    answers["a proxy's page"] = lambda h, _: send(h, b"Please log in")
    answers["redirects without end"] = lambda h, _: send(h, b"", 302, location="/f.zip")
    for name, answer in answers.items():
        target = tmp_path / name / "f.zip"
        part = keep(target, BODY[:150_000])
        with serving(Server(answer)) as server:
            with pytest.raises(DownloadError):
                bring(server, target)
            assert part.read_bytes() == BODY[:150_000], name
            server.get = good
            server.ranges.clear()
            bring(server, target)
            assert (server.ranges, target.read_bytes()) == (["bytes=150000-"], BODY), name


def test_a_range_that_the_server_cannot_answer_is_not_asked_for_again(tmp_path: Path):
    for status in (400, 412, 416):
        target = tmp_path / str(status) / "f.zip"
        keep(target, BODY[:150_000])
        with serving(Server(resuming(lambda h, _, status=status: send(h, b"", status)))) as server:
            bring(server, target)
        assert (server.ranges, target.read_bytes()) == (["bytes=150000-", None], BODY), status


def test_a_cut_keeps_every_byte_that_came(tmp_path: Path):
    with serving(Server(resuming(good, cut_at(30_000, etag=TAG)))) as server:
        bring(server, tmp_path / "f.zip")
    assert server.ranges == [None, "bytes=30000-"]
    assert (tmp_path / "f.zip").read_bytes() == BODY


def test_no_range_is_asked_for_where_the_version_is_unknown(tmp_path: Path):
    """The server resumes any version: it does not look at If-Range."""
    for i, validator in enumerate((None, b"", b'"\xff"', b"a\nb", '"€"'.encode(), b" ")):
        target = tmp_path / str(i) / "f.zip"
        keep(target, b"z" * 1000, validator)
        with serving(Server(good)) as server:
            bring(server, target)
        assert (server.ranges, target.read_bytes()) == ([None], BODY), validator
    untagged = Server(lambda h, _: (cut_at(30_000) if len(server.ranges) == 1 else good)(h, 0))
    keep(tmp_path / "7" / "f.zip", b"z" * 1000, b'"v0"')  # outdated once the answer has no version
    with serving(untagged) as server:
        bring(server, tmp_path / "7" / "f.zip")
    assert server.ranges == ["bytes=1000-", None]


def test_the_rest_of_another_version_is_not_appended(tmp_path: Path):
    right = f"bytes 1000-{SIZE - 1}/{SIZE}"
    rests: dict[str, dict[str, str | None]] = {
        "other tag": {"content_range": right, "etag": '"v2"'},
        "other date": {"content_range": right, "last_modified": "Sun, 29 Nov 2026 10:00:00 GMT"},
        "other size": {"content_range": f"bytes 1000-{SIZE - 1}/{SIZE + 1}", "etag": TAG},
        "other start": {"content_range": f"bytes 10000-{SIZE - 1}/{SIZE}", "etag": TAG},
        "no range": {"etag": TAG},
        "encoded": {"content_range": right, "etag": TAG, "content_encoding": "br"},
    }
    for name, headers in rests.items():
        target = tmp_path / name / "f.zip"
        keep(target, b"z" * 1000, (DATE if name == "other date" else TAG).encode())
        with serving(
            Server(resuming(lambda h, start, headers=headers: send(h, BODY[start:], 206, **headers)))
        ) as server:
            bring(server, target)
        assert (server.ranges, target.read_bytes()) == (["bytes=1000-", None], BODY), name
    for name, validator in (("tag", TAG), ("date", DATE)):  # a server may leave out what it does not need to say
        target = tmp_path / name / "f.zip"
        keep(target, BODY[:1000], validator.encode())
        with serving(Server(lambda h, start: send(h, BODY[start:], 206, content_range=right))) as server:
            bring(server, target)
        assert (server.ranges, target.read_bytes()) == (["bytes=1000-"], BODY), name


def test_an_address_or_a_size_that_makes_no_sense_is_a_clear_error():
    answers: dict[str, dict[str, str | None]] = {
        "Exceeded 30 redirects": {"location": "/f.zip"},
        "No connection adapters": {"location": "ftp://host/f.zip"},
        "Invalid IPv6 URL": {"location": "http://[::1"},
        "Content-Length, got 'many'": {"content_length": "many"},
        "Content-Length, got '-5'": {"content_length": "-5"},
        "Content-Length, got '0'": {"content_length": "0"},
        "Content-Length, got 'none'": {"content_length": None},
        "Content-Length, got '²'": {"content_length": "²"},
    }
    for message, headers in answers.items():
        status = 302 if "location" in headers else 200
        with (
            serving(
                Server(good, lambda h, _, status=status, headers=headers: send(h, b"", status, **headers))
            ) as server,
            pytest.raises(DownloadError, match=message),
        ):
            look_up(server.url)
    with serving(Server(good, lambda h, _: send(h, b"", content_length="200800, 200800"))) as server:
        assert look_up(server.url).size == SIZE
    for url in (
        "host/f.zip",
        "http:///f.zip",
        "ftp://host/f.zip",
        "http://host:99999/f",
        "http://[1/f",
        f"http://{'a' * 70}.de/f",
        "",
    ):
        with pytest.raises(DownloadError, match=r"must be, .* an address http://… .*check data.base_url"):
            look_up(url)


def test_a_busy_server_is_asked_again_for_the_size():
    answers = iter([429, 503, 200])
    with serving(Server(good, lambda h, _: send(h, BODY, next(answers)))) as server:
        assert look_up(server.url).size == SIZE


def test_a_full_disk_keeps_the_part_and_says_how_much_room_is_needed(tmp_path: Path):
    target = tmp_path / "f.zip"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(Server(good)) as server:
        part_of(target).symlink_to("/dev/full")
        with pytest.raises(DownloadError, match=rf"No space left on device\): {SIZE} more bytes must be free"):
            bring(server, target)
        part_of(target).unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as on a disk that takes no larger files
        try:
            with pytest.raises(
                DownloadError, match=rf"File too large\): {SIZE - 100_000} more .* 100000 of {SIZE} bytes are kept"
            ):
                bring(server, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        server.ranges.clear()
        bring(server, target)
    assert (server.ranges, target.read_bytes()) == (["bytes=100000-"], BODY)


def test_a_folder_of_the_archives_name_is_reported_before_anything_is_fetched(tmp_path: Path):
    (tmp_path / "f.zip").mkdir()
    with serving(Server(good)) as server, pytest.raises(DownloadError, match=r"f\.zip: must be free .* got a folder"):
        bring(server, tmp_path / "f.zip")
    assert server.ranges == []


def test_a_password_in_an_address_is_in_no_message():
    addresses = {
        "http://user:secret@host/f.zip": "http://***@host/f.zip",
        "https://secret@host/f.zip": "https://***@host/f.zip",
        "http://user:se@cret@host/f.zip": "http://***@host/f.zip",
        "http://user:sec/ret@host/f.zip": "http://***@host/f.zip",
        "http://host:8080/data@2x/f.zip": "http://host:8080/data@2x/f.zip",
    }
    for address, shown in addresses.items():
        assert str(DownloadError(f"{address}: cannot be read, {address!r}")) == f"{shown}: cannot be read, {shown!r}"
    with pytest.raises(DownloadError) as error:  # requests repeats the whole address
        look_up("http://user:sec/ret@host/f.zip")
    assert "secret" not in str(error.value).replace("/", "")
    assert "http://***@host/f.zip" in str(error.value)


def test_an_interrupt_keeps_what_came_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "f.zip"
    with serving(Server(good)) as server:
        remote = RemoteFile(server.url, SIZE)
        with pytest.raises(KeyboardInterrupt):
            fetch(remote, target, md5=None, progress=interrupt)
        kept = part_of(target).stat().st_size
        assert 0 < kept < SIZE
        way_on = "Run `maskrcnn download` again to continue from there."
        assert capsys.readouterr().err == f"{part_of(target)}: {kept} of {SIZE} bytes are kept. {way_on}\n"
        fetch(remote, target, md5=None, progress=lambda *_: None)
    assert server.ranges == [None, f"bytes={kept}-"]
    assert target.read_bytes() == BODY
