"""List what the image installs besides torch: the requirements of setup.py, in the versions of requirements.lock.

    python .ci/image_requirements.py FOLDER    # writes run.txt and constraints.txt into it; needs setuptools

NVIDIA's image has its own builds of torch and of packages compiled against it. Those that this Python finds are pinned
to their installed versions, so that pip neither replaces them nor installs the locked ones too.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

EXTRAS = ("pipelines",)  # the image launches jobs and runs a pipeline's steps too
HELD = re.compile(r"(torch|torchvision|triton|pytorch-triton|numpy|(nvidia|cuda)-.+)")


def canonical(name: str) -> str:
    """Normalise the name of a package as PEP 503 does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(lock: str, installed: Mapping[str, str]) -> list[str]:
    """The lock's lines, but what is HELD and installed at the version that is there.

    Args:
        installed: versions by canonical name.
    """
    held = {name: version for name, version in installed.items() if HELD.fullmatch(name)}
    lines = [line for line in lock.splitlines() if line.strip() and not line.startswith("#")]
    kept = [line for line in lines if canonical(line.partition("==")[0]) not in held]
    return [*kept, *(f"{name}=={version}" for name, version in sorted(held.items()))]


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
    lock = (root / "requirements.lock").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("run.txt", declared(root)), ("constraints.txt", constraints(lock, installed))):
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
