"""``dmafs snapshot``, ``mark`` and ``sync``: what changes history."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.output import say
from dmafs.client import connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    snapshot = commands.add_parser(
        "snapshot",
        help="keep this moment under a name",
        description="Take a snapshot now, of all volumes: syncs will keep this moment recoverable.",
    )
    snapshot.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    snapshot.add_argument("name", metavar="NAME", help="name of the snapshot")
    snapshot.set_defaults(run=run_snapshot)

    mark = commands.add_parser(
        "mark",
        help="give this moment a name in the journal",
        description="Flush, and put a named mark into the journals of all volumes, at one instant. It names the moment "
        "as long as the journal has it; what is to stay after a sync needs a snapshot.",
    )
    mark.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    mark.add_argument("name", metavar="NAME", help="name of the mark")
    mark.set_defaults(run=run_mark)

    sync = commands.add_parser(
        "sync",
        help="move the mirror to the newest flushed moment",
        description="Move the mirror to the newest flushed moment. The mirror's moment until now becomes a snapshot; "
        "of the moments between only snapshots stay recoverable, and the journal's space is freed.",
    )
    sync.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    sync.set_defaults(run=run_sync)


def run_snapshot(options: argparse.Namespace) -> int:
    """Take the snapshot."""
    with connect(options.store) as asked:
        report = asked.take_snapshot(options.name)
    say(f"snapshot {report['name']} taken")
    return 0


def run_mark(options: argparse.Namespace) -> int:
    """Set the mark."""
    with connect(options.store) as asked:
        report = asked.mark(options.name)
    say(f"mark {report['name']} set")
    return 0


def run_sync(options: argparse.Namespace) -> int:
    """Sync."""
    with connect(options.store) as asked:
        report = asked.sync()
    for volume in report["volumes"]:
        say(f"volume {volume['name']}: mirror at seq {volume['mirror_seq']}; before it only snapshots remain")
    return 0
