"""``dmafs clone``: writable copies of a moment."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.answers import Clone
from dmafs.cli.output import say
from dmafs.client import connect
from dmafs.errors import InputError
from dmafs.units import format_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    clone = commands.add_parser(
        "clone",
        help="make, drop or list writable images of a moment",
        description="Make a writable image of every volume at one moment, drop one, or without a name list them all.",
    )
    clone.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    clone.add_argument("name", metavar="NAME", nargs="?", help="name of the clone")
    what = clone.add_mutually_exclusive_group()
    what.add_argument("--at", metavar="TIME", help="the moment (the newest one)")
    what.add_argument("--drop", action="store_true", help="drop it, with all that was written to it")
    what.add_argument("--json", action="store_true", help="list as JSON")
    clone.set_defaults(run=run_clone)


def run_clone(options: argparse.Namespace) -> int:
    """Make, drop or list."""
    if options.name is None and (options.drop or options.at is not None):
        raise InputError("the clone's name is missing", hint="dmafs clone STORE NAME")
    if options.name is not None and options.json:
        raise InputError(f"clone {options.name}: --json is for the list", hint="leave the name out")
    with connect(options.store) as asked:
        if options.name is None:
            report = asked.clones()
            say(json.dumps(report, indent=2)) if options.json else _list(report["clones"])
        elif options.drop:
            asked.drop_clone(options.name)
            say(f"clone {options.name} dropped")
        else:
            asked.create_clone(options.name, options.at)
            say(f"clone {options.name} made")
    return 0


def _list(clones: list[Clone]) -> None:
    say(f"{'NAME':<20}  {'TIME':<30}  {'STORED':>10}  STATE")
    for clone in clones:
        state = clone["failure"] or ("open" if clone["open"] else "closed")
        say(f"{clone['name']:<20}  {clone['time']:<30}  {format_bytes(clone['stored_bytes']):>10}  {state}")
