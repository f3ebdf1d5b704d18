"""Register a trained model in MLflow: `maskrcnn register [RUN]`; RUN is a run's folder (default: train.output_dir).

The checkpoint that `maskrcnn evaluate` scored last is registered if it reaches registry.min_bbox_ap and
registry.min_segm_ap. It loads without this package, with
mlflow.pyfunc.load_model("models:/maskrcnn@champion").predict([bytes of an image file]) or `mlflow models serve`.
The alias `champion` moves to it if it beats the current champion on the same data.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from components.cli import parse, stage_parser, user_errors
from components.config import Config, PredictConfig
from components.runs.trained import Trained, load_trained
from components.tracking.registry import Registry, Version, answers, write_model
from components.tracking.server import TrackingError, tracking_uri
from components.tracking.tracker import delivered_run, open_tracker
from model.engine.checkpoint import save_weights
from model.errors import UserError
from model.scoring.names import IOU_TYPES, TITLES


@dataclass(frozen=True)
class Scored:
    """Scores of a checkpoint, and the data they refer to."""

    ap: dict[str, float]  # IoU type (bbox, segm) → AP; empty for proposals
    data_hash: str

    def tags(self) -> dict[str, str]:
        """The scores as tags of a registry version."""
        return {f"ap/{iou_type}": repr(ap) for iou_type, ap in self.ap.items()} | {
            "evaluation.data_hash": self.data_hash
        }

    @staticmethod
    def of_tags(tags: dict[str, str]) -> "Scored":
        """Parse the tags written by `tags`."""
        ap: dict[str, float] = {
            iou_type: float(tags[f"ap/{iou_type}"]) for iou_type in IOU_TYPES if f"ap/{iou_type}" in tags
        }
        return Scored(ap, tags.get("evaluation.data_hash", ""))


@dataclass(frozen=True)
class RegisterResult:
    """Outcome of a registration."""

    version: str | None  # None if the model is not good enough
    is_champion: bool
    reason: str
    model_uri: str = ""  # URI for mlflow.pyfunc.load_model


def run(config: Config) -> RegisterResult:
    """Register the evaluated checkpoint of `train.output_dir` if its scores suffice; a checkpoint has only one version.

    Raises:
        UserError: if there is no evaluation, or its checkpoint is missing.
        TrackingError: if MLflow is off, or cannot be reached.
    """
    if not config.tracking.enabled:
        raise TrackingError("tracking.enabled: must be true to register a model in MLflow, got false")
    run_dir = config.train.output_dir
    checkpoint, scored = read_evaluation(run_dir / "evaluation.json")
    if lacking := shortfall(config, scored):
        result = RegisterResult(None, False, f"not registered: {lacking}")
    else:
        result = _register(config, run_dir / checkpoint, scored)
    Console().print(result.reason, highlight=False, soft_wrap=True)
    return result


def read_evaluation(path: Path) -> tuple[str, Scored]:
    """Read the evaluated checkpoint's name and scores from an evaluation.json.

    Raises:
        UserError: if the file is missing or has no scores.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such evaluation; score the model with `maskrcnn evaluate` before registering it")
    document = json.loads(path.read_text(encoding="utf-8"))
    scores = {iou_type: document.get(iou_type) or {} for iou_type in IOU_TYPES}
    ap: dict[str, float] = {
        iou_type: of_iou_type["AP"] for iou_type, of_iou_type in scores.items() if of_iou_type.get("AP") is not None
    }
    if not ap and not document.get("proposals"):
        raise UserError(f"{path}: must have AP, got none; evaluate on annotated images, without evaluate.skip_eval")
    return document["checkpoint"], Scored(ap, document["data_hash"])


def shortfall(config: Config, scored: Scored) -> str:
    """Reason why the scores do not suffice: each AP below its registry.min_…; empty if they do."""
    if not scored.ap:
        return "proposals have no AP, which registration requires"
    minima = {"bbox": config.registry.min_bbox_ap, "segm": config.registry.min_segm_ap}
    lacking = [
        f"{TITLES[iou_type]} AP {scored.ap.get(iou_type, 0.0):.4f} is below registry.min_{iou_type}_ap {minima[iou_type]:.4f}"
        for iou_type in IOU_TYPES
        if scored.ap.get(iou_type, 0.0) < minima[iou_type]
    ]
    return ", ".join(lacking)


def beats(version: Version, champion: Version | None) -> tuple[bool, str]:
    """Decide if a version should be champion, and why: by mask AP, or by box AP if one of the two has no masks."""
    if champion is None:
        return True, "the champion, as the first version"
    if champion.number == version.number:
        return True, "already the champion"
    new, old = Scored.of_tags(version.tags), Scored.of_tags(champion.tags)
    if new.data_hash != old.data_hash:
        return False, (
            f"not the champion: the champion, version {champion.number}, was evaluated on other data; evaluate its run on this "
            "data and register it again, or set the alias in MLflow"
        )
    iou_type = next((iou_type for iou_type in ("segm", "bbox") if iou_type in new.ap and iou_type in old.ap), None)
    if iou_type is None:
        return False, f"not the champion: the champion, version {champion.number}, has no AP to compare with"
    comparison = (
        f"{TITLES[iou_type]} AP {new.ap[iou_type]:.4f} against {old.ap[iou_type]:.4f} of version {champion.number}"
    )
    is_better = new.ap[iou_type] > old.ap[iou_type]
    return is_better, f"{'the new champion' if is_better else 'not the champion'}: {comparison}"


def _register(config: Config, checkpoint: Path, scored: Scored) -> RegisterResult:
    name, uri = config.registry.model_name, tracking_uri(config.tracking)
    trained = load_trained(config, str(checkpoint))
    with open_tracker(trained.config, run_dir=config.train.output_dir, metrics_csv=False):
        pass  # opening the tracker creates the run and sends what earlier stages could not
    run_id = delivered_run(config.train.output_dir)
    with answers(uri):
        registry = Registry(uri, name)
        version = _version(registry, run_id, trained, scored, config.predict)
        is_champion, verdict = beats(version, registry.champion())
        if is_champion:
            registry.crown(version)
    reason = f"{name} version {version.number}: {verdict}"
    return RegisterResult(version.number, is_champion, reason, f"models:/{name}/{version.number}")


def _version(registry: Registry, run_id: str, trained: Trained, scored: Scored, predict: PredictConfig) -> Version:
    """Return the checkpoint's version: a new one, or its existing one with updated scores."""
    with trained.loaded.path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    identity = {"run_id": run_id, "checkpoint_sha256": digest}
    known = registry.find(identity)
    if known is not None:
        return registry.retag(known, scored.tags())
    details = {"checkpoint": trained.name, "training.data_hash": trained.loaded.data_hash}
    with TemporaryDirectory() as scratch:
        weights, files = Path(scratch) / "model.pt", Path(scratch) / "files"
        save_weights(trained.loaded, weights)
        write_model(weights, files, predict)
        return registry.add(run_id, files, step=trained.loaded.step, tags=identity | details | scored.tags())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn register`."""
    parser = stage_parser("register", __doc__, operands="RUN", operands_help="folder of a run")
    with user_errors():
        args, config = parse(parser, argv)
        if len(args.operands) > 1:
            raise UserError(f"register: must have at most one run, got {' '.join(args.operands)}")
        for run_dir in args.operands:
            train = config.train.model_copy(update={"output_dir": Path(run_dir)})
            config = config.model_copy(update={"train": train})
        run(config)


if __name__ == "__main__":
    main()
