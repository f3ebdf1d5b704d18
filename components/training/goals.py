"""Goals of a training, judged by the scores of evaluated epochs: the best checkpoint, the target and patience."""

from collections.abc import Mapping
from typing import Any

from model.config import EvaluateConfig
from model.scoring.names import ResultType


class Goals:
    """Best AP so far, the AP at which training ends, and the patience without a better one."""

    def __init__(self, evaluate: EvaluateConfig, patience: int) -> None:
        """Begin without a score.

        Args:
            patience: evaluations in a row without a better AP after which training ends; 0: it goes on.
        """
        self.best_ap, self.evaluations_since_best, self.reached_target = -1.0, 0, False
        self._patience = patience
        self._targets: dict[ResultType, float] = {"bbox": evaluate.target_bbox_ap, "segm": evaluate.target_segm_ap}

    def judge(self, scores: Mapping[ResultType, float], main_score: float) -> bool:
        """Take the scores of an epoch, by result type, and return whether it is the best by the main one."""
        targets = {result_type: least for result_type, least in self._targets.items() if result_type in scores}
        self.reached_target = any(targets.values()) and all(
            scores[result_type] >= least for result_type, least in targets.items()
        )
        is_best = main_score > self.best_ap
        self.best_ap = max(main_score, self.best_ap)
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        return is_best

    @property
    def is_out_of_patience(self) -> bool:
        """True if too many epochs in a row were not better than the best."""
        return 0 < self._patience <= self.evaluations_since_best

    @property
    def end_training(self) -> bool:
        """True if the target is reached or patience has run out."""
        return self.reached_target or self.is_out_of_patience

    def state_dict(self) -> dict[str, Any]:
        """State of a checkpoint."""
        return {
            "best_ap": self.best_ap,
            "reached_target": self.reached_target,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint, of which this is a part."""
        self.best_ap, self.reached_target = state["best_ap"], state["reached_target"]
        self.evaluations_since_best = state.get("evaluations_since_best", 0)  # earlier versions had no patience
