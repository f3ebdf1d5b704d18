"""The benchmark of the loader: what it measures and where the figures go; how large they are is not for tests."""

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from components import benchmark
from components.benchmarks import loader, steps
from components.config import BenchmarkConfig, Config
from components.params import save_config
from model.config import DataConfig, TrainConfig


def small_config(folder: Path) -> Config:
    tracking = Config().tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})
    return Config(
        data=DataConfig(workers=0),
        train=TrainConfig(output_dir=folder / "run", device="cpu"),
        benchmark=BenchmarkConfig(loader_images=3, batch_sizes=(2,)),
        tracking=tracking,
    )


def test_the_loader_alone_is_measured_and_reported(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    save_config(small_config(tmp_path), tmp_path / "params.yaml")
    benchmark.main(["loader"])
    report = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert "steps" not in report
    figures = report["loader"]
    assert (figures["images"], figures["source_size"], figures["target_size"]) == (3, [480, 640], [800, 1066])
    assert 80 <= figures["image_kb"] <= 130
    assert {"ours", "pillow", "torchvision"} <= set(figures["image_ms"]) <= {"ours", "pillow", "torchvision", "opencv"}
    assert all(0 < row["decode"] < row["whole"] for row in figures["image_ms"].values())
    assert (figures["batches"]["workers"], figures["batches"]["batch"], figures["batches"]["batches"]) == (0, 2, 2)
    assert figures["batches"]["images_per_s"] > 0
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from latest_metrics").fetchall())
    assert metrics["time/loader_ours_ms"] == figures["image_ms"]["ours"]["whole"]
    assert metrics["throughput/loader_images_per_s"] == figures["batches"]["images_per_s"]
    shown = capsys.readouterr().out
    assert "torchvision" in shown
    assert "images/s" in shown


def test_every_rival_gives_the_same_flipped_image(tmp_path: Path) -> None:
    (path,) = loader._write_images(tmp_path, 1)
    ours, *others = [np.asarray(load(path)) for _, load in loader._rivals().values()]
    assert ours.shape == (800, 1066, 3)
    for other in others:
        pixels = other if other.shape == ours.shape else other.transpose(1, 2, 0)
        assert np.abs(pixels.astype(int) - ours).max() <= 2
    with Image.open(path) as image:
        assert np.abs(np.asarray(image.resize((80, 60))).astype(int).mean() - ours.mean()) < 3


def test_without_the_mode_there_is_no_figure_of_the_loader() -> None:
    assert "loader" not in Config().benchmark.modes
    assert steps.plan(small_config(Path()).model_copy(update={"benchmark": BenchmarkConfig(modes=("loader",))})) == []
