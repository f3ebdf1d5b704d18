"""The files of an evaluation: they agree with one another, and with either backend."""

import csv
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools import mask as coco_mask

import cuda_ops
from components import evaluate
from components.config import Config
from components.evaluation.detect import Results
from components.evaluation.files import evaluation_report, write_plots
from model.config import EvaluateConfig
from model.data.index import CocoIndex
from model.scoring.coco import evaluate_results, load_ground_truth


def test_either_backend_gives_the_same_report_to_the_last_byte(trained_run: Config) -> None:
    """On ground truth like COCO's, crowds too; the results are moved boxes and shrunk masks of it."""
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    coco = load_ground_truth(index.ground_truth_path)
    results = Results([], [], [])
    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        common = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
        common["score"] = 1 / (1 + annotation["id"] % 7)
        rle = coco.annToRLE(annotation)
        mask = coco_mask.decode(rle)
        mask[::3] = 0
        shrunk = coco_mask.encode(mask)
        results.bbox.append(common | {"bbox": [x + 0.1 * width, y, 0.9 * width, height]})
        results.segm.append(common | {"segmentation": {"size": rle["size"], "counts": shrunk["counts"].decode()}})
    texts = []
    for backend in ("pycocotools", "hotcoco"):
        evaluation = evaluate_results(index.ground_truth_path, results.bbox, results.segm, backend=backend)
        assert 0.1 < (evaluation.segm["AP"] or 0) < (evaluation.bbox["AP"] or 0) < 1
        texts.append(json.dumps(evaluation_report(evaluation, results, index, "any", EvaluateConfig())))
    assert texts[0] == texts[1]


def test_prediction_tensors_agree_with_the_results(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    folder = trained_run.train.output_dir / "inference"
    tensors = torch.load(folder / "predictions.pth", weights_only=True)
    results, masks_found = (json.loads((folder / f"{name}.json").read_text()) for name in ("bbox", "segm"))
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    assert {image["image_id"] for image in tensors} == set(index.image_ids.tolist())
    for image in tensors:
        own = [result for result in results if result["image_id"] == image["image_id"]]
        x, y, width, height = torch.tensor([result["bbox"] for result in own]).T
        torch.testing.assert_close(image["boxes"], torch.stack([x, y, x + width, y + height], 1))
        torch.testing.assert_close(image["scores"], torch.tensor([result["score"] for result in own]))
        assert [result["category_id"] for result in own] == [
            index.category_ids[k - 1] for k in image["labels"].tolist()
        ]
        assert image["mask_probs"].shape == (len(own), 28, 28)
        codes = cuda_ops.encode_masks(
            image["mask_probs"], image["boxes"], image["size"], conventions=trained_run.model.conventions
        )
        masks = [result["segmentation"]["counts"] for result in masks_found if result["image_id"] == image["image_id"]]
        assert masks == [code["counts"].decode() for code in codes]


def test_saved_scores_equal_the_report(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    scores = torch.load(trained_run.train.output_dir / "inference" / "coco_results.pth", weights_only=True)
    assert scores["bbox"] == evaluated[1]["bbox"]
    assert scores["precision"]["segm"].shape == (10, 101)


def test_plots_show_curves_and_some_images(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    folder = trained_run.train.output_dir / "plots"
    with Image.open(folder / "precision_recall.png") as image:
        assert image.width > 500
    with (folder / "precision_recall.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 101
    assert list(rows[0]) == ["recall", "bbox_50", "bbox_75", "bbox_mean", "segm_50", "segm_75", "segm_mean"]
    assert len(list((folder / "predictions").glob("*.jpg"))) == 2


def test_each_picture_shows_the_objects_of_its_own_image(trained_run: Config, tmp_path: Path) -> None:
    index = CocoIndex.open(trained_run.data.prepared_dir, "val")
    coco = load_ground_truth(index.ground_truth_path)
    ids = sorted(index.image_ids.tolist())
    found = {"image_id": ids[1], "category_id": index.category_ids[0], "bbox": [5.0, 5.0, 60.0, 40.0], "score": 0.9}
    pictures = []
    for name, detections in (("without", []), ("with", [found])):
        write_plots(tmp_path / name, Results(detections, [], [], "box"), None, index, coco, len(ids))
        pictures.append({id: (tmp_path / name / f"plots/predictions/{id}.jpg").read_bytes() for id in ids})
    assert [id for id in ids if pictures[0][id] != pictures[1][id]] == [ids[1]]
