"""Evaluators for `evaluate.backend`: pycocotools, which defines the numbers, and hotcoco, which computes them faster.

Shapes: T IoU thresholds, R recall thresholds, K classes by category id, A area ranges (all, small, medium, large),
M limits of detections per image and class (1, 10, 100, and evaluate.max_detections; proposals: 100, 1000 per image).
tests/model/scoring/test_backends.py requires the two to be equal bit for bit.
"""

import contextlib
import functools
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from model.errors import UserError
from model.scoring.names import COCO_MAX_DETECTIONS, IouType

Backend = Literal["hotcoco", "pycocotools"]
AnyBackend = Literal["auto", "hotcoco", "pycocotools"]  # evaluate.backend
Result = dict[str, Any]

COCO_LIMITS = (1, 10, COCO_MAX_DETECTIONS)
PROPOSAL_LIMITS = (100, 1000)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curves:
    """Precision and recall of an evaluator; -1 for a class without ground truth in an area range."""

    precision: NDArray[np.float64]  # [T, R, K, A, M]
    recall: NDArray[np.float64]  # [T, K, A, M]


class Evaluator(Protocol):
    """Evaluator of lists of results against one ground truth; it changes neither."""

    def load(self, results: list[Result]) -> Any:
        """Convert results of known images to the evaluator's own form; an empty list is allowed."""

    def score(self, loaded: Any, iou_type: IouType, limits: Sequence[int] = COCO_LIMITS) -> Curves:
        """Match the return value of `load` with the ground truth; `limits` ascend."""

    def score_proposals(self, loaded: Any) -> Curves:
        """Match boxes regardless of class, up to PROPOSAL_LIMITS per image: K is 1."""


class PycocotoolsEvaluator:
    """Reference evaluator, in Python and C on one core."""

    def __init__(self, ground_truth: COCO) -> None:
        self._ground_truth = ground_truth

    def load(self, results: list[Result]) -> COCO:
        """See Evaluator."""
        if not results:  # loadRes fails on an empty list
            dataset = self._ground_truth.dataset
            return index_dataset({"images": dataset["images"], "categories": dataset["categories"], "annotations": []})
        with _silence():
            return self._ground_truth.loadRes(
                [dict(result) for result in results]
            )  # loadRes writes areas and ids into them

    def score(self, loaded: COCO, iou_type: IouType, limits: Sequence[int] = COCO_LIMITS) -> Curves:
        """See Evaluator."""
        evaluator = COCOeval(self._ground_truth, loaded, iou_type)
        evaluator.params.maxDets = list(limits)
        return self._curves(evaluator)

    def score_proposals(self, loaded: COCO) -> Curves:
        """See Evaluator."""
        evaluator = COCOeval(self._ground_truth, loaded, "bbox")
        evaluator.params.useCats, evaluator.params.maxDets = 0, list(PROPOSAL_LIMITS)
        return self._curves(evaluator)

    def _curves(self, evaluator: COCOeval) -> Curves:
        with _silence():
            evaluator.evaluate()
            evaluator.accumulate()
        return Curves(evaluator.eval["precision"], evaluator.eval["recall"])


class HotcocoEvaluator:
    """Equivalent evaluator in Rust, on all cores (RAYON_NUM_THREADS limits them)."""

    def __init__(self, ground_truth: COCO) -> None:
        self._hotcoco = _import_hotcoco()
        self._ground_truth = self._hotcoco.COCO(ground_truth.dataset)

    def load(self, results: list[Result]) -> Any:
        """See Evaluator."""
        return self._ground_truth.load_res(results)

    def score(self, loaded: Any, iou_type: IouType, limits: Sequence[int] = COCO_LIMITS) -> Curves:
        """See Evaluator."""
        evaluator = self._hotcoco.COCOeval(self._ground_truth, loaded, iou_type)
        evaluator.params.max_dets = list(limits)
        return self._curves(evaluator)

    def score_proposals(self, loaded: Any) -> Curves:
        """See Evaluator."""
        evaluator = self._hotcoco.COCOeval(self._ground_truth, loaded, "bbox")
        evaluator.params.use_cats, evaluator.params.max_dets = False, list(PROPOSAL_LIMITS)
        return self._curves(evaluator)

    def _curves(self, evaluator: Any) -> Curves:
        evaluator.evaluate()
        evaluator.accumulate()
        found = evaluator.eval  # each access copies
        return Curves(found["precision"], found["recall"])


def choose_backend(asked: AnyBackend) -> Backend:
    """Choose the evaluator; `auto` is hotcoco if installed, else pycocotools, with one warning.

    Raises:
        UserError: if hotcoco is asked for and cannot be imported.
    """
    if asked == "pycocotools":
        return asked
    try:
        _import_hotcoco()
    except ImportError as error:
        if asked == "hotcoco":
            raise UserError(
                f"evaluate.backend=hotcoco: hotcoco must be installed, but cannot be imported ({error}); run `pip "
                "install hotcoco`, "
                "or set evaluate.backend to auto or pycocotools, which gives the same numbers more slowly"
            ) from error
        _warn_once(f"hotcoco cannot be imported ({error}); using pycocotools, which gives the same numbers more slowly")
        return "pycocotools"
    return "hotcoco"


def open_evaluator(backend: Backend, ground_truth: COCO) -> Evaluator:
    """Make an evaluator for a ground truth from `load_ground_truth`."""
    return HotcocoEvaluator(ground_truth) if backend == "hotcoco" else PycocotoolsEvaluator(ground_truth)


def index_dataset(dataset: dict[str, Any]) -> COCO:
    """Index parsed COCO JSON with pycocotools."""
    coco = COCO()
    coco.dataset = dataset
    with _silence():
        coco.createIndex()
    return coco


def _import_hotcoco() -> ModuleType:
    import hotcoco

    return hotcoco


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _silence() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(io.StringIO())
