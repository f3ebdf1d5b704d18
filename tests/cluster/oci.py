"""Archives of container images that hold a few files and nothing else, such as one static program.

    write_image(Path("coredns.tar"), "localhost/team/coredns:1", {"/coredns": BIN / "coredns"}, entrypoint=["/coredns"])

The archive is an OCI image layout in a tar file, as containerd, Docker and skopeo read it. Equal files give equal bytes.
Source: github.com/opencontainers/image-spec, version 1.1.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

NOBODY = "65532:65532"  # the user of distroless's image `nonroot`, on which these programs' own images are built
_TYPE = "application/vnd.oci.image"


def write_image(
    archive: Path,
    name: str,
    files: Mapping[str, Path | str],
    *,
    entrypoint: Sequence[str],
    links: Mapping[str, str] | None = None,
    user: str = NOBODY,
) -> None:
    """Write an OCI archive of an image, whole or not at all.

    Args:
        name: name and tag of the image, REGISTRY/NAME:TAG.
        files: absolute path in the image → a file on this machine, or a script's text; all can be run.
        links: absolute path in the image → what the symbolic link there points to.
        user: UID:GID of the container's process.
    """
    layer = _layer(files, links or {})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"User": user, "Env": ["PATH=/usr/bin:/bin"], "Entrypoint": list(entrypoint), "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    blobs = [layer, _json(config)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_TYPE}.manifest.v1+json",
        "config": _descriptor(f"{_TYPE}.config.v1+json", blobs[1]),
        "layers": [_descriptor(f"{_TYPE}.layer.v1.tar", layer)],
    }
    blobs.append(_json(manifest))
    tag = name.rpartition(":")[2]
    names = {"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": name}
    index = {
        "schemaVersion": 2,
        "mediaType": f"{_TYPE}.index.v1+json",
        "manifests": [_descriptor(manifest["mediaType"], blobs[2]) | {"annotations": names}],
    }
    parts = {"oci-layout": _json({"imageLayoutVersion": "1.0.0"}), "index.json": _json(index)}
    parts |= {f"blobs/sha256/{_digest(blob).partition(':')[2]}": blob for blob in blobs}
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(f"{archive.name}.{os.getpid()}")
    try:
        with tarfile.open(unfinished, "w") as tar:
            for path, content in parts.items():
                _add(tar, path, content)
        unfinished.replace(archive)
    finally:
        unfinished.unlink(missing_ok=True)


def _layer(files: Mapping[str, Path | str], links: Mapping[str, str]) -> bytes:
    """Tar of the image's file system, with the folders above each file and a /tmp that all may write to."""
    stream = io.BytesIO()
    folders = {str(folder) for name in (*files, *links) for folder in PurePosixPath(name).parents} - {"/"}
    with tarfile.open(fileobj=stream, mode="w") as layer:
        for name, mode in [*((folder, 0o755) for folder in sorted(folders)), ("/tmp", 0o1777)]:
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.type, entry.mode = tarfile.DIRTYPE, mode
            layer.addfile(entry)
        for name, source in sorted(files.items()):
            _add(layer, name.lstrip("/"), source.encode() if isinstance(source, str) else source.read_bytes(), 0o755)
        for name, aim in sorted(links.items()):
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, aim
            layer.addfile(entry)
    return stream.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))


def _descriptor(media_type: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
