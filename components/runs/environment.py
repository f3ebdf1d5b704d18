"""Environment of a result: commit, hardware, versions.

It is stored in MLflow tags, environment.json, evaluation.json and benchmark.json.
"""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Tracked files that are code. `maskrcnn recipe` and DVC write others, and a run keeps its parameters itself.
_CODE = tuple(f":(top)*.{suffix}" for suffix in ("py", "cpp", "cu", "h"))


def git_commit() -> str | None:
    """The commit of the current directory, `-dirty` if tracked code differs; outside git the image's, or None."""
    try:
        commit = _git("rev-parse", "--verify", "HEAD")
        return f"{commit}-dirty" if _git("diff", "--name-only", "HEAD", "--", *_CODE) else commit
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or no commit in it
        return os.environ.get("MASKRCNN_COMMIT") or None  # set by the Dockerfile


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> dict[str, str | int]:
    """Processor, cores that this process may use, and accelerators, as people name them."""
    import torch  # seconds, which those who only ask for the commit need not pay

    from model.distributed import available_cores

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "cores": available_cores(), "gpu": ", ".join(sorted(set(gpus))), "gpus": len(gpus)}


def hardware_name(machine: dict[str, Any], processes: int) -> str:
    """Name of the hardware for tables: each training process uses a GPU if there are any."""
    if machine["gpus"]:
        return f"{processes} × {machine['gpu']}"
    return f"{machine['cpu']}, {machine['cores']} cores"


def versions() -> dict[str, str]:
    """Python and the packages that decide what is computed and how fast."""
    import torch

    packages = {name: _version(name) for name in ("torch", "torchvision", "numpy", "pycocotools", "hotcoco")}
    return {"python": platform.python_version(), **packages, "cuda": torch.version.cuda or ""}


def environment() -> dict[str, Any]:
    """Commit, hardware and versions, as the files of a run state them."""
    return {"commit": git_commit(), "hardware": hardware(), "versions": versions()}


def run_tags() -> dict[str, str]:
    """Commit, state of the working tree and of DVC's lock, hardware and versions as MLflow tags."""
    described = git_commit()
    commit = (described or "").removesuffix("-dirty")
    tags = {"commit": commit, "mlflow.source.git.commit": commit}  # the second fills the UI's column of versions
    if described is not None:
        tags["dirty"] = str(described.endswith("-dirty")).lower()
    tags["dvc.lock_md5"] = _md5(Path("dvc.lock"))  # the state of DVC's outputs at this time
    tags["dvc.exp_name"] = os.environ.get("DVC_EXP_NAME", "")  # `dvc exp show` lists it
    tags |= {f"hardware.{name}": str(value) for name, value in hardware().items()}
    tags |= {f"version.{name}": value for name, value in versions().items()}
    return {name: value for name, value in tags.items() if value}


def _md5(path: Path) -> str:
    """MD5 of a file, in hexadecimal; empty if there is none."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if path.is_file() else ""


def _version(package: str) -> str:
    """Version of a package; empty if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
