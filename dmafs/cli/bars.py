"""A bar of progress: on a terminal only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dmafs.cli.output import has_bars
from dmafs.client import Show


@contextlib.contextmanager
def bar(text: str) -> Iterator[Show]:
    """Yield what shows how far something is: a bar on a terminal, else nothing."""
    if not has_bars():
        yield lambda _done, _total: None
        return
    from rich import progress as bars  # noqa: PLC0415 - slow to import, and needed for terminals only
    from rich.console import Console  # noqa: PLC0415 - likewise

    columns = bars.BarColumn(), bars.DownloadColumn(binary_units=True), bars.TransferSpeedColumn()
    label, left = bars.TextColumn("{task.description}"), bars.TimeRemainingColumn()
    with bars.Progress(label, *columns, left, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
