"""Claims about dmafs.taps.dm: killed anywhere it goes on, over any number of logs; what can't be had is a loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from dmafs.core.ondisk import Flag
from dmafs.core.resync import needs_resync
from dmafs.core.storage import RealStorage
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import LogLostError, SourceBusyError, TapBusyError, TapError
from dmafs.taps import dm
from dmafs.taps.capture import LoggedTap, barrier_text, capture
from dmafs.taps.dm import DmTap
from dmafs.taps.mapped import Lsn, first_of, log_paths
from dmafs.units import SECTOR
from tests.unit.target import Kernel, Target
from tests.unit.tools import TINY, Ticking, copy_all, fill, image_bytes

SIZE = 64
LOG = 16 << 10
BOOT, OTHER = UUID(int=1), UUID(int=2)


class Bench:
    """A volume with a device, and a tap that can be killed."""

    def __init__(self, path: Path, kernel: Kernel) -> None:
        self.path, self.kernel = path / "disk", kernel
        self.path.mkdir()
        Volume.create(
            RealStorage(self.path), name="disk", size_sectors=SIZE, source=kernel.source, tap="dm", created_ns=1
        )
        self.volume = self._open()
        copy_all(self.volume, kernel.source)
        self.tap = self._tap()
        run(dm.attach(self.volume, self.tap, BOOT))

    def _open(self) -> Volume:
        return open_volume(self.path, limits=TINY, clock=Ticking())

    def _tap(self) -> DmTap:
        return DmTap(self.volume, self.path, log_bytes=LOG)

    def kill(self) -> None:
        """Open everything again without an orderly stop; the tap hasn't begun."""
        self.tap.close()
        self.volume.close()
        self.volume = self._open()
        self.tap = self._tap()

    def restart(self) -> None:
        """Kill, and go on where the journal ends."""
        self.kill()
        self.tap.begin(self.volume.journal.position, self.volume.journal.retained)

    def follow(self, count: int = 1 << 30) -> int:
        """Capture at most so many windows, and return how many."""
        for done in range(count):
            if run(capture(self.volume, self.tap)) is None:
                return done
        return count

    def barrier(self, name: str = "t") -> None:
        """Have a mark in the log."""
        self.tap.request(barrier_text(name))

    @property
    def device(self) -> Target:
        assert self.kernel.device is not None
        return self.kernel.device

    def is_clean(self) -> bool:
        """Say whether the volume was closed in order."""
        return self.volume.pointers.now.clean

    def newest(self) -> bytes:
        return image_bytes(self.volume, self.volume.journal.head)


@pytest.fixture
def bench(tmp_path: Path, kernel: Kernel) -> Iterator[Bench]:
    bench = Bench(tmp_path, kernel)
    yield bench
    bench.tap.close()
    bench.volume.close()


def load(bench: Bench, value: int) -> None:
    """Write two windows, with FUA writes that overtake plain ones in the second, and rotate now and then."""
    kernel = bench.kernel
    kernel.write(value % SIZE, fill(value))
    kernel.discard((value + 3) % SIZE, 1)
    kernel.flush()
    kernel.write(9, fill(value))
    kernel.write(9, fill(value + 100), fua=True)
    if value % 3 == 0:
        bench.device.rotate(Lsn(bench.tap.next_first()))
    bench.barrier(str(value))


@pytest.mark.parametrize("releases", [False, True])
def test_it_goes_on_at_every_window_boundary(bench: Bench, releases: bool) -> None:  # noqa: FBT001
    """Killed behind each window of a run over several logs, it loses nothing and captures nothing twice."""
    for value in range(1, 14):
        load(bench, value)
        count = 1
        while bench.follow(count) == count:
            run(bench.volume.flush())
            if releases:
                bench.tap.release(bench.volume.journal.durable_retained)
            head, position = bench.volume.journal.head, bench.volume.journal.position
            bench.restart()
            assert bench.volume.journal.head == head
            count = (
                1 if bench.volume.journal.position == position else count + 1
            )  # windows without events are read again
        assert bench.newest() == bench.kernel.disk
    assert len(log_paths(bench.path)) == 5
    for value in range(3):  # what arbitration needs two barriers tell
        bench.kernel.write(value, fill(value))
        bench.barrier(f"last{value}")
        bench.follow()
    if releases:
        run(bench.volume.flush())
        bench.tap.release(bench.volume.journal.durable_retained)
        assert len(log_paths(bench.path)) == 1
    writes = [entry for entry in bench.kernel.entries if entry.sectors]
    assert bench.volume.journal.head >= len(writes)


def test_the_log_is_needed_as_far_as_arbitration_needs_it(bench: Bench) -> None:
    """A FUA write in an older log is remembered after a kill, and decides what the plain write behind it means."""
    kernel = bench.kernel
    bench.barrier("before")
    kernel.write(5, fill(1))
    kernel.write(5, fill(2), fua=True)
    bench.device.mark("cut")
    assert bench.follow() == 3  # the barrier's flush and mark, and the FUA write alone
    older = first_of(bench.device.log)
    bench.device.rotate(Lsn(bench.tap.next_first()))
    bench.device.mark("other")
    bench.follow()
    run(bench.volume.flush())
    bench.tap.release(bench.volume.journal.durable_retained)
    assert bench.volume.journal.retained < first_of(bench.device.log)
    assert first_of(log_paths(bench.path)[0]) == older
    bench.restart()
    kernel.flush()
    assert bench.follow() + bench.follow() == 1  # the reader may have looked before
    assert bench.newest() == kernel.disk


def test_the_end_of_a_log_is_seen_at_once(bench: Bench) -> None:
    """A rotation, or the end, right behind a window that was just captured is no loss: the log is looked at again."""
    for value in range(1, 5):
        bench.kernel.write(value, fill(value))
        bench.barrier(str(value))
        bench.follow(2 if value == 1 else 3)  # the reader has looked behind the last one
        if value < 4:
            bench.device.rotate(Lsn(bench.tap.next_first()))
    run(dm.detach(bench.volume, bench.tap))
    assert bench.newest() == bench.kernel.disk


def test_files_are_closed_with_their_logs(bench: Bench) -> None:
    """However often the log is rotated, only those that are needed are open; places go on from log to log."""

    def opened() -> int:
        links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]  # noqa: PTH115
        return sum(link.startswith(str(bench.path / "log")) for link in links)

    for value in range(1, 10):
        bench.kernel.write(value, fill(value))
        bench.barrier(str(value))
        first = first_of(bench.device.log)
        bench.device.rotate(Lsn(bench.tap.next_first()))
        assert first_of(bench.device.log) == first + LOG // SECTOR
        bench.barrier("again" + str(value))
        bench.follow()
        run(bench.volume.flush())
        bench.tap.release(bench.volume.journal.durable_retained)
    assert opened() <= 2
    bench.tap.close()
    assert opened() == 0
    bench.tap = DmTap(bench.volume, bench.path, log_bytes=LOG)


def test_a_log_is_given_up_before_it_is_full(bench: Bench) -> None:
    """``keep`` gives the device a new log when the present one is half full, and not before."""
    first = bench.device.log
    bench.tap.keep()
    assert bench.device.log == first
    bench.kernel.write(0, fill(1, LOG // SECTOR // 2))
    bench.barrier()
    bench.tap.keep()
    assert bench.device.log > first
    bench.tap.check()
    bench.barrier("behind")
    assert bench.follow() == 5
    assert bench.newest() == bench.kernel.disk


def test_a_full_log_is_a_loss(bench: Bench) -> None:
    """It is noticed though marks still succeed; nothing scanned counts then, and ``restart`` goes on in a new log."""
    kernel = bench.kernel
    kernel.write(1, fill(1))
    bench.barrier()
    bench.follow()
    head = bench.volume.journal.head
    kernel.write(2, fill(2))
    kernel.flush()
    kernel.write(3, fill(3, LOG // SECTOR))
    bench.barrier("lost")
    for look in (bench.tap.check, bench.follow):
        with pytest.raises(LogLostError, match="has stopped logging"):
            look()
    assert bench.volume.journal.head == head
    place = bench.tap.restart()
    assert (place, bench.tap.pending, bench.tap.barriers) == (first_of(bench.device.log), None, {})
    bench.volume.journal.note_position(place, place)
    kernel.write(4, fill(4))
    bench.barrier("on")
    assert bench.follow() == 2
    assert bench.newest()[4 * SECTOR : 5 * SECTOR] == fill(4)
    head = bench.volume.journal.head
    bench.restart()
    bench.follow()
    assert bench.volume.journal.head == head


def damage(bench: Bench, byte: int) -> None:
    with bench.device.log.open("r+b") as file:
        file.seek(byte)
        file.write(b"\xff" * 32)


def test_what_begins_nowhere_is_a_loss(bench: Bench) -> None:
    """No log, a shorter one, one without an entry where the journal ends, garbage behind: each says what it is."""
    bench.kernel.write(1, fill(1))
    bench.barrier()
    bench.follow()
    run(bench.volume.flush())
    position, retained = bench.volume.journal.position, bench.volume.journal.retained
    log = bench.device.log
    with pytest.raises(LogLostError, match="has no entry where the journal ends"):
        bench.tap.begin(position - 2, 0)
    damage(bench, position * SECTOR)
    bench.restart()
    with pytest.raises(LogLostError, match=f"at byte {position * SECTOR}: an entry with unknown flags"):
        bench.follow()
    content = log.read_bytes()
    log.write_bytes(content[: (position - 1) * SECTOR])
    with pytest.raises(LogLostError, match=f"its next entry should be at byte {position * SECTOR}"):
        bench.tap.begin(position, position)
    log.unlink()
    with pytest.raises(LogLostError, match="no log reaches back"):
        bench.tap.begin(position, retained)
    log.write_bytes(content)


def test_a_log_without_an_end_before_a_newer_one_is_a_loss(bench: Bench) -> None:
    """A rotation ends a log with a mark; where that is missing something is missing before it."""
    bench.kernel.write(1, fill(1))
    bench.barrier()
    bench.device.disabled = True
    bench.device.rotate(Lsn(bench.tap.next_first()))
    assert bench.follow(2) == 2
    with pytest.raises(LogLostError, match="stops without an end, and there is a newer one"):
        bench.follow()


@pytest.mark.parametrize("captured", [False, True])
def test_a_clean_detach(bench: Bench, captured: bool) -> None:  # noqa: FBT001
    """Everything is in the journal, the volume is clean; a new device begins where the log would have gone on."""
    bench.kernel.write(1, fill(1))
    bench.kernel.write(2, fill(2), fua=True)
    if captured:
        bench.barrier()
        bench.follow()
    run(dm.detach(bench.volume, bench.tap))
    assert bench.is_clean()
    assert bench.newest() == bench.kernel.disk
    assert bench.volume.journal.position == bench.tap.next_first()
    bench.kill()
    assert bench.tap.report() == {"volume": "disk", "device": "/dev/mapper/dmafs-disk", "attached": False}
    with pytest.raises(TapError, match="volume disk has no mapped device"):
        bench.tap.request("dmafs:1:")
    run(dm.attach(bench.volume, bench.tap, BOOT))
    assert not bench.is_clean()
    assert bench.volume.journal.gaps == []
    assert [first_of(path) for path in log_paths(bench.path)] == [bench.volume.journal.position]
    report = bench.tap.report()
    assert (report["attached"], report["logging"], report["open_count"]) == (True, True, 0)


def test_a_device_in_use_stays(bench: Bench) -> None:
    """A detach is refused, and capture goes on."""
    bench.device.users = 1
    bench.kernel.write(1, fill(1))
    bench.barrier()
    with pytest.raises(TapBusyError):
        run(dm.detach(bench.volume, bench.tap))
    bench.kernel.write(2, fill(2))
    bench.barrier("more")
    bench.follow()
    assert bench.newest() == bench.kernel.disk


def remove(bench: Bench) -> None:
    """Take the device away behind the tap's back."""
    bench.device.detach()


def cut(bench: Bench) -> None:
    """Take it away after its log has stopped."""
    bench.device.disabled = True
    bench.device.detach()


@pytest.mark.parametrize(
    ("end", "boot", "gap"),
    [(remove, BOOT, False), (cut, BOOT, True), (remove, OTHER, True)],
    ids=["rest", "cut", "boot"],
)
def test_an_attach_takes_in_what_the_last_log_has(
    bench: Bench, end: Callable[[Bench], None], boot: UUID, *, gap: bool
) -> None:
    """If that is whole nothing is lost; if it has no end, or is of another boot of the kernel, a gap begins."""
    for value in (1, 2):
        bench.kernel.write(value, fill(value))
        bench.barrier(str(value))
    bench.follow(1)
    bench.kernel.write(3, fill(3))
    end(bench)
    bench.kill()
    run(dm.attach(bench.volume, bench.tap, boot))
    assert needs_resync(bench.volume) is gap
    if not gap:
        assert bench.newest() == bench.kernel.disk
    bench.kernel.write(4, fill(4))
    bench.barrier("on")
    bench.restart()
    assert bench.follow() == 2
    bench.volume.check()


def test_an_attach_that_was_killed_begins_no_gap(bench: Bench) -> None:
    """Between the moment that the volume counts as open and the device's there is nothing to be lost."""
    run(dm.detach(bench.volume, bench.tap))
    bench.kill()
    work = dm.attach(bench.volume, bench.tap, BOOT)
    call = next(work)
    while call != bench.tap.attach:
        call = work.send(call())
    work.close()
    bench.kill()
    run(dm.attach(bench.volume, bench.tap, BOOT))
    assert bench.volume.journal.gaps == []
    bench.kernel.write(1, fill(1))
    bench.barrier()
    bench.follow()
    assert bench.newest() == bench.kernel.disk


def test_an_attach_that_fails_leaves_the_volume_in_order(bench: Bench) -> None:
    """The source may be mounted: after the error the volume is as clean as before, and the next attach needs no gap."""
    run(dm.detach(bench.volume, bench.tap))
    bench.kernel.busy = True
    for _ in range(2):
        bench.kill()
        with pytest.raises(SourceBusyError):
            run(dm.attach(bench.volume, bench.tap, BOOT))
        assert bench.is_clean()
    bench.kernel.busy = False
    bench.kill()
    run(dm.attach(bench.volume, bench.tap, BOOT))
    assert bench.volume.journal.gaps == []


def test_an_unfinished_copy_begins_anew_after_a_loss(tmp_path: Path, kernel: Kernel) -> None:
    """There is no gap before the first point: the copy holds what was lost."""
    path = tmp_path / "disk"
    path.mkdir()
    Volume.create(RealStorage(path), name="disk", size_sectors=SIZE, source=kernel.source, tap="dm", created_ns=1)
    volume = open_volume(path, limits=TINY, clock=Ticking())
    tap = DmTap(volume, path, log_bytes=LOG)
    run(dm.attach(volume, tap, BOOT))
    assert kernel.device is not None
    kernel.write(1, fill(1))
    tap.request("dmafs:1:")
    run(dm.drain(volume, tap))
    kernel.device.disabled = True
    kernel.device.detach()
    tap.close()
    tap = DmTap(volume, path, log_bytes=LOG)
    run(dm.attach(volume, tap, BOOT))
    assert (volume.journal.gaps, volume.pointers.now.mirror_seq, volume.floor) == ([], 1, 1)
    copy_all(volume, kernel.source)
    assert image_bytes(volume, volume.journal.head) == kernel.disk
    run(volume.flush(flag=Flag.TICK))
    tap.close()
    volume.close()


def test_other_taps_have_no_device() -> None:
    """Nothing can be detached, and there is nothing to keep."""
    with pytest.raises(TapError, match="has no device"):
        LoggedTap.detach(None)  # type: ignore[arg-type]
