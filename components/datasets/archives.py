"""Download and unpacking of zip archives into one folder, with checks of disk space, paths and earlier downloads.

A stamp in `<folder>/.download/<archive>.json` lists the unpacked files with their sizes. An archive is done when all of
them exist. The zip itself is deleted once it is unpacked, and if it cannot be.
"""

import json
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from components.datasets.transfer import (
    DownloadError,
    RemoteFile,
    fetch,
    is_intact,
    look_up,
    part_of,
    published_md5,
    without_credentials,
)
from model.files import write_atomically

OFFICIAL_HOST = "images.cocodataset.org"
_GIB = 1 << 30
_CHUNK_BYTES = 1 << 18
# Names at the top of the folder that this module gives itself, on file systems that ignore case too.
_OWN_NAME = re.compile(r"\.download|\.unpack-.*|.*\.zip(\.part(\.validator)?)?", re.IGNORECASE)
_MAX_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}  # limit of unpacked size to packed size, by method


class _UnusableError(Exception):
    """The zip can never be unpacked; the message says what it must be, and what it is."""


@dataclass(frozen=True)
class Archive:
    """Zip archive below the base URL."""

    path: str
    md5: str  # MD5 of the official file; a mirror may serve another file and publish its MD5
    expansion: float  # approximate ratio of unpacked size to zip size

    @property
    def name(self) -> str:
        """Name of the file."""
        return PurePosixPath(self.path).name


def missing_archives(archives: Sequence[Archive], folder: Path) -> list[Archive]:
    """Archives that were not unpacked here, or whose files are not all in the folder."""
    return [archive for archive in archives if not _is_done(archive, folder)]


def was_begun(archives: Sequence[Archive], folder: Path) -> bool:
    """True if any of the archives was unpacked here before, even if files are now missing."""
    return any(_stamped_files(archive, folder) is not None for archive in archives)


def fetch_archives(archives: Sequence[Archive], base_url: str, folder: Path) -> None:
    """Fetch and unpack archives.

    Raises:
        DownloadError: if an archive cannot be fetched completely or unpacked, or the disk is too small for all.
    """
    with _disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    base_url = base_url.rstrip("/")
    remotes = [look_up(f"{base_url}/{archive.path}") for archive in archives]
    _require_space(archives, remotes, folder)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for archive, remote in zip(archives, remotes, strict=True):
            md5 = archive.md5 if urlsplit(base_url).hostname == OFFICIAL_HOST else published_md5(remote.url)
            with _disk_errors(folder):
                _bring(archive, remote, md5, folder, progress)


def unpack(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack a zip below `folder`, first into a temporary folder, so that no file is ever there incomplete.

    Returns:
        Name relative to folder → size in bytes.

    Raises:
        DownloadError: if the zip cannot be used: it is damaged, or has a link, a path outside the folder, a name that
            the download uses itself, or a file and a folder of one name; nothing is written then, and the zip is
            deleted, so that the next run fetches it again. Or if the disk has an error or no room; then the zip stays.
    """
    aside = folder / f".unpack-{archive.stem}"
    with _disk_errors(folder):
        shutil.rmtree(aside, ignore_errors=True)
        try:
            files = _unpack_aside(archive, aside)
            for name in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).replace(folder / name)
        except _UnusableError as error:
            archive.unlink()
            raise DownloadError(
                f"{archive}: {error}; nothing was unpacked and the zip was deleted. "
                "Run `maskrcnn download` to fetch it again, with another data.base_url if that repeats."
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return files


def _unpack_aside(archive: Path, aside: Path) -> dict[str, int]:
    with archive.open("rb") as file:
        with _reading():
            source = zipfile.ZipFile(file)
        members = source.infolist()
        _require_usable(members)
        _require_free(sum(member.file_size for member in members), aside.parent)
        files = {}
        for member in members:
            if not member.is_dir():
                files[member.filename] = _unpack_member(source, member, aside / member.filename)
    return files


def _unpack_member(source: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> int:
    """Write one file; return its size in bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        size = sum(file.write(chunk) for chunk in _content(source, member))
    if size != member.file_size:
        raise _UnusableError(f"{member.filename} must have {member.file_size} bytes, but is damaged and has {size}")
    return size


def _content(source: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with _reading(), source.open(member) as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


@contextmanager
def _reading() -> Iterator[None]:
    """Turn everything that zipfile and its decompressors raise for damaged bytes, a dozen types, into one."""
    try:
        yield
    except Exception as error:
        raise _UnusableError(f"must be a valid zip file, but is damaged ({error or type(error).__name__})") from error


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk below `folder` into DownloadError."""
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename or folder
        raise DownloadError(
            f"{path}: must be readable and writable, got {error.strerror or error}. "
            f"Free space, give permission or move away what has that name in {folder}, or set data.raw_dir to another "
            "folder; "
            "then run `maskrcnn download` again."
        ) from error


def _bring(archive: Archive, remote: RemoteFile, md5: str | None, folder: Path, progress: Progress) -> None:
    target = folder / archive.name
    task = progress.add_task(archive.name, total=remote.size)
    if not is_intact(target, remote, md5):
        fetch(remote, target, md5=md5, progress=lambda done, _: progress.update(task, completed=done))
    progress.update(task, completed=remote.size, description=f"{archive.name} (unpacking)")
    files = unpack(target, folder)
    stamp = _stamp(archive, folder)
    stamp.parent.mkdir(exist_ok=True)
    write_atomically(stamp, json.dumps({"url": without_credentials(remote.url), "md5": md5, "files": files}))
    target.unlink()
    progress.update(task, description=f"{archive.name} (done)")


def _stamp(archive: Archive, folder: Path) -> Path:
    return folder / ".download" / f"{archive.name}.json"


def _stamped_files(archive: Archive, folder: Path) -> dict[str, int] | None:
    """Unpacked files and their sizes as the stamp lists them; None without a stamp that can be read."""
    try:
        files = json.loads(_stamp(archive, folder).read_text(encoding="utf-8"))["files"]
        return {name: int(size) for name, size in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_done(archive: Archive, folder: Path) -> bool:
    files = _stamped_files(archive, folder)
    return files is not None and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )


def _require_space(archives: Sequence[Archive], remotes: Sequence[RemoteFile], folder: Path) -> None:
    """Check that the disk can hold the peak: the files unpacked so far plus one zip."""
    unpacked, fullest = 0.0, 0.0
    for archive, remote in zip(archives, remotes, strict=True):
        part = part_of(folder / archive.name)
        begun = part.stat().st_size if part.exists() else 0
        unpacked += remote.size * archive.expansion
        fullest = max(fullest, unpacked + remote.size - begun)
    _require_free(fullest, folder)


def _require_free(size: float, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(
            f"{folder}: {size / _GIB:.1f} GiB must be free for the archives and their files, got {free / _GIB:.1f} "
            "GiB. "
            "Free some space or set data.raw_dir to a folder on a larger disk."
        )


def _require_usable(members: Sequence[zipfile.ZipInfo]) -> None:
    files = {PurePosixPath(member.filename) for member in members if not member.is_dir()}
    for member in members:
        _require_inside(member)
        path = PurePosixPath(member.filename)
        for folder in [*path.parents, *([path] if member.is_dir() else [])]:
            if folder in files:
                raise _UnusableError(f"must not have a file and a folder of one name, got {str(folder)!r}")
        ratio = _MAX_RATIO.get(member.compress_type)
        if ratio and member.file_size > ratio * member.compress_size:
            raise _UnusableError(
                f"must be a valid zip file, but is damaged ({member.filename} cannot have {member.file_size} bytes)"
            )


def _require_inside(member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        fault = "a link"
    elif name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename:
        fault = "a path outside the folder"
    elif not (name.parts or member.is_dir()):
        fault = "no name"
    elif name.parts and _OWN_NAME.fullmatch(name.parts[0]):
        fault = "a name that the download uses itself"
    else:
        return
    raise _UnusableError(f"must only have files inside the folder, got {member.filename!r}, {fault}")
