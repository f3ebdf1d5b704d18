"""A prepared data set of four images like COCO's a split and an untrained checkpoint, for the stages that come after
training.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from components import evaluate, prepare
from components.config import Config
from model.config import DataConfig, EvaluateConfig, ModelConfig, TrainConfig
from model.data.index import CocoIndex
from model.engine.checkpoint import save_checkpoint
from model.network.mask_rcnn import MaskRCNN


def small_config(coco_like: Path, folder: Path) -> Config:
    return Config(
        data=DataConfig(
            source="custom",
            raw_dir=coco_like,
            prepared_dir=folder / "prepared",
            train_images="train2017",
            train_annotations="annotations/instances_train2017.json",
            val_images="val2017",
            val_annotations="annotations/instances_val2017.json",
            train_limit=4,
            val_limit=4,
            min_sizes_px=(96,),
            max_size_px=160,
            eval_min_size_px=96,
            eval_max_size_px=160,
            buckets=((96, 160), (160, 96)),
            workers=0,
        ),
        # Untrained heads are unsure: the threshold lies below the 1/81 that each class then gets.
        model=ModelConfig(
            backbone="resnet18",
            stem_channels=32,
            weights="none",
            norm="batch_norm",
            fpn_channels=32,
            box_head_channels=64,
            mask_head_channels=32,
            score_threshold=0.01,
            rpn_post_nms_top_n_test=20,
            detections_per_image=20,
        ),
        train=TrainConfig(output_dir=folder / "runs" / "small", device="cpu"),
        evaluate=EvaluateConfig(batch_size=2, drawn_images=2),
    )


@pytest.fixture(scope="session")
def trained_run(coco_like: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The configuration of a run whose folder holds a checkpoint of step 7. MLflow is off."""
    config = small_config(coco_like, tmp_path_factory.mktemp("trained"))
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})})
    prepare.run(config)
    index = CocoIndex.open(config.data.prepared_dir, "train")
    torch.manual_seed(0)
    model = MaskRCNN(config.model, len(index.class_names))
    state = {
        "model": model.state_dict(),
        "config": config.model_dump(mode="json"),
        "class_names": list(index.class_names),
        "category_ids": list(index.category_ids),
        "data_hash": index.data_hash,
    }
    save_checkpoint(config.train.output_dir, 7, state)
    return config


@pytest.fixture(scope="session")
def evaluated(trained_run: Config) -> tuple[evaluate.EvaluateResult, dict[str, Any]]:
    """That run evaluated, and what its evaluation.json says."""
    result = evaluate.run(trained_run)
    return result, json.loads((result.run_dir / "evaluation.json").read_text())


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make. Only to be copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts a stage in forked processes of one group; see ranks.py."""
    with ExitStack() as stack:

        def start(count: int, *command: str, threads: int = 0) -> Any:
            folder = tmp_path_factory.mktemp("ranks")
            return stack.enter_context(neighbour("ranks").Ranks(folder, count, *command, threads=threads))

        yield start


@pytest.fixture(scope="session")
def kubernetes_stub() -> ModuleType:
    """The API server of cluster/kubernetes_stub.py."""
    return neighbour("cluster/kubernetes_stub")


@pytest.fixture
def make_cluster(
    kubernetes_stub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Starts a cluster (see cluster/kubernetes_stub.py) whose operator is a function, and points the client to it."""
    clusters = []

    def start(operator: Callable[[Any, str], None] | None = None) -> Any:
        clusters.append(kubernetes_stub.Cluster(operator))
        monkeypatch.setenv("KUBECONFIG", str(clusters[-1].kubeconfig(tmp_path)))
        return clusters[-1]

    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    yield start
    for cluster in clusters:
        cluster.close()


@pytest.fixture(scope="session")
def mlflow_server() -> ModuleType:
    """The servers of tracking/mlflow_server.py."""
    return neighbour("tracking/mlflow_server")


@pytest.fixture(scope="session")
def fake_store() -> ModuleType:
    """The server of tracking/fake_store.py."""
    return neighbour("tracking/fake_store")


def neighbour(name: str) -> ModuleType:
    """A module by its path from this folder: under importmode=importlib tests cannot import one another."""
    spec = importlib.util.spec_from_file_location(Path(name).name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
