"""Objects as people take them: in pixels of their own image, by the name of their class, whatever its id in COCO."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cuda_ops
from model.config import Conventions, DataConfig, ModelConfig
from model.data.collate import collate
from model.data.dataset import Sample
from model.data.transforms import Pixels, resize_image
from model.inference.predictor import Predictor, batched_by_bucket, objects_of
from model.network.mask_rcnn import MaskRCNN
from model.structures import Detections

DATA = DataConfig(
    eval_min_size_px=64, eval_max_size_px=96, buckets=((64, 96), (96, 64)), min_sizes_px=(64,), max_size_px=96
)
NAMES, IDS = ("person", "cat", "dog", "toothbrush"), (1, 17, 18, 90)
# (height, width) of a file and of what the network sees: 2 and 3 times as large, and by other factors in height and
# width.
SIZES = {7: ((128, 160), (64, 80)), 8: ((288, 192), (96, 64)), 9: ((21, 300), (6, 96))}


@pytest.fixture(scope="module")
def images() -> dict[int, Pixels]:
    dice = np.random.default_rng(0)
    return {number: dice.integers(0, 256, (*size, 3), dtype=np.uint8) for number, (size, _) in SIZES.items()}


@pytest.fixture
def network(tiny_config: Callable[..., ModelConfig]) -> MaskRCNN:
    """Untrained: unsure of all classes, so that each is found."""
    torch.manual_seed(1)
    return MaskRCNN(tiny_config(score_threshold=0.01, detections_per_image=40), len(NAMES)).eval()


def seen(network: MaskRCNN, pixels: Pixels, size: tuple[int, int]) -> Detections:
    """What the network finds in an image alone, in pixels of its input."""
    sample = Sample(image=resize_image(pixels, size), image_id=0, original_size=size, seed=0, instances=None)
    with torch.inference_mode():
        return network(collate([sample], DATA.buckets))


def test_an_object_lies_where_it_is_in_the_file_and_has_the_name_of_its_label(
    network: MaskRCNN, images: dict[int, Pixels]
) -> None:
    predictor = Predictor(network, DATA, "float32", NAMES, IDS)
    found = dict(predictor.objects(images.items(), batch_size=1, score_threshold=0.0))
    labels_found = set()
    for number, ((height, width), size) in SIZES.items():
        expected = seen(network, images[number], size)
        scale = torch.tensor([width / size[1], height / size[0]]).repeat(2)
        objects = found[number]
        assert len(objects) == expected.num_detections[0] > 0
        boxes = torch.tensor([found["bbox"] for found in objects])
        torch.testing.assert_close(boxes, expected.boxes[0] * scale, rtol=1e-5, atol=1e-3)
        labels = [found["label"] for found in objects]
        assert labels == expected.labels[0].tolist()
        assert [found["class"] for found in objects] == [NAMES[label - 1] for label in labels]
        assert {tuple(found["segmentation"]["size"]) for found in objects} == {(height, width)}
        labels_found |= set(labels)
    assert labels_found == {1, 2, 3, 4}


@pytest.mark.parametrize("conventions", ["detectron2", "torchvision"])
def test_masks_are_pasted_by_the_conventions_of_the_network(
    tiny_config: Callable[..., ModelConfig], images: dict[int, Pixels], conventions: Conventions
) -> None:
    torch.manual_seed(0)
    config = tiny_config(score_threshold=0.01, detections_per_image=40, conventions=conventions)
    network = MaskRCNN(config, len(NAMES)).eval()
    (height, width), size = SIZES[7]
    ((_, objects),) = Predictor(network, DATA, "float32", NAMES, IDS).objects(
        [(7, images[7])], batch_size=1, score_threshold=0.0
    )
    expected = seen(network, images[7], size)
    boxes = torch.tensor([found["bbox"] for found in objects])
    found = [found["segmentation"]["counts"].encode() for found in objects]
    coded = {
        name: [
            code["counts"]
            for code in cuda_ops.encode_masks(expected.mask_probs[0], boxes, (height, width), conventions=name)
        ]
        for name in ("detectron2", "torchvision")
    }
    agreeing = {name: sum(a == b for a, b in zip(found, coded[name], strict=True)) for name in coded}
    assert agreeing[conventions] >= 0.9 * len(objects)  # a box went through COCO's x, y, width, height
    assert sum(agreeing.values()) < 1.5 * len(objects)


def test_objects_below_the_threshold_are_left_out_and_one_just_at_it_stays(
    network: MaskRCNN, images: dict[int, Pixels]
) -> None:
    predictor = Predictor(network, DATA, "float32", NAMES, IDS)
    ((_, objects),) = predictor.objects([(7, images[7])], batch_size=1, score_threshold=0.0)
    middle = objects[len(objects) // 2]["score"]
    ((_, sure),) = predictor.objects([(7, images[7])], batch_size=1, score_threshold=middle)
    assert sure == [found for found in objects if found["score"] >= middle]
    assert 0 < len(sure) < len(objects)


def test_images_of_one_bucket_share_a_batch_and_what_is_left_over_comes_last() -> None:
    wide, tall = (64, 96), (96, 64)
    sizes = [wide, tall, wide, wide, tall, wide, wide]
    samples = [
        Sample(image=np.zeros((*size, 3), np.uint8), image_id=k, original_size=size, seed=0, instances=None)
        for k, size in enumerate(sizes)
    ]
    batches = batched_by_bucket(samples, DATA, 2)
    assert [batch.image_ids.tolist() for batch in batches] == [[0, 2], [1, 4], [3, 5], [6]]


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
    assert all("class" not in one for one in found)
    named = objects_of(results, masks, (1, 17, 18, 90), ("person", "cat", "dog", "toothbrush"))
    assert [one["class"] for one in named] == ["dog", "toothbrush", "cat"]
    assert [{key: value for key, value in one.items() if key != "class"} for one in named] == found


def test_the_threshold_of_a_call_holds_also_below_that_of_the_network_which_keeps_its_own(
    network: MaskRCNN, images: dict[int, Pixels], tiny_config: Callable[..., ModelConfig]
) -> None:
    strict = MaskRCNN(tiny_config(score_threshold=0.9, detections_per_image=40), len(NAMES)).eval()
    strict.load_state_dict(network.state_dict())
    options: dict[str, Any] = {"batch_size": 1, "score_threshold": 0.01}
    (expected, found) = (
        dict(Predictor(one, DATA, "float32", NAMES, IDS).objects(images.items(), **options))
        for one in (network, strict)
    )
    assert found == expected
    assert all(found.values())
    assert strict.roi_heads.config.score_threshold == 0.9


def test_calls_with_several_thresholds_may_overlap(network: MaskRCNN, images: dict[int, Pixels]) -> None:
    """As in a server's threads, or where one program reads two of them in turn."""
    predictor = Predictor(network, DATA, "float32", NAMES, IDS)

    def found(threshold: float) -> Iterator[Any]:
        return predictor.objects(images.items(), batch_size=1, score_threshold=threshold)

    expected = dict(found(0.01))
    low, high = found(0.01), found(0.99)
    assert dict(one for pair in zip(low, high, strict=True) for one in pair[:1]) == expected
    assert dict(found(0.01)) == expected
