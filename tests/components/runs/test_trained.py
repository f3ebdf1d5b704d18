"""A trained model as the stages after training take it up."""

from pathlib import Path

import pytest
import torch

from components.config import Config
from components.runs.trained import load_trained
from model.engine.checkpoint import read_checkpoint
from model.engine.pointers import CheckpointError, last_checkpoint


def test_a_run_and_its_pointer_stand_for_their_checkpoint(trained_run: Config, tmp_path: Path) -> None:
    run_dir = trained_run.train.output_dir
    elsewhere = trained_run.train.model_copy(update={"output_dir": tmp_path})
    for word in ("last", str(run_dir), str(run_dir / "last_checkpoint"), str(last_checkpoint(run_dir))):
        config = trained_run if word == "last" else trained_run.model_copy(update={"train": elsewhere})
        assert load_trained(config, word).loaded.path == last_checkpoint(run_dir), word
    for word in (str(tmp_path), str(run_dir / "best_checkpoint")):
        with pytest.raises(CheckpointError, match=r"no last checkpoint|no such checkpoint"):
            load_trained(trained_run, word)


def test_a_checkpoint_of_an_earlier_version_is_loaded(trained_run: Config, tmp_path: Path) -> None:
    """Early stop was called evaluate.min_bbox_ap and min_segm_ap."""
    newest = last_checkpoint(trained_run.train.output_dir)
    assert newest is not None
    state = read_checkpoint(newest)
    evaluate = state["config"]["evaluate"]
    del evaluate["target_bbox_ap"], evaluate["target_segm_ap"]
    evaluate |= {"min_bbox_ap": 0.377, "min_segm_ap": 0.342}
    torch.save(state, tmp_path / "earlier.pt")
    config = load_trained(trained_run, str(tmp_path / "earlier.pt")).config
    assert (config.evaluate.target_bbox_ap, config.evaluate.target_segm_ap) == (0.377, 0.342)
