"""``dmafs create``: put a source under protection."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import note, warn
from dmafs.errors import InputError
from dmafs.service.configuration import VolumeTable
from dmafs.service.making import make_volume

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "create",
        parents=JSON,
        help="make a volume, and the store if it isn't there",
        description="Make a volume for a source. The daemon then copies the source while it already captures writes.",
    )
    add_store(command)
    command.add_argument("volume", metavar="VOLUME", nargs="?", default="disk", help="name of the volume (%(default)s)")
    command.add_argument(
        "--source", metavar="PATH", type=Path, required=True, help="the primary: a block device or a disk image"
    )
    command.add_argument(
        "--tap",
        choices=["fuse", "dm", "log"],
        default="fuse",
        help="how writes are captured: fuse (the default), tap/VOLUME.img is used in place of the source; dm, device "
        "/dev/mapper/dmafs-VOLUME is; log, QEMU logs them",
    )
    command.add_argument("--log", metavar="FILE", type=Path, help="with --tap log, the file that QEMU logs to")
    command.add_argument("--force", action="store_true", help="even if the source is mounted read-write")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Create the volume."""
    if (options.log is not None) != (options.tap == "log"):
        raise InputError("--tap log and --log FILE belong together", hint="give both or none")
    wanted = VolumeTable(options.volume, options.source, options.tap, options.log)
    warnings, device = make_volume(options.store, wanted, force=options.force)
    for warning in warnings:
        warn(warning)
    made = f"volume {options.volume} made in {options.store}; now run: dmafs serve {options.store} MOUNTPOINT"
    if device:
        made = f"device {device} made; use it in place of the source\n{made}"
    report = {"device": device or None, "store": str(options.store), "volume": options.volume, "warnings": warnings}
    note(made, report)
    return 1 if warnings else 0
