"""Comparisons: intervals against scipy and by hand, what is said in words, what is refused."""

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from scipy import stats

from components import compare
from components.compare import CompareError
from components.config import Config
from components.params import load_config, save_config
from components.runs.result import ResultError
from components.studies.intervals import Difference, paired_difference, welch_difference
from components.studies.summary import summarise
from model.data.index import CocoIndex
from model.errors import UserError
from model.scoring.coco import evaluate_results, load_ground_truth
from model.scoring.names import SCORE_NAMES

TINY = Path(__file__).with_name("tiny.yaml")
BASE = {1: 0.700, 2: 0.720, 3: 0.740}
BETTER = {1: 0.730, 2: 0.752, 3: 0.768}  # each seed by about 0.03, less than the seeds differ among themselves


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, seed: int, ap: float, *overrides: str, **evaluation: Any) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir(parents=True)
        config = load_config(TINY, [f"train.seed={seed}", f"train.output_dir={run_dir}", *overrides])
        save_config(config, run_dir / "config.yaml")
        scores = {**dict.fromkeys(SCORE_NAMES, ap), "APl": None}
        report = {
            "bbox": scores,
            "segm": dict.fromkeys(SCORE_NAMES, ap / 2),
            "images": 4,
            "checkpoint": "checkpoints/step_0000008.pt",
            "data_hash": "da" * 32,
            "train_data_hash": "7a" * 32,
            "commit": "c" * 40,
            **evaluation,
        }
        (run_dir / "evaluation.json").write_text(json.dumps(report))
        return run_dir

    return make


@pytest.fixture
def make_study(make_run: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, ap: dict[int, float], *overrides: str, **evaluation: Any) -> Path:
        runs = [make_run(f"{name}/seed_{seed}", seed, value, *overrides, **evaluation) for seed, value in ap.items()]
        return summarise(runs, tmp_path / name).output_dir

    return make


def test_paired_difference_is_students() -> None:
    before, after = list(BASE.values()), list(BETTER.values())
    differences = [0.030, 0.032, 0.028]
    found = paired_difference(before, after)
    half = (
        4.302653 * 0.002 / math.sqrt(3)
    )  # 97.5 % point of t of 2 degrees of freedom × the differences' standard error
    assert found.mean == pytest.approx(0.030)
    assert found.interval == pytest.approx((0.030 - half, 0.030 + half), abs=1e-7)
    assert found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_welch_difference_is_welchs() -> None:
    before, after = [0.70, 0.72, 0.74], [0.75, 0.76, 0.74, 0.75]
    found = welch_difference(before, after)
    errors = [stats.tvar(before) / 3, stats.tvar(after) / 4]
    freedom = sum(errors) ** 2 / (errors[0] ** 2 / 2 + errors[1] ** 2 / 3)  # Welch and Satterthwaite's
    half = stats.t.ppf(0.975, freedom) * math.sqrt(sum(errors))
    assert found.mean == pytest.approx(0.03)
    assert found.interval == pytest.approx((0.03 - half, 0.03 + half))
    assert found.p == pytest.approx(2 * stats.t.sf(0.03 / math.sqrt(sum(errors)), freedom))


@pytest.mark.parametrize("test", [paired_difference, welch_difference])
def test_one_value_has_no_interval(test: Callable[..., Difference]) -> None:
    assert test([0.5], [0.75]) == Difference(0.25, None, None)


@pytest.mark.parametrize("test", [paired_difference, welch_difference])
def test_no_spread_at_all_leaves_no_doubt(test: Callable[..., Difference]) -> None:
    assert test([0.5, 0.5], [0.5, 0.5]) == Difference(0.0, (0.0, 0.0), 1.0)
    assert test([0.5, 0.5], [0.75, 0.75]) == Difference(0.25, (0.25, 0.25), 0.0)


def test_values_that_are_none_noise_are_found_by_pairs_alone(make_study: Callable[..., Path]) -> None:
    """Seeds differ by more than the configurations, but in the same way in both."""
    one, other = make_study("one", BASE), make_study("other", BETTER, "train.base_lr=0.01")
    (comparison,) = compare.run([one, other])
    assert comparison["method"] == "paired"
    score = comparison["bbox"]["AP"]
    assert (score["before"], score["after"]) == (pytest.approx(0.72), pytest.approx(0.75))
    assert score["interval"][0] > 0
    assert "other is better than" in comparison["sentences"][0]
    assert welch_difference(list(BASE.values()), list(BETTER.values())).interval[0] < 0  # type: ignore[index]


def test_noise_is_called_noise(make_study: Callable[..., Path]) -> None:
    swapped = {1: 0.742, 2: 0.719, 3: 0.702}
    (comparison,) = compare.run([make_study("one", BASE), make_study("other", swapped)])
    assert "no significant difference" in comparison["sentences"][0]
    assert comparison["bbox"]["AP"]["p"] > 0.5


def test_a_worse_configuration_is_called_worse(make_study: Callable[..., Path]) -> None:
    (comparison,) = compare.run([make_study("one", BETTER), make_study("other", BASE)])
    assert "other is worse than" in comparison["sentences"][0]
    assert "−0.0300" in comparison["sentences"][0]


def test_other_seeds_are_not_paired(make_study: Callable[..., Path]) -> None:
    (comparison,) = compare.run([make_study("one", BASE), make_study("other", {4: 0.80, 5: 0.81})])
    assert comparison["method"] == "welch"
    expected = welch_difference(list(BASE.values()), [0.80, 0.81])
    assert comparison["bbox"]["AP"]["interval"] == expected.interval
    assert "3 and 2 seeds, Welch" in comparison["sentences"][0]


def test_as_many_but_other_seeds_are_not_paired(make_study: Callable[..., Path]) -> None:
    other = {1: BETTER[1], 2: BETTER[2], 4: BETTER[3]}
    (comparison,) = compare.run([make_study("one", BASE), make_study("other", other)])
    assert comparison["method"] == "welch"
    expected = welch_difference(list(BASE.values()), list(BETTER.values()))
    assert comparison["bbox"]["AP"]["interval"] == expected.interval


def test_seeds_are_paired_by_their_number_whatever_the_order_they_were_run_in(make_study: Callable[..., Path]) -> None:
    shuffled = {seed: BETTER[seed] for seed in (3, 1, 2)}
    (comparison,) = compare.run([make_study("one", BASE), make_study("other", shuffled)])
    assert comparison["method"] == "paired"
    expected = paired_difference(list(BASE.values()), list(BETTER.values()))
    assert comparison["bbox"]["AP"]["interval"] == pytest.approx(expected.interval)


def test_one_seed_each_says_nothing_about_noise(make_run: Callable[..., Path]) -> None:
    (comparison,) = compare.run([make_run("one", 1, 0.7), make_run("other", 1, 0.8)])
    assert comparison["method"] == "none"
    assert comparison["bbox"]["AP"] == {
        "before": 0.7, "after": 0.8, "difference": pytest.approx(0.1), "interval": None, "p": None,
    }  # fmt: skip
    assert "No verdict: both have only one seed" in comparison["sentences"][-1]
    assert re.search(r"No interval over the images: .*one/inference/bbox.json is not there", comparison["sentences"][2])


@pytest.fixture
def make_scored_run(make_run: Callable[..., Path], trained_run: Config) -> Callable[..., Path]:
    """Runs that find a part of the objects of four images, and nothing else."""
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    truth = load_ground_truth(index.ground_truth_path)

    def make(name: str, missed: Collection[int]) -> Path:
        """A run that misses the objects of some images, by their index."""
        chosen = [
            a
            for a in truth.anns.values()
            if index.image_ids.tolist().index(a["image_id"]) not in missed and not a["iscrowd"]
        ]
        common = [{key: a[key] for key in ("image_id", "category_id")} | {"score": 0.9} for a in chosen]
        boxes = [one | {"bbox": a["bbox"]} for one, a in zip(common, chosen, strict=True)]
        masks = [one | {"segmentation": rle_of(truth, a)} for one, a in zip(common, chosen, strict=True)]
        scores = evaluate_results(truth, boxes, masks).scores
        run_dir = make_run(
            name, 1, 0.5, f"data.prepared_dir={trained_run.data.prepared_dir}", data_hash=index.data_hash, **scores
        )
        (run_dir / "inference").mkdir()
        for iou_type, found in (("bbox", boxes), ("segm", masks)):
            (run_dir / "inference" / f"{iou_type}.json").write_text(json.dumps(found))
        return run_dir

    return make


def rle_of(truth: COCO, annotation: dict[str, Any]) -> dict[str, Any]:
    rle = truth.annToRLE(annotation)
    return {
        "size": rle["size"],
        "counts": rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"],
    }


def test_two_runs_have_an_interval_over_images_that_is_said_to_be_none_over_seeds(
    make_scored_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four images the first run misses one: the fewer of that are drawn, the smaller the difference."""
    one, other = make_scored_run("one", [1]), make_scored_run("other", [])
    (comparison,) = compare.run([one, other])
    assert (comparison["method"], comparison["resamples"], comparison["images"]) == ("images", 1000, 4)
    for iou_type in ("bbox", "segm"):
        score = comparison[iou_type]["AP"]
        assert score["after"] == 1
        assert score["difference"] == pytest.approx(1 - score["before"])
        low, high = score["interval"]
        assert low == 0  # a third of the resamples lacks the image
        assert low < score["difference"] < high <= 1
        assert score["p"] is None
        assert comparison[iou_type]["AR100"]["interval"] is None
    assert "other has +" in comparison["sentences"][0]
    assert "95 % interval over images +0.0000 to +" in comparison["sentences"][0]
    assert "over images, not over seeds" in comparison["sentences"][-1]
    assert compare.run([one, other]) == [comparison]
    compare.main([str(one), str(other)])
    assert "scores of one run each, 4 images" in capsys.readouterr().out


def test_images_are_drawn_for_both_runs_alike(make_scored_run: Callable[..., Path]) -> None:
    (comparison,) = compare.run([make_scored_run("one", [1]), make_scored_run("other", [1])])
    assert comparison["segm"]["AP"]["interval"] == comparison["bbox"]["AP75"]["interval"] == (0, 0)


def test_results_of_another_evaluation_are_refused(make_scored_run: Callable[..., Path]) -> None:
    one, other = make_scored_run("one", [1]), make_scored_run("other", [])
    (other / "inference" / "segm.json").write_bytes((one / "inference" / "segm.json").read_bytes())
    with pytest.raises(
        UserError, match=r"other/inference/segm.json: must be the results that .* scores, with AP 1.0, got"
    ):
        compare.run([one, other])


@pytest.mark.parametrize(("key", "value"), [("image_id", "7"), ("score", float("nan"))])
def test_results_that_nothing_can_match_are_an_error_that_names_the_file(
    make_scored_run: Callable[..., Path], key: str, value: str | float
) -> None:
    one, other = make_scored_run("one", [1]), make_scored_run("other", [])
    path = other / "inference" / "bbox.json"
    first, *results = json.loads(path.read_text())
    path.write_text(json.dumps([first | {key: value}, *results]))
    with pytest.raises(
        UserError,
        match=r"other/inference/bbox\.json: must be COCO results, .*; run `maskrcnn evaluate train\.output_dir=",
    ):
        compare.run([one, other])


@pytest.mark.parametrize("what", ["no data", "other data"])
def test_without_the_data_there_is_no_interval_and_it_is_said(make_scored_run: Callable[..., Path], what: str) -> None:
    file, pattern, changed = {
        "no data": ("config.yaml", "prepared_dir: .*", "prepared_dir: elsewhere"),
        "other data": ("evaluation.json", '"data_hash": "[0-9a-f]*"', '"data_hash": "00"'),
    }[what]
    runs = [make_scored_run("one", [1]), make_scored_run("other", [])]
    for run_dir in runs:
        (run_dir / file).write_text(re.sub(pattern, changed, (run_dir / file).read_text()))
    (comparison,) = compare.run(runs)
    assert comparison["method"] == "none"
    assert "the evaluated images are not those in " in comparison["sentences"][2]


def test_a_run_beside_a_study_says_nothing_about_noise(
    make_run: Callable[..., Path], make_study: Callable[..., Path]
) -> None:
    (comparison,) = compare.run([make_study("one", BASE), make_run("other", 1, 0.8)])
    assert comparison["method"] == "none"
    assert "other has only one seed" in comparison["sentences"][-1]


def test_parameters_that_differ_are_listed(make_run: Callable[..., Path]) -> None:
    overrides = ("train.base_lr=0.01", "train.processes=2", "predict.images=3", "data.prepared_dir=elsewhere")
    (comparison,) = compare.run([make_run("one", 1, 0.7), make_run("other", 2, 0.8, *overrides)])
    assert comparison["parameters"] == {"train.base_lr": [0.02, 0.01], "train.processes": [1, 2]}


def test_a_key_that_an_older_study_does_not_know_had_its_default(make_study: Callable[..., Path]) -> None:
    one, other = make_study("one", BASE), make_study("other", BETTER)
    report = json.loads((one / "stability.json").read_text())
    del report["config"]["train.momentum"]
    (one / "stability.json").write_text(json.dumps(report))
    assert compare.run([one, other])[0]["parameters"] == {}


def test_other_training_data_are_reported(make_run: Callable[..., Path]) -> None:
    (comparison,) = compare.run([make_run("one", 1, 0.7), make_run("other", 1, 0.8, train_data_hash="ff")])
    assert "trained on different data" in comparison["sentences"][-1]


def test_other_evaluation_data_are_refused(make_run: Callable[..., Path]) -> None:
    with pytest.raises(CompareError, match=r"must be evaluated on the same data, got .*one: 4 images.*other: 9 images"):
        compare.run([make_run("one", 1, 0.7), make_run("other", 1, 0.8, data_hash="ff", images=9)])


def test_ap_of_other_limits_of_detections_is_refused(
    make_run: Callable[..., Path], make_study: Callable[..., Path]
) -> None:
    usual, named = make_run("one", 1, 0.7), make_run("two", 1, 0.8, max_detections=100)
    study = make_study("three", BASE, max_detections=300)
    compare.run([usual, named])
    with pytest.raises(CompareError, match=r"one and .*three: AP must count as many .* got 100 and 300"):
        compare.run([usual, study])


def test_one_run_alone_is_refused(make_run: Callable[..., Path]) -> None:
    with pytest.raises(CompareError, match="at least two runs or studies, got 1"):
        compare.run([make_run("one", 1, 0.7)])


def test_a_folder_without_a_result_is_refused(make_run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no such file"):
        compare.run([make_run("one", 1, 0.7), tmp_path])


def test_a_damaged_study_is_an_error_that_names_the_key(make_study: Callable[..., Path]) -> None:
    path = make_study("one", BASE) / "stability.json"
    whole = json.loads(path.read_text())
    ap = whole["bbox"]["AP"]
    for content, reason in (
        ({}, "seeds is missing"),
        ([], "must hold an object, got list"),
        (whole | {"seeds": []}, "seeds: List should have at least 1 item"),
        (whole | {"bbox": None}, "bbox: Input should be a valid dictionary, got None"),
        (whole | {"bbox": {"AP": ap}}, "bbox.AP50 is missing"),
        (
            whole | {"bbox": whole["bbox"] | {"AP": ap | {"values": [0.7]}}},
            "bbox.AP.values must have a number for each",
        ),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            compare.run([path.parent, path.parent])
        assert f"stability.json: {reason}" in str(error.value)
        assert "; `maskrcnn stability --summary` writes it anew" in str(error.value)


def test_several_are_each_compared_with_the_first(make_run: Callable[..., Path]) -> None:
    runs = [make_run(name, 1, ap) for name, ap in (("one", 0.7), ("two", 0.8), ("three", 0.6))]
    found = compare.run(runs)
    assert [comparison["bbox"]["AP"]["difference"] for comparison in found] == pytest.approx([0.1, -0.1])


def test_boxes_alone_are_compared_where_one_side_has_no_masks(make_run: Callable[..., Path]) -> None:
    (comparison,) = compare.run([make_run("one", 1, 0.7), make_run("other", 1, 0.8, segm=None)])
    assert "segm" not in comparison


def test_the_command_prints_tables_and_writes_json(
    make_study: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_study("one", BASE), make_study("other", BETTER, "train.base_lr=0.01")
    compare.main([str(one), str(other), "--json", str(tmp_path / "out" / "compare.json")])
    output = capsys.readouterr().out
    for words in ("train.base_lr", "box AP50", "+0.0300", "mask APl", "is better than"):
        assert words in output
    (comparison,) = json.loads((tmp_path / "out" / "compare.json").read_text())["comparisons"]
    assert set(comparison["bbox"]) == set(SCORE_NAMES)
    assert comparison["bbox"]["APl"] == {"before": None, "after": None, "difference": None, "interval": None, "p": None}


def test_the_command_ends_with_status_2_and_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        compare.main([str(tmp_path)])
    assert end.value.code == 2
    assert "error: compare: must name at least two runs" in capsys.readouterr().err
