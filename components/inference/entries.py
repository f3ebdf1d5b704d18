"""Entries of predictions.json on their way: each goes to the disk before the next image, none stays in memory.

`predictions.part.jsonl` has a line per image, an entry of predictions.json each, also after a kill or on a full disk.
The whole document takes its place at the end, with the images in the order of the command line.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.files import free_name, replacing

FILE_NAME, PART = "predictions.json", "predictions.part.jsonl"
_BLOCK_BYTES = 1 << 20


class Entries:
    """The entries of one call."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)  # a buffer could lose entries, or hold half of one
        self._places: dict[int, tuple[int, int]] = {}  # index of an image → offset and length of its line
        self._end = 0
        self.objects = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, i: int, entry: dict[str, Any]) -> None:
        """Write the entry of image i; a kill of this process loses none from here on.

        Raises:
            OSError: if it cannot be written as a whole; then nothing of it stays.
        """
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            os.truncate(self._file.fileno(), self._end)
            raise
        self._places[i] = self._end, len(line)
        self._end += len(line)
        self.objects += len(entry["detections"])

    def write(self, path: Path, checkpoint: str, unreadable: Sequence[dict[str, str]]) -> None:
        """Write the document, with the entries in the order of their images."""
        with replacing(path) as partial, partial.open("wb") as document:
            document.write(f'{{\n "checkpoint": {json.dumps(checkpoint, ensure_ascii=False)},\n "images": ['.encode())
            separator = b"\n  "
            for _, (offset, length) in sorted(self._places.items()):
                self._file.seek(offset)
                document.write(separator + self._file.read(length - 1))
                separator = b",\n  "
            document.write(f'\n ],\n "unreadable": {json.dumps(unreadable, ensure_ascii=False)}\n}}\n'.encode())

    def close(self) -> None:
        """Close the file of lines."""
        self._file.close()


@contextmanager
def entries_in(folder: Path, checkpoint: str, unreadable: Sequence[dict[str, str]]) -> Iterator[Entries]:
    """Entries to add to; predictions.json has them afterwards, also those before an error or an interrupt.

    Args:
        folder: where the files go; the lines of a call that was killed are kept there under another name.
        checkpoint: name of the checkpoint, for the document.
        unreadable: files without an entry, as listed by the end.
    """
    part = folder / PART
    if part.is_file() and (lines := _count_lines(part)):
        aside = free_name(part)
        part.rename(aside)
        print(f"warning: an earlier call did not end; {aside} has its predictions of {lines} images", file=sys.stderr)
    entries = Entries(part)
    try:
        yield entries
    finally:
        try:
            entries.write(folder / FILE_NAME, checkpoint, unreadable)
            part.unlink()
        except OSError:
            print(f"warning: {part} has the predictions of {len(entries)} images, a line each", file=sys.stderr)
            raise
        finally:
            entries.close()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
