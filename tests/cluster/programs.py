"""Builds the cluster's programs from sources.toml, once: `python tests/cluster/programs.py [TABLE …]`.

Modules come from the Go proxy and are verified by the checksum database, as `go env` names them. A program is built
again only if its table has changed.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from settings import BIN, CACHE

SOURCES = tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))
Table = Mapping[str, Any]


def build(name: str) -> None:
    """Build the programs of a table into BIN, if they are not there yet."""
    table = SOURCES[name]
    stamp, digest = CACHE / "built" / name, hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    if (
        stamp.exists()
        and stamp.read_text() == digest
        and all((BIN / program).exists() for program in table["packages"])
    ):
        return
    began_s = time.monotonic()
    folder = _module(name, table)
    for program, package in table["packages"].items():
        flags = f"-s -w {table.get('ldflags', '')}".strip()
        _go(folder, "build", "-trimpath", f"-ldflags={flags}", "-o", str(BIN / program), package)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(digest)
    print(f"{name} {table['version']} built in {time.monotonic() - began_s:.0f} s", flush=True)


def source(name: str) -> Path:
    """Folder of a module's sources, which hold its manifests too."""
    table = SOURCES[name]
    answer = _go(_module(name, table), "mod", "download", "-json", f"{table['module']}@{table['version']}")
    return Path(json.loads(answer)["Dir"])


def _module(name: str, table: Table) -> Path:
    """Folder of a module of ours that requires the program's, as programs with `replace` lines need."""
    folder = CACHE / "src" / name
    lines = [f"{table['module']} {table['version']}", *table.get("require", [])]
    text = "module cluster\n\ngo 1.24.0\n\nrequire (\n" + "".join(f"\t{line}\n" for line in lines) + ")\n"
    if not (folder / "requires").exists() or (folder / "requires").read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "go.mod").write_text(text)  # go adds what follows from it
        (folder / "go.sum").unlink(missing_ok=True)
        (folder / "requires").write_text(text)
    return folder


def _go(folder: Path, *words: str) -> str:
    environment = os.environ | {"GOFLAGS": "-mod=mod", "CGO_ENABLED": "0", "GOWORK": "off"}
    done = subprocess.run(["go", *words], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"go {' '.join(words)} ended with status {done.returncode} in {folder}\n{done.stdout}")
    return done.stdout


def main(names: Sequence[str]) -> None:
    """Build the named tables, or all."""
    BIN.mkdir(parents=True, exist_ok=True)
    for name in names or SOURCES:
        build(name)


if __name__ == "__main__":
    main(sys.argv[1:])
