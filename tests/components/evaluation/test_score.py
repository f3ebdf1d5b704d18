"""Scores of a model that is still in training."""

from typing import Any

from components import evaluate
from components.config import Config
from components.evaluation.score import evaluate_model
from components.runs.trained import load_trained


def test_model_in_training_scores_the_same_and_stays_in_training(
    trained_run: Config, evaluated: tuple[evaluate.EvaluateResult, dict[str, Any]]
) -> None:
    model = load_trained(trained_run, "last").loaded.model.train()
    evaluation = evaluate_model(model, trained_run)
    assert evaluation.segm == evaluated[1]["segm"]
    assert model.training
