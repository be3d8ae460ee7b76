"""Claims about following QEMU's log live: what the guest flushed can be had, byte for byte."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.mount.harness import MIB, Rig, assert_same, run, wait_until
from tests.mount.qemu import Flush, Qemu, Replay

pytestmark = pytest.mark.mount
SIZE = 64 * MIB
FLUSHES = 50


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        rig.primary().write_bytes(b"")
        with rig.primary().open("r+b") as file:
            file.truncate(SIZE)
        log_of(rig).touch()
        rig.dmafs("create", rig.store, "--source", rig.primary(), "--tap", "log", "--log", log_of(rig))
        rig.configure("")
        yield rig


def log_of(rig: Rig) -> Path:
    return rig.root / "disk.log"


def qemu_of(rig: Rig, *, append: bool = False) -> Qemu:
    return Qemu(rig.primary(), log_of(rig), rig.root / "disk.img", append=append)


def captured(rig: Rig, flush: Flush) -> None:
    """Wait until the daemon has a flush."""
    wait_until(lambda: newest(rig) >= flush.events, f"the capture of event {flush.events}", every=0.1)


def newest(rig: Rig) -> int:
    seq: int = rig.status()["newest"]["seq"]
    return seq


def is_past(rig: Rig, seq: int) -> bool:
    return newest(rig) > seq


class Load(threading.Thread):
    """Works on files, and flushes often, until it has done so a number of times."""

    def __init__(self, folder: Path, rounds: int) -> None:
        super().__init__()
        self._folder, self._rounds = folder, rounds
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for number in range(self._rounds):
                path = self._folder / f"file{number % 17}"
                path.write_bytes(bytes([number % 250 + 1]) * (number * 3001 % 200_000 + 1))
                if number % 5 == 4:
                    path.unlink()
                run("sync", "-f", self._folder)
        except BaseException as error:  # noqa: BLE001 - shown by whoever waits
            self.failure = error

    def wait(self) -> None:
        self.join()
        assert self.failure is None, self.failure


def test_a_file_system_under_load_is_followed(rig: Rig) -> None:
    """At 50 flushes the image is what the log says up to there; ext4 is whole after its journal was replayed."""
    rig.start(protected=False)
    files = rig.folder("files")
    with qemu_of(rig) as qemu:
        disk = rig.attach(qemu.disk)
        rig.mkfs(disk, "-E", "nodiscard")
        rig.wait_protected()
        rig.mount(disk, files)
        load = Load(files, FLUSHES)
        load.start()
        load.wait()
        rig.umount(files)
        rig.detach(disk)
        expected = rig.root / "expected.img"
        expected.touch()
        run("truncate", "-s", str(SIZE), expected)
        replay = Replay(log_of(rig), expected)
        flushes = replay.flushes()
        captured(rig, flushes[-1])
        assert len(flushes) >= FLUSHES
        for number, flush in enumerate(flushes[-FLUSHES:]):
            replay.to(flush)
            assert_same(rig.at(f"seq:{flush.events}"), expected)
            if number % 10 == 9:
                assert_whole(rig, flush)
        assert_same(rig.live(), rig.primary())
    assert rig.status()["gaps"] == []
    rig.stop()


def assert_whole(rig: Rig, flush: Flush) -> None:
    """Have ext4 replay its journal on a clone of a moment, and check it."""
    clone = rig.mnt / "clones" / f"check{flush.events}"
    run("mkdir", rig.mnt / "clones" / f"check{flush.events}@seq:{flush.events}")
    disk = rig.attach(clone / "disk.img")
    folder = rig.folder("check")
    rig.mount(disk, folder)
    rig.umount(folder)
    run("e2fsck", "-fn", disk)
    rig.detach(disk)
    run("rmdir", clone)


def test_a_killed_daemon_goes_on_where_it_was(rig: Rig) -> None:
    """While the disk is written: no gap, nothing twice, nothing left out."""
    rig.start(protected=False)
    files = rig.folder("files")
    with qemu_of(rig) as qemu:
        disk = rig.attach(qemu.disk)
        rig.mkfs(disk, "-E", "nodiscard")
        rig.wait_protected()
        rig.mount(disk, files)
        load = Load(files, 100)
        load.start()
        for _ in range(4):
            before = newest(rig)
            wait_until(partial(is_past, rig, before), "capture")
            rig.kill()
            rig.start(protected=False)
        load.wait()
        rig.umount(files)
        rig.detach(disk)
        expected = rig.root / "expected.img"
        expected.touch()
        run("truncate", "-s", str(SIZE), expected)
        replay = Replay(log_of(rig), expected)
        flushes = replay.flushes()
        captured(rig, flushes[-1])
        for flush in flushes[:: len(flushes) // 12]:
            replay.to(flush)
            assert_same(rig.at(f"seq:{flush.events}"), expected)
    assert rig.status()["gaps"] == []
    assert_same(rig.live(), rig.primary())
    rig.stop()


def test_a_log_that_begins_anew_is_a_gap(rig: Rig) -> None:
    """QEMU started again without a fresh file: the gap is recorded, a resync ends it, and capture goes on."""
    rig.allow("a gap has begun: log .* can't be followed", "gap ended")
    rig.start(protected=False)
    with qemu_of(rig) as qemu:
        run("dd", "if=/dev/urandom", f"of={qemu.disk}", "bs=64k", "count=20", "conv=notrunc,fsync")
        rig.wait_protected()
        wait_until(lambda: newest(rig) >= 1, "capture")
    with qemu_of(rig, append=True) as qemu:
        run("dd", "if=/dev/urandom", f"of={qemu.disk}", "bs=64k", "count=20", "conv=notrunc,fsync", "seek=40")
        same_as_primary(rig)
        assert rig.status()["gaps"] == []
    with qemu_of(rig) as qemu:
        run("dd", "if=/dev/urandom", f"of={qemu.disk}", "bs=64k", "count=20", "conv=notrunc,fsync", "seek=80")
        wait_until(lambda: rig.status()["gaps"] and rig.status()["gaps"][-1]["end"], "the gap's end")
        run("dd", "if=/dev/urandom", f"of={qemu.disk}", "bs=64k", "count=20", "conv=notrunc,fsync", "seek=90")
        same_as_primary(rig)
    rig.stop()


def same_as_primary(rig: Rig) -> None:
    """Wait until the newest image has all that was flushed."""
    wait_until(lambda: run("cmp", rig.live(), rig.primary(), code=None).returncode == 0, "capture", every=0.3)
