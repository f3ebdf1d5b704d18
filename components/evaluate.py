"""Score a trained model on a prepared split: COCO's box and mask AP, or recall of proposals, with curves and drawings.

By default it scores the last checkpoint of train.output_dir, or with train.patience the best one, with the network and
image sizes it was trained with. Writes evaluation.json, scores.json, analysis.json (best thresholds, confusions,
calibration, likely label errors), inference/ and plots/ into train.output_dir. Scores are fractions, or null without
ground truth.
`evaluate.skip_eval=true` writes predictions without scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from components.cli import add_checkpoint, parse, spin_briefly, stage_parser, user_errors
from components.config import Config
from components.launch import relaunch
from components.runs.result import final_checkpoint, require_as_trained
from model.data.index import CocoIndex

if TYPE_CHECKING:
    from model.scoring.coco import CocoEvaluation


@dataclass(frozen=True)
class EvaluateResult:
    """Result of an evaluation."""

    run_dir: Path
    checkpoint: str
    evaluation: "CocoEvaluation | None"  # None with evaluate.skip_eval


def run(config: Config, *, checkpoint: str | None = None) -> EvaluateResult:
    """Evaluate a checkpoint and write all results into `train.output_dir`.

    Args:
        checkpoint: `last`, `best` or a path; by default training's result.

    Raises:
        UserError: if the checkpoint, prepared data with its classes, or evaluate.backend is missing.
    """
    from components.evaluation.checkpoint import evaluate

    name, evaluation = evaluate(config, checkpoint or final_checkpoint(config.train.output_dir, config.train))
    return EvaluateResult(config.train.output_dir, name, evaluation)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn evaluate`."""
    parser = stage_parser("evaluate", __doc__)
    add_checkpoint(parser)
    with user_errors():
        args, config = parse(parser, argv)
        spin_briefly()
        # Missing files are reported before torch is loaded.
        require_as_trained(config, args.checkpoint, args.overrides)
        CocoIndex.open(config.data.prepared_dir, config.evaluate.split).require_annotations()
        if not relaunch("evaluate", config.train.processes, argv):
            run(config, checkpoint=args.checkpoint)


if __name__ == "__main__":
    main()
