"""Finished runs as their folders describe them."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.config import Config
from components.kubeflow.artifacts import describe_evaluation
from components.params import load_config, save_config
from components.runs.files import read_run
from components.runs.result import (
    ResultError,
    final_checkpoint,
    read_evaluation,
    read_result,
    require_as_trained,
    require_final,
)
from components.tracking.scores import read_scored
from model.config import TrainConfig
from model.engine.pointers import BEST, NO_BEST


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Early stop was called evaluate.min_bbox_ap; a run that it ended may have ended before train.max_iters."""
    (tmp_path / "config.yaml").write_text("train:\n  seed: 3\nevaluate:\n  every_epoch: true\n  min_bbox_ap: 0.377\n")
    scores = {"bbox": {"AP": 0.378}, "checkpoint": "checkpoints/step_0000008.pt", "images": 4, "data_hash": "da"}
    (tmp_path / "evaluation.json").write_text(json.dumps(scores))
    result = read_result(tmp_path)
    assert (result.seed, result.data) == (3, ("da", None))
    assert result.config.evaluate.target_bbox_ap == 0.377
    require_final(result)
    for key in ("checkpoint", "images", "data_hash"):
        (tmp_path / "evaluation.json").write_text(json.dumps({name: scores[name] for name in scores if name != key}))
        with pytest.raises(ResultError, match=f"{key} is missing"):
            read_result(tmp_path)


def test_a_runs_own_training_says_which_checkpoint_is_its_result(tmp_path: Path) -> None:
    patient, impatient = TrainConfig(patience=3), TrainConfig()
    assert [final_checkpoint(tmp_path, train) for train in (patient, impatient)] == ["last", "last"], "none is the best"
    for best, of_run, expected in (
        ("checkpoints/step_0000003.pt\n", "patience: 3", "best"),
        ("checkpoints/step_0000003.pt\n", "patience: 0", "last"),
        (NO_BEST, "patience: 3", "last"),
    ):
        (tmp_path / BEST).write_text(best)
        (tmp_path / "config.yaml").write_text(f"train:\n  {of_run}\nevaluate:\n  every_epoch: true\n")
        assert [final_checkpoint(tmp_path, train) for train in (patient, impatient)] == [expected] * 2


@pytest.mark.parametrize("stage", ["evaluate", "export", "predict"])
def test_overrides_of_what_is_trained_are_refused(
    trained_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    train = trained_run.train.model_copy(update={"output_dir": tmp_path / "run"})
    config = trained_run.model_copy(update={"train": train})
    shutil.copytree(trained_run.train.output_dir, train.output_dir)
    for path in (train.output_dir / "config.yaml", tmp_path / "params.yaml"):
        save_config(config, path)
    refused = {
        "model.detections_per_image=7": 20,
        "data.eval_min_size_px=64": 96,
        "train.dtype=bfloat16": '"float32"',
        "data.augment={hue: 0.1}": 0.0,
    }
    for override, trained in refused.items():
        with pytest.raises(SystemExit) as end:
            importlib.import_module(f"components.{stage}").main(["--params", str(tmp_path / "params.yaml"), override])
        said = capsys.readouterr().err
        expected = f"override {override!r}: must be as {train.output_dir}/checkpoints/step_0000007.pt was trained"
        key = override.split("=")[0] + ".hue" * ("hue" in override)
        hint = ", and choose other data by data.prepared_dir" if key.startswith("data.") else ""
        assert (end.value.code, said) == (2, f"error: {expected}, with {key} {trained}; leave it out{hint}\n")
    same = ["model.detections_per_image=20", "train.max_iters=9", "data.workers=1", "evaluate.flip=true"]
    require_as_trained(load_config(tmp_path / "params.yaml", same), None, same)
    (train.output_dir / "config.yaml").unlink()
    other = ["model.detections_per_image=7"]
    require_as_trained(load_config(tmp_path / "params.yaml", other), "last", other)


def test_a_damaged_file_is_told_with_the_command_that_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    for content in (b"", b'{"bbox"', b"[]", b"null", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ResultError, match=r"evaluation\.json: .*; `maskrcnn evaluate` writes it anew"):
            read_evaluation(tmp_path)


def test_every_reader_of_an_evaluation_refuses_it_with_the_same_error(tmp_path: Path) -> None:
    config = Config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": tmp_path})})
    save_config(config, tmp_path / "config.yaml")
    page = SimpleNamespace(path=str(tmp_path / "page.html"), metadata={})

    def describe(run_dir: Path) -> None:
        describe_evaluation(page, page, config)

    readers: list[Callable[[Path], object]] = [read_result, read_scored, describe, read_run]
    keys = {"checkpoint": "step_1.pt", "data_hash": "da", "images": 1, "detections": 0, "commit": None}
    path = tmp_path / "evaluation.json"
    for content, told, count in (
        (None, "no such file; a finished run has it", 3),  # a report shows the rest of the run
        ("[]", "must hold an object, got list", 4),
        ("{", "not JSON", 4),
        (json.dumps(keys | {"segm": 3}), "segm: Input should be a valid dictionary, got 3", 4),
        (json.dumps(keys | {"bbox": None}), "must have AP, got none", 2),  # pages show that there is none
        ("{}", "is missing; `maskrcnn evaluate` writes it anew", 4),
    ):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        for reader in readers[:count]:
            with pytest.raises(ResultError) as error:
                reader(tmp_path)
            assert str(error.value).startswith(f"{path}: ")
            assert told in str(error.value)
