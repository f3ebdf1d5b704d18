"""Register a trained model in MLflow: `maskrcnn register [RUN]`; RUN is a run's folder (default: train.output_dir).

The checkpoint that `maskrcnn evaluate` scored last is registered if it reaches registry.min_bbox_ap and
registry.min_segm_ap. It loads without this package, with
mlflow.pyfunc.load_model("models:/maskrcnn@champion").predict([bytes of an image file]) or `mlflow models serve`.
Its best thresholds, as `evaluate` found them, are registered with it.
The alias `champion` moves to it if it beats the current champion on the same data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.cli import parse, stage_parser, terminal, user_errors
from components.config import Config
from components.tracking.client import TrackingError
from components.tracking.scores import read_scored, shortfall
from model.engine.pointers import require_file
from model.errors import UserError


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
    checkpoint, scored = read_scored(run_dir)
    if lacking := shortfall(config.registry, scored):
        result = RegisterResult(None, False, f"not registered: {lacking}")
    else:
        require_file(run_dir / checkpoint)
        from components.tracking.registration import register

        name = config.registry.model_name
        version, is_champion, verdict = register(config, run_dir / checkpoint, scored)
        reason = f"{name} version {version}: {verdict}"
        result = RegisterResult(version, is_champion, reason, f"models:/{name}/{version}")
    terminal().print(result.reason, soft_wrap=True)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn register`."""
    parser = stage_parser("register", __doc__, operands="RUN", operands_help="folder of a run (train.output_dir)")
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
