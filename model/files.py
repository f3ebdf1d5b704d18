"""Files that are written whole or not at all: a reader, or a crash, sees the old content or the new."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends well; after an error `path` is as it was.

    Args:
        sync: content and then name are on the disk afterwards: a power cut leaves the old file or the new.
    """
    partial = path.with_name(f"partial-{path.name}")  # the ending stays: some writers insist on theirs
    try:
        yield partial
        if sync:
            _sync(partial)
        partial.replace(path)
        if sync:
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, *, sync: bool = False) -> None:
    """Replace a file's text at once."""
    with replacing(path, sync=sync) as partial:
        partial.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it; the names of new ones outlast a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until the disk has a file's content, or what a folder's files are called."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
