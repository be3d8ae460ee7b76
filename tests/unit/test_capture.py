"""Claims about dmafs.taps.capture: windows of a log come into the journal, wholly or not at all, and once."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final
from unittest import mock

import pytest

from dmafs.core.ondisk import Flag
from dmafs.core.storage import RealStorage
from dmafs.core.volume import Volume
from dmafs.core.window import Window
from dmafs.core.work import run
from dmafs.errors import LogLostError, ReadOnlyError, StoreFullError
from dmafs.taps.capture import Captured, Log, LoggedTap, Scanned, barrier_text, capture, remembered
from dmafs.taps.logformat import END_MARK, LogFlag
from dmafs.taps.logreader import LogReader
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, MemoryFile, discard, log_of, mark, write
from tests.unit.tools import TINY, Ticking, copy_all, fill

FUA: Final = int(LogFlag.FUA)
DISK: Final = 16


class OneLog(LoggedTap):
    """A tap of one log in memory."""

    def __init__(self, entries: list[Logged], primary: MemoryFile) -> None:
        super().__init__(primary, DISK)
        self.log = Log(MemoryFile(log_of(entries)), 100, LogReader(MemoryFile(log_of(entries)), size_sectors=DISK))
        self.scans = 0
        self.failure = ""

    def begin(self, position: int, retained: int) -> None:
        raise NotImplementedError

    def scan(self) -> Scanned | None:
        self.scans += 1
        window = self.log.reader.scan()
        return None if window is None else Scanned(self.log, window)

    def check(self) -> None:
        if self.failure:
            raise LogLostError(self.failure, hint="-")

    def restart(self) -> int:
        raise NotImplementedError

    def release(self, place: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Bench:
    """A volume whose primary is in memory, too."""

    def __init__(self, folder: Path) -> None:
        source = folder / "primary"
        source.write_bytes(fill(9, DISK))
        self.path = folder / "disk"
        self.path.mkdir()
        Volume.create(RealStorage(self.path), name="disk", size_sectors=DISK, source=source, tap="dm", created_ns=1)
        self.volume = Volume(RealStorage(self.path), limits=TINY, clock=Ticking())
        copy_all(self.volume, source)
        self.origin = self.volume.journal.head
        self.primary = MemoryFile(fill(9, DISK), "primary")

    def tap(self, *entries: Logged) -> OneLog:
        return OneLog(list(entries), self.primary)

    def capture(self, tap: LoggedTap) -> Captured | None:
        captured = run(capture(self.volume, tap))
        self.volume.check()
        return captured

    def image(self) -> list[int]:
        return list(self.volume.live.read(0, DISK * SECTOR)[::SECTOR])


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.volume.close()


def test_a_window_is_journaled_with_its_place(bench: Bench) -> None:
    """Its events, then an indicator that says where the log goes on; nothing more is there then."""
    tap = bench.tap(write(1, fill(1, 2)), discard(2, 1), FLUSH)
    captured = bench.capture(tap)
    assert captured is not None
    assert len(captured.window) == 2
    assert bench.image() == [9, 1, 0, *[9] * 13]
    place = 100 + 1 + 3 + 1 + 1
    assert (bench.volume.journal.position, tap.captured_place) == (place, place)
    assert bench.capture(tap) is None
    assert bench.volume.journal.head == bench.origin + 2


@pytest.mark.parametrize(
    ("closing", "flag"), [(FLUSH, Flag.FLUSH), (mark("x"), Flag.TICK), (mark(END_MARK), Flag.TICK)]
)
def test_what_closes_a_window_is_its_indicator(bench: Bench, closing: Logged, flag: Flag) -> None:
    """A flush is one; a mark says nothing of plain writes, so it is a tick."""
    bench.capture(bench.tap(write(1, fill(1), FUA), closing))
    indicator = bench.volume.journal.last_indicator(bench.volume.journal.head)
    assert indicator is not None
    assert indicator.flag == flag


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mkfs", "mkfs"),
        (barrier_text("7f"), ""),
        (barrier_text("7f", "noon"), "noon"),
        (barrier_text("7f", "before.upgrade-2"), "before.upgrade-2"),
        ("be%66ore", "before"),
        ("two%20words", ""),
        ("a/b", ""),
        (END_MARK, ""),
    ],
)
def test_marks_have_the_names_that_somebody_gave_them(bench: Bench, text: str, name: str) -> None:
    """Ours carry a token and perhaps a name, those of others are names where they can be; the end's is none."""
    bench.capture(bench.tap(mark(text)))
    assert [each.name for each in bench.volume.journal.marks()] == [name] * bool(name)


def test_a_barriers_text_is_one_word() -> None:
    """The kernel takes no spaces."""
    text = barrier_text("7f", "two words: ä")
    assert text.isascii()
    assert not set(text) & set(" \t\n")


def test_a_correction_stands_behind_its_window(bench: Bench) -> None:
    """The newest image has the FUA write, at the window's own time."""
    tap = bench.tap(write(3, fill(3, 2), FUA), write(4, fill(4, 2)), FLUSH)
    bench.primary.write([fill(3, 2) + fill(4)], 3 * SECTOR)
    captured = bench.capture(tap)
    assert captured is not None
    assert len(captured.doubts[0]) == 0
    assert bench.image()[3:6] == [3, 3, 4]
    assert bench.volume.journal.head == bench.origin + 3
    assert [bench.volume.recoverable(bench.origin + at) for at in range(4)] == [True, False, False, True]


def test_doubts_are_told(bench: Bench) -> None:
    """The log is kept to."""
    tap = bench.tap(write(3, fill(3, 2), FUA), write(3, fill(4, 2)), FLUSH)
    bench.primary.write([fill(7)], 4 * SECTOR)
    bench.primary.write([fill(4)], 3 * SECTOR)
    captured = bench.capture(tap)
    assert captured is not None
    assert [side.tolist() for side in captured.doubts] == [[4], [5]]
    assert bench.image()[3:5] == [4, 4]


def test_a_full_store_keeps_the_window(bench: Bench) -> None:
    """What can't be written now, before or while it is, is tried again without another look at the log."""
    tap = bench.tap(write(1, fill(1)), FLUSH)
    full = StoreFullError("full", hint="-")
    with mock.patch.object(bench.volume, "require_space", side_effect=full), pytest.raises(StoreFullError):
        bench.capture(tap)
    with (
        mock.patch.object(Window, "write", side_effect=OSError(errno.ENOSPC, "no space")),
        pytest.raises(StoreFullError),
    ):
        bench.capture(tap)
    assert tap.pending is not None
    assert bench.volume.journal.head == bench.origin
    assert bench.capture(tap) is not None
    assert tap.scans == 1
    assert bench.image()[1] == 1


def test_what_a_lost_log_has_does_not_count(bench: Bench) -> None:
    """A check that fails takes the window back, before anybody has seen it."""
    tap = bench.tap(write(1, fill(1)), FLUSH)
    tap.failure = "the log is full"
    with pytest.raises(LogLostError, match="the log is full"):
        bench.capture(tap)
    bench.volume.check()
    assert bench.image() == [9] * DISK
    assert bench.volume.journal.position == 0
    bench.volume.indicate(Flag.GAP)
    assert bench.volume.journal.head == bench.origin


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_window_that_cannot_be_taken_back_shuts_the_gate(bench: Bench, number: int) -> None:
    """Otherwise what it has written might count later; what led to it is what is told."""
    tap = bench.tap(write(1, fill(1)), FLUSH)
    tap.failure = "the log is full"
    with (
        mock.patch.object(Window, "discard", side_effect=OSError(number, "no")),
        pytest.raises(LogLostError, match="the log is full"),
    ):
        run(capture(bench.volume, tap))
    assert bench.volume.failure
    with pytest.raises(ReadOnlyError):
        bench.volume.indicate(Flag.GAP)


def test_work_that_is_given_up_takes_its_window_back(bench: Bench) -> None:
    """Closed at any call, it leaves the journal as it was."""
    tap = bench.tap(write(1, fill(1)), FLUSH)
    for calls in range(2):
        work = capture(bench.volume, tap)
        call: Callable[[], object] = next(work)
        for _ in range(calls):
            call = work.send(call())
        call()
        work.close()
        tap.pending = None
        tap.log = tap.log._replace(reader=LogReader(tap.log.file, size_sectors=DISK))
        bench.volume.check()
        assert bench.volume.journal.head == bench.origin
    assert bench.capture(tap) is not None


def test_retained_is_the_oldest_fua_write_until_two_barriers_have_passed(bench: Bench) -> None:
    """A barrier forgets what the one before had seen; without FUA writes nothing is retained."""
    texts = [barrier_text(str(number)) for number in range(3)]
    tap = bench.tap(FLUSH, write(1, fill(1), FUA), *(mark(text) for text in texts), write(1, fill(2), FUA), FLUSH)
    journal = bench.volume.journal
    bench.capture(tap)
    assert journal.retained == 102
    retained = []
    for text in texts:
        tap.barriers[text] = tap.captured_place
        bench.capture(tap)
        retained.append(journal.retained)
    assert retained == [102, 102, tap.captured_place]
    assert not tap.barriers
    bench.capture(tap)
    assert journal.retained == 107


def test_after_a_loss_nothing_is_remembered(bench: Bench) -> None:
    """What was scanned, retained and begun belongs to the log that is lost."""
    tap = bench.tap(write(1, fill(1), FUA), mark("a"))
    bench.capture(tap)
    tap.barriers["b"] = 5
    tap.forget_all()
    assert (tap.arbiter.retained, tap.barriers, tap.pending) == (None, {}, None)


def test_discards_that_change_nothing_can_be_left_out(bench: Bench) -> None:
    """The rest of the window stays as it is."""
    tap = bench.tap(discard(1, 2), write(5, fill(5)), discard(5, 1), FLUSH)
    scanned = tap.scan()
    assert scanned is not None
    window = tap.without_discards(scanned.window)
    window.check()
    assert (window.starts.tolist(), window.end, window.closing) == ([5], scanned.window.end, "flush")


def test_windows_up_to_a_place_can_be_read_again() -> None:
    """Each with its own place; those behind are left for capture."""
    reader = LogReader(MemoryFile(log_of([FLUSH, mark("a"), FLUSH, FLUSH])), size_sectors=DISK)
    assert [place for _, place in remembered(reader, 103, 100)] == [101, 102]
    assert reader.position == 3 * SECTOR
