"""``dmafs clone``: writable copies of a moment."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from dmafs.cli.common import JSON, add_store, do
from dmafs.cli.output import both, say, show
from dmafs.client import connect
from dmafs.units import format_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_LINE: Final = "{:<20}  {:<58}  {:>10}  {}"


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command, which has commands of its own."""
    clone = commands.add_parser(
        "clone",
        help="make, list and drop writable images of a moment",
        description="Writable images of all volumes at one moment.",
    )
    actions = clone.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = actions.add_parser(
        "create",
        parents=JSON,
        help="make a writable image of a moment",
        description="Make a writable image of every volume at one moment.",
    )
    add_store(create)
    create.add_argument("name", metavar="NAME", help="name of the clone")
    create.add_argument("--at", metavar="TIME", help="the moment (the newest one)")
    create.set_defaults(run=run_create)

    listing = actions.add_parser("list", parents=JSON, help="list all clones", description="List all clones.")
    add_store(listing)
    listing.set_defaults(run=run_list)

    drop = actions.add_parser(
        "drop", parents=JSON, help="drop a clone", description="Drop a clone, with all that was written to it."
    )
    add_store(drop)
    drop.add_argument("name", metavar="NAME", help="name of the clone")
    drop.set_defaults(run=run_drop)


def run_create(options: argparse.Namespace) -> int:
    """Make the clone."""
    return do(options.store, lambda asked: asked.create_clone(options.name, options.at), "clone {name} made")


def run_list(options: argparse.Namespace) -> int:
    """List the clones."""
    with connect(options.store) as asked:
        report = asked.clones()
    if options.json:
        show(report)
        return 0
    say(_LINE.format("NAME", "TIME", "STORED", "STATE"))
    for clone in report["clones"]:
        state = clone["failure"] or ("open" if clone["open"] else "closed")
        say(_LINE.format(clone["name"], both(clone["time"]), format_bytes(clone["stored_bytes"]), state))
    return 0


def run_drop(options: argparse.Namespace) -> int:
    """Drop the clone."""
    return do(options.store, lambda asked: asked.drop_clone(options.name), "clone {name} dropped")
