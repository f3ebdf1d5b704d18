"""Images to predict on: files, and whatever lies in folders; each with the name of its drawing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".webp",
    ".ppm",
    ".pgm",
    ".jp2",
}  # files used in folders


@dataclass(frozen=True)
class Source:
    """One input image."""

    path: Path
    drawing: Path  # path of the drawing relative to the output folder
    apply_exif: bool = True


def find_images(inputs: Sequence[Path], output: Path) -> list[Source]:
    """List the given files and all images below given folders, in order; a drawing is named after its image.

    Raises:
        UserError: if a path does not exist, a folder has no image, or a drawing would replace an input.
    """
    found: list[tuple[Path, Path]] = []  # file, and its path relative to the given folder
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path}: must be an image or a folder of images, but does not exist")
        if path.is_file():
            found.append((path, Path(path.name)))
            continue
        inside = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in SUFFIXES and not file.resolve().is_relative_to(output.resolve())
        ]
        if not inside:
            raise UserError(f"{path}: must hold images ({' '.join(sorted(SUFFIXES))}), but has none")
        found += [(file, file.relative_to(path)) for file in inside]
    sources = [Source(path, drawing) for (path, _), drawing in zip(found, _drawings(found), strict=True)]
    replaced = {path.resolve() for path, _ in found} & {(output / source.drawing).resolve() for source in sources}
    if replaced:
        raise UserError(f"--output {output}: drawings must not replace the images; set another folder")
    return sources


def _drawings(found: Sequence[tuple[Path, Path]]) -> Iterator[Path]:
    """Unique name of each drawing."""
    taken: set[Path] = set()
    for _, relative in found:
        suffix = relative.suffix.lower() if relative.suffix.lower() in (".jpg", ".jpeg", ".png") else ".png"
        name, number = relative.with_suffix(suffix), 1
        while name in taken:
            number += 1
            name = relative.with_name(f"{relative.stem}_{number}{suffix}")
        taken.add(name)
        yield name
