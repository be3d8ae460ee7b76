"""Claims about ``dmafs import``, with a log that QEMU has written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mount.harness import MIB, Rig, assert_same, run
from tests.mount.qemu import Qemu, Replay

pytestmark = pytest.mark.mount
SIZE = 32 * MIB


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as rig:
        yield rig


def use(rig: Rig, disk: str) -> None:
    """Make a file system and change it, with many flushes."""
    rig.mkfs(disk, "-E", "nodiscard")
    files = rig.folder("files")
    rig.mount(disk, files)
    for number in range(25):
        (files / f"file{number}").write_bytes(bytes([number + 1]) * (number * 5000 + 1))
        run("sync", "-f", files)
        if number % 3 == 2:
            (files / f"file{number - 1}").unlink()
    run("fstrim", files)
    rig.umount(files)


def test_a_log_of_qemu_becomes_a_volume(rig: Rig) -> None:
    """At every flush the image is what a naive reader of the log says; the tree shows it, and keeps all of it."""
    primary, log, before = rig.primary(), rig.root / "disk.log", rig.root / "before.img"
    before.write_bytes(b"before the log".ljust(SIZE, b"\0"))
    run("cp", before, primary)
    with Qemu(primary, log, rig.root / "disk.img") as qemu:
        disk = rig.attach(qemu.disk)
        use(rig, disk)
        rig.detach(disk)
    rig.dmafs("import", rig.store, "--log", log, "--base", before)
    rig.start(protected=False)
    status = rig.status()
    assert (status["state"], status["syncs"], status["snapshots"]) == ("imported", 0, 0)
    assert not rig.tap().exists()
    replay = Replay(log, before)
    flushes = replay.flushes()
    assert len(flushes) >= 25
    for flush in flushes:
        replay.to(flush)
        assert_same(rig.at(f"seq:{flush.events}"), before)
    assert status["newest"]["seq"] == flushes[-1].events
    assert_same(rig.live(), primary)
    rig.kill()  # nothing can be missing: there is no gap after it, and no sync takes anything
    rig.start(protected=False)
    assert rig.status()["gaps"] == []
    assert_same(rig.live(), primary)
    assert_same(rig.at(f"seq:{flushes[-1].events}"), primary)
    rig.stop()
