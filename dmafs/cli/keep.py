"""``dmafs thin``: which snapshots stay."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import both, say, show
from dmafs.client import connect
from dmafs.units import format_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    thin = commands.add_parser(
        "thin",
        parents=JSON,
        help="drop the snapshots that no rule keeps",
        description="Drop the snapshots that no rule of the configuration keeps, as the daemon does by itself. "
        "List all with the reason why each is kept or dropped.",
    )
    add_store(thin)
    thin.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    thin.set_defaults(run=run_thin)


def run_thin(options: argparse.Namespace) -> int:
    """Thin."""
    with connect(options.store) as asked:
        report = asked.thin(dry_run=options.dry_run)
    if options.json:
        show(report)
        return 0
    say(f"{'SNAPSHOT':<28}  {'TIME':<58}  {'HOLDS':>10}  FATE  REASONS")
    for snapshot in report["snapshots"]:
        fate = "keep" if snapshot["kept"] else "drop"
        reasons = ", ".join(snapshot["reasons"])
        when = both(snapshot["time"])
        say(f"{snapshot['id']:<28}  {when:<58}  {format_bytes(snapshot['held_bytes']):>10}  {fate}  {reasons}")
    return 0
