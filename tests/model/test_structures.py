"""Records of tensors: what is done to a batch is done to its targets too."""

from collections.abc import Callable

import torch

from model.structures import Batch


def tensors(record: object) -> dict[str, torch.Tensor]:
    """Every tensor of a record and of the records in it, by its path."""
    found = {}
    for name, value in vars(record).items():
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif hasattr(value, "__dataclass_fields__"):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(value).items()}
    return found


def test_a_batch_moves_with_its_targets_and_polygons_but_without_its_image_ids(
    shapes_batch: Callable[..., Batch],
) -> None:
    batch = shapes_batch()
    moved = tensors(batch.to(torch.device("meta")))
    assert {name for name, tensor in moved.items() if tensor.device.type == "cpu"} == {"image_ids"}
    assert {"targets.gt_boxes", "targets.polygons.xy"} < moved.keys() == tensors(batch).keys()


def test_a_function_is_applied_to_every_tensor(shapes_batch: Callable[..., Batch]) -> None:
    batch = shapes_batch()
    doubled = tensors(batch.map(lambda tensor: tensor * 2))
    for name, tensor in tensors(batch).items():
        assert torch.equal(doubled[name], tensor * 2), name
    assert batch.map(torch.clone).targets is not None
    assert shapes_batch(with_targets=False).map(torch.clone).targets is None
