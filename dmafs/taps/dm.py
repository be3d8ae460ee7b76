"""The dm tap: a device-mapper ``log-writes`` target over the primary, whose logs are read from the store.

Everything that the target does against a reader is met here or one level below: entries whose data isn't there yet
(``logreader``), FUA writes that overtake plain ones (``arbiter``), a log that never wraps (``keep``: the device gets a
new one long before the end), a target that stops logging and says so to nobody (``check``, once a tick and before each
window counts).

The device outlives the daemon: what is written meanwhile waits in the log. It ends with ``detach``, or with the kernel.
After the first the log is whole, which its end mark says; after the second nothing in it is to be trusted.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from dmafs.core.ondisk import Flag
from dmafs.core.resync import begin_after_stop, needs_resync, start_again
from dmafs.core.storage import open_direct, open_log
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import CorruptionError, DmafsError, LogLostError, TapError
from dmafs.taps.capture import Log, LoggedTap, Scanned, capture
from dmafs.taps.kernellog import devices_under
from dmafs.taps.logreader import LoggedWindow, LogReader
from dmafs.taps.mapped import Lsn, MappedTap, device_name, first_of, log_paths
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

KEEP_SHARE: Final = 0.5
"""How full a log may be before the device gets a new one: the rest is for what comes while nobody reads."""

_COMPARED: Final = "the primary is compared with the newest image"


class DmTap(LoggedTap):
    """The tap of one volume; *mapped* is its device, None while there is none."""

    can_settle = True

    def __init__(self, volume: Volume, directory: Path, *, log_bytes: int) -> None:
        """Take over the device if there is one; *directory* is the volume's. Logs are made with *log_bytes*."""
        self._volume = volume
        self.directory = directory
        self._log_bytes = log_bytes
        self._source = Path(volume.info.source)
        super().__init__(open_direct(self._source), volume.info.size_sectors)
        self.mapped = MappedTap.find(directory, **self._identity)
        self._using = threading.Lock()  # while the device is asked what isn't ordered with its removal
        self._log: Log | None = None
        self._opened: list[Log] = []

    @property
    def _identity(self) -> dict[str, Any]:
        info = self._volume.info
        return {
            "volume_name": info.name,
            "volume_uuid": info.uuid,
            "source": self._source,
            "log_bytes": self._log_bytes,
        }

    @property
    def device(self) -> MappedTap:
        """Return the device; TapError if there is none."""
        if self.mapped is None:
            name = self._volume.info.name
            raise TapError(f"volume {name} has no mapped device", hint="make it with: dmafs tap attach STORE")
        return self.mapped

    # -- the place ----------------------------------------------------------------------------------------------

    def begin(self, position: int, retained: int) -> None:
        """See ``LoggedTap``."""
        firsts = [first_of(path) for path in log_paths(self.directory)]
        reaching = [first for first in firsts if first <= position]
        if not reaching:
            raise LogLostError("no log reaches back to where the journal ends", hint=_COMPARED)
        start = max((first for first in reaching if first <= retained), default=min(reaching))
        self._open(start, max(retained, start))
        for log, window in self._windows_before(position):
            self.arbiter.remember(log.file, window, log.first + window.begin // SECTOR)
        self.ended = self._is_behind(position)
        if not self.ended and position not in {self._current.first, self._place}:
            raise LogLostError(f"log {self._current.file.name} has no entry where the journal ends", hint=_COMPARED)
        self.captured_place = position

    def _is_behind(self, position: int) -> bool:
        """Say whether a place is behind the last log, whose end was captured then."""
        return position == self._current.first + self._current.file.size() // SECTOR

    def _windows_before(self, position: int) -> Iterator[tuple[Log, LoggedWindow]]:
        """Yield the windows from the present place up to *position*."""
        while self._place < position:
            log = self._current
            window = self._next_window(log)
            if window is not None:
                yield log, window
            if (window is None or window.closing == "end") and not self._advance():
                return

    @property
    def _current(self) -> Log:
        assert self._log is not None, "the tap has begun"
        return self._log

    @property
    def _place(self) -> int:
        """Return the place behind the last window that was scanned."""
        return self._current.first + self._current.reader.position // SECTOR

    def _open(self, first: int, place: int) -> None:
        """Go on at a place of the log that begins at *first*."""
        path = next(path for path in log_paths(self.directory) if first_of(path) == first)
        file = open_log(path)
        sector_bytes = self.mapped.sector_bytes if self.mapped else None
        try:
            reader = LogReader(
                file, size_sectors=self.size_sectors, position=(place - first) * SECTOR, sector_bytes=sector_bytes
            )
        except CorruptionError as error:
            file.close()
            raise LogLostError(error.message, hint=error.hint) from error
        self._log = Log(file, first, reader)
        self._opened.append(self._log)

    def _advance(self) -> bool:
        """Go on with the next log, if there is one."""
        later = [first for path in log_paths(self.directory) if (first := first_of(path)) > self._current.first]
        if later:
            self._open(min(later), min(later))
        return bool(later)

    # -- reading ------------------------------------------------------------------------------------------------

    def scan(self) -> Scanned | None:
        """See ``LoggedTap``."""
        if self.ended:
            return None
        log = self._current
        window = self._next_window(log)
        if window is None:
            over = self._why_over(log)
            if not over:
                return None
            window = self._next_window(log)  # what the reader had read before may have been older than the log's end
            if window is None:
                raise LogLostError(f"log {log.file.name} has no end, and {over}", hint=_COMPARED)
        if window.closing == "end" and not self._advance():
            self.ended = True
        keeps = self.mapped is not None and not self.mapped.discards
        return Scanned(log, self.without_discards(window) if keeps else window)

    def _why_over(self, log: Log) -> str:
        """Return why nothing more can come into a log, empty if it still can."""
        if self.mapped is None:
            return "its device is gone"
        newer = any(first_of(path) > log.first for path in log_paths(self.directory))
        return "there is a newer one" if newer else ""

    def _next_window(self, log: Log) -> LoggedWindow | None:
        try:
            return log.reader.scan()
        except CorruptionError as error:
            raise LogLostError(error.message, hint=error.hint) from error

    def check(self) -> None:
        """See ``LoggedTap``. A log that has its end is whole."""
        with self._using:
            if self.mapped is not None and not self.ended and self.mapped.status().disabled:
                raise LogLostError(
                    f"{self.mapped.node} has stopped logging: its log is full, or can't be written",
                    hint="make space in the store",
                )

    def request(self, text: str) -> None:
        """See ``LoggedTap``."""
        seen = self.captured_place
        self.device.fsync()
        self.barriers[text] = seen
        self.device.mark(text)

    def has_written(self) -> bool:
        """See ``LoggedTap``."""
        with self._using:
            return self.mapped is not None and self.mapped.has_written()

    def devices(self) -> frozenset[str]:
        """See ``LoggedTap``."""
        with self._using:
            numbers = [self._source.stat().st_rdev, *([self.mapped.node.stat().st_rdev] if self.mapped else [])]
        return frozenset[str]().union(*map(devices_under, numbers))

    # -- the logs -----------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """See ``LoggedTap``."""
        if self.mapped is None or self.ended:
            return
        status = self.mapped.status()
        if not status.disabled and status.next_sector >= status.end_sector * KEEP_SHARE:
            self.mapped.rotate(self.behind())

    def behind(self) -> Lsn:
        """Return the first place behind all logs, and behind what the journal has."""
        ends = [first_of(path) + path.stat().st_size // SECTOR for path in log_paths(self.directory)]
        return Lsn(max([self._volume.journal.position, *ends]))

    def restart(self) -> int:
        """See ``LoggedTap``. Without a device there is nothing more to capture: then it has ended."""
        first = self.behind()
        if self.mapped is None:
            self.forget_all()
            self.ended, self.captured_place = True, first
            return first
        self.mapped.rotate(first)
        self.forget_all()
        self._open(first, first)
        self.captured_place = first
        return first

    def release(self, place: int) -> None:
        """See ``LoggedTap``."""
        for log in [each for each in self._opened if each is not self._log]:
            if log.first + log.file.size() // SECTOR <= place:
                log.file.close()
                self._opened.remove(log)
        if self.mapped is not None:
            self.mapped.punch(Lsn(place))

    # -- the device ---------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Make the device, with a log that begins where the journal ends; the older logs are of no use any more."""
        assert self.mapped is None
        self._close_logs()
        for path in log_paths(self.directory):
            path.unlink()
        place = self._volume.journal.position
        self.mapped = MappedTap.attach(self.directory, first=Lsn(place), **self._identity)
        self.ended = False
        self.forget_all()
        self._open(place, place)
        self.captured_place = place

    def detach(self) -> None:
        """See ``LoggedTap``."""
        with self._using:
            self.device.detach()
            self.mapped = None

    def close(self) -> None:
        """See ``LoggedTap``."""
        self._close_logs()
        if self.mapped is not None:
            self.mapped.close()
        self.primary.close()

    def _close_logs(self) -> None:
        for log in self._opened:
            log.file.close()
        self._opened = []
        self._log = None

    def report(self) -> dict[str, Any]:
        """Return what there is to say about device and log."""
        node = f"/dev/mapper/{device_name(self._volume.info.name)}"
        with self._using:
            if self.mapped is None:
                return {"device": node, "attached": False}
            status, log = self.mapped.status(), self.mapped.log
        return {
            "device": node,
            "attached": True,
            "logging": not status.disabled,
            "log": str(log),
            "log_bytes": status.next_sector * SECTOR,
            "log_limit_bytes": status.end_sector * SECTOR,
            "log_entries": status.entries,
            "open_count": status.open_count,
        }


def drain(volume: Volume, tap: LoggedTap) -> Work[None]:
    """Bring everything that is in the log into the journal."""
    while (yield from capture(volume, tap)) is not None:
        pass


def attach(volume: Volume, tap: DmTap, boot_id: UUID) -> Work[None]:
    """Make a volume's device. What its last log still has is taken in before; a gap begins if that isn't whole.

    *boot_id* is the running kernel's. Nothing is in use yet.
    """

    def flush(flag: Flag) -> Work[object]:
        return volume.flush(flag=flag)

    now = volume.pointers.now
    if not now.clean and now.boot_id == boot_id:
        yield from _take_rest(volume, tap, flush)
    else:
        yield from begin_after_stop(volume, boot_id, flush)
    place = tap.behind()
    volume.journal.note_position(place, place)
    yield from volume.flush()
    yield partial(volume.mark_open, boot_id)
    try:
        yield tap.attach
    except (DmafsError, OSError):  # there is no device, and nothing that only a log has
        yield volume.mark_clean
        raise


def _take_rest(volume: Volume, tap: DmTap, flush: Callable[[Flag], Work[object]]) -> Work[None]:
    """Take in the last log of a device that was removed while nobody read it."""
    journal = volume.journal
    try:
        yield partial(tap.begin, journal.position, journal.retained)
        yield from drain(volume, tap)
    except LogLostError as error:
        log.error("volume %s: a gap begins: %s", volume.info.name, error.message)
        if not volume.pointers.now.copied:
            yield from start_again(volume)
        elif not needs_resync(volume):
            yield from flush(Flag.GAP)


def detach(volume: Volume, tap: DmTap) -> Work[None]:
    """Remove a volume's device, and record that journal and primary agree; TapBusyError if somebody uses the device."""
    yield from drain(volume, tap)
    yield tap.detach
    yield from drain(volume, tap)
    yield from volume.flush()
    yield volume.mark_clean
