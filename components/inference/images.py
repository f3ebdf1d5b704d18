"""Images to predict on: files, and whatever lies in folders; each with the name of its drawing."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import UserError
from model.files import real

# Files used in folders.
SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp"),
    *(".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
}
KINDS = ("crops", "masks")  # folders of numbered pictures beside a drawing: photo.jpg.crops
_STEM_BYTES = 230  # the limit is 255, and the part file and folders of a drawing have longer names
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """One input image."""

    path: Path
    drawing: Path  # path of the drawing relative to the output folder
    apply_exif: bool = True


@dataclass
class Inputs:
    """Images that were found, and files in folders that were passed over."""

    sources: list[Source] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)  # kind of file, such as `.txt` or `hidden` → number


def input_path(word: str) -> Path:
    """A file or folder of the command line.

    Raises:
        UserError: if it is a URL, whose slashes a path would not keep.
    """
    if _URL.match(word):
        raise UserError(f"{word}: must be a file or a folder; URLs are not fetched, download the image first")
    return Path(word)


def find_images(inputs: Sequence[Path], output: Path) -> Inputs:
    """List the given files and all images below given folders, in order; a drawing is named after its image.

    Folders are searched through links; hidden files and folders, and those in `output`, are not searched.

    Raises:
        UserError: if a path does not exist, a folder has no image, or a drawing would replace an input.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: must be a folder for the drawings, but is a file")
    result = Inputs()
    found: list[tuple[Path, Path]] = []  # file, and its path relative to the given folder
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: must be an image or a folder of images, but does not exist")
        if path.is_file():
            found.append((path, Path(path.name)))
            continue
        if not path.is_dir():
            raise UserError(
                f"{path}: must be a file or a folder, but is a pipe or a device; write it into a file first"
            )
        if real(path) == real(output):
            raise UserError(f"--output {output}: drawings would replace the images; set another folder")
        inside = sorted(_images_below(path, output, result.passed_over))
        if not inside:
            seen = f", only {described(result.passed_over)}" if result.passed_over else ""
            raise UserError(f"{path}: must hold images ({' '.join(sorted(SUFFIXES))}), but has none{seen}")
        found += [(file, file.relative_to(path)) for file in inside]
    result.sources = [Source(path, drawing) for (path, _), drawing in zip(found, _drawings(found), strict=True)]
    replaced = {real(path) for path, _ in found} & {real(output / source.drawing) for source in result.sources}
    if replaced:
        raise UserError(f"--output {output}: drawings must not replace the images; set another folder")
    _require_own_folders(result.sources, output)
    return result


def _require_own_folders(sources: Sequence[Source], output: Path) -> None:
    """Refuse images and drawings in folders that crops and masks of others go to."""
    folders = {real(output / f"{source.drawing}.{kind}") for source in sources for kind in KINDS}
    for source in sources:
        for path in (source.path, output / source.drawing):
            if real(path).parent in folders:
                raise UserError(
                    f"{path}: must not be where the crops or masks of another image go; leave it out, or set another "
                    "--output"
                )


def described(passed_over: Counter[str]) -> str:
    """Count the files that were passed over, by kind: `3 × .txt, 1 × hidden`."""
    return ", ".join(f"{count} × {kind}" for kind, count in sorted(passed_over.items(), key=lambda x: (-x[1], x[0])))


def _images_below(folder: Path, output: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the images below a folder; each folder is searched once, also if links lead to it again."""
    searched: set[Path] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = real(Path(parent))
        if here in searched or here == real(output):
            folders.clear()
            continue
        searched.add(here)
        hidden = [name for name in (*folders, *files) if name.startswith(".")]
        passed_over.update({"hidden": len(hidden)} if hidden else {})
        folders[:] = sorted(name for name in folders if name not in hidden)
        for name in sorted(name for name in files if name not in hidden):
            suffix = Path(name).suffix.lower()
            if suffix in SUFFIXES:
                yield Path(parent, name)
            else:
                passed_over[suffix or "without extension"] += 1


def _drawings(found: Sequence[tuple[Path, Path]]) -> Iterator[Path]:
    """Unique name of each drawing, which is not that of a folder with drawings either."""
    taken = {folder for _, relative in found for folder in relative.parents}
    for _, relative in found:
        suffix = relative.suffix.lower() if relative.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        stem, number = _cut(relative.stem, _STEM_BYTES), 1
        name = relative.with_name(f"{stem}{suffix}")
        while name in taken:
            number += 1
            name = relative.with_name(f"{stem}_{number}{suffix}")
        taken.add(name)
        yield name


def _cut(text: str, limit: int) -> str:
    """The beginning of a name, at most `limit` bytes long."""
    while len(os.fsencode(text)) > limit:
        text = text[:-1]
    return text
