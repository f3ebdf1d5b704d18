"""Files that are written whole or not at all."""

from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content at once: a reader, or a crash, sees the old text or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
