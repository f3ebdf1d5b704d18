"""Initial weights from state dicts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

from model.config import ModelConfig
from model.network.mask_rcnn import MaskRCNN
from model.weights.load import WeightsError, load_weights

COCO_NAMES = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]


def cached(weights: object, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve a state dict as if torchvision's file had been fetched: no network here, and 170 MB there."""

    def load(url: str, **_options: object) -> dict[str, torch.Tensor]:
        assert url == weights.url  # type: ignore[attr-defined]
        return {name: value.clone() for name, value in state.items()}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)


def test_a_torchvision_mask_rcnn_loads_whole(tmp_path: Path) -> None:
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "coco.pth")
    config = ModelConfig(weights=str(tmp_path / "coco.pth"))
    model = MaskRCNN(config, 90)
    report = load_weights(model, config, COCO_NAMES[1:], range(1, 91))
    assert not report.initialised
    assert not report.unused
    assert torch.equal(model.roi_heads.box_head.fc6.weight, theirs.roi_heads.box_head.fc6.weight)


def test_other_classes_start_at_random_and_it_says_so(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    torch.save(MaskRCNN(tiny_config(), 5).state_dict(), tmp_path / "five.pth")
    config = tiny_config(weights=str(tmp_path / "five.pth"))
    report = load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])
    assert len(report.initialised) == 6
    assert "6 start at random: another number of classes (roi_heads.box_predictor.cls_score.weight" in str(report)


def test_whether_a_file_states_its_conventions_is_said(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    """A checkpoint of ours has its configuration; a state dict alone may be anybody's."""
    state, assumed = MaskRCNN(tiny_config(), 2).state_dict(), "your settings are assumed to match"
    trained = {"model": tiny_config().model_dump(mode="json")}
    for content, is_stated in (({"model": state, "config": trained}, True), (state, False)):
        torch.save(content, tmp_path / "weights.pth")
        config = tiny_config(weights=str(tmp_path / "weights.pth"))
        report = load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])
        assert (assumed not in str(report)) == is_stated


def test_another_architecture_is_refused(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> None:
    torch.save(MaskRCNN(tiny_config(backbone="resnet34"), 2).state_dict(), tmp_path / "r34.pth")
    config = tiny_config(weights=str(tmp_path / "r34.pth"), fpn_channels=64)
    with pytest.raises(WeightsError, match=r"model\.backbone"):
        load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])


def test_an_absent_file_is_an_error(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(weights="nowhere.pth")
    with pytest.raises(WeightsError, match=r"nowhere\.pth, which does not exist"):
        load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])


def test_classifiers_of_timm_and_openmmlab_fill_the_body_alone(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    """timm's ResNets have torchvision's names; OpenMMLab's have prefixes, and their training's state around them."""
    state = {name: torch.rand_like(value.float()) for name, value in torchvision.models.resnet18().state_dict().items()}
    prefixes = {name: ("head." if name.startswith("fc.") else "backbone.") + name for name in state}
    openmmlab = {"meta": {"epoch": 600}, "state_dict": {prefixes[name]: value for name, value in state.items()}}
    for content, heads, origin in (
        (state, {"fc.weight", "fc.bias"}, "torchvision's names"),
        (openmmlab, {"head.fc.weight", "head.fc.bias"}, "OpenMMLab's names"),
    ):
        torch.save(content, tmp_path / "classifier.pth")
        config = tiny_config(backbone="resnet18", weights=str(tmp_path / "classifier.pth"), norm="frozen_batch_norm")
        model = MaskRCNN(config, 2)
        report = load_weights(model, config, ["cat", "dog"], [1, 2])
        assert origin in str(report)
        assert set(report.unused) == heads
        assert all(torch.equal(value, state[name]) for name, value in model.backbone.body.state_dict().items())
        assert all(not name.startswith("backbone.body.") for name in report.initialised)
        bgr = tiny_config(backbone="resnet18", weights=config.weights, norm="frozen_batch_norm", pixel_order="bgr")
        with pytest.raises(WeightsError, match=r"set 'model\.pixel_order=rgb'"):  # both were trained on RGB
            load_weights(model, bgr, ["cat", "dog"], [1, 2])


def test_imagenet_fills_the_body_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., ModelConfig]
) -> None:
    state = torchvision.models.resnet18().state_dict()
    cached(torchvision.models.ResNet18_Weights.IMAGENET1K_V1, state, monkeypatch)
    config = tiny_config(backbone="resnet18", weights="imagenet", norm="frozen_batch_norm")
    model = MaskRCNN(config, 2)
    report = load_weights(model, config, ["cat", "dog"], [1, 2])
    block = model.backbone.body.layer4[1]  # type: ignore[index]
    assert torch.equal(block.conv2.weight, state["layer4.1.conv2.weight"])  # type: ignore[union-attr]
    assert set(report.unused) == {"fc.weight", "fc.bias"}
    assert all(not name.startswith("backbone.body.") for name in report.initialised)


def test_without_a_network_training_may_start_without_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., ModelConfig]
) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    for config in (
        tiny_config(backbone="resnet18", weights="imagenet", norm="frozen_batch_norm"),
        ModelConfig(weights="coco", conventions="torchvision"),
    ):
        with pytest.raises(WeightsError, match=r"\(no network\);.*to train without any: model\.weights=none"):
            load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])


def test_coco_weights_keep_the_predictors_of_known_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    theirs["backbone.body.bn1.running_var"].fill_(4e-4)  # small, so that eps shows: the std is 0.02
    cached(MaskRCNN_ResNet50_FPN_Weights.COCO_V1, theirs, monkeypatch)
    config = ModelConfig(weights="coco", conventions="torchvision")
    model = MaskRCNN(config, 2)
    report = load_weights(model, config, ["cat", "dog"], [17, 18])
    assert not report.initialised
    predictor = model.roi_heads.box_predictor
    assert torch.equal(predictor.cls_score.weight, theirs["roi_heads.box_predictor.cls_score.weight"][[0, 17, 18]])
    rows = theirs["roi_heads.box_predictor.bbox_pred.weight"].view(91, 4, -1)[[0, 17, 18]].flatten(0, 1)
    assert torch.equal(predictor.bbox_pred.weight, rows)
    scale, _ = model.backbone.body.bn1.scale_and_shift()  # type: ignore[operator]
    torch.testing.assert_close(scale, theirs["backbone.body.bn1.weight"] / 0.02)


def test_coco_weights_for_other_classes_restart_the_predictors(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91).state_dict()
    cached(MaskRCNN_ResNet50_FPN_Weights.COCO_V1, theirs, monkeypatch)
    config = ModelConfig(weights="coco", conventions="torchvision")
    report = load_weights(MaskRCNN(config, 2), config, ["circle", "square"], [1, 2])
    assert len(report.initialised) == 6


V2 = {"conventions": "torchvision", "norm": "frozen_batch_norm", "head_norm": "frozen_batch_norm", "rpn_convs": 2}
THIN_V2 = V2 | {"backbone": "resnet50", "box_head": "conv", "box_head_convs": 1, "box_head_conv_channels": 32}


@pytest.mark.parametrize(
    ("task", "file"),
    [("mask", "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth"), ("box", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth")],
)
def test_the_second_coco_weights_are_torchvisions_of_each_task_and_keep_their_variances(
    task: str, file: str, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., ModelConfig]
) -> None:
    """A thin network stands for theirs, whose names it has; test_parity_v2.py has the real ones."""
    config = tiny_config(weights="coco_v2", task=task, **THIN_V2)
    learned = MaskRCNN(config.model_copy(update={"norm": "batch_norm", "head_norm": "batch_norm"}), 90)
    state = learned.state_dict()
    assert any(name.endswith("num_batches_tracked") for name in state)
    cached(SimpleNamespace(url=f"https://download.pytorch.org/models/{file}"), state, monkeypatch)
    model = MaskRCNN(config, 2)
    report = load_weights(model, config, ["cat", "dog"], [17, 18])
    assert not report.initialised
    assert not report.unused
    predictor = model.roi_heads.box_predictor
    assert torch.equal(predictor.cls_score.weight, state["roi_heads.box_predictor.cls_score.weight"][[0, 17, 18]])
    for name in ("backbone.body.bn1", "backbone.fpn.inner_blocks.0.1", "roi_heads.box_head.0.1"):
        assert torch.equal(model.get_buffer(f"{name}.running_var"), state[f"{name}.running_var"])


def test_a_file_of_a_second_network_fits_no_first_one_nor_the_other_way(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    """Nothing that both have may be left over: a convolution of the RPN that is not used gives other proposals."""
    file = {"weights": str(tmp_path / "v2.pth")}
    torch.save(
        MaskRCNN(tiny_config(rpn_convs=2, head_norm="batch_norm", norm="batch_norm"), 2).state_dict(), *file.values()
    )
    for changes, tensor in (
        ({"head_norm": "batch_norm"}, r"rpn\.head\.conv\.1\.0\.weight must be absent, got \(32, 32, 3, 3\)"),
        ({"rpn_convs": 2}, r"backbone\.fpn\.inner_blocks\.0\.0\.bias must be \(32,\), got absent"),
    ):
        config = tiny_config(norm="batch_norm", **file, **changes)
        with pytest.raises(WeightsError, match=rf"{tensor}; check .*model\.rpn_convs"):
            load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])


def test_a_frozen_norm_of_a_head_needs_statistics_from_the_file(
    tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "body.pth")
    config = tiny_config(
        backbone="resnet18", norm="frozen_batch_norm", head_norm="frozen_batch_norm", weights=str(tmp_path / "body.pth")
    )
    with pytest.raises(WeightsError, match=r"must hold statistics for frozen batch norms, .*; set model\.head_norm to"):
        load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])


def test_the_second_imagenet_weights_are_the_body_of_that_name(
    monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., ModelConfig]
) -> None:
    state = torchvision.models.resnet50().state_dict()
    url = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"
    cached(SimpleNamespace(url=url), state, monkeypatch)
    config = tiny_config(weights="imagenet_v2", norm="frozen_batch_norm", backbone="resnet50")
    report = load_weights(MaskRCNN(config, 2), config, ["cat", "dog"], [1, 2])
    assert report.source == "torchvision's ResNet50_Weights.IMAGENET1K_V2"
    assert set(report.unused) == {"fc.weight", "fc.bias"}
