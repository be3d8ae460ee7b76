"""Claims about dmafs.taps.mapped: the device, its logs, and what is left of either."""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from uuid import UUID

import pytest

from dmafs.errors import ExistsError, SourceBusyError, SourceError, TapBusyError, TapError
from dmafs.taps import loopdev
from dmafs.taps.devicemapper import DeviceMapper, Target, spelled
from dmafs.taps.logformat import END_MARK
from dmafs.taps.mapped import HEAD_BYTES, Lsn, MappedTap, first_of, log_paths, punch
from tests.mount.harness import opened, run, wait_until
from tests.vm.guest.naive import FLUSH, Entry, entries, replay

MIB = 1 << 20
PAGE = 4096
SIZE = 16 * MIB
LOG = 32 * MIB
UUID_ONE = UUID(int=1)
UUID_TWO = UUID(int=2)


class Desk:
    """A volume's directory and its primary, which is a loop device, on the guest's ext4."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = root / "store" / "disk"
        self.directory.mkdir(parents=True)
        self.image = root / "primary.img"
        self.image.write_bytes(bytes(SIZE))
        self.loop = loopdev.attach(self.image)
        self.source = self.loop.node

    def attach(self, *, log_bytes: int = LOG, first: int = 0, name: str = "disk", uuid: UUID = UUID_ONE) -> MappedTap:
        return MappedTap.attach(
            self.directory,
            volume_name=name,
            volume_uuid=uuid,
            source=self.source,
            log_bytes=log_bytes,
            first=Lsn(first),
        )

    def find(self, *, source: Path | None = None, directory: Path | None = None) -> MappedTap | None:
        return MappedTap.find(
            directory or self.directory,
            volume_name="disk",
            volume_uuid=UUID_ONE,
            source=source or self.source,
            log_bytes=LOG,
        )

    def found(self) -> MappedTap:
        tap = self.find()
        assert tap is not None
        return tap

    def log(self) -> list[Entry]:
        """Return the entries of all logs, each of which has to be closed, without what ended the last one."""
        logs = [entries(path) for path in log_paths(self.directory)]
        assert all(log[-1].text == END_MARK for log in logs)
        found = [entry for log in logs for entry in log[:-1]]
        if found[-1].text == "dmafs:detach":
            assert found[-2].flags & FLUSH
            found = found[:-2]
        return found

    def replayed(self) -> bytes:
        image = bytearray(SIZE)
        replay(image, self.log())
        return bytes(image)

    def primary(self) -> bytes:
        """Return what the primary holds, past the page cache that the device's users don't share."""
        found = bytearray()
        page = mmap.mmap(-1, MIB)
        with opened(self.source, os.O_RDONLY | os.O_DIRECT) as fd:
            for offset in range(0, SIZE, MIB):
                assert os.preadv(fd, [page], offset) == MIB
                found += page[:]
        return bytes(found)

    def close(self) -> None:
        with DeviceMapper() as dm:
            for name, _ in sorted(dm.devices(), reverse=True):
                dm.remove(name)
        self.loop.close()


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A desk, from which all that a test has made is taken away."""
    root = Path(tempfile.mkdtemp(prefix="dmafs-vm.", dir="/var/tmp"))
    made = Desk(root)
    yield made
    run("umount", root / "mnt", code=None)
    made.close()
    wait_until(lambda: not attached_below(root), "all loop devices to be gone")
    run("rm", "-rf", root)


def attached_below(root: Path) -> list[str]:
    lines = run("losetup", "--list", "--noheadings", "--output", "BACK-FILE").stdout.splitlines()
    return [line for line in lines if line.startswith(str(root))]


class Writer:
    """A thread that writes numbered pages to a device, and now and then flushes, until it is stopped."""

    def __init__(self, node: Path) -> None:
        self.longest_s = 0.0
        self.count = 0
        self._node = node
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        page = mmap.mmap(-1, PAGE)
        with opened(self._node, os.O_WRONLY | os.O_DIRECT) as fd:
            while not self._stop.is_set():
                self.count += 1
                page[:8] = self.count.to_bytes(8, "little")
                begun = time.perf_counter()
                os.pwrite(fd, page, page_of(self.count))
                if self.count % 16 == 0:
                    os.fsync(fd)
                self.longest_s = max(self.longest_s, time.perf_counter() - begun)
            os.fsync(fd)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def longest_of(self, act: Callable[[], object]) -> float:
        """Return the longest that a write took while something was done."""
        self.longest_s = 0.0
        act()
        self.wait_for(2)
        return self.longest_s

    def wait_for(self, count: int) -> None:
        """Wait until so many more pages are written."""
        before = self.count
        wait_until(lambda: self.count >= before + count, "the writer to go on", every=0.001)


def page_of(number: int) -> int:
    return number * 7919 % (SIZE // PAGE) * PAGE


def written(log: list[Entry]) -> list[int]:
    """Return the numbers of the pages in a log, in order."""
    return [int.from_bytes(entry.data[:8], "little") for entry in log if entry.data and not entry.text]


def wait_for_log(tap: MappedTap, text: str) -> None:
    """Set a mark and wait until it is in the log: the kernel writes the log after it has answered, but in order."""
    tap.mark(text)
    wait_until(lambda: text.encode() in tap.log.read_bytes(), "the log to have it all")


def write(node: Path, data: bytes, offset: int) -> None:
    with opened(node, os.O_WRONLY) as fd:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)


def test_what_is_attached_is_as_documented(desk: Desk) -> None:
    """Name, uuid, table, and the log's place, name, size and modes are the documented ones."""
    tap = desk.attach(first=4711)
    path = desk.directory / "log" / "00000000000000004711.log"
    assert tap.node == Path("/dev/mapper/dmafs-disk")
    assert tap.log_paths() == [tap.log] == [path]
    assert (path.stat().st_size, path.stat().st_blocks) == (LOG, 0)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
    assert (
        run("dmsetup", "info", "-c", "--noheadings", "-o", "uuid", "dmafs-disk").stdout.strip() == f"DMAFS-{UUID_ONE}"
    )
    words = run("dmsetup", "table", "dmafs-disk").stdout.split()
    assert words[:4] == ["0", str(SIZE // 512), "log-writes", spelled(desk.loop.number)]
    tap.detach()
    assert not tap.node.exists()
    wait_until(lambda: attached_below(desk.root) == [str(desk.image)], "the log's loop device to be gone")
    assert [entry.text for entry in entries(path)] == ["", "dmafs:detach", END_MARK]


def test_all_that_is_written_is_in_the_log(desk: Desk) -> None:
    """The log, replayed, is the primary; marks stand where they were set; status counts with the log."""
    tap = desk.attach()
    write(tap.node, b"one" * 1000, 0)
    tap.mark("first")
    write(tap.node, b"two" * 1000, 5 * MIB)
    tap.mark("x" * 479)
    with opened(tap.node, os.O_WRONLY) as fd:
        os.pwrite(fd, b"three" * 1000, 9 * MIB)
        tap.fsync()
        wait_for_log(tap, "third")
        status = tap.status()
    assert status.open_count == 1
    assert not status.disabled
    assert status.end_sector == LOG // 512
    tap.detach()
    log = desk.log()
    assert [entry.text for entry in log if entry.text] == ["first", "x" * 479, "third"]
    assert desk.replayed() == desk.primary()
    assert desk.primary()[9 * MIB : 9 * MIB + 5] == b"three"
    assert status.entries == len(log)
    assert status.next_sector == 1 + sum(1 + entry.length // 512 for entry in log)


def test_ext4_on_it_is_in_the_log(desk: Desk) -> None:
    """A file system that is made and used on the device is in the log, discards and all."""
    tap = desk.attach()
    mnt = desk.root / "mnt"
    mnt.mkdir()
    run("mkfs.ext4", "-q", tap.node)
    run("mount", "-o", "discard", tap.node, mnt)
    run("cp", "-r", "/usr/include/linux", mnt)
    run("rm", "-rf", mnt / "linux" / "usb")
    run("umount", mnt)
    tap.detach()
    assert desk.replayed() == desk.primary()
    run("e2fsck", "-fn", desk.source)


def test_a_log_of_a_primary_with_long_sectors_has_long_sectors(desk: Desk) -> None:
    """A primary whose logical blocks have 4096 bytes makes a log of such blocks."""
    node = Path(run("losetup", "--find", "--show", "--sector-size", "4096", desk.image).stdout.strip())
    try:
        desk.source = node
        tap = desk.attach()
        assert tap.sector_bytes == PAGE
        assert tap.status().next_sector == 8
        write(tap.node, b"x" * PAGE, 3 * PAGE)
        tap.detach()
        assert desk.replayed() == desk.primary()
        assert tap.log.read_bytes()[24:28] == PAGE.to_bytes(4, "little")
    finally:
        run("losetup", "--detach", node)


def test_rotation_keeps_every_write_and_holds_up_none_for_long(desk: Desk) -> None:
    """Ten rotations under a writer: each write is in one log, in order, and none took long."""
    tap = desk.attach()
    stalls = []
    with Writer(tap.node) as writer:
        for number in range(1, 11):
            writer.wait_for(100)
            first = Lsn(number * LOG // 512)
            stalls.append(writer.longest_of(functools.partial(tap.rotate, first)))
            assert first_of(tap.log) == first
    print(f"longest writes around ten rotations, ms: {', '.join(f'{stall * 1e3:.1f}' for stall in stalls)}")
    assert max(stalls) < 0.5  # the aim is 0.05, but the machine that runs the guest may have other work
    tap.detach()
    assert len(log_paths(desk.directory)) == 11
    assert written(desk.log()) == list(range(1, writer.count + 1))
    assert desk.replayed() == desk.primary()


def test_rotation_does_not_freeze_a_file_system(desk: Desk) -> None:
    """A log is rotated under a mounted file system, which goes on and is whole."""
    tap = desk.attach()
    mnt = desk.root / "mnt"
    mnt.mkdir()
    run("mkfs.ext4", "-q", tap.node)
    run("mount", tap.node, mnt)
    for number in range(1, 4):
        (mnt / f"file{number}").write_bytes(os.urandom(MIB))
        tap.rotate(Lsn(number * LOG // 512))
    with pytest.raises(TapBusyError):
        tap.detach()
    run("umount", mnt)
    tap.detach()
    assert desk.replayed() == desk.primary()
    run("e2fsck", "-fn", desk.source)


def test_a_full_log_is_seen_and_replaced(desk: Desk) -> None:
    """When the log is full status says so, marks are still taken, writes go on; a fresh log logs again."""
    tap = desk.attach(log_bytes=MIB)
    write(tap.node, b"a" * 2 * MIB, 0)
    wait_until(lambda: tap.status().disabled, "the log to be disabled", seconds=10)
    tap.mark("unheard")
    tap.rotate(Lsn(MIB // 512))
    assert not tap.status().disabled
    write(tap.node, b"b" * PAGE, 3 * MIB)
    tap.detach()
    assert desk.primary()[: 2 * MIB] == b"a" * 2 * MIB
    assert [entry.begin for entry in entries(tap.log) if entry.data and not entry.text] == [3 * MIB]


def test_a_log_that_finds_no_space_is_seen(desk: Desk) -> None:
    """When the file system of the log is full status says so, and the primary's writes go on."""
    small, image = desk.root / "mnt", desk.root / "small.img"
    small.mkdir()
    run("truncate", "--size=8M", image)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, small)
    desk.directory = small / "disk"
    desk.directory.mkdir()
    tap = desk.attach()
    write(tap.node, os.urandom(12 * MIB), 0)
    wait_until(lambda: tap.status().disabled, "the log to be disabled", seconds=10)
    write(tap.node, b"goes on", 0)
    tap.detach()
    assert desk.primary()[:7] == b"goes on"


def test_a_device_in_use_is_not_detached(desk: Desk) -> None:
    """While it is open detaching is an error that says how to find out by whom; then it works, also after that."""
    tap = desk.attach()
    tap.fsync()
    with opened(tap.node, os.O_WRONLY) as fd:
        with pytest.raises(TapBusyError) as caught:
            tap.detach()
        assert "lsof" in caught.value.hint
        os.pwrite(fd, b"still captured", 0)
        tap.fsync()
    assert tap.status().open_count == 0
    tap.detach()
    assert desk.replayed()[:14] == b"still captured"


def test_it_is_found_after_its_process_was_killed(desk: Desk) -> None:
    """A device that another process has made and written to is taken over: nothing is lost, and it goes on."""
    program = f"""
import os, time
from pathlib import Path
from typing import Self
from uuid import UUID
from dmafs.taps.mapped import Lsn, MappedTap
tap = MappedTap.attach(Path({str(desk.directory)!r}), volume_name="disk", volume_uuid=UUID(int=1),
    source=Path({str(desk.source)!r}), log_bytes={LOG}, first=Lsn(0))
fd = os.open(tap.node, os.O_WRONLY)
for number in range(100):
    os.pwrite(fd, bytes([number]) * 4096, number * 4096)
    tap.fsync()
tap.rotate(Lsn({LOG // 512}))
os.pwrite(fd, b"last" * 1024, 0)
tap.fsync()
print("done", flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"done\n"
        other.send_signal(signal.SIGKILL)
    tap = desk.found()
    assert first_of(tap.log) == LOG // 512
    with pytest.raises(ExistsError, match="already, of this volume"):
        desk.attach(first=LOG // 256)
    write(tap.node, b"after", 50 * PAGE)
    tap.detach()
    assert desk.replayed() == desk.primary()
    assert desk.primary()[50 * PAGE :][:5] == b"after"
    assert desk.find() is None


def test_what_is_not_this_volumes_is_not_taken_over(desk: Desk) -> None:
    """Another source, another place of the log, or another target is an error that says what was found."""
    tap = desk.attach()
    with pytest.raises(TapError, match=f"over device {spelled(desk.loop.number)}, not the source /dev/ubda"):
        desk.find(source=Path("/dev/ubda"))
    with pytest.raises(TapError, match=f"the log of .* is {tap.log}, which isn't in"):
        desk.find(directory=desk.root)
    with DeviceMapper() as dm:
        dm.load("dmafs-disk", [Target(0, SIZE // 512, "linear", f"{spelled(desk.loop.number)} 0")])
        dm.resume("dmafs-disk")
    with pytest.raises(TapError, match="is no log-writes device"):
        desk.find()
    with pytest.raises(TapError, match="is no log-writes device"):
        tap.status()


def test_a_name_that_is_taken_is_refused(desk: Desk) -> None:
    """The device of another store's volume of that name stays as it is, and nothing is made."""
    other = Desk(desk.root / "other")
    tap = other.attach(uuid=UUID_TWO)
    with pytest.raises(ExistsError, match=f"dmafs-disk already, not of this volume: uuid DMAFS-{UUID_TWO}"):
        desk.attach()
    assert log_paths(desk.directory) == []
    assert desk.find() is None
    write(tap.node, b"fine", 0)
    tap.detach()
    other.loop.close()


def test_a_source_that_cannot_be_used_is_refused_and_nothing_is_left(desk: Desk) -> None:
    """A file, a mounted device, one that is read-only, and one that another mapped device has are refused."""

    def assert_nothing_is_left() -> None:
        assert log_paths(desk.directory) == []
        assert not Path("/dev/mapper/dmafs-disk").exists()
        wait_until(lambda: attached_below(desk.directory) == [], "the log's loop device to be gone")

    mnt, source = desk.root / "mnt", desk.source
    mnt.mkdir()
    desk.source = desk.image
    with pytest.raises(SourceError, match="is no block device"):
        desk.attach()
    desk.source = source
    run("mkfs.ext4", "-q", source)
    run("mount", source, mnt)
    with pytest.raises(SourceBusyError, match=f"{source} is in use"):
        desk.attach()
    assert_nothing_is_left()
    run("umount", mnt)
    run("blockdev", "--setro", source)
    with pytest.raises(SourceError, match="is read-only"):
        desk.attach()
    run("blockdev", "--setrw", source)
    with DeviceMapper() as dm:
        held = dm.create("holder", "u")
        dm.load("holder", [Target(0, 8, "linear", f"{spelled(desk.loop.number)} 0")])
        dm.resume("holder")
        with pytest.raises(SourceBusyError, match=f"part of {held.sysfs.resolve().name}"):
            desk.attach()
        dm.remove("holder")
    assert_nothing_is_left()
    desk.attach().detach()


@pytest.mark.parametrize("how_far", ["file", "created", "loaded"])
def test_an_attach_that_was_cut_off_is_forgotten(desk: Desk, how_far: str) -> None:
    """What an attach has left that was killed before its device was used is no tap, and in the way of none."""
    path = desk.directory / "log" / f"{0:020d}.log"
    path.parent.mkdir()
    path.touch()
    os.truncate(path, LOG)
    with DeviceMapper() as dm, contextlib.ExitStack() as stack:
        loop = stack.enter_context(loopdev.attach(path))
        if how_far != "file":
            dm.create("dmafs-disk", f"DMAFS-{UUID_ONE}")
        if how_far == "loaded":
            text = f"{spelled(desk.loop.number)} {spelled(loop.number)}"
            dm.load("dmafs-disk", [Target(0, SIZE // 512, "log-writes", text)])
    assert desk.find() is None
    tap = desk.attach()
    write(tap.node, b"x", 0)
    tap.detach()
    assert desk.replayed() == desk.primary()


def test_a_rotation_that_was_cut_off_is_forgotten(desk: Desk) -> None:
    """After a rotation that was killed before its resume, the log is the old one, and the new one is gone."""
    tap = desk.attach()
    write(tap.node, b"before", 0)
    path = tap.log.with_name(f"{LOG // 512:020d}.log")
    path.touch()
    os.truncate(path, LOG)
    with DeviceMapper() as dm, loopdev.attach(path) as loop:
        text = f"{spelled(desk.loop.number)} {spelled(loop.number)}"
        dm.load("dmafs-disk", [Target(0, SIZE // 512, "log-writes", text)])
    tap.close()
    tap = desk.found()
    assert tap.log_paths() == [tap.log] == [desk.directory / "log" / f"{0:020d}.log"]
    write(tap.node, b"after", PAGE)
    tap.rotate(Lsn(LOG // 512))
    write(tap.node, b"later", 2 * PAGE)
    tap.detach()
    assert desk.replayed() == desk.primary()


def test_a_rotation_that_fails_leaves_the_old_log(desk: Desk) -> None:
    """When the new log can't be made, writes go to the old one as before."""
    tap = desk.attach()
    tap.log.with_name(f"{LOG // 512:020d}.log").write_bytes(b"from an earlier time" * 1000)
    with pytest.raises(ExistsError, match="is there already"):
        tap.rotate(Lsn(LOG // 512))
    write(tap.node, b"x", 0)
    log = tap.log
    tap.detach()
    assert [entry for entry in entries(log) if entry.data and not entry.text]


def test_space_is_freed_behind_the_reader(desk: Desk) -> None:
    """What is punched takes no space any more, but for a log's first page; the rest is unchanged."""
    tap = desk.attach()
    write(tap.node, os.urandom(8 * MIB), 0)
    (current,) = tap.log_paths()
    wait_for_log(tap, "all-written")
    before, whole = current.stat().st_blocks, current.read_bytes()
    punch(current, 4 * MIB + 512)
    assert before - 4 * MIB // 512 <= current.stat().st_blocks <= before - 4 * MIB // 512 + 16
    assert current.read_bytes() == whole[:HEAD_BYTES] + bytes(4 * MIB - HEAD_BYTES) + whole[4 * MIB :]
    write(tap.node, b"goes on", 0)
    punch(current, 2 * LOG)
    assert current.read_bytes()[:HEAD_BYTES] != bytes(HEAD_BYTES)
    assert current.stat().st_size == LOG
    tap.detach()


def test_an_idle_device_is_told_from_one_that_is_written_to(desk: Desk) -> None:
    """Writes and discards count, once; reads and our own flushes and marks don't."""
    tap = desk.attach()
    tap.has_written()
    for _ in range(3):
        tap.fsync()
        tap.mark("tick")
        run("dd", f"if={tap.node}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")
        assert not tap.has_written()
    write(tap.node, b"x", 0)
    assert tap.has_written()
    assert not tap.has_written()
    run("blkdiscard", "--length", "65536", tap.node)
    assert tap.has_written()
    assert not tap.has_written()
    tap.detach()


def test_it_is_known_whether_the_primary_discards(desk: Desk) -> None:
    """A loop device on ext4 does; one in memory doesn't, though its mapped device takes them."""
    tap = desk.attach()
    assert tap.discards
    tap.detach()
    run("modprobe", "brd", "rd_nr=1", "rd_size=32768")
    desk.source = Path("/dev/ram0")
    tap = desk.attach(first=LOG // 512)
    assert not tap.discards
    tap.detach()
    run("rmmod", "brd")


@pytest.mark.parametrize("text", ["", "two words", "back\\slash", "x" * 480, "umläut", "new\nline"])
def test_a_mark_is_one_word(desk: Desk, text: str) -> None:
    """What the kernel would refuse, cut, or read as something else isn't sent."""
    tap = desk.attach()
    with pytest.raises(AssertionError):
        tap.mark(text)
    tap.detach()


def test_every_character_of_a_mark_comes_through(desk: Desk) -> None:
    """All characters that a mark may have are in the log as they were sent."""
    tap = desk.attach()
    text = "".join(chr(code) for code in itertools.chain(range(33, 92), range(93, 127)))
    tap.mark(text)
    tap.detach()
    assert [entry.text for entry in desk.log()] == [text]
