"""Claims about dmafs.taps.follower: what QEMU has finished writing is captured, and no other log is taken for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.core.storage import RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import DmafsError, LogLostError
from dmafs.taps.capture import capture
from dmafs.taps.follower import STRIDE, LogTap
from dmafs.taps.logformat import Super
from dmafs.units import SECTOR
from tests.logs import FLUSH, Logged, discard, write
from tests.unit.tools import TINY, Clock, Ticking, copy_all, fill, image_bytes

SIZE = 64


class Bench:
    """A volume with a log that a test writes as QEMU does, a clock, and a tap that can be killed."""

    def __init__(self, path: Path) -> None:
        self.path, self.log = path / "volume", path / "the.log"
        self.source = path / "primary.img"
        self.source.write_bytes(bytes(SIZE * SECTOR))
        self.disk = bytearray(SIZE * SECTOR)
        self.path.mkdir()
        self.log.touch()
        self.at = self.count = 0
        self.clock = Clock(100)
        Volume.create(
            RealStorage(self.path),
            name="disk",
            size_sectors=SIZE,
            source=self.source,
            tap="log",
            created_ns=1,
            log_path=str(self.log),
        )
        self.volume = open_volume(self.path, limits=TINY, clock=Ticking())
        copy_all(self.volume, self.source)
        self.opened: list[Volume] = [self.volume]
        self.taps: list[LogTap] = []
        self.start(0)

    def start(self, position: int) -> LogTap:
        """Begin to follow."""
        tap = LogTap(self.volume, open_source(self.source, writable=False), settle_s=1, clock=self.clock)
        self.taps.append(tap)
        tap.begin(position, 0)
        return tap

    @property
    def tap(self) -> LogTap:
        return self.taps[-1]

    def kill(self) -> None:
        """Open volume and log anew, without closing them first."""
        run(self.volume.flush())
        self.volume = open_volume(self.path, limits=TINY, clock=Ticking())
        self.opened.append(self.volume)
        self.start(self.volume.journal.position)

    def restart_qemu(self) -> None:
        """Write the log from its beginning again, over what is there."""
        self.at = self.count = 0

    def log_entries(self, *entries: Logged, counted: bool = True) -> None:
        """Write entries to the log, and the super block behind a flush."""
        with self.log.open("r+b") as file:
            for entry in entries:
                file.seek(self.at + SECTOR)
                content = entry.encode(SECTOR)
                file.write(content)
                self.at += len(content)
                self.count += 1
                begin, length = entry.sector * SECTOR, entry.sectors * SECTOR
                self.disk[begin : begin + length] = entry.data or bytes(length)
            if counted:
                file.seek(0)
                file.write(Super(self.count).encode())

    def follow(self, *, after: int = 1) -> int:
        """Look, let time pass, look again; return how many windows came."""
        count = 0
        for passed in (0, after):
            self.clock.now += passed
            while run(capture(self.volume, self.tap)) is not None:
                count += 1
        return count

    def newest(self) -> bytes:
        return image_bytes(self.volume, self.volume.journal.head)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for tap in bench.taps:
        tap.close()
    for volume in bench.opened:
        volume.close()


def test_what_was_flushed_is_captured(bench: Bench) -> None:
    """Each flush is a moment; the images are what the log says."""
    assert bench.follow() == 0
    bench.log_entries(write(1, fill(1)), write(2, fill(2, 3)), FLUSH)
    before = bytes(bench.disk)
    bench.log_entries(discard(2, 2), write(1, fill(9)), FLUSH)
    assert bench.follow() == 2
    assert bench.newest() == bench.disk
    assert image_bytes(bench.volume, 2) == before
    assert bench.volume.journal.position == 1 + bench.at // SECTOR == bench.tap.captured_place


def test_an_entry_counts_when_it_was_counted_for_a_while(bench: Bench) -> None:
    """Other writes to the log may still be under way when the super block is written."""
    bench.log_entries(write(1, fill(1)), FLUSH)
    assert bench.follow(after=0) == 0
    bench.log_entries(write(1, fill(2)), FLUSH)
    bench.clock.now += 1
    assert run(capture(bench.volume, bench.tap)) is not None
    assert bench.follow(after=0) == 0
    assert bench.follow(after=1) == 1


def test_what_nobody_flushed_is_left_alone(bench: Bench) -> None:
    """Entries that the super block doesn't count aren't there, nor those without a flush behind them."""
    bench.log_entries(write(1, fill(1)), FLUSH, counted=False)
    assert bench.follow(after=10) == 0
    bench.log_entries(write(2, fill(2)))
    assert bench.follow() == 1
    bench.log_entries(FLUSH)
    assert bench.follow() == 1


def test_a_killed_follower_goes_on_where_the_journal_ends(bench: Bench) -> None:
    """Nothing is captured twice, nothing is left out."""
    for value in range(1, 6):
        bench.log_entries(write(value, fill(value)), write(9, fill(value)), FLUSH)
        assert bench.follow() == 1
        bench.kill()
    assert bench.volume.journal.head == 10
    assert bench.newest() == bench.disk


@pytest.mark.parametrize("counted", [False, True])
def test_a_log_that_begins_anew_is_noticed(bench: Bench, counted: bool) -> None:  # noqa: FBT001
    """QEMU writes over the old log from its beginning; before the first flush the old super block still stands."""
    bench.log_entries(write(1, fill(1)), write(2, fill(2)), FLUSH)
    assert bench.follow() == 1
    bench.restart_qemu()
    bench.log_entries(write(3, fill(3)), FLUSH, counted=counted)
    with pytest.raises(LogLostError, match="can't be followed"):
        bench.follow()
    assert bench.volume.journal.head == 2


def test_a_log_that_begins_anew_and_is_longer_is_noticed(bench: Bench) -> None:
    """The number of entries alone wouldn't tell."""
    bench.log_entries(write(1, fill(1)), FLUSH)
    assert bench.follow() == 1
    bench.restart_qemu()
    bench.log_entries(*(write(at, fill(at)) for at in range(3, 9)), FLUSH)
    with pytest.raises(LogLostError, match=r"bytes 512 to \d+ have changed"):
        bench.follow()


def test_a_window_is_not_journaled_when_the_log_begins_anew_while_it_is_read(bench: Bench) -> None:
    """What was scanned is dropped when its bytes may be another log's by now."""
    bench.log_entries(write(1, fill(1)), FLUSH)
    assert bench.follow() == 1
    bench.log_entries(write(2, fill(2)), FLUSH)
    assert bench.follow(after=0) == 0
    bench.clock.now += 1
    work = capture(bench.volume, bench.tap)
    scanned = next(work)()
    bench.restart_qemu()
    bench.log_entries(write(5, fill(5)), FLUSH, counted=False)
    write_it = work.send(scanned)
    with pytest.raises(LogLostError) as raised:
        write_it()
    with pytest.raises(LogLostError):
        work.throw(raised.value)
    assert bench.volume.journal.head == 1


def test_a_log_in_another_file_is_noticed(bench: Bench) -> None:
    """Removed and made again it is another log, also if it has the same bytes."""
    bench.log_entries(write(1, fill(1)), FLUSH)
    assert bench.follow() == 1
    content = bench.log.read_bytes()
    bench.log.unlink()
    with pytest.raises(LogLostError, match="no such file"):
        bench.follow()
    other = bench.log.with_suffix(".new")
    other.write_bytes(content)
    other.rename(bench.log)
    with pytest.raises(LogLostError, match="another file"):
        bench.follow()


def test_a_damaged_log_is_lost(bench: Bench) -> None:
    """What no writer writes ends the capture; the message says where."""
    bench.log_entries(write(1, fill(1)), FLUSH, Logged(1, 1, 64, fill(1)), FLUSH)
    with pytest.raises(LogLostError, match="at byte 2048: an entry with unknown flags"):
        bench.follow()


def test_after_a_loss_the_log_is_followed_from_its_beginning(bench: Bench) -> None:
    """Places go on growing; the number of entries that the old log had isn't believed."""
    bench.log_entries(write(1, fill(1)), write(2, fill(2)), FLUSH)
    assert bench.follow() == 1
    bench.restart_qemu()
    bench.log_entries(write(3, fill(3)), counted=False)
    with pytest.raises(LogLostError):
        bench.follow()
    assert bench.tap.restart() == STRIDE
    assert bench.follow() == 0
    bench.log_entries(FLUSH)
    assert bench.follow() == 1
    assert bench.newest()[3 * SECTOR : 4 * SECTOR] == fill(3)
    assert bench.volume.journal.position == STRIDE + 1 + bench.at // SECTOR
    bench.kill()
    bench.log_entries(write(4, fill(4)), FLUSH)
    assert bench.follow() == 1
    assert bench.newest() == bench.disk


def test_a_log_that_began_anew_while_nobody_followed_is_noticed(bench: Bench) -> None:
    """At a start the log has to have what the journal has: a flush where reading goes on, and the same data."""
    bench.log_entries(write(1, fill(1)), write(2, fill(2)), FLUSH)
    assert bench.follow() == 1
    bench.restart_qemu()
    bench.log_entries(write(1, fill(1)), write(2, fill(3)), FLUSH, write(5, fill(5)), FLUSH)
    with pytest.raises(LogLostError, match="isn't what was read from there"):
        bench.kill()
    bench.restart_qemu()
    bench.log_entries(write(1, fill(1, 5)), FLUSH)
    with pytest.raises(LogLostError, match="no flush ends at byte"):
        bench.kill()
    bench.log.unlink()
    with pytest.raises(LogLostError, match="can't be opened"):
        bench.kill()


def test_a_check_may_run_beside_a_restart(bench: Bench) -> None:
    """Whoever checks sees the old log or the new one, never one that is closed or half known."""
    bench.log_entries(write(1, fill(1)), FLUSH)
    assert bench.follow() == 1
    done = threading.Event()
    troubles: list[Exception] = []

    def check() -> None:
        while not done.is_set():
            try:
                bench.tap.check()
            except (OSError, DmafsError) as error:
                troubles.append(error)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    for value in range(2, 20):
        bench.tap.restart()
        bench.log_entries(write(value, fill(value)), FLUSH)
        bench.follow()
    done.set()
    for thread in threads:
        thread.join()
    assert troubles == []
    assert bench.newest() == bench.disk


def test_what_has_been_flushed_is_waited_for(bench: Bench) -> None:
    """A copy is of a moment once all is captured that was flushed before its end; what wasn't flushed isn't needed."""
    assert bench.tap.counted() == 0
    assert bench.tap.is_through(0)
    bench.log_entries(write(1, fill(1)), FLUSH)
    count = bench.tap.counted()
    assert count == 2
    assert not bench.tap.is_through(count)
    bench.follow(after=0)
    assert not bench.tap.is_through(count), "it may not be whole yet"
    bench.follow()
    assert bench.tap.is_through(count)
    bench.log_entries(write(2, fill(2)), counted=False)
    assert bench.tap.is_through(bench.tap.counted())
