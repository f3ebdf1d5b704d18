"""Complete a run's records: MLflow gets what it has not received yet, and `dvc repro` caches the files.

The records are the journal (log.jsonl), the machine's load (system.jsonl) and the MLflow run (mlflow_run.json) in
train.output_dir. Training, evaluation and benchmark write to them, so this is the last stage of the local pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from model.errors import UserError


@dataclass(frozen=True)
class RecordResult:
    """Files of a run's records."""

    files: list[Path]


def run(config: Config) -> RecordResult:
    """Send what is pending, and write an empty file for each record that the run does not have.

    Raises:
        UserError: if train.output_dir holds no run.
        RunInUseError: if another stage writes into the run's folder.
    """
    run_dir = config.train.output_dir
    if not (run_dir / "log.jsonl").is_file():
        raise UserError(f"{run_dir}: must hold a run, but has no log.jsonl, which `maskrcnn train` writes")
    from components.runs.lock import writing
    from components.tracking.tracker import complete_records, send_rest

    with writing(run_dir, "record"):
        send_rest(config, run_dir=run_dir)
        return RecordResult(complete_records(run_dir))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn record`."""
    with user_errors():
        _, config = parse(stage_parser("record", __doc__), argv)
        print(*run(config).files, sep="\n")


if __name__ == "__main__":
    main()
