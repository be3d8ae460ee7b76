"""``dmafs status``, ``ls``, ``read`` and ``diff``: what there is."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Final

from dmafs.answers import Device, Plan, VolumeStatus
from dmafs.cli.common import JSON, TELLING, add_store
from dmafs.cli.output import both, named, say, show, write
from dmafs.client import connect
from dmafs.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


_LINE: Final = "{:<56}  {:<10}  {:>10}  {:<8}  {:<6}  {}"


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    status = commands.add_parser(
        "status",
        parents=JSON,
        help="show the state of all volumes",
        description="Show the state of the daemon and of all volumes.",
    )
    add_store(status)
    status.set_defaults(run=run_status)

    points = commands.add_parser(
        "ls",
        parents=JSON,
        help="list recoverable points and snapshots",
        description="List recoverable points: snapshots, a coarse grid, the ends. Every write since the mirror is one.",
    )
    add_store(points)
    points.set_defaults(run=run_ls)

    read = commands.add_parser(
        "read",
        parents=TELLING,
        help="write bytes of a volume at a time to standard output",
        description="Write bytes of a volume as they were at a time to standard output.",
    )
    add_store(read)
    read.add_argument("volume", metavar="VOLUME", help="name of the volume")
    read.add_argument("--at", metavar="TIME", required=True, help="the moment")
    read.add_argument("--offset", metavar="N", required=True, help="first byte, also as in 64MiB")
    read.add_argument("--length", metavar="N", required=True, help="number of bytes, likewise")
    read.set_defaults(run=run_read)

    diff = commands.add_parser(
        "diff",
        parents=JSON,
        help="list what was written to a volume between two times",
        description="List the extents of a volume that were written between two times, in either order. Outside of "
        "them its images are equal. No data is read: what was overwritten with the same bytes is listed too.",
    )
    add_store(diff)
    diff.add_argument("volume", metavar="VOLUME", help="name of the volume")
    diff.add_argument("a", metavar="A", help="one moment, written as a TIME")
    diff.add_argument("b", metavar="B", help="the other moment")
    diff.set_defaults(run=run_diff)


def run_status(options: argparse.Namespace) -> int:
    """Show the status."""
    with connect(options.store) as asked:
        report = asked.status()
    if options.json:
        show(report)
    else:
        daemon = report["daemon"]
        say(f"store {options.store}: " + (f"served by process {daemon['pid']}" if daemon else "no daemon"))
        configuration = daemon["configuration"] if daemon else None
        if configuration and configuration["file"]:
            say(f"configuration {configuration['file']}, loaded {both(configuration['loaded'])}")
        for alarm in report["alarms"]:
            say(f"  alarm     {alarm['message']} (since {both(alarm['since'])})")
        schedule = daemon["schedule"] if daemon else None
        if schedule:
            say(f"snapshots by schedule: {_plan_text(schedule['snapshots'])}")
        for volume in report["volumes"]:
            say("\n".join(_volume_lines(volume)))
            if schedule:
                say(f"  syncs     {_plan_text(schedule['syncs'][volume['name']])}")
    return 1 if report["alarms"] or any(volume["state"] == "read-only" for volume in report["volumes"]) else 0


def _volume_lines(volume: VolumeStatus) -> list[str]:
    lines = [
        f"volume {volume['name']}: {volume['state']}, {format_bytes(volume['size_bytes'])} from {volume['source']}"
    ]
    if (failure := volume["failure"]) is not None:
        lines += [f"  failure   {failure['what']} (since {both(failure['since'])})", f"  to do     {failure['hint']}"]
    if (device := volume["device"]) is not None:
        lines.append(f"  device    {device['device']}, {_device_text(device)}")
    if volume["state"] == "copying":
        rate = format_bytes(volume["copy_bytes_per_s"])
        lines.append(f"  copying   {volume['copy_fraction']:.1%} at {rate}/s")
    for label, place in (("oldest", volume["oldest"]), ("newest", volume["newest"]), ("mirror", volume["mirror"])):
        if place is not None and place["time"] is not None:
            lines.append(f"  {label:<9} {both(place['time'])}  seq {place['seq']}")
    for gap in volume["gaps"]:
        lasting = f"writes are not captured: {volume['loss']}" if volume["loss"] else "a resync is under way"
        end = both(gap["end"]["time"]) if gap["end"] else f"now: {lasting}"
        lines.append(f"  gap       {both(gap['begin']['time'])} to {end}")
    if check := volume["check"]:
        lines.append(f"  {check['kind']:<9} {check['fraction']:.1%} at {format_bytes(check['bytes_per_s'])}/s")
    if last := volume["last_check"]:
        found = f"{format_bytes(last['bytes'])} differed" if last["bytes"] else "no differences"
        lines.append(f"  checked   {both(last['time'])} ({last['kind']}): {found}")
    if scrub := volume["last_scrub"]:
        count, left = scrub["count"], scrub["count"] - scrub["repaired"]
        text = f"{count} damaged, {left} of them not repaired" if count else "no damage"
        cut = "" if scrub["ended"] else "; dmafs scrub goes on with it"
        lines.append(f"  scrubbed  {both(scrub['time'])}: {text}{cut}")
    forward = volume["forward"]
    segments = "1 segment" if forward["segments"] == 1 else f"{forward['segments']} segments"
    lines.append(f"  forward   {forward['events']} events, {format_bytes(forward['bytes'])} in {segments}")
    lines.append(f"  snapshots {volume['snapshots']}")
    return lines


def _device_text(device: Device) -> str:
    if not device["attached"]:
        return "not attached: writes to the source are not captured"
    used, limit = format_bytes(device["log_bytes"]), format_bytes(device["log_limit_bytes"])
    return f"log at {used} of {limit}" if device["logging"] else "logging has stopped"


def _plan_text(planned: Plan) -> str:
    last = planned["last"]
    then = f"; last {both(last['time'])} ({last['reason']}): {last['result']}" if last else ""
    return (f"next {both(planned['next'])}" if planned["next"] else "none planned") + then


def run_ls(options: argparse.Namespace) -> int:
    """List the points."""
    with connect(options.store) as asked:
        report = asked.points()
    if options.json:
        show(report)
        return 0
    say(_LINE.format("TIME", "VOLUME", "SEQ", "KIND", "STATE", "NAME"))
    for point in report["points"]:
        kind = "pinned" if point["pinned"] else point["kind"]
        columns = (point[key] for key in ("consistency", "name"))
        say(_LINE.format(both(point["at"]), point["volume"], point["seq"], kind, *columns).rstrip())
    return 0


def run_read(options: argparse.Namespace) -> int:
    """Write the bytes."""
    offset, length = parse_bytes(options.offset), parse_bytes(options.length)
    with connect(options.store) as asked:
        for part in asked.read(options.volume, at=options.at, offset=offset, length=length):
            write(part)
    return 0


def run_diff(options: argparse.Namespace) -> int:
    """List the extents."""
    with connect(options.store) as asked:
        report = asked.diff(options.volume, options.a, options.b)
    extents = report["extents"]
    if options.json:
        show({**report, "extents": named(extents), "count": len(extents)})
        return 0
    for name, end in (("a", report["a"]), ("b", report["b"])):
        say(f"{name} {both(end['time'])}  seq {end['seq']}")
    say(f"{'OFFSET':>16}  {'LENGTH':>16}")
    for offset, length in extents:
        say(f"{offset:>16}  {length:>16}")
    count = "1 extent" if len(extents) == 1 else f"{len(extents)} extents"
    say(f"{'total':>16}  {report['bytes']:>16}  bytes in {count}")
    return 0
