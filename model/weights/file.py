"""Files of weights: torch's own format, safetensors, or the pickles of Detectron(2), read without executing their code.

A pickle may name any function of any module to be called during reading. Here it may name only the constructors of
arrays; any other name is an error, before anything has run. torch's files are read with `weights_only=True`, which is
equally strict. safetensors holds arrays alone: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError

_TORCH_ZIP, _TORCH_LEGACY = b"PK", b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # the latter: its magic number, pickled
_WRAPPERS = ("model", "blobs", "state_dict")  # keys in checkpoints, Detectron's detectors, many other files
# Functions in NumPy's pickles that make an array, a scalar and, since protocol 5, an array from bytes; NumPy 1 calls
# their package `core`.
_NUMPY_MAKERS = {
    "multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "multiarray.scalar": np.float64(0).__reduce__()[0],
    "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
}
_SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_MAX_ITEM_BYTES = 8  # torch has no numbers of 16 bytes


class WeightsError(UserError):
    """Weights cannot be read or fetched, or do not fit the network."""


@dataclass(frozen=True)
class StoredWeights:
    """Content of a file of weights."""

    tensors: dict[str, Tensor]
    author: str = ""  # origin of a pickle as noted by Detectron2
    config: Mapping[str, Any] = field(default_factory=dict)  # configuration in a checkpoint of `maskrcnn train`


def read_stored_weights(path: Path) -> StoredWeights:
    """Read the tensors of a file, by their names in it.

    Raises:
        WeightsError: if the file is missing or damaged, holds anything but arrays and plain containers, or no weights.
    """
    if not path.is_file():
        found = "is neither" if path.exists() else "does not exist"
        raise WeightsError(
            "model.weights: must be none, imagenet, imagenet_v2, coco, coco_v2, or the path of a file or of a run's "
            f"folder, got {path}, which {found}"
        )
    content = _read(path)
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: must hold a state dict or a checkpoint with one, got a {type(content).__name__}")
    wrapped = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), dict)), content)
    tensors = _tensors(wrapped)
    average = _tensors(content.get("average")) if "config" in content else {}  # evaluated in place of the weights
    if not tensors:
        raise WeightsError(f"{path}: must hold arrays by name, but has none; its keys are {list(content)[:5]}")
    config = content.get("config", {})
    return StoredWeights(
        tensors | average, str(content.get("__author__", "")), config if isinstance(config, dict) else {}
    )


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(16)
        file.seek(0)
        try:
            if start.startswith(_TORCH_ZIP) or start[2:].startswith(_TORCH_LEGACY):
                return torch.load(file, map_location="cpu", weights_only=True)
            if start[8:9] == b"{":
                return _read_safetensors(file)
            return _ArraysOnly(file, encoding="latin1").load()  # Detectron's pickles are Python 2's
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle may raise anything
            raise WeightsError(
                f"{path}: must hold weights that load safely, but does not ({error}); save a state dict with "
                "torch.save(model.state_dict(), …), "
                "or arrays by name with pickle"
            ) from error


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """Tensors of a file of safetensors: the length of a header, the header in JSON, and the bytes of all arrays.

    Raises:
        ValueError: if the header does not describe the bytes; also others, since the file may hold anything.
    """
    content, tensors = bytearray(file.read()), {}
    start = 8 + int.from_bytes(content[:8], "little")
    header, content = content[8:start], content[start:]
    for name, entry in json.loads(header).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name}: dtype must be one of {', '.join(_SAFETENSORS_DTYPES)}, got {entry['dtype']}")
        dtype, shape, (begin, end) = _SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if not 0 <= begin <= end <= len(content) or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name}: {shape} of {dtype} must have its bytes in the file, got offsets {begin}, {end}")
        part = content[begin:end]
        tensors[name] = (torch.frombuffer(part, dtype=dtype) if part else torch.empty(0, dtype=dtype)).reshape(shape)
    return tensors


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that looks up only the constructors of NumPy arrays and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name in a pickle, if allowed; see `pickle.Unpickler`."""
        maker = f"{module}.{name}".removeprefix("numpy.core.").removeprefix("numpy._core.")
        if module.startswith("numpy.") and maker in _NUMPY_MAKERS:
            return _NUMPY_MAKERS[maker]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("_codecs", "encode"):  # protocol 2's encoding of bytes
            return _latin1
        raise WeightsError(
            f"must hold only arrays and plain containers, but asks for {module}.{name}; refused, and nothing in it "
            "was run. "
            "Use a file from a source that you trust, or extract the arrays where the file was made"
        )


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise WeightsError(f"must write bytes as latin1, but asks for the codec {encoding}; refused")
    return text.encode("latin1")


def _tensors(content: Any) -> dict[str, Tensor]:
    """Arrays of a dictionary by name; none of anything else."""
    found = content.items() if isinstance(content, dict) else ()
    return {str(name): _tensor(value) for name, value in found if _is_array(value)}


def _is_array(value: Any) -> bool:
    is_number = isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.dtype.itemsize <= _MAX_ITEM_BYTES
    return isinstance(value, Tensor) or is_number


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.ascontiguousarray(value.astype(value.dtype.newbyteorder("="))))
