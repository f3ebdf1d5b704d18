"""Train Mask R-CNN: from a prepared data set to checkpoints, a journal of losses and a tracked run.

Continues from `<train.output_dir>/last_checkpoint` if its configuration and data are the same; a run with another
configuration is moved aside, never overwritten. After training, the last checkpoint, or with train.patience the best
one, is evaluated (see --skip-test).
Several processes (`train.processes`, or torchrun) share each batch, so any number of them learns the same; all need
access to the same files. SIGTERM saves a checkpoint and exits with status 143, Ctrl-C with 130, during evaluation at
once; a second Ctrl-C ends training without saving.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components import evaluate
from components.cli import parse, spin_briefly, stage_parser, terminal, user_errors
from components.config import Config
from components.launch import relaunch
from model.data.index import CocoIndex


@dataclass(frozen=True)
class TrainResult:
    """Result of a training."""

    run_dir: Path
    checkpoint: Path
    step: int
    reached_target: bool  # True if training stopped early at evaluate.target_bbox_ap and target_segm_ap


def run(config: Config, *, skip_test: bool = False) -> TrainResult:
    """Train, then evaluate the result unless `skip_test`.

    Raises:
        Preempted: if a signal ended training early, or its evaluation; a checkpoint was saved.
        RunInUseError: if another stage writes into the run's folder.
    """
    from components.training.tracked import trained
    from model.distributed import is_main, pick_device, process_group
    from model.scoring.backends import choose_backend

    choose_backend(config.evaluate.backend)  # fail before hours of training
    device = pick_device(config.train.device)
    with process_group(device, config.train.timeout_s):
        console = terminal(quiet=not is_main())
        with trained(config, device, console) as (training, checkpoint):
            if not skip_test:
                evaluate.run(config)
    return TrainResult(training.run_dir, checkpoint, training.step, training.goals.reached_target)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn train`."""
    parser = stage_parser("train", __doc__)
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate after training")
    with user_errors():
        args, config = parse(parser, argv)
        spin_briefly()
        CocoIndex.open(config.data.prepared_dir, "train")  # reported, if missing, before torch is loaded
        if not relaunch("train", config.train.processes, argv):
            from torch.distributed.elastic.multiprocessing.errors import record

            record(run)(config, skip_test=args.skip_test)  # torchrun then reports why a process failed


if __name__ == "__main__":
    main()
