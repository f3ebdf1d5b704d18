"""Train with several seeds and report mean ± standard deviation of AP, with a 95 % interval.

Each of stability.seeds is trained and evaluated as a run in `<stability.output_dir>/seed_<seed>/`. A seed determines
initialisation, data order, sampling and augmentation; all else is equal. Finished runs are kept and interrupted ones
continue, so the same command resumes a study or adds seeds to it. Writes stability.json, .csv, .md and .png into
stability.output_dir. In MLflow the study is a run with a child run per seed.
"""

from collections.abc import Sequence

from components.cli import parse, stage_parser, terminal, user_errors
from components.config import Config
from components.params import ConfigError
from components.runs.result import read_result
from components.studies.result import StabilityResult
from components.studies.seed import seed_dir
from model.data.index import CocoIndex


def run(config: Config) -> StabilityResult:
    """Train and evaluate each of `stability.seeds` that is not finished, and summarise them all.

    Raises:
        ConfigError: with evaluate.skip_eval.
        StabilityError: if stability.output_dir has runs with another configuration or other data, or a seed failed.
        UserError: if the data are not prepared.
        SystemExit: with status 128 + the signal's number, if a signal ended the study early.
    """
    _require_inputs(config)
    from components.studies.study import summarise_study, train_study

    train_study(config, config.stability.seeds)
    return summarise_study(config)


def _require_inputs(config: Config) -> None:
    """Report what training would lack before torch is loaded."""
    if config.evaluate.skip_eval:
        raise ConfigError("evaluate.skip_eval: must be false for a study, which needs scores, got true")
    for split in {"train", config.evaluate.split}:
        CocoIndex.open(config.data.prepared_dir, split)


def _show(result: StabilityResult) -> None:
    from components.studies.tables import markdown_note, terminal_table

    console = terminal(soft_wrap=True)
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
        if args.seed is not None and args.seed not in config.stability.seeds:
            raise ConfigError(
                f"--seed: must be one of stability.seeds, {list(config.stability.seeds)}, got {args.seed}"
            )
        if args.seed is None and not args.summary:
            _show(run(config))
            return
        if args.summary:
            for seed in config.stability.seeds:
                read_result(seed_dir(config.stability, seed))  # reported, if missing, before torch is loaded
            from components.studies.study import summarise_study

            _show(summarise_study(config))
        else:
            _require_inputs(config)
            from components.studies.study import train_study

            train_study(config, [args.seed])


if __name__ == "__main__":
    main()
