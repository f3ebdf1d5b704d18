"""Lock of a run's folder: one stage at a time writes there.

`<run>/.lock` is locked by flock while a stage writes, and names it. The system unlocks it when the process ends, in
whatever way, so a lock is never stale; only that of a lost machine on a network disk lasts for its lease.
"""

import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.errors import UserError
from model.files import free_name, make_folder, real

FILE_NAME = ".lock"
_LEASE_S = 120.0  # NFS takes 90 s to give up the locks of a machine that is lost


class RunInUseError(UserError):
    """Another stage writes into the run's folder."""


class _Lock:
    """A lock that this process holds."""

    def __init__(self, run_dir: Path, stage: str) -> None:
        self.stage, self._path = stage, run_dir / FILE_NAME
        self._made_folder = not run_dir.is_dir()
        make_folder(run_dir)
        self.descriptor = self._acquire()
        owner = f"maskrcnn {stage} (process {os.getpid()} on {platform.node()}, since {time.strftime('%F %T %z')})"
        self._folder = run_dir.stat()
        with suppress(OSError):  # a full disk: the lock holds all the same
            os.truncate(self.descriptor, 0)
            os.write(self.descriptor, owner.encode())

    def _acquire(self) -> int:
        began_s, waits = time.monotonic(), False
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 500).decode(errors="replace") or "another stage"
                os.close(descriptor)
                if f" on {platform.node()}," not in owner and time.monotonic() - began_s < _LEASE_S:
                    if not waits:
                        print(f"{self._path.parent}: waiting up to {_LEASE_S:g} s for {owner}", file=sys.stderr)
                    waits = True
                    time.sleep(0.2)
                    continue
                raise RunInUseError(
                    f"{self._path.parent}: only one stage at a time must write there, but {owner} does; wait until it "
                    "ends, or end it, or name another folder (train.output_dir, --output)"
                ) from None
            except OSError as error:  # a file system without locks
                message = (
                    f"warning: {self._path}: cannot be locked ({error}); let no other stage write into this folder"
                )
                print(message, file=sys.stderr)
                return descriptor
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    return descriptor
            os.close(descriptor)  # its owner ended, and removed it, after we had opened it

    def has_folder(self) -> bool:
        """True if the folder that was locked still has its name."""
        with suppress(FileNotFoundError):
            return os.path.samestat(self._folder, self._path.parent.stat())
        return False

    def release(self) -> None:
        """Remove the file, and the folder if it was made for the lock and stayed empty; then unlock."""
        with suppress(OSError):
            if self.has_folder():
                self._path.unlink()
                if self._made_folder:
                    self._path.parent.rmdir()
        os.close(self.descriptor)


_held: dict[Path, _Lock | None] = {}  # keys: resolved folders; None in ranks other than 0


@contextmanager
def writing(run_dir: Path, stage: str) -> Iterator[None]:
    """Hold the lock of a run's folder within the context; a stage within a stage, and the ranks of a job, share it.

    Raises:
        RunInUseError: if another process holds it, in every rank.
        OSError: if the folder cannot be written, in every rank.
    """
    from model.distributed import from_main, is_main  # torch, which a stage has loaded by then

    folder = real(run_dir)
    if folder in _held:
        yield
        return
    lock: _Lock | None = None
    failure: RunInUseError | OSError | None = None
    if is_main():
        try:
            lock = _Lock(folder, stage)
        except (RunInUseError, OSError) as error:
            failure = error
    if failure := from_main(failure):
        raise failure
    _held[folder] = lock
    try:
        yield
    finally:
        lock = _held.pop(folder)
        if lock is not None:
            lock.release()


def require_folder(run_dir: Path) -> None:
    """Refuse to write into a folder that has taken the place of the locked one, or to make it anew.

    Raises:
        UserError: if the run's folder was moved or removed while this process holds its lock.
    """
    held = _held.get(real(run_dir))
    if held is not None and not held.has_folder():
        raise UserError(
            f"{run_dir}: was moved or removed while `maskrcnn {held.stage}` ran, so its results were not written; put "
            "it back, and run the same command again"
        )


def move_aside(run_dir: Path) -> Path:
    """Rename a run's folder, on its disk if `run_dir` links to it; lock and link stay with the old name.

    Returns:
        Its new path.
    """
    folder = real(run_dir)
    named = folder if run_dir.is_symlink() else run_dir
    aside = free_name(named)
    named.rename(aside)
    make_folder(folder)
    held = _held.get(folder)
    if held is not None:
        (aside / FILE_NAME).unlink(missing_ok=True)
        os.close(held.descriptor)
        _held[folder] = None
        _held[folder] = _Lock(folder, held.stage)
    return aside


def _forget() -> None:
    """Leave the locks to the parent: a forked child that outlives it must not hold them."""
    for lock in _held.values():
        if lock is not None:
            os.close(lock.descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
