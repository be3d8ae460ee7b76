"""``dmafs verify``, ``resync``, ``scrub``: whether the newest image is the source, and the store what was written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dmafs.answers import Differences, Place, Scrubbed
from dmafs.cli.bars import bar
from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import both, named, say, show
from dmafs.client import Session, Show, connect
from dmafs.errors import CorruptionError, DifferenceError
from dmafs.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    verify = commands.add_parser(
        "verify",
        parents=JSON,
        help="compare the newest image with the source",
        description="Compare the newest image with the source, block by block, while writes go on. List the extents "
        "that differ; the exit status is 26 then.",
    )
    resync = commands.add_parser(
        "resync",
        parents=JSON,
        help="have the newest image be the source again",
        description="Compare the newest image with the source, while writes go on. What differs is journaled as the "
        "source has it, in a gap, and listed.",
    )
    scrub = commands.add_parser(
        "scrub",
        parents=JSON,
        help="compare the store with its checksums, and repair it",
        description="Read all that has a checksum from the disk, while everything goes on, and compare it. What is "
        "damaged is repaired where the source still has it; all is listed with the moments that show it, and the exit "
        "status is 14 if something is left. A scrub that was cut off goes on where it was.",
    )
    for command in (verify, resync, scrub):
        add_store(command)
        command.add_argument("volume", metavar="VOLUME", nargs="?", help="name of the volume (each in turn)")
        command.add_argument("--rate", metavar="SIZE", help="bytes to read a second, 0: no limit ([resync] rate)")
    verify.set_defaults(run=run_verify)
    resync.set_defaults(run=run_resync)
    scrub.set_defaults(run=run_scrub)


def run_verify(options: argparse.Namespace) -> int:
    """Verify; DifferenceError if something differs."""
    with connect(options.store) as asked:
        reports = [_compared(asked.verify, "verify", name, options.rate) for name in _names(asked, options.volume)]
    _print(reports, as_json=options.json, one="differs", many="differ")
    differing = [report for report in reports if report["count"]]
    if differing:
        names = ", ".join(report["volume"] for report in differing)
        size = format_bytes(sum(report["bytes"] for report in differing))
        raise DifferenceError(
            f"source and newest image differ in {size} of volume {names}",
            hint="find out what writes to the source past the tap, then run: dmafs resync STORE",
        )
    return 0


def run_resync(options: argparse.Namespace) -> int:
    """Resync."""
    with connect(options.store) as asked:
        reports = [_compared(asked.resync, "resync", name, options.rate) for name in _names(asked, options.volume)]
    _print(reports, as_json=options.json, one="taken over", many="taken over")
    return 0


def run_scrub(options: argparse.Namespace) -> int:
    """Scrub; CorruptionError if damage is left."""
    with connect(options.store) as asked:
        reports = [_compared(asked.scrub, "scrub", name, options.rate) for name in _names(asked, options.volume)]
    if options.json:
        show({"volumes": reports})
    else:
        for report in reports:
            _print_damage(report)
    left = [report for report in reports if report["count"] > report["repaired"]]
    if left:
        places = sum(report["count"] - report["repaired"] for report in left)
        raise CorruptionError(
            f"{places} damaged place{'s' * (places != 1)} of volume {', '.join(report['volume'] for report in left)} "
            "can't be repaired",
            hint="look at the store's disk; moments that don't show them are whole; what the newest image shows, "
            "dmafs resync STORE takes from the source",
        )
    return 0


def _print_damage(report: Scrubbed) -> None:
    read = format_bytes(report["read_bytes"])
    if not report["count"]:
        say(f"volume {report['volume']}: no damage in {read}")
        return
    places = "1 place" if report["count"] == 1 else f"{report['count']} places"
    say(f"volume {report['volume']}: {places} damaged in {read}, {report['repaired']} repaired")
    say(f"{'OFFSET':>16}  {'LENGTH':>12}  {'STATE':<9}  {'FIRST MOMENT':<59}  {'LAST MOMENT':<59}  FILE")
    for one in report["damage"]:
        first, last = _time(one["first"]), _time(one["last"])
        state = "repaired" if one["repaired"] else "damaged"
        last = "now" if one["newest"] else last
        say(f"{one['offset']:>16}  {one['length']:>12}  {state:<9}  {first:<59}  {last:<59}  {one['file']}")
    if report["count"] > len(report["damage"]):
        say(f"{'...':>16}  {'':>12}  {report['count'] - len(report['damage'])} more")


def _time(place: Place | None) -> str:
    return both(place["time"]) if place and place["time"] else "-"


Found = TypeVar("Found")


def _names(asked: Session, volume: str | None) -> list[str]:
    return [volume] if volume is not None else [report["name"] for report in asked.status()["volumes"]]


def _compared(compare: Callable[[str, int | None, Show], Found], what: str, name: str, rate: str | None) -> Found:
    bytes_per_s = None if rate is None else parse_bytes(rate)
    with bar(f"{what} {name}") as show:
        return compare(name, bytes_per_s, show)


def _print(reports: list[Differences], *, as_json: bool, one: str, many: str) -> None:
    if as_json:
        show({"volumes": [{**report, "extents": named(report["extents"])} for report in reports]})
        return
    for report in reports:
        compared, busy = format_bytes(report["compared_bytes"]), report["busy_bytes"]
        written = f", {format_bytes(busy)} written all the time" if busy else ""
        if not report["count"]:
            say(f"volume {report['volume']}: no differences in {compared}{written}")
            continue
        count = f"1 extent {one}" if report["count"] == 1 else f"{report['count']} extents {many}"
        say(f"volume {report['volume']}: {count}{written}")
        say(f"{'OFFSET':>16}  {'LENGTH':>16}")
        for offset, length in report["extents"]:
            say(f"{offset:>16}  {length:>16}")
        if report["count"] > len(report["extents"]):
            say(f"{'...':>16}  {'':>16}  {report['count'] - len(report['extents'])} more")
        say(f"{'total':>16}  {report['bytes']:>16}  bytes")
