"""ONNX files: standard operators alone find what the network finds, also by the example of the documentation."""

import contextlib
import importlib.util
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch
from PIL import Image

from components import export, predict
from components.config import Config
from components.inference import programs
from components.inference.agreement import beyond
from components.params import save_config
from cuda_ops import library
from model.config import ModelConfig
from model.data.index import CocoIndex
from model.engine.checkpoint import save_checkpoint
from model.engine.pointers import require_checkpoint
from model.errors import UserError
from model.inference.export import export_detector
from model.inference.formats import FORMATS
from model.network.mask_rcnn import MaskRCNN

REPOSITORY = Path(__file__).resolve().parents[2]
needs_onnx = pytest.mark.skipif(
    not library.HAS_CPU or any(importlib.util.find_spec(name) is None for name in export.PACKAGES["onnx"]),
    reason="needs the compiled operators, and the packages of the extra `onnx`",
)


@dataclass(frozen=True)
class Exported:
    config: Config
    folder: Path
    output: str


def decide(weights: dict[str, torch.Tensor]) -> None:
    """Move the weights of a new network apart, so that rounding does not decide which objects are found."""
    factors = {
        "roi_heads.box_predictor.cls_score": 200,
        "rpn.head.cls_logits": 200,
        "roi_heads.box_predictor.bbox_pred": 20,
    }
    for name, factor in factors.items():
        if f"{name}.weight" in weights:
            weights[f"{name}.weight"].mul_(factor)


def decided(config: Config, folder: Path) -> Config:
    """A run of one bucket and such weights."""
    state = torch.load(require_checkpoint(config.train.output_dir, "last"), weights_only=True)
    state["config"]["data"]["buckets"] = [[160, 160]]
    state["config"]["model"]["score_threshold"] = 0.05
    decide(state["model"])
    train = config.train.model_copy(update={"output_dir": folder / "decided"})
    save_checkpoint(train.output_dir, 7, state)
    return config.model_copy(update={"train": train})


@pytest.fixture(scope="module")
def exported(trained_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    config = decided(trained_run, tmp_path_factory.mktemp("onnx"))
    save_config(config, config.train.output_dir / "params.yaml")
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        export.main(["--params", str(config.train.output_dir / "params.yaml"), "--format", "onnx"])
    return Exported(config, config.train.output_dir / "export" / "onnx", stdout.getvalue())


@needs_onnx
def test_a_file_has_standard_operators_alone_and_was_compared_with_the_network(exported: Exported) -> None:
    import onnx

    program = onnx.load(exported.folder / "160x160.onnx")
    onnx.checker.check_model(program, full_check=True)
    assert [(opset.domain, opset.version) for opset in program.opset_import] == [("", 18)]
    assert {node.domain for node in program.graph.node} == {""}
    (entry,) = json.loads((exported.folder / "export.json").read_text())["programs"]
    assert entry["checked_images"] == 4
    assert entry["checked_objects"] > 20
    assert max(entry["largest_differences"].values()) < 1e-2
    assert re.search(r"160x160\.onnx: equal to the network within \S+ on 4 images with \d+ objects\n", exported.output)


@needs_onnx
def test_the_example_in_python_finds_what_predict_finds(
    exported: Exported, coco_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = sorted((coco_like / "val2017").iterdir())[0]
    (entry,) = predict.run(exported.config, [photo], output=tmp_path / "predictions").images
    wanted = [found for found in entry["detections"] if found["score"] >= 0.5]
    (code,) = re.findall(r"```python\n(import json.*?)```", (REPOSITORY / "docs" / "export.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["detect.py", str(exported.folder), str(photo)])
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exec(compile(code, "detect.py", "exec"), {})
    got = [json.loads(line) for line in stdout.getvalue().splitlines()]
    assert len(wanted) > 2
    assert [one["class"] for one in got] == [one["class"] for one in wanted]
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=0.1)
        assert one["score"] == pytest.approx(other["score"], abs=5e-3)
        pasted, mask = np.array(Image.open(f"mask_{number}.png")), pycocotools.mask.decode(other["segmentation"])
        assert (pasted & mask.astype(bool)).sum() >= 0.9 * (pasted | mask.astype(bool)).sum()


KINDS: dict[str, dict[str, Any]] = {
    "box": {"task": "box", "class_agnostic_boxes": True},
    "proposals": {"task": "proposals"},
    "torchvision": {
        "conventions": "torchvision",
        "norm": "group_norm",
        "box_head": "conv",
        "box_head_conv_channels": 32,
    },
    "v2": {"head_norm": "batch_norm", "rpn_convs": 2, "box_head": "conv", "box_head_conv_channels": 32},
    "c4": {
        "features": "c4",
        "box_head": "res5",
        "box_pool_size": 14,
        "anchor_sizes_px": (32, 64, 128),
        "mask_head_convs": 0,
    },
    "c5": {"features": "c5", "res5_dilation": 2, "anchor_sizes_px": (32, 64, 128), "norm": "batch_norm"},
    "coco_v2": {  # torchvision's, with the layers that `model.weights` coco_v2 needs
        "backbone": "resnet50",
        "norm": "group_norm",  # an untrained body of this depth without it gives features of any size
        "head_norm": "frozen_batch_norm",
        "rpn_convs": 2,
        "box_head": "conv",
        "conventions": "torchvision",
    },
    **{name: {"backbone": name} for name in ("convnext_tiny", "swin_t", "resnext50_32x4d")},
    "wide_resnet50_2": {"backbone": "wide_resnet50_2", "norm": "group_norm"},  # likewise: scores were all 1
}


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_network_is_the_same_in_onnx(kind: str, trained_run: Config, tmp_path: Path) -> None:
    width = {"stem_channels": 64, "score_threshold": 0.05}  # half as wide, proposals' scores round to 1 and tie
    settings = trained_run.model.model_dump(mode="json") | width | KINDS[kind]
    torch.manual_seed(1)
    model = MaskRCNN(ModelConfig.model_validate_json(json.dumps(settings)), 80).to_device(torch.device("cpu")).eval()
    decide(model.state_dict())
    data = trained_run.data.model_copy(update={"buckets": ((160, 160),)})
    batch = programs.sample(CocoIndex.open(data.prepared_dir, "val"), data, (160, 160))
    assert batch is not None
    FORMATS["onnx"].save(export_detector(model, (160, 160)), tmp_path / "program.onnx")
    found, objects = programs.compare(model, batch, FORMATS["onnx"].load(tmp_path / "program.onnx"))
    assert objects > 20
    assert beyond(found, FORMATS["onnx"].tolerance) == {}


def test_the_extra_declares_what_the_export_imports() -> None:
    (declared,) = re.findall(r'"onnx": \[(.+)\]', (REPOSITORY / "setup.py").read_text())
    assert set(re.findall(r'"([a-z-]+)', declared)) == {name.replace("_", "-") for name in export.PACKAGES["onnx"]}
    source = (REPOSITORY / "model" / "inference" / "onnx_operators.py").read_text()
    assert set(re.findall(r"^(?:import|from) (onnx\w*)", source, re.MULTILINE)) <= set(export.PACKAGES["onnx"])


def test_missing_packages_compilers_and_wrong_formats_are_named(
    trained_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(UserError, match=r"onnxruntime cannot be imported; install them: pip install 'maskrcnn-mlops"):
        export.run(trained_run, file_format="onnx")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, got no-such-compiler, which is not on PATH"):
        export.run(trained_run, file_format="aoti")
    with pytest.raises(SystemExit):
        export.main(["--format", "tensorrt"])
