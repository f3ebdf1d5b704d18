"""A disk that hangs: each stage that reads images in its own process ends with an error that names the file."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from components import evaluate, predict, prepare
from components.config import Config
from components.evaluation.before_after import detect_before
from components.evaluation.detect import Results
from components.evaluation.files import write_plots
from components.inference.programs import sample
from components.runs.trained import load_trained, open_split
from model.files import SlowFileError
from model.inference.predictor import Predictor
from model.scoring.coco import load_ground_truth


def test_an_image_that_cannot_be_read_in_time_is_an_error_that_names_it_in_every_stage(
    trained_run: Config, tmp_path: Path, leased: Callable[[Path], AbstractContextManager[None]]
) -> None:
    data = trained_run.data.model_copy(update={"timeout_s": 0.2})
    config = trained_run.model_copy(update={"data": data})
    checkpoint = load_trained(config, "last")
    index = open_split(checkpoint, "val")
    coco = load_ground_truth(index.ground_truth_path)
    bucket = data.buckets[index.size(0)[0] > index.size(0)[1]]
    elsewhere = data.model_copy(update={"prepared_dir": tmp_path / "prepared"})
    stages: list[Callable[[], object]] = [
        lambda: evaluate.run(config),
        lambda: write_plots(tmp_path, Results([], [], [], "box"), None, index, coco, len(index)),
        lambda: detect_before(Predictor.of(checkpoint.loaded), index),
        lambda: sample(index, data, bucket),
        lambda: predict.run(config, [index.image_path(0)], output=tmp_path / "out"),
        lambda: prepare.run(config.model_copy(update={"data": elsewhere})),
    ]
    message = rf"{re.escape(str(index.image_path(0)))}: could not be read within 0\.2 s: .* raise data\.timeout_s"
    with leased(index.image_path(0)):
        for stage in stages:
            with pytest.raises(SlowFileError, match=message):
                stage()
    assert not (tmp_path / "prepared").exists()
    assert not (config.train.output_dir / ".lock").exists()
