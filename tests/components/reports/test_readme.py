"""The tables of README.md and docs/results.md come from docs/results/ and say what is there."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from components import report
from components.config import Config
from components.params import save_config
from components.reports import readme
from components.runs.journal import Journal
from components.studies.tables import markdown_scores as stability_markdown
from model.errors import UserError
from model.scoring.names import SCORE_NAMES

REPOSITORY = Path(__file__).resolve().parents[3]
HARDWARE = {"cpu": "some cpu", "cores": 8, "gpu": "NVIDIA X", "gpus": 8}


def training(name: str, dtype: str, time_s: float | None, **changes: Any) -> dict[str, Any]:
    scores = {"AP": 0.377, "AP50": 0.6}
    record = {
        "recipe": "coco",
        "changes": changes,
        "date": "2026-01-02",
        "commit": "abcdef0123" + 30 * "0",
        "processes": 8,
    }
    record |= {"hardware": HARDWARE, "batch_size": 64, "dtype": dtype, "time_s": time_s, "bbox": scores, "segm": None}
    return {"name": name, "training": record}


def step(mode: str, dtype: str, images_per_s: float, batch: int = 8) -> dict[str, Any]:
    case = {"mode": mode, "model": "ours", "dtype": dtype, "batch": batch, "height": 800, "width": 1344}
    times = {"median": batch / images_per_s, "p90": 1.0, "p99": 1.0}
    return case | {"images_per_s": images_per_s, "step_s": times, "peak_memory_mib": None, "ratio_to_torchvision": 0.5}


def benchmark(name: str, **parts: Any) -> dict[str, Any]:
    common = {"date": "2026-01-02", "commit": "abcdef0123-dirty", "hardware": HARDWARE, "backbone": "resnet50"}
    return {"name": name, "benchmark": common | parts}


def columns(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by the title of their column."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return {title: [row[k] for row in rows[2:]] for k, title in enumerate(rows[0])}


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_tables_are_generated_from_the_figures(document: str):
    """Not by hand: after a change of either, `maskrcnn report --readme`."""
    text = (REPOSITORY / document).read_text()
    records = readme.read_records(REPOSITORY / readme.RESULTS)
    assert records
    assert readme.fill_blocks(document, text, readme.blocks_of(records)) == text


def test_every_table_has_its_document():
    assert sorted(name for names in readme.DOCUMENTS.values() for name in names) == sorted(readme.blocks_of([]))


def test_the_summary_has_unchanged_recipes_and_their_studies():
    def study(name: str, data_hash: str) -> dict[str, Any]:
        ap = {"AP": {"mean": 0.38, "deviation": 0.0042}}
        return {"name": name, "stability": {"bbox": ap, "data_hash": data_hash}}

    records = [training("a", "float32", 7200), training("b", "float16", 3600, **{"train.dtype": "float16"})]
    for record in records:
        record["training"]["data_hash"] = "ab"
    for studies, over_seeds in (
        ([], "–"),
        ([study("coco_stability", "ab")], "0.380 ± 0.004"),
        ([study("coco_stability", "other data")], "–"),
        ([study("coco_lr_stability", "ab")], "–"),
    ):
        table = columns(readme.table("summary", [*records, *studies]))
        assert (table["recipe"], table["precision"], table["box AP"]) == (["coco"], ["float32"], ["0.377"])
        assert table["box AP over seeds"] == [over_seeds]
        assert table["mask AP over seeds"] == ["–"]


def test_training_in_half_the_time_is_twice_as_fast():
    records = [training("a", "tf32", 7200), training("b", "bfloat16", 3600, **{"train.dtype": "bfloat16"})]
    table = columns(readme.table("accuracy", records))
    assert table["speed-up"] == ["–", "2.00"]
    assert table["box AP"] == ["0.377", "0.377"]
    assert table["mask AP"] == ["–", "–"]
    assert table["time"] == ["2 h 0 min", "1 h 0 min"]
    assert table["hardware"] == ["8 × NVIDIA X"] * 2
    assert table["made"] == ["2026-01-02, abcdef0"] * 2
    assert table["training"] == ["coco", "coco"]


def test_other_networks_are_not_compared():
    records = [training("a", "float32", 7200), training("b", "float16", 3600, **{"model.backbone": "resnet101"})]
    table = columns(readme.table("accuracy", records))
    assert table["speed-up"] == ["–", "–"]
    assert table["training"] == ["coco", 'coco, backbone="resnet101"']


def test_throughput_is_compared_at_the_same_batch():
    steps = [step("train", "float32", 20), step("train", "float16", 25), step("train", "float16", 30, batch=16)]
    steps += [step("train", "float32", 24) | {"compile": True}, step("train", "float32", 16) | {"deterministic": True}]
    steps += [step("inference", "float32", 40), {**step("train", "float32", 10), "model": "torchvision"}]
    records = [benchmark("a", steps={"cases": steps})]
    table = columns(readme.table("training", records))
    assert table["images/s"] == ["20", "25", "30", "24", "16"]
    assert table["precision"] == ["float32", "float16", "float16", "float32, compiled", "float32, deterministic"]
    assert table["speed-up"] == ["–", "1.25", "–", "1.20", "0.80"]
    assert table["made"][0] == "2026-01-02, abcdef0-dirty"
    assert columns(readme.table("inference", records))["images/s"] == ["40"]


def test_weak_scaling_of_two_precisions_stands_side_by_side():
    rows = [
        {"processes": n, "batch_per_process": 8, "images_per_s": 20.0 * s, "speedup": s}
        for n, s in ((1, 1.0), (8, 7.0))
    ]
    faster = [row | {"images_per_s": 1.5 * row["images_per_s"]} for row in rows]
    records = [
        benchmark("a", scaling={"dtype": "float32", "weak": rows, "strong": []}),
        benchmark("b", scaling={"dtype": "float16", "weak": faster, "strong": []}),
    ]
    table = columns(readme.table("training", records))
    assert table["weak scaling"] == ["1.00", "7.00"] * 2
    assert table["images/s"] == ["20", "140", "30", "210"]
    assert table["speed-up"] == ["–", "–", "1.50", "1.50"]
    assert table["hardware"] == ["1 × NVIDIA X", "8 × NVIDIA X"] * 2


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with nothing measured, and a run in it that is done."""
    for document in readme.DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / document, tmp_path / document)
    run = tmp_path / "runs" / "mine"
    journal = Journal(run / "log.jsonl")
    for number in (1, 2):
        journal.append(number, {"loss/total": 1.0, "time/step_s": 30.0})
    save_config(Config(), run / "config.yaml")
    scores = {"AP": 0.25, "AP50": 0.5}
    evaluation = {"bbox": scores, "segm": scores, "images": 3, "detections": 2, "data_hash": "ab"}
    evaluation |= {"checkpoint": "step_2.pt", "commit": "1234567890"}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    environment = {"commit": "abcdef0123", "hardware": HARDWARE, "versions": {}, "processes": 2}
    (run / "environment.json").write_text(json.dumps(environment))
    return tmp_path


def test_a_run_is_taken_up_once_and_kept(tree: Path, monkeypatch: pytest.MonkeyPatch):
    save_config(Config(), tree / "params.yaml")
    monkeypatch.chdir(tree)
    report.main(["--readme", "runs/mine"])
    text = (tree / "docs" / "results.md").read_text()
    block = re.search(r"<!-- table:accuracy -->(.*?)<!-- /table -->", text, re.DOTALL)
    assert block is not None
    table = columns(block[1])
    assert (table["box AP"], table["time"], table["hardware"]) == (["0.250"], ["1 min 0 s"], ["2 × NVIDIA X"])
    assert "abcdef0" in table["made"][0]  # where it was trained, not where it was evaluated
    assert "Not measured yet; run `maskrcnn benchmark inference`" in text
    shutil.rmtree(tree / "runs")
    report.main(["--readme"])
    assert (tree / "docs" / "results.md").read_text() == text


def test_a_benchmark_has_the_date_of_its_own_lines(tree: Path):
    """A training that follows in the same folder logs a throughput too."""
    run = tree / "runs" / "measured"
    run.mkdir()
    (run / "benchmark.json").write_text(json.dumps({"backbone": "resnet50", "hardware": HARDWARE}))
    days = {0: 86400.0, 20: 5 * 86400.0}
    lines = [{"step": n, "time": time_s, "metrics": {"throughput/images_per_s": 9.0}} for n, time_s in days.items()]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert readme.record_of(run)["benchmark"]["date"] == "1970-01-02"


def test_a_stability_study_is_shown_as_it_describes_itself(tree: Path):
    score = {"values": [0.7, 0.72], "mean": 0.71, "deviation": 0.0141, "interval": [0.58, 0.84]}
    study = {
        "seeds": [1, 2],
        "runs": [],
        "confidence": 0.95,
        "bbox": dict.fromkeys(SCORE_NAMES, score),
        "images": 100,
        "data_hash": "ab",
        "config": {},
        "commits": ["abc"],
        "date": "2026-01-02",
    }
    (tree / "study").mkdir()
    (tree / "study" / "stability.json").write_text(json.dumps(study))
    assert "stability" in readme.update_readme([tree / "study"], tree)
    assert stability_markdown(study) in (tree / "docs" / "results.md").read_text()


def test_a_document_with_other_marks_is_refused():
    with pytest.raises(UserError, match=r"README\.md: must mark the tables summary, each once; got accuracy"):
        readme.fill_blocks("README.md", "<!-- table:accuracy -->\n<!-- /table -->", {"accuracy": "", "summary": ""})


def test_damaged_figures_are_an_error_that_names_the_file(tree: Path):
    study = tree / "study" / "stability.json"
    study.parent.mkdir()
    study.write_text("[]")
    with pytest.raises(UserError, match=r"study/stability\.json: must hold an object.*`maskrcnn stability --summary`"):
        readme.update_readme([study.parent], tree)
    (tree / "docs" / "results").mkdir(exist_ok=True)
    mine = tree / "docs" / "results" / "mine.json"
    for content in ("{", "{}", '{"name": "mine", "training": {}}', '{"name": "mine", "stability": {"seeds": [1]}}'):
        mine.write_text(content)
        with pytest.raises(UserError, match=r"results/mine\.json: .*; `maskrcnn report --readme RUN` writes it anew"):
            readme.update_readme([], tree)
