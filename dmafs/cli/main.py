"""The command ``dmafs``: the parser, and the only place that prints errors and exits."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final

from dmafs.cli import (
    change,
    check,
    clone,
    completion,
    config,
    copying,
    create,
    importing,
    inspection,
    keep,
    metrics,
    moment,
    mounting,
    output,
    query,
    serve,
    tap,
)
from dmafs.errors import DmafsError
from dmafs.service.loading import MACHINE_FILE, choose_machine_file

_SIGPIPE_EXIT: Final = 128 + 13
_SIGINT_EXIT: Final = 128 + 2

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


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the man page is tested against it."""
    root = argparse.ArgumentParser(
        prog="dmafs",
        description="Keeps the whole recent history of a disk and shows any moment of it as a plain image file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"dmafs {version('dmafs')}")
    root.add_argument("-v", "--verbose", action="store_true", help="log what happens, not only what goes wrong")
    root.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help=f"file that names the machine's stores ({MACHINE_FILE} if there)",
    )
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (
        create,
        importing,
        serve,
        query,
        metrics,
        moment,
        copying,
        mounting,
        change,
        keep,
        clone,
        check,
        inspection,
        config,
        tap,
    ):
        group.add_commands(commands)
    completion.add_commands(commands, parser)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="dmafs: %(levelname)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    choose_machine_file(options.config)
    try:
        status: int = options.run(options)
        output.flush()
    except DmafsError as error:
        return _report(error)
    except BaseExceptionGroup as group:
        matching = group.subgroup(DmafsError)
        if matching is None or group.split(DmafsError)[1] is not None:
            raise
        return _report(_first(matching))
    except BrokenPipeError:
        output.abandon()
        return _SIGPIPE_EXIT
    except KeyboardInterrupt:
        return _SIGINT_EXIT
    return status


def _report(error: DmafsError) -> int:
    print(f"dmafs: error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return error.exit_code


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
