"""The console script: `maskrcnn <stage> …` is `python -m components.<stage> …` under one name;
`import`, a word of Python, is `components.import_`.

A stage's module, and torch with it, is imported only when that stage is called.
"""

import importlib
import keyword
import signal
import sys
from collections.abc import Sequence

from components import end_if_unread, end_process
from components.launch import handled

STAGES = {
    "recipe": "write a complete parameter file to params.yaml",
    "download": "fetch, generate or check the raw data set",
    "import": "take over a data set of YOLO, Pascal VOC, labelme, CVAT, Datumaro, or PNG masks",
    "prepare": "check every image and annotation once; write the index",
    "train": "train from params.yaml; continues where it was interrupted",
    "evaluate": "measure box and mask AP of a checkpoint, overall and per class",
    "predict": "find and draw the objects on any images",
    "benchmark": "measure throughput, step time and memory, also of torchvision",
    "record": "send MLflow what it has not received; complete the run's records for DVC",
    "stability": "train and evaluate several seeds; report mean, std and interval of AP",
    "compare": "test whether one configuration is better than another",
    "register": "take an evaluated model into MLflow's registry",
    "export": "write the network for other programs (ONNX, torch.export), a file for each image size",
    "report": "write an HTML page about finished runs, or the tables of README and docs/results.md",
    "pytorchjob": "train on Kubernetes: submit a PyTorchJob and follow it to its end",
    "pipeline": "run these stages as one pipeline, on Kubeflow or on this machine",
}
USAGE = "usage: maskrcnn <stage> [options] [section.key=value …]"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage that the first word names with the words that follow it."""
    try:
        try:
            _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            print(end="", flush=True)
    except OSError as error:  # stages handle their own
        end_if_unread(error)
        if error.errno is None:
            raise
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _main(words: Sequence[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
    elif words[0] == "--version":
        print(_version())
    elif words[0] in STAGES:
        _run(words[0], words[1:])
    else:
        print(f"error: {_unknown(words[0])}", file=sys.stderr)
        sys.exit(2)


def module_of(stage: str) -> str:
    """The module of a stage; one that is named like a keyword of Python ends with an underscore (PEP 8)."""
    floor = "pipelines" if stage == "pipeline" else "components"
    return f"{floor}.{stage}{'_' * keyword.iskeyword(stage)}"


def _run(stage: str, words: Sequence[str]) -> None:
    """Run a stage. Signals are handled from here on, before its imports: as PID 1 of a container they would be lost."""
    with handled([signal.SIGTERM, signal.SIGINT], end_process):
        try:
            importlib.import_module(module_of(stage)).main(words)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)


def _help() -> str:
    lines = [f"  {stage:<10} {purpose}" for stage, purpose in STAGES.items()]
    ending = (
        "`maskrcnn <stage> --help` shows a stage's options. "
        "All but recipe, import, compare and report RUN read params.yaml, which recipe writes."
    )
    return "\n".join([USAGE, "", "stages:", *lines, "", ending])


def _version() -> str:
    from importlib.metadata import version  # 40 ms that --help need not pay

    return f"maskrcnn-mlops {version('maskrcnn-mlops')}"


def _unknown(stage: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(stage, STAGES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(STAGES)}"
    return f"{stage!r} is not a stage; {hint}"


if __name__ == "__main__":
    main()
