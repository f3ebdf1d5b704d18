"""The stages. `python -m components.<stage>` handles signals from here on, before the imports of the stage."""

import signal
import sys

if sys.argv[:1] == ["-m"]:  # Python's placeholder while it looks for the module to run, and imports its package
    from components.launch import end_process

    for _number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end_process)
