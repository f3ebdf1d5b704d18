"""Every recipe is complete, loads, and says what it costs and what it gives."""

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from components.config import Config, load_config

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)


def keys(tree: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in tree.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


@by_name
def test_a_recipe_loads_and_gives_every_key(recipe: Path):
    load_config(recipe)
    assert keys(YAML(typ="safe").load(recipe.read_text())) == set(Config().flat())


@by_name
def test_a_header_states_command_hardware_time_and_ap_and_their_origin(recipe: Path):
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    said = {line[1:].split(":")[0].strip(): line for line in header if ":" in line}
    assert f"maskrcnn recipe {recipe.stem}" in said["Command"]
    assert said["Hardware"]
    for figure in ("Time", "AP"):
        assert any(word in said[figure] for word in ("measured", "cited", "computed")), said[figure]


@by_name
def test_each_recipe_has_a_run_of_its_own(recipe: Path):
    assert load_config(recipe).train.output_dir == Path("runs") / recipe.stem


def test_the_demo_is_the_default_parameter_file():
    assert (REPOSITORY / "params.yaml").read_text() == (REPOSITORY / "recipes" / "shapes_demo.yaml").read_text()


def test_coco_1x_is_the_seeds_default_configuration():
    config = load_config(REPOSITORY / "recipes" / "coco2014_r50_fpn_1x.yaml")
    train, model, data = config.train, config.model, config.data
    assert (train.max_iters, train.batch_size, train.base_lr, train.lr_steps) == (90000, 16, 0.02, (60000, 80000))
    assert (train.warmup_iters, train.warmup_factor, train.warmup_method) == (500, pytest.approx(1 / 3), "linear")
    assert (train.momentum, train.weight_decay, train.weight_decay_bias, train.bias_lr_factor) == (0.9, 1e-4, 0.0, 2.0)
    assert (train.lr_gamma, train.checkpoint_period, config.evaluate.batch_size) == (0.1, 2500, 8)
    assert (model.backbone, model.freeze_stages, model.fpn_channels) == ("resnet50", 2, 256)
    assert (model.anchor_sizes_px, model.aspect_ratios) == ((32, 64, 128, 256, 512), (0.5, 1.0, 2.0))
    assert (model.rpn_fg_iou, model.rpn_bg_iou, model.rpn_batch_size, model.rpn_positive_fraction) == (
        0.7,
        0.3,
        256,
        0.5,
    )
    assert (model.rpn_pre_nms_top_n_train, model.rpn_pre_nms_top_n_test, model.rpn_nms_iou) == (2000, 1000, 0.7)
    assert (model.rpn_post_nms_top_n_train, model.rpn_post_nms_top_n_test) == (2000, 1000)
    assert (model.roi_fg_iou, model.roi_bg_iou, model.roi_batch_size, model.roi_positive_fraction) == (
        0.5,
        0.5,
        512,
        0.25,
    )
    assert (model.box_reg_weights, model.box_head_channels, model.box_pool_size) == ((10, 10, 5, 5), 1024, 7)
    assert (model.mask_pool_size, model.mask_head_channels, model.mask_head_convs) == (14, 256, 4)
    assert (model.pool_sampling_ratio, model.score_threshold, model.nms_iou, model.detections_per_image) == (
        2,
        0.05,
        0.5,
        100,
    )
    assert (data.min_sizes_px, data.max_size_px, data.eval_min_size_px, data.eval_max_size_px) == (
        (800,),
        1333,
        800,
        1333,
    )


@pytest.mark.parametrize(
    ("name", "learning_rate", "images"),
    [
        ("coco2014_r50_fpn_1x", 0.02, 1_440_000),
        ("coco2014_r50_fpn_1x_1gpu", 0.005, 1_440_000),
        ("coco2014_r50_fpn_1x_bs32", 0.04, 1_600_000),
        ("coco2014_r50_fpn_1x_bs64", 0.08, 1_760_000),
        ("coco2017_r50_fpn_1x", 0.02, 1_440_000),
    ],
)
def test_learning_rate_follows_the_batch_and_all_see_as_many_images(name: str, learning_rate: float, images: int):
    train = load_config(REPOSITORY / "recipes" / f"{name}.yaml").train
    assert train.base_lr * train.batch_size / train.lr_batch_size == pytest.approx(learning_rate)
    assert train.max_iters * train.batch_size == images
