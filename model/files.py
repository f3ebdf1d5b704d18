"""Files that are written whole or not at all: a reader, or a crash, sees the old content or the new.

And the reader of our own JSON files, which checks what it reads; and a time limit for reading any file.
"""

import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from model.errors import UserError

T = TypeVar("T")


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


def read_json(path: Path, shape: Any, remedy: str, error: type[UserError] = UserError) -> Any:
    """The content of a JSON file that one of our commands wrote.

    Args:
        path: a file that exists.
        shape: type that the content must have, for pydantic; a model lists the keys that readers use, others may be
            there too.
        remedy: what to do if the file is damaged, for the error.
        error: class of the error.

    Raises:
        UserError: if it is not JSON, or has another shape.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        TypeAdapter(shape).validate_python(content, strict=True)
    except ValidationError as damage:
        raise error(f"{path}: {_first_fault(damage)}; {remedy}") from damage
    except (ValueError, RecursionError) as damage:  # not UTF-8 either
        raise error(f"{path}: not JSON ({damage}); {remedy}") from damage
    return content


def _first_fault(damage: ValidationError) -> str:
    fault = damage.errors()[0]
    key, found = ".".join(map(str, fault["loc"])), fault["input"]
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    if not key:
        wanted = "a list" if fault["type"] == "list_type" else "an object"
        return f"must hold {wanted}, got {type(found).__name__}"
    return f"{key} is missing" if fault["type"] == "missing" else f"{key}: {fault['msg']}, got {found!r:.60}"


def require_file(path: Path) -> None:
    """Refuse what is no file before it is opened: opening a named pipe waits for its writer, a device has no end.

    Raises:
        OSError: if it does not exist, or is a pipe, a socket or a device.
        IsADirectoryError: if it is a folder.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise OSError(errno.EINVAL, f"must be a file, but is {kind}", str(path))


class SlowFileError(UserError):
    """A file could not be read in time."""


def within(limit_s: float, path: Path, read: Callable[[], T]) -> T:
    """The result of reading a file, in a thread that is left behind after `limit_s`: nothing ends a wait for a disk.

    Raises:
        SlowFileError: if it takes longer.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(read())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, name=f"reading {path}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not result.done():
        raise SlowFileError(
            f"{path}: could not be read within {limit_s:g} s: its disk does not answer; if it is only slow, raise "
            "data.timeout_s (and train.timeout_s)"
        )
    return result.result()


def real(path: Path) -> Path:
    """The absolute path without links; of a link that leads to itself as far as it goes, while `resolve` raises."""
    return Path(os.path.realpath(path))


def make_folder(path: Path) -> None:
    """Make a folder, and those above it; the names of new ones outlast a power cut."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def free_name(path: Path) -> Path:
    """The name under which a file or folder can be put aside: with `.old-1`, or the next free number."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return aside


def _sync(path: Path) -> None:
    """Wait until the disk has a file's content, or what a folder's files are called."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
