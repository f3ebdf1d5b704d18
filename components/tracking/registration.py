"""Registration of a checkpoint in MLflow: one version of the model, which becomes the champion if it is better."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from components.config import Config
from components.runs.lock import writing
from components.runs.thresholds import best_thresholds, find_thresholds
from components.runs.trained import Trained, load_trained
from components.tracking.client import check_server, make_client, tracking_uri
from components.tracking.registry import Registry, Version, answers, write_model
from components.tracking.scores import Scored, beats
from components.tracking.tracker import delivered_run, open_tracker
from model.engine.checkpoint import save_weights


def register(config: Config, checkpoint: Path, scored: Scored) -> tuple[str, bool, str]:
    """Register a checkpoint of the run `train.output_dir`.

    Returns:
        Number of its version, if it is the champion, and why.

    Raises:
        TrackingError: if MLflow cannot be reached.
        RunInUseError: if another stage writes into the run's folder.
    """
    with writing(config.train.output_dir, "register"):
        return _register(config, checkpoint, scored)


def _register(config: Config, checkpoint: Path, scored: Scored) -> tuple[str, bool, str]:
    name, uri = config.registry.model_name, tracking_uri(config.tracking)
    make_client(uri)  # sets the limits of requests
    check_server(uri, 3, "to register a model")
    trained = load_trained(config, str(checkpoint))
    with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False):
        pass  # opening the tracker creates the run and sends what earlier stages could not
    run_id = delivered_run(config.train.output_dir)
    with answers(uri):
        registry = Registry(uri, name)
        version = _version(registry, run_id, trained, scored, config)
        is_champion, verdict = beats(version, registry.champion())
        if is_champion:
            registry.set_champion(version)
    return version.number, is_champion, verdict


def _version(registry: Registry, run_id: str, trained: Trained, scored: Scored, config: Config) -> Version:
    """Return the checkpoint's version: a new one, or its existing one with updated scores."""
    with trained.loaded.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    identity = {"run_id": run_id, "checkpoint_sha256": digest}
    known = registry.find(identity)
    if known is not None:
        return registry.retag(known, scored.tags())  # not best_threshold: it is that of the version's file
    best = find_thresholds(trained.loaded.path, config.train.output_dir)
    details = {"checkpoint": trained.name, "training.data_hash": trained.loaded.data_hash}
    tags = identity | details | scored.tags() | ({"best_threshold": repr(best.of_all)} if best else {})
    with TemporaryDirectory() as scratch:
        weights, files = Path(scratch) / "model.pt", Path(scratch) / "files"
        save_weights(trained.loaded, weights)
        extra = {}
        if best:
            extra["thresholds"] = Path(scratch) / "thresholds.json"
            extra["thresholds"].write_text(
                json.dumps(asdict(best), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        predict = config.predict
        if predict.score_threshold == "best":  # the default of requests is one number for all classes
            best = best_thresholds(trained.loaded.path, config.train.output_dir)
            predict = predict.model_copy(update={"score_threshold": best.of_all})
        write_model(weights, files, predict, extra)
        return registry.add(run_id, files, step=trained.loaded.step, tags=tags)
