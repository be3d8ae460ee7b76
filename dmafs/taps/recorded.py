"""Importing a recorded log: a new volume that has the history of a disk which somebody else has logged.

The log is read twice: the first time headers only, which finds damage, counts windows and learns their times from
marks, before anything is made; the second time everything is journaled, window by window.

A log in dm-log-writes format says in which order writes *completed*, with one exception: a FUA write is logged at its
own completion, a plain one only when a later flush has completed. So where a plain write overlaps a FUA write that
stands before it, with no flush between, nobody knows which was last. A live tap asks the primary; of a recorded log
the order of the log is taken, and what is doubtful is reported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from sortedcontainers import SortedDict

from dmafs.core.copy import complete_copy, initial_copy
from dmafs.core.ondisk import SIZE_SECTORS_MAX, Flag
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import new_volume
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError, SourceError
from dmafs.taps.logformat import LogFlag
from dmafs.taps.logreader import LoggedWindow, LogReader
from dmafs.taps.timeline import MarkTimes, Timeline
from dmafs.units import SECTOR, valid_name

TAP: Final = "none"
"""The tap of a volume that was imported: nothing captures, and there is no primary; its source is the log."""
DOUBTS_SHOWN: Final = 8
"""How many doubtful extents are remembered; all are counted."""

Progress = Callable[[str, int, int], None]
"""Is told what is being done, how much of it is done, and how much there is."""


@dataclass
class Imported:
    """What was imported."""

    windows: int = 0
    events: int = 0
    marks: int = 0
    """Marks that became marks of the volume."""
    other_marks: int = 0
    """Marks whose text is no name, and no time that is asked for."""
    doubtful_sectors: int = 0
    doubts: list[tuple[int, int]] = field(default_factory=list)
    """The first extents of these: start, stop."""


class Overtaking:
    """Finds the plain writes that overlap a FUA write which stands before them, with no flush between."""

    def __init__(self, found: Imported) -> None:
        """Report to *found*."""
        self._found = found
        self._stops: SortedDict[int, int] = SortedDict()  # of disjoint FUA extents, by their starts

    def look(self, window: LoggedWindow) -> None:
        """Take in a window."""
        flushing = np.flatnonzero(window.flags & int(LogFlag.FLUSH))
        end = int(flushing[0]) if len(flushing) else len(window)
        self._rows(window, 0, end)
        if window.closing == "flush":  # of a flush with data the flush came first
            self._stops.clear()
            self._rows(window, end, len(window))

    def _rows(self, window: LoggedWindow, begin: int, end: int) -> None:
        fua = window.flags[begin:end] & int(LogFlag.FUA)
        if not self._stops and not fua.any():
            return
        columns = window.starts[begin:end], window.lengths[begin:end], fua
        for start, length, is_fua in zip(*(column.tolist() for column in columns), strict=True):
            if is_fua:
                self._add(start, start + length)
            else:
                self._compare(start, start + length)

    def _add(self, start: int, stop: int) -> None:
        index = max(self._stops.bisect_right(start) - 1, 0)
        while index < len(self._stops):
            begin, end = self._stops.peekitem(index)
            if begin > stop:
                break
            if end < start:
                index += 1
                continue
            start, stop = min(start, begin), max(stop, end)
            del self._stops[begin]
        self._stops[start] = stop

    def _compare(self, start: int, stop: int) -> None:
        index = max(self._stops.bisect_right(start) - 1, 0)
        while index < len(self._stops):
            begin, end = self._stops.peekitem(index)
            if begin >= stop:
                return
            if end > start:
                overlap = max(begin, start), min(end, stop)
                self._found.doubtful_sectors += overlap[1] - overlap[0]
                if len(self._found.doubts) < DOUBTS_SHOWN:
                    self._found.doubts.append(overlap)
            index += 1


class NoTap:
    """The tap of a volume that was imported: it has no primary, so its mirror stands for that."""

    def __init__(self, volume: Volume) -> None:
        """Capture nothing."""
        self.primary = volume.mirror.file

    def close(self) -> None:
        """Leave the mirror open: it is the volume's."""


def import_volume(
    store: Path,
    name: str,
    *,
    log: Path,
    base: Path | None,
    size_bytes: int | None,
    marks: MarkTimes,
    now: int,
    progress: Progress,
) -> Imported:
    """Make a volume of a recorded log and of what the disk held before: the image *base*, or zeros.

    On any error nothing is changed. Everything in the log counts that its super block counts.
    """
    with contextlib.ExitStack() as files:
        file = open_source(log, writable=False)
        files.callback(file.close)
        image = open_source(base, writable=False) if base is not None else None
        if image is not None:
            files.callback(image.close)
        work = _Import(file, image, _size_of(image, size_bytes), Timeline(now), progress)
        work.survey(marks)
        with new_volume(store, name) as directory:
            storage, path = RealStorage(directory), log.absolute()
            Volume.create(
                storage,
                name=name,
                size_sectors=work.size_sectors,
                source=path,
                tap=TAP,
                created_ns=now,
                log_path=str(path),
            )
            work.fill(storage)
    return work.found


def _size_of(image: RealFile | None, size_bytes: int | None) -> int:
    """Return the size of the disk in sectors."""
    size = image.size() if image is not None else size_bytes or 0
    if size <= 0 or size % SECTOR or size > SIZE_SECTORS_MAX * SECTOR:
        what = f"base {image.name}" if image is not None else "size"
        raise SourceError(
            f"{what} of {size} bytes is not a positive multiple of {SECTOR}", hint="a disk has whole sectors"
        )
    return size // SECTOR


def _counted(reader: LogReader) -> int:
    """Return how many entries the log has."""
    found = reader.read_super()
    if found is None:
        raise CorruptionError(
            f"{reader.file.name} has no super block", hint="nothing was flushed while it was recorded, or it is no log"
        )
    return found.entries


class _Windows:
    """All windows of a recorded log, once."""

    def __init__(self, file: RealFile, size_sectors: int) -> None:
        self.reader = LogReader(file, size_sectors=size_sectors)
        self._entries = _counted(self.reader)

    def next(self) -> LoggedWindow | None:
        """Return the next window, None behind the last; CorruptionError where entries are missing."""
        window = self.reader.scan(self._entries)
        if window is None and self.reader.number < self._entries:
            raise CorruptionError(
                f"{self.reader.file.name} at byte {self.reader.position}: entry {self.reader.number + 1} of "
                f"{self._entries} is missing or not whole",
                hint="the log was cut off, or something else wrote to it",
            )
        return self.reader.rest() if window is None else window


class _Set:
    """A clock that shows what it is set to."""

    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@dataclass
class _Import:
    """One import on its way."""

    file: RealFile
    image: RealFile | None
    size_sectors: int
    timeline: Timeline
    progress: Progress
    found: Imported = field(default_factory=Imported)

    def survey(self, marks: MarkTimes) -> None:
        """Read all headers, and set the times of the windows."""
        windows, count = _Windows(self.file, self.size_sectors), 0
        while (window := windows.next()) is not None:
            if window.closing == "mark":
                time_ns = marks.time_of(window.mark)
                if time_ns is not None:
                    self.timeline.add(count, time_ns, f"mark {window.mark!a}")
                else:
                    self.found.other_marks += not valid_name(window.mark)
            count += 1
            self.progress("reading", window.end, self.file.size())
        marks.finish()
        self.timeline.finish(count)

    def fill(self, storage: RealStorage) -> None:
        """Copy the image and journal the windows, durably."""
        clock = _Set(self.timeline.origin_ns)
        volume = Volume(storage, clock=clock)
        try:
            run(self._copy(volume))
            windows, overtaking = _Windows(self.file, self.size_sectors), Overtaking(self.found)
            for clock.now in self.timeline.times():
                window = windows.next()
                if window is None:
                    raise CorruptionError(
                        f"{self.file.name} changed while it was read", hint="import a log that is complete"
                    )
                overtaking.look(window)
                run(self._journal(volume, windows.reader, window))
                self.progress("importing", window.end, self.file.size())
            run(volume.flush())
            volume.mark_clean()
        finally:
            volume.close()

    def _copy(self, volume: Volume) -> Work[None]:
        def flush(flag: Flag) -> Work[object]:
            return volume.flush(flag=flag)

        def show(done: int) -> None:
            self.progress("copying", done * SECTOR, self.size_sectors * SECTOR)

        if self.image is None:
            yield from complete_copy(volume, flush)
        else:
            yield from initial_copy(volume, self.image, flush, show)

    def _journal(self, volume: Volume, reader: LogReader, window: LoggedWindow) -> Work[None]:
        """Journal one window."""
        name = window.mark if window.closing == "mark" and valid_name(window.mark) else ""
        volume.require_space(int(window.data_bytes().sum()))
        pending = volume.begin_window()
        with volume.gate():
            for begin, end in window.batches():
                yield partial(pending.write, reader.read(window, begin, end))
            flag = Flag.FLUSH if window.closing == "flush" else Flag.TICK
            yield partial(pending.close, flag, position=window.end // SECTOR, retained=0, name=name)
        volume.publish(pending)
        self.found.windows += 1
        self.found.events += len(window)
        self.found.marks += bool(name)
