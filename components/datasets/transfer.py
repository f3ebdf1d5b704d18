"""Download of one file over HTTP: resumed after a cut, retried, and checked by size and MD5.

An incomplete file is `<name>.part`; `<name>.part.validator` has the server's ETag or date of that version, so that two
versions are never mixed. Only a checked file gets its name.
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
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waits between attempts that receive nothing
_CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_PLAIN = {"Accept-Encoding": "identity"}  # without compression, so that ranges and sizes are those of the file

Progress = Callable[[int, int], None]  # bytes so far, total bytes


class DownloadError(UserError):
    """The data could not be fetched completely; the message says why and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """URL and size of a file on the server."""

    url: str
    size: int  # bytes


class _RetryError(Exception):
    """The attempt failed; another may succeed."""


def look_up(url: str) -> RemoteFile:
    """Ask for a file's size.

    Raises:
        DownloadError: if the server cannot be reached, does not have the file, or does not send its size.
    """
    response = _ask("HEAD", url)
    if response.status_code != requests.codes.ok:
        raise DownloadError(f"{url}: the server answered {response.status_code} {response.reason}; check data.base_url")
    size = int(response.headers.get("Content-Length", 0))
    if size < 1:
        raise DownloadError(f"{url}: the server must send the file's size in Content-Length, got {size}")
    return RemoteFile(url, size)


def published_md5(url: str) -> str | None:
    """MD5 that a mirror publishes as `<url>.md5`; None if it publishes none."""
    response = _ask("GET", f"{url}.md5")
    if response.status_code != requests.codes.ok:
        return None
    digest = (response.text.split() or [""])[0].lower()
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise DownloadError(f"{url}.md5: must begin with an MD5 of 32 hexadecimal digits, got {response.text[:40]!r}")
    return digest


def fetch(remote: RemoteFile, target: Path, *, md5: str | None, progress: Progress) -> None:
    """Fetch a file to `target`, continuing `<target>.part` of an earlier call.

    Args:
        md5: hexadecimal, or None if unknown; the size is always checked.

    Raises:
        DownloadError: if it cannot be fetched, or differs from its MD5 twice.
    """
    part = part_of(target)
    for _ in range(2):  # a wrong byte may come from an earlier, damaged part: restart once
        _fetch_whole(remote, part, progress)
        found = _md5(part)
        if md5 in (None, found):
            part.replace(target)
            _validator_of(part).unlink(missing_ok=True)
            return
        _discard(part)
    raise DownloadError(
        f"{remote.url}: MD5 must be {md5}, got {found}, twice; the file was deleted. "
        "The server or a proxy alters it; try another data.base_url."
    )


def is_intact(target: Path, remote: RemoteFile, md5: str | None) -> bool:
    """True if the file exists with the server's size and, if known, the right MD5."""
    return _size(target) == remote.size and md5 in (None, _md5(target))


def part_of(target: Path) -> Path:
    """Path of the incomplete file."""
    return target.with_name(f"{target.name}.part")


def _validator_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.validator")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_of(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _fetch_whole(remote: RemoteFile, part: Path, progress: Progress) -> None:
    """Retry until the file is complete; raise when several attempts in a row receive nothing."""
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
                    "Run `maskrcnn download` again to continue from there."
                ) from error
            time.sleep(_BACKOFF_S[idle])
    if _size(part) != remote.size:
        _discard(part)
        raise DownloadError(
            f"{remote.url}: the server announced {remote.size} bytes but sent more; run `maskrcnn download` again"
        )


def _fetch_more(remote: RemoteFile, part: Path, progress: Progress) -> None:
    """Request the missing bytes, or the whole file if the server cannot resume."""
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
                _discard(part)  # the server may still accept a request without a range
                raise _RetryError(f"the server answered {response.status_code} {response.reason}")
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
    """Identifier of this version for If-Range: a strong ETag, else the date; empty never matches, which restarts."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag and not etag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def _ask(method: str, url: str) -> requests.Response:
    """Send a small request, repeated while the connection breaks or the server has an error."""
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
