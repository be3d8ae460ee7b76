"""``dmafs serve``: the daemon, in the foreground."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.common import TELLING

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "serve",
        parents=TELLING,
        help="capture writes and show the past at a mount point",
        description="Serve a store at a mount point, in the foreground, until SIGTERM, SIGINT or umount. SIGHUP loads "
        "the configuration again; it is an end, too, of a daemon that has a terminal.",
    )
    command.add_argument(
        "store", metavar="STORE", type=Path, nargs="?", help="directory of the store (the only one of dmafs.toml)"
    )
    command.add_argument(
        "mount_point", metavar="MOUNTPOINT", type=Path, nargs="?", help="an empty directory (mount of dmafs.toml)"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve the store."""
    from dmafs.service.daemon import serve  # noqa: PLC0415 - the other commands need neither FUSE nor trio

    serve(options.store, options.mount_point)
    return 0
