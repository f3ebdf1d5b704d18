"""Train with several seeds and report mean ± standard deviation of AP, with a 95 % interval.

Each of stability.seeds is trained and evaluated as a run in `<stability.output_dir>/seed_<seed>/`. A seed determines
initialisation, data order, sampling and augmentation; all else is equal. Finished runs are kept and interrupted ones
continue, so the same command resumes a study or adds seeds to it. Writes stability.json, .csv, .md and .png into
stability.output_dir. In MLflow the study is a run with a child run per seed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from components.cli import parse, stage_parser, user_errors
from components.config import Config
from components.params import ConfigError
from components.studies.seeds import find_finished, seed_config, train_seeds
from components.studies.summary import StabilityError, StabilityResult, summarise
from components.studies.tables import markdown_note, summary_metrics, terminal_table
from components.tracking.tracker import open_tracker, send_rest

__all__ = ["StabilityError", "StabilityResult", "run", "summarise", "summarise_study", "train_study"]


def run(config: Config) -> StabilityResult:
    """Train and evaluate each of `stability.seeds` that is not finished, and summarise them all.

    Raises:
        StabilityError: if stability.output_dir has runs with another configuration or other data, or a seed failed.
        SystemExit: with status 128 + the signal's number, if a signal ended the study early.
    """
    train_study(config, config.stability.seeds)
    return summarise_study(config)


def train_study(config: Config, seeds: Sequence[int]) -> None:
    """Train and evaluate the unfinished seeds, `stability.parallel` at a time, within the study's MLflow run."""
    if config.evaluate.skip_eval:
        raise ConfigError("evaluate.skip_eval: must be false for a study, which needs scores, got true")
    study, console = config.stability, Console()
    configs = [seed_config(config, seed) for seed in seeds]
    missing = [one for one in configs if not config.train.resume or find_finished(one) is None]
    for one in configs:
        if one not in missing:
            console.print(f"seed {one.train.seed}: finished before, kept", highlight=False)
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
    return result


def _keep_evaluation(config: Config) -> None:
    """Copy an evaluation to a separate folder for DVC, away from the changing content of the run's folder."""
    run_dir = config.train.output_dir
    folder = run_dir.parent / "evaluations"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(run_dir / "evaluation.json", folder / f"{run_dir.name}.json")


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _show(result: StabilityResult) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(terminal_table(result.report))
    console.print(markdown_note(result.report))
    console.print(f"{result.path}, .csv, .md, .png")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn stability`."""
    parser = stage_parser("stability", __doc__)
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--seed", type=int, help="train and evaluate only this one of stability.seeds, without a summary")
    one.add_argument("--summary", action="store_true", help="summarise the finished runs without training")
    with user_errors():
        args, config = parse(parser, argv)
        if args.seed is not None:
            if args.seed not in config.stability.seeds:
                raise ConfigError(
                    f"--seed: must be one of stability.seeds, {list(config.stability.seeds)}, got {args.seed}"
                )
            train_study(config, [args.seed])
        else:
            _show(summarise_study(config) if args.summary else run(config))


if __name__ == "__main__":
    main()
