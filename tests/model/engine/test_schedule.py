"""Length and steps in epochs are iterations of the data's size, within bounds."""

from typing import Any

import pytest

from model.config import TrainConfig
from model.engine.schedule import in_iterations


def by_epochs(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"max_iters": 0, "lr_steps": (), "epochs": 12.0, "lr_epochs": (8, 11)} | changes))


@pytest.mark.parametrize(
    ("changes", "per_epoch", "max_iters", "lr_steps"),
    [
        ({}, 7330, 87960, (58640, 80630)),  # COCO, 16 images a step
        ({"epochs": 0.5, "lr_epochs": (0.25,)}, 10, 5, (2,)),
        ({"iters_range": (100, 1000)}, 50, 600, (400, 550)),  # within
        ({"iters_range": (100, 1000)}, 5, 100, (67, 92)),  # stretched
        ({"iters_range": (100, 1000)}, 500, 1000, (667, 917)),  # shortened
        ({"epochs": 0.01, "lr_epochs": ()}, 10, 1, ()),
    ],
)
def test_epochs_are_turned_into_iterations(
    changes: dict[str, Any], per_epoch: int, max_iters: int, lr_steps: tuple[int, ...]
) -> None:
    train = in_iterations(by_epochs(**changes), per_epoch)
    assert (train.max_iters, train.lr_steps) == (max_iters, lr_steps)
    TrainConfig.model_validate(train.model_dump())  # a configuration that could have been given


def test_iterations_stay_what_they_are() -> None:
    assert in_iterations(TrainConfig(), 5) == TrainConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_iters": 850, "lr_steps": (600,)},
            r"max_iters must be 0 and lr_steps \[\] with epochs.*got 850 and \[600\]",
        ),
        ({"lr_steps": (600,)}, r"got 0 and \[600\] with 12 epochs"),
        ({"epochs": 0, "lr_epochs": ()}, "max_iters or epochs must be above 0, got 0 for both"),
        ({"epochs": 0, "max_iters": 9}, r"lr_epochs and iters_range must be empty without epochs, got \[8.0, 11.0\]"),
        ({"lr_epochs": (11, 8)}, "lr_epochs must be strictly increasing"),
        ({"iters_range": (9, 5)}, "iters_range must be empty or a lowest and a highest number"),
        ({"epochs": 1e300}, r"epochs\n  Input should be less than or equal to 1000000"),
        ({"lr_epochs": (8, 1e300)}, r"lr_epochs\.1\n  Input should be less than or equal to 1000000"),
        ({"iters_range": (1, 10**10)}, r"iters_range\.1\n  Input should be less than or equal to 1000000000"),
        ({"epochs": 0, "lr_epochs": (), "max_iters": 10**10}, r"max_iters\n  Input should be less than or equal to"),
        ({"iters_range": (9,)}, "iters_range must be empty or a lowest and a highest number"),
    ],
)
def test_a_length_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_epochs(**changes)
