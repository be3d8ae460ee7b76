"""Progress of initial copies on the daemon's terminal: a bar with a rate; in a log a line for each tenth."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Final

import trio

from dmafs.service.engine import Engine
from dmafs.units import SECTOR, format_bytes

log = logging.getLogger(__name__)

REFRESH_S: Final = 0.2


async def show_progress(engines: Mapping[str, Engine]) -> None:
    """Show the initial copies that are under way until they are complete."""
    copying = {name: engine for name, engine in engines.items() if not engine.volume.pointers.now.copied}
    if not copying:
        return
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        await _log_tenths(copying)
        return
    try:
        await _show_bars(copying)
    except OSError:  # the terminal is gone; the daemon isn't
        log.warning("the terminal can't be written any more; progress is in dmafs status")


async def _show_bars(copying: dict[str, Engine]) -> None:
    from rich import progress as bars  # noqa: PLC0415 - likewise
    from rich.console import Console  # noqa: PLC0415 - slow to import, and needed for terminals only

    text = bars.TextColumn("copying {task.description}")
    rate = bars.TextColumn("{task.fields[rate]}/s")
    columns = text, bars.BarColumn(), bars.DownloadColumn(binary_units=True), rate, bars.TimeRemainingColumn()
    with bars.Progress(*columns, console=Console(stderr=True), auto_refresh=False) as progress:
        tasks = {
            name: progress.add_task(name, total=engine.progress.total * SECTOR, rate="")
            for name, engine in copying.items()
        }
        done = False
        while not done:
            await trio.sleep(REFRESH_S)
            done = all(engine.volume.pointers.now.copied for engine in copying.values())
            for name, engine in copying.items():
                speed = format_bytes(int(engine.progress.bytes_per_s))
                progress.update(tasks[name], completed=engine.progress.done * SECTOR, rate=speed)
            progress.refresh()


async def _log_tenths(copying: dict[str, Engine]) -> None:
    shown = dict.fromkeys(copying, 0)
    while any(not engine.volume.pointers.now.copied for engine in copying.values()):
        await trio.sleep(REFRESH_S)
        for name, engine in copying.items():
            tenths = engine.progress.done * 10 // engine.progress.total
            if tenths > shown[name]:
                shown[name] = tenths
                rate = format_bytes(int(engine.progress.bytes_per_s))
                log.info("volume %s: initial copy %d %%, %s/s", name, tenths * 10, rate)
