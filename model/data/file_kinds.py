"""Kinds of files that are not what they should be, an image or JSON: what a file is, and what to do about it."""

from pathlib import Path

_HEAD_BYTES = 4096
_BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"  # a byte order mark, and blanks
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_TO_JPEG = "convert it to JPEG or PNG, for instance with ImageMagick"
# First bytes, what such a file is, and what to do. Pillow reads the formats with an empty remedy: the file is damaged.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "`git lfs pull` fetches the file"),
    (b"/annex/objects/", "a git-annex pointer instead of the file", "`git annex get` fetches the file"),
    (b"\xff\xd8\xff", "a JPEG file", ""),
    (b"\x89PNG", "a PNG file", ""),
    (b"GIF8", "a GIF file", ""),
    (b"BM", "a BMP file", ""),
    (b"II*\0", "a TIFF or raw photo file", f"{_TO_JPEG} if it is a raw photo or a TIFF variant that Pillow lacks"),
    (b"MM\0*", "a TIFF or raw photo file", f"{_TO_JPEG} if it is a raw photo or a TIFF variant that Pillow lacks"),
    (b"\xff\x0a", "a JPEG XL file", _TO_JPEG),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file", _TO_JPEG),
    (b"v/1\x01", "an OpenEXR file", "convert it to TIFF or PNG"),
    (b"\x93NUMPY", "a NumPy array", "save it as PNG or TIFF, for instance with PIL.Image.fromarray"),
    (b"\x89HDF", "an HDF5 file", "save each image as PNG or TIFF"),
    (b"%PDF", "a PDF document", "render its pages as PNG"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    *(
        (magic, "a video", "ffmpeg -i VIDEO frames/%05d.jpg extracts its frames")
        for magic in (b"\0\0\x01\xba", b"FLV\x01")
    ),
    (b"\x1aE\xdf\xa3", "a video", "ffmpeg -i VIDEO frames/%05d.jpg extracts its frames"),
)


def why_unreadable(content: bytes, error: Exception) -> str:
    """Say what a file is that Pillow cannot decode, and what to do.

    Args:
        content: the file, or at least its first 4 KiB.
        error: Pillow's.
    """
    from PIL import Image, UnidentifiedImageError  # loaded where there is an error of it, not by readers of JSON

    if reason := _why_void(content):
        return reason
    if isinstance(error, Image.DecompressionBombError):
        sizes = str(error).partition(", could")[0]
        remedy = "maskrcnn predict reads it with --tile 1024; in a data set, cut or shrink it with its annotations"
        return f"it is too large: {sizes}; {remedy}"
    kind, remedy = _kind(content)
    if kind and remedy:
        return f"it is {kind}; {remedy}"
    if kind:
        reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}"  # an error without a reason
        return f"it is {kind}, but damaged{reason}; copy or download it again"
    return f"it is no image that Pillow knows (it starts with {content[:16]!r}); convert it to JPEG or PNG"


def why_no_json(content: bytes) -> str:
    """Say what a file is in place of JSON, and what to do; empty if it is another text, or unknown."""
    if reason := _why_void(content):
        return reason
    if content.lstrip(_BEFORE_TEXT)[:1] in (b"{", b"["):
        return ""  # JSON with a fault
    kind, remedy = _kind(content)
    return f"it is {kind}{remedy and f'; {remedy}'}" if kind else ""


def _why_void(content: bytes) -> str:
    if not content:
        return "it is empty (0 bytes); copy or download it again"
    if not content.strip(b"\0"):
        return f"its {len(content)} bytes are all zero, as after an interrupted copy; copy or download it again"
    return ""


def why_path_unreadable(path: Path, error: Exception) -> str:
    """Say why a file cannot be read or decoded, and what to do."""
    if isinstance(error, OSError) and error.strerror:  # Pillow's own errors have none
        return error.strerror
    if "\0" in str(path):  # in a list of names, such as one in UTF-16
        return "a file's name has no NUL character"
    with path.open("rb") as file:
        return why_unreadable(file.read(_HEAD_BYTES), error)


def _kind(content: bytes) -> tuple[str, str]:
    """Kind of a file and the remedy, from its first bytes; empty if unknown."""
    if content[4:8] == b"ftyp":
        return _kind_of_container(content[8:12])
    if content[:4] == b"RIFF":
        if content[8:12] == b"WEBP":
            return "a WebP file", ""
        return "a video or sound file", "ffmpeg -i VIDEO frames/%05d.jpg extracts the frames of a video"
    if content[128:132] == b"DICM":
        return "a DICOM file", "save its pixels as PNG or TIFF, for instance with pydicom"
    for magic, kind, remedy in _MAGIC:
        if content.startswith(magic):
            return kind, remedy
    return _kind_of_text(content.lstrip(_BEFORE_TEXT)[:512].lower())


def _kind_of_container(brand: bytes) -> tuple[str, str]:
    if brand in _HEIF_BRANDS:
        return "a HEIC file, as iPhones write", _TO_JPEG
    if brand in (b"avif", b"avis"):
        from PIL import features

        if features.check("avif"):
            return "an AVIF file", ""
        return "an AVIF file, which this Pillow does not decode", f"update Pillow, or {_TO_JPEG}"
    return "a video", "ffmpeg -i VIDEO frames/%05d.jpg extracts its frames"


def _kind_of_text(head: bytes) -> tuple[str, str]:
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, probably a web server's error or login page", "download it again"
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        return "an SVG drawing", "render it as PNG"
    if head.startswith((b"{", b"[", b"<?xml", b"<error")):
        return "a text file (JSON or XML), probably a web server's error", "download it again"
    return "", ""
