"""Real programs work on an ext4 over the tap; every moment noted meanwhile is later what the disk was then."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.harness import MIB, REDONE, Rig, assert_same, forget, moment, run, wait_until

pytestmark = pytest.mark.mount

DISK = 256 * MIB
MOMENTS = 20
ROWS = 400
"""Rows that one transaction adds to the database."""
TREES = ("asyncio", "email", "json", "unittest", "importlib", "encodings")
STDLIB = Path(sysconfig.get_paths()["stdlib"])
GIT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


@dataclass(frozen=True)
class Noted:
    """A moment, and what was true then; *copy* is the primary's file as it was."""

    number: int
    time_ns: int
    rows: int
    commits: int
    copy: Path


class Work:
    """Real programs on a filesystem."""

    def __init__(self, files: Path) -> None:
        self._files = files
        self.rows = self.commits = 0

    def step(self, number: int) -> None:
        """Change the filesystem in one of several ways, round and round."""
        steps = (self._unpack, self._insert, self._commit, self._overwrite, self._remove)
        steps[number % len(steps)](number)

    def _unpack(self, number: int) -> None:
        folder = self._files / f"tree.{number}"
        folder.mkdir()
        run("sh", "-c", f"tar -C '{STDLIB}' -c {' '.join(TREES)} | tar -C '{folder}' -x")

    def _insert(self, number: int) -> None:
        rows = "".join(f"({number}, {row}, hex(randomblob(200)))," for row in range(ROWS))[:-1]
        database = self._files / "database"
        run("sqlite3", database, "create table if not exists t (a, b, c)")
        insert = f"insert into t values {rows}"  # noqa: S608 - our own numbers
        run("sqlite3", database, "begin", insert, "commit", "begin", "delete from t", "rollback")
        self.rows += ROWS

    def _commit(self, number: int) -> None:
        work = self._files / "git"
        env = {**GIT, "HOME": str(self._files)}
        if not work.exists():
            run("git", "init", "-q", work, env=env)
        shutil.copytree(STDLIB / TREES[number % len(TREES)], work / f"part.{number}")
        for arguments in (["add", "-A"], ["-c", "gc.auto=0", "commit", "-q", "-m", f"step {number}"]):
            run("git", "-C", work, *arguments, env=env)
        self.commits += 1

    def _overwrite(self, number: int) -> None:
        target = self._files / "bytes"
        run("dd", "if=/dev/urandom", f"of={target}", "bs=64K", "count=48", f"seek={number * 7}", "conv=notrunc")
        run("dd", "if=/dev/zero", f"of={target}", "bs=4K", "count=100", f"seek={number * 100}", "conv=notrunc,fsync")

    def _remove(self, number: int) -> None:
        run("rm", "-r", self._files / f"tree.{number - 4}")
        run("truncate", "-s", str(number * 1000 + 1), self._files / "bytes")


def frozen(rig: Rig, files: Path, work: Work, number: int) -> Noted:
    """Take a snapshot and a copy of the primary while the filesystem stands still."""
    copy = rig.root / f"copy.{number}"
    run("fsfreeze", "-f", files)
    try:
        (rig.mnt / "snapshots" / f"m{number}").mkdir()
        time_ns = moment()
        run("cp", "--sparse=always", rig.primary(), copy)
    finally:
        run("fsfreeze", "-u", files)
    return Noted(number, time_ns, work.rows, work.commits, copy)


def assert_recovers(rig: Rig, image: Path) -> None:
    """A copy of an image needs its filesystem's journal replayed and nothing else."""
    copy = rig.root / "replayed"
    run("cp", "--sparse=always", image, copy)
    replayed = run("e2fsck", "-fy", copy, code=None)
    assert replayed.returncode in (0, 1), replayed.stdout
    # The superblock's totals are no part of the journal; every mount counts them anew.
    rest = re.sub(r"Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.\nFix\? yes\n", "", replayed.stdout)
    assert "? yes" not in rest, replayed.stdout
    run("e2fsck", "-fn", copy)
    copy.unlink()


def assert_all_there(rig: Rig, noted: list[Noted]) -> None:
    """Every moment is its copy, read from the daemon and not from the kernel's cache."""
    for one in noted:
        image = rig.at(one.time_ns)
        forget(image)
        assert_same(one.copy, image)
        by_name = rig.snapshot(f"m{one.number}")
        assert by_name.stat().st_ino == image.stat().st_ino


def assert_usable(rig: Rig, one: Noted) -> None:
    """Mount a past image; its database and its repository are whole, and as full as they were."""
    past = rig.folder("past")
    device = rig.attach(rig.at(one.time_ns), "-r")
    rig.mount(device, past, "ro,noload")
    database = f"file:{past}/database?immutable=1"
    asked = run("sqlite3", database, "pragma integrity_check; select count(*) from t")
    assert asked.stdout.split() == ["ok", str(one.rows)]
    env = {**GIT, "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    run("git", "-C", past / "git", "fsck", "--strict", env=env)
    counted = run("git", "-C", past / "git", "rev-list", "--count", "HEAD", env=env)
    assert int(counted.stdout) == one.commits
    rig.umount(past)
    rig.detach(device)


@pytest.mark.slow
def test_twenty_moments_survive_syncs_restarts_and_a_kill(rig: Rig) -> None:
    """Each noted moment is byte for byte the copy of the primary made then: before and after syncs, restart, kill -9.

    Frozen moments are clean filesystems; flushed ones of a filesystem in use are clean after its journal's replay.
    """
    files = rig.folder("files")
    rig.create(size=DISK)
    rig.start()
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    work = Work(files)
    noted: list[Noted] = []
    flushed: list[int] = []
    for number in range(MOMENTS):
        work.step(number)
        if number % 2:
            run("sync", "-f", files)
            flushed.append(moment())
            (rig.mnt / "snapshots" / f"f{number}").mkdir()
            work.step(MOMENTS + number)
        noted.append(frozen(rig, files, work, number))
    assert len({one.copy.stat().st_size for one in noted}) == 1
    assert len({rig.at(one.time_ns).stat().st_ino for one in noted}) == MOMENTS, "the moments differ"

    assert_all_there(rig, noted)
    for one in noted:
        run("e2fsck", "-fn", rig.at(one.time_ns))
    assert len(flushed) >= MOMENTS // 2
    for time_ns in flushed:
        assert_recovers(rig, rig.at(time_ns))
    for one in noted[2::6]:
        assert_usable(rig, one)

    before = rig.status()
    rig.dmafs("sync", rig.store)
    work.step(5 * MOMENTS)
    run("sync", "-f", files)
    rig.dmafs("sync", rig.store)
    after = rig.status()
    assert after["mirror"]["seq"] > before["newest"]["seq"]
    assert after["forward"]["events"] < before["forward"]["events"]
    assert after["sync_saved_bytes"] > 0
    assert_all_there(rig, noted)
    for number in range(1, MOMENTS, 4):
        assert_recovers(rig, rig.snapshot(f"f{number}"))
    assert_usable(rig, noted[7])

    rig.umount(files)
    rig.detach(device)
    rig.restart()
    assert_all_there(rig, noted)

    kill_while_written(rig, files)
    rig.start()
    assert_same(rig.primary(), rig.live())
    assert_all_there(rig, noted)
    assert_usable(rig, noted[-1])


def kill_while_written(rig: Rig, files: Path) -> None:
    """Kill the daemon while a program writes to the filesystem."""
    rig.allow(REDONE)
    device = rig.attach(rig.tap())
    rig.mount(device, files)
    head = rig.status()["newest"]["seq"]
    with subprocess.Popen(
        ["dd", "if=/dev/urandom", f"of={files}/endless", "bs=64K", "count=10000", "oflag=dsync"],
        stderr=subprocess.DEVNULL,
    ) as writer:
        wait_until(lambda: rig.status()["newest"]["seq"] > head + 100, "writes to arrive")
        assert writer.poll() is None
        rig.kill()
        time.sleep(0.1)
        writer.send_signal(signal.SIGKILL)
    rig.umount(files, "-l")
    rig.detach(device)
