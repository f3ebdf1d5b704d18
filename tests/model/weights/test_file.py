"""Files of weights: what they hold is read, what they would run is not run."""

import json
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.weights.file import WeightsError, read_stored_weights

WEIGHTS = {"conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Runs:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def written(path: Path, content: Any, protocol: int) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrapper", ["blobs", "model", "state_dict", None])
def test_arrays_of_every_protocol_are_read(tmp_path: Path, protocol: int, wrapper: str | None) -> None:
    content = WEIGHTS if wrapper is None else {wrapper: WEIGHTS, "__author__": "somebody", "count": np.float32(3)}
    stored = read_stored_weights(written(tmp_path / "w.pkl", content, protocol))
    assert torch.equal(stored.tensors["conv1_w"], torch.arange(6.0).view(2, 3))
    assert stored.author == ("somebody" if wrapper else "")


def test_arrays_of_other_byte_order_and_numpy_1_are_read(tmp_path: Path) -> None:
    old = pickle.dumps({"w": WEIGHTS["conv1_w"].astype(">f4")}, protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "w.pkl").write_bytes(old)
    assert torch.equal(read_stored_weights(tmp_path / "w.pkl").tensors["w"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {trap}",), "system"),
        (exec, ("open('{trap}', 'w')",), ".exec"),
        (getattr, (os, "system"), "getattr"),
        (np.load, ("{trap}",), "load"),
        (open, ("{trap}", "w"), "open"),
        (torch.load, ("{trap}",), "load"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_malicious_pickle_is_refused_and_nothing_runs(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...], named: str, protocol: int
) -> None:
    trap = tmp_path / "sprung"
    if function is getattr:
        arguments = (Runs(__import__, "os"), "system")
    arguments = tuple(part.format(trap=trap) if isinstance(part, str) else part for part in arguments)
    path = written(tmp_path / "w.pkl", {"blobs": WEIGHTS, "extra": Runs(function, *arguments)}, protocol)
    with pytest.raises(
        WeightsError, match=r"w\.pkl: must hold only arrays and plain containers, but asks for"
    ) as error:
        read_stored_weights(path)
    assert named in str(error.value)
    assert not trap.exists()


@pytest.mark.parametrize(("module", "name"), [("numpy.testing", "assert_equal"), ("multiarray", "_reconstruct")])
def test_only_numpys_own_makers_of_arrays_are_admitted(tmp_path: Path, module: str, name: str) -> None:
    (tmp_path / "w.pkl").write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(WeightsError, match=rf"asks for {module}\.{name}; refused"):
        read_stored_weights(tmp_path / "w.pkl")


def test_a_trap_in_the_name_of_an_admitted_function_is_refused(tmp_path: Path) -> None:
    """Dotted names would reach through an admitted module into others."""
    code = b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93."
    assert [op.name for op, _, _ in pickletools.genops(code)][-2] == "STACK_GLOBAL"
    (tmp_path / "w.pkl").write_bytes(code)
    with pytest.raises(WeightsError, match=r"asks for numpy\.ndarray\.__reduce__"):
        read_stored_weights(tmp_path / "w.pkl")


def test_a_malicious_file_of_torch_is_refused(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    for legacy in (False, True):
        state = {"w": torch.ones(2), "x": Runs(os.system, f"touch {trap}")}
        torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(WeightsError, match="must hold weights that load safely"):
            read_stored_weights(tmp_path / "w.pth")
    assert not trap.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_both_of_torchs_formats_are_read(tmp_path: Path, legacy: bool) -> None:
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert torch.equal(read_stored_weights(tmp_path / "w.pth").tensors["w"], torch.ones(2))


def safetensors(header: dict[str, Any], content: bytes) -> bytes:
    """A file of that format, written by hand."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def test_safetensors_of_each_dtype_are_read(tmp_path: Path) -> None:
    dtypes = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    dtypes |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
    wanted = {name: torch.arange(6).view(2, 3).to(getattr(torch, dtype)) for name, dtype in dtypes.items()}
    wanted |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 3)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, tensor in wanted.items():
        part = tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        dtype = name if name in dtypes else {"scalar": "I64", "empty": "F32"}[name]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape)}
        header[name]["data_offsets"] = [len(content), len(content) + len(part)]
        content += part
    (tmp_path / "w.safetensors").write_bytes(safetensors(header, content))
    tensors = read_stored_weights(tmp_path / "w.safetensors").tensors
    assert list(tensors) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name
        assert tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F8_E4M3"}, "w: dtype must be one of F64, .* got F8_E4M3"),
        ({"shape": [3]}, r"w: \[3\] of torch.float32 must have its bytes in the file, got offsets 0, 8"),
        ({"data_offsets": [4, 12]}, r"w: \[2\] of torch.float32 must have its bytes"),
        ({"data_offsets": None}, "must hold weights that load safely"),
    ],
)
def test_safetensors_that_are_damaged_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}
    (tmp_path / "w.safetensors").write_bytes(safetensors(header, bytes(8)))
    with pytest.raises(WeightsError, match=reason):
        read_stored_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x02}q", b"PK\x03\x04 cut off", b"<html>"])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pkl").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pkl: must hold weights that load safely"):
        read_stored_weights(tmp_path / "w.pkl")


@pytest.mark.parametrize("content", [{"lr": 3}, [WEIGHTS], {"names": np.array(["a"])}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match="must hold"):
        read_stored_weights(written(tmp_path / "w.pkl", content, 4))


def test_the_average_of_our_checkpoint_is_taken_where_there_is_one(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2), "b": torch.zeros(1)}, "average": {"w": torch.full((2,), 5.0)}}
    torch.save(state | {"config": {"model": {}}, "step": 3}, tmp_path / "step.pt")
    stored = read_stored_weights(tmp_path / "step.pt")
    assert stored.tensors["w"].tolist() == [5, 5]
    assert stored.tensors["b"].tolist() == [0]
