"""``dmafs mount`` and ``umount``: the files of a moment."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.common import JSON, add_store
from dmafs.cli.copying import volume_and_time
from dmafs.cli.output import both, note, warn
from dmafs.client import connect

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    mount = commands.add_parser(
        "mount",
        parents=JSON,
        help="mount the file system of a volume at a time",
        description="Mount what was on a volume at a time, read-only, with its journal replayed if it needs that. A "
        "daemon has to serve the store.",
    )
    add_store(mount)
    mount.add_argument(
        "what", metavar="VOLUME@TIME", help="volume, which may be left out if it is the only one, and time"
    )
    mount.add_argument("directory", metavar="DIR", type=Path, help="where to")
    mount.add_argument("--partition", metavar="N", type=int, help="number of the partition (the only one)")
    mount.add_argument("--writable", action="store_true", help="let it be written to; that is lost with umount")
    mount.add_argument("--options", metavar="O", default="", help="further options for mount(8)")
    mount.set_defaults(run=run_mount)

    umount = commands.add_parser(
        "umount",
        parents=JSON,
        help="unmount what dmafs mount has mounted",
        description="Unmount what dmafs mount has mounted, and drop all that was made for it. If somebody uses it, say "
        "who.",
    )
    umount.add_argument("directory", metavar="DIR", type=Path, help="where it is mounted")
    umount.set_defaults(run=run_umount)


def run_mount(options: argparse.Namespace) -> int:
    """Mount."""
    from dmafs.service import extraction, pastmount  # noqa: PLC0415 - needed by this command only

    volume, time = volume_and_time(options.what)
    tree = pastmount.require_tree(options.store)
    with connect(options.store) as asked:
        request = pastmount.Request(
            lambda: extraction.range_at(asked, volume, time, 0, None),
            Path(os.path.realpath(options.directory)),
            number=options.partition,
            writable=options.writable,
            options=options.options,
        )
        report = pastmount.mount_moment(asked, tree, request)
    where = f"volume {report['volume']}" + (f" partition {report['partition']}" if report["partition"] else "")
    how = "from the image" if report["clone"] is None else f"from clone {report['clone']}, its journal replayed"
    what = f"{report['type']} of {where} at {both(report['time'])} mounted at {report['directory']}"
    note(f"{what}\n  {report['device']}, {report['options']}, {how}", report)
    return 0


def run_umount(options: argparse.Namespace) -> int:
    """Unmount; 1 if the clone is left."""
    from dmafs.service import pastmount  # noqa: PLC0415 - needed by this command only

    report = pastmount.unmount(Path(os.path.realpath(options.directory)))
    note(f"{report['directory']} unmounted", report)
    if report["left"]:
        warn(
            f"clone {report['clone']} is left, since its file system is mounted elsewhere too or "
            "nobody serves the store; the next dmafs mount or umount drops it once nobody has it open"
        )
    return 1 if report["left"] else 0
