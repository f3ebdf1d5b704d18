"""Download of one file over HTTP: resumed after a cut, retried, and checked by size and MD5.

An incomplete file is `<name>.part`; `<name>.part.validator` has the server's ETag or date of that version, so that two
versions are never mixed: without it the file is fetched from its first byte. Only a checked file gets its name.
"""

import errno
import hashlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
from urllib3.exceptions import HTTPError

from model.errors import UserError
from model.files import write_atomically

_CHUNK_BYTES = 1 << 16
_SMALL_BYTES = 1 << 10  # a published MD5 is read so far
_TIMEOUT_S = 30
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # waits between attempts that receive nothing
_CUT = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
_BAD_RANGE = (400, 412, 416)  # the server cannot answer this range; it may answer a request for the whole file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a disk that takes no more
_PLAIN = {"Accept-Encoding": "identity"}  # without compression, so that ranges and sizes are those of the file

# User and password in an address, also where one of their characters should have been escaped.
_CREDENTIALS = re.compile(r"://([^/\s]*|[^/@\s]*:(?!\d*/)[^@\s]*)@")

Progress = Callable[[int, int], None]  # bytes so far, total bytes


def without_credentials(text: str) -> str:
    """Mask user and password in every address of a text."""
    return _CREDENTIALS.sub("://***@", text)


class DownloadError(UserError):
    """The data could not be fetched completely; the message says why and what to do, without any password."""

    def __init__(self, message: str) -> None:
        super().__init__(without_credentials(message))


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
    response, _ = _ask("HEAD", url)
    if response.status_code != requests.codes.ok:
        raise DownloadError(f"{url}: the server answered {response.status_code} {response.reason}; check data.base_url")
    size = _content_length(response)
    if not size:
        raise DownloadError(
            f"{url}: the server must send the file's size in Content-Length, "
            f"got {response.headers.get('Content-Length', 'none')!r}; try another data.base_url"
        )
    return RemoteFile(url, size)


def published_md5(url: str) -> str | None:
    """MD5 that a mirror publishes as `<url>.md5`; None if it publishes none."""
    response, text = _ask("GET", f"{url}.md5")
    if response.status_code != requests.codes.ok:
        return None
    digest = (text.split() or [""])[0].lower()
    if not re.fullmatch("[0-9a-f]{32}", digest):
        raise DownloadError(f"{url}.md5: must begin with an MD5 of 32 hexadecimal digits, got {text[:40]!r}")
    return digest


def fetch(remote: RemoteFile, target: Path, *, md5: str | None, progress: Progress) -> None:
    """Fetch a file to `target`, continuing `<target>.part` of an earlier call.

    Args:
        md5: hexadecimal, or None if unknown; the size is always checked.

    Raises:
        DownloadError: if it cannot be fetched, the disk is full, or it differs from its MD5 twice.
        OSError: if the disk has another error.
    """
    if target.is_dir():
        raise DownloadError(
            f"{target}: must be free for the file of that name, got a folder; move it away and run `maskrcnn "
            "download` again"
        )
    part = part_of(target)
    for _ in range(2):  # a wrong byte may come from an earlier, damaged part: restart once
        try:
            _fetch_whole(remote, part, progress)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
            print(f"{part}: {_size(part)} of {remote.size} bytes are kept. {_how_to_go_on(part)}", file=sys.stderr)
            raise
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
    return target.is_file() and _size(target) == remote.size and md5 in (None, _md5(target))


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
    """Retry until the file is complete; raise when several attempts in a row get no further than those before them."""
    if _size(part) > remote.size:
        _discard(part)
    furthest, idle = _size(part), 0
    while _size(part) < remote.size:
        failure = "the answer ended early"
        try:
            _fetch_more(remote, part, progress)
        except _RetryError as error:
            failure = str(error)
        idle = 0 if _size(part) > furthest else idle + 1
        furthest = max(furthest, _size(part))
        if idle >= len(_BACKOFF_S):
            raise DownloadError(
                f"{remote.url}: {failure}, {idle} times in a row; {_size(part)} of {remote.size} bytes are kept. "
                f"{_how_to_go_on(part)}"
            )
        if furthest < remote.size:
            time.sleep(_BACKOFF_S[idle])


def _how_to_go_on(part: Path) -> str:
    return f"Run `maskrcnn download` again to {'continue from there' if _kept_version(part) else 'start anew'}."


def _fetch_more(remote: RemoteFile, part: Path, progress: Progress) -> None:
    """Request the missing bytes, or the whole file if the server cannot resume.

    Raises:
        _RetryError: if the answer is not the file or its rest, or breaks off; everything received is kept.
    """
    start, version = _size(part), _kept_version(part)
    if not version:
        start = 0  # no range: its bytes might be another version's
    headers = _PLAIN | ({"Range": f"bytes={start}-", "If-Range": version} if start else {})
    with _send("GET", remote.url, headers) as response:
        if response.status_code == requests.codes.ok:
            _require_size(response, remote)
            start = 0
        elif not (start and _is_rest(response, start, remote.size, version)):
            if response.status_code in (*_BAD_RANGE, requests.codes.partial):
                _validator_of(part).unlink(missing_ok=True)  # the next attempt asks for the whole file
            raise _RetryError(f"the server answered {response.status_code} {response.reason}")
        _append(response, part, remote, start=start, progress=progress)


def _require_size(response: requests.Response, remote: RemoteFile) -> None:
    """Refuse a whole body of another size before it replaces what is kept: a proxy's error page, for example."""
    length = None if _is_encoded(response) else _content_length(response)
    if length not in (None, remote.size):
        raise _RetryError(f"the server announced {remote.size} bytes, but sends {length}")


def _is_rest(response: requests.Response, start: int, size: int, version: str) -> bool:
    """True if the body is the bytes from `start` on, of the kept version as far as the server says which one it is."""
    span = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
    header = "Last-Modified" if version.endswith("GMT") else "ETag"
    return (
        response.status_code == requests.codes.partial
        and span is not None
        and span[1] == str(start)
        and span[2] in (str(size), "*")
        and response.headers.get(header, version) == version
        and not _is_encoded(response)
    )


def _append(response: requests.Response, part: Path, remote: RemoteFile, *, start: int, progress: Progress) -> None:
    try:
        with part.open("ab" if start else "wb") as file:
            if not start:  # only now, with nothing left of an older version
                _keep_version(part, _version(response))
            for chunk in _chunks(response):
                if file.tell() + len(chunk) > remote.size:
                    _discard(part)
                    raise DownloadError(
                        f"{remote.url}: the server announced {remote.size} bytes but sent more; "
                        "run `maskrcnn download` again, with another data.base_url if that repeats"
                    )
                file.write(chunk)
                progress(file.tell(), remote.size)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        kept = _size(part)
        raise DownloadError(
            f"{part}: cannot be written ({error.strerror}): {remote.size - kept} more bytes must be free there, "
            f"got {shutil.disk_usage(part.parent).free}; {kept} of {remote.size} bytes are kept. Free some space, "
            "then run `maskrcnn download` again to continue from there, or set data.raw_dir to a folder on a larger "
            "disk."
        ) from error


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """Yield the body as it arrives, so that a cut loses nothing of what came before."""
    try:
        while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=True):
            yield chunk
    except (HTTPError, OSError) as error:
        raise _RetryError(f"the connection broke: {error}") from error


def _version(response: requests.Response) -> str:
    """Identifier of this version for If-Range: a strong ETag, else the date; empty where it cannot be resumed."""
    if _is_encoded(response):
        return ""  # ranges would be those of the encoded bytes
    etag = str(response.headers.get("ETag", ""))
    return etag if etag and not etag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def _kept_version(part: Path) -> str:
    """Identifier of the part's version; empty if unknown, or no text that a header can have."""
    try:
        version = _validator_of(part).read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return ""
    return version if re.fullmatch(r"[\x21-\x7e\x80-\xff][\x20-\x7e\x80-\xff]*", version) else ""


def _keep_version(part: Path, version: str) -> None:
    if version:
        write_atomically(_validator_of(part), version)
    else:
        _validator_of(part).unlink(missing_ok=True)


def _is_encoded(response: requests.Response) -> bool:
    return response.headers.get("Content-Encoding", "identity").lower() != "identity"


def _content_length(response: requests.Response) -> int | None:
    """Content-Length, which may be repeated; None if it is missing or no length."""
    values = {value.strip() for value in response.headers.get("Content-Length", "").split(",")}
    value = values.pop()
    return int(value) if not values and re.fullmatch("[0-9]{1,18}", value) else None


def _ask(method: str, url: str) -> tuple[requests.Response, str]:
    """Send a small request, repeated while the connection breaks or the server is busy or has an error.

    Returns:
        The response, and the beginning of its body.
    """
    for wait_s in (*_BACKOFF_S, None):
        try:
            with _send(method, url, _PLAIN) as response:
                failure = f"{response.status_code} {response.reason}"
                busy = response.status_code == requests.codes.too_many_requests
                if response.status_code < requests.codes.server_error and not busy:
                    return response, _beginning(response)
        except _RetryError as error:
            failure = str(error)
        if wait_s is not None:
            time.sleep(wait_s)
    raise DownloadError(f"{url}: cannot be reached: {failure}; check the network, proxy settings and data.base_url")


def _beginning(response: requests.Response) -> str:
    body = b""
    for chunk in _chunks(response):
        body += chunk
        if len(body) >= _SMALL_BYTES:
            break
    return body[:_SMALL_BYTES].decode("latin-1")


def _send(method: str, url: str, headers: dict[str, str]) -> requests.Response:
    """Send a request; the body of the response is still to be read.

    Raises:
        _RetryError: if the connection breaks.
        DownloadError: if there is nothing to connect to: no address, or redirects that lead nowhere.
    """
    try:
        return requests.request(method, url, headers=headers, stream=True, timeout=_TIMEOUT_S, allow_redirects=True)
    except _CUT as error:
        raise _RetryError(f"the connection broke: {error}") from error
    except (OSError, ValueError) as error:  # all others of requests are an OSError
        raise DownloadError(
            f"{url}: must be, and be redirected to, an address http://… or https://… that exists, got {error}; check "
            "data.base_url"
        ) from error
    except HTTPError as error:
        raise _RetryError(f"the connection broke: {error}") from error


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
