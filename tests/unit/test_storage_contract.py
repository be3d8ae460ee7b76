"""The contract of the storage interface: what the core relies on holds of the real one and of the simulated one."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmafs.core.files import write_whole
from dmafs.core.storage import File, RealStorage, Storage
from dmafs.errors import CorruptionError, ExistsError
from dmafs.units import SECTOR
from tests.crash.disk import SimulatedDisk, SimulatedStorage
from tests.unit.tools import fill


@pytest.fixture(params=["real", "simulated", "simulated part"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "real":
        return RealStorage(tmp_path)
    whole = SimulatedStorage(SimulatedDisk())
    if request.param == "simulated":
        return whole
    disk = SimulatedDisk()
    SimulatedStorage(disk).make_directory("part")
    return SimulatedStorage(disk, "part")


@pytest.fixture
def file(storage: Storage) -> Iterator[File]:
    file = storage.create("f")
    yield file
    file.close()


def content(file: File) -> bytes:
    buffer = bytearray(file.size())
    file.read_into(buffer, 0)
    return bytes(buffer)


# --- files


def test_what_is_written_is_read(file: File) -> None:
    """Buffers of any kind are written one after the other, a gap before them reads as zeros."""
    file.write([b"abc", bytearray(b"de"), b"", memoryview(b"fgh")], 2)
    for offset in range(10):
        for stop in range(offset, 11):
            for read in (file.read_into, file.read_into_nowait):
                buffer = bytearray(stop - offset)
                read(buffer, offset)
                assert buffer == b"\0\0abcdefgh"[offset:stop]
    part = bytearray(b"xxxxx")
    file.read_into(memoryview(part)[1:3], 4)
    assert part == b"xcdxx"
    assert file.size() == 10


def test_writing_overwrites_only_its_place(file: File) -> None:
    """Bytes around a write stay; writing nothing changes nothing, not even the size."""
    file.write([b"abcdef"], 0)
    file.write([b"XY"], 2)
    file.write([b""], 100)
    file.write([], 100)
    assert content(file) == b"abXYef"


def test_no_buffer_is_kept(file: File) -> None:
    """What becomes of a buffer after a write doesn't matter."""
    buffer = bytearray(b"abc")
    file.write([buffer], 0)
    buffer[:] = b"xyz"
    assert content(file) == b"abc"


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (4096, 1)])
def test_reading_past_the_end_is_corruption(file: File, offset: int, length: int) -> None:
    """A file that ends before what is asked for is an error that names it, not a short answer."""
    file.write([b"x" * 10], 0)
    with pytest.raises(CorruptionError, match=rf"f ends at byte {max(offset, 10)}, \d+ bytes before"):
        file.read_into(bytearray(length), offset)


def test_truncating(file: File) -> None:
    """A file can be made shorter, and longer with zeros: what was cut off doesn't come back."""
    file.write([b"abcdef"], 0)
    file.truncate(2)
    assert content(file) == b"ab"
    file.truncate(4)
    assert content(file) == b"ab\0\0"
    file.write([b"z"], 5)
    assert content(file) == b"ab\0\0\0z"


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (SECTOR, SECTOR), (700, 3), (0, 10 * SECTOR), (1500, 10000)])
def test_zeroing(file: File, offset: int, length: int) -> None:
    """A range reads as zeros; nothing around it changes, nor the size."""
    whole = fill(7, 4)
    file.write([whole], 0)
    file.zero(offset, length)
    end = min(offset + length, len(whole))
    assert content(file) == whole[:offset] + bytes(end - offset) + whole[end:]


def test_data_ranges(file: File) -> None:
    """The ranges that aren't holes are whole sectors, ascend, lie within what was asked for, and have all the data."""
    mebi = 1 << 20
    file.truncate(3 * mebi)
    assert list(file.data_ranges(0, 3 * mebi)) == []
    file.write([b"x"], mebi)
    file.write([fill(1, 3)], 2 * mebi + SECTOR)
    for start, stop in [(0, 3 * mebi), (mebi, mebi + SECTOR), (mebi + SECTOR, 3 * mebi), (2 * mebi + 1024, 3 * mebi)]:
        ranges = list(file.data_ranges(start, stop))
        edges = [edge for pair in ranges for edge in pair]
        assert edges == sorted(edges)
        assert all(start <= edge <= stop and edge % SECTOR == 0 for edge in edges)
        for place in (mebi, 2 * mebi + SECTOR, 2 * mebi + 4 * SECTOR - 1):
            assert any(a <= place < b for a, b in ranges) == (start <= place < stop)
    file.datasync()
    assert 4 * SECTOR <= file.allocated() < 3 * mebi


def test_a_closed_file_is_closed(file: File) -> None:
    """A second close does nothing, anything else fails."""
    file.close()
    file.close()
    calls: list[Callable[[], object]] = [
        lambda: file.write([b"x"], 0),
        lambda: file.truncate(0),
        file.size,
        file.map,
    ]
    for call in calls:
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


def test_a_map_is_what_is_there_and_stays(storage: Storage) -> None:
    """All of a file, read-only; also when it is closed and has no name any more."""
    for whole in (b"", b"x", fill(7, 20) + b"end"):
        file = storage.create("m")
        file.write([whole], 0)
        found = file.map()
        file.close()
        storage.unlink("m")
        assert found == whole
        assert found.readonly
        assert found[-3:] == whole[-3:]


# --- names


def test_creating_and_opening(storage: Storage) -> None:
    """A file is created only where none is, and opened only where one is; an error names it."""
    storage.create("a").close()
    with pytest.raises(FileExistsError) as caught:
        storage.create("a")
    assert str(caught.value.filename).endswith("a")
    for name in ("b", "a/b", "d/b"):
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            storage.open(name)
        with pytest.raises((FileNotFoundError, NotADirectoryError)):
            storage.size(name)
        assert not storage.exists(name)
    with pytest.raises(FileNotFoundError):
        storage.create("d/b")
    assert storage.exists("a")


def test_two_handles_of_a_file_see_each_other(storage: Storage) -> None:
    """What one has written the other reads."""
    one = storage.create("a")
    two = storage.open("a")
    one.write([b"abc"], 0)
    assert content(two) == b"abc"
    assert storage.size("a") == 3
    assert storage.read_bytes("a", 3) == b"abc"
    with pytest.raises(CorruptionError, match="longer than 2 bytes"):
        storage.read_bytes("a", 2)
    one.close()
    two.close()


def test_names_follow_changes(storage: Storage) -> None:
    """Names are sorted; renaming replaces, unlinking removes, directories are among them."""
    storage.make_directory("d")
    with pytest.raises(FileExistsError):
        storage.make_directory("d")
    for name in ("d/c", "d/a", "d/b"):
        write_whole(storage, name, name.encode())
    storage.rename("d/c", "d/a")
    storage.unlink("d/b")
    storage.make_directory("d/e")
    storage.sync_directory("d")
    storage.sync_directory("")
    assert storage.names("d") == ["a", "e"]
    assert storage.names("") == ["d"]
    assert storage.read_bytes("d/a", 3) == b"d/c"


def test_what_is_missing_cannot_be_changed(storage: Storage) -> None:
    """Renaming, removing or listing what isn't there is FileNotFoundError."""
    calls: list[Callable[[], object]] = [
        lambda: storage.rename("a", "b"),
        lambda: storage.unlink("a"),
        lambda: storage.remove_directory("a"),
        lambda: storage.names("a"),
        lambda: storage.sync_directory("a"),
        lambda: storage.read_bytes("a", 1),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError):
            call()


def test_an_open_file_outlives_its_name(storage: Storage, file: File) -> None:
    """A file that is renamed or unlinked can still be read and written through what had it open."""
    file.write([b"abc"], 0)
    storage.rename("f", "g")
    file.write([b"d"], 3)
    assert storage.read_bytes("g", 4) == b"abcd"
    storage.unlink("g")
    storage.create("g").close()
    file.write([b"e"], 4)
    assert content(file) == b"abcde"
    assert storage.size("g") == 0


def test_only_empty_directories_are_removed(storage: Storage) -> None:
    """A directory is renamed with what is in it, and removed when it is empty; it isn't unlinked."""
    storage.make_directory("d")
    storage.create("d/f").close()
    storage.rename("d", "e")
    assert storage.names("e") == ["f"]
    with pytest.raises(OSError, match="not empty") as caught:
        storage.remove_directory("e")
    assert caught.value.errno == errno.ENOTEMPTY
    storage.unlink("e/f")
    with pytest.raises(OSError, match=r"[Dd]irectory|not permitted"):
        storage.unlink("e")
    storage.remove_directory("e")
    assert not storage.exists("e")


def test_whole_files_are_written_once(storage: Storage) -> None:
    """What ``write_whole`` has made isn't replaced, and nothing else is left."""
    write_whole(storage, "a", b"short")
    with pytest.raises(ExistsError, match="file a already exists"):
        write_whole(storage, "a", b"other")
    assert storage.names("") == ["a"]
    assert storage.read_bytes("a", 10) == b"short"


def test_there_is_space(storage: Storage) -> None:
    """Free space is a number of bytes, its share one between 0 and 1."""
    assert storage.free_bytes() > 0
    assert 0 < storage.free_share() <= 1
