"""The log tap: follows a log that QEMU's ``blklogwrites`` driver writes, while it writes it.

What that driver does (7.2): it writes the primary, then takes the log's next slot and writes header and data there in
one call, then acknowledges. So the log's order is the order of completion, also of FUA writes. Several such calls may
be under way, so a header may be visible while the data of an entry before it isn't. Only at a flush, and every so many
entries, the super block is written with the number of entries. From that:

1. An entry counts when the super block counts it and did so ``settle_s`` ago already: what was under way then is done.
2. When the driver starts anew it writes the log from its beginning again (unless told to append), over what is there;
   the super block stays as it is until the first flush. So before anything is taken, and again before it is journaled,
   the log has to be the one that was read so far: the same file, no fewer entries, and the same bytes at its beginning
   and before the position. Otherwise capture is lost: LogLostError, and the number of entries that the super block
   gives is one of the old log until it changes.
3. After a start of ours the log has to have, right before the position, what the journal has at its end.

The log is never written, and nothing is ever let go of in it: it is not ours. Nobody can be made to flush: a moment is
whenever the guest flushes.

Places: each log of the volume, one after the other in the same file, begins at a multiple of ``STRIDE``.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from dmafs.core.ondisk import checksum
from dmafs.core.storage import File, RealFile, open_source
from dmafs.core.volume import Volume
from dmafs.errors import CorruptionError, LogLostError, SourceError
from dmafs.taps.arbiter import Verdict
from dmafs.taps.capture import Log, LoggedTap, Scanned
from dmafs.taps.logreader import LoggedWindow, LogReader
from dmafs.units import SECTOR

STRIDE: Final = 1 << 40
"""Places that one log may have: 512 TiB."""
SETTLE_S: Final = 1.0
"""How long an entry has to be counted before it counts: many times what a write to the log takes."""
HEAD_BYTES: Final = 64 << 10
"""How much of a log's beginning tells it from another one: what overwrites a log begins there."""
TAIL_BYTES: Final = 4096
"""And how much before the position."""
EVIDENCE: Final = 64
"""How many of the journal's last events are looked for in the log after a start."""

_NOTHING: Final = (0, 0, checksum(b""))
"""Begin, end and checksum of what the log has to have still."""
_HINT: Final = "give the log a fresh file at each start of the virtual machine, or set log-append=on"


class LogTap(LoggedTap):
    """The tap of one volume. See the module."""

    def __init__(
        self,
        volume: Volume,
        primary: File,
        *,
        settle_s: float = SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Follow the log that volume.json names; *primary* is open for reading."""
        super().__init__(primary, volume.info.size_sectors)
        self._volume = volume
        self._path = Path(volume.info.log)
        self.settle_s = settle_s
        self._clock = clock
        self._checking = threading.Lock()
        """Held while what tells this log from another one is used or changed: never for long."""
        self._log: Log | None = None
        self._counts: deque[tuple[float, int]] = deque()  # when the super block was first seen with which number
        self._settled = 0  # so many entries count
        self._known = 0  # so many the super block has counted at last
        self._stale: int | None = None
        self._head = self._tail = _NOTHING

    # -- beginning ----------------------------------------------------------------------------------------------

    def begin(self, position: int, retained: int) -> None:
        """See ``LoggedTap``. Reads all headers before the position: the number of its entry has to be known."""
        del retained
        log = self._open(position // STRIDE * STRIDE)
        wanted, last = (position - log.first) * SECTOR, None
        found = self._super(log)
        if position and not wanted:  # stopped right after a loss
            self._stale = found
        try:
            while wanted and log.reader.position < wanted and found:
                window = log.reader.scan(found)
                if window is None:
                    break
                last = window if len(window) else last
        except CorruptionError as error:
            raise self._lost(error.message) from error
        if wanted and log.reader.position != wanted:
            raise self._lost(f"no flush ends at byte {wanted}, where reading should go on")
        if wanted and last is not None:
            self._require_evidence(log, last)
        self._settled = self._known = log.reader.number
        self._remember(log)
        self.captured_place = position

    def restart(self) -> int:
        """See ``LoggedTap``. Takes the log that is there now from its beginning: what is in it may be known already."""
        before = self._log
        first = (before.first if before else self.captured_place // STRIDE * STRIDE) + STRIDE
        with self._checking:
            log = self._open(first)
            if before is None or os.path.samestat(_stat(before.file), _stat(log.file)):
                self._stale = self._super(log)
            if before is not None:
                before.file.close()
            self.forget_all()
            self._remember(log)
        self.captured_place = first
        return first

    def _open(self, first: int) -> Log:
        """Open the log as one that begins at place *first*, and read nothing of it."""
        try:
            file = open_source(self._path, writable=False)
        except SourceError as error:
            raise LogLostError(f"log {self._path} can't be opened: {error.message}", hint=_HINT) from error
        self._log = Log(file, first, LogReader(file, size_sectors=self.size_sectors))
        self._counts.clear()
        self._settled = self._known = 0
        self._stale = None
        self._head = self._tail = _NOTHING
        return self._log

    def _require_evidence(self, log: Log, window: LoggedWindow) -> None:
        """Raise LogLostError unless a window's last rows are the journal's last events, if these came from a log."""
        segment = self._volume.journal.newest
        indicator = self._volume.journal.last_indicator(self._volume.journal.head)
        count = min(EVIDENCE, len(window), len(segment) if segment else 0)
        if segment is None or indicator is None or not count or indicator.time_ns != segment.times[-1]:
            return
        rows = log.reader.read(window, len(window) - count, len(window))
        for index, (start, length, data) in enumerate(rows, len(segment) - count):
            if segment.times[index] != segment.times[-1]:
                continue
            digest = 0 if data is None else checksum(data)
            if (start, length, digest) != (segment.starts[index], segment.lengths[index], segment.checksums[index]):
                raise self._lost("what is before the position isn't what was read from there")

    # -- scanning -----------------------------------------------------------------------------------------------

    def scan(self) -> Scanned | None:
        """See ``LoggedTap``."""
        log = self._current()
        self.check()
        with self._checking:
            self._count(log)
        try:
            window = log.reader.scan(self._settled) if self._settled > log.reader.number else None
        except CorruptionError as error:
            raise self._lost(error.message) from error
        if window is None:
            return None
        with self._checking:
            self._remember(log)
        return Scanned(log, window)

    def _count(self, log: Log) -> None:
        """Take in what the super block counts, and what it counted a while ago."""
        now, found = self._clock(), self._super(log)
        if found is not None and found > (self._counts[-1][1] if self._counts else self._settled):
            self._counts.append((now, found))
            self._known = found
        while self._counts and self._counts[0][0] + self.settle_s <= now:
            self._settled = self._counts.popleft()[1]

    def _super(self, log: Log) -> int | None:
        """Return how many entries the super block counts, None if it is from another log or not there yet."""
        try:
            found = log.reader.read_super()
        except CorruptionError as error:
            raise self._lost(error.message) from error
        if found is None or found.entries == self._stale:
            return None
        self._stale = None
        return found.entries

    def check(self) -> None:
        """See ``LoggedTap``. Also while another thread scans, captures or begins anew."""
        with self._checking:
            self._check(self._current())

    def _check(self, log: Log) -> None:
        try:
            there = self._path.stat()
        except OSError as error:
            raise self._lost((error.strerror or "it is gone").lower()) from error
        if not os.path.samestat(there, _stat(log.file)):
            raise self._lost("it is another file now")
        found = self._super(log)
        if self._known and (found or 0) < self._known:
            raise self._lost(f"it has {found or 0} entries, and had {self._known}")
        for begin, end, digest in (self._head, self._tail):
            if end > log.file.size() or _digest(log.file, begin, end) != digest:
                raise self._lost(f"its bytes {begin} to {end} have changed")

    def _remember(self, log: Log) -> None:
        """Remember what the log has at its beginning, if that is as it was, and before the position."""
        first, end = SECTOR, log.reader.position  # the super block changes
        head, tail = min(end, HEAD_BYTES), max(first, end - TAIL_BYTES)
        begin, known, digest = self._head
        if head > known and _digest(log.file, begin, known) == digest:
            self._head = (first, head, _digest(log.file, first, head))
        if end > tail:
            self._tail = (tail, end, _digest(log.file, tail, end))

    def judge(self, scanned: Scanned) -> Verdict:
        """See ``LoggedTap``. The order of this log is that of the disk."""
        del scanned
        return Verdict([], (np.empty(0, np.int64),) * 2)

    def note(self, scanned: Scanned) -> int:
        """See ``LoggedTap``. Nothing before is needed."""
        return scanned.end

    def release(self, place: int) -> None:
        """See ``LoggedTap``. Whoever writes the log keeps it."""

    def counted(self) -> int:
        """See ``LoggedTap``."""
        with self._checking:
            return self._super(self._current()) or 0

    def is_through(self, count: int) -> bool:
        """See ``LoggedTap``. What is counted and not flushed waits for its flush, and may be anything until then."""
        return self.pending is None and self._current().reader.number >= count

    def close(self) -> None:
        """See ``LoggedTap``."""
        if self._log is not None:
            self._log.file.close()
        self.primary.close()

    def _current(self) -> Log:
        assert self._log is not None, "the tap has begun"
        return self._log

    def _lost(self, reason: str) -> LogLostError:
        return LogLostError(f"log {self._path} can't be followed: {reason}", hint=_HINT)


def _stat(file: File) -> os.stat_result:
    assert isinstance(file, RealFile)
    return os.fstat(file.fileno())


def _digest(file: File, begin: int, end: int) -> int:
    data = bytearray(end - begin)
    file.read_into(data, begin)
    return checksum(data)
