"""List what the image installs besides torch: requirements.image.lock, without what the base image has.

    python .ci/image_requirements.py FOLDER    # writes run.txt and constraints.txt into it; needs setuptools

NVIDIA's image has its own builds of torch and of packages compiled against it. Those that this Python finds are pinned
to their installed versions, so that pip neither replaces them nor installs the locked ones too; pip still refuses them
if setup.py does not allow their versions. All else has hashes.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

EXTRAS = ("pipelines",)  # the image launches jobs and runs a pipeline's steps too
# Installed before, with torch, or not at all; nvidia-ml-py, which reads a GPU's load, is needed everywhere.
OF_TORCH = re.compile(r"(torch|torchvision|triton|pytorch-triton|cuda-.+|nvidia-(?!ml-py$).+)")
HELD = re.compile(rf"({OF_TORCH.pattern}|numpy)")


def canonical(name: str) -> str:
    """Normalise the name of a package as PEP 503 does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """The normalised name at the start of a requirement."""
    return canonical(re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0])


def entries(lock: str) -> list[str]:
    """The entries of a lock: a line with name and version, and its hashes on lines below."""
    return re.findall(r"^\w.*(?:\n .*)*", lock, flags=re.MULTILINE)


def requirements(lock: str, declared: Sequence[str], installed: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Requirements to install, and constraints: the versions of what is HELD and installed.

    Args:
        lock: content of requirements.image.lock.
        declared: requirements of setup.py, whose ranges also hold for what is installed.
        installed: versions by canonical name.
    """
    held = {name: version for name, version in installed.items() if HELD.fullmatch(name)}
    kept = [one for one in entries(lock) if name_of(one) not in held and not OF_TORCH.fullmatch(name_of(one))]
    ranges = [line for line in declared if name_of(line) in held]
    return [*kept, *ranges], [f"{name}=={version}" for name, version in sorted(held.items())]


def declared(root: Path) -> list[str]:
    """`install_requires` of setup.py, and what EXTRAS add."""
    from distutils.core import run_setup  # setuptools brings it; Python 3.12 has none of its own

    os.environ["CUDA_OPS"] = "0"  # nothing is built, so no compiler is looked for
    distribution = run_setup(str(root / "setup.py"), stop_after="init")
    return [*distribution.install_requires, *(line for extra in EXTRAS for line in distribution.extras_require[extra])]


def main(argv: Sequence[str]) -> None:
    """Write both files."""
    root, folder = Path.cwd(), Path(argv[0])
    installed: dict[str, str] = {}
    for found in distributions():
        installed.setdefault(canonical(found.name), found.version)  # the first of a name is the one that is imported
    lock = (root / "requirements.image.lock").read_text(encoding="utf-8")
    run, constraints = requirements(lock, declared(root), installed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("run.txt", run), ("constraints.txt", constraints)):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
