"""``dmafs tap``: the mapped devices that volumes with the dm tap are used through."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dmafs.answers import Device
from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import say, show
from dmafs.client import connect
from dmafs.service.operations import ACTIONS
from dmafs.units import format_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "tap",
        parents=JSON,
        help="make, remove or show the mapped device of a volume",
        description="Make or remove the device /dev/mapper/dmafs-VOLUME that a source with the dm tap is used through, "
        "or show its state. What is so already stays so.",
    )
    command.add_argument("action", choices=ACTIONS, help="what to do")
    add_store(command)
    command.add_argument("volume", metavar="VOLUME", nargs="?", help="name of the volume (all that have a device)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Do it."""
    with connect(options.store) as asked:
        reports = asked.tap(options.action, options.volume)["volumes"]
    if options.json:
        show({"volumes": reports})
    else:
        for report in reports:
            say("\n".join(_lines(report)))
    return 0


def _lines(report: Device) -> list[str]:
    if not report["attached"]:
        return [f"volume {report['volume']}: {report['device']} is not attached"]
    used, limit = format_bytes(report["log_bytes"]), format_bytes(report["log_limit_bytes"])
    state = "logging" if report["logging"] else "logging has stopped: a gap"
    users = {0: "nobody has it open", 1: "1 user"}.get(report["open_count"], f"{report['open_count']} users")
    return [
        f"volume {report['volume']}: {report['device']} is attached, {users}",
        f"  log       {report['log']}",
        f"            {used} of {limit}, {report['log_entries']} entries, {state}",
    ]
