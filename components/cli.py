"""Shared parts of the stages' command lines: `--params`, overrides, errors without a traceback, and waiting threads.

    parser = stage_parser("predict", __doc__, operands="IMAGE", operands_help="images to run on")
    add_checkpoint(parser)
    with user_errors():
        args, config = parse(parser, argv)
        run(config, args.operands, checkpoint=args.checkpoint)

A word of the form section.key=value is an override wherever it stands, unless a file has this name; the other words
are the stage's operands.
"""

import argparse
import errno
import os
import re
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import drop_output, end_if_unread
from components.config import Config
from components.params import build_config, load_config
from model.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_PARAMS = Path("params.yaml")
_OVERRIDE = re.compile(r"\w+(\.\w+)+=")
_ADDRESS_BYTES = 8 << 30  # predict on a CPU fails with 3 GB, and works with 6
_REMEDIES = (
    ((errno.ENOENT,), "check that it is spelt right and was not removed meanwhile"),
    ((errno.EACCES, errno.EPERM, errno.EROFS), "give permission, or name another path"),
    ((errno.EEXIST, errno.ENOTDIR), "a folder is needed there; move the file away, or name another path"),
    ((errno.EISDIR, errno.ENOTEMPTY), "a file is needed there; move the folder away, or name another path"),
    ((errno.EMFILE,), "raise the limit of open files (`ulimit -n`)"),
    ((errno.ENOSPC, errno.EDQUOT), "free some space, then run the same command again"),
)


def path_argument(word: str) -> Path:
    """A path of a command line, as the `type` of its argument."""
    if not word:
        raise argparse.ArgumentTypeError('must be a path, got ""; the current folder is "."')
    return Path(word)


def stage_parser(
    stage: str, description: str | None, *, operands: str = "", operands_help: str = ""
) -> argparse.ArgumentParser:
    """The parser of `maskrcnn <stage>`.

    Args:
        stage: name of the stage.
        description: what the stage does, for `--help`.
        operands: placeholder of the words that the stage takes besides overrides; empty if it takes none.
        operands_help: description of these words.
    """
    parser = argparse.ArgumentParser(
        prog=f"maskrcnn {stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=path_argument, default=DEFAULT_PARAMS, help="parameter file (%(default)s)")
    if operands:
        parser.add_argument("operands", nargs="*", metavar=operands, help=operands_help)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="overrides of the parameter file, such as train.base_lr=0.01",
    )
    return parser


def add_checkpoint(parser: argparse._ActionsContainer) -> None:
    """Let a stage take `--checkpoint`."""
    parser.add_argument(
        "--checkpoint", help="last, best, or the path of a file or of a run (last; with train.patience, best)"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Config]:
    """Read the command line (sys.argv by default) and the parameter file it names.

    Returns:
        The arguments, with `overrides` and, where the stage takes them, `operands` (lists of str) separated; and the
        configuration.

    Raises:
        ConfigError: if the parameter file or an override cannot be used.
    """
    args = parse_words(parser, argv)
    return args, load_config(args.params, args.overrides)


def read_config(args: argparse.Namespace, overrides: Sequence[str], *, needs_file: bool = True) -> Config:
    """The configuration of the parameter file that a command line names; or the defaults.

    Args:
        needs_file: if not, params.yaml is read only if --params names it: another program's may lie there.

    Raises:
        ConfigError: if the parameter file or an override cannot be used.
    """
    if needs_file or args.params is not DEFAULT_PARAMS:
        return load_config(args.params, overrides)
    return build_config({}, overrides)


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line as `parse` does, without the parameter file."""
    args = parser.parse_intermixed_args(argv)
    if "operands" in args:
        words = args.operands + args.overrides  # argparse cannot tell them apart and takes all for operands
        args.overrides = [word for word in words if _OVERRIDE.match(word) and not os.path.lexists(word)]
        args.operands = [word for word in words if word not in args.overrides]
        if "" in args.operands:
            parser.error('an argument is empty; the current folder is "."')
    return args


def terminal(**options: Any) -> "Console":
    """A terminal that prints users' text as it is: `bolt [m4]` is no markup, and `:car:` no emoji.

    Args:
        options: of rich's Console.
    """
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            """End the process as `end_if_unread` does; Console's own method ends it with status 1."""
            self.quiet = True
            drop_output()
            sys.exit(128 + signal.SIGPIPE)

    return Terminal(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def user_errors() -> Iterator[None]:
    """End the process with `error: …` on stderr and status 2 where the user can fix the cause; other errors pass.

    That is where a UserError is raised, or the operating system refuses something.
    """
    _warn_of_few_addresses()
    try:
        yield
        print(end="", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        end_if_unread(error)
        if error.errno is None:  # a library's own kind, which says nothing about files
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _warn_of_few_addresses() -> None:
    """Name a limit that ends processes in C++, with status 127 or 134 and no message of its own."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_BYTES:
        print(
            f"warning: `ulimit -v` is {limit >> 20} MiB, but torch reserves addresses beyond the memory that it uses, "
            "and aborts without them; raise it, or limit the memory of a container or cgroup",
            file=sys.stderr,
        )


def _describe(error: OSError) -> str:
    """Name the path, what the operating system said, and what to do."""
    path = error.filename2 or error.filename
    remedy = next(
        (text for codes, text in _REMEDIES if error.errno in codes), "check the path, the disk and the limits"
    )
    return f"{f'{path}: ' if path else ''}{error.strerror}; {remedy}"


def set_waiting(name: str, value: str) -> None:
    """Set OpenMP's variable for how long threads spin before they sleep, unless a user has, or torch has read it."""
    if "torch" not in sys.modules and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ[name] = value


def spin_briefly() -> None:
    """Let torch's threads spin for a moment only: next to nothing is lost on idle cores, and much gained on busy ones.

    A thread that spins holds the core that another thread, for which it waits, would need; by default for milliseconds.
    """
    set_waiting("GOMP_SPINCOUNT", "1000")
