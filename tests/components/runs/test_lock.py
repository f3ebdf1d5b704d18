"""Lock of a run's folder: one writer at a time, who is named; it ends with its process."""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from components import benchmark, evaluate, export, predict, register, train
from components.config import Config
from components.runs import lock
from components.runs.lock import FILE_NAME, RunInUseError, move_aside, writing
from model.engine.pointers import require_checkpoint
from model.errors import UserError

OWNER = f"maskrcnn train (process 7 on {platform.node()}, since yesterday)"
_HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(sys.argv[2], file=file, end="", flush=True)
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_elsewhere(run_dir: Path, owner: str = OWNER) -> Iterator[subprocess.Popen]:
    """Another process writes into the folder, until the context ends or it is killed."""
    command = [sys.executable, "-c", _HOLDER, str(run_dir / FILE_NAME), owner]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_and_the_first_one_named_until_it_is_killed(tmp_path: Path):
    with held_elsewhere(tmp_path) as holder:
        with pytest.raises(RunInUseError, match=re.escape(OWNER)), writing(tmp_path, "train"):
            pass
        holder.kill()
        holder.wait()
        with writing(tmp_path, "train"):
            text = (tmp_path / FILE_NAME).read_text()
    assert text.startswith(f"maskrcnn train (process {os.getpid()} on {os.uname().nodename}, since 20")


def test_the_lock_of_another_machine_is_waited_for_as_long_as_a_lost_one_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    elsewhere = OWNER.replace(platform.node(), "elsewhere")
    with held_elsewhere(tmp_path, elsewhere) as holder:
        threading.Timer(0.3, holder.kill).start()
        with writing(tmp_path, "train"):
            pass
    assert f"waiting up to 120 s for {elsewhere}" in capsys.readouterr().err
    monkeypatch.setattr(lock, "_LEASE_S", 0.3)
    with held_elsewhere(tmp_path, elsewhere), pytest.raises(RunInUseError), writing(tmp_path, "train"):
        pass


def test_a_stage_within_a_stage_shares_the_lock_and_nothing_is_left(tmp_path: Path):
    folder = tmp_path / "runs" / "new"
    with writing(folder, "train"), writing(folder, "evaluate"):
        assert (folder / FILE_NAME).is_file()
    assert not folder.exists(), "it was made for the lock alone"
    with writing(folder, "train"):
        (folder / "result").touch()
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_run_that_is_moved_aside_leaves_the_lock_to_the_old_name(tmp_path: Path):
    folder = tmp_path / "run"
    probe = f"import fcntl; fcntl.flock(open({str(folder / FILE_NAME)!r}), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with writing(folder, "train"):
        (folder / "result").touch()
        aside = move_aside(folder)
        assert aside == tmp_path / "run.old-1"
        assert (folder / FILE_NAME).is_file()
        assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 1
    assert [path.name for path in aside.iterdir()] == ["result"]
    with held_elsewhere(aside), writing(tmp_path / "run", "train"):
        pass


def test_a_run_that_is_linked_to_is_moved_aside_on_its_own_disk_and_the_link_stays(tmp_path: Path):
    (tmp_path / "large" / "run").mkdir(parents=True)
    (tmp_path / "large" / "run" / "result").touch()
    for target in (Path("large", "run"), tmp_path / "large" / "run"):
        link = tmp_path / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with writing(link, "train"):
            aside = move_aside(link)
            assert aside.parent == tmp_path / "large"
            assert link.readlink() == target
            assert (link / FILE_NAME).is_file()
            (link / "result").touch()
        assert [path.name for path in aside.iterdir()] == ["result"]
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["run", "run.old-1", "run.old-2"]


def test_a_run_folder_that_links_to_itself_is_an_error_of_the_system(tmp_path: Path):
    (tmp_path / "loop").symlink_to("loop")
    for run_dir in (tmp_path / "loop", tmp_path / "loop" / "run"):
        with pytest.raises(OSError, match="loop"), writing(run_dir, "train"):
            pass


def test_results_are_not_written_into_a_folder_in_place_of_the_run(trained_run: Config, tmp_path: Path):
    run_dir, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(trained_run.train.output_dir, run_dir)
    config = trained_run.model_copy(update={"train": trained_run.train.model_copy(update={"output_dir": run_dir})})
    with writing(run_dir, "evaluate"):
        run_dir.rename(away)
        with pytest.raises(UserError, match=f"{run_dir}: was moved or removed while `maskrcnn evaluate` ran"):
            evaluate.run(config, checkpoint=str(away / "checkpoints" / "step_0000007.pt"))
        assert not run_dir.exists()


def test_a_forked_child_is_refused_and_does_not_hold_the_lock_when_it_outlives_its_parent(tmp_path: Path):
    reader, writer = os.pipe()
    with writing(tmp_path, "train"):
        held = lock._held[tmp_path.resolve()]
        assert held is not None
        child = os.fork()
        if not child:
            with suppress(OSError):
                os.fstat(held.descriptor)
                os._exit(1)  # it holds the lock, too
            try:
                lock._Lock(tmp_path, "evaluate")
            except RunInUseError:
                os.read(reader, 1)
                os._exit(3)
            os._exit(0)
        time.sleep(0.2)
    try:
        with held_elsewhere(tmp_path):
            pass
    finally:
        os.write(writer, b"x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3, "while its parent held it, it was refused"


def test_every_stage_that_writes_into_a_run_is_refused(trained_run: Config, evaluated: object, tmp_path: Path):
    tracked = trained_run.model_copy(
        update={"tracking": trained_run.tracking.model_copy(update={"enabled": True}),
                "registry": trained_run.registry.model_copy(update={"min_bbox_ap": 0.0, "min_segm_ap": 0.0})}
    )  # fmt: skip
    run_dir = trained_run.train.output_dir
    checkpoint = str(require_checkpoint(run_dir, "last"))
    elsewhere = trained_run.model_copy(update={"train": trained_run.train.model_copy(update={"output_dir": tmp_path})})
    stages: list[Callable[[], object]] = [
        lambda: train.run(trained_run),
        lambda: evaluate.run(trained_run),
        lambda: predict.run(trained_run),
        lambda: predict.run(trained_run, output=run_dir / "predictions"),
        lambda: predict.run(elsewhere, checkpoint=checkpoint, output=run_dir / "plots" / "new"),
        lambda: export.run(trained_run),
        lambda: export.run(trained_run, output=run_dir.parent / "other" / ".." / run_dir.name / "programs"),
        lambda: benchmark.run(trained_run),
        lambda: register.run(tracked),
    ]
    with held_elsewhere(run_dir):
        for stage in stages:
            with pytest.raises(RunInUseError, match="only one stage at a time must write there"):
                stage()
    other = tmp_path / "drawings"
    other.mkdir()
    with held_elsewhere(other), pytest.raises(RunInUseError, match=re.escape(f"{other}: only one")):
        predict.run(trained_run, output=other)
