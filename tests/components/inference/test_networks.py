"""Networks by the words of `--weights`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.config import Config
from components.inference.networks import Network, load_network, require_network
from components.params import build_config, save_config
from model.engine.checkpoint import CheckpointError, read_checkpoint
from model.engine.pointers import last_checkpoint
from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN

STEM = "backbone.body.conv1.weight"


@pytest.fixture
def checkpoint(trained_run: Config) -> Path:
    path = last_checkpoint(trained_run.train.output_dir)
    assert path is not None
    return path


def stem(word: str) -> torch.Tensor:
    return load_network(build_config({}), word).trained.loaded.model.state_dict()[STEM]


def test_a_checkpoint_its_run_and_its_weights_alone_are_one_network(checkpoint: Path, tmp_path: Path) -> None:
    """Without a parameter file, wherever the checkpoint lies."""
    state = read_checkpoint(checkpoint)
    torch.save(state["model"], tmp_path / "weights.pth")
    shutil.copy(checkpoint, tmp_path / "alone.pt")
    run = checkpoint.parents[1]
    paths = (tmp_path / "alone.pt", run, run / "last_checkpoint", tmp_path / "weights.pth")
    words = [str(path) for path in paths]
    for word in words:
        assert torch.equal(stem(word), state["model"][STEM]), word
    trained = load_network(build_config({}), words[0]).trained
    assert trained.loaded.class_names == tuple(state["class_names"])
    assert trained.config.data.eval_min_size_px == state["config"]["data"]["eval_min_size_px"]


def test_of_a_run_with_patience_the_best_checkpoint_is_used(checkpoint: Path, tmp_path: Path) -> None:
    state = read_checkpoint(checkpoint)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name, value in (("step_0000001.pt", 1.0), ("step_0000002.pt", 2.0)):
        torch.save(
            state | {"model": state["model"] | {STEM: torch.full_like(state["model"][STEM], value)}},
            run / "checkpoints" / name,
        )
    (run / "last_checkpoint").write_text("checkpoints/step_0000002.pt\n")
    (run / "best_checkpoint").write_text("checkpoints/step_0000001.pt\n")
    assert stem(str(run)).unique().item() == 2
    save_config(build_config({"train": {"patience": 3}, "evaluate": {"every_epoch": True}}), run / "config.yaml")
    assert stem(str(run)).unique().item() == 1


def test_what_names_no_network_is_refused_before_torch_is_needed(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"weights: must be coco or coco_v2, a file .*got coco_v3, which does not exist"
    ):
        require_network("coco_v3")
    with pytest.raises(CheckpointError, match="has no last checkpoint"):
        require_network(str(tmp_path))
    (tmp_path / "last_checkpoint").write_text("checkpoints/step_0000009.pt\n")
    with pytest.raises(
        CheckpointError, match=r"last_checkpoint: must name a checkpoint .*step_0000009\.pt, which does"
    ):
        require_network(str(tmp_path / "last_checkpoint"))
    for word in ("coco", "coco_v2", "models:/maskrcnn@champion", __file__):
        require_network(word)


def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(UserError, match=r"notes\.txt: must hold weights that load safely"):
        load_network(build_config({}), str(tmp_path / "notes.txt"))
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut\.pt: must hold weights that load safely"):
        load_network(build_config({}), str(tmp_path / "cut.pt"))


def test_names_of_classes_may_be_given_to_weights_without(checkpoint: Path, tmp_path: Path) -> None:
    state = read_checkpoint(checkpoint)
    torch.save(state["model"], tmp_path / "weights.pth")
    names = [f"kind {number}" for number in range(len(state["class_names"]))]
    loaded = load_network(build_config({}), str(tmp_path / "weights.pth"), names).trained.loaded
    assert loaded.class_names == tuple(names)
    assert isinstance(loaded.model, MaskRCNN)
    assert load_network(build_config({}), str(checkpoint), state["class_names"]).trained.loaded.category_ids
    with pytest.raises(UserError, match=r"class_names: must be left out, as .*\.pt has names of its own: "):
        load_network(build_config({}), str(checkpoint), names)


def analysed(checkpoint: Path, folder: Path, per_class: dict[str, float | None]) -> Path:
    """A run of this checkpoint, which `evaluate` has scored."""
    shutil.copytree(checkpoint.parents[1], folder)
    points = {
        name: {"threshold": value, "precision": 1.0, "recall": 1.0, "f1": 1.0} for name, value in per_class.items()
    }
    best = {"all": points["all"], "per_class": {name: point for name, point in points.items() if name != "all"}}
    document = {"checkpoint": f"checkpoints/{checkpoint.name}", "data_hash": "", "best": best}
    (folder / "analysis.json").write_text(json.dumps(document))
    return folder


def test_the_best_threshold_is_that_of_each_class(checkpoint: Path, tmp_path: Path) -> None:
    first, second, *others = read_checkpoint(checkpoint)["class_names"]
    run = analysed(checkpoint, tmp_path / "run", {"all": 0.4, first: 0.25, second: None})
    for word in (str(run), str(run / "checkpoints" / checkpoint.name)):
        lowest = load_network(build_config({}), word).lowest_scores("best")
        assert lowest == {first: 0.25, second: 0.4} | dict.fromkeys(others, 0.4)
        assert load_network(build_config({}), word).lowest_scores("best", [second]) == {second: 0.4}
    assert load_network(build_config({}), str(run)).lowest_scores(0.7, [first]) == {first: 0.7}


def test_a_best_threshold_that_nobody_has_found_is_an_error_that_says_what_to_run(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parents[1], run, ignore=shutil.ignore_patterns("analysis.json"))
    with pytest.raises(UserError, match=r"analysis\.json: must have the best thresholds .*run `maskrcnn evaluate"):
        load_network(build_config({}), str(run)).lowest_scores("best")
    trained = load_network(build_config({}), str(run)).trained
    version = Network(replace(trained, name="models:/maskrcnn/1"), is_checkpoint=False)
    with pytest.raises(
        UserError, match=r"models:/maskrcnn/1 was registered before .*give a number, or evaluate its run"
    ):
        version.lowest_scores("best")
    torch.save(read_checkpoint(checkpoint)["model"], tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--threshold best: must be used with a checkpoint .*got .*weights\.pth"):
        load_network(build_config({}), str(tmp_path / "weights.pth")).lowest_scores("best")
