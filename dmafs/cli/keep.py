"""``dmafs pin``, ``unpin`` and ``thin``: which snapshots stay."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.output import say
from dmafs.client import connect
from dmafs.units import format_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    pin = commands.add_parser(
        "pin",
        help="have a snapshot not be dropped",
        description="Pin a snapshot: nothing drops it until it is unpinned.",
    )
    pin.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    pin.add_argument("id", metavar="ID", help="name of the snapshot, or its canonical time if it has none")
    pin.set_defaults(run=run_pin)

    unpin = commands.add_parser(
        "unpin", help="let a pinned snapshot be dropped", description="Let a pinned snapshot be dropped again."
    )
    unpin.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    unpin.add_argument("id", metavar="ID", help="name of the snapshot, or its canonical time if it has none")
    unpin.set_defaults(run=run_unpin)

    thin = commands.add_parser(
        "thin",
        help="drop the snapshots that no rule keeps",
        description="Drop the snapshots that no rule of the configuration keeps, as the daemon does by itself. "
        "List all with the reason why each is kept or dropped.",
    )
    thin.add_argument("store", metavar="STORE", type=Path, help="directory of the store")
    thin.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    thin.add_argument("--json", action="store_true", help="as JSON")
    thin.set_defaults(run=run_thin)


def run_pin(options: argparse.Namespace) -> int:
    """Pin the snapshot."""
    with connect(options.store) as asked:
        report = asked.pin(options.id)
    say(f"snapshot {report['id']} pinned")
    return 0


def run_unpin(options: argparse.Namespace) -> int:
    """Unpin the snapshot."""
    with connect(options.store) as asked:
        report = asked.unpin(options.id)
    say(f"snapshot {report['id']} unpinned")
    return 0


def run_thin(options: argparse.Namespace) -> int:
    """Thin."""
    with connect(options.store) as asked:
        report = asked.thin(dry_run=options.dry_run)
    if options.json:
        say(json.dumps(report, indent=2))
        return 0
    say(f"{'SNAPSHOT':<28}  {'HOLDS':>10}  FATE  REASONS")
    for snapshot in report["snapshots"]:
        fate = "keep" if snapshot["kept"] else "drop"
        reasons = ", ".join(snapshot["reasons"])
        say(f"{snapshot['id']:<28}  {format_bytes(snapshot['held_bytes']):>10}  {fate}  {reasons}")
    return 0
