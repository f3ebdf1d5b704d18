"""Metadata that pipeline steps leave with their artifacts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from components.config import Config
from components.kubeflow.artifacts import describe_evaluation


def test_an_evaluation_names_its_mlflow_run_once_there_is_one(tmp_path: Path) -> None:
    config = Config()
    config = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": tmp_path})})
    evaluation = {"bbox": {"AP": 0.5}, "checkpoint": "step_1.pt", "images": 3, "detections": 9, "data_hash": "d"}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation | {"commit": "c"}))

    def described(**state: Any) -> dict[str, Any]:
        (tmp_path / "mlflow_run.json").write_text(json.dumps(state))
        metrics, page = (SimpleNamespace(path=str(tmp_path / name), metadata={}) for name in ("metrics", "page"))
        describe_evaluation(metrics, page, config)
        return {name: value for name, value in metrics.metadata.items() if name.startswith("mlflow")}

    assert described(uri="http://mlflow:5000") == {}  # the server was not reached yet
    assert described(uri="http://mlflow:5000", run_id="r") == {
        "mlflow_run_id": "r",
        "mlflow_uri": "http://mlflow:5000",
        "mlflow_link": "http://mlflow:5000/#/runs/r",
    }
    assert described(uri="sqlite:///mlflow.db", run_id="r") == {
        "mlflow_run_id": "r",
        "mlflow_uri": "sqlite:///mlflow.db",
    }
