"""An index of packages with torch for CPUs, where PyTorch's own index cannot be reached, for the Dockerfile's TORCH_INDEX.

PyPI has torch for Linux with CUDA only, which needs 3.3 GB of NVIDIA's libraries to be imported. The wheel made here is
PyPI's, unpacked and packed again: its code for CPUs is the same to the last byte, so training gives the same numbers.
The small libraries of NVIDIA that `import torch` calls (the runtime, which answers that there is no GPU, CUPTI and
cuFile) are real. The others are placeholders of a few kilobytes with the same symbols, of which each ends the process
with a message. Nothing calls them without a GPU. The version is 2.15.0+cpu, as in PyTorch's index, and the metadata ask
for no package of NVIDIA.
"""

import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

REAL = ("nvidia-cuda-runtime", "nvidia-cuda-cupti", "nvidia-cufile")
PACKAGES = ("torch", "torchvision", *REAL)
# The wheel's libraries look here by their RPATH.
LIBRARIES = "nvidia/cu13/lib"
LAZY = "torch/lib/libtorch_cuda_linalg.so"  # opened at the first use of linear algebra on a GPU; it wants cuSOLVER
# Not the driver, libcuda.so.1: the runtime must find none.
NVIDIA = re.compile(r"lib(cu(?!da)\w+|nccl|nvrtc|nvshmem_host)\.so\.\d+")


def locked(lock: Path, names: Iterable[str]) -> str:
    """The entries of a lock, hashes included, of some packages."""
    found = re.findall(r"^\w.*(?:\n .*)*", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    wanted = [entry for entry in found if entry.partition("==")[0] in names]
    return "".join(f"{entry}\n" for entry in wanted)


def download(lock: Path, python: str, folder: Path) -> dict[str, Path]:
    """Fetch the locked wheels for a Python version such as 3.11 from where pip is set to look; paths by package."""
    folder.mkdir(parents=True, exist_ok=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(locked(lock, PACKAGES), encoding="utf-8")
    platforms = [word for minor in range(36, 4, -1) for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--python-version", python, *platforms, "--dest", str(folder)]
    subprocess.run([*command, "--requirement", str(requirements)], check=True)
    return {path.name.partition("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


def needed(library: Path) -> set[str]:
    """Names of the libraries that one asks for when it is loaded."""
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout))


def undefined(library: Path) -> dict[str, str]:
    """Symbols that a library takes from others, with the version that it asks for, or ''."""
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", library]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        name: version for name, _, version in (line.split()[-1].partition("@") for line in done.stdout.splitlines())
    }


def prefix(name: str) -> str:
    """The start of a library's symbols: cublasLt of libcublasLt.so.13."""
    return name.removeprefix("lib").partition(".so")[0].removesuffix("_host")


def placeholder(name: str, symbols: dict[str, str], folder: Path) -> Path:
    """Compile a library whose symbols, with their versions, all end the process with a message."""
    message = f"{name} is a placeholder: this torch is for CPUs\\n"
    lines = ["#include <stdio.h>", "#include <stdlib.h>"]
    lines += [f'static void end(void) {{ fputs("{message}", stderr); abort(); }}']
    lines += [f"void {symbol}(void) {{ end(); }}" for symbol in sorted(symbols)]
    source, script, library = folder / f"{name}.c", folder / f"{name}.map", folder / name
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    versions = sorted({version for version in symbols.values() if version})
    script.write_text("".join(f"{version} {{ global: *; }};\n" for version in versions), encoding="utf-8")
    linked = [f"-Wl,--version-script={script}"] if versions else []
    command = ["cc", "-shared", "-fPIC", "-Os", f"-Wl,-soname,{name}", *linked, "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return library


def placeholders(libraries: Iterable[Path], real: set[str], folder: Path) -> list[Path]:
    """Compile what torch's libraries ask for of NVIDIA, but for the real ones."""
    libraries = list(libraries)
    names = {name for library in libraries for name in needed(library) if NVIDIA.fullmatch(name)} - real
    symbols: dict[str, dict[str, str]] = {name: {} for name in names}
    longest_first = sorted(names, key=lambda name: -len(prefix(name)))
    for library in libraries:
        for symbol, version in undefined(library).items():
            owner = next((name for name in longest_first if symbol.startswith(prefix(name))), None)
            if owner is not None:
                symbols[owner][symbol] = version
    return [placeholder(name, symbols[name], folder) for name in sorted(names)]


def cpu_metadata(text: str, version: str) -> str:
    """A wheel's METADATA with another version and without requirements for GPUs."""
    lines = re.sub(r"^Version: .*$", f"Version: {version}", text, count=1, flags=re.MULTILINE).splitlines()
    of_gpu = re.compile(r"Requires-Dist: (nvidia-|cuda-|triton)")
    return "".join(f"{line}\n" for line in lines if not of_gpu.match(line))


class WheelWriter:
    """Writes a wheel and its RECORD."""

    def __init__(self, path: Path, info: str) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
        self._info = info
        self._rows: list[tuple[str, str, str]] = []

    def add(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file with its permissions."""
        entry = zipfile.ZipInfo(name)
        entry.external_attr, entry.compress_type = (0o100000 | mode) << 16, zipfile.ZIP_DEFLATED
        self._zip.writestr(entry, content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        self._rows.append((name, f"sha256={digest}", str(len(content))))

    def close(self) -> None:
        """Write RECORD and finish the file."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*self._rows, (f"{self._info}/RECORD", "", "")])
        self._zip.writestr(f"{self._info}/RECORD", text.getvalue())
        self._zip.close()


def repack(wheels: dict[str, Path], folder: Path) -> Path:
    """Write torch's wheel for CPUs into a folder.

    Args:
        wheels: paths of `download`.
        folder: for the wheel; gets a folder `work` that may be removed afterwards.
    """
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    name, version, tags = re.fullmatch(r"(\w+)-([\w.]+)-(.+)\.whl", wheels["torch"].name).groups()  # type: ignore[union-attr]
    old, new = f"{name}-{version}.dist-info/", f"{name}-{version}+cpu.dist-info"
    path = folder / f"{name}-{version}+cpu-{tags}.whl"
    writer = WheelWriter(path, new)
    with zipfile.ZipFile(wheels["torch"]) as torch:
        for entry in torch.infolist():
            if entry.is_dir() or entry.filename in (f"{old}RECORD", LAZY):
                continue
            content, target = torch.read(entry), entry.filename
            if target.startswith(old):
                target = f"{new}/{target.removeprefix(old)}"
            if target == f"{new}/METADATA":
                content = cpu_metadata(content.decode(), f"{version}+cpu").encode()
            writer.add(target, content, entry.external_attr >> 16 & 0o777 or 0o644)
            if re.fullmatch(r"torch/lib/[^/]+\.so", target):
                (work / Path(target).name).write_bytes(content)
    real = set()
    for package in REAL:
        with zipfile.ZipFile(wheels[package]) as wheel:
            for member in wheel.namelist():
                # libcufile_rdma and CUPTI's helpers are opened by name, and only with a GPU.
                if re.fullmatch(rf"{LIBRARIES}/lib(cudart|cupti|cufile)\.so\.\d+", member):
                    writer.add(member, wheel.read(member), 0o755)
                    real.add(Path(member).name)
    for library in placeholders(work.glob("*.so"), real, work):
        writer.add(f"{LIBRARIES}/{library.name}", library.read_bytes(), 0o755)
    writer.close()
    return path


def build(lock: Path, python: str, cache: Path) -> Path:
    """Make the index, unless the one in the cache is of the same lock entries and of this file; returns its folder.

    Args:
        lock: requirements.image.lock.
        python: version such as 3.11.
        cache: folder for the index, 550 MB, and as much again for the wheels of PyPI while it is made.
    """
    inputs = (locked(lock, PACKAGES) + python + Path(__file__).read_text(encoding="utf-8")).encode()
    digest = hashlib.sha256(inputs).hexdigest()
    index, mark = cache / "torch-index", cache / "torch-index" / "digest"
    if mark.is_file() and mark.read_text() == digest:
        return index
    shutil.rmtree(index, ignore_errors=True)
    wheels = download(lock, python, index / "downloads")
    made = repack(wheels, index / "torch")
    (index / "torchvision").mkdir()
    wheels["torchvision"].rename(index / "torchvision" / wheels["torchvision"].name)
    shutil.rmtree(index / "downloads")
    shutil.rmtree(index / "torch" / "work")
    for page in ("torch", "torchvision"):
        links = "".join(
            f'<a href="{path.name.replace("+", "%2B")}">{path.name}</a>\n' for path in (index / page).glob("*.whl")
        )
        (index / page / "index.html").write_text(f"<!DOCTYPE html>\n<html><body>\n{links}</body></html>\n")
    mark.write_text(digest)
    print(f"{made.name}: {made.stat().st_size / 2**20:.0f} MiB")
    return index
