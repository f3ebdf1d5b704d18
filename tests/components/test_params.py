"""The parameter file: what is read, what is refused, and how the refusal is worded."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.config import Config
from components.params import ConfigError, config_from_dict, load_config, load_stored, read_flat, save_config
from model.errors import UserError


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("train:\n  base_lr: 0.01\ndata:\n  shapes:\n    seed: 3\n")
    return path


def test_absent_values_take_their_defaults(params: Path):
    config = load_config(params)
    assert config.train.base_lr == 0.01
    assert config.data.shapes.seed == 3
    assert config.train.max_iters == 90000


def test_an_empty_file_is_all_defaults(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "params.yaml") == Config()


def test_an_empty_file_of_a_run_is_damaged(tmp_path: Path):
    path = tmp_path / "config.yaml"
    for content in ("", "# nothing\n", "{}"):
        path.write_text(content)
        for read in (load_stored, read_flat):
            with pytest.raises(ConfigError, match=r"config\.yaml: must hold the configuration of a run, but is empty"):
                read(path)


def test_overrides_reach_every_depth(params: Path):
    config = load_config(
        params, ["data.shapes.seed=7", "train.lr_steps=[10, 20]", "model.weights=none", "evaluate.every_epoch=true"]
    )
    assert config.data.shapes.seed == 7
    assert config.train.lr_steps == (10, 20)
    assert config.model.weights == "none"
    assert config.evaluate.every_epoch is True


def test_the_last_override_of_a_key_stands(params: Path):
    assert load_config(params, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_empty_value_is_the_empty_text(params: Path):
    assert load_config(params, ["data.train_images=a", "data.train_images="]).data.train_images == ""


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.max_iter=3", "did you mean train.max_iters?"),
        ("trian.base_lr=1", "did you mean train?"),
        ("train.nms_iou=1", "did you mean model.nms_iou?"),
        ("data.shapes.sead=1", "did you mean data.shapes.seed?"),
        ("evaluate.min_bbox_ap=0.377", "did you mean evaluate.target_bbox_ap?"),
        ("evaluate.min_segm_ap=0.342", "did you mean evaluate.target_segm_ap?"),
        ("predict.qqq=1", "known: predict.score_threshold, predict.classes, "),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest(params: Path, override: str, reason: str):
    with pytest.raises(ConfigError, match="unknown key") as error:
        load_config(params, [override])
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.base_lr=-1", "override 'train.base_lr=-1': train.base_lr: Input"),
        ("train.base_lr={a: 1}", "override 'train.base_lr={a: 1}': train.base_lr: Input"),
        ("train.lr_steps=[1, a]", "override 'train.lr_steps=[1, a]': train.lr_steps.1: Input"),
        ("trian.seed=1", "{params} with trian.seed=1: trian: unknown key"),
        ("train.accumulation_steps=3", "{params} with train.base_lr=1 train.accumulation_steps=3: train: batch_size"),
        ("train.seed=2", "{params}: data.shapes.seed: Input"),  # this override is right
    ],
)
def test_an_error_names_the_override_or_the_file_that_it_comes_from(params: Path, override: str, reason: str):
    params.write_text("train:\n  base_lr: 0.01\n" + ("data: {shapes: {seed: one}}" if "seed=2" in override else ""))
    with pytest.raises(ConfigError) as error:
        load_config(params, ["train.base_lr=1", "model.task=box", override])
    assert str(error.value).startswith(reason.replace("{params}", str(params)))


def test_text_that_looks_like_a_time_stays_as_it_was_written(params: Path):
    time = "2026-11-28T10:00:00+01:00"
    params.write_text(f"tracking:\n  run_name: {time}\n  experiment: 2026-11-28\n")
    assert load_config(params).tracking.run_name == time
    assert load_config(params).tracking.experiment == "2026-11-28"
    assert load_config(params, [f"tracking.experiment={time}"]).tracking.experiment == time


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.base_lr=-1", "train.base_lr: Input should be greater than 0, got -1"),
        ("train.base_lr=.inf", "train.base_lr: Input should be a finite number, got inf"),
        ("train.weight_decay=1e999", "train.weight_decay: Input should be a finite number, got inf"),
        ("model.pixel_mean=[0, .nan, 0]", "model.pixel_mean.1: Input should be a finite number, got nan"),
        ("tracking.system_metrics_s=.inf", "tracking.system_metrics_s: Input should be a finite number, got inf"),
        (f"train.seed={2**63}", f"train.seed: Input should be less than {2**63}"),
        ("train.output_dir=", 'train.output_dir: must name a folder, got ""; the current one is "."'),
        ("data.raw_dir=", "data.raw_dir: must name a folder"),
        ("cluster.image=A B", "cluster.image: String should match pattern"),
        ("cluster.node_selector=[a b=c]", "cluster.node_selector.0: String should match pattern"),
        ("cluster.tolerations=['a b:NoSchedule']", "cluster.tolerations.0: String should match pattern"),
        ("train.max_iters=many", "got 'many'"),
        ("train.max_iters=1.5", "got 1.5"),
        ("train.base_lr='0.1'", "got '0.1'"),
        ("data.source=coco2015", "'shapes', 'coco2014', 'coco2017' or 'custom'"),
        ("data.buckets=[[100, 128]]", "multiples of 32"),
        ("data.buckets=[[96, 128]]", "buckets must hold a resized image of 800 × 1333 (height × width"),
        ("train.accumulation_steps=3", "batch_size must be a multiple of accumulation_steps, got 16 and 3"),
        ("train.epochs=12", "train: max_iters must be 0 and lr_steps [] with epochs"),
        (
            "train.patience=3",
            "params.yaml: train.patience must be 0 without evaluate.every_epoch, whose scores it needs, got 3",
        ),
        ("train.lr_steps=[20, 10]", "lr_steps must be strictly increasing, got [20, 10]"),
        ("model.rpn_bg_iou=0.8", "rpn_bg_iou must be at most rpn_fg_iou, got 0.8 > 0.7"),
        ("model.anchor_sizes_px=[8, 16]", "one size for each of the 5 levels"),
    ],
)
def test_a_wrong_value_is_reported_with_what_it_must_be(params: Path, override: str, reason: str):
    with pytest.raises(ConfigError) as error:
        load_config(params, [override])
    assert reason in str(error.value)


def test_all_faults_are_reported_at_once(params: Path):
    with pytest.raises(ConfigError) as error:
        load_config(params, ["train.base_lr=-1", "model.nms_iou=2"])
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("override", ["base_lr=1", "train.base_lr", "=1", "train.=1", ".base_lr=1"])
def test_an_override_must_be_section_key_value(params: Path, override: str):
    with pytest.raises(ConfigError, match=r"must be section\.key=value"):
        load_config(params, [override])


def test_an_override_below_a_value_is_refused(params: Path):
    with pytest.raises(ConfigError, match="base_lr is a value, not a section"):
        load_config(params, ["train.base_lr.x=1"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1\n", "got a list"),
        ("a: [1\n", "not YAML"),
        ("a: 1\na: 2\n", "not YAML"),
        ("a: " + "[" * 2000, "not YAML"),
        ("[a]: 1\n", "must hold sections of keys"),
        ("train:\n  [seed]: 1\n", "must hold sections of keys"),
        ("train: &a\n  seed: *a\n", "must hold sections of keys"),
    ],
)
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path: Path, text: str, reason: str):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_config(tmp_path / "params.yaml")


def test_an_override_of_yaml_that_is_no_value_is_refused(params: Path):
    for value in ("&a [*a]", "{[a]: 1}", "[" * 2000):
        with pytest.raises(ConfigError, match=r"train\.lr_steps="):
            load_config(params, [f"train.lr_steps={value}"])


def test_a_recipe_that_extends_another_is_no_parameter_file(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("extends: shapes_demo\ntrain:\n  seed: 1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: extends: only recipes have it; `maskrcnn recipe NAME` writes"):
        load_config(tmp_path / "mine.yaml")


def test_an_absent_file_is_reported_with_the_way_out(tmp_path: Path):
    with pytest.raises(ConfigError, match="maskrcnn recipe shapes_demo"):
        load_config(tmp_path / "params.yaml")


def test_configuration_errors_are_the_users():
    assert issubclass(ConfigError, UserError)


def test_saved_configuration_is_read_back_equal(params: Path, tmp_path: Path):
    config = load_config(params, ["data.train_images=ünïcode dir", "train.lr_steps=[]", "tracking.run_name='yes'"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_plain_data_of_a_checkpoint_is_read_back_equal(params: Path):
    config = load_config(params)
    assert config_from_dict(config.model_dump(mode="json"), "step_1.pt") == config


def test_what_an_earlier_version_stored_is_read_by_its_present_names(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("evaluate:\n  min_bbox_ap: 0.377\n  min_segm_ap: 0.342\nregistry:\n  min_bbox_ap: 0.3\n")
    tree = {"evaluate": {"min_bbox_ap": 0.377, "min_segm_ap": 0.342}, "registry": {"min_bbox_ap": 0.3}}
    for config in (load_stored(path), config_from_dict(tree, "step_1.pt")):
        assert (config.evaluate.target_bbox_ap, config.evaluate.target_segm_ap) == (0.377, 0.342)
        assert config.registry.min_bbox_ap == 0.3
    assert read_flat(path) == {
        "evaluate.target_bbox_ap": 0.377,
        "evaluate.target_segm_ap": 0.342,
        "registry.min_bbox_ap": 0.3,
    }
    with pytest.raises(ConfigError, match=r"evaluate\.min_bbox_ap: unknown key"):
        load_config(path)


def test_plain_data_that_does_not_fit_names_its_place():
    with pytest.raises(ConfigError, match=r"step_1\.pt: train\.base_lrr: unknown key"):
        config_from_dict({"train": {"base_lrr": 1}}, "step_1.pt")


@settings(max_examples=40, deadline=None)
@given(
    base_lr=st.floats(1e-12, 1e6),
    steps=st.lists(st.integers(1, 10**6), unique=True).map(sorted),
    name=st.text("a1 :#-'\"é", max_size=6),
)
def test_any_value_survives_saving(
    tmp_path_factory: pytest.TempPathFactory, base_lr: float, steps: list[int], name: str
):
    tree = {"train": {"base_lr": base_lr, "lr_steps": steps}, "tracking": {"run_name": name}}
    config = config_from_dict(tree, "test")
    path = tmp_path_factory.mktemp("config") / "params.yaml"
    save_config(config, path)
    assert load_config(path) == config


def test_saving_replaces_the_file_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.yaml"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_config(Config(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
