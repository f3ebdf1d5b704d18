"""The compiled library: whether it is there, and what it can do.

It is one file, `_C.*.so`, built by setup.py against the stable ABI of libtorch, so it serves every torch from 2.11 on
and every Python. Where it was not built, the references serve.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

Backend = Literal["compiled", "reference"]
BACKENDS: tuple[Backend, ...] = ("compiled", "reference")
VARIABLE = "CUDA_OPS_BACKEND"
BUILD = "`pip install --no-build-isolation -e .`"


class LibraryError(ImportError):
    """The compiled operators are asked for, but cannot be had."""


PATH: Path | None = None
HAS_CPU = False
HAS_CUDA = False
REASON = ""  # there are no compiled operators because of this
_chosen: Backend | None = None
_has_warned = False


def load(schemas: Sequence[str]) -> None:
    """Load the library, if it was built; `cuda_ops.operators` does it once, at import.

    A library that does not load, or whose operators have other schemas than these, is left alone with a warning.
    """
    global PATH, HAS_CPU, HAS_CUDA, REASON
    found = find()
    if found is None:
        REASON = f"the compiled operators were not built; install a C++ compiler and run {BUILD}"
        return
    REASON = fault(found, schemas) or ""
    if REASON:
        warnings.warn(f"cuda_ops: {REASON}; until then plain torch serves, slower", stacklevel=2)
        return
    PATH, HAS_CPU = found, True
    HAS_CUDA = any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"cuda_ops::{_name(schema)}", "CUDA") for schema in schemas
    )


def find() -> Path | None:
    """The library's file, where it was built.

    A DVC experiment may run in a clone of the user's tree, in which nothing was built. The tree's library then serves
    if the sources are the same.
    """
    here = Path(__file__).resolve().parent
    if found := _built_in(here):
        return found
    root = os.environ.get("DVC_ROOT")  # the tree: DVC sets it for the commands of its stages
    clone = next((folder for folder in here.parents if (folder / ".dvc").is_dir()), None)
    if not root or clone is None:
        return None
    theirs = Path(root) / here.relative_to(clone)
    return _built_in(theirs) if _sources(theirs) == _sources(here) else None


def _built_in(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("_C*.so"))), None)


def _sources(folder: Path) -> dict[Path, bytes]:
    """The content of each file of csrc/."""
    files = [path for path in (folder / "csrc").rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def fault(path: Path, schemas: Sequence[str]) -> str | None:
    """The reason why this library cannot be used, and what to do; None where it can."""
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load, run {BUILD} to rebuild it: {error}"
    differences = [difference for schema in schemas if (difference := _difference(schema))]
    if not differences:
        return None
    return f"{path.name} was built from older sources, run {BUILD} to rebuild it: {'; '.join(differences)}"


def _difference(schema: str) -> str | None:
    """Compare the loaded library's operator with its schema: the difference, or None."""
    built = getattr(torch.ops.cuda_ops, _name(schema), None)
    if built is None:
        return f"it lacks {_name(schema)}"
    expected = torch._C.parse_schema(f"cuda_ops::{schema}")
    return None if str(built.default._schema) == str(expected) else f"it has {built.default._schema}, not {expected}"


def _name(schema: str) -> str:
    return schema.partition("(")[0]


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Compute the operators by this implementation within the context.

    Raises:
        ValueError: if there is none of that name.
        LibraryError: if it is the compiled one, and that was not built.
    """
    global _chosen
    _check(name)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def serves(device: torch.device) -> bool:
    """Tell whether the compiled operators compute on this device; warn once where they cannot."""
    global _has_warned
    name = _chosen or os.environ.get(VARIABLE)
    if name is not None:
        _check(name)
        return name == "compiled"
    if HAS_CUDA if device.type == "cuda" else HAS_CPU and device.type == "cpu":
        return True
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"cuda_ops: no compiled operators for {device.type}, so plain torch serves, slower; "
            "`python -m cuda_ops` tells more",
            stacklevel=3,
        )
    return False


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"cuda_ops: backend must be {' or '.join(BACKENDS)}, got {name}")
    if name == "compiled" and not HAS_CPU:
        raise LibraryError(f"cuda_ops: {REASON}")
