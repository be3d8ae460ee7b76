"""What the crash suite has found, each by itself: cuts of the power and failures at the wrong moment."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from dmafs.core.copy import initial_copy
from dmafs.core.journal import ForwardJournal
from dmafs.core.limits import IndexLimits, SegmentLimits
from dmafs.core.ondisk import Flag, Header, Kind, Pointers
from dmafs.core.overlay import Overlay
from dmafs.core.pointers import PointerFile
from dmafs.core.recovery import DIRECTORY
from dmafs.core.segment import Segment
from dmafs.core.store import open_volume_in
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError, StoreError, StoreFullError
from dmafs.taps.passthrough import PassThroughTap
from tests.crash.cutting import cut, killed
from tests.crash.disk import Failure, Operation, SimulatedDisk, SimulatedFile, SimulatedStorage
from tests.unit.tools import OURS, TINY, Ticking, fill

SIZE = 32
RNG = random.Random(1)


def fail(disk: SimulatedDisk, number: int, *what: str, done: float = 0.0) -> list[str]:
    """Have the first operation fail whose kind and path begin so, for each of *what*; return those that did."""
    left, struck = list(what), []

    def watch(operation: Operation) -> Failure | None:
        text = f"{operation.kind} {operation.path}"
        if left and text.startswith(left[0]):
            struck.append(left.pop(0))
            return Failure(number, done)
        return None

    disk.watch = watch
    return struck


class Box:
    """A copied volume on a simulated disk, with its primary beside it."""

    def __init__(self, tap: str = "fuse") -> None:
        self.disk = SimulatedDisk()
        storage = SimulatedStorage(self.disk)
        self.primary: SimulatedFile = storage.create("primary")
        self.primary.write([fill(9, SIZE)], 0)
        self.primary.datasync()
        storage.make_directory("disk")
        storage.sync_directory("")
        Volume.create(self.storage, name="disk", size_sectors=SIZE, source=Path("primary"), tap=tap, created_ns=1)
        self.open()
        run(initial_copy(self.volume, self.primary, lambda flag: self.volume.flush(self.primary, flag=flag), print))

    @property
    def storage(self) -> SimulatedStorage:
        return SimulatedStorage(self.disk, "disk")

    def open(self, disk: SimulatedDisk | None = None) -> Volume:
        self.disk = disk or self.disk
        self.volume = open_volume_in(self.storage, Path("disk"), limits=TINY, clock=Ticking())
        return self.volume

    def write(self, value: int) -> int:
        seq = self.volume.write(value, fill(value, 2))
        run(self.volume.flush(self.primary))
        return seq

    def image(self, seq: int) -> bytes:
        image = self.volume.image(seq)
        return bytes(image.read(0, image.size))


# --- pointers


def test_a_slot_in_the_page_cache_is_durable_before_it_counts() -> None:
    """After a kill, or a datasync that failed, no power cut brings back the slot before the one that was found."""
    disk = SimulatedDisk()
    PointerFile.create(SimulatedStorage(disk), Pointers(OURS))
    SimulatedStorage(disk).sync_directory("")
    file = PointerFile(SimulatedStorage(disk), OURS)
    assert not fail(disk, errno.EIO, "datasync pointers")
    with pytest.raises(OSError, match="Input/output"):
        file.update(mirror_seq=7)
    after = killed(disk.moment())
    assert PointerFile(SimulatedStorage(after), OURS).now.mirror_seq == 7
    left = cut(after.moment(), RNG, keep=False)
    assert PointerFile(SimulatedStorage(left), OURS).now.mirror_seq == 7


# --- segments and the forward journal


@pytest.mark.parametrize("what", ["create s.dat", "create s.ext", "write s.ext"])
def test_a_segment_that_cannot_be_made_leaves_no_file(what: str) -> None:
    """Whatever fails of its creation, nothing is left, neither a name nor an open file."""
    disk = SimulatedDisk()
    struck = fail(disk, errno.ENOSPC, what)
    with pytest.raises(OSError, match="No space"):
        Segment.create(SimulatedStorage(disk), "s", Header(Kind.FORWARD, OURS, 1, 1))
    assert struck == [what]
    assert disk.contents() == {}
    assert disk.opened == 0


def test_what_a_segment_leaves_behind_is_no_want_of_space() -> None:
    """Where not even the file that was made can be removed the error is one that shuts the gate."""
    disk = SimulatedDisk()
    fail(disk, errno.ENOSPC, "write s.ext", "unlink s.ext")
    with pytest.raises(OSError, match="left behind") as caught:
        Segment.create(SimulatedStorage(disk), "s", Header(Kind.FORWARD, OURS, 1, 1))
    assert caught.value.errno == errno.EIO
    assert sorted(disk.contents()) == ["s.dat", "s.ext"], "descriptors without data would be damage"


class Journal:
    """A forward journal on a simulated disk; a segment takes four sectors."""

    def __init__(self, *, windowed: bool) -> None:
        self.windowed = windowed
        self.disk = SimulatedDisk()
        SimulatedStorage(self.disk).make_directory(DIRECTORY)
        SimulatedStorage(self.disk).sync_directory("")
        self.open(self.disk)

    def open(self, disk: SimulatedDisk, *, tail: int = 0) -> ForwardJournal:
        self.disk = disk
        limits = SegmentLimits(data_sectors=4, records=6)
        self.journal = ForwardJournal(
            SimulatedStorage(disk), OURS, limits, Ticking(), index=IndexLimits(), windowed=self.windowed
        )
        self.journal.recover(tail=tail, tail_time_ns=0, durable=tail)
        self.journal.check()
        return self.journal

    def window(self, position: int) -> None:
        """Journal four events of a sector each."""
        window = self.journal.begin_window()
        window.write([(at, 1, fill(position)) for at in range(4)])
        window.close(Flag.FLUSH, position=position, retained=position)
        self.journal.publish(window)

    def release(self, tail: int) -> None:
        for part in self.journal.release(tail):
            part.remove(SimulatedStorage(self.disk))
        SimulatedStorage(self.disk).sync_directory(DIRECTORY)


def test_the_place_in_the_log_is_that_of_the_last_durable_indicator() -> None:
    """A release keeps it: the indicators behind it may be gone after a cut."""
    box = Journal(windowed=True)
    box.window(10)
    run(box.journal.take_dirty())
    box.window(20)
    box.release(4)
    after = box.open(cut(box.disk.moment(), RNG, keep=False), tail=4)
    assert (after.position, after.head) == (10, 4)
    box.window(30)
    run(box.journal.take_dirty())
    box.release(8)
    assert [part.first for part in box.journal.parts] == [5], "the one before is needed no more"


def test_an_abandoned_window_never_comes_back() -> None:
    """Its segments are gone durably before others take their names, also where they had been durable."""
    box = Journal(windowed=True)
    box.window(10)
    run(box.journal.take_dirty())
    window = box.journal.begin_window()
    window.write([(at, 1, fill(20)) for at in range(4)])
    window.close(Flag.FLUSH, position=20, retained=20)
    for segment, _ in window.parts:
        segment.datasync()
    SimulatedStorage(box.disk).sync_directory(DIRECTORY)
    box.journal.abandon(window)
    after = box.open(cut(box.disk.moment(), RNG, keep=False))
    assert (after.position, after.head) == (10, 4)


def test_a_window_that_nobody_ended_is_closed_with_its_journal() -> None:
    """Nothing stays open where a gate that has shut lets nobody abandon it."""
    box = Journal(windowed=True)
    box.window(10)
    struck = fail(box.disk, errno.EIO, f"write {DIRECTORY}/{5:020}.dat")
    with pytest.raises(OSError, match="Input/output"):
        box.window(20)
    box.journal.close()
    assert len(struck) == 1
    assert box.disk.opened == 0


@pytest.mark.parametrize("windowed", [False, True])
def test_a_segment_that_was_being_removed_is_no_damage(windowed: bool) -> None:  # noqa: FBT001
    """Its data is gone, its name isn't: all that it ever had is in the mirror."""
    box = Journal(windowed=windowed)
    if windowed:
        box.window(10)
        box.window(20)
    else:
        for at in range(4):
            box.journal.append(at, 1, fill(10))
        box.journal.indicate(Flag.FLUSH)
    run(box.journal.take_dirty())
    head = box.journal.head
    box.journal.durable = head
    first = box.journal.parts[0]
    box.journal.close()
    file = SimulatedStorage(box.disk).open(f"{first.stem}.dat")
    file.truncate(0)
    file.close()
    assert box.open(box.disk, tail=4).head == head
    box.release(head)
    assert not SimulatedStorage(box.disk).exists(f"{first.stem}.ext")


# --- snapshots


@pytest.mark.parametrize("done", [0.0, 1.0])
def test_a_snapshot_that_was_not_taken_never_appears(done: float) -> None:
    """Not even after a cut, when a sync has passed its moment: it would show a later one."""
    box = Box()
    seq = box.write(1)
    struck = fail(box.disk, errno.ENOSPC, "sync_directory disk/backward", done=done)
    with pytest.raises(StoreFullError):
        run(box.volume.snapshot_at(seq, "no"))
    assert len(struck) == 1
    box.write(1)
    run(sync(box.volume, open_snapshot=False))
    for keep in (False, True, None):
        volume = box.open(cut(box.disk.moment(), RNG, keep=keep))
        assert volume.snapshots.find("no") is None
        assert volume.snapshots.at(seq) is None


def test_a_snapshot_that_may_appear_shuts_the_gate() -> None:
    """When what a failed creation left can't be taken away durably nothing is written any more."""
    box = Box()
    seq = box.write(1)
    fail(box.disk, errno.ENOSPC, "sync_directory disk/backward", "sync_directory disk/backward")
    with pytest.raises(StoreError):
        run(box.volume.snapshot_at(seq, "no"))
    assert box.volume.failure


def test_pins_are_what_the_disk_says() -> None:
    """A pin or unpin that failed counts as far as it was done."""
    box = Box()
    snapshot = run(box.volume.snapshot_at(box.write(1), "one"))
    fail(box.disk, errno.ENOSPC, "create disk/backward")
    with pytest.raises(StoreFullError):
        run(box.volume.pin(snapshot))
    assert not snapshot.pinned
    for work, pinned in ((box.volume.pin, True), (box.volume.unpin, False)):
        fail(box.disk, errno.ENOSPC, "sync_directory disk/backward")
        with pytest.raises(StoreFullError):
            run(work(snapshot))
        assert snapshot.pinned is pinned
        box.volume.check()


# --- clones


def test_a_clone_that_was_not_made_leaves_nothing() -> None:
    """Also where it had its name already, and where what was made can only be removed later."""
    box = Box()
    image = box.volume.image(box.write(1))
    fail(box.disk, errno.EIO, "datasync disk/clones/try/")
    with pytest.raises(StoreError):
        run(box.volume.clones.create(image, "try"))
    assert box.storage.names("clones") == []
    fail(box.disk, errno.EIO, "datasync disk/clones/try/", "unlink disk/clones", done=1.0)
    with pytest.raises(StoreError):
        run(box.volume.clones.create(image, "try"))
    for disk in (killed(box.disk.moment()), cut(box.disk.moment(), RNG, keep=False)):
        left = Box.__new__(Box)
        assert not list(left.open(disk).clones)
        assert left.storage.names("clones") == []
    run(box.volume.clones.create(image, "try"))
    box.volume.check()


def test_a_drop_of_a_clone_that_failed_half_way_goes_on() -> None:
    """Until it is done the clone is there with all its files, whatever a cut leaves; then it can be dropped again."""
    box = Box()
    clone = run(box.volume.clones.create(box.volume.image(box.write(1)), "try"))
    fail(box.disk, errno.EIO, "sync_directory disk/clones", "sync_directory disk/clones")
    for _ in range(2):
        with pytest.raises(StoreError):
            run(box.volume.clones.drop(clone))
        for keep in (False, True, None, None, None):
            left = Box.__new__(Box)
            found = left.open(cut(box.disk.moment(), RNG, keep=keep)).clones.find("try")
            assert found is None or not found.failure
    run(box.volume.clones.drop(clone))
    assert box.storage.names("clones") == []


@pytest.mark.parametrize("seq", [0, 99, 2**63, 2**64 - 1])
def test_a_clone_of_no_moment_harms_nobody(seq: int) -> None:
    """One whose base isn't there answers with errors, and can be dropped; the volume opens."""
    box = Box()
    box.write(1)
    box.write(2)
    run(sync(box.volume, open_snapshot=False))
    box.volume.close()
    box.storage.make_directory("clones/try")
    header = Header(Kind.CLONE, box.volume.info.uuid, 1, 1, seq, 1, name="try")
    Overlay.create(box.storage, "clones/try", header, SIZE)
    clone = box.open().clones.find("try")
    assert clone is not None
    assert clone.failure
    with pytest.raises(CorruptionError, match="clone try of volume disk can't be used"):
        run(clone.read(0, 512))
    box.volume.check()
    box.write(3)
    run(sync(box.volume))
    run(box.volume.clones.drop(clone))


# --- the pass-through tap


def test_a_redo_that_fails_shuts_the_gate() -> None:
    """Then primary and journal don't agree, so nothing is captured."""
    box = Box()
    box.volume.write(3, fill(3))
    box.volume.close()
    tap = PassThroughTap(box.open(), box.primary)
    fail(box.disk, errno.EIO, "write primary")
    with pytest.raises(StoreError, match="input/output"):
        run(tap.redo())
    assert box.volume.failure
