"""A pipeline on this machine: kfp's local runner takes the same definition, and each step is a process of this Python.

The runner is kfp's own, with its limits: no step is retried or cached, two seeds at most run at a time, and if one seed
fails the others are still trained. Images, volumes and resources mean nothing here; training takes
`train.processes` processes.
"""

import os
import signal
import sys
import tempfile
import warnings
from urllib.parse import urlsplit

import psutil
from kfp import local

from components.cli import terminal
from components.config import Config
from components.launch import STATUS_OF_SIGTERM, handled
from components.params import config_text
from pipelines.compile import Request, define, output_dir
from pipelines.placement import on_this_machine

_STEP = "kfp.dsl.executor_main"  # in the command line of every step


def run_local(request: Request) -> int:
    """Run the pipeline of a request; steps and their logs are printed as they run.

    Returns:
        0, or 1 if a step failed.

    Raises:
        ConfigError: if the parameter file or an override cannot be used.
    """
    config = request.config
    pipeline = define(request.pipeline, on_this_machine(config), _params(config), [])
    outputs = output_dir(config, request.pipeline).parent / "pipeline"  # beside the run, which training may move aside
    with warnings.catch_warnings(), handled([signal.SIGTERM], _end_with_steps):
        warnings.filterwarnings("ignore", message="You may be attemping to run a task", category=RuntimeWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
        scratch = tempfile.mkdtemp(prefix="maskrcnn-")  # deleted by the runner
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(outputs), workspace_root=scratch)
        try:
            pipeline()
        except RuntimeError as error:  # the runner's word for a step that failed
            print(f"error: {error} Its log is above.", file=sys.stderr)
            return 1
    terminal(soft_wrap=True).print(f"result: {output_dir(config, request.pipeline)}\nartifacts: {outputs}")
    return 0


def _params(config: Config) -> str:
    """The parameter file for the steps. A password goes by the environment: command lines can be read by all."""
    uri = config.tracking.uri
    if urlsplit(uri).password is None:
        return config_text(config)
    os.environ.setdefault("MLFLOW_TRACKING_URI", uri)
    return config_text(
        config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "sqlite:///mlflow.db"})})
    )


def _end_with_steps(*_: object) -> None:
    """Tell the steps to end, so that training saves a checkpoint, wait for that, and leave."""
    while steps := _running_steps():  # the runner begins those that are still in its queue
        for step in steps:
            step.terminate()
        psutil.wait_procs(steps)
    os._exit(STATUS_OF_SIGTERM)  # raising would begin the steps that still wait for a thread


def _running_steps() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:  # it has ended meanwhile
            continue
        if _STEP in words:  # the word by itself: the shell around a step has it inside a longer one
            found.append(process)
    return found
