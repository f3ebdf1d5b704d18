"""One file over HTTP, whole or not at all: resumed after a cut, retried, and checked by size and MD5.

While under way a file is `<name>.part`; beside it `<name>.part.validator` holds the server's ETag or date of the version begun, so
that two versions are never mixed. Only a checked file gets its name.
"""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from model.errors import UserError

_CHUNK_BYTES = 1 << 16
_TIMEOUT_S = 30
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waits between attempts that bring nothing
_CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_PLAIN = {"Accept-Encoding": "identity"}  # bytes as they lie on the server, so that ranges and sizes mean the file's

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


class DownloadError(UserError):
    """The data could not be fetched whole; the message says why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """What the server says of a file before it is fetched."""

    url: str
    size: int  # bytes


class _RetryError(Exception):
    """The attempt brought no whole file; another may."""


def look_up(url: str) -> RemoteFile:
    """Ask for a file's size.

    Raises:
        DownloadError: if the server cannot be reached, does not have the file, or does not tell its size.
    """
    response = _ask("HEAD", url)
    if response.status_code != requests.codes.ok:
        raise DownloadError(f"{url}: the server answers {response.status_code} {response.reason}; check data.base_url")
    size = int(response.headers.get("Content-Length", 0))
    if size < 1:
        raise DownloadError(f"{url}: the server must tell the file's size in Content-Length, got {size}")
    return RemoteFile(url, size)


def published_md5(url: str) -> str | None:
    """The MD5 that a mirror publishes as `<url>.md5`, or None where it publishes none."""
    response = _ask("GET", f"{url}.md5")
    if response.status_code != requests.codes.ok:
        return None
    digest = (response.text.split() or [""])[0].lower()
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise DownloadError(f"{url}.md5: must begin with an MD5 of 32 hexadecimal digits, got {response.text[:40]!r}")
    return digest


def fetch(remote: RemoteFile, target: Path, *, md5: str | None, progress: Progress) -> None:
    """Bring a file to `target`; what an earlier call left in `<target>.part` is continued.

    Args:
        md5: hexadecimal, or None where it is not known; the size is checked all the same.

    Raises:
        DownloadError: if it cannot be fetched, or differs from its MD5 twice.
    """
    part = part_of(target)
    for _ in range(2):  # a wrong byte may come from an earlier, mixed or damaged part: one fresh start
        _fetch_whole(remote, part, progress)
        found = _md5(part)
        if md5 in (None, found):
            part.replace(target)
            _validator_of(part).unlink(missing_ok=True)
            return
        _discard(part)
    raise DownloadError(
        f"{remote.url}: MD5 must be {md5}, got {found}, twice; the file was deleted. "
        "The server or something on the way alters it; try another data.base_url."
    )


def is_intact(target: Path, remote: RemoteFile, md5: str | None) -> bool:
    """Whether a file is there already, as large as the server's and with the right MD5 where that is known."""
    return _size(target) == remote.size and md5 in (None, _md5(target))


def part_of(target: Path) -> Path:
    """Where a file lies until it is whole."""
    return target.with_name(f"{target.name}.part")


def _validator_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.validator")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_of(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_whole(remote: RemoteFile, part: Path, progress: Progress) -> None:
    """Attempt after attempt; gives up when several in a row bring nothing."""
    if _size(part) > remote.size:
        _discard(part)
    idle = 0
    while _size(part) < remote.size:
        before = _size(part)
        try:
            _fetch_more(remote, part, progress)
        except _RetryError as error:
            idle = 0 if _size(part) > before else idle + 1
            if idle >= len(_BACKOFF_S):
                raise DownloadError(
                    f"{remote.url}: {error}, {idle} times in a row; {_size(part)} of {remote.size} bytes are kept. "
                    "Run `maskrcnn download` again to go on from there."
                ) from error
            time.sleep(_BACKOFF_S[idle])
    if _size(part) != remote.size:
        _discard(part)
        raise DownloadError(
            f"{remote.url}: the server announced {remote.size} bytes but sent more; run `maskrcnn download` again"
        )


def _fetch_more(remote: RemoteFile, part: Path, progress: Progress) -> None:
    """One request for what is missing, or for everything where the server cannot go on from the middle."""
    validator, start = _validator_of(part), _size(part)
    headers = dict(_PLAIN)
    if start and validator.exists():
        headers |= {"Range": f"bytes={start}-", "If-Range": validator.read_text()}
    try:
        with requests.get(remote.url, headers=headers, stream=True, timeout=_TIMEOUT_S) as response:
            goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            if not (
                response.status_code == requests.codes.ok
                or (response.status_code == requests.codes.partial and goes_on)
            ):
                _discard(part)  # whatever the server minds, it may take a plain request
                raise _RetryError(f"the server answers {response.status_code} {response.reason}")
            if response.status_code == requests.codes.ok:
                start = 0
                validator.write_text(_version(response))
            _append(response, part, start=start, size=remote.size, progress=progress)
    except _CUT as error:
        raise _RetryError(f"the connection broke: {error}") from error


def _append(response: requests.Response, part: Path, *, start: int, size: int, progress: Progress) -> None:
    with part.open("ab" if start else "wb") as file:
        for chunk in response.iter_content(_CHUNK_BYTES):
            file.write(chunk)
            progress(file.tell(), size)


def _version(response: requests.Response) -> str:
    """What names this version of the file for If-Range: a strong ETag, else the date; empty never matches, so starts anew."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag and not etag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def _ask(method: str, url: str) -> requests.Response:
    """A small request, repeated while the connection breaks or the server is unwell."""
    for wait_s in (*_BACKOFF_S, None):
        try:
            response = requests.request(method, url, headers=_PLAIN, timeout=_TIMEOUT_S, allow_redirects=True)
            trouble = f"{response.status_code} {response.reason}"
            if response.status_code < requests.codes.server_error:
                return response
        except _CUT as error:
            trouble = str(error)
        if wait_s is not None:
            time.sleep(wait_s)
    raise DownloadError(f"{url}: cannot be reached: {trouble}; check the network, proxy settings and data.base_url")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
