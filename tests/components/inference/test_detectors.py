"""Detectors to predict with, of weights alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn, maskrcnn_resnet50_fpn

from components.inference.detectors import load_detector
from components.inference.networks import load_network
from components.params import build_config
from model.config import ModelConfig
from model.network.layers import FrozenBatchNorm2d
from model.network.mask_rcnn import MaskRCNN
from model.weights.file import WeightsError
from model.weights.published import COCO_CLASSES, published_detector

CPU = torch.device("cpu")
SMALL = ModelConfig(
    backbone="resnet18", stem_channels=32, weights="none", fpn_channels=32, box_head_channels=32, mask_head_channels=32
)
SCORES, BOXES = "roi_heads.box_predictor.cls_score.bias", "roi_heads.box_predictor.bbox_pred.bias"


@pytest.fixture(scope="module")
def torchvisions() -> dict[str, Tensor]:
    """A state dict of torchvision's Mask R-CNN, whose rows of class k say k."""
    state: dict[str, Tensor] = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    state[SCORES] = torch.arange(91.0)
    state[BOXES] = torch.arange(91.0).repeat_interleave(4)
    return state


def test_coco_is_torchvisions_file_with_the_rows_of_its_80_classes(
    torchvisions: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = published_detector("coco", "mask").cache
    cache.parent.mkdir(parents=True)
    torch.save(torchvisions, cache)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coco").mkdir()  # a data set's folder does not stand in the way
    loaded = load_network(build_config({"train": {"device": "cpu"}}), "coco").trained.loaded
    assert (loaded.class_names, loaded.category_ids) == (tuple(COCO_CLASSES.values()), tuple(COCO_CLASSES))
    state = loaded.model.state_dict()
    assert state[SCORES].tolist() == [0, *COCO_CLASSES]
    assert state[BOXES][::4].tolist() == [0, *COCO_CLASSES]
    variance = "backbone.body.bn1.running_var"  # torchvision uses it with eps 0
    torch.testing.assert_close(state[variance] + FrozenBatchNorm2d.eps, torchvisions[variance])
    assert loaded.config["model"]["conventions"] == "torchvision"
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_file_of_91_rows_is_cocos_and_one_of_other_classes_gets_names(
    torchvisions: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(torchvisions, tmp_path / "coco.pth")
    loaded = load_detector(str(tmp_path / "coco.pth"), CPU)
    assert loaded.model.state_dict()[SCORES].tolist() == [0, *COCO_CLASSES]
    assert loaded.class_names[-1] == "toothbrush"
    torch.save(MaskRCNN(SMALL, 3).state_dict(), tmp_path / "own.pth")
    assert load_detector(str(tmp_path / "own.pth"), CPU).class_names == ("class 1", "class 2", "class 3")
    assert load_detector(str(tmp_path / "own.pth"), CPU, ["nut", "bolt", "screw"]).class_names == (
        "nut",
        "bolt",
        "screw",
    )
    with pytest.raises(WeightsError, match=r"own\.pth: class_names must name its 3 classes, got 1"):
        load_detector(str(tmp_path / "own.pth"), CPU, ["nut"])


def test_eighty_classes_are_cocos_in_the_order_of_their_ids(tmp_path: Path) -> None:
    torch.save(MaskRCNN(SMALL, 80).state_dict(), tmp_path / "eighty.pth")
    loaded = load_detector(str(tmp_path / "eighty.pth"), CPU)
    assert (loaded.class_names[11], loaded.category_ids[11]) == ("stop sign", 13)


def test_a_detector_of_another_body_is_refused(tmp_path: Path) -> None:
    other = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    torch.save(other.state_dict(), tmp_path / "mobile.pth")
    with pytest.raises(WeightsError, match=r"mobile\.pth: must have "):
        load_detector(str(tmp_path / "mobile.pth"), CPU)


def test_weights_of_half_precision_serve_in_float32(tmp_path: Path) -> None:
    state = MaskRCNN(SMALL, 3).state_dict()
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "half.pth")
    model = load_detector(str(tmp_path / "half.pth"), CPU).model
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].half().float()), name


def test_predictors_of_several_numbers_of_classes_are_refused(tmp_path: Path) -> None:
    other = MaskRCNN(SMALL, 4).state_dict()
    mixed = {
        name: other[name] if "mask_fcn" in name else value for name, value in MaskRCNN(SMALL, 3).state_dict().items()
    }
    torch.save(mixed, tmp_path / "mixed.pth")
    with pytest.raises(WeightsError, match=r"mixed\.pth: must hold all weights to predict with, but 6 are absent"):
        load_detector(str(tmp_path / "mixed.pth"), CPU)
