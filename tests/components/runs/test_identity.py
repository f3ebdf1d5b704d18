"""What decides a result, and what sets two runs apart."""

from pathlib import Path
from typing import Any

from components.config import Config
from components.runs.identity import (
    _DECIDING,
    _NOT_DECIDING,
    changes_since_checkpoint,
    description,
    differences,
    differences_beside_seed,
    differences_of_descriptions,
    identity,
)
from model.config import AugmentConfig


def test_keys_that_decide_nothing_exist() -> None:
    assert set(Config().flat()) >= _NOT_DECIDING
    assert all(key.startswith(_DECIDING) for key in _NOT_DECIDING)


def with_values(section: str, **values: Any) -> Config:
    config = Config()
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def test_what_decides_a_result_has_its_seed_and_not_its_place() -> None:
    decides = identity(Config())
    assert {"train.seed", "train.base_lr", "model.nms_iou", "data.shapes.seed", "evaluate.split"} <= set(decides)
    assert not {"train.output_dir", "train.device", "data.workers", "predict.images"} & set(decides)
    assert set(description(Config())) == set(decides) - {"train.seed"} | {
        f"train.{key}" for key in ("compile", "cuda_graph", "device", "processes")
    }


def test_differences_are_of_values_and_of_absence() -> None:
    assert differences([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}]) == {"b": [2, 3, None]}
    assert differences([{"a": 1}]) == {}


def test_a_description_of_an_earlier_version_lacks_only_what_had_its_default() -> None:
    now = description(with_values("model", nms_iou=0.4))
    earlier = {key: value for key, value in description(Config()).items() if key != "model.rpn_nms_iou"}
    assert differences_of_descriptions([earlier, now]) == {"model.nms_iou": [0.5, 0.4]}
    earlier["evaluate.min_bbox_ap"] = earlier.pop("evaluate.target_bbox_ap")
    assert differences_of_descriptions([earlier, now]) == {"model.nms_iou": [0.5, 0.4]}


def test_runs_of_one_study_may_differ_in_the_seed_alone() -> None:
    assert differences_beside_seed(Config(), with_values("train", seed=3, device="cpu")) == []
    found = differences_beside_seed(Config(), with_values("train", lr_steps=(1, 2)))
    assert found == ["train.lr_steps ([60000, 80000] and [1, 2])"]


def test_a_checkpoint_is_continued_where_nothing_that_it_learned_from_has_changed() -> None:
    state = {"config": Config().model_dump(mode="json"), "data_hash": "da"}
    free = with_values("train", max_iters=90001, device="cpu", output_dir=Path("elsewhere"))
    assert changes_since_checkpoint(state, free, "da") == []
    assert changes_since_checkpoint(state, with_values("evaluate", batch_size=1), "da") == []
    assert changes_since_checkpoint(state, with_values("data", workers=9), "da") == []
    for section, key, value, change in (
        ("train", "seed", 1, "train.seed: 0 → 1"),
        ("model", "nms_iou", 0.4, "model.nms_iou: 0.5 → 0.4"),
        ("data", "horizontal_flip", 0.1, "data.horizontal_flip: 0.5 → 0.1"),
        ("data", "keep_empty_images", True, "data.keep_empty_images: false → true"),
        ("data", "augment", AugmentConfig(hue=0.1), "data.augment.hue: 0.0 → 0.1"),
    ):
        assert changes_since_checkpoint(state, with_values(section, **{key: value}), "da") == [change]
    assert changes_since_checkpoint(state, Config(), "other") == ["other training data"]
    del state["config"]["data"]["augment"]  # an earlier version's
    assert changes_since_checkpoint(state, Config(), "da") == []


def test_a_cosine_of_another_length_is_another_run() -> None:
    """Its rates depend on max_iters from the first step on."""
    state = {"config": with_values("train", schedule="cosine").model_dump(mode="json"), "data_hash": "da"}
    assert changes_since_checkpoint(state, with_values("train", schedule="cosine", log_period=7), "da") == []
    longer = with_values("train", schedule="cosine", max_iters=90001)
    assert changes_since_checkpoint(state, longer, "da") == ["train.max_iters: 90000 → 90001"]


def test_epochs_decide_where_the_recipe_bounds_the_steps() -> None:
    """With iters_range, the rates' steps follow from the epochs; other keys of no effect stay free."""
    epochs = {"epochs": 12.0, "lr_epochs": (8.0, 11.0), "iters_range": (100, 900)}
    state = {"config": with_values("train", **epochs).model_dump(mode="json"), "data_hash": "da"}
    assert changes_since_checkpoint(state, with_values("train", **epochs, log_period=7), "da") == []
    longer = with_values("train", **{**epochs, "epochs": 13.0})
    assert changes_since_checkpoint(state, longer, "da") == ["train.epochs: 12.0 → 13.0"]
