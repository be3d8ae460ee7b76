"""``dmafs snapshot``: moments that are kept."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from dmafs.cli.common import JSON, add_store, do
from dmafs.cli.output import both, say, show
from dmafs.client import connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_ID_HELP: Final = "name of the snapshot, or its canonical time if it has none"
_LINE: Final = "{:<28}  {:<58}  {:<8}  {:<6}  {}"


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, which has commands of its own."""
    snapshot = commands.add_parser(
        "snapshot",
        help="take, list, drop, rename, pin and unpin snapshots",
        description="Keep moments for longer than the journal does: a snapshot is one moment of all volumes.",
    )
    actions = snapshot.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = actions.add_parser(
        "create",
        parents=JSON,
        help="keep this moment under a name",
        description="Take a snapshot now, of all volumes: syncs will keep this moment recoverable.",
    )
    add_store(create)
    create.add_argument("name", metavar="NAME", help="name of the snapshot")
    create.set_defaults(run=run_create)

    listing = actions.add_parser(
        "list", parents=JSON, help="list all snapshots", description="List all snapshots, oldest first."
    )
    add_store(listing)
    listing.set_defaults(run=run_list)

    drop = actions.add_parser(
        "drop", parents=JSON, help="drop a snapshot", description="Drop a snapshot: its moment can't be had any more."
    )
    rename = actions.add_parser(
        "rename",
        parents=JSON,
        help="give a snapshot another name",
        description="Give a snapshot another name, or one that has none its first.",
    )
    pin = actions.add_parser(
        "pin",
        parents=JSON,
        help="have a snapshot not be dropped",
        description="Pin a snapshot: nothing drops it until it is unpinned.",
    )
    unpin = actions.add_parser(
        "unpin",
        parents=JSON,
        help="let a pinned snapshot be dropped",
        description="Let a pinned snapshot be dropped again.",
    )
    for command, run in ((drop, run_drop), (rename, run_rename), (pin, run_pin), (unpin, run_unpin)):
        add_store(command)
        command.add_argument("id", metavar="ID", help=_ID_HELP)
        command.set_defaults(run=run)
    rename.add_argument("name", metavar="NAME", help="the new name")


def run_create(options: argparse.Namespace) -> int:
    """Take the snapshot."""
    return do(options.store, lambda asked: asked.take_snapshot(options.name), "snapshot {name} taken")


def run_list(options: argparse.Namespace) -> int:
    """List the snapshots."""
    with connect(options.store) as asked:
        report = asked.snapshots()
    if options.json:
        show(report)
        return 0
    say(_LINE.format("SNAPSHOT", "TIME", "STATE", "PINNED", "VOLUMES"))
    for one in report["snapshots"]:
        volumes = ", ".join(f"{name} seq {seq}" for name, seq in one["volumes"].items())
        pinned = "pinned" if one["pinned"] else ""
        say(_LINE.format(one["id"], both(one["time"]), one["consistency"], pinned, volumes))
    return 0


def run_drop(options: argparse.Namespace) -> int:
    """Drop the snapshot."""
    return do(options.store, lambda asked: asked.drop_snapshot(options.id), "snapshot {id} dropped")


def run_rename(options: argparse.Namespace) -> int:
    """Rename the snapshot."""
    return do(
        options.store,
        lambda asked: asked.rename_snapshot(options.id, options.name),
        "snapshot {id} is called {name} now",
    )


def run_pin(options: argparse.Namespace) -> int:
    """Pin the snapshot."""
    return do(options.store, lambda asked: asked.pin(options.id), "snapshot {id} pinned")


def run_unpin(options: argparse.Namespace) -> int:
    """Unpin the snapshot."""
    return do(options.store, lambda asked: asked.unpin(options.id), "snapshot {id} unpinned")
