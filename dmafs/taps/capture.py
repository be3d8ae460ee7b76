"""Taps that keep a log: what the log has, window by window, until it is in the forward journal.

A *place* is a number of sectors that only grows over all logs of a volume: that of byte b of a log is the log's first
place plus b // 512. The journal's indicators say up to which place the logs have been read (``position``), so journal
and place are one transaction: after a kill the tap goes on exactly where the journal ends.

``LoggedTap`` is what the daemon works with. Its methods block, and may run in threads, one at a time.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from dmafs.core.batch import Extent
from dmafs.core.extent import Ints
from dmafs.core.ondisk import Flag
from dmafs.core.storage import File, RealFile
from dmafs.core.volume import Volume
from dmafs.core.window import Window
from dmafs.core.work import Work
from dmafs.errors import DmafsError, TapError
from dmafs.taps.arbiter import Arbiter, Verdict
from dmafs.taps.logformat import LogFlag
from dmafs.taps.logreader import BATCH_BYTES, LoggedWindow, LogReader
from dmafs.units import SECTOR, valid_name

_DISCARD: Final = int(LogFlag.DISCARD)
_PREFIX: Final = "dmafs:"


class Log(NamedTuple):
    """One log file, and the place of its first byte."""

    file: RealFile
    first: int
    reader: LogReader


@dataclass(frozen=True, slots=True)
class Scanned:
    """A window that is complete in a log, with places instead of bytes."""

    log: Log
    window: LoggedWindow
    behind: int | None = None
    """The place behind it where that isn't the one behind its last entry: a log that ended goes on in the next one."""

    @property
    def begin(self) -> int:
        """Return the place of its first entry."""
        return self.log.first + self.window.begin // SECTOR

    @property
    def end(self) -> int:
        """Return the place behind it."""
        return self.log.first + self.window.end // SECTOR if self.behind is None else self.behind

    @property
    def name(self) -> str:
        """Return the name of the mark that closes it, empty if it is none that anybody named."""
        text = self.window.mark
        if self.window.closing != "mark":
            return ""
        name = unquote(text.rpartition(":")[2] if text.startswith(_PREFIX) else text)
        return name if valid_name(name) else ""

    @property
    def flag(self) -> Flag:
        """Return what kind of sync indicator stands behind it."""
        return Flag.FLUSH if self.window.closing == "flush" else Flag.TICK


def barrier_text(token: str, name: str = "") -> str:
    """Return the one word that a barrier's mark has: its token, and the name that somebody gave it."""
    return f"{_PREFIX}{token}:{quote(name, safe='')}"


class LoggedTap(ABC):
    """A tap that keeps a log. See the module."""

    def __init__(self, primary: File, size_sectors: int) -> None:
        """Follow no log yet; *primary* is open for reading, past every cache."""
        self.primary = primary
        self.size_sectors = size_sectors
        self.arbiter = Arbiter(primary)
        self.keeps_discarded = False
        """Whether the primary keeps the bytes of what is discarded, so that discards change nothing."""
        self.pending: Scanned | None = None
        """What was scanned and couldn't be journaled yet."""
        self.captured_place = 0
        """The place behind the last window that is in the journal."""
        self.barriers: dict[str, int] = {}
        """By its mark's text, what had been captured when a barrier began."""
        self._settled_place = 0
        self._buffer = bytearray(BATCH_BYTES)  # new ones would cost a page fault for each 4 KiB
        self.ended = False
        """Whether capture has ended in order: nothing comes behind what was scanned."""

    @abstractmethod
    def begin(self, position: int, retained: int) -> None:
        """Go on at a place, taking from *retained* on what may still matter; LogLostError if it can't be had."""

    @abstractmethod
    def scan(self) -> Scanned | None:
        """Return the next window, or None if there is none yet; LogLostError if the log has no next one."""

    @abstractmethod
    def check(self) -> None:
        """Raise LogLostError if what was scanned until now can't be trusted, or nothing will come behind it."""

    @abstractmethod
    def restart(self) -> int:
        """Begin anew after a loss; return the place where capture goes on."""

    @abstractmethod
    def release(self, place: int) -> None:
        """Let go of the log before a place."""

    @abstractmethod
    def close(self) -> None:
        """Close all files; what captures goes on."""

    # -- what only some can do ----------------------------------------------------------------------------------

    can_settle = False
    """Whether it can have barriers: then these three are more than this."""

    def request(self, text: str) -> None:
        """Have everything that is complete come into the log, and a mark behind it. Waits for the disk."""
        raise AssertionError(f"this tap can't set a mark {text}")

    def counted(self) -> int:
        """Return how many entries the log has, as far as it says so, where there are no barriers."""
        return 0

    def is_through(self, count: int) -> bool:  # noqa: ARG002 - see ``counted``
        """Say whether all that was flushed among the first *count* entries is in the journal."""
        return True

    def has_written(self) -> bool:
        """Say whether anything was written since the last call."""
        return False

    def devices(self) -> frozenset[str]:
        """Return the kernel's names of the devices whose failed writes matter."""
        return frozenset()

    def keep(self) -> None:  # noqa: B027 - for most there is nothing to do
        """Have a new log, long before the present one is full."""

    def detach(self) -> None:
        """Remove the device, so that the log has an end; TapBusyError if somebody uses it."""
        raise TapError("this volume's tap has no device", hint="only volumes made with --tap dm have one")

    # -- what all do alike --------------------------------------------------------------------------------------

    def discard(self) -> None:
        """Pass over what is in the log until now."""
        while (scanned := self.pending or self.scan()) is not None:
            self.taken(scanned)
        self.forget_all()

    def read(self, scanned: Scanned) -> Iterator[list[Extent]]:
        """Yield the events of a window in batches; the data of one is gone when the next one is asked for."""
        for first, last in scanned.window.batches():
            yield [*scanned.log.reader.read(scanned.window, first, last, buffer=self._buffer)]

    def judge(self, scanned: Scanned) -> Verdict:
        """Return what FUA arbitration makes of a window."""
        return self.arbiter.judge(scanned.log.file, scanned.window, scanned.begin)

    def note(self, scanned: Scanned) -> int:
        """Take in that a window is about to be journaled; return from where on the log is needed then.

        What the last but one barrier had seen before it began is forgotten: two flushes that are under way at once may
        complete in either order, so one barrier more than arbitration needs.
        """
        seen = self.barriers.get(scanned.window.mark)
        if seen is not None:
            self.arbiter.forget(self._settled_place)
        self.arbiter.remember(scanned.log.file, scanned.window, scanned.begin)
        retained = self.arbiter.retained
        return scanned.end if retained is None else retained

    def taken(self, scanned: Scanned) -> None:
        """Take in that it is in the journal."""
        self.pending = None
        self.captured_place = scanned.end
        seen = self.barriers.pop(scanned.window.mark, None)
        if seen is not None:
            self._settled_place = seen

    def forget_all(self) -> None:
        """Begin anew: nothing that was scanned counts."""
        self.pending = None
        self.barriers.clear()
        self.arbiter.forget(1 << 63)
        self._settled_place = 0

    def without_discards(self, window: LoggedWindow) -> LoggedWindow:
        """Return a window without its discards."""
        kept = (window.flags & _DISCARD) == 0
        columns = {name: getattr(window, name)[kept] for name in ("starts", "lengths", "flags", "offsets")}
        return replace(window, **columns)


class Captured(NamedTuple):
    """A window that is in the journal now."""

    window: LoggedWindow
    doubts: tuple[Ints, Ints]


def capture(volume: Volume, tap: LoggedTap) -> Work[Captured | None]:
    """Bring the next window from the log into the journal, wholly or not at all; None if there is none yet.

    While this goes on nothing else may be journaled. LogLostError when the log isn't to be trusted any more.
    """
    scanned: Scanned | None = tap.pending or (yield tap.scan)
    if scanned is None:
        return None
    tap.pending = scanned
    volume.require_space(int(scanned.window.data_bytes().sum()))
    window = volume.begin_window()
    published = False

    def write() -> Verdict:
        return _write(tap, scanned, window)

    try:
        with volume.gate():
            verdict: Verdict = yield write
        published = True
        volume.publish(window)
        tap.taken(scanned)
    finally:
        if not published:
            with contextlib.suppress(DmafsError):  # what led here counts; a shut gate lets nothing in
                volume.abandon(window)
    return Captured(scanned.window, verdict.doubts)


def _write(tap: LoggedTap, scanned: Scanned, window: Window) -> Verdict:
    """Write the events of a window, and what corrects them; in a thread."""
    verdict = tap.judge(scanned)
    for batch in tap.read(scanned):
        window.write(batch)
    if verdict.corrections:
        window.write(verdict.corrections)
    tap.check()
    window.close(scanned.flag, position=scanned.end, retained=tap.note(scanned), name=scanned.name)
    return verdict


def remembered(reader: LogReader, position: int, first: int) -> Iterator[tuple[LoggedWindow, int]]:
    """Yield the windows of a log up to a place, with their own places: for what arbitration has to remember."""
    while first + reader.position // SECTOR < position:
        window = reader.scan()
        if window is None:
            return
        yield window, first + window.begin // SECTOR


__all__ = ["Captured", "Log", "LoggedTap", "Scanned", "barrier_text", "capture", "remembered"]
