"""Files that a name nearly fits: written with other separators, letters or folders than the file has.

A name fits safely if it differs only by `\\` for `/`, by upper and lower case, by the Unicode normal form, or by
folders in front that do not exist, such as `images/` or an absolute path of another machine.
"""

import os
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Lock
from urllib.parse import unquote

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}
_SHOWN = 3

Key = tuple[str, ...]  # parts of a path, without case and in one normal form


@dataclass(frozen=True)
class NearName:
    """Files that a name probably means."""

    names: tuple[str, ...]  # relative to the folder; several if the name fits all alike
    is_safe: bool  # there is one file, and it differs only in ways of writing

    def __str__(self) -> str:
        rest = len(self.names) - _SHOWN
        return " or ".join(self.names[:_SHOWN]) + (f", or {rest} others" if rest > 0 else "")


class FileNames:
    """Names of the files below a folder; listed when first asked for, once for all threads."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()

    def near(self, name: str) -> NearName | None:
        """Find the files that a name probably means; None if there are none."""
        with self._lock:
            by_path, by_name, by_stem = self._listed
        key = _key(name)
        for start in range(len(key)):
            if found := by_path.get(key[start:]):
                return NearName(tuple(found), is_safe=len(found) == 1 and self._may_drop(key[:start]))
        for candidate in dict.fromkeys((key, _key(unquote(name)))):
            stem = PurePosixPath(candidate[-1]).stem if candidate else ""
            if found := by_name.get(candidate[-1:]) or by_stem.get((stem,)) or by_stem.get(candidate[-1:]):
                return NearName(tuple(found), is_safe=False)
        return None

    def _may_drop(self, folders: Key) -> bool:
        """Tell if a name without these folders still means this split: they must not name another one."""
        own = _key(self._folder.as_posix())[-2:]
        return all(any(part in name for name in own) for part in folders if part in _SPLIT_NAMES)

    @cached_property
    def _listed(self) -> tuple[dict[Key, list[str]], dict[Key, list[str]], dict[Key, list[str]]]:
        """Files by key of their path, of their name, and of their name without extension."""
        by_path, by_name, by_stem = (defaultdict[Key, list[str]](list) for _ in range(3))
        for folder, subfolders, files in os.walk(self._folder, followlinks=False):
            subfolders.sort()
            for file in sorted(files):
                path = Path(folder, file)
                if not path.is_file():  # a link to nothing
                    continue
                name = path.relative_to(self._folder).as_posix()
                key = _key(name)
                by_path[key].append(name)
                by_name[key[-1:]].append(name)
                by_stem[(PurePosixPath(key[-1]).stem,)].append(name)
        return by_path, by_name, by_stem


def _key(name: str) -> Key:
    parts = unicodedata.normalize("NFC", name.replace("\\", "/")).casefold().split("/")
    return tuple(part.strip() for part in parts if part.strip() not in ("", "."))
