"""Each member of the network family: its size, its shapes, and that it learns, waits for nothing, and resumes."""

import io
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pytest
import torch

from model.config import LayerNormBody, ModelConfig, Resnet, TrainConfig
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler
from model.engine.steps import train_steps
from model.network.backbone import Backbone
from model.network.mask_rcnn import LOSSES, MaskRCNN
from model.structures import Batch, Detections

CPU = torch.device("cpu")
C4 = {"features": "c4", "box_head": "res5", "box_pool_size": 14, "mask_head_convs": 0}
DC5 = {"features": "c5", "res5_dilation": 2}
GN = {"norm": "group_norm", "box_head": "conv"}
# Detectron2's models of these configuration files with nothing frozen: parameters, and those of frozen batch norms,
# which are buffers.
PUBLISHED = {
    "mask_rcnn_R_50_FPN_1x": ({}, 44_343_216, 53_120),
    "mask_rcnn_R_50_C4_1x": (C4, 35_909_612, 53_120),
    "mask_rcnn_R_50_DC5_1x": (DC5, 172_353_516, 53_120),
    "mask_rcnn_R_101_FPN_3x": ({"backbone": "resnet101"}, 63_283_120, 105_344),
    "mask_rcnn_R_101_C4_3x": ({"backbone": "resnet101", **C4}, 54_849_516, 105_344),
    "mask_rcnn_R_101_DC5_3x": ({"backbone": "resnet101", **DC5}, 191_293_420, 105_344),
    "mask_rcnn_X_101_32x8d_FPN_3x": ({"backbone": "resnext101_32x8d"}, 107_427_760, 202_880),
    "scratch_mask_rcnn_R_50_FPN_3x_gn": (GN, 45_711_152, 0),
    "faster_rcnn_R_50_FPN_1x": ({"task": "box"}, 41_699_936, 53_120),
    "faster_rcnn_R_50_C4_1x": ({"task": "box", **C4}, 33_791_644, 53_120),
    "rpn_R_50_FPN_1x": ({"task": "proposals"}, 27_393_231, 53_120),
    "rpn_R_50_C4_1x": ({"task": "proposals", **C4}, 18_027_787, 30_592),
}


def count(config: ModelConfig) -> tuple[int, int]:
    """Parameters, and affine parameters of frozen norms, without the rows of the predictors for background, which
    Detectron2 leaves out.
    """
    with torch.device("meta"):
        model = MaskRCNN(config, 80)
    parameters = sum(p.numel() for p in model.parameters())
    if model.roi_heads is not None:
        parameters -= model.roi_heads.box_predictor.bbox_pred.in_features * 4 + 4
    if config.task == "mask":
        parameters -= config.mask_head_channels + 1
    return parameters, sum(b.numel() for name, b in model.named_buffers() if name.endswith((".weight", ".bias")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_network_has_as_many_parameters_as_the_published_one(name: str) -> None:
    changes, parameters, of_norms = PUBLISHED[name]
    assert count(ModelConfig(weights="none", **changes)) == (parameters, of_norms)  # type: ignore[arg-type]


def test_torchvision_publishes_the_same_number_for_mask_rcnn() -> None:
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights as Weights

    with torch.device("meta"):
        model = MaskRCNN(ModelConfig(weights="none"), 90)
    assert sum(p.numel() for p in model.parameters()) == Weights.COCO_V1.meta["num_params"]


def test_each_body_has_as_many_parameters_as_torchvision_publishes() -> None:
    """Without the classifier: one layer with bias from the last channels, behind a norm for bodies with layer norm."""
    from torchvision.models import get_model_weights

    for name in get_args(Resnet) + get_args(LayerNormBody):
        with torch.device("meta"):
            backbone = Backbone(ModelConfig(backbone=name, weights="none", norm="batch_norm"))
        channels = backbone.fpn.inner_blocks[-1][0].in_channels  # type: ignore[index, union-attr]
        classifier = (channels + 1) * 1000 + (2 * channels if name in get_args(LayerNormBody) else 0)
        parameters = sum(parameter.numel() for parameter in backbone.body.parameters())
        assert parameters == get_model_weights(name)["IMAGENET1K_V1"].meta["num_params"] - classifier, name


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({}, [(256, 32, 48), (256, 16, 24), (256, 8, 12), (256, 4, 6), (256, 2, 3)]),
        (C4, [(1024, 8, 12)]),
        (DC5, [(2048, 8, 12)]),
        ({"features": "c5"}, [(2048, 4, 6)]),
    ],
)
@pytest.mark.parametrize("backbone", ["resnet50", "resnet101", "resnext101_32x8d"])
def test_feature_maps_have_the_shapes_of_their_strides(
    backbone: str, changes: dict[str, Any], shapes: list[tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        config = ModelConfig(backbone=backbone, weights="none", **changes)  # type: ignore[arg-type]
        features = Backbone(config)(torch.empty(1, 3, 128, 192))
    assert [tuple(feature.shape[1:]) for feature in features] == shapes


# ResNet-18, or a thin path through what only bottlenecks have.
SMALL_C4 = {"features": "c4", "box_head": "res5", "box_pool_size": 4, "mask_pool_size": 4, "mask_head_convs": 0}
V2 = {
    "conventions": "torchvision",
    "rpn_convs": 2,
    "box_head": "conv",
    "box_head_convs": 2,
    "box_head_conv_channels": 32,
}
MEMBERS: dict[str, dict[str, Any]] = {
    "c4": SMALL_C4,
    "c4_with_mask_convs": SMALL_C4 | {"mask_head_convs": 1, "norm": "batch_norm"},
    "c5": {"features": "c5", "box_pool_size": 3, "mask_pool_size": 4},
    "c5_dilated": {"features": "c5", "res5_dilation": 2, "box_pool_size": 3, "mask_pool_size": 4},
    "fpn_conv_head": {"box_head": "conv", "box_head_convs": 2, "box_head_conv_channels": 32},
    "fpn_torchvision": {"conventions": "torchvision"},
    "fpn_bgr": {"pixel_order": "bgr", "pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (1.0, 1.0, 1.0)},
    "faster_rcnn": {"task": "box"},
    "faster_rcnn_c4": SMALL_C4 | {"task": "box"},
    "fpn_v2": V2 | {"norm": "batch_norm", "head_norm": "sync_batch_norm"},
    "proposals": {"task": "proposals"},
    "proposals_c4": SMALL_C4 | {"task": "proposals"},
    "convnext": {"backbone": "convnext_tiny"},
    "swin": {"backbone": "swin_t"},
}
by_member = pytest.mark.parametrize("member", MEMBERS)
Config, Shapes = Callable[..., ModelConfig], Callable[..., Batch]


@pytest.fixture(scope="module")
def models(tiny_config: Config) -> Callable[[str], MaskRCNN]:
    """models(member): its network, built once for the tests that neither change a weight nor ask for one."""

    @cache
    def build(member: str) -> MaskRCNN:
        torch.manual_seed(0)
        return MaskRCNN(tiny_config(score_threshold=0.0, **MEMBERS[member]), 3)

    return build


@by_member
def test_each_member_trains_without_waiting(
    member: str, models: Any, tiny_config: Config, shapes_batch: Shapes, no_sync: Any, losses_on_fake_cuda: Any
) -> None:
    """Forward as on a GPU, backward on the CPU; every parameter that may learn gets a gradient."""
    model, batch = models(member).train(), shapes_batch(images=2)
    model.zero_grad()
    with no_sync():
        losses = losses_on_fake_cuda(model, batch)
    assert tuple(losses) == LOSSES[tiny_config(**MEMBERS[member]).task]
    losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values())
    with no_sync():
        torch.stack(list(losses.values())).sum().backward()
    unlearnt = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unlearnt


@pytest.mark.parametrize(
    "member",
    [m for m in MEMBERS if m not in ("c4_with_mask_convs", "faster_rcnn_c4", "proposals_c4", "convnext", "swin")],
)
def test_the_loss_of_each_member_falls_within_ten_steps_and_goes_on_as_if_unbroken_when_resumed(
    member: str, tiny_config: Config, shapes_batch: Shapes
) -> None:
    torch.manual_seed(0)
    batches, file = [shapes_batch(images=2)] * 10, io.BytesIO()
    losses = train(MaskRCNN(tiny_config(**MEMBERS[member]), 3), batches, settings(), save_to=file, save_after=8)
    assert min(losses[-3:]) < 0.9 * losses[0]
    file.seek(0)
    other = MaskRCNN(tiny_config(**MEMBERS[member]), 3)  # other initial weights, to be replaced
    assert train(other, batches[8:], settings(), resume_from=file) == losses[8:]


def settings() -> TrainConfig:
    return TrainConfig(base_lr=0.02, lr_batch_size=2, batch_size=2, warmup_iters=0, clip_grad_norm=10.0)


def train(
    model: MaskRCNN,
    batches: list[Batch],
    options: TrainConfig,
    *,
    save_to: io.BytesIO | None = None,
    save_after: int = 0,
    resume_from: io.BytesIO | None = None,
) -> list[float]:
    """The sum of the losses of each step."""
    optimizer, start = make_optimizer(model, options), 0
    if resume_from is not None:
        state = torch.load(resume_from, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    limited = options.model_copy(update={"max_iters": start + len(batches)})
    losses = []
    for step in train_steps(model, iter(batches), optimizer, limited, LossScaler(CPU, options.dtype), start_step=start):
        losses.append(float(sum(step.losses.values())))
        if save_to is not None and step.number == save_after:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": save_after}
            torch.save(state, save_to)
    return losses


@by_member
def test_each_member_detects(member: str, models: Any, tiny_config: Config, shapes_batch: Shapes) -> None:
    config, model = tiny_config(**MEMBERS[member]), models(member).eval()
    with torch.inference_mode():
        found = model(shapes_batch(images=2, with_targets=False))
    assert isinstance(found, Detections)
    assert (found.num_detections > 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= 64).all()
    assert (found.scores[:, :-1] >= found.scores[:, 1:]).all()
    if config.task != "mask":
        assert found.mask_probs is None
        return
    side = config.mask_pool_size if config.features == "c4" else 2 * config.mask_pool_size
    assert found.mask_probs is not None
    assert found.mask_probs.shape == (*found.scores.shape, side, side)


def test_no_detection_at_all_is_no_failure_of_res5(tiny_config: Config, shapes_batch: Shapes) -> None:
    model = MaskRCNN(tiny_config(score_threshold=1.0, **SMALL_C4), 3).eval()
    with torch.inference_mode():
        found = model(shapes_batch(images=2, with_targets=False))
    assert found.num_detections.tolist() == [0, 0]
    assert found.mask_probs.shape == (2, 0, 4, 4)


def test_pixels_are_turned_and_shifted_as_configured(tiny_config: Config, shapes_batch: Shapes) -> None:
    batch = shapes_batch(images=1)
    mean, std = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    model = MaskRCNN(tiny_config(pixel_order="bgr", pixel_mean=mean, pixel_std=std), 3)
    red, green, blue = batch.images[0].float()
    expected = torch.stack([(blue - 1) / 4, (green - 2) / 5, (red - 3) / 6])
    torch.testing.assert_close(model.normalize(batch)[0], expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"features": "c4"}, "box_head must be res5 with features c4"),
        ({"box_head": "res5"}, "box_head must be res5 with features c4, and only there, got res5 with fpn"),
        ({**C4, "box_pool_size": 7, "mask_pool_size": 7}, "box_pool_size must be even with c4"),
        ({**C4, "mask_pool_size": 28}, "mask_pool_size must be box_pool_size with c4"),
        ({**C4, "freeze_stages": 5}, "freeze_stages must be at most 4 with c4"),
        ({"res5_dilation": 2}, "res5_dilation must be 1 unless features is c5"),
        ({"backbone": "resnet18", "stride_in_1x1": True}, "stride_in_1x1 must be false with resnet18"),
        ({"backbone": "swin_t", "stem_channels": 32}, "stem_channels must be 64, its default, with swin_t, got 32"),
        ({"stem_channels": 40}, "stem_channels must be a multiple of 16 with resnet50, got 40"),
        ({**GN, "stem_channels": 48}, "stem_channels must be a multiple of 32 with norm group_norm, got 48"),
        ({"weights": "imagenet", "stem_channels": 32}, "stem_channels must be 64 with weights 'imagenet', got 32"),
        ({"backbone": "swin_t", "features": "c5"}, "swin_t must have features fpn and no .*, got features c5"),
        ({"backbone": "convnext_tiny", "stride_in_1x1": True}, "convnext_tiny must have .*, got stride_in_1x1"),
        ({**GN, "box_head_conv_channels": 40}, "box_head_conv_channels must be a multiple of 32"),
        ({"weights": "imagenet", "stride_in_1x1": True}, "stride_in_1x1 must be False with weights 'imagenet'"),
        ({"weights": "imagenet", "pixel_order": "bgr"}, "pixel_order must be rgb with weights 'imagenet'"),
        ({"weights": "coco"}, "conventions must be torchvision with weights 'coco', got detectron2"),
        (
            {"weights": "coco_v2"},
            "conventions must be torchvision, box_head must be conv, rpn_convs must be 2, head_norm must be "
            "frozen_batch_norm with weights 'coco_v2', got detectron2, mlp, 1, None",
        ),
        ({"weights": "coco", "backbone": "resnet101"}, "backbone must be resnet50"),
        ({"weights": "coco", "conventions": "torchvision", "head_norm": "batch_norm"}, "head_norm must be none"),
        ({"weights": "coco_v2", "norm": "group_norm"}, "norm must be frozen_batch_norm, .* head_norm must be frozen_"),
        ({"weights": "imagenet_v2", "backbone": "resnet34"}, "weights must be imagenet with resnet34"),
        ({**C4, "head_norm": "batch_norm"}, "head_norm must be none without FPN and convolutions in heads"),
        ({"head_norm": "group_norm", "fpn_channels": 40}, "fpn_channels must be a multiple of 32 with group_norm"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**({"weights": "none"} | changes))
