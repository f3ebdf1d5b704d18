"""Whole training steps, detections and exports on a GPU without values: what a GPU would refuse, or wait for, is known
without one.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from components.runs.recipes import load_recipe, recipe_names
from cuda_ops import library
from model.config import EvaluateConfig, ModelConfig, TrainConfig
from model.engine.average import WeightAverage
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler, set_float32_products
from model.engine.steps import Step, train_steps
from model.inference.export import export_detector
from model.inference.predict import predict
from model.inference.test_time import predict_views
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch

pytestmark = [
    pytest.mark.skipif(not library.HAS_CPU, reason="needs g++, which compiles the operators"),
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch with CUDA, since others choose other kernels"),
]
CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
PRODUCTS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
C4 = {"features": "c4", "box_head": "res5", "box_pool_size": 4, "mask_pool_size": 4, "mask_head_convs": 0}
Config, Shapes = Callable[..., ModelConfig], Callable[..., Batch]


def networks() -> dict[str, ModelConfig]:
    """Each network of the recipes once, by the first recipe that has it. ResNet-101's blocks are ResNet-50's."""
    found: dict[str, tuple[str, ModelConfig]] = {}
    for name in recipe_names():
        config = load_recipe(name).model
        changes = {"weights": "none", "freeze_stages": config.frozen_stages}
        if config.backbone == "resnet101":
            changes["backbone"] = "resnet50"
        config = config.model_copy(update=changes)
        found.setdefault(config.model_dump_json(), (name, config))
    return dict(found.values())


NETWORKS = networks()


def on_meta(config: ModelConfig) -> MaskRCNN:
    """The network without values, to be put on the fake GPU."""
    with torch.device(META):
        return MaskRCNN(config, 80).to_device(META)


def train(gpu: Any, model: MaskRCNN, batches: list[Batch], **options: Any) -> Iterator[Step]:
    """Steps on the fake GPU; each updates all that may learn."""
    gpu.move(model)
    settings = TrainConfig(**({"batch_size": 6, "max_iters": 2, "apex": "off"} | options))
    on_host = [batch.map(lambda tensor: gpu.fake(tensor, CPU)) for batch in batches]
    average = WeightAverage(model, settings.ema_decay)
    learning = sum(parameter.requires_grad for parameter in model.parameters())
    optimizer, scaler = make_optimizer(model, settings), LossScaler(CUDA, settings.dtype)
    for step in train_steps(model, cycle(on_host), optimizer, settings, scaler):
        average.update(step.number)
        assert gpu.updated in (learning, 2 * learning)  # twice where a graph is captured, then replayed
        gpu.updated = 0
        yield step


def in_turn() -> list[Any]:
    """Each recipe's network in one dtype, another for the next; in the others it is slow."""
    dtypes = ("bfloat16", "float16", "float32")  # tf32's tensors are float32's
    return [
        pytest.param(name, dtype, marks=() if (row + column) % 3 == 0 else pytest.mark.slow)
        for row, name in enumerate(NETWORKS)
        for column, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize(("name", "dtype"), in_turn())
def test_each_recipes_network_trains(name: str, dtype: str, shapes_batch: Shapes, fake_gpu: Any) -> None:
    """A deeper ResNet has more of the same blocks, so 50 layers stand for 101."""
    model, batch = on_meta(NETWORKS[name]), shapes_batch(images=2)
    with fake_gpu() as gpu:
        (step,) = train(gpu, model, [batch], dtype=dtype, max_iters=1)
    assert {value.device for value in (step.grad_norm, step.skipped, *step.losses.values())} == {CUDA}
    assert gpu.dtypes == {PRODUCTS[dtype]}
    assert gpu.questions == 0


ACCUMULATED = {"accumulation_steps": 2, "clip_grad_norm": 1.0, "ema_decay": 0.99, "max_iters": 1}
GRAPHS = {"cuda_graph": True, "clip_grad_norm": 1.0, "max_iters": 4}
ADAMW = {"optimizer": "adamw", "schedule": "cosine", "layer_decay": 0.9, "ema_decay": 0.99}


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *(pytest.param(dtype, ACCUMULATED, id=f"accumulation_clipping_average-{dtype}") for dtype in PRODUCTS),
        pytest.param("float16", GRAPHS, id="graphs-float16"),
        pytest.param("float16", GRAPHS | ADAMW, id="adamw-graphs-float16"),
        pytest.param("bfloat16", GRAPHS, id="graphs-bfloat16", marks=pytest.mark.slow),  # float16 without its scale
    ],
)
def test_training_never_waits_whatever_is_set(
    dtype: str, options: dict[str, Any], tiny_config: Config, shapes_batch: Shapes, fake_gpu: Any
) -> None:
    norms = {"norm": "batch_norm", "head_norm": "batch_norm"}  # their buffers change in each step
    model, batches = on_meta(tiny_config(**norms)), [shapes_batch(images=2)]
    with fake_gpu() as gpu:
        set_float32_products(CUDA, dtype)
        steps = list(train(gpu, model, batches, dtype=dtype, **options))
        set_float32_products(CUDA, "float32")
    assert gpu.dtypes == {PRODUCTS[dtype]}
    assert gpu.questions == 0
    assert [step.is_replayed for step in steps] == [step.number > 3 for step in steps]


def test_plain_torch_in_place_of_the_compiled_operators_never_waits_either(
    tiny_config: Config, shapes_batch: Shapes, fake_gpu: Any
) -> None:
    model, batch = on_meta(tiny_config()), shapes_batch(images=2)
    with fake_gpu() as gpu, library.backend("reference"):
        assert len(list(train(gpu, model, [batch]))) == 2
    assert gpu.questions == 0


def test_deterministic_steps_never_wait(
    tiny_config: Config, shapes_batch: Shapes, fake_gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, batch = on_meta(tiny_config()), shapes_batch(images=2)
    torch.use_deterministic_algorithms(True)
    try:
        with fake_gpu() as gpu:
            assert len(list(train(gpu, model, [batch]))) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert gpu.questions == 0


VIEWS = {
    "plain": None,
    "scales_and_mirror_images": EvaluateConfig(flip=True, scales=(1.0, 1.5)),
    "linear_soft_nms": EvaluateConfig(soft_nms="linear"),
    "gaussian_soft_nms": EvaluateConfig(flip=True, soft_nms="gaussian"),
}


@pytest.mark.parametrize("views", VIEWS)
def test_detection_asks_the_host_once_a_view_and_once_more(
    views: str, tiny_config: Config, shapes_batch: Shapes, fake_gpu: Any
) -> None:
    evaluate = VIEWS[views]
    batches = [shapes_batch(images=2, size=size, with_targets=False) for size in (64, 96)]
    for network, dtype in (({}, "float32"), (C4, "float16")):
        model = on_meta(tiny_config(**network))
        with fake_gpu(answer=5) as gpu:
            gpu.move(model)
            on_host = [batch.map(lambda tensor: gpu.fake(tensor, CPU)) for batch in batches]
            if evaluate is None:
                (_, found), *_ = predict(model, on_host, CUDA, dtype)
                questions = 2 * len(batches)
            else:
                ((_, found),) = predict_views(model, [on_host[: len(evaluate.scales)]], evaluate, CUDA, dtype)
                questions = len(evaluate.scales) * (2 if evaluate.flip else 1) + 1
        assert found.mask_probs.shape[:2] == found.boxes.shape[:2] == (2, 5)
        assert {tensor.device for tensor in vars(found).values()} == {CUDA}
        assert gpu.questions == questions
        assert gpu.dtypes == {PRODUCTS[dtype]}


@pytest.mark.parametrize("network", [{}, {"task": "proposals"}], ids=["masks", "proposals"])
def test_an_exported_program_is_on_the_gpu_as_a_whole(
    network: dict[str, Any], tiny_config: Config, fake_gpu: Any
) -> None:
    model = on_meta(tiny_config(**network))
    with fake_gpu(may_wait=True) as gpu:
        program = export_detector(gpu.move(model), (64, 96))
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert {value.device for value in values if isinstance(value, Tensor)} == {CUDA}
    assert gpu.dtypes == {torch.float32}


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: x[0].item(),
    "a truth": lambda x: bool(x[0] > 0),
    "a list": lambda x: x.tolist(),
    "a copy on the host": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a list as indices": lambda x: x[[0, 2]],
    "a list made a tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_host_that_waits_is_noticed(what: str, fake_gpu: Any) -> None:
    with fake_gpu() as gpu, pytest.raises(AssertionError, match="makes the host wait"):
        WAITS[what](gpu.fake(torch.ones(3)))


def test_a_tensor_left_on_the_host_is_noticed(fake_gpu: Any) -> None:
    with fake_gpu() as gpu:
        on_gpu = gpu.fake(torch.ones(3))
        for left in (
            torch.ones(3),
            torch.ones(()),
        ):  # torch takes a scalar from the host, and a graph would keep its value
            with pytest.raises(AssertionError, match="all tensors must be on one device"):
                on_gpu * left


class HalfBackward(torch.autograd.Function):
    """Its gradient stays on the host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.zeros(grad.shape, device=CPU)


def test_a_gradient_on_the_host_or_in_other_strides_is_noticed(fake_gpu: Any) -> None:
    conv = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
    with fake_gpu() as gpu:
        weight = gpu.move(conv).weight
        (weight * weight).sum().backward()
        with pytest.raises(AssertionError, match="must be on cuda:0, got cpu"):
            HalfBackward.apply(weight).sum().backward()
        with pytest.raises(AssertionError, match="must have their parameter's strides"):
            (weight.contiguous() * gpu.fake(torch.ones(4, 4, 3, 3))).sum().backward()
