"""Download and unpacking of zip archives into one folder, with checks of disk space, paths and earlier downloads.

A stamp in `<folder>/.download/<archive>.json` lists the unpacked files with their sizes. An archive is done when all of
them exist. The zip itself is deleted once it is unpacked.
"""

import json
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from components.datasets.transfer import DownloadError, RemoteFile, fetch, is_intact, look_up, part_of, published_md5

OFFICIAL_HOST = "images.cocodataset.org"
_GIB = 1 << 30


@dataclass(frozen=True)
class Archive:
    """Zip archive below the base URL."""

    path: str
    md5: str  # MD5 of the official file; a mirror may serve another file and publish its MD5
    expansion: float  # approximate ratio of unpacked size to zip size

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


def missing_archives(archives: Sequence[Archive], folder: Path) -> list[Archive]:
    """Archives that were not unpacked here, or whose files are not all in the folder."""
    return [archive for archive in archives if not _is_done(archive, folder)]


def was_begun(archives: Sequence[Archive], folder: Path) -> bool:
    """True if any of the archives was unpacked here before, even if files are now missing."""
    return any(_stamp(archive, folder).is_file() for archive in archives)


def fetch_archives(archives: Sequence[Archive], base_url: str, folder: Path) -> None:
    """Fetch and unpack archives.

    Raises:
        DownloadError: if an archive cannot be fetched completely or unpacked, or the disk is too small for all.
    """
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
            _bring(archive, remote, md5, folder, progress)


def unpack(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack a zip below `folder`, first into a temporary folder, so that no file is ever there incomplete.

    Returns:
        Name relative to folder → size in bytes.

    Raises:
        DownloadError: if the zip is damaged, or has a link or a path outside the folder; nothing is written then.
    """
    aside = folder / f".unpack-{archive.stem}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as source:
            members = source.infolist()
            for member in members:
                _require_inside(archive, member)
            _require_free(sum(member.file_size for member in members), folder)
            source.extractall(aside)
        files = {member.filename: member.file_size for member in members if not member.is_dir()}
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).replace(folder / name)
    except (zipfile.BadZipFile, zlib.error) as error:
        archive.unlink()
        raise DownloadError(
            f"{archive}: must be a valid zip file, but is damaged ({error}) and was deleted. Run `maskrcnn download` to fetch it again."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return files


def _bring(archive: Archive, remote: RemoteFile, md5: str | None, folder: Path, progress: Progress) -> None:
    target = folder / archive.name
    task = progress.add_task(archive.name, total=remote.size)
    if not is_intact(target, remote, md5):
        fetch(remote, target, md5=md5, progress=lambda done, _: progress.update(task, completed=done))
    progress.update(task, completed=remote.size, description=f"{archive.name} (unpacking)")
    files = unpack(target, folder)
    stamp = _stamp(archive, folder)
    stamp.parent.mkdir(exist_ok=True)
    stamp.write_text(json.dumps({"url": remote.url, "md5": md5, "files": files}), encoding="utf-8")
    target.unlink()
    progress.update(task, description=f"{archive.name} (done)")


def _stamp(archive: Archive, folder: Path) -> Path:
    return folder / ".download" / f"{archive.name}.json"


def _is_done(archive: Archive, folder: Path) -> bool:
    stamp = _stamp(archive, folder)
    if not stamp.is_file():
        return False
    files = json.loads(stamp.read_text(encoding="utf-8"))["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


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
            f"{folder}: {size / _GIB:.1f} GiB must be free for the archives and their files, got {free / _GIB:.1f} GiB. "
            "Free some space or set data.raw_dir to a folder on a larger disk."
        )


def _require_inside(archive: Path, member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.filename)
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if is_link or name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in member.filename:
        raise DownloadError(
            f"{archive}: must only have files inside the folder, got {member.filename!r}, "
            f"{'a link' if is_link else 'a path outside the folder'}; nothing was unpacked"
        )
