"""Claims about dmafs.taps.devicemapper, with the kernel's device-mapper; dmsetup is the other opinion."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmafs.errors import ExistsError, TapBusyError, TapError
from dmafs.taps import loopdev
from dmafs.taps.devicemapper import NODES, DeviceMapper, Target, numbered, spelled
from tests.mount.harness import opened, run, wait_until

SECTORS = 2048


@pytest.fixture
def dm() -> Iterator[DeviceMapper]:
    """Device-mapper, from which all that a test has made is taken away."""
    with DeviceMapper() as made:
        yield made
        for name, _ in sorted(made.devices(), reverse=True):
            made.remove(name)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[loopdev.Loop]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SECTORS * 512))
    with loopdev.attach(path) as made:
        yield made


def linear(loop: loopdev.Loop, length: int = SECTORS, offset: int = 0) -> Target:
    return Target(0, length, "linear", f"{spelled(loop.number)} {offset}")


def test_the_kernels_versions_are_known(dm: DeviceMapper) -> None:
    """The interface's version is dmsetup's; a target that exists has one, one that doesn't has none."""
    said = run("dmsetup", "version").stdout.split()
    assert ".".join(str(part) for part in dm.version) == said[-1]
    assert (dm.target_version("log-writes") or (0,))[0] == 1
    assert dm.target_version("no-such-thing") is None


def test_a_device_lives_from_create_to_remove(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """It is empty, then has a table that waits, then one in use; its node and lists say so; then it is gone."""
    made = dm.create("dmafs-one", "DMAFS-u1")
    assert (made.name, made.uuid, made.active, made.loaded, made.open_count) == (
        "dmafs-one",
        "DMAFS-u1",
        False,
        False,
        0,
    )
    info = made.node.stat()
    assert stat.S_ISBLK(info.st_mode)
    assert (info.st_rdev, stat.S_IMODE(info.st_mode)) == (made.number, 0o600)
    assert dm.devices() == [("dmafs-one", made.number)]
    dm.load("dmafs-one", [linear(loop)])
    waiting = dm.find(uuid="DMAFS-u1")
    assert waiting is not None
    assert (waiting.active, waiting.loaded) == (False, True)
    dm.resume("dmafs-one")
    used = dm.find(name="dmafs-one")
    assert used is not None
    assert (used.active, used.loaded, used.suspended) == (True, False, False)
    assert dm.table("dmafs-one") == [linear(loop)]
    assert run("dmsetup", "table", "dmafs-one").stdout == f"0 {SECTORS} linear {linear(loop).text}\n"
    assert (used.sysfs / "size").read_text() == f"{SECTORS}\n"
    dm.remove("dmafs-one")
    assert not os.path.lexists(made.node)
    assert dm.find(name="dmafs-one") is None
    assert dm.devices() == []


def test_names_and_uuids_are_taken_once(dm: DeviceMapper) -> None:
    """A second device of a name, or of a uuid, is refused, and the first stays."""
    first = dm.create("dmafs-one", "DMAFS-u1")
    with pytest.raises(ExistsError, match="dmafs-one"):
        dm.create("dmafs-one", "DMAFS-u2")
    with pytest.raises(ExistsError, match="DMAFS-u1"):
        dm.create("dmafs-two", "DMAFS-u1")
    assert dm.devices() == [("dmafs-one", first.number)]
    assert first.node.stat().st_rdev == first.number


def test_a_stale_node_is_replaced(dm: DeviceMapper) -> None:
    """A node that was left of a device that is gone doesn't get in the way."""
    os.mknod(NODES / "dmafs-one", 0o600 | stat.S_IFBLK, os.makedev(254, 77))
    made = dm.create("dmafs-one", "DMAFS-u1")
    assert made.node.stat().st_rdev == made.number


def test_a_device_in_use_is_not_removed(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """While it is open it stays, with its node, and the error says how to find out by whom."""
    made = dm.create("dmafs-one", "DMAFS-u1")
    dm.load("dmafs-one", [linear(loop)])
    dm.resume("dmafs-one")
    with opened(made.node, os.O_RDONLY) as fd:
        with pytest.raises(TapBusyError) as caught:
            dm.remove("dmafs-one", seconds=0.1)
        assert "dmafs-one" in caught.value.message
        assert f"fuser -vm {made.node}" in caught.value.hint
        assert len(os.pread(fd, 512, 0)) == 512
    dm.remove("dmafs-one")


def test_a_removal_waits_for_those_who_only_have_a_look(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """A device that is open for a moment is removed once it is closed."""
    made = dm.create("dmafs-one", "DMAFS-u1")
    dm.load("dmafs-one", [linear(loop)])
    dm.resume("dmafs-one")
    fd = os.open(made.node, os.O_RDONLY)
    closing = threading.Timer(0.2, os.close, (fd,))
    closing.start()
    dm.remove("dmafs-one", seconds=10)
    closing.join()
    assert dm.devices() == []


def test_a_bad_table_is_refused_with_the_kernels_reason(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """A target that doesn't exist, or a device that is too small, is an error that names the device."""
    dm.create("dmafs-one", "DMAFS-u1")
    for bad in (Target(0, 8, "no-such-thing", ""), linear(loop, length=SECTORS + 8)):
        with pytest.raises(TapError, match="can't load a table into dmafs-one"):
            dm.load("dmafs-one", [bad])


def test_a_suspended_device_holds_up_writes(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """I/O waits until resume; then it is done."""
    made = dm.create("dmafs-one", "DMAFS-u1")
    dm.load("dmafs-one", [linear(loop)])
    dm.resume("dmafs-one")
    dm.suspend("dmafs-one", lockfs=False)
    found = dm.find(name="dmafs-one")
    assert found is not None
    assert found.suspended
    done = threading.Event()

    def write() -> None:
        with opened(made.node, os.O_WRONLY | os.O_DSYNC) as fd:
            os.pwrite(fd, b"x" * 4096, 0)
        done.set()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert not done.wait(0.3)
    dm.resume("dmafs-one", lockfs=False)
    assert done.wait(10)
    writer.join()


def test_a_suspension_that_waits_holds_up_no_other_thread(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """While a suspension waits for a write, another thread of this process can do what lets the write be done."""
    lower = dm.create("lower", "DMAFS-u1")
    dm.load("lower", [linear(loop)])
    dm.resume("lower")
    upper = dm.create("upper", "DMAFS-u2")
    dm.load("upper", [Target(0, SECTORS, "linear", f"{spelled(lower.number)} 0")])
    dm.resume("upper")
    dm.suspend("lower", lockfs=False)

    def write() -> None:
        with opened(upper.node, os.O_WRONLY | os.O_DSYNC) as fd:
            os.pwrite(fd, b"x" * 4096, 0)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    wait_until(lambda: (upper.sysfs / "inflight").read_text().split() != ["0", "0"], "the write to be under way")
    waiting = threading.Thread(target=dm.suspend, args=("upper",), kwargs={"lockfs": False}, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    dm.resume("lower", lockfs=False)
    waiting.join(10)
    assert not waiting.is_alive()
    dm.resume("upper", lockfs=False)
    writer.join(10)
    assert not writer.is_alive()
    dm.remove("upper")


def test_a_loaded_table_takes_over_at_resume(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """Another table is used from resume on; the descriptor that was open before goes on with it."""
    made = dm.create("dmafs-one", "DMAFS-u1")
    with opened(loop.node, os.O_RDWR) as fd:
        os.pwrite(fd, b"second" + bytes(506), 512 * 8)
        os.fsync(fd)
    dm.load("dmafs-one", [linear(loop, length=8)])
    dm.resume("dmafs-one")
    with opened(made.node, os.O_RDONLY | os.O_DIRECT) as fd:
        dm.load("dmafs-one", [linear(loop, length=8, offset=8)])
        begun = time.perf_counter()
        dm.suspend("dmafs-one", lockfs=False)
        dm.resume("dmafs-one", lockfs=False)
        print(f"stall {(time.perf_counter() - begun) * 1e3:.2f} ms")
    with opened(made.node, os.O_RDONLY) as fd:
        assert os.pread(fd, 6, 0) == b"second"


def test_a_long_answer_is_complete(dm: DeviceMapper, loop: loopdev.Loop) -> None:
    """A table of a thousand lines, which is more than fits at once, goes in and comes back."""
    dm.create("dmafs-one", "DMAFS-u1")
    table = [Target(n, 1, "linear", f"{spelled(loop.number)} {SECTORS - 1 - n}") for n in range(1000)]
    dm.load("dmafs-one", table)
    dm.resume("dmafs-one")
    assert dm.table("dmafs-one") == table
    assert [line.kind for line in dm.status("dmafs-one")] == ["linear"] * 1000


def test_messages_reach_the_target_or_are_refused(dm: DeviceMapper, loop: loopdev.Loop, tmp_path: Path) -> None:
    """A mark goes into the log; what the target doesn't know is an error."""
    path = tmp_path / "log"
    path.write_bytes(bytes(1 << 20))
    dm.create("dmafs-one", "DMAFS-u1")
    with loopdev.attach(path) as log:
        dm.load("dmafs-one", [Target(0, SECTORS, "log-writes", f"{spelled(loop.number)} {spelled(log.number)}")])
    dm.resume("dmafs-one")
    dm.message("dmafs-one", "mark all-is-well")
    with pytest.raises(TapError, match="can't send a message to dmafs-one"):
        dm.message("dmafs-one", "no-such-message")
    dm.remove("dmafs-one")
    assert b"all-is-well" in path.read_bytes()


def test_device_numbers_are_read_as_they_are_written() -> None:
    """``numbered`` is inverse to ``spelled`` and takes nothing else."""
    assert spelled(os.makedev(259, 300)) == "259:300"
    assert numbered("259:300") == os.makedev(259, 300)
    assert [numbered(text) for text in ("", "7", "7:", "7:0:1", "/dev/loop0", "7:x")] == [None] * 6
