"""Detection on a whole split, with its batches divided among the processes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import Any

from rich.progress import track

from model.config import DataConfig, EvaluateConfig
from model.data.index import CocoIndex
from model.data.loader import eval_loader
from model.data.views import views_loader
from model.distributed import gather_on_main, is_main, raise_together, rank, world_size
from model.inference.postprocess import original_boxes, to_coco_results
from model.inference.predict import predict
from model.inference.test_time import is_plain, predict_views
from model.network.mask_rcnn import MaskRCNN
from model.structures import Batch, Detections


@dataclass(frozen=True)
class Results:
    """Detections in a split: COCO results of boxes (or proposals) and of masks, in one order, and tensors per image."""

    bbox: list[dict[str, Any]]
    segm: list[dict[str, Any]]  # empty without a mask head
    tensors: list[dict[str, Any]]  # empty without keep_tensors
    task: str = "mask"  # model.task


def detect(
    model: MaskRCNN,
    index: CocoIndex,
    data: DataConfig,
    evaluate: EvaluateConfig,
    *,
    dtype: str = "float32",
    keep_tensors: bool = False,
) -> Results | None:
    """Run a model on every image of a split, with batches divided among the processes and augmented by `evaluate`.

    Args:
        keep_tensors: also keep the network's outputs: about 1 GiB of memory for COCO's 5,000 val images.

    Returns:
        Results of all processes, in an order that does not depend on their number; None except on rank 0.
    """
    found: list[Results] = []
    failure: Exception | SystemExit | None = None
    try:
        for batch, detections in _detections(model, index, data, evaluate, dtype):
            tensors = _tensors(batch, detections) if keep_tensors else []
            results = to_coco_results(batch, detections, index.category_ids, model.conventions)
            found.append(Results(*results, tensors))
    except (Exception, SystemExit) as error:  # SystemExit: a signal has come
        failure = error
    raise_together(failure)
    if not (of_ranks := gather_on_main(found)):
        return None
    in_order = [
        results for row in zip_longest(*of_ranks) for results in row if results
    ]  # rank r had batches r, r + size, …
    bbox, segm, tensors = (
        list(chain.from_iterable(getattr(part, name) for part in in_order)) for name in ("bbox", "segm", "tensors")
    )
    return Results(bbox, segm, tensors, model.task)


def _detections(
    model: MaskRCNN, index: CocoIndex, data: DataConfig, evaluate: EvaluateConfig, dtype: str
) -> Iterator[tuple[Batch, Detections]]:
    """Yield this process's batches of a split, each with its detections, with a progress bar."""
    device, shard = next(model.parameters()).device, (rank(), world_size())
    progress = partial(track, description="detecting", transient=True, disable=not is_main())
    if is_plain(evaluate):
        loader = eval_loader(index, data, batch_size=evaluate.batch_size, shard=shard)
        with closing(iter(loader)) as batches:
            yield from progress(predict(model, batches, device, dtype), total=len(loader))
    else:
        views = views_loader(index, data, evaluate.scales, batch_size=evaluate.batch_size, shard=shard)
        with closing(iter(views)) as batches_of_views:
            yield from progress(predict_views(model, batches_of_views, evaluate, device, dtype), total=len(views))


def _tensors(batch: Batch, detections: Detections) -> list[dict[str, Any]]:
    """Detections of each image without padding; boxes in original pixels."""
    boxes = original_boxes(batch, detections)
    tensors = []
    for n, count in enumerate(detections.num_detections.tolist()):
        found = {
            "boxes": boxes[n, :count],  # [k, 4] xyxy
            "scores": detections.scores[n, :count],
            "labels": detections.labels[n, :count],
        }
        if detections.mask_probs is not None:
            found["mask_probs"] = detections.mask_probs[n, :count]  # [k, M, M], in the frame of the box
        image = {"image_id": int(batch.image_ids[n]), "size": batch.original_sizes[n].tolist()}
        tensors.append(image | {name: value.cpu().clone() for name, value in found.items()})
    return tensors
