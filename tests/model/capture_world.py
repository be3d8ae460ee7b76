"""A device whose log is captured into a volume: what drives both, and what has to hold of the volume.

``World`` is a device (``logwrites``), a volume, the tap between them, and capture under way, step by step. It knows all
windows that are in the journal and what each of their images showed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from dmafs.core.copy import initial_copy
from dmafs.core.limits import SegmentLimits, VolumeLimits
from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync, resync
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.verify import Steps, at_once
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import LogLostError, StoreFullError
from dmafs.taps import chained
from dmafs.taps.arbiter import Verdict
from dmafs.taps.capture import Captured, Scanned, barrier_text, capture
from dmafs.taps.chained import ChainedTap
from dmafs.taps.logreader import WINDOW_ROWS, LogReader
from dmafs.units import SECTOR
from tests.model.cuts import Cut
from tests.model.logwrites import Bio, Device, Discards

LIMITS = VolumeLimits(segments=SegmentLimits(data_sectors=24, records=8), images=2, reserve_bytes=0)
SHM = Path("/dev/shm")  # noqa: S108 - a private directory is made in it
LOG_SECTORS = 400
How = Literal["now", "cut", "late"]
End = Literal["", "stop", "full"]
"""How a change of a file ends that the fuse stands before: done, the process ends, or no space."""


class Fuse:
    """Has the n-th change of a file from now on fail, while it is entered."""

    def __init__(self) -> None:
        self.left = -1
        self.end: End = ""
        self._stack = contextlib.ExitStack()

    def enter(self) -> None:
        for name in ("write", "truncate", "datasync"):
            self._stack.enter_context(mock.patch.object(RealFile, name, self._fused(getattr(RealFile, name))))
        create = mock.patch.object(RealStorage, "create", self._fused(RealStorage.create))
        self._stack.enter_context(create)

    def leave(self) -> None:
        self._stack.close()

    def _fused(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fused(*arguments: Any) -> Any:
            self.left -= self.left >= 0
            if self.left == -1 and self.end:
                end, self.end = self.end, ""
                raise Cut if end == "stop" else OSError(errno.ENOSPC, "no space")
            return call(*arguments)

        return fused

    def set(self, changes: int, end: End) -> None:
        self.left, self.end = changes, end


class SimulatedTap(ChainedTap):
    """The tap of a simulated device. Keeps the last verdict, for the oracle."""

    def __init__(self, device: Device, primary: Path) -> None:
        file = open_source(primary, writable=False)
        super().__init__(file, device.size_sectors, sector_bytes=device.sector_bytes)
        self.keeps_discarded = device.discards == "kept"
        self.device = device
        self.verdict: Verdict | None = None

    def log_paths(self) -> list[Path]:
        return sorted(self.device.folder.iterdir())

    def check(self) -> None:
        if self.device.target is not None and self.device.target.disabled:
            raise LogLostError("the log is full", hint="a gap begins")

    def judge(self, scanned: Scanned) -> Verdict:
        self.verdict = super().judge(scanned)
        return self.verdict

    def restart(self) -> int:
        first = self.next_first()
        self.rotate()
        self.forget_all()
        self.follow(first, first)
        self.captured_place = first
        return first

    def rotate(self) -> None:
        first = self.next_first()
        self.device.detach()
        self.device.attach(first)

    def punch(self, path: Path, sectors: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        os.pwrite(fd, bytes(sectors * SECTOR), 0)
        os.close(fd)


def _send(answer: Any, work: Work[Any]) -> Callable[[], Any]:
    return work.send(answer)


def _throw(error: Exception, work: Work[Any]) -> Callable[[], Any]:
    return work.throw(error)


class World:
    """See the module."""

    def __init__(
        self,
        rng: random.Random,
        *,
        sectors: int = 48,
        sector_bytes: int = SECTOR,
        discards: Discards = "zero",
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        self.rng = rng
        self.now = 1_700_000_000_000_000_000
        self.path = Path(tempfile.mkdtemp(dir=SHM if SHM.is_dir() else None))
        self.fuse = Fuse()
        self.patches = contextlib.ExitStack()
        self.patches.callback(shutil.rmtree, self.path)
        reader = functools.partial(LogReader, window_rows=window_rows)
        self.patches.enter_context(mock.patch.object(chained, "LogReader", reader))
        self.fuse.enter()
        self.patches.callback(self.fuse.leave)
        sectors *= sector_bytes // SECTOR
        self.source = self.path / "primary"
        self.source.write_bytes(b"".join(f"base {at} ".encode().ljust(SECTOR, b"#") for at in range(sectors)))
        self.device = Device(
            self.path / "log", self.source, rng, sector_bytes=sector_bytes, discards=discards, log_sectors=LOG_SECTORS
        )
        (self.path / "disk").mkdir()
        Volume.create(
            RealStorage(self.path / "disk"),
            name="disk",
            size_sectors=sectors,
            source=self.source,
            tap="dm",
            created_ns=1,
        )
        self.dead: list[Any] = []  # what belongs to processes that have ended; nobody cleans up after them
        self.work: Work[Captured | None] | None = None
        self.call: Callable[[], Any] | None = None
        self.barrier: tuple[Bio, str, int] | None = None
        self.barriers = 0
        self.doubts: set[int] = set()
        self.gap = False
        self.wrong: list[str] = []
        self.counts: dict[str, int] = {}
        self.place = 0
        self.points: dict[int, bytes] = {}
        self._open()
        run(initial_copy(self.volume, self.tap.primary, lambda flag: self.volume.flush(flag=flag), lambda _: None))
        self.floor = self.volume.journal.head
        self.points[self.floor] = self._image(self.floor)

    def _clock(self) -> int:
        self.now += 1000
        return self.now

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _open(self) -> None:
        self.volume = open_volume(self.path / "disk", limits=LIMITS, clock=self._clock)
        self.tap = SimulatedTap(self.device, self.source)
        try:
            self.tap.begin(self.volume.journal.position, self.volume.journal.retained)
        except LogLostError as error:
            self._lost(error)

    def _image(self, seq: int) -> bytes:
        image = self.volume.image(seq)
        return bytes(image.read(0, image.size))

    # -- the device -----------------------------------------------------------------------------------------------

    def complete(self, number: int) -> None:
        bio = self.device.complete(number)
        if bio is not None and self.barrier is not None and self.barrier[0] is bio:
            _, text, seen = self.barrier
            self.barrier = None
            self.tap.barriers[text] = seen
            assert self.device.target is not None
            self.device.target.mark(text)

    def begin_barrier(self, name: str = "") -> None:
        """Begin what ``request`` does: a flush, and behind it a mark."""
        if self.barrier is not None or self.device.target is None:
            return
        self.barriers += 1
        text = barrier_text(f"{self.barriers:x}", name)
        seen = self.tap.captured_place
        bio = self.device.submit("flush")
        assert bio is not None
        self.barrier = bio, text, seen

    def rotate(self, *, attach: bool = True) -> None:
        """Give the device a new log, or take it away."""
        if self.device.target is None:
            self.device.attach(self.tap.next_first())
            return
        while self.device.under_way:
            self.complete(0)
        self.device.suspend()
        if self.device.target.disabled:  # to be asked while it is suspended: later nobody can
            return
        self.device.target.failing = False  # a write that fails while its table goes is nowhere told; see ``end``
        self.count("rotated" if attach else "detached")
        if attach:
            self.tap.rotate()
        else:
            self.device.detach()

    # -- capture --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Begin capture, or do its next call and let it go on; say whether a window has been journaled."""
        if self.work is None:
            self.work = capture(self.volume, self.tap)
            return self._resume(next)
        assert self.call is not None
        try:
            answer = self.call()
        except (LogLostError, OSError) as error:
            return self._resume(functools.partial(_throw, error))
        return self._resume(functools.partial(_send, answer))

    def _resume(self, go_on: Callable[[Any], Any]) -> bool:
        work, self.work = self.work, None
        try:
            self.call = go_on(work)
        except StopIteration as stop:
            if stop.value is not None:
                self._captured(stop.value.doubts)
            return stop.value is not None
        except StoreFullError:
            self.count("full")
            return False
        except LogLostError as error:
            self._lost(error)
            return False
        self.work = work
        return False

    def capture(self) -> bool:
        """Capture one window to its end; say whether there was one."""
        done = self.step()
        while self.work is not None:
            done = self.step()
        return done

    def _captured(self, doubts: tuple[Any, Any]) -> None:
        """Look at what a window has made of the newest image, and keep it."""
        assert self.tap.captured_place == self.volume.journal.position > self.place, "places only grow"
        self.place = self.tap.captured_place
        self.count("windows")
        self._judge(doubts)

    def _judge(self, doubts: tuple[Any, Any]) -> None:
        """Compare the newest image with what it may show; where it may not, there has to be a doubt."""
        head = self.volume.journal.head
        if self.gap:
            return
        image = self._image(head)
        if head in self.points:
            assert self.points[head] == image
        self.points[head] = image
        new = {sector for start, stop in zip(*doubts, strict=True) for sector in range(start, stop)}
        self.doubts |= new
        for sector in range(self.device.size_sectors):
            found = image[sector * SECTOR :][:SECTOR]
            if found in self.device.truth.allowed(sector, self.device.ends[self.place]):
                self.doubts.discard(sector)
            elif sector not in self.doubts:
                self.wrong.append(f"at {head}, sector {sector}: {found[:32]!r}")
            else:
                self.count("doubted")
        if self.tap.verdict is not None and self.tap.verdict.corrections:
            self.count("corrected")

    # -- losses ---------------------------------------------------------------------------------------------------

    def _lost(self, error: LogLostError) -> None:
        """Begin a gap, and go on in a new log."""
        target = self.device.target
        assert self.gap or self.device.lossy or (target is not None and target.disabled), f"nothing was lost: {error}"
        self.count("lost")
        self.fuse.set(-1, "")
        if not needs_resync(self.volume):
            self.volume.indicate(Flag.GAP)
        self.gap = True
        self.device.lossy.clear()
        self.barrier = None
        self.place = self.tap.restart()
        self.volume.journal.note_position(self.place, self.place)

    def end_gap(self) -> None:
        """Capture everything, then make image and primary agree."""
        self.quiesce()
        if not self.gap or self.device.target is None:
            return
        quiet = Steps(lambda: at_once(lambda: None))
        run(resync(self.volume, self.tap.primary, lambda flag: self.volume.flush(flag=flag), quiet, lambda _: None))
        self.gap = False
        self.doubts = set()
        self.device.truth.begin(self.device.content())
        self.floor = self.volume.journal.head
        self.points[self.floor] = self._image(self.floor)
        assert self.points[self.floor] == self.device.content()

    def tick(self) -> None:
        """Ask for the device's state, as the daemon does from time to time."""
        if self.work is None:
            try:
                self.tap.check()
            except LogLostError as error:
                self._lost(error)

    def kill(self, changes: int, *, how: How) -> None:
        """End the process now, or *cut* at the n-th change of a file from now on, or *late*: a window is written then.

        What is written late hasn't been published.
        """
        if how == "cut":
            self.fuse.set(changes, "stop")
            try:
                self.capture()
            except Cut:
                self.count("cut")
            finally:
                self.fuse.set(-1, "")
        elif how == "late":
            while (self.work is None or self.tap.pending is None) and not self.step() and self.work is not None:
                pass
            if self.work is not None and self.call is not None:
                with contextlib.suppress(LogLostError):
                    self.call()
        self.dead.append((self.volume, self.tap, self.work))
        old, pending, verdict = self.volume, self.tap.pending, self.tap.verdict
        head, place, self.work, self.call = old.journal.head, self.place, None, None
        self.barrier = None
        self.gap = self.gap and needs_resync(old)
        self._open()
        self.count("killed")
        journal = self.volume.journal
        if pending is not None and journal.position == pending.end:  # its indicator had been written
            self.count("killed behind a window")
            self.place = self.tap.captured_place
            assert self.place == pending.end
            assert verdict is not None
            self._judge(verdict.doubts)
            return
        assert journal.head == head, "what was published is there, and nothing else"
        assert self.gap or journal.position <= place
        self.place = self.tap.captured_place

    # -- the volume -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Make the journal durable, and let go of the log that then isn't needed."""
        run(self.volume.settle())
        self.tap.release(self.volume.journal.durable_retained)

    def sync(self, *, open_snapshot: bool) -> None:
        self.settle()
        run(sync(self.volume, open_snapshot=open_snapshot))
        self.count("synced")

    def snapshot(self) -> None:
        self.settle()
        indicator = self.volume.journal.last_indicator(self.volume.journal.durable)
        if indicator is not None and self.volume.recoverable(indicator.seq) and indicator.seq >= self.volume.floor:
            run(self.volume.snapshot_at(indicator.seq, ""))

    def quiesce(self) -> None:
        """Complete everything, and capture it: then the newest image is the primary."""
        self.tick()
        while self.work is not None:
            self.step()
        if self.device.target is not None:
            for _ in range(2):
                while self.device.under_way:
                    self.complete(0)
                self.begin_barrier()
            self.complete(0)
            self.device.target.drain()
        while self.capture():
            pass
        if self.device.target is not None and self.device.target.disabled:
            self.tick()
        if not self.gap:
            self._compare()

    def _compare(self) -> None:
        content = self.device.content()
        image = self._image(self.volume.journal.head)
        for sector in range(self.device.size_sectors):
            place = slice(sector * SECTOR, (sector + 1) * SECTOR)
            if image[place] != content[place] and not self.device.truth.weak(sector):
                self.wrong.append(f"sector {sector} is {image[place][:32]!r} instead of {content[place][:32]!r}")
        self.count("quiet")

    def check(self, *, every: bool = False) -> None:
        """Every moment that can be had shows what it showed; nothing was wrong."""
        assert not self.wrong, self.wrong[:3]
        self.volume.check()
        seqs = [seq for seq in self.points if self.volume.recoverable(seq)]
        for seq in seqs if every else self.rng.sample(seqs, min(len(seqs), 2)):
            assert self._image(seq) == self.points[seq], f"the image at {seq} has changed"

    def close(self) -> None:
        for volume, tap, _ in [*self.dead, (self.volume, self.tap, None)]:
            with contextlib.suppress(OSError):
                volume.close()
            tap.close()
        self.device.close()
        self.patches.close()
