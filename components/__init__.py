"""The stages. `python -m components.<stage>` handles signals from here on, before the imports of the stage."""

import os
import signal
import sys
from types import FrameType


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


if sys.argv[:1] == ["-m"]:  # Python's placeholder while it looks for the module to run, and imports its package
    for _number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end_process)
