"""Archives of images: what is in them, by the rules of the image specification. No cluster is needed."""

import hashlib
import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def oci() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oci", Path(__file__).with_name("oci.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def test_an_archive_holds_what_its_index_says(oci: ModuleType, tmp_path: Path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    files, links = {"/manager": program, "/usr/bin/tini": "#!"}, {"/bin/sh": "/x"}
    oci.write_image(tmp_path / "a.tar", "localhost/team/a:v1", files, entrypoint=["/manager"], links=links)
    found = parts(tmp_path / "a.tar")

    def blob(descriptor: dict[str, Any]) -> bytes:
        content = found[f"blobs/{descriptor['digest'].replace(':', '/')}"]
        assert descriptor["size"] == len(content)
        assert descriptor["digest"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        return content

    (entry,) = json.loads(found["index.json"])["manifests"]
    assert entry["annotations"]["io.containerd.image.name"] == "localhost/team/a:v1"
    assert entry["annotations"]["org.opencontainers.image.ref.name"] == "v1"
    manifest = json.loads(blob(entry))
    config, layer = json.loads(blob(manifest["config"])), blob(manifest["layers"][0])
    assert config["rootfs"]["diff_ids"] == [manifest["layers"][0]["digest"]], "a layer without compression"
    assert config["config"]["User"] == "65532:65532", "by number: runAsNonRoot knows no names"
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        files = {entry.name: (entry.mode, entry.linkname) for entry in tar}
        assert tar.extractfile("manager").read() == b"\x7fELF"  # type: ignore[union-attr]
    assert files["manager"] == (0o755, "")
    assert files["usr/bin/tini"] == (0o755, "")
    assert files["bin/sh"][1] == "/x"
    assert files["tmp"] == (0o1777, "")
    assert set(files) == {"bin", "tmp", "usr", "usr/bin", "manager", "usr/bin/tini", "bin/sh"}


def test_equal_files_give_equal_bytes(oci: ModuleType, tmp_path: Path):
    for name in ("a.tar", "b.tar"):
        oci.write_image(tmp_path / name, "localhost/team/a:v1", {"/run": "#!/bin/sh\n"}, entrypoint=["/run"])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_program_that_is_missing_leaves_no_archive(oci: ModuleType, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        oci.write_image(tmp_path / "a.tar", "localhost/team/a:v1", {"/run": tmp_path / "none"}, entrypoint=["/run"])
    assert list(tmp_path.iterdir()) == []
