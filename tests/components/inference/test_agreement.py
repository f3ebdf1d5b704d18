"""Comparison of an exported program with its network: what counts as a difference."""

import torch

from components.inference.agreement import beyond, differences
from model.inference.formats import Outputs

NOTHING = {"unpaired": 0.0, "boxes": 0.0, "scores": 0.0}


def outputs(*found: tuple[float, float, int], rows: int = 4) -> Outputs:
    """One image's detections (left side of the box in px, score, label), padded to some rows."""
    boxes, scores, labels = torch.zeros(1, rows, 4), torch.zeros(1, rows), torch.zeros(1, rows, dtype=torch.int64)
    for row, (left, score, label) in enumerate(found):
        boxes[0, row] = torch.tensor([left, 0.0, left + 10.0, 10.0])
        scores[0, row], labels[0, row] = score, label
    return {"boxes": boxes, "scores": scores, "labels": labels, "num_detections": torch.tensor([len(found)])}


def test_detections_are_paired_by_class_and_place() -> None:
    network = outputs((0.0, 0.9, 1), (50.0, 0.9, 1), (0.0, 0.5, 2))
    swapped = outputs((50.0, 0.9, 1), (0.0, 0.9, 1), (0.0, 0.5, 2))
    assert differences(network, swapped, 0.05) == (NOTHING, 3)
    moved = differences(network, outputs((0.5, 0.75, 1), (50.0, 0.9, 1), (0.0, 0.5, 2)), 0.05)[0]
    assert (moved["unpaired"], moved["boxes"], round(moved["scores"], 6)) == (0.0, 0.5, 0.15)
    assert differences(outputs(), outputs(), 0.05) == (NOTHING, 0)


def test_only_detections_at_the_edge_of_what_is_kept_may_be_missing() -> None:
    """The edge is the threshold or, if all rows are taken, the last row's score."""
    network = outputs((0.0, 0.9, 1), (50.0, 0.05001, 1))
    assert differences(network, outputs((0.0, 0.9, 1)), 0.05)[0] == NOTHING
    for other in (outputs((0.0, 0.9, 1)), outputs((0.0, 0.9, 1), (50.0, 0.3, 2)), outputs()):
        assert differences(outputs((0.0, 0.9, 1), (50.0, 0.3, 1)), other, 0.05)[0]["unpaired"] >= 1
        assert differences(other, outputs((0.0, 0.9, 1), (50.0, 0.3, 1)), 0.05)[0]["unpaired"] >= 1
    full, other = outputs((0.0, 0.9, 1), (9.0, 0.3, 1), rows=2), outputs((0.0, 0.9, 1), (50.0, 0.3, 1), rows=2)
    assert differences(full, other, 0.05)[0]["unpaired"] == 0  # both boxes have score 0.3, and one had to go
    assert differences(full, outputs((0.0, 0.9, 1), (50.0, 0.31, 1), rows=2), 0.05)[0]["unpaired"] == 1


def test_a_number_that_is_none_is_a_difference() -> None:
    found, _ = differences(outputs((0.0, 0.9, 1)), outputs((0.0, torch.nan, 1)), 0.05)
    assert beyond(found, 1.0) == {"scores": torch.inf}
    assert beyond({"unpaired": 0.0, "boxes": 1e-3, "scores": torch.nan}, 1e-3).keys() == {"scores"}
