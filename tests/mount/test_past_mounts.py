"""``dmafs mount`` and ``umount``: the files of a moment in the middle of work, and nothing left of it afterwards."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmafs.cli.main import main
from dmafs.core.mounts import mounts
from tests.mount.harness import DMAFS, MIB, REDONE, Rig, is_mounted, moment, pwrite, run, spelled, wait_until
from tests.mount.test_clones import meanwhile

pytestmark = pytest.mark.mount

SECTOR = 512
START = 2048
"""First sector of the first partition."""


def table_of(*areas: tuple[int, int], extended: int | None = None) -> bytes:
    """Return the first sector of a disk with a DOS table of partitions (first sector, sectors)."""
    entries = [
        struct.pack("<B3sB3sII", 0, b"", 0x5 if at == extended else 0x83, b"", *area) for at, area in enumerate(areas)
    ]
    return (bytes(446) + b"".join(entries)).ljust(510, b"\0") + b"\x55\xaa"


def loops(rig: Rig) -> list[str]:
    """Return the files behind loop devices that are below at/ or clones/ of the tree."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.startswith((f"{rig.mnt}/at/", f"{rig.mnt}/clones/")):
            found.append(text)
    return found


def nothing_is_left(rig: Rig) -> None:
    """No loop device, no mount and no clone; devices detach themselves right after their last user."""
    wait_until(lambda: not loops(rig), "loop devices to be gone", seconds=10)
    assert not [mount.point for mount in mounts() if mount.point.startswith(f"{rig.root}/past")]
    assert os.listdir(rig.mnt / "clones") == []


def mounted(rig: Rig, what: str, past: Path, *options: str) -> dict[str, object]:
    report: dict[str, object] = json.loads(rig.dmafs("mount", rig.store, what, past, "--json", *options).stdout)
    rig._mounts.append(past)
    return report


def unmounted(rig: Rig, past: Path) -> None:
    rig.dmafs("umount", past)
    rig._mounts.remove(past)
    assert not is_mounted(past)


@contextmanager
def busy(files: Path) -> Iterator[list[int]]:
    """Have files written and synced over and over; yields a list whose last number is the last file that is safe."""

    def write(number: int) -> None:
        path = files / f"file.{number}"
        with path.open("wb") as file:
            file.write(content(number))
            file.flush()
            os.fsync(file.fileno())
        (files / f"unsafe.{number}").write_bytes(content(number) * 7)
        if number > 60:
            (files / f"unsafe.{number - 60}").unlink()

    with meanwhile(write) as done:
        yield done


def content(number: int) -> bytes:
    return f"{number}\n".encode() * 3000


def check_files(past: Path, safe: int, most: int) -> None:
    """What had been synced before the moment is there whole, and nothing from after it."""
    assert safe > 0
    for number in range(1, safe + 1):
        assert (past / f"file.{number}").read_bytes() == content(number)
    assert not (past / f"file.{most + 2}").exists()


def go_on(done: list[int], count: int) -> None:
    upto = done[-1] + count
    wait_until(lambda: done[-1] >= upto, "some writes")


@pytest.mark.parametrize(("kind", "size"), [("ext4", 96), ("xfs", 320)])
def test_a_moment_in_the_middle_of_work(rig: Rig, kind: str, size: int) -> None:
    """The journal is replayed, read-only or writable; the moment isn't changed by it; nothing is left."""
    files, past = rig.folder("files"), rig.folder("past")
    rig.create(size=size * MIB)
    rig.start()
    device = rig.attach(rig.tap())
    run(f"mkfs.{kind}", "-q", device)
    rig.mount(device, files)
    with busy(files) as done:
        go_on(done, 20)
        safe, when = done[-1], moment()
        most = done[-1]
        go_on(done, 20)
        what = f"disk@{spelled(when)}"
        with rig.at(when).open("rb") as held:
            before = os.getxattr(held.fileno(), "user.dmafs.digest")
            report = mounted(rig, what, past)
            assert report["type"] == kind
            assert report["clone"], "its journal wants a replay"
            assert str(report["options"]).startswith("ro")
            check_files(past, safe, most)
            assert len(loops(rig)) == 1
            with pytest.raises(OSError, match="Read-only"):
                (past / "mine").write_bytes(b"mine")
            unmounted(rig, past)
            nothing_is_left(rig)
            report = mounted(rig, f"@{report['at']}", past, "--writable", "--options", "noatime")
            assert str(report["options"]).endswith("noatime")
            (past / "mine").write_bytes(b"mine")
            rig.dmafs("sync", rig.store)
            check_files(past, safe, most)
            unmounted(rig, past)
            nothing_is_left(rig)
            assert os.getxattr(held.fileno(), "user.dmafs.digest") == before
    rig.umount(files)
    rig.detach(device)


def in_use(rig: Rig, size: int) -> tuple[Path, str]:
    """Make a disk with an ext4 that has a file; return where it is mounted, and its loop device."""
    files = rig.folder("files")
    rig.create(size=size)
    rig.start()
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    (files / "one").write_text("one")
    return files, device


def test_a_clean_ext4_needs_no_clone(rig: Rig) -> None:
    """One that was unmounted, or frozen, is mounted from the image itself; its snapshot keeps nothing for it."""
    past = rig.folder("past")
    files, device = in_use(rig, 32 * MIB)
    rig.umount(files)
    rig.detach(device)
    report = mounted(rig, "@0s ago", past)
    assert (report["clone"], report["options"]) == (None, "ro,noload")
    assert (past / "one").read_text() == "one"
    assert os.listdir(rig.mnt / "clones") == []
    run("umount", past)  # by hand: the loop device goes by itself
    nothing_is_left(rig)
    mounted(rig, "@0s ago", past)
    unmounted(rig, past)
    nothing_is_left(rig)


def partitioned(rig: Rig, *kinds: str) -> list[Path]:
    """Make a partitioned disk with file systems, mount them all through the tap, and return where."""
    sectors = 64 * MIB // SECTOR
    areas = [(START + number * sectors, sectors) for number in range(len(kinds))]
    rig.create(size=(START + len(kinds) * sectors) * SECTOR, content=table_of(*areas))
    rig.start()
    folders = []
    for number, (kind, (start, length)) in enumerate(zip(kinds, areas, strict=True), 1):
        area = ("--offset", str(start * SECTOR), "--sizelimit", str(length * SECTOR))
        device = rig.attach(rig.tap(), *area)
        run(f"mkfs.{kind}", device)
        folders.append(rig.folder(f"files.{number}"))
        rig.mount(device, folders[-1])
    return folders


def test_a_partitioned_disk(rig: Rig) -> None:
    """The partition is asked for where there are several, and listed; each shows what was synced on it."""
    first, second = partitioned(rig, "ext4", "ext4")
    past, other = rig.folder("past"), rig.folder("past.2")
    with busy(first) as one, busy(second) as two:
        go_on(one, 10)
        go_on(two, 10)
        safe, when = (one[-1], two[-1]), moment()
        most = (one[-1], two[-1])
        go_on(two, 10)
        what = f"@{spelled(when)}"
        said = rig.dmafs("mount", rig.store, what, past, code=3).stderr
        assert "several partitions: 1 (ext4, 64 MiB); 2 (ext4, 64 MiB)" in said
        assert "no partition 3: 1 (ext4" in rig.dmafs("mount", rig.store, what, past, "--partition", "3", code=3).stderr
        nothing_is_left(rig)
        assert mounted(rig, what, past, "--partition", "1")["partition"] == 1
        assert mounted(rig, what, other, "--partition", "2")["partition"] == 2
        check_files(past, safe[0], most[0])
        check_files(other, safe[1], most[1])
        assert len(loops(rig)) == len(os.listdir(rig.mnt / "clones")) == 2
        unmounted(rig, past)
        assert len(loops(rig)) == len(os.listdir(rig.mnt / "clones")) == 1, "the other's stay"
        unmounted(rig, other)
        nothing_is_left(rig)


def test_a_single_partition_is_taken(rig: Rig) -> None:
    [files] = partitioned(rig, "ext4")
    past = rig.folder("past")
    (files / "one").write_text("one")
    run("sync", "-f", files)
    assert mounted(rig, "@0s ago", past)["partition"] == 1
    assert (past / "one").read_text() == "one"
    unmounted(rig, past)
    nothing_is_left(rig)


def test_what_can_not_be_mounted(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its reason, and nothing left behind."""
    files, past = rig.folder("files"), rig.folder("past")
    rig.create(size=64 * MIB)
    rig.start()
    empty = spelled(moment())
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    (files / "one").write_text("one")
    run("sync", "-f", files)
    (rig.root / "file").write_text("")
    for what, place, options, code, said in (
        (f"@{empty}", past, (), 30, "nothing that is known is on the image"),
        ("@0s ago", rig.root / "none", (), 30, "is not a directory"),
        ("@0s ago", rig.root / "file", (), 30, "is not a directory"),
        ("@0s ago", rig.mnt / "live", (), 30, "is in the tree"),
        ("@0s ago", past, ("--options", "nonsense"), 30, "can't be mounted"),
        ("@0s ago", past, ("--writable", "--options", "nonsense"), 30, "can't be mounted"),
        ("@0s ago", past, ("--partition", "1"), 3, "has no partition 1"),
        ("@2100-01-01 00:00", past, (), 21, "is in the future"),
        ("nope@0s ago", past, (), 22, "there is no volume nope"),
        ("disk", past, (), 3, "is not VOLUME@TIME"),
    ):
        assert main(["mount", str(rig.store), what, str(place), *options]) == code
        assert said in capsys.readouterr().err
        nothing_is_left(rig)
    for place, said in ((past, "nothing is mounted at"), (files, "wasn't mounted by dmafs mount")):
        assert said in rig.dmafs("umount", place, code=30).stderr
    assert is_mounted(files)
    rig.umount(files)
    run("wipefs", "-a", device)
    run("mkswap", device)
    assert "no file system but swap" in rig.dmafs("mount", rig.store, "@0s ago", past, code=30).stderr
    nothing_is_left(rig)
    rig.detach(device)
    rig.stop()
    assert "serve it" in rig.dmafs("mount", rig.store, "@0s ago", past, code=30).stderr


def test_a_file_system_that_is_damaged(rig: Rig) -> None:
    """What mount(8) can't mount from a clone leaves no clone."""
    past = rig.folder("past")
    rig.create(size=320 * MIB)
    rig.start()
    device = rig.attach(rig.tap())
    run("mkfs.xfs", "-q", device)
    run("sync", device)
    rig.detach(device)
    pwrite(rig.tap(), b"\xff" * 4096, 512, sync=True)
    said = rig.dmafs("mount", rig.store, "@0s ago", past, code=30).stderr
    assert "can't be" in said or "nothing that is known" in said
    nothing_is_left(rig)


def dirty(rig: Rig) -> tuple[Path, str]:
    """Make an ext4 in use; return its folder, and a moment that wants a replay."""
    files, _ = in_use(rig, 64 * MIB)
    run("sync", "-f", files)
    return files, f"@{spelled(moment())}"


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_is_interrupted(rig: Rig, when: str) -> None:
    """Just before mount(8) has mounted it, or just after: nothing is left."""
    _, what = dirty(rig)
    past, programs = rig.folder("past"), rig.folder("programs")
    asked, real = "kill -INT $PPID", f'{shutil.which("mount")} "$@"'
    lines = [asked, "read -t 0.1", real] if when == "before" else [real, asked, "read -t 0.1"]
    (programs / "mount").write_text("\n".join(["#!/bin/bash", *lines, ""]))
    (programs / "mount").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    done = subprocess.run(
        [DMAFS, "mount", rig.store, what, past], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not is_mounted(past)
    nothing_is_left(rig)


def test_btrfs(rig: Rig) -> None:
    """While the original is mounted it is refused, since the kernel would take the one for the other."""
    files, past = rig.folder("files"), rig.folder("past")
    rig.create(size=128 * MIB)
    rig.start()
    device = rig.attach(rig.tap())
    run("mkfs.btrfs", "-q", device)
    rig.mount(device, files)
    (files / "one").write_text("one")
    run("sync", "-f", files)
    what = f"@{spelled(moment())}"
    (files / "one").write_text("two")
    run("sync", "-f", files)
    assert "is mounted already" in rig.dmafs("mount", rig.store, what, past, code=30).stderr
    nothing_is_left(rig)
    rig.umount(files)
    rig.detach(device)
    report = mounted(rig, what, past)
    assert report["type"] == "btrfs"
    assert report["clone"], "whether its log wants a replay isn't known"
    assert (past / "one").read_text() == "one"
    unmounted(rig, past)
    nothing_is_left(rig)


def test_one_that_is_in_use(rig: Rig) -> None:
    """Who uses it is told, by number and name, and nothing is changed; once that ends it goes."""
    _, what = dirty(rig)
    past = rig.folder("past")
    mounted(rig, what, past)
    with (past / "one").open("rb"):
        said = rig.dmafs("umount", past, code=30).stderr
        assert f"process {os.getpid()} (" in said
    with subprocess.Popen(["sleep", "100"], cwd=past) as process:
        said = rig.dmafs("umount", past, code=30).stderr
        assert f"is busy: process {process.pid} (sleep)\n" in said
        process.kill()
    inner = past / "lost+found"
    run("mount", "--bind", past, inner)
    assert f"mount {inner}" in rig.dmafs("umount", past, code=30).stderr
    run("umount", inner)
    assert (past / "one").read_text() == "one"
    unmounted(rig, past)
    nothing_is_left(rig)


def test_what_others_leave_is_cleared(rig: Rig) -> None:
    """A plain umount frees the device; the clone goes with the next mount. What is mounted elsewhere too keeps it."""
    _, what = dirty(rig)
    past, other = rig.folder("past"), rig.folder("past.other")
    mounted(rig, what, past)
    run("umount", past)
    rig._mounts.remove(past)
    wait_until(lambda: not loops(rig), "the loop device to be gone", seconds=10)
    [left] = os.listdir(rig.mnt / "clones")
    os.mkdir(rig.mnt / "clones" / "mount-by-hand")
    report = mounted(rig, what, past)
    assert set(os.listdir(rig.mnt / "clones")) == {report["clone"], "mount-by-hand"} != {left, "mount-by-hand"}
    run("mount", "--bind", past, other)
    assert "is left" in rig.dmafs("umount", past, code=1).stderr
    rig._mounts.remove(past)
    assert (other / "one").read_text() == "one"
    rig.dmafs("umount", other)
    os.rmdir(rig.mnt / "clones" / "mount-by-hand")
    nothing_is_left(rig)


def test_umount_without_a_daemon(rig: Rig) -> None:
    """After the daemon was killed umount still unmounts and frees the device; the clone goes with the next mount."""
    rig.allow(REDONE, "clone")
    files, what = dirty(rig)
    past = rig.folder("past")
    mounted(rig, what, past)
    run("umount", "-l", files)
    rig._mounts.remove(files)
    rig.kill()
    assert "is left" in rig.dmafs("umount", past, code=1).stderr
    rig._mounts.remove(past)
    assert not is_mounted(past)
    wait_until(lambda: not loops(rig), "the loop device to be gone", seconds=10)
    for device in list(rig._loops):
        run("losetup", "-d", device, code=None)
        rig._loops.remove(device)
    rig.start()
    assert len(os.listdir(rig.mnt / "clones")) == 1
    mounted(rig, what, past)
    unmounted(rig, past)
    nothing_is_left(rig)
