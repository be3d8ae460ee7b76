"""``dmafs cp``: an image, or a range of one, as a file, onto a device, or to standard output."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dmafs.cli.bars import bar
from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import both, note, write
from dmafs.client import connect
from dmafs.errors import InputError
from dmafs.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    cp = commands.add_parser(
        "cp",
        parents=JSON,
        help="copy a volume at a time to a file, a device or standard output",
        description="Copy a volume, or a range of it, as it was at a time. A file gets holes in place of zeros, and "
        "its name when it is complete.",
    )
    add_store(cp)
    cp.add_argument("what", metavar="VOLUME@TIME", help="volume, which may be left out if it is the only one, and time")
    cp.add_argument("target", metavar="FILE", type=Path, help="file, block device, or - for standard output")
    cp.add_argument("--offset", metavar="N", default=None, help="first byte (0)")
    cp.add_argument("--length", metavar="N", default=None, help="number of bytes (all that follow)")
    cp.add_argument("--force", action="store_true", help="replace a file, overwrite a block device")
    cp.set_defaults(run=run)


def volume_and_time(text: str) -> tuple[str | None, str]:
    """Return the parts of VOLUME@TIME; the volume is None where it is left out."""
    volume, at, time = text.partition("@")
    if not at or not time:
        raise InputError(f"{text!r} is not VOLUME@TIME", hint="for instance disk@1h ago, or @1h ago")
    return volume or None, time


def run(options: argparse.Namespace) -> int:
    """Copy."""
    from dmafs.service import extraction  # noqa: PLC0415 - needed by this command only

    volume, time = volume_and_time(options.what)
    offset = 0 if options.offset is None else parse_bytes(options.offset)
    length = None if options.length is None else parse_bytes(options.length)
    target = None if options.target == Path("-") else Path(os.path.realpath(options.target))
    if target is None and options.json:
        raise InputError("--json has no place beside the bytes on standard output", hint="give a file, or leave it out")
    if target is None and sys.stdout.isatty():
        raise InputError("standard output is a terminal", hint="send it to a file or another program")
    with connect(options.store) as asked:
        wanted = extraction.range_at(asked, volume, time, offset, length)
        if target is not None:
            sources = [Path(report["source"]) for report in asked.status()["volumes"]]
            extraction.check_target(target, wanted.length, sources, options.store, force=options.force)

        def look_up() -> extraction.Range:
            return extraction.range_at(asked, volume, time, offset, length)

        with extraction.opened(asked, options.store, look_up) as (found, parts), bar(f"copying {found.volume}") as show:
            if target is None:
                _pass_on(parts)
                return 0
            if target.exists() and stat.S_ISBLK(target.stat().st_mode):
                data = extraction.to_device(target, found, parts, show)
            else:
                data = extraction.to_file(target, found, parts, show, force=options.force)
    size = f"{format_bytes(found.length)}, {format_bytes(data)} of it data"
    note(
        f"volume {found.volume} at {both(found.time)} copied to {target}: {size}",
        {
            "at": found.at,
            "bytes": found.length,
            "data_bytes": data,
            "file": str(target),
            "offset": found.offset,
            "time": found.time,
            "volume": found.volume,
        },
    )
    return 0


def _pass_on(parts: Iterator[bytes]) -> None:
    for part in parts:
        write(part)
