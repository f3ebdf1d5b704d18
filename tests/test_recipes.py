"""Every recipe states differences alone, expands to a complete file, and says what it costs and what it gives."""

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from components.config import Config, flatten
from components.params import parse_config
from components.recipe import recipe_text
from components.runs.recipes import RECIPES, load_recipe, read_header, recipe_names
from model.engine.optim import learning_rate
from model.network.mask_rcnn import MaskRCNN

REPOSITORY = Path(__file__).resolve().parents[1]
NAMES = recipe_names()


def test_a_recipe_is_written_complete_and_reads_back_as_itself():
    for name in NAMES:
        text = recipe_text(name)
        assert list(flatten(YAML(typ="safe").load(text))) == list(Config().flat()), name
        assert parse_config(text) == load_recipe(name), name


def test_no_recipe_states_what_its_base_has():
    for name in NAMES:
        own = YAML(typ="safe").load((RECIPES / f"{name}.yaml").read_text())
        base = load_recipe(own.pop("extends")) if "extends" in own else Config()
        complete, inherited = load_recipe(name).flat(), base.flat()
        assert [key for key in flatten(own) if complete[key] == inherited[key]] == [], name


def test_what_a_recipe_says_of_its_values_is_written_with_them():
    for name in NAMES:
        stated = (RECIPES / f"{name}.yaml").read_text().removeprefix(read_header(name))
        remarks = [line for line in stated.splitlines() if "#" in line]
        assert [line for line in remarks if line not in recipe_text(name).splitlines()] == [], name


def test_a_header_states_command_hardware_time_and_ap_and_their_origin():
    for name in NAMES:
        said = {line[1:].split(":")[0].strip(): line for line in read_header(name).splitlines() if ":" in line}
        assert f"maskrcnn recipe {name}" in said["Command"]
        assert said["Hardware"]
        for figure in ("Time", "AP"):
            assert any(word in said[figure] for word in ("measured", "cited", "computed")), said[figure]


def test_lines_of_recipes_and_of_what_they_write_have_120_columns_at_most():
    for name in NAMES:
        text = (RECIPES / f"{name}.yaml").read_text() + recipe_text(name)
        assert [line for line in text.splitlines() if len(line) > 120] == [], name


def test_each_recipe_has_a_run_and_a_study_of_its_own():
    for name in NAMES:
        config = load_recipe(name)
        folders = config.train.output_dir, config.stability.output_dir
        assert folders == (Path("runs") / name, Path("runs") / f"{name}_stability"), name


def test_the_demo_is_the_default_parameter_file():
    assert (REPOSITORY / "params.yaml").read_text() == recipe_text("shapes_demo"), "maskrcnn recipe shapes_demo"


def test_coco_1x_is_nvidias_default_configuration():
    config = load_recipe("coco2014_r50_fpn_1x")
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
    train = load_recipe(name).train
    assert train.base_lr * train.batch_size / train.lr_batch_size == pytest.approx(learning_rate)
    assert train.max_iters * train.batch_size == images


SOLVER = {
    "model.pool_sampling_ratio", "model.rpn_post_nms_top_n_train", "train.bias_lr_factor", "train.warmup_factor",
    "train.weight_decay_bias",
    "evaluate.target_bbox_ap", "evaluate.target_segm_ap",
}  # fmt: skip
SEVERAL_SCALES = {"data.min_sizes_px", "train.warmup_iters"}
SCHEDULE = {"train.max_iters", "train.lr_steps"}
NO_PYRAMID = {"model.features", "model.rpn_pre_nms_top_n_train", "model.rpn_pre_nms_top_n_test"}
# c4 and c5 keep 2000 proposals while training, as the base does.
C4 = (SOLVER | SEVERAL_SCALES | NO_PYRAMID | {"model.box_head", "model.mask_head_convs", "model.box_pool_size"}) - {
    "model.rpn_post_nms_top_n_train"
}
C5 = (SOLVER | SEVERAL_SCALES | NO_PYRAMID | {"model.res5_dilation"}) - {"model.rpn_post_nms_top_n_train"}
BATCH = {"train.batch_size", "train.lr_batch_size", "train.base_lr"}
V2 = {"model.weights", "model.conventions", "model.head_norm", "model.box_head", "model.rpn_convs"} | {
    "evaluate.target_bbox_ap", "evaluate.target_segm_ap"
}  # fmt: skip
PIXELS = {"model.pixel_order", "model.pixel_mean", "model.pixel_std"}

# Beside train.output_dir, a recipe differs from coco2017_r50_fpn_1x in just these keys.
DIFFERENCES: dict[str, set[str]] = {
    "finetune_small": SCHEDULE
    | {"data.source", "data.raw_dir", "data.prepared_dir", "data.on_invalid", "data.min_sizes_px"}
    | {f"data.augment.{name}" for name in ("brightness", "contrast", "saturation", "hue", "copy_paste")}
    | {"model.weights", "model.conventions", "train.batch_size", "train.base_lr", "train.warmup_iters"}
    | {"train.epochs", "train.lr_epochs", "train.iters_range", "train.patience"}
    | {"train.checkpoint_period", "train.keep_last"}
    | {"evaluate.every_epoch", "evaluate.epoch_period", "evaluate.target_bbox_ap", "evaluate.target_segm_ap"},
    "faster_rcnn_r50_fpn_1x": SOLVER | {"model.task"},
    "mask_rcnn_r50_fpn_1x": SOLVER,
    "mask_rcnn_r101_fpn_1x": SOLVER | {"model.backbone"},
    "mask_rcnn_r50_c4_1x": C4,
    "mask_rcnn_r101_c4_1x": C4 | {"model.backbone"},
    "mask_rcnn_r50_c5_1x": C5,
    "mask_rcnn_r101_c5_1x": C5 | {"model.backbone"},
    "mask_rcnn_r50_fpn_2x": SOLVER | SCHEDULE,
    "mask_rcnn_r50_fpn_gn_2x": SOLVER | SCHEDULE | PIXELS | {"model.norm", "model.box_head", "model.weights"},
    "mask_rcnn_r50_fpn_3x": SOLVER | SEVERAL_SCALES | SCHEDULE,
    "mask_rcnn_r101_fpn_3x": SOLVER | SEVERAL_SCALES | SCHEDULE | {"model.backbone"},
    "mask_rcnn_x101_fpn_3x": SOLVER | SEVERAL_SCALES | SCHEDULE | {"model.backbone"},
    "mask_rcnn_r50_fpn_lsj_100ep": SOLVER
    | SCHEDULE
    | BATCH
    | {"data.scale_jitter", "data.buckets", "model.weights", "model.norm", "model.box_head", "model.freeze_stages"}
    | {"train.dtype", "train.weight_decay"},
    "mask_rcnn_r50_fpn_rsb_1x": SOLVER | {"model.weights", "train.optimizer", "train.base_lr", "train.weight_decay"},
    "mask_rcnn_r50_fpn_v2_finetune": V2
    | SCHEDULE
    | {
        "data.source",
        "data.raw_dir",
        "data.prepared_dir",
        "data.on_invalid",
        "train.batch_size",
        "train.checkpoint_period",
    },
    "mask_rcnn_r50_fpn_v2_lsj_400ep": V2
    | SCHEDULE
    | BATCH
    | {"data.scale_jitter", "data.buckets", "model.norm", "model.freeze_stages"}
    | {"train.weight_decay", "train.weight_decay_bias", "train.weight_decay_norm", "train.bias_lr_factor"}
    | {"train.warmup_iters", "train.warmup_factor"},
    "mask_rcnn_r50_fpn_bs96_fast": SCHEDULE
    | BATCH
    | {"model.rpn_post_nms_top_n_train", "evaluate.every_epoch", "evaluate.target_segm_ap"}
    | {"train.dtype", "train.warmup_factor", "train.warmup_iters", "train.warmup_method"},
    "rpn_r50_fpn_1x": SOLVER | SEVERAL_SCALES | {"model.task", "model.rpn_post_nms_top_n_test"},
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_recipe_differs_from_its_base_where_it_says(name: str):
    base, recipe = (load_recipe(n).flat() for n in ("coco2017_r50_fpn_1x", name))
    assert {key for key in recipe if recipe[key] != base[key]} == DIFFERENCES[name] | {
        "train.output_dir",
        "stability.output_dir",
    }


def test_no_recipe_is_without_a_check_of_its_values():
    checked = {
        "coco2014_r50_fpn_1x",
        "coco2014_r50_fpn_1x_1gpu",
        "coco2014_r50_fpn_1x_bs32",
        "coco2014_r50_fpn_1x_bs64",
    }
    demos = {"shapes_demo", "coco_tiny"}
    assert set(NAMES) == checked | demos | {"coco2017_r50_fpn_1x"} | set(DIFFERENCES)


def test_a_recipe_builds_its_network():
    for name in NAMES:
        with torch.device("meta"):
            model = MaskRCNN(load_recipe(name).model, 80)
        assert sum(parameter.numel() for parameter in model.parameters()) > 10_000_000, name


WARM_UP_FROM_A_THOUSANDTH = {1: 0.00002, 251: 0.02 * (0.001 + 0.999 / 2), 501: 0.02}
WARM_UP_OVER_A_THOUSAND = {1: 0.00002, 501: 0.02 * (0.001 + 0.999 / 2), 1001: 0.02}
ONE_X = {60000: 0.02, 60001: 0.002, 80000: 0.002, 80001: 0.0002, 90000: 0.0002}
TWO_X = {120000: 0.02, 120001: 0.002, 160000: 0.002, 160001: 0.0002, 180000: 0.0002}
THREE_X = {210000: 0.02, 210001: 0.002, 250000: 0.002, 250001: 0.0002, 270000: 0.0002}
SCHEDULES: dict[str, dict[int, float]] = {  # rates at steps; the last one is the end
    "faster_rcnn_r50_fpn_1x": WARM_UP_FROM_A_THOUSANDTH | ONE_X,
    "mask_rcnn_r50_fpn_1x": WARM_UP_FROM_A_THOUSANDTH | ONE_X,
    "mask_rcnn_r101_fpn_1x": WARM_UP_FROM_A_THOUSANDTH | ONE_X,
    "mask_rcnn_r50_c4_1x": WARM_UP_OVER_A_THOUSAND | ONE_X,
    "mask_rcnn_r101_c4_1x": WARM_UP_OVER_A_THOUSAND | ONE_X,
    "mask_rcnn_r50_c5_1x": WARM_UP_OVER_A_THOUSAND | ONE_X,
    "mask_rcnn_r101_c5_1x": WARM_UP_OVER_A_THOUSAND | ONE_X,
    "rpn_r50_fpn_1x": WARM_UP_OVER_A_THOUSAND | ONE_X,
    "mask_rcnn_r50_fpn_2x": WARM_UP_FROM_A_THOUSANDTH | TWO_X,
    "mask_rcnn_r50_fpn_gn_2x": WARM_UP_FROM_A_THOUSANDTH | TWO_X,
    "mask_rcnn_r50_fpn_3x": WARM_UP_OVER_A_THOUSAND | THREE_X,
    "mask_rcnn_r101_fpn_3x": WARM_UP_OVER_A_THOUSAND | THREE_X,
    "mask_rcnn_x101_fpn_3x": WARM_UP_OVER_A_THOUSAND | THREE_X,
    "mask_rcnn_r50_fpn_rsb_1x": {1: 2e-7, 501: 2e-4, 60000: 2e-4, 60001: 2e-5, 80001: 2e-6, 90000: 2e-6},
    "mask_rcnn_r50_fpn_lsj_100ep": {1: 0.0067, 501: 0.1, 163889: 0.1, 163890: 0.01, 177547: 0.001, 184375: 0.001},
    "mask_rcnn_r50_fpn_v2_finetune": {
        1: 0.005 / 3,
        501: 0.005,
        1500: 0.005,
        1501: 0.0005,
        1801: 0.00005,
        2000: 0.00005,
    },
    "mask_rcnn_r50_fpn_v2_lsj_400ep": {step: 5 * rate for step, rate in WARM_UP_OVER_A_THOUSAND.items()}
    | {352 * 1832: 0.1, 352 * 1832 + 1: 0.01, 384 * 1832: 0.01, 384 * 1832 + 1: 0.001, 400 * 1832: 0.001},
    "mask_rcnn_r50_fpn_bs96_fast": {
        1: 0.0,
        2: 0.000192,
        626: 0.12,
        12000: 0.12,
        12001: 0.012,
        16001: 0.0012,
        20000: 0.0012,
    },
    "coco2017_r50_fpn_1x": {1: 0.02 / 3, 501: 0.02} | ONE_X,
    "coco2014_r50_fpn_1x": {1: 0.02 / 3, 501: 0.02} | ONE_X,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_is_the_published_one(name: str):
    train = load_recipe(name).train
    assert {step: learning_rate(train, step) for step in SCHEDULES[name]} == pytest.approx(SCHEDULES[name], abs=1e-12)
    assert train.max_iters == max(SCHEDULES[name])
