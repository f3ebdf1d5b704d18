"""The build of the emulator: by one process of several, while the others wait."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.parametrize("backend", ["reference"], indirect=True)
COMPILER = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
echo "${2##*/}" >> "$COMPILED"
sleep 0.02
touch "$2"
echo broken for a test >&2
exit $STATUS
"""


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emulation: ModuleType) -> Path:
    """The record of what a stand-in for g++ was asked to write, in an empty folder of builds."""
    compiler = tmp_path / "bin" / "g++"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("COMPILED", str(tmp_path / "compiled"))
    monkeypatch.setattr(emulation, "BUILD", tmp_path / "build")
    return tmp_path / "compiled"


def test_what_two_build_at_once_is_built_once(
    compiled: Path, emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATUS", "0")
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: emulation.build(), range(2))
    assert first == second
    written = compiled.read_text().splitlines()
    kernels = list((emulation.CSRC / "cuda").glob("*.cu"))
    assert len(written) == len(set(written)) > len(kernels) + 3
    assert {path.suffix for path in (compiled.parent / "build").iterdir()} == {".o", ".so", ""}  # and no part of a file


def test_a_build_that_fails_fails_for_both(
    compiled: Path, emulation: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATUS", "1")
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(emulation.build) for _ in range(2)]
    for build in builds:
        with pytest.raises(RuntimeError, match="cannot be built for the emulator:\nbroken for a test"):
            build.result()
