"""Claims about dmafs.core.window: what was captured together counts wholly or not at all, at one time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.core.batch import Extent
from dmafs.core.journal import ForwardJournal
from dmafs.core.limits import IndexLimits, SegmentLimits
from dmafs.core.ondisk import RECORD_SIZE, Flag
from dmafs.core.recovery import DIRECTORY
from dmafs.core.storage import RealStorage
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import NoSuchPointError
from dmafs.units import SECTOR
from tests.unit.tools import OURS, TINY, Ticking, copy_all, fill, image_bytes, segments_of

LIMITS = SegmentLimits(data_sectors=4, records=6)


class Bench:
    """A windowed journal that can be killed: opened again without closing."""

    def __init__(self, path: Path) -> None:
        self.root = path
        (path / DIRECTORY).mkdir()
        self.clock = Ticking()
        self.opened: list[ForwardJournal] = []
        self.reopen()

    def reopen(self, *, tail: int = 0) -> ForwardJournal:
        limits = SegmentLimits(LIMITS.data_sectors, LIMITS.records)
        self.journal = ForwardJournal(
            RealStorage(self.root), OURS, limits, self.clock, index=IndexLimits(), windowed=True
        )
        self.opened.append(self.journal)
        self.journal.recover(tail=tail, tail_time_ns=0, durable=0)
        self.journal.check()
        return self.journal

    def window(self, extents: list[Extent], position: int, *, name: str = "", retained: int = 0) -> None:
        window = self.journal.begin_window()
        window.write(extents)
        window.close(Flag.FLUSH, position=position, retained=retained, name=name)
        self.journal.publish(window)
        self.journal.check()

    def content(self) -> list[tuple[int, int, bytes]]:
        """Return start, time and data of all events."""
        return [
            (segment.starts[index], segment.times[index], bytes(segment.verify(index)))
            for segment in segments_of(self.journal)
            for index in range(len(segment))
        ]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for journal in bench.opened:
        journal.close()


def extents(*starts: int) -> list[Extent]:
    """Return a write of one sector for each start, full of that number; a discard for a negative one."""
    return [(abs(start), 1, fill(start) if start > 0 else None) for start in starts]


def test_all_events_of_a_window_have_one_time(bench: Bench) -> None:
    """Windows have increasing times; within one nothing tells events apart, also over several segments."""
    bench.window(extents(1, 2, -3, 4, 5, 6, 7, 8, 9), 10)
    bench.window(extents(1), 20)
    times = [time for _, time, _ in bench.content()]
    assert len(set(times[:9])) == 1
    assert times[9] > times[0]
    assert len(segments_of(bench.journal)) > 2
    assert [bench.journal.splits_window(seq) for seq in range(1, 11)] == [True] * 8 + [False, False]


def test_a_window_that_was_not_published_is_cut_off(bench: Bench) -> None:
    """Killed at any time before it is published, a window leaves nothing, and the log is read again from before it."""
    bench.window(extents(1, 2, 3), 10, retained=7)
    before = bench.content()
    window = bench.journal.begin_window()
    for start in range(1, 12):
        window.write(extents(start))
        journal = bench.reopen()
        assert bench.content() == before
        assert (journal.position, journal.retained, journal.head) == (10, 7, 3)
        window = journal.begin_window()
        window.write(extents(*range(1, start + 1)))
    bench.journal.abandon(window)
    bench.window(extents(8), 30)
    assert bench.reopen().position == 30
    assert [start for start, _, _ in bench.content()] == [1, 2, 3, 8]


def test_abandoned_windows_leave_no_file_and_no_record(bench: Bench) -> None:
    """What was written of a window that failed is gone at once."""
    bench.window(extents(1), 10)
    names = sorted(path.name for path in (bench.root / DIRECTORY).iterdir())
    sizes = [path.stat().st_size for path in sorted((bench.root / DIRECTORY).iterdir())]
    window = bench.journal.begin_window()
    window.write(extents(*range(1, 20)))
    bench.journal.abandon(window)
    bench.journal.check()
    assert sorted(path.name for path in (bench.root / DIRECTORY).iterdir()) == names
    assert [path.stat().st_size for path in sorted((bench.root / DIRECTORY).iterdir())] == sizes


def test_events_behind_the_last_indicator_do_not_count(bench: Bench) -> None:
    """A write that was journaled outside of a window, without a flush, is cut off: the log comes first."""
    bench.window(extents(1), 10)
    bench.journal.append(5, 1, fill(5))
    assert bench.reopen().head == 1
    bench.journal.append(5, 1, fill(5))
    bench.journal.indicate(Flag.RESYNCED)
    journal = bench.reopen()
    assert (journal.head, journal.position) == (2, 10)


def test_a_mark_is_there_with_its_window_or_not_at_all(bench: Bench) -> None:
    """Name and place in the log are recorded behind the events; cut between them, the place is known all the same."""
    bench.window(extents(1), 10, retained=4)
    bench.window(extents(2), 20, name="half", retained=15)
    ext = max((bench.root / DIRECTORY).glob("*.ext"))
    with ext.open("r+b") as file:  # as if killed between the two records
        file.truncate(ext.stat().st_size - RECORD_SIZE)
    journal = bench.reopen()
    assert [mark.name for mark in journal.marks()] == ["half"]
    assert (journal.position, journal.retained) == (20, 4)


def test_the_place_in_the_log_survives_a_release(bench: Bench) -> None:
    """When everything is in the mirror, the segment that knows the place stays."""
    bench.window(extents(*range(1, 15)), 99, retained=50)
    for segment in bench.journal.release(bench.journal.head):
        segment.remove(RealStorage(bench.root))
    journal = bench.reopen(tail=14)
    assert (journal.position, journal.retained, journal.head) == (99, 50, 14)


def test_idle_windows_are_noted_from_time_to_time(bench: Bench) -> None:
    """Windows without events leave no record, until much of the log would have to be read again."""
    bench.window(extents(1), 10)
    records = segments_of(bench.journal)[-1].records
    for position in range(20, 2000, 20):
        bench.window([], position)
    assert segments_of(bench.journal)[-1].records == records
    bench.window([], 5000)
    assert segments_of(bench.journal)[-1].records == records + 1
    assert bench.reopen().position == 5000


def test_the_log_is_let_go_of_as_far_as_the_records_say(bench: Bench) -> None:
    """What is known in memory only, of windows without events, doesn't count: after a kill it is unknown."""
    bench.window(extents(1), 10, retained=10)
    bench.window([], 30, retained=30)
    run(bench.journal.take_dirty())
    assert (bench.journal.retained, bench.journal.durable_retained) == (30, 10)
    assert bench.reopen().retained == 10
    bench.journal.note_position(30, 30)
    run(bench.journal.take_dirty())
    assert bench.journal.durable_retained == bench.reopen().retained == 30


def test_volume_shows_windows_as_points(tmp_path: Path) -> None:
    """Only the ends of windows can be had, and the live image takes them over, also where it had been looked at."""
    primary = tmp_path / "primary"
    primary.write_bytes(fill(9, 16))
    path = tmp_path / "disk"
    path.mkdir()
    Volume.create(RealStorage(path), name="disk", size_sectors=16, source=primary, tap="dm", created_ns=1)
    volume = Volume(RealStorage(path), limits=TINY, clock=Ticking())
    copy_all(volume, primary)
    origin = volume.journal.head
    assert bytes(volume.live.read(0, 16 * SECTOR)) == fill(9, 16)
    window = volume.begin_window()
    window.write(extents(1, 2, -3))
    window.close(Flag.FLUSH, position=40, retained=0)
    volume.publish(window)
    volume.check()
    expected = fill(9) + fill(1) + fill(2) + fill(0) + fill(9, 12)
    assert bytes(volume.live.read(0, 16 * SECTOR)) == expected
    assert image_bytes(volume, origin + 3) == expected
    for seq in (origin + 1, origin + 2):
        with pytest.raises(NoSuchPointError):
            volume.image(seq)
    run(volume.flush())
    assert volume.journal.durable == origin + 3
    volume.close()


def test_the_place_in_the_log_survives_a_kill_behind_a_release(bench: Bench) -> None:
    """All is in the mirror, and a window had begun a new segment: the old one, with the place, is no leftover."""
    bench.window(extents(*range(1, 5)), 99, retained=50)
    window = bench.journal.begin_window()
    window.write(extents(*range(1, 5)))
    assert window.parts[-1][0].header.first == 5
    journal = bench.reopen(tail=4)
    assert (journal.position, journal.retained, journal.head) == (99, 50, 4)


def test_what_of_the_log_may_go_is_what_a_record_says(bench: Bench) -> None:
    """An idle window that isn't noted lets nothing go: after a kill the log is read again from the record's place."""
    bench.window(extents(1), 10, retained=4)
    bench.window([], 20, retained=20)
    run(bench.journal.take_dirty())
    assert bench.journal.durable_retained == 4
    assert bench.reopen().retained == 4
    bench.window(extents(1), 30, retained=30)
    run(bench.journal.take_dirty())
    assert bench.journal.durable_retained == 30
