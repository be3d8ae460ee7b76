"""Claims about dmafs.core.storage: reads and writes are complete, files are private, one process has a store."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dmafs.core import storage as module
from dmafs.core.files import write_whole
from dmafs.core.storage import RealFile, RealStorage, close_all, lock_directory, open_source
from dmafs.errors import CorruptionError, ExistsError, NoStoreError, SourceBusyError, SourceError, StoreBusyError
from dmafs.units import SECTOR
from tests.unit.tools import files, fill


@pytest.fixture
def storage(tmp_path: Path) -> RealStorage:
    return RealStorage(tmp_path)


@pytest.fixture
def file(storage: RealStorage) -> Iterator[RealFile]:
    file = storage.create("f")
    yield file
    file.close()


# --- files


def test_what_is_written_is_read(file: RealFile) -> None:
    """Buffers of any kind are written one after the other and read back from any offset."""
    file.write([b"abc", bytearray(b"de"), b"", memoryview(b"fgh")], 2)
    for offset in range(10):
        for stop in range(offset, 11):
            buffer = bytearray(stop - offset)
            file.read_into(buffer, offset)
            assert buffer == b"\0\0abcdefgh"[offset:stop]
    assert file.size() == 10


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (4096, 1)])
def test_reading_past_the_end_is_corruption(file: RealFile, offset: int, length: int) -> None:
    """A file that ends before what is asked for is an error that names it, not a short answer."""
    file.write([b"x" * 10], 0)
    with pytest.raises(CorruptionError, match=r"/f ends at byte \d+, \d+ bytes before"):
        file.read_into(bytearray(length), offset)
    with pytest.raises((CorruptionError, BlockingIOError)):
        file.read_into_nowait(bytearray(length), offset)


def test_short_reads_and_writes_are_continued(file: RealFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """System calls that do a few bytes at a time are repeated until all is done, across the borders of buffers."""
    real_write, real_read = os.pwritev, os.preadv

    def short_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_write(fd, [memoryview(b"".join(buffers))[:3]], offset)

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        return real_read(fd, [buffers[0][:3]], offset)

    monkeypatch.setattr(os, "pwritev", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    file.write([b"a", b"bcdefgh", b"", b"ij", b"klm"], 5)
    buffer = bytearray(13)
    file.read_into(buffer, 5)
    assert buffer == b"abcdefghijklm"
    assert file.size() == 18


def test_more_buffers_than_one_call_takes(file: RealFile) -> None:
    """More than 1024 buffers are written by several calls."""
    buffers = [number.to_bytes(2, "little") for number in range(2500)]
    file.write(buffers, 0)
    buffer = bytearray(5000)
    file.read_into(buffer, 0)
    assert buffer == b"".join(buffers)


def test_zeroed_range_reads_as_zeros_and_frees_its_space(file: RealFile) -> None:
    """A hole is punched: bytes around it and the size stay."""
    size = 1 << 20
    file.write([b"x" * size], 0)
    file.datasync()
    before = file.allocated()
    file.zero(8192, size - 16384)
    file.datasync()
    buffer = bytearray(size)
    file.read_into(buffer, 0)
    assert buffer == b"x" * 8192 + bytes(size - 16384) + b"x" * 8192
    assert file.allocated() < before / 4
    assert file.size() == size


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (512, 512), (700, 3), (0, 3 << 20)])
def test_zeros_are_written_where_holes_are_unknown(
    file: RealFile, monkeypatch: pytest.MonkeyPatch, offset: int, length: int
) -> None:
    """On a filesystem without holes the range reads as zeros all the same, and nothing beyond it."""

    class Library:
        def fallocate(self, *_: Any) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    content = b"x" * (3 << 20)
    file.write([content], 0)
    monkeypatch.setattr(module, "_libc", Library())
    file.zero(offset, length)
    buffer = bytearray(len(content))
    file.read_into(buffer, 0)
    assert buffer == content[:offset] + bytes(length) + content[offset + length :]


def test_failed_zeroing_is_an_error(file: RealFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other failure of punching a hole is raised with the file's name."""

    class Library:
        def fallocate(self, *_: Any) -> int:
            ctypes.set_errno(errno.ENOSPC)
            return -1

    monkeypatch.setattr(module, "_libc", Library())
    with pytest.raises(OSError, match="No space") as caught:
        file.zero(0, 512)
    assert caught.value.filename == file.name


def test_cached_data_is_read_without_waiting(file: RealFile) -> None:
    """What was just written is in the page cache."""
    file.write([b"abcdef"], 0)
    buffer = bytearray(3)
    file.read_into_nowait(buffer, 2)
    assert buffer == b"cde"


@pytest.mark.parametrize("outcome", [BlockingIOError(), 2])
def test_data_that_is_not_cached_is_refused(file: RealFile, monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    """Where the cache has nothing or only the beginning, the caller is told to wait for it elsewhere."""

    def preadv(*_: Any) -> int:
        if isinstance(outcome, int):
            return outcome
        raise outcome

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(BlockingIOError):
        file.read_into_nowait(bytearray(3), 0)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_without_nowait_a_plain_read_answers(file: RealFile, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Where the filesystem doesn't know RWF_NOWAIT, it is asked once and then read plainly."""
    real, asked = os.preadv, []

    def preadv(fd: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        if flags:
            asked.append(flags)
            raise OSError(number, "no")
        return real(fd, buffers, offset)

    file.write([b"abcdef"], 0)
    monkeypatch.setattr(os, "preadv", preadv)
    for _ in range(2):
        buffer = bytearray(3)
        file.read_into_nowait(buffer, 1)
        assert buffer == b"bcd"
    assert len(asked) == 1


def test_read_error_is_not_hidden(file: RealFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error of a read without waiting is raised."""

    def preadv(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output"):
        file.read_into_nowait(bytearray(3), 0)


def test_data_ranges_of_a_sparse_file(file: RealFile) -> None:
    """The ranges that aren't holes cover the data, ascending, whole sectors within what was asked for."""
    mebi = 1 << 20
    file.truncate(4 * mebi)
    assert list(file.data_ranges(0, 4 * mebi)) == []
    file.write([b"x"], mebi)
    file.write([b"x"], 3 * mebi)
    for start, stop in [(0, 4 * mebi), (mebi, mebi + 512), (mebi + 512, 4 * mebi), (0, mebi), (2 * mebi, 2 * mebi)]:
        ranges = list(file.data_ranges(start, stop))
        edges = [edge for pair in ranges for edge in pair]
        assert edges == sorted(edges)
        assert all(start <= edge <= stop and edge % SECTOR == 0 for edge in edges)
        for place in (mebi, 3 * mebi):
            assert any(a <= place < b for a, b in ranges) == (start <= place < stop)


def test_truncating(file: RealFile) -> None:
    """A file can be made shorter, and longer with zeros."""
    file.write([b"abcdef"], 0)
    file.truncate(2)
    file.truncate(4)
    buffer = bytearray(4)
    file.read_into(buffer, 0)
    assert buffer == b"ab\0\0"


def test_closing_twice_does_nothing(storage: RealStorage) -> None:
    """A second close is no error and closes nobody else's descriptor."""
    one = storage.create("a")
    descriptor = one.fileno()
    close_all([one])
    two = storage.create("b")
    assert two.fileno() == descriptor
    one.close()
    two.write([b"x"], 0)
    two.close()


# --- directories


def test_files_and_directories_are_private(storage: RealStorage, tmp_path: Path) -> None:
    """Files have mode 0600, directories 0700, whatever is in them, even with an open umask."""
    before = os.umask(0)
    try:
        storage.make_directory("d")
        storage.create("d/f").close()
        write_whole(storage, "d/g", b"x")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("d", "d/f", "d/g")}
    assert modes == {"d": 0o700, "d/f": 0o600, "d/g": 0o600}


def test_only_empty_directories_are_removed(storage: RealStorage) -> None:
    """A directory is renamed with what is in it, and removed when it is empty."""
    storage.make_directory("d")
    storage.create("d/f").close()
    storage.rename("d", "e")
    assert storage.names("e") == ["f"]
    with pytest.raises(OSError, match="not empty"):
        storage.remove_directory("e")
    storage.unlink("e/f")
    storage.remove_directory("e")
    assert not storage.exists("e")
    with pytest.raises(FileNotFoundError):
        storage.remove_directory("e")


def test_symbolic_links_are_not_followed(storage: RealStorage, tmp_path: Path) -> None:
    """A link in place of a file is refused, so nobody's files can be read or written through it."""
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match="symbolic links") as caught:
        storage.open("link")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError, match="symbolic links"):
        storage.read_bytes("link", 100)
    for name in ("link", "dangling"):
        with pytest.raises(FileExistsError):
            storage.create(name)
        assert storage.exists(name)
    assert target.read_bytes() == b"mine"


def test_creating_and_opening(storage: RealStorage) -> None:
    """A file is created only where none is, and opened only where one is."""
    storage.create("a").close()
    with pytest.raises(FileExistsError):
        storage.create("a")
    with pytest.raises(FileNotFoundError):
        storage.open("b")
    assert (storage.exists("a"), storage.exists("b")) == (True, False)


def test_names_are_sorted_and_follow_changes(storage: RealStorage) -> None:
    """Renaming replaces, unlinking removes, and a directory can be made durable."""
    storage.make_directory("d")
    for name in ("d/c", "d/a", "d/b"):
        write_whole(storage, name, name.encode())
    storage.rename("d/c", "d/a")
    storage.unlink("d/b")
    storage.sync_directory("d")
    assert storage.names("d") == ["a"]
    assert storage.read_bytes("d/a", 3) == b"d/c"


def test_small_files_have_a_limit(storage: RealStorage) -> None:
    """A file that is longer than it can be is refused, without reading it whole."""
    write_whole(storage, "a", b"12345")
    assert storage.read_bytes("a", 5) == b"12345"
    with pytest.raises(CorruptionError, match="longer than 4 bytes"):
        storage.read_bytes("a", 4)


def test_free_space_is_the_filesystems(storage: RealStorage, tmp_path: Path) -> None:
    """The space left is what the filesystem says it has for this user."""
    info = os.statvfs(tmp_path)
    assert abs(storage.free_bytes() - info.f_bavail * info.f_frsize) < 1 << 30


def test_whole_file_is_there_or_not(storage: RealStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails there is no such file; a second try replaces what was left; one that is there stays."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RealFile, "datasync", fail)
        with pytest.raises(OSError, match="No space"):
            write_whole(storage, "a", b"long content")
    assert not storage.exists("a")
    write_whole(storage, "a", b"short")
    assert files(tmp_path) == ["a"]
    with pytest.raises(ExistsError, match="file a already exists"):
        write_whole(storage, "a", b"other")
    assert storage.read_bytes("a", 10) == b"short"


# --- sources


def test_source_is_opened(tmp_path: Path) -> None:
    """A regular file can be a primary, for reading or for writing, also through a symbolic link."""
    path = tmp_path / "s"
    path.write_bytes(fill(1, 4))
    (tmp_path / "link").symlink_to(path)
    one = open_source(tmp_path / "link", writable=True)
    one.write([fill(2)], 0)
    one.close()
    two = open_source(path, writable=False)
    assert two.size() == 4 * SECTOR
    with pytest.raises(OSError, match="Bad file descriptor"):
        two.write([fill(3)], 0)
    two.close()


def test_source_is_written_by_one(tmp_path: Path) -> None:
    """A regular file is open for writing once at a time; who only reads is no trouble, and nothing stays open."""
    path = tmp_path / "s"
    path.write_bytes(fill(1))
    reader = open_source(path, writable=False)
    one = open_source(path, writable=True)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted
    with pytest.raises(SourceBusyError, match=f"source {path} is in use by another daemon or volume") as caught:
        open_source(path, writable=True)
    assert caught.value.hint
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208 - counted
    open_source(path, writable=False).close()
    one.close()
    open_source(path, writable=True).close()
    reader.close()


@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "socket", "loop", "below a file"])
def test_bad_source_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    """What can't be a primary is a SourceError that names it; nothing waits for the other end of a pipe."""
    path = tmp_path / "s"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "below a file":
        path.write_bytes(b"")
        path = path / "s"
    for writable in (False, True):
        with pytest.raises(SourceError, match=f"source {path}"):
            open_source(path, writable=writable)


# --- the lock


def test_lock_excludes_a_second_one(tmp_path: Path) -> None:
    """A locked store can't be locked again, not even by the same process, until the lock is closed."""
    first = lock_directory(tmp_path)
    with pytest.raises(StoreBusyError, match="in use by another process"):
        lock_directory(tmp_path)
    os.close(first)
    os.close(lock_directory(tmp_path))


def test_lock_excludes_another_process_and_ends_with_it(tmp_path: Path) -> None:
    """The lock holds against other processes, and a killed one leaves none behind."""
    script = (
        "import sys, time, pathlib; from dmafs.core.storage import lock_directory;"
        "lock_directory(pathlib.Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(StoreBusyError):
            lock_directory(tmp_path)
        process.kill()
    os.close(lock_directory(tmp_path))


@pytest.mark.parametrize("name", ["missing", "file"])
def test_only_a_directory_can_be_locked(tmp_path: Path, name: str) -> None:
    """A store that isn't there or is no directory is a NoStoreError."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NoStoreError, match=f"store {tmp_path / name} can't be opened"):
        lock_directory(tmp_path / name)


def test_size_of_a_file_that_is_not_open(storage: RealStorage) -> None:
    """The size is that of the file; there is none of what isn't there."""
    file = storage.create("sized")
    file.write([b"12345"], 0)
    file.close()
    assert storage.size("sized") == 5
    with pytest.raises(FileNotFoundError):
        storage.size("missing")
