"""Formats of exported programs: how each is written, and loaded again for comparison with the network.

A program in any format is the function `model.inference.export.Detector` for the images of one bucket.
Sources: torch.export, torch.onnx.export and AOTInductor (PyTorch 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from model.inference.export import OUTPUTS

OPSET = 18  # ONNX version: has RoiAlign with half pixels (since 16) and is what torch's exporter is written for

Outputs = dict[str, Tensor]
Detect = Callable[[Tensor, Tensor], Outputs]


@dataclass(frozen=True)
class Format:
    """One format of files."""

    ending: str
    save: Callable[[ExportedProgram, Path], None]
    load: Callable[[Path], Detect]
    tolerance: float  # largest difference from the network: pixels of boxes, scores, mask probabilities


def _save_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _load_torch(path: Path) -> Detect:
    return torch.export.load(path).module()


def _save_onnx(program: ExportedProgram, path: Path) -> None:
    from model.inference.onnx_operators import translations

    written = torch.onnx.export(
        program,
        input_names=["images", "image_sizes"],
        output_names=OUTPUTS[: len(program.graph_signature.user_outputs)],
        opset_version=OPSET,
        dynamic_shapes=({0: "batch"}, None),
        custom_translation_table=translations(),
        verbose=False,
    )
    assert written is not None
    written.save(path)


def _load_onnx(path: Path) -> Detect:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def detect(images: Tensor, image_sizes: Tensor) -> Outputs:
        inputs = {"images": images.numpy(force=True), "image_sizes": image_sizes.numpy(force=True)}
        return dict(zip(names, map(torch.from_numpy, session.run(None, inputs)), strict=True))

    return detect


def _save_aoti(program: ExportedProgram, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _load_aoti(path: Path) -> Detect:
    detect = torch._inductor.aoti_load_package(str(path))
    # The compiled code takes the memory format of the example for granted, and our batches are channels-last.
    return lambda images, image_sizes: detect(images.contiguous(), image_sizes.contiguous())


FORMATS = {
    "torch": Format("pt2", _save_torch, _load_torch, tolerance=1e-3),
    "onnx": Format("onnx", _save_onnx, _load_onnx, tolerance=1e-2),
    "aoti": Format("pt2", _save_aoti, _load_aoti, tolerance=1e-2),
}
