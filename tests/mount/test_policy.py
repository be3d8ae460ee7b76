"""What happens by itself: syncs by policy, snapshots by schedule with hooks, marks, and groups of volumes."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dmafs.client import connect
from tests.mount.harness import MIB, REDONE, Rig, assert_same, moment, opened, pread, pwrite, run, spelled, wait_until

pytestmark = pytest.mark.mount

BLOCK = 64 << 10
BLOCKS = 64


def consistency(path: Path) -> str:
    return os.getxattr(path, "user.dmafs.consistency").decode()


def snapshots(rig: Rig) -> list[str]:
    return sorted(set(os.listdir(rig.mnt / "snapshots")) - {"latest"})


def planned(rig: Rig) -> Any:
    """Return what the daemon says of its plans and of the last runs."""
    with connect(rig.store) as asked:
        status: Any = asked.status()
    return status["daemon"]["schedule"]


@contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run *work* in a thread until the end of the block sets its event; its exception is the block's."""
    done = threading.Event()
    failures: list[BaseException] = []

    def body() -> None:
        try:
            work(done)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]


class Numbers:
    """A disk on which write number n fills block n modulo the number of blocks with n."""

    def __init__(self, tap: Path) -> None:
        self.tap = tap
        self.count = 0
        self.moments: list[tuple[int, int]] = []  # how many writes were done at which time

    def write(self, *, sync: bool = True) -> None:
        number = self.count + 1
        pwrite(self.tap, number.to_bytes(8, "little") * (BLOCK // 8), number % BLOCKS * BLOCK, sync=sync)
        self.count = number

    def moment(self) -> tuple[int, int]:
        self.moments.append((moment(), self.count))
        return self.moments[-1]

    @staticmethod
    def image(count: int) -> bytes:
        newest = [
            max((n for n in range(count, max(count - BLOCKS, 0), -1) if n % BLOCKS == i), default=0)
            for i in range(BLOCKS)
        ]
        return b"".join(number.to_bytes(8, "little") * (BLOCK // 8) for number in newest)


def test_a_bound_on_the_journal_holds_and_the_past_stays(rig: Rig) -> None:
    """While the disk is written all the time the journal stays about its bound, and images of the past stay right:

    the snapshots, one image that is held open all the time, and what is still in the journal.
    """
    rig.create(size=BLOCK * BLOCKS)
    rig.configure('segment_size = "1MiB"\n[sync]\njournal = "8MiB"\nage = "0s"\nfree = "0%"\n')
    rig.start()
    numbers = Numbers(rig.tap())
    for _ in range(20):
        numbers.write()
    taken: dict[str, int] = {}
    sizes: list[int] = []
    held_at, held_count = numbers.moment()
    with opened(rig.at(held_at), os.O_RDONLY) as held:
        for round_number in range(12):
            for _ in range(40):
                numbers.write()
            if round_number % 4 == 1:
                taken[f"s{round_number}"] = numbers.count
                os.mkdir(rig.mnt / "snapshots" / f"s{round_number}")
            time.sleep(0.5)
            when, count = numbers.moment()
            assert rig.at(when).read_bytes() == numbers.image(count)
            assert os.pread(held, BLOCK * BLOCKS, 0) == numbers.image(held_count)
            sizes.append(rig.status()["forward"]["bytes"])
        status = rig.status()
        assert status["syncs"] >= 2
        # Some 5 MiB are written in the second between two looks, and a segment is freed as a whole.
        assert max(sizes) < (8 + 6 + 2) * MIB < numbers.count * BLOCK
    for name, count in taken.items():
        assert rig.snapshot(name).read_bytes() == numbers.image(count)
    mirror = status["mirror"]["seq"]
    late = [(when, count) for when, count in numbers.moments if count > mirror]
    for when, count in late:
        assert rig.at(when).read_bytes() == numbers.image(count)
    assert snapshots(rig)[0] < "s"  # the first sync by policy kept the mirror's old moment, named by its time
    assert len(snapshots(rig)) == len(taken) + 1
    assert rig.snapshot(snapshots(rig)[0]).read_bytes() == numbers.image(0)
    shown = rig.dmafs("status", rig.store).stdout
    assert re.search(r"syncs .*; last \S+ \(\S+ \S+ \S+\) \(journal size\): mirror at seq \d+", shown), shown
    rig.stop()
    rig.start()
    for name, count in taken.items():
        assert rig.snapshot(name).read_bytes() == numbers.image(count)


def test_a_full_store_is_synced_and_writing_goes_on(rig: Rig) -> None:
    """Where the journal would fill its disk, syncs make space in time, also for more than they have at once."""
    disk = rig.root / "store.disk"
    with disk.open("wb") as file:
        file.truncate(96 * MIB)
    device = rig.attach(disk)
    rig.mkfs(device)
    rig.mount(device, rig.folder("small"))
    rig.store = rig.root / "small" / "store"
    primary = rig.create(size=BLOCK * BLOCKS)
    rig.configure('segment_size = "1MiB"\nreserve = "16MiB"\n')
    rig.start()
    numbers = Numbers(rig.tap())
    while numbers.count < 3000:
        numbers.write(sync=numbers.count % 50 == 0)
    assert numbers.count * BLOCK > 96 * MIB
    assert rig.status()["syncs"] >= 1
    assert rig.dmafs("status", rig.store).returncode == 0, "nothing had to be dropped, so there is no alarm"
    assert rig.live().read_bytes() == numbers.image(numbers.count)
    assert_same(primary, rig.live())
    rig.stop()
    rig.umount(rig.root / "small")


# --- groups


def number_in(path: Path) -> int:
    return int.from_bytes(pread(path, 8, 0), "little")


VOLUMES = ("one", "two", "three")


def in_order(folder: Path) -> bool:
    """Say whether the volumes in a folder are as somebody left them who writes each number to one after the other."""
    one, two, three = (number_in(folder / f"{name}.img") for name in VOLUMES)
    return one >= two >= three >= one - 1


def write_in_order(rig: Rig, done: threading.Event) -> None:
    number = 0
    while not done.is_set():
        number += 1
        for name in VOLUMES:
            pwrite(rig.tap(name), number.to_bytes(8, "little") * 1024, 0, sync=number % 7 == 0)


def assert_groups(rig: Rig) -> None:
    """Compare what each snapshot shows with what its time or name shows, volume by volume."""
    names = snapshots(rig)
    shown = {name: os.listdir(rig.mnt / "snapshots" / name) for name in names}
    groups = [name for name in names if len(shown[name]) == len(VOLUMES)]
    assert {f"s{number}" for number in range(6)} <= set(groups)
    assert len(groups) >= 6 + 3, "those by schedule"
    assert all(in_order(rig.mnt / "snapshots" / name) for name in groups)
    for name in names:  # some are a sync's own, of one volume
        for image in shown[name]:
            assert_same(rig.mnt / "snapshots" / name / image, rig.mnt / "at" / name / image)


def test_a_group_is_one_instant(rig: Rig) -> None:
    """Three volumes written one after the other: no snapshot, no time and no mark has a later one ahead of an earlier.

    Snapshots are taken by schedule and by name while all volumes are synced, by policy and by command. What
    ``snapshots/<id>`` shows, ``at/<id>`` shows too, also after a restart.
    """
    for name in VOLUMES:
        rig.create(name, size=MIB)
    sync = '[sync]\nage = "0s"\njournal = "2MiB"\nfree = "0%"\n'
    rig.configure(f'segment_size = "1MiB"\n[snapshots]\nevery = "1s"\n{sync}')
    rig.start()
    with meanwhile(partial(write_in_order, rig)):
        for number in range(6):
            time.sleep(0.7)
            rig.dmafs("mark", rig.store, f"m{number}")
            assert in_order(rig.mnt / "at" / f"m{number}")
            os.mkdir(rig.mnt / "snapshots" / f"s{number}")
            assert in_order(rig.mnt / "at" / spelled(moment()))
            if number % 3 == 2:
                rig.dmafs("sync", rig.store)
    assert all(rig.status(name)["syncs"] > 2 for name in VOLUMES)
    assert_groups(rig)
    rig.configure("")
    rig.restart()
    assert_groups(rig)
    for identifier in [name for name in snapshots(rig) if name[0] == "2"]:
        os.rmdir(rig.mnt / "snapshots" / identifier)
        assert identifier not in snapshots(rig)


# --- marks


def test_a_mark_is_durable_and_names_a_moment(rig: Rig) -> None:
    """When the command returns the mark outlives a kill; it means all that was written before, flushed or not."""
    rig.allow(REDONE)
    for name in ("one", "two"):
        rig.create(name, size=MIB)
    rig.configure("tick_s = 1000\n")
    rig.start()
    for name in ("one", "two"):
        pwrite(rig.tap(name), name.encode(), 0)
    assert rig.dmafs("mark", rig.store, "here").stdout == "mark here set\n"
    for name in ("one", "two"):
        pwrite(rig.tap(name), b"later", 0)
    rig.kill()
    rig.start()
    for name in ("one", "two"):
        assert pread(rig.at("here", name), 5, 0).rstrip(b"\0") == name.encode()
        assert consistency(rig.at("here", name)) == "exact"
    assert "here" in os.listdir(rig.mnt / "at")
    listed = [re.split(" {2,}", line) for line in rig.dmafs("ls", rig.store).stdout.splitlines()]
    assert [line[1] for line in listed if line[3:] == ["mark", "exact", "here"]] == ["one", "two"]
    rig.dmafs("mark", rig.store, "not/a/name", code=3)
    os.mkdir(rig.mnt / "snapshots" / "taken")
    rig.dmafs("mark", rig.store, "taken", code=7)
    rig.stop()
    rig.dmafs("mark", rig.store, "without-a-daemon")
    rig.start()
    assert pread(rig.at("without-a-daemon", "two"), 5, 0) == b"later"


def test_marks_are_synced_up_to(rig: Rig) -> None:
    """A mark that a pattern matches moves the mirror, others don't."""
    rig.create(size=MIB)
    rig.configure('[sync]\nmarks = ["backup-*"]\n')
    rig.start()
    pwrite(rig.tap(), b"first", 0)
    rig.dmafs("mark", rig.store, "other")
    time.sleep(2.5)
    assert rig.status()["mirror"]["seq"] == 0
    pwrite(rig.tap(), b"second", 4096)
    rig.dmafs("mark", rig.store, "backup-1")
    wait_until(lambda: rig.status()["mirror"]["seq"] == 2, "the sync")
    assert "(mark backup-1)" in rig.dmafs("status", rig.store).stdout


# --- snapshots by schedule


def log_has(rig: Rig, pattern: str) -> Callable[[], Any]:
    return lambda: re.search(pattern, rig.log())


def test_a_frozen_snapshot_needs_no_replay(rig: Rig) -> None:
    """With hooks that freeze and thaw the file system the snapshot of a disk in use is clean; it says so everywhere."""
    rig.allow("hook fsfreeze", "isn't frozen")  # before there is a file system
    rig.create(size=64 * MIB)
    files = rig.folder("files")
    rig.configure(f"""[snapshots]
every = "2s"
before = ["fsfreeze", "--freeze", "{files}"]
after = ["fsfreeze", "--unfreeze", "{files}"]
hook_timeout = "20s"
""")
    rig.start()
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)

    def work(done: threading.Event) -> None:
        number = 0
        while not done.is_set():
            number += 1
            (files / f"{number % 50}").write_bytes(os.urandom(5000 + number))
            if number % 20 == 0:
                os.sync()

    def frozen() -> list[str]:
        return [name for name in snapshots(rig) if name[0] == "2" and consistency(rig.snapshot(name)) == "frozen"]

    with meanwhile(work):
        wait_until(lambda: len(frozen()) >= 2, "two frozen snapshots")
    chosen = frozen()[:2]
    for identifier in chosen:
        done = run("e2fsck", "-f", "-n", rig.snapshot(identifier))
        assert "journal" not in done.stdout.lower(), done.stdout
        assert "needs_recovery" not in run("dumpe2fs", "-h", rig.snapshot(identifier)).stdout
    assert "frozen" in rig.dmafs("ls", rig.store).stdout
    rig.umount(files)
    rig.detach(device)
    rig.configure("")
    rig.restart()
    assert [consistency(rig.snapshot(name)) for name in chosen] == ["frozen"] * 2
    rig.dmafs("sync", rig.store)
    assert [consistency(rig.at(name)) for name in chosen] == ["frozen"] * 2


def test_a_hook_that_hangs_is_killed(rig: Rig) -> None:
    """At the time limit it goes, with its children; the snapshot is taken all the same, and isn't called frozen."""
    rig.allow("hook sh", "isn't frozen")
    rig.create(size=MIB)
    pid = rig.root / "pid"
    environment = rig.root / "environment"
    rig.configure(f"""[snapshots]
every = "1s"
before = ["sh", "-c", "sleep 1000 & echo $! >{pid}; wait; sleep 1000"]
after = ["sh", "-c", "env >{environment}.new; mv {environment}.new {environment}"]
hook_timeout = "1s"
""")
    rig.start()
    wait_until(environment.exists, "the hook after")
    wait_until(log_has(rig, r"took longer than 1 s and was killed"), "the log")
    wait_until(lambda: snapshots(rig), "a snapshot")
    assert consistency(rig.snapshot("latest")) == "exact"
    sleeper = pid.read_text().strip()
    assert run("ps", "-o", "stat=", "-p", sleeper, code=None).stdout[:1] in {"", "Z"}
    found = dict(line.partition("=")[::2] for line in environment.read_text().splitlines())
    assert found["DMAFS_STORE"] == str(rig.store)
    assert found["DMAFS_MOUNT"] == str(rig.mnt)
    assert found["DMAFS_VOLUMES"] == "disk"
    assert planned(rig)["snapshots"]["next"]


def test_the_end_thaws_what_a_hook_has_frozen(rig: Rig) -> None:
    """A daemon that is told to end between the hooks runs ``after`` while the disk can still be written."""
    rig.allow("isn't frozen", "hook sh")
    primary = rig.create(size=64 * MIB)
    files, flag = rig.folder("files"), rig.root / "flag"
    thaw = rig.root / "thaw"
    thaw.write_text(
        f"test -e {flag} || exit 0\nset -e\nfsfreeze -u {files}\necho written >{files}/written\nsync -f {files}\n"
    )
    rig.configure(f"""[snapshots]
every = "1s"
before = ["sh", "-c", "mountpoint -q {files} && fsfreeze -f {files} && touch {flag} && sleep 1000"]
after = ["sh", "{thaw}"]
""")
    rig.start()
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    wait_until(flag.exists, "the freeze")
    rig.stop()
    assert f"hook sh {thaw}" not in rig.log(), "a hook that fails is in the log"
    rig.umount(files, "-l")
    rig.detach(device)
    rig.mount(rig.attach(primary, "--read-only"), rig.folder("left"), "ro,noload")
    assert (rig.root / "left" / "written").read_text() == "written\n"
