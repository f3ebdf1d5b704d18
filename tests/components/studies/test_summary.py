"""The summary of a study: its numbers against scipy's and by hand, its files, and what it refuses to put together."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy import stats

from components.params import load_config, save_config
from components.runs.result import ResultError
from components.studies.intervals import estimate
from components.studies.result import StabilityError
from components.studies.summary import summarise
from model.scoring.names import SCORE_NAMES

TINY = Path(__file__).parents[1] / "tiny.yaml"
AP = {1: 0.70, 2: 0.72, 3: 0.74}


def scores(ap: float) -> dict[str, float | None]:
    return {**dict.fromkeys(SCORE_NAMES, ap), "APl": None}  # no large object in the ground truth


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A finished run's folder without its weights: what `maskrcnn train` and `evaluate` leave for others to read."""

    def make(seed: int, ap: float = 0.7, *overrides: str, name: str = "", **evaluation: Any) -> Path:
        run_dir = tmp_path / (name or f"seed_{seed}")
        run_dir.mkdir()
        config = load_config(TINY, [f"train.seed={seed}", f"train.output_dir={run_dir}", *overrides])
        save_config(config, run_dir / "config.yaml")
        report = {
            "bbox": scores(ap),
            "segm": scores(ap / 2),
            "images": 4,
            "checkpoint": "checkpoints/step_0000008.pt",
            "data_hash": "da",
            "train_data_hash": "7a",
            "commit": "c" * 40,
            **evaluation,
        }
        (run_dir / "evaluation.json").write_text(json.dumps(report))
        return run_dir

    return make


@pytest.fixture
def study(make_run: Callable[..., Path]) -> list[Path]:
    return [make_run(seed, ap) for seed, ap in AP.items()]


def test_mean_deviation_and_interval_are_students(study: list[Path], tmp_path: Path) -> None:
    report = summarise(study, tmp_path / "out").report
    score = report["bbox"]["AP"]
    assert score["values"] == list(AP.values())
    assert score["mean"] == pytest.approx(0.72)
    assert score["deviation"] == pytest.approx(0.02)  # of the sample: √((0.02² + 0 + 0.02²) / 2)
    # 4.3027: the 97.5 % point of Student's t of 2 degrees of freedom, from any table.
    assert score["interval"] == pytest.approx([0.72 - 4.3027 * 0.02 / 3**0.5, 0.72 + 4.3027 * 0.02 / 3**0.5], abs=1e-5)
    assert report["segm"]["AP"]["mean"] == pytest.approx(0.36)


def test_the_interval_is_scipys() -> None:
    values = [0.377, 0.376, 0.376, 0.378, 0.377]  # box AP of NVIDIA's five seeds
    oracle = stats.t.interval(0.95, 4, loc=stats.tmean(values), scale=stats.sem(values))
    assert estimate(values).interval == pytest.approx(oracle)
    assert estimate(values).deviation == pytest.approx(stats.tstd(values))


def test_one_run_has_no_deviation(make_run: Callable[..., Path], tmp_path: Path) -> None:
    result = summarise([make_run(1)], tmp_path / "out")
    score = result.report["bbox"]["AP"]
    assert (score["mean"], score["deviation"], score["interval"]) == (0.7, None, None)
    note = (tmp_path / "out" / "stability.md").read_text()
    assert "| final AP box | 0.700 | 0.700 | – | – |" in note
    assert "set at least two in stability.seeds" in note


def test_a_score_of_nothing_to_find_has_no_mean(study: list[Path], tmp_path: Path) -> None:
    score = summarise(study, tmp_path / "out").report["bbox"]["APl"]
    assert score == {"values": [None, None, None], "mean": None, "deviation": None, "interval": None}


def test_a_network_without_masks_has_a_table_of_boxes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    report = summarise([make_run(1, segm=None), make_run(2, 0.8, segm=None)], tmp_path / "out").report
    assert "segm" not in report
    assert "mask" not in (tmp_path / "out" / "stability.md").read_text()


def test_files_hold_the_same_numbers(study: list[Path], tmp_path: Path) -> None:
    result = summarise(study[::-1], tmp_path / "out")  # whatever the order they are named in
    assert json.loads(result.path.read_text()) == json.loads(json.dumps(result.report))
    markdown = (tmp_path / "out" / "stability.md").read_text().splitlines()
    assert markdown[0] == "|  | Seed 1 | Seed 2 | Seed 3 | Mean | Standard deviation | 95 % interval |"
    assert markdown[2] == "| final AP box | 0.700 | 0.720 | 0.740 | 0.720 | 0.0200 | 0.670 to 0.770 |"
    assert "ccccccc" in markdown[-1]
    rows = list(csv.DictReader((tmp_path / "out" / "stability.csv").open()))
    assert [(row["iou_type"], row["score"]) for row in rows] == [(t, s) for t in ("bbox", "segm") for s in SCORE_NAMES]
    assert float(rows[0]["standard_deviation"]) == result.report["bbox"]["AP"]["deviation"]
    with Image.open(tmp_path / "out" / "stability.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50, "dots, lines and bands are drawn"


def test_a_summary_that_says_nothing_new_keeps_its_date(study: list[Path], tmp_path: Path) -> None:
    path = summarise(study, tmp_path / "out").path
    path.write_text(json.dumps({**json.loads(path.read_text()), "date": "2001-02-03"}))
    assert summarise(study, tmp_path / "out").report["date"] == "2001-02-03"
    assert summarise(study[:2], tmp_path / "out").report["date"] != "2001-02-03"


@pytest.mark.parametrize(
    "override",
    [
        "train.base_lr=0.01", "train.max_iters=9", "model.fpn_channels=64", "data.horizontal_flip=0.1",
        "evaluate.batch_size=2", "data.shapes.seed=7",
    ],
)  # fmt: skip
def test_runs_of_other_configurations_are_refused(make_run: Callable[..., Path], tmp_path: Path, override: str) -> None:
    other = {"checkpoint": "checkpoints/step_0000009.pt"} if "max_iters" in override else {}
    runs = [make_run(1), make_run(2, 0.7, override, **other)]
    with pytest.raises(StabilityError, match=rf"seed_1 and .*seed_2: .*differ in {override.split('=')[0]} \("):
        summarise(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("used", "difference"),
    [
        ({"max_detections": 300}, r"evaluate.max_detections \(100 and 300\)"),
        ({"test_time": {"scales": [1.0, 1.5], "flip": False}}, r"evaluate.scales \(\[1.0\] and \[1.0, 1.5\]\)"),
        ({"test_time": {"flip": True}, "max_detections": 100}, r"evaluate.flip \(false and true\)"),
    ],
)
def test_scores_of_other_settings_than_those_of_training_are_refused(
    make_run: Callable[..., Path], tmp_path: Path, used: dict[str, Any], difference: str
) -> None:
    """`maskrcnn evaluate evaluate.flip=true` on one seed leaves its config.yaml, which training wrote, as it is."""
    with pytest.raises(StabilityError, match=rf"seed_1 and .*seed_2: .*differ in {difference}"):
        summarise([make_run(1), make_run(2, **used)], tmp_path / "out")
    both = [make_run(seed, name=f"both_{seed}", max_detections=300) for seed in (1, 2)]
    summarise(both, tmp_path / "out")
    assert (
        "AP counts 300 detections per image and class, published AP 100." in (tmp_path / "out/stability.md").read_text()
    )
    damaged = make_run(3, test_time={"flip": "sometimes"})
    with pytest.raises(ResultError, match=r"seed_3/evaluation.json: flip: .*`maskrcnn evaluate` writes it anew"):
        summarise([damaged], tmp_path / "out")


def test_keys_that_decide_nothing_may_differ(make_run: Callable[..., Path], tmp_path: Path) -> None:
    free = ["train.processes=2", "data.workers=1", "tracking.experiment=x", "data.prepared_dir=y", "predict.images=3"]
    assert len(summarise([make_run(1), make_run(2, 0.8, *free)], tmp_path / "out").report["seeds"]) == 2


@pytest.mark.parametrize("which", ["data_hash", "train_data_hash"])
def test_runs_of_other_data_are_refused(make_run: Callable[..., Path], tmp_path: Path, which: str) -> None:
    with pytest.raises(StabilityError, match=rf"must differ only in the seed.*\({which}\)"):
        summarise([make_run(1), make_run(2, **{which: "ff"})], tmp_path / "out")


def test_two_runs_of_one_seed_are_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(StabilityError, match=r"seed_1 and .*again: seeds must differ, but both have train.seed=1"):
        summarise([make_run(1), make_run(2), make_run(1, name="again")], tmp_path / "out")


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StabilityError, match="at least one"):
        summarise([], tmp_path / "out")


@pytest.mark.parametrize("absent", ["config.yaml", "evaluation.json"])
def test_an_unfinished_run_is_refused(study: list[Path], tmp_path: Path, absent: str) -> None:
    (study[1] / absent).unlink()
    with pytest.raises(ResultError, match=rf"seed_2/{absent}: no such file"):
        summarise(study, tmp_path / "out")


def test_a_run_without_scores_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"must have AP.*evaluate\.skip_eval"):
        summarise([make_run(1, bbox=None, segm=None)], tmp_path / "out")


def test_an_evaluation_of_an_earlier_checkpoint_is_refused(study: list[Path], tmp_path: Path) -> None:
    (study[2] / "last_checkpoint").write_text("checkpoints/step_0000009.pt\n")
    with pytest.raises(ResultError, match=r"must be of the last checkpoint, .*9\.pt, got .*8\.pt"):
        summarise(study, tmp_path / "out")


def test_an_evaluation_before_the_end_of_training_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(1, checkpoint="checkpoints/step_0000003.pt")
    with pytest.raises(ResultError, match=r"must be of step 8 \(train\.max_iters\), got step 3"):
        summarise([run], tmp_path / "out")


def test_training_that_ends_at_a_target_may_end_early(make_run: Callable[..., Path], tmp_path: Path) -> None:
    targets = ("evaluate.every_epoch=true", "evaluate.target_bbox_ap=0.1")
    runs = [make_run(seed, 0.7, *targets, checkpoint=f"checkpoints/step_000000{seed}.pt") for seed in (1, 2)]
    assert summarise(runs, tmp_path / "out").report["seeds"] == [1, 2]
