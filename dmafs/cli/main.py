"""The command ``dmafs``: the parser, and the only place that prints errors and exits."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from dmafs.cli import output
from dmafs.cli.common import add_telling
from dmafs.errors import DmafsError
from dmafs.service.logs import set_up
from dmafs.service.machine import MACHINE_FILE, choose_machine_file

_SIGPIPE_EXIT: Final = 128 + 13
_SIGINT_EXIT: Final = 128 + 2

COMMANDS: Final = {
    "create": ("create",),
    "importing": ("import",),
    "serve": ("serve",),
    "query": ("status", "ls", "read", "diff"),
    "metrics": ("metrics",),
    "moment": ("at",),
    "copying": ("cp",),
    "mounting": ("mount", "umount"),
    "snapshot": ("snapshot",),
    "change": ("mark", "sync"),
    "keep": ("thin",),
    "clone": ("clone",),
    "check": ("verify", "resync", "scrub"),
    "inspection": ("check",),
    "config": ("config",),
    "tap": ("tap",),
    "completion": ("completion",),
}
"""The commands by their modules, of which only that of the command in question is imported: that takes time."""

EPILOG: Final = """\
Commands ask the daemon that serves the store, or work on the store directly when none runs.

TIME is a time with a zone or a local one ("2026-07-28T14:30:05.5Z", "2026-07-28 16:30+02:00", "2026-07-28 16:30",
"yesterday 14:00", "today 09:30"), "@<epoch seconds>", "seq:<n>", the name of a snapshot, "latest" (the newest
snapshot), "<duration> ago", or one of these with "~<duration>" behind it: so much before. A duration is "2h",
"1h30min", "90s"; its units are w d h min s ms us ns.

Exit status: 0 success, 1 success with warnings, 2 other errors and wrong usage, 3-8 wrong input, 10-17 trouble with the
store, 20-24 not found, 25 pinned, 26 source and image differ, 27 a check is under way, 30 mount, 31 control interface,
32-34 tap, 35 denied, 128+n ended by signal n. See dmafs(1).
"""


class _Version(argparse.Action):
    """Print the version, which isn't looked up before that: it takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version  # noqa: PLC0415 - see above

        print(f"dmafs {version('dmafs')}")
        parser.exit()


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, against which the man page is tested, or of one *command*."""
    root = argparse.ArgumentParser(
        prog="dmafs",
        description="Keeps the whole recent history of a disk and shows any moment of it as a plain image file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    root.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    add_telling(root, default=False)
    root.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"file that names the machine's stores ({MACHINE_FILE} if there)",
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    modules = [module for module, names in COMMANDS.items() if command in names] or COMMANDS
    for module in modules:
        importlib.import_module(f"dmafs.cli.{module}").add_commands(commands)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    options = parser(_command(words)).parse_args(words)
    level = logging.INFO if options.verbose else logging.ERROR if options.quiet else logging.WARNING
    set_up(level, os.environ)
    output.choose(output.Manner(options.quiet, getattr(options, "json", False)))
    choose_machine_file(options.config)
    return guarded(partial(options.run, options))


def guarded(act: Callable[[], int]) -> int:
    """Return the exit status of what *act* does; an error of the tree is printed, and has its own."""
    try:
        status = act()
        output.flush()
    except DmafsError as error:
        return output.fail(error)
    except BaseExceptionGroup as group:
        matching = group.subgroup(DmafsError)
        if matching is None or group.split(DmafsError)[1] is not None:
            raise
        return output.fail(_first(matching))
    except BrokenPipeError:
        output.abandon()
        return _SIGPIPE_EXIT
    except KeyboardInterrupt:
        return _SIGINT_EXIT
    return status


def _command(words: Sequence[str]) -> str | None:
    """Return the word where the command's name is, if there is one."""
    left = iter(words)
    for word in left:
        if word == "--config":
            next(left, None)
        elif not word.startswith("-"):
            return word
    return None


def _first(error: BaseException) -> DmafsError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DmafsError)
    return error


def entry() -> None:
    """Run the command of this process and exit."""
    status = main()
    output.settle_errors()
    sys.exit(status)
