"""Thinning, pins, and a store that runs full, with the real daemon: what is left is what was, and writes go on."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dmafs.client import connect
from tests.mount.harness import (
    DMAFS,
    MIB,
    Rig,
    assert_same,
    fails,
    forget,
    opened,
    pread,
    pwrite,
    run,
    wait_until,
)

pytestmark = pytest.mark.mount

DISK = 32 * MIB
ONLY_THE_NEWEST = """\
[retention]
within = "0s"
hourly = 0
daily = 0
weekly = 0
monthly = 0
yearly = 0
minimum = 1
named = false
"""


def configure(rig: Rig, text: str) -> None:
    (rig.store / "dmafs.conf").write_text(text)


def thin(rig: Rig, *options: str) -> dict[str, list[str]]:
    """Thin; return the reasons for each snapshot, with a minus before the ids of those dropped."""
    report = json.loads(rig.dmafs("thin", "--json", *options, rig.store).stdout)
    assert report["dry_run"] is ("--dry-run" in options)
    return {("" if one["kept"] else "-") + one["id"]: one["reasons"] for one in report["snapshots"]}


def snapshots(rig: Rig) -> list[str]:
    return sorted(name for name in os.listdir(rig.mnt / "snapshots") if name != "latest")


def named(rig: Rig) -> list[str]:
    return [name for name in snapshots(rig) if not name.startswith("20")]


def backward(rig: Rig) -> Path:
    return rig.store / "disk" / "backward"


def allocated(rig: Rig) -> int:
    return sum(path.stat().st_blocks * 512 for path in backward(rig).iterdir())


def step(rig: Rig, files: Path, name: str) -> Path:
    """Write some files, and take a pinned snapshot and a copy while the filesystem stands still; sync."""
    run("dd", "if=/dev/urandom", f"of={files}/data", "bs=64K", "count=48", "conv=notrunc,fsync")
    (files / name).write_text(name * 1000)
    copy = rig.root / f"copy.{name}"
    run("fsfreeze", "-f", files)
    try:
        (rig.mnt / "snapshots" / name).mkdir()
        run("cp", "--sparse=always", rig.primary(), copy)
    finally:
        run("fsfreeze", "-u", files)
    rig.dmafs("snapshot", "pin", rig.store, name)
    rig.dmafs("sync", rig.store)
    return copy


def assert_still(path: Path, copy: Path) -> None:
    """Compare an image with its copy, read from the daemon and not from the kernel's cache."""
    forget(path)
    assert_same(copy, path)


def test_what_is_left_is_what_was(rig: Rig) -> None:
    """Snapshots are thinned while one is mounted: its bytes stay; what is left equals the copies; space is freed."""
    rig.create(size=DISK)
    configure(rig, ONLY_THE_NEWEST)
    rig.start()
    files, past = rig.folder("files"), rig.folder("past")
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    names = [f"s{number}" for number in range(8)]
    kept = {"s1": ["pinned"], "s6": ["pinned"], "s7": ["minimum"]}
    copies = {name: step(rig, files, name) for name in names}
    held = rig.attach(rig.snapshot("s3"), "-r")
    rig.mount(held, past, "ro,noload")
    with opened(rig.snapshot("s5"), os.O_RDONLY) as fd:
        assert set(names) <= set(snapshots(rig))
        for name in names:
            if kept.get(name) != ["pinned"]:
                rig.dmafs("snapshot", "unpin", rig.store, name)
        before, plan = allocated(rig), thin(rig, "--dry-run")
        done = thin(rig)
        assert done.keys() == plan.keys()
        assert {name: done[name] for name in done if not name.startswith("-")} == kept
        assert {f"-{name}" for name in names if name not in kept} <= set(done)
        assert done["-s2"] == ["no rule"]
        assert snapshots(rig) == sorted(kept)
        assert allocated(rig) < before
        for name in kept:
            assert_still(rig.snapshot(name), copies[name])
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, DISK, 0) == copies["s5"].read_bytes()
    assert_same(copies["s3"], Path(held))
    assert (past / "s3").read_text() == "s3" * 1000
    rig.umount(past)
    rig.detach(held)
    wait_until(lambda: not list(backward(rig).glob("*.gone")), "the held snapshots to go")
    assert thin(rig) == kept
    for name in kept:
        assert_still(rig.snapshot(name), copies[name])
    run("e2fsck", "-fn", rig.snapshot("s6"))
    rig.umount(files)
    rig.detach(device)
    rig.restart()
    for name in kept:
        assert_still(rig.snapshot(name), copies[name])


def test_the_daemon_thins_by_itself(rig: Rig) -> None:
    """What no rule keeps is gone soon after the daemon has started; a pin keeps, also over a restart."""
    rig.create(size=MIB)
    rig.start()
    for name in ("a", "b", "c", "d"):
        pwrite(rig.tap(), name.encode() * 4096, 0, sync=True)
        (rig.mnt / "snapshots" / name).mkdir()
        rig.dmafs("sync", rig.store)
    rig.dmafs("snapshot", "pin", rig.store, "b")
    assert named(rig) == ["a", "b", "c", "d"]
    rig.stop()
    configure(rig, ONLY_THE_NEWEST)
    rig.start()
    wait_until(lambda: named(rig) in (["b"], ["b", "d"]), "the daemon to thin")
    assert pread(rig.snapshot("b"), 4096, 0) == b"b" * 4096


def test_pins(rig: Rig) -> None:
    """A pinned snapshot isn't dropped by rmdir; ls shows the pin; commands do the same with and without a daemon."""
    rig.create(size=MIB)
    rig.start()
    for name in ("one", "two"):
        pwrite(rig.tap(), name.encode() * 512, 0, sync=True)
        (rig.mnt / "snapshots" / name).mkdir()
    folder = rig.mnt / "snapshots" / "one"
    assert rig.dmafs("snapshot", "pin", rig.store, "one").stdout == "snapshot one pinned\n"
    fails(errno.EBUSY, os.rmdir, folder)
    assert folder.is_dir()

    def listed() -> tuple[list[str], set[tuple[str, bool]], set[tuple[str, bool]]]:
        report = json.loads(rig.dmafs("ls", "--json", rig.store).stdout)
        text = rig.dmafs("ls", rig.store).stdout
        return (
            re.findall(r" pinned +\S+ +(\S+)$", text, re.MULTILINE),
            {(one["id"], one["pinned"]) for one in report["snapshots"]},
            {(one["name"], one["pinned"]) for one in report["points"] if one["name"]},
        )

    expected = ["one"], {("one", True), ("two", False)}, {("one", True), ("two", False)}
    assert listed() == expected
    with_daemon = thin(rig)
    rig.stop()
    assert listed() == expected
    assert thin(rig) == with_daemon
    assert with_daemon.keys() == {"one", "two"}
    assert rig.dmafs("snapshot", "unpin", rig.store, "one").stdout == "snapshot one unpinned\n"
    assert rig.dmafs("snapshot", "pin", rig.store, "two").stdout == "snapshot two pinned\n"
    rig.start()
    os.rmdir(folder)
    fails(errno.EBUSY, os.rmdir, rig.mnt / "snapshots" / "two")
    table = rig.dmafs("thin", rig.store).stdout.splitlines()
    assert re.fullmatch(r"two +\S+Z \(.*\) +0 B +keep +pinned, named, minimum, within 24h, hourly, .*", table[1])
    for command in ("pin", "unpin"):
        done = rig.dmafs("snapshot", command, rig.store, "one", code=23)
        assert done.stderr.startswith("dmafs: error: no snapshot named one\nhint: ")


def small_store(rig: Rig, megabytes: int, configuration: str) -> Path:
    """Put the store on a small filesystem of its own; return where that is mounted."""
    place = rig.put_store_on_disk(megabytes * MIB)
    rig.create(size=DISK, content=os.urandom(DISK))
    configure(rig, configuration)
    return place


def alarms(rig: Rig) -> list[dict[str, Any]]:
    """Return the alarms; while there are some the exit status is 1, and the text shows them, too."""
    report = json.loads(run(DMAFS, "status", "--json", rig.store, code=None).stdout)
    found: list[dict[str, Any]] = report["alarms"]
    text = run(DMAFS, "status", rig.store, code=int(bool(found))).stdout
    assert [one["message"] for one in found] == re.findall(r"^  alarm     (.*) \(since .*\)$", text, re.MULTILINE)
    return found


def write_and_sync(rig: Rig, number: int) -> None:
    """Overwrite an eighth of the disk and have a sync save what was there."""
    pwrite(rig.tap(), bytes([number % 251 + 1]) * 4 * MIB, number % 8 * 4 * MIB, sync=True)
    with connect(rig.store) as asked:
        asked.sync()


def test_a_full_store_drops_its_oldest_snapshots(rig: Rig) -> None:
    """Writes go on for ever: the oldest snapshots make room, pinned and named ones stay as they were; it is told."""
    rig.allow(r"runs full, .* free: dropped the .*oldest snapshots?; history begins at 20")
    place = small_store(rig, 192, 'segment_size = "1MiB"\nreserve = "16MiB"\n')
    rig.start()
    for number in range(2):
        write_and_sync(rig, number)
    [oldest, *_] = snapshots(rig)
    for number, name in ((2, "named"), (3, "pinned")):
        (rig.mnt / "snapshots" / name).mkdir()
        run("cp", rig.primary(), rig.root / name)
        write_and_sync(rig, number)
    assert alarms(rig) == []
    seen: list[str] = []
    for number in range(4, 40):
        write_and_sync(rig, number)
        for name in snapshots(rig):
            seen += [name] * (name not in seen)
    left = snapshots(rig)
    unnamed = [name for name in left if name.startswith("20")]
    assert oldest not in left
    assert {"named", "pinned"} <= set(left)
    assert len(unnamed) >= 3
    assert unnamed == sorted(name for name in seen if name.startswith("20"))[-len(unnamed) :], "only the oldest went"
    assert len(seen) > len(left) + 5
    for name in ("named", "pinned"):
        assert_still(rig.snapshot(name), rig.root / name)
    [alarm] = alarms(rig)
    assert alarm["kind"] == "space"
    assert len(re.findall("runs full", rig.log())) == 1
    for number in range(32, 40):
        assert pread(rig.tap(), 4 * MIB, number % 8 * 4 * MIB) == bytes([number % 251 + 1]) * 4 * MIB
    rig.stop()
    assert alarms(rig) == []
    rig.umount(place)


def write_until_refused(fd: int) -> int:
    """Write MiB after MiB, and return how many were taken before one was refused for want of space."""
    block = os.urandom(MIB)
    for number in range(1000):
        try:
            os.pwrite(fd, block, number % 32 * MIB)
            os.fsync(fd)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error  # noqa: PT017 - how many is what matters
            return number
    raise AssertionError("never refused")


def test_a_full_store_keeps_its_floor(rig: Rig) -> None:
    """When all that is left is pinned or named, writes are refused, and the alarm says that nothing can be dropped."""
    rig.allow(r"runs full, .* free: ", r"write: store of volume disk is full")
    place = small_store(rig, 88, 'segment_size = "1MiB"\nreserve = "16MiB"\n[retention]\nminimum = 0\n')
    rig.start()
    copies = {}
    for number in range(3):
        name = f"s{number}"
        (rig.mnt / "snapshots" / name).mkdir()
        copies[name] = rig.root / name
        run("cp", rig.primary(), copies[name])
        write_and_sync(rig, number)
    with opened(rig.tap(), os.O_WRONLY) as fd:
        written = write_until_refused(fd)
        assert 8 < written < 100
    assert [name for name in snapshots(rig) if name.startswith("20")] == []
    for name, copy in copies.items():
        assert_still(rig.snapshot(name), copy)
    [alarm] = alarms(rig)
    assert re.search(r"no snapshot can be dropped; history begins at 20", alarm["message"])
    for name in copies:
        os.rmdir(rig.mnt / "snapshots" / name)
    pwrite(rig.tap(), b"again" * 1000, 0, sync=True)
    rig.stop()
    rig.umount(place)
