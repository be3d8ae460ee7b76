"""Claims about dmafs.taps.loopdev."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import pytest

from dmafs.errors import TapError
from dmafs.taps import loopdev
from tests.mount.harness import opened, run, wait_until


def made_file(path: Path, size: int = 1 << 20) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_a_loop_device_is_its_file(tmp_path: Path) -> None:
    """What is written to the device can be read through the file at once, without a flush; sizes agree."""
    path = made_file(tmp_path / "file")
    with loopdev.attach(path) as loop:
        assert run("blockdev", "--getsize64", "--getss", loop.node).stdout.split() == ["1048576", "512"]
        assert "[none]" in Path(f"/sys/block/{loop.node.name}/queue/scheduler").read_text()
        with opened(loop.node, os.O_WRONLY | os.O_DIRECT) as fd:
            page = mmap.mmap(-1, 4096)  # aligned, as direct I/O wants it
            page[:5] = b"hello"
            assert os.pwrite(fd, page, 4096) == 4096
        assert path.read_bytes()[4096:4101] == b"hello"


def test_it_vanishes_with_its_last_user(tmp_path: Path) -> None:
    """While anybody has it open it stays attached, then it detaches itself."""
    path = made_file(tmp_path / "file")
    with loopdev.attach(path) as loop:
        fd = os.open(loop.node, os.O_RDONLY)
    assert loopdev.backing(loop.number) is not None
    os.close(fd)
    wait_until(lambda: loopdev.backing(loop.number) is None, "the device to detach itself")


def test_its_file_is_known_by_identity(tmp_path: Path) -> None:
    """The file behind a device is found by its inode, also after it was renamed or another has its name."""
    path = made_file(tmp_path / "file")
    with loopdev.attach(path) as loop:
        found = loopdev.backing(loop.number)
        assert found is not None
        assert found.path == str(path)
        assert found.is_file(path)
        path.rename(tmp_path / "moved")
        made_file(path)
        found = loopdev.backing(loop.number)
        assert found is not None
        assert found.is_file(tmp_path / "moved")
        assert not found.is_file(path)
        assert not found.is_file(tmp_path / "nothing")


def test_what_is_no_loop_device_has_no_file() -> None:
    """Other devices, and numbers without a device, have no file behind them."""
    assert loopdev.backing(os.stat("/dev/ubda").st_rdev) is None
    assert loopdev.backing(os.makedev(7, 4000)) is None


def test_a_device_can_be_detached(tmp_path: Path) -> None:
    """A detached one has no file, and detaching it once more does nothing."""
    with loopdev.attach(made_file(tmp_path / "file")) as loop:
        loopdev.detach(loop.number)
    wait_until(lambda: loopdev.backing(loop.number) is None, "the device to be detached")
    loopdev.detach(loop.number)


def test_what_cannot_be_attached_is_refused(tmp_path: Path) -> None:
    """A file that isn't there, and a folder, are errors that name it."""
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(TapError, match=str(path)):
            loopdev.attach(path)


def test_many_at_once_get_devices_of_their_own(tmp_path: Path) -> None:
    """Threads that race for the same free device all get one."""
    paths = [made_file(tmp_path / f"file{n}") for n in range(12)]
    loops: list[loopdev.Loop] = []
    threads = [threading.Thread(target=lambda of=path: loops.append(loopdev.attach(of))) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({loop.number for loop in loops}) == len(paths)
    for loop in loops:
        loop.close()
