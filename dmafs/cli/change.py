"""``dmafs mark`` and ``sync``: what changes history."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dmafs.cli.common import JSON, add_store, do
from dmafs.cli.output import note
from dmafs.client import connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    mark = commands.add_parser(
        "mark",
        parents=JSON,
        help="give this moment a name in the journal",
        description="Flush, and put a named mark into the journals of all volumes, at one instant. It names the moment "
        "as long as the journal has it; what is to stay after a sync needs a snapshot.",
    )
    add_store(mark)
    mark.add_argument("name", metavar="NAME", help="name of the mark")
    mark.set_defaults(run=run_mark)

    sync = commands.add_parser(
        "sync",
        parents=JSON,
        help="move the mirror to the newest flushed moment",
        description="Move the mirror to the newest flushed moment. The mirror's moment until now becomes a snapshot; "
        "of the moments between only snapshots stay recoverable, and the journal's space is freed.",
    )
    add_store(sync)
    sync.set_defaults(run=run_sync)


def run_mark(options: argparse.Namespace) -> int:
    """Set the mark."""
    return do(options.store, lambda asked: asked.mark(options.name), "mark {name} set")


def run_sync(options: argparse.Namespace) -> int:
    """Sync."""
    with connect(options.store) as asked:
        report = asked.sync()
    lines = [
        f"volume {volume['name']}: mirror at seq {volume['mirror_seq']}; before it only snapshots remain"
        for volume in report["volumes"]
    ]
    note("\n".join(lines), report)
    return 0
