"""Exported programs: what they compute, without our code, and when none is left."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components import export
from components.config import Config
from components.inference import programs
from components.params import save_config
from components.runs.trained import load_trained
from cuda_ops import library
from model.data.collate import collate
from model.data.dataset import CocoDataset
from model.data.index import CocoIndex
from model.engine.checkpoint import save_checkpoint
from model.engine.pointers import require_checkpoint
from model.inference.export import Detector
from model.inference.predict import predict
from model.network.mask_rcnn import MaskRCNN

pytestmark = pytest.mark.skipif(
    not library.HAS_CPU, reason="needs the compiled operators, as every exported program does"
)

ALONE = """
import sys, torch
library, program, inputs, output, file_format = sys.argv[1:]
torch.ops.load_library(library)
detect = torch._inductor.aoti_load_package(program) if file_format == "aoti" else torch.export.load(program).module()
torch.save([detect(images.contiguous(), image_sizes) for images, image_sizes in torch.load(inputs)], output)
assert not {"model", "components", "cuda_ops"} & set(sys.modules)
"""


@dataclass(frozen=True)
class Exported:
    folder: Path
    output: str


@pytest.fixture(scope="module")
def exported(trained_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    params = tmp_path_factory.mktemp("export") / "params.yaml"
    save_config(trained_run, params)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        export.main(["--params", str(params)])
    return Exported(trained_run.train.output_dir / "export", stdout.getvalue())


def test_each_bucket_has_a_program_that_was_checked(trained_run: Config, exported: Exported) -> None:
    content = json.loads((exported.folder / "export.json").read_text())
    assert f"{exported.folder / '96x160.pt2'}: equal to the network within" in exported.output
    assert content["format"] == "torch"
    assert [(p["height"], p["width"]) for p in content["programs"]] == [(96, 160), (160, 96)]
    assert {path.name for path in exported.folder.iterdir()} == {"export.json", "96x160.pt2", "160x96.pt2"}
    assert sum(program["checked_images"] for program in content["programs"]) > 0
    assert len(content["class_names"]) == 80
    assert content["min_size_px"] == 96


def test_a_program_finds_the_same_in_a_process_without_our_code(
    trained_run: Config, exported: Exported, tmp_path: Path
) -> None:
    assert same_without_our_code(trained_run, exported.folder / "96x160.pt2", "torch", tmp_path) > 20


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler, g++ or CXX")
def test_a_compiled_program_finds_the_same_in_a_process_without_our_code(trained_run: Config, tmp_path: Path) -> None:
    state = torch.load(require_checkpoint(trained_run.train.output_dir, "last"), weights_only=True)
    state["config"]["data"]["buckets"] = [[160, 160]]  # each takes a minute
    save_checkpoint(tmp_path / "run", 7, state)
    train = trained_run.train.model_copy(update={"output_dir": tmp_path / "run"})
    run = trained_run.model_copy(update={"train": train})
    (entry,) = export.run(run, file_format="aoti").programs
    assert entry["checked_images"] > 0
    assert entry["checked_objects"] > 20
    program = tmp_path / "run" / "export" / "aoti" / "160x160.pt2"
    assert same_without_our_code(run, program, "aoti", tmp_path) > 20


def same_without_our_code(run: Config, program: Path, file_format: str, folder: Path) -> int:
    """Compare one image, more than it was traced with, and less than all rows; return the number of objects."""
    objects = 0
    trained = load_trained(run, "last")
    model, data = trained.loaded.model, trained.config.data
    index = CocoIndex.open(data.prepared_dir, "val")
    dataset = CocoDataset(index, data, training=False)
    wide = [dataset[i] for i in range(len(index)) if index.size(i)[0] <= index.size(i)[1]]
    batches = [collate(part, data.buckets) for part in (wide[:1], wide * 3)]
    inputs, outputs = folder / "inputs.pt", folder / "outputs.pt"
    torch.save([(batch.images, batch.image_sizes) for batch in batches], inputs)
    arguments = [library.PATH, program, inputs, outputs, file_format]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], cwd=folder, check=True)
    for (_, wanted), got in zip(predict(model, batches, torch.device("cpu")), torch.load(outputs), strict=True):
        assert wanted.mask_probs is not None
        assert torch.equal(got["num_detections"], wanted.num_detections)
        rows = wanted.boxes.shape[1]
        assert rows > 0
        assert torch.equal(got["labels"][:, :rows], wanted.labels)
        for name in ("boxes", "scores", "mask_probs"):
            torch.testing.assert_close(got[name][:, :rows], getattr(wanted, name), rtol=0, atol=1e-4)
            assert not got[name][:, rows:].any() or name == "mask_probs"
        objects += int(wanted.num_detections.sum())
    return objects


def test_a_network_whose_values_float32_rounds_too_coarsely_is_told_from_a_wrong_program(
    trained_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without statistics a frozen norm changes nothing, so that values grow from block to block."""
    trained = load_trained(trained_run, "last")
    index, data = CocoIndex.open(trained.config.data.prepared_dir, "val"), trained.config.data
    batch = programs.sample(index, data, data.buckets[0])
    assert batch is not None
    assert max(programs.rounding(trained.loaded.model, batch).values()) < 1e-3
    deep = {"backbone": "resnet101", "norm": "frozen_batch_norm", "stem_channels": 16}
    torch.manual_seed(0)
    untrained = MaskRCNN(trained.config.model.model_copy(update=deep), len(index.class_names)).eval()
    loaded = replace(trained, loaded=replace(trained.loaded, model=untrained))
    assert max(programs.rounding(untrained, batch).values()) > 0.1

    def rounds_otherwise(path: Path) -> Callable[..., Any]:
        def detect(*inputs: torch.Tensor) -> Any:
            with torch.backends.mkldnn.flags(enabled=False):
                return Detector(untrained)(*inputs)

        return detect

    written = replace(programs.FORMATS["torch"], save=lambda _, path: path.touch(), load=rounds_otherwise)
    monkeypatch.setattr(programs, "export_detector", lambda *_: None)
    with pytest.raises(programs.ExportError, match=r"must agree .* The network itself differs by .*rounds .*Train it"):
        programs._export(loaded, index, data.buckets[0], tmp_path, written)


def test_a_program_that_computes_something_else_is_not_kept(
    trained_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = programs.export_detector

    def exports_another_network(model, bucket):  # type: ignore[no-untyped-def]
        model = load_trained(trained_run, "last").loaded.model
        with torch.no_grad():
            model.roi_heads.box_predictor.cls_score.bias.copy_(torch.linspace(0, 1, 81))
        return other(model, bucket)

    monkeypatch.setattr(programs, "export_detector", exports_another_network)
    with pytest.raises(programs.ExportError, match=r"96x160\.pt2: must agree with the network.* got .*\}$"):
        export.run(trained_run, output=tmp_path / "export")
    assert list((tmp_path / "export").glob("*")) == []


def test_without_compiled_operators_the_error_says_so(trained_run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "reference")
    with pytest.raises(programs.ExportError, match=r"the operators must be compiled for cpu"):
        export.run(trained_run)
