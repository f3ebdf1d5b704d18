"""Operators in ONNX: they compute what the compiled ones do."""

import io

import pytest
import torch
from torch import Tensor, nn

import cuda_ops
from cuda_ops import library

pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra `onnx`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra `onnx`")
pytestmark = pytest.mark.skipif(not library.HAS_CPU, reason="needs the compiled operators, which are translated")

LEVELS = ((120, 160), (60, 80), (30, 40), (15, 20))
IMAGE_SIZE = (480, 640)  # large enough for boxes of every level
ANCHORS = [height * width for height, width in LEVELS]


class Operators(nn.Module):
    """All operators, in the forms in which networks call them."""

    def forward(self, features: list[Tensor], boxes: Tensor, scores: Tensor, labels: Tensor, deltas: Tensor) -> Tensor:
        sizes = torch.tensor([IMAGE_SIZE, (450, 640)])
        anchors = boxes[0].repeat(-(-sum(ANCHORS) // boxes.shape[1]), 1)[: sum(ANCHORS)]
        logits = deltas.sum(2)
        found = [
            *cuda_ops.select_proposals(logits, deltas, anchors, sizes, ANCHORS, pre_nms_top_n=50, min_size=3.0),
            *cuda_ops.batched_nms(boxes, scores, 0.5, 10),
            *cuda_ops.batched_nms(boxes, scores, 0.3, 70, groups=labels),
        ]
        for levels, aligned, ratio, size in ((4, True, 0, 7), (4, False, 2, 5), (1, True, 2, 3)):
            pool = cuda_ops.multilevel_roi_align
            arguments = {"image_size": IMAGE_SIZE, "output_size": size, "sampling_ratio": ratio, "aligned": aligned}
            found.append(pool(features[:levels], boxes, **arguments))
        return found


def test_operators_in_onnx_compute_what_the_compiled_ones_do() -> None:
    """Boxes of all sizes, on the border and without area; equal scores; scores of -inf; two images and one."""
    from model.inference.onnx_operators import translations

    torch.manual_seed(0)

    def inputs(num_images: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
        corners = torch.rand(num_images, 60, 2, 2) * torch.tensor([640.0, 480.0])
        boxes = torch.cat([corners.amin(2), corners.amax(2)], 2)
        boxes[:, 20:40] = boxes[:, :20] + 4.0  # neighbours to suppress
        boxes[:, 40] = 0.0
        boxes[:, 41] = torch.tensor([0.0, 0.0, 640.0, 480.0])
        boxes[:, 42:50] *= 0.05
        scores = torch.rand(num_images, 60)
        scores[:, 5:10] = 0.7
        scores[:, 55:] = -torch.inf
        features = [torch.randn(num_images, 3, *level) for level in LEVELS]
        return features, boxes, scores, torch.randint(1, 4, (num_images, 60)), torch.randn(num_images, sum(ANCHORS), 4)

    operators, example = Operators(), inputs(2)
    program = torch.export.export(operators, example)
    written = torch.onnx.export(program, custom_translation_table=translations(), opset_version=18, verbose=False)
    assert written is not None
    file = io.BytesIO()
    written.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    for arguments in (example, inputs(2)):
        flat = [*arguments[0], *arguments[1:]]
        names = [given.name for given in session.get_inputs()]
        got = session.run(None, {name: value.numpy() for name, value in zip(names, flat, strict=True)})
        for wanted, output in zip(operators(*arguments), got, strict=True):
            torch.testing.assert_close(torch.from_numpy(output), wanted, rtol=1e-5, atol=1e-4)
