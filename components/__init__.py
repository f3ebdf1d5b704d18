"""The stages. `python -m components.<stage>` handles signals from here on, before the imports of the stage."""

import os
import select
import signal
import sys
from types import FrameType

_STDOUT = 1


def end_process(number: int, frame: FrameType | None) -> None:
    """Handle a signal: end the process by an exception, or at once before `main` and within an import.

    C++ and class statements pass no exception on, and nothing is lost at that time.
    """
    in_main = False
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            in_main = False
            break
        in_main = in_main or frame.f_code.co_name == "main"
        frame = frame.f_back
    if not in_main:
        os.write(2, b"interrupted\n" if number == signal.SIGINT else b"")
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def end_if_unread(error: OSError) -> None:
    """End the process as SIGPIPE would, silently, if an error says that nobody reads its output any more.

    That is no fault in `maskrcnn report RUN | head`; a pipe or a connection of another kind that breaks is one. Output
    that cannot be written, for example to a full disk, is dropped, since Python tries again at its end.
    """
    is_unread = isinstance(error, BrokenPipeError) and _is_unread()
    try:
        print(end="", flush=True)
    except OSError:
        drop_output()
    if is_unread:
        sys.exit(128 + signal.SIGPIPE)


def drop_output() -> None:
    """Let standard output lead nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.close(nowhere)


def _is_unread() -> bool:
    """True if standard output is a pipe or a connection whose other end is closed."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


if sys.argv[:1] == ["-m"]:  # Python's placeholder while it looks for the module to run, and imports its package
    for _number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end_process)
