"""``dmafs import``: a volume from a recorded log."""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dmafs.cli.common import JSON, add_store
from dmafs.cli.output import has_bars, note, warn
from dmafs.taps.recorded import Imported, Progress, import_volume
from dmafs.taps.timeline import MarkTimes, TimesInFile, TimesInMarks
from dmafs.units import parse_bytes

if TYPE_CHECKING:
    from argparse import _SubParsersAction


REFRESH_S: Final = 0.1


def add_commands(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "import",
        parents=JSON,
        help="make a volume of a recorded log",
        description="Make a volume that has the history in a log in dm-log-writes format, which device-mapper or QEMU "
        "has recorded. Each flush and each mark in it becomes a moment.",
    )
    add_store(command)
    command.add_argument("volume", metavar="VOLUME", nargs="?", default="disk", help="name of the volume (%(default)s)")
    command.add_argument("--log", metavar="FILE", type=Path, required=True, help="the log")
    before = command.add_mutually_exclusive_group(required=True)
    before.add_argument("--base", metavar="IMAGE", type=Path, help="what the disk held before the log began")
    before.add_argument("--size", metavar="SIZE", help="it held zeros, and has this size")
    times = command.add_mutually_exclusive_group()
    times.add_argument(
        "--at-marks", action="store_true", help="marks whose text is a time say when all before them was"
    )
    times.add_argument("--times", metavar="FILE", type=Path, help="lines MARK TIME say when all before a mark was")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Import."""
    marks = TimesInMarks() if options.at_marks else TimesInFile(options.times) if options.times else MarkTimes()
    size = None if options.size is None else parse_bytes(options.size)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each segment of a journal is two open files
    with _progress() as progress:
        imported = import_volume(
            options.store,
            options.volume,
            log=options.log,
            base=options.base,
            size_bytes=size,
            marks=marks,
            now=time.time_ns(),
            progress=progress,
        )
    counts = {"events": imported.events, "marks": imported.marks, "windows": imported.windows}
    doubts = {"doubtful_sectors": imported.doubtful_sectors, "other_marks": imported.other_marks}
    note(
        f"volume {options.volume} made in {options.store}: {imported.events} events in {imported.windows} windows, "
        f"{imported.marks} marks",
        {"store": str(options.store), "volume": options.volume, **counts, **doubts},
    )
    return _warn(imported)


def _warn(imported: Imported) -> int:
    """Print what is doubtful; return the exit status."""
    if imported.other_marks:
        warn(f"{imported.other_marks} marks have texts that can't be names")
    if imported.doubtful_sectors:
        shown = ", ".join(f"{start}+{stop - start}" for start, stop in imported.doubts)
        warn(
            f"{imported.doubtful_sectors} sectors were written with FUA and without, in an order that "
            f"the log doesn't tell: its own was taken (sectors {shown})"
        )
    return 1 if imported.doubtful_sectors else 0


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Yield what shows progress: a bar on a terminal, nothing elsewhere."""
    if not has_bars():
        yield lambda _what, _done, _total: None
        return
    from rich import progress as bars  # noqa: PLC0415 - slow to import, and needed for terminals only
    from rich.console import Console  # noqa: PLC0415 - likewise

    text = bars.TextColumn("{task.description}")
    columns = text, bars.BarColumn(), bars.DownloadColumn(binary_units=True), bars.TimeRemainingColumn()
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        shown = 0.0

        def show(what: str, done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown >= REFRESH_S:
                shown = now
                progress.update(task, description=what, completed=done, total=total)

        yield show
