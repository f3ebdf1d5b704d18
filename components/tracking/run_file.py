"""`mlflow_run.json` of a run's folder: its MLflow run, and what that has not received."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from model.files import read_json

RUN_FILE = "mlflow_run.json"
RUNNING = "RUNNING"


class Item(BaseModel):
    """Item for the server that is not a metric."""

    kind: str
    arguments: dict[str, Any]
    tries: int = 0  # failed tries of an artifact


class RunFile(BaseModel, extra="forbid"):
    """`mlflow_run.json`."""

    run_id: str = ""
    earlier_ids: list[str] = []  # runs of this folder on other servers or in other experiments, latest first
    uri: str = ""
    experiment: str = ""
    parent_id: str = ""  # run id of the parent
    dvc_experiment: str = ""  # name of the DVC experiment that last wrote here
    sent_lines: int = 0  # number of sent lines of log.jsonl
    sent_system_lines: int = 0  # number of sent lines of system.jsonl
    outages: int = 0  # number of times the server was unavailable
    folder: str = ""  # absolute path of the run's folder; in a copy of it, that of the original
    status: str = "FINISHED"  # status that the last stage ended with; RUNNING: one is running, or was killed
    waiting: list[Item] = []  # oldest first

    @staticmethod
    def read(path: Path) -> "RunFile":
        """Read a run's file; empty if there is none yet.

        Raises:
            UserError: if it is damaged.
        """
        if not path.is_file():
            return RunFile()
        return RunFile(**read_json(path, RunFile, "delete it to start a new MLflow run"))

    def original_of(self, run_dir: Path) -> Path | None:
        """The folder that `run_dir` is a copy of: where a stage last wrote this file, if it has the same run still."""
        original = Path(self.folder)
        if not self.run_id or not self.folder or not (original / RUN_FILE).is_file() or original.samefile(run_dir):
            return None
        return original if RunFile.read(original / RUN_FILE).run_id == self.run_id else None
