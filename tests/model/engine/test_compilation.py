"""Compiled networks compute what plain ones do, under the same names."""

from collections.abc import Callable

import pytest
import torch
import torch._inductor.config

from model.config import ModelConfig, TrainConfig
from model.engine.compilation import compile_parts
from model.engine.optim import make_optimizer
from model.engine.precision import LossScaler
from model.engine.steps import train_steps
from model.errors import UserError
from model.inference.predict import predict
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch

CPU = torch.device("cpu")


def trained(config: ModelConfig, batches: list[Batch], *, compiled: bool) -> tuple[MaskRCNN, list[dict[str, float]]]:
    torch.manual_seed(0)
    model = MaskRCNN(config, 3)
    if compiled:
        compile_parts(model, CPU)
    train = TrainConfig(batch_size=2, lr_batch_size=2, base_lr=1e-3, warmup_iters=0, max_iters=len(batches))
    steps = train_steps(model, iter(batches), make_optimizer(model, train), train, LossScaler(CPU, "float32"))
    return model, [{name: loss.item() for name, loss in step.losses.items()} for step in steps]


@pytest.mark.slow  # a minute of compilation
@pytest.mark.parametrize("norm", ["frozen_batch_norm", "batch_norm"])
def test_compiled_parts_train_and_detect_as_plain_ones(
    norm: str, tiny_config: Callable[..., ModelConfig], shapes_batch: Callable[..., Batch]
) -> None:
    batches = [shapes_batch(images=2, seed=seed) for seed in (0, 1)]
    config = tiny_config(norm=norm, head_norm=norm, box_head="conv", box_head_convs=1, rpn_convs=2)
    plain, expected = trained(config, batches, compiled=False)
    compiled, losses = trained(config, batches, compiled=True)
    for got, wanted in zip(losses, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(compiled.state_dict())
    found, again = (next(predict(model, batches[:1], CPU))[1] for model in (compiled, plain))
    torch.testing.assert_close(found.scores, again.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.boxes, again.boxes, rtol=1e-3, atol=1e-2)


def test_a_machine_that_cannot_compile_is_named(
    tiny_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    torch.compiler.reset()
    reason = r"train.compile=true: .* compiling one line failed .* set train.compile to false"
    with pytest.raises(UserError, match=reason):
        compile_parts(MaskRCNN(tiny_config(), 3), CPU)
