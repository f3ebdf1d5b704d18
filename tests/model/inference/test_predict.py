"""Detections of a loader's batches by a network that may be in training."""

from collections.abc import Callable

import pytest
import torch

from model.config import EvaluateConfig, ModelConfig
from model.inference.predict import predict
from model.inference.test_time import predict_views
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections

CPU = torch.device("cpu")


def test_predict_restores_the_mode_it_found(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    model = MaskRCNN(tiny_config(score_threshold=0.0), 3).train()
    [(batch, detections)] = predict(model, [shapes_batch(with_targets=False)], CPU)
    assert model.training
    assert isinstance(detections, Detections)
    assert detections.boxes.shape[0] == len(batch)
    assert (detections.scores[:, :-1] >= detections.scores[:, 1:]).all()


def test_detection_searches_no_kernels_and_training_goes_on_as_it_was(
    tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen: list[bool] = []
    model, batch = MaskRCNN(tiny_config(), 3), shapes_batch(with_targets=False)
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    model.backbone.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    for _ in predict(model, [batch, batch], CPU):
        assert torch.backends.cudnn.benchmark
    for _ in predict_views(model, [[batch]], EvaluateConfig(flip=True), CPU, "float32"):
        assert torch.backends.cudnn.benchmark
    assert seen == [False] * 6, "backbone and network of two batches, then the backbone of two views"
