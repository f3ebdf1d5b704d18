"""A stability study: trains the seeds that are missing, and summarises them all."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from components.cli import terminal
from components.config import Config
from components.studies.result import StabilityResult
from components.studies.seed import seed_config
from components.studies.seeds import find_finished, train_seeds
from components.studies.summary import summarise
from components.studies.tables import summary_metrics
from components.tracking.tracker import complete_records, open_tracker, send_rest


def train_study(config: Config, seeds: Sequence[int]) -> None:
    """Train and evaluate the unfinished seeds, `stability.parallel` at a time, within the study's MLflow run."""
    study, console = config.stability, terminal()
    configs = [seed_config(config, seed) for seed in seeds]
    missing = [one for one in configs if not config.train.resume or find_finished(one) is None]
    for one in configs:
        if one not in missing:
            console.print(f"seed {one.train.seed}: finished before, kept")
    if missing:
        with open_tracker(config, run_dir=study.output_dir, metrics_csv=False):  # seeds need it as their parent
            train_seeds(missing, study.parallel, console)
    for one in configs:
        _keep_evaluation(one)


def summarise_study(config: Config) -> StabilityResult:
    """Summarise the finished runs of all `stability.seeds`, in files and in MLflow."""
    study = config.stability
    configs = [seed_config(config, seed) for seed in study.seeds]
    known = _content(study.output_dir / "stability.json")
    result = summarise([one.train.output_dir for one in configs], study.output_dir)
    if _content(result.path) != known:
        with open_tracker(config, run_dir=study.output_dir, metrics_csv=False) as tracker:
            tracker.log_metrics(summary_metrics(result.report), step=len(study.seeds))
            for suffix in (".json", ".csv", ".md", ".png"):
                tracker.log_artifact(result.path.with_suffix(suffix))
    send_rest(config, run_dir=study.output_dir)
    for one in configs:
        send_rest(one, run_dir=one.train.output_dir)
    complete_records(study.output_dir)
    return result


def _keep_evaluation(config: Config) -> None:
    """Copy an evaluation to a separate folder for DVC, away from the changing content of the run's folder."""
    run_dir = config.train.output_dir
    folder = run_dir.parent / "evaluations"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(run_dir / "evaluation.json", folder / f"{run_dir.name}.json")


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
