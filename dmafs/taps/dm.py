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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from dmafs import answers
from dmafs.core.ondisk import Flag
from dmafs.core.resync import begin_after_stop, needs_resync, start_again
from dmafs.core.storage import open_direct
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import DmafsError, LogLostError, TapError
from dmafs.taps.capture import LoggedTap, capture
from dmafs.taps.chained import ChainedTap
from dmafs.taps.kernellog import devices_under
from dmafs.taps.mapped import HEAD_BYTES, Lsn, MappedTap, device_name, log_paths, punch
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

KEEP_SHARE: Final = 0.5
"""How full a log may be before the device gets a new one: the rest is for what comes while nobody reads."""

_COMPARED: Final = "the primary is compared with the newest image"


class DmTap(ChainedTap):
    """The tap of one volume; *mapped* is its device, None while there is none."""

    can_settle = True

    def __init__(self, volume: Volume, directory: Path, *, log_bytes: int) -> None:
        """Take over the device if there is one; *directory* is the volume's. Logs are made with *log_bytes*."""
        self._volume = volume
        self._directory = directory
        self._log_bytes = log_bytes // HEAD_BYTES * HEAD_BYTES
        self._source = Path(volume.info.source)
        primary = open_direct(self._source)
        super().__init__(primary, volume.info.size_sectors, sector_bytes=primary.grain)
        try:
            self.mapped = MappedTap.find(directory, **self._identity)
        except BaseException:
            primary.close()
            raise
        self._using = threading.Lock()  # while the device is asked what isn't ordered with its removal
        self._look()

    @property
    def _identity(self) -> dict[str, Any]:
        info = self._volume.info
        return {
            "volume_name": info.name,
            "volume_uuid": info.uuid,
            "source": self._source,
            "log_bytes": self._log_bytes,
        }

    def _look(self) -> None:
        """Find out what the primary does with discards."""
        self.keeps_discarded = self.mapped is not None and not self.mapped.discards

    @property
    def device(self) -> MappedTap:
        """Return the device; TapError if there is none."""
        if self.mapped is None:
            name = self._volume.info.name
            raise TapError(f"volume {name} has no mapped device", hint="make it with: dmafs tap attach STORE")
        return self.mapped

    # -- reading ------------------------------------------------------------------------------------------------

    def log_paths(self) -> list[Path]:
        """See ``ChainedTap``."""
        return log_paths(self._directory)

    def check(self) -> None:
        """See ``LoggedTap``. A log that has its end is whole."""
        with self._using:
            if self.mapped is not None and not self.ended and self.mapped.has_stopped_logging():
                raise LogLostError(
                    f"{self.mapped.node} has stopped logging: its log is full, or can't be written",
                    hint="make space in the store",
                )

    def is_over(self) -> bool:
        """See ``ChainedTap``."""
        return self.mapped is None

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
            self.mapped.rotate(Lsn(self.next_first()))

    def next_first(self) -> int:
        """See ``ChainedTap``."""
        return max(super().next_first(), self._volume.journal.position)

    def restart(self) -> int:
        """See ``LoggedTap``. Without a device there is nothing more to capture: then it has ended."""
        first = self.next_first()
        if self.mapped is None:
            self.forget_all()
            self.ended, self.captured_place = True, first
            return first
        self.mapped.rotate(Lsn(first))
        self._go_on(first)
        return first

    def _go_on(self, first: int) -> None:
        """Begin anew with the log that begins there."""
        self.forget_all()
        self.follow(first, first)
        self.captured_place = first

    def punch(self, path: Path, sectors: int) -> None:
        """See ``ChainedTap``."""
        punch(path, sectors * SECTOR)

    # -- the device ---------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Make the device, with a log that begins where the journal ends; the older logs are of no use any more."""
        assert self.mapped is None
        self.close_logs()
        for path in self.log_paths():
            path.unlink()
        place = self._volume.journal.position
        self.mapped = MappedTap.attach(self._directory, first=Lsn(place), **self._identity)
        self._look()
        self._go_on(place)

    def detach(self) -> None:
        """See ``LoggedTap``."""
        with self._using:
            self.device.detach()
            self.mapped = None

    def close(self) -> None:
        """See ``LoggedTap``."""
        super().close()
        if self.mapped is not None:
            self.mapped.close()

    def report(self) -> answers.Device:
        """Return what there is to say about device and log."""
        name = self._volume.info.name
        node = f"/dev/mapper/{device_name(name)}"
        with self._using:
            if self.mapped is None or self.ended:  # removed by command, or by hand
                return {"volume": name, "device": node, "attached": False}
            try:
                status, log = self.mapped.status(), self.mapped.log
            except TapError:  # just being removed by hand; what its log has comes still
                return {"volume": name, "device": node, "attached": False}
        return {
            "volume": name,
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
    place = tap.next_first()
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
