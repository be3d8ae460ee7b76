"""Logs that follow each other: what a tap reads whose device gets a new log before the old one is full.

Each log is a file of fixed size, named by its first place. The next log's first place is the one behind the old file's
last byte, so the place behind a log that has ended *is* the first one of the next log, whether that is there yet or
not: a journal that ends there goes on in the next log without any look at the old one, which may be gone by then.

Invariants:

1. A log is left only behind its end mark. One that just stops while there is a newer one has lost something.
2. The place behind the last window is kept here: a reader's own position may be inside of a window already.
3. Nothing of a window is a hole: a write to the log that fails leaves one, and the target may go on behind it. An end
   mark doesn't say that all before it is there.
4. The last log stays until there is a newer one: it says where that one has to begin.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

from dmafs.core.storage import File, open_log
from dmafs.errors import CorruptionError, LogLostError
from dmafs.taps.capture import Log, LoggedTap, Scanned
from dmafs.taps.logreader import LogReader
from dmafs.units import SECTOR

_HINT = "the primary is compared with the newest image"


class ChainedTap(LoggedTap):
    """See the module."""

    def __init__(self, primary: File, size_sectors: int, *, sector_bytes: int) -> None:
        """Follow no log yet; *sector_bytes* is the size of a log sector, since super blocks come late and may go."""
        super().__init__(primary, size_sectors)
        self.ended = False
        """Whether the newest log has ended, and all of it was scanned."""
        self._sector_bytes = sector_bytes
        self._log: Log | None = None
        self._place = self._least = 0
        self._opened: list[Log] = []

    @abstractmethod
    def log_paths(self) -> list[Path]:
        """Return the logs that the device has or had, not those that it will be given."""

    def is_over(self) -> bool:
        """Say whether nothing can come into the newest log any more."""
        return False

    def firsts(self) -> list[int]:
        """Return the first places of all logs, ascending."""
        return sorted(int(path.stem) for path in self.log_paths())

    def next_first(self) -> int:
        """Return the first place of a log behind all others, and behind what the journal has."""
        last = max(self.log_paths(), key=lambda path: int(path.stem), default=None)
        return max(self._least, int(last.stem) + last.stat().st_size // SECTOR if last else 0)

    # -- the place ----------------------------------------------------------------------------------------------

    def begin(self, position: int, retained: int) -> None:
        """See ``LoggedTap``."""
        self._least = position
        start = max((first for first in self.firsts() if first <= retained), default=None)
        if start is None:
            raise LogLostError(f"no log reaches back to place {retained}, which the journal needs", hint=_HINT)
        self.follow(start, retained)
        for scanned in self._before(position):
            self.arbiter.remember(scanned.log.file, scanned.window, scanned.begin)
        if self._place != position:
            raise LogLostError(
                f"the log {self._current.file.name} has no entry where the journal ends, at place {position}",
                hint=_HINT,
            )
        self.captured_place = position

    def _before(self, position: int) -> Iterator[Scanned]:
        """Yield the windows from the present place up to *position*."""
        while self._place < position:
            scanned = self.scan()
            if scanned is None:
                return
            yield scanned

    @property
    def _current(self) -> Log:
        assert self._log is not None
        return self._log

    def follow(self, first: int, place: int) -> None:
        """Go on at a place of the log that begins at *first*."""
        path = next(path for path in self.log_paths() if int(path.stem) == first)
        file = open_log(path)
        try:
            reader = LogReader(
                file,
                size_sectors=self.size_sectors,
                position=(place - first) * SECTOR,
                sector_bytes=self._sector_bytes,
            )
        except CorruptionError as error:
            file.close()
            raise LogLostError(error.message, hint=error.hint) from error
        self._log = Log(file, first, reader)
        self._opened.append(self._log)
        self._place = place
        self.ended = place == _end(self._log)

    # -- reading ------------------------------------------------------------------------------------------------

    def scan(self) -> Scanned | None:
        """See ``LoggedTap``."""
        newer, over = self._newer(), self.is_over()
        if self.ended:
            if newer is None:
                return None
            if newer != self._place:
                raise LogLostError(f"no log has what is between places {self._place} and {newer}", hint=_HINT)
            self.follow(newer, newer)
            newer = self._newer()
        log = self._current
        try:
            window = log.reader.scan()
        except CorruptionError as error:
            raise LogLostError(error.message, hint=error.hint) from error
        if window is None:
            if newer is not None or over:  # was so before the look at this log, which so has to be whole
                why = "there is a newer one" if newer is not None else "its device is gone"
                raise LogLostError(f"the log {log.file.name} stops without an end, and {why}", hint=_HINT)
            return None
        if log.file.has_hole(window.begin, window.end):
            raise LogLostError(f"the log {log.file.name} has a hole after byte {window.begin}", hint=_HINT)
        if self.keeps_discarded:
            window = self.without_discards(window)
        self.ended = window.closing == "end"
        scanned = Scanned(log, window, _end(log) if self.ended else None)
        self._place = scanned.end
        return scanned

    def _newer(self) -> int | None:
        """Return the first place of the log behind the present one."""
        return min((first for first in self.firsts() if first > self._current.first), default=None)

    # -- letting go ---------------------------------------------------------------------------------------------

    def release(self, place: int) -> None:
        """See ``LoggedTap``: closes the logs that lie wholly before a place, and has the rest freed."""
        for log in [each for each in self._opened if each is not self._log and _end(each) <= place]:
            log.file.close()
            self._opened.remove(log)
        paths = sorted(self.log_paths(), key=lambda path: int(path.stem))  # none after an attach that has failed
        for path in paths:
            first, size = int(path.stem), path.stat().st_size // SECTOR
            if path != paths[-1] and first + size <= place:
                path.unlink()
            elif first < place:
                self.punch(path, min(place - first, size))

    @abstractmethod
    def punch(self, path: Path, sectors: int) -> None:
        """Free the space of the first sectors of a log."""

    def close(self) -> None:
        """See ``LoggedTap``."""
        self.close_logs()
        self.primary.close()

    def close_logs(self) -> None:
        """Close the logs."""
        for log in self._opened:
            log.file.close()
        self._opened = []
        self._log = None


def _end(log: Log) -> int:
    """Return the place behind a log's file."""
    return log.first + log.file.size() // SECTOR
