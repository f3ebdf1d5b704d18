"""Drawings of what was found: objects from COCO results."""

from components.evaluation.plots import objects_of


def test_objects_have_the_label_of_their_category_and_both_corners_of_their_box() -> None:
    results = [
        {"image_id": 1, "category_id": category, "score": score, "bbox": [10.0, 20.0, 30.0, 5.0]}
        for category, score in ((18, 0.9), (90, 0.5), (17, 0.25))
    ]
    masks = [{"image_id": 1, "segmentation": {"size": [2, 2], "counts": str(k)}} for k in range(3)]
    found = objects_of(results, masks, (1, 17, 18, 90))
    assert [(o["label"], o["score"]) for o in found] == [(3, 0.9), (4, 0.5), (2, 0.25)]
    assert all(o["bbox"] == [10.0, 20.0, 40.0, 25.0] for o in found)
    assert [o["segmentation"]["counts"] for o in found] == ["0", "1", "2"]
    assert "segmentation" not in objects_of(results, [], (1, 17, 18, 90))[0]
