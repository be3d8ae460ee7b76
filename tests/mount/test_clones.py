"""Writable clones: real programs write to a moment of the past, and neither that moment nor the disk notices."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.harness import (
    MIB,
    REDONE,
    Rig,
    assert_same,
    fails,
    forget,
    moment,
    opened,
    pread,
    pwrite,
    run,
    spelled,
    wait_until,
)

pytestmark = pytest.mark.mount

SIZE = 64 * MIB
SEED = 11


def clone(rig: Rig, name: str, volume: str = "disk") -> Path:
    return rig.mnt / "clones" / name / f"{volume}.img"


def make(rig: Rig, name: str, when: int | None = None) -> Path:
    """Make a clone of a moment, or of now; return its image."""
    run("mkdir", rig.mnt / "clones" / (name if when is None else f"{name}@{spelled(when)}"))
    return clone(rig, name)


def drop(rig: Rig, name: str) -> None:
    """Drop a clone, once the last user of its loop device is gone."""

    def dropped() -> bool:
        try:
            os.rmdir(rig.mnt / "clones" / name)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    wait_until(dropped, f"clone {name} to be idle", seconds=20)


def stored(rig: Rig, name: str, volume: str = "disk") -> int:
    """Return the bytes that a clone takes in the store."""
    return (rig.store / volume / "clones" / name / "overlay.dat").stat().st_blocks * 512


def digest(fd: int | Path) -> str:
    return os.getxattr(fd, "user.dmafs.digest").decode()


def begun(rig: Rig, *, size: int = SIZE, content: bytes = b"") -> None:
    rig.create(size=size, content=content)
    rig.start()


@contextlib.contextmanager
def meanwhile(act: Callable[[int], None]) -> Iterator[list[int]]:
    """Do something over and over; yields a list whose last number is how often it was done."""
    done = [0]
    ended = threading.Event()
    trouble: list[BaseException] = []

    def work() -> None:
        try:
            while not ended.is_set():
                act(done[-1] + 1)
                done.append(done[-1] + 1)
        except BaseException as error:  # noqa: BLE001 - shown by the test itself
            trouble.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield done
    finally:
        ended.set()
        thread.join()
    assert not trouble, trouble


# -- names -----------------------------------------------------------------------------------------------------------


def test_mkdir_makes_a_clone_under_its_own_name(rig: Rig) -> None:
    """``mkdir clones/x@TIME`` makes ``clones/x``; the name it was made by isn't there; a second time it is taken."""
    begun(rig, content=b"old")
    when = moment()
    pwrite(rig.tap(), b"new", 0, sync=True)
    clones = rig.mnt / "clones"
    assert os.listdir(clones) == []
    made = f"x@{spelled(when)}"
    run("mkdir", clones / made)
    assert os.listdir(clones) == ["x"]
    fails(errno.ENOENT, os.stat, clones / made)
    assert pread(clone(rig, "x"), 3, 0) == b"old"
    for name in ("x", made):
        assert "File exists" in run("mkdir", clones / name, code=1).stderr
    run("mkdir", clones / "present")
    assert pread(clone(rig, "present"), 3, 0) == b"new"
    assert sorted(os.listdir(clones)) == ["present", "x"]
    # -p takes a folder of that name for done, and makes one by a time once; it looks for the name it made.
    run("mkdir", "-p", clones / "x")
    run("mkdir", "-p", clones / f"y@{spelled(when)}")
    run("mkdir", "-p", clones / f"y@{spelled(when)}", code=1)
    assert sorted(os.listdir(clones)) == ["present", "x", "y"]


def test_all_spellings_of_a_time_make_clones(rig: Rig) -> None:
    """Whatever ``at/`` understands may follow the first @, and nothing else."""
    begun(rig, content=b"0")
    for number in (1, 2):
        pwrite(rig.tap(), str(number).encode(), 0, sync=True)
        if number == 1:
            os.mkdir(rig.mnt / "snapshots" / "first")
    canonical = os.readlink(rig.mnt / "at" / "first")
    for number, text in enumerate(["first", canonical, "seq:1", "latest", "first~0s", f"@{time.time() + 0:.3f}~1h"]):
        path = rig.mnt / "clones" / f"c{number}@{text}"
        if text.endswith("~1h"):
            fails(errno.ENOENT, os.mkdir, path)
            continue
        os.mkdir(path)
        assert pread(clone(rig, f"c{number}"), 1, 0) == b"1", text
    for name, code in (
        ("q@nonsense", errno.ENOENT),
        ("q@", errno.ENOENT),
        ("q@seq:77", errno.ENOENT),
        ("@first", errno.EINVAL),
        ("a b@first", errno.EINVAL),
        ("disk.img", errno.EINVAL),
        ("latest", errno.EINVAL),
        ("2026-07-28", errno.EINVAL),
        ("q/r", errno.ENOENT),
    ):
        fails(code, os.mkdir, rig.mnt / "clones" / name)
    fails(errno.EROFS, os.mkdir, rig.mnt / "clones" / "c0" / "more")
    fails(errno.EROFS, os.rmdir, rig.mnt / "clones")
    assert sorted(os.listdir(rig.mnt / "clones")) == ["c0", "c1", "c2", "c3", "c4"]


def test_attributes(rig: Rig) -> None:
    """Mode, size, times, allocation and extended attributes are those of a writable image of a moment."""
    begun(rig, content=random.Random(SEED).randbytes(MIB))
    pwrite(rig.tap(), b"x" * 4096, 0, sync=True)
    path = make(rig, "one", when := moment())
    at = rig.at(when)
    info, past = path.stat(), at.stat()
    assert (oct(info.st_mode), info.st_size) == ("0o100600", SIZE)
    assert info.st_mtime_ns == past.st_mtime_ns == path.parent.stat().st_mtime_ns
    assert info.st_blocks == past.st_blocks
    expected = {name: os.getxattr(at, f"user.dmafs.{name}").decode() for name in ("seq", "time", "volume")}
    found = {name: os.getxattr(path, f"user.dmafs.{name}").decode() for name in ("seq", "time", "volume")}
    assert found == expected
    assert os.getxattr(path, "user.dmafs.consistency") == b"clone"
    fails(errno.ENODATA, os.getxattr, path, "user.dmafs.digest")
    before = time.time_ns()
    pwrite(path, b"y" * 8192, 2 * MIB)
    assert path.stat().st_blocks == past.st_blocks + 16
    assert path.stat().st_mtime_ns >= before - 10**7  # the kernel's clock for files is coarse
    fails(errno.EPERM, os.chmod, path, 0o644)
    os.truncate(path, 0)
    os.truncate(path, SIZE)
    assert pread(path, 3, 2 * MIB) == b"yyy"
    fails(errno.EINVAL, os.truncate, path, SIZE + 512)
    with opened(path, os.O_RDWR) as fd:
        assert os.pwrite(fd, b"z" * 1024, SIZE - 512) == 512, "up to the end, as a disk"
        fails(errno.ENOSPC, os.pwrite, fd, b"z", SIZE)
    run("touch", path)


def test_a_name_used_again_is_another_file(rig: Rig) -> None:
    """After the drop what was listed is gone, and a new clone of the name has another inode and its own bytes."""
    begun(rig, content=b"base")
    path = make(rig, "one")
    pwrite(path, b"mine", 0, sync=True)
    with opened(path.parent, os.O_RDONLY | os.O_DIRECTORY) as folder, opened(path, os.O_PATH) as file:
        assert os.listdir(folder) == ["disk.img"]
        inode = os.fstat(file).st_ino
        drop(rig, "one")
        fails(errno.ENOENT, os.stat, path)
        make(rig, "one")
        assert pread(path, 4, 0) == b"base"
        assert path.stat().st_ino != inode
        fails(errno.ESTALE, os.open, f"/proc/self/fd/{file}", os.O_RDWR)
    assert pread(path, 4, 0) == b"base"


def test_commands(rig: Rig) -> None:
    """``dmafs clone`` makes, lists and drops; without a daemon it lists and drops, and says why it makes none."""
    begun(rig, content=b"old")
    when = moment()
    pwrite(rig.tap(), b"new", 0, sync=True)
    assert rig.dmafs("clone", "create", rig.store, "then", "--at", spelled(when)).stdout == "clone then made\n"
    assert rig.dmafs("clone", "create", rig.store, "present").stdout == "clone present made\n"
    assert [pread(clone(rig, name), 3, 0) for name in ("then", "present")] == [b"old", b"new"]
    pwrite(clone(rig, "present"), b"x", 5000, sync=True)
    with opened(clone(rig, "then"), os.O_RDONLY):
        lines = rig.dmafs("clone", "list", rig.store).stdout.splitlines()
        assert rig.dmafs("clone", "drop", rig.store, "then", code=8).stderr.startswith(
            "dmafs: error: clone then of volume disk is in use\nhint:"
        )
    assert re.fullmatch(r"NAME +TIME +STORED +STATE", lines[0])
    assert re.fullmatch(r"present +\S+Z \(.*\) +4 KiB  closed", lines[1])
    assert re.fullmatch(r"then +\S+Z \(.*\) +0 B  open", lines[2])
    report = json.loads(rig.dmafs("clone", "list", rig.store, "--json").stdout)["clones"]
    assert [(entry["name"], entry["stored_bytes"], entry["volumes"]) for entry in report] == [
        ("present", 4096, {"disk": 1}),
        ("then", 0, {"disk": 0}),
    ]
    assert rig.dmafs("clone", "drop", rig.store, "then").stdout == "clone then dropped\n"
    for arguments, code in (
        (["present"], 7),
        (["x", "--at", "nonsense"], 21),
        (["latest"], 3),
    ):
        rig.dmafs("clone", "create", rig.store, *arguments, code=code)
    rig.dmafs("clone", "drop", rig.store, "x", code=24)
    rig.stop()
    assert "no daemon serves" in rig.dmafs("clone", "create", rig.store, "more", code=10).stderr
    assert "4 KiB" in rig.dmafs("clone", "list", rig.store).stdout
    rig.dmafs("clone", "drop", rig.store, "present")
    assert os.listdir(rig.store / "disk" / "clones") == []


def test_there_are_not_too_many(rig: Rig) -> None:
    """A store has 64 clones at most."""
    begun(rig, size=MIB)
    for number in range(64):
        os.mkdir(rig.mnt / "clones" / f"c{number}")
    rig.allow("mkdir: clone more can't be made: there are 64")
    fails(errno.ENOSPC, os.mkdir, rig.mnt / "clones" / "more")
    drop(rig, "c5")
    os.mkdir(rig.mnt / "clones" / "more")
    assert len(os.listdir(rig.mnt / "clones")) == 64


# -- space -----------------------------------------------------------------------------------------------------------


def test_quota(rig: Rig) -> None:
    """Beyond clone_quota writes fail with ENOSPC; what is there can still be overwritten, and capture goes on."""
    rig.create(size=SIZE)
    (rig.store / "dmafs.conf").write_text('clone_quota = "2MiB"\n')
    rig.start()
    rig.allow("write: clone one of volume disk has reached its quota of 2097152 bytes")
    path = make(rig, "one")
    with opened(path, os.O_RDWR) as fd:
        os.pwrite(fd, b"a" * 2 * MIB, MIB)
        fails(errno.ENOSPC, os.pwrite, fd, b"b", 10 * MIB)
        os.pwrite(fd, b"c" * MIB, 2 * MIB)
        os.fsync(fd)
    pwrite(rig.tap(), b"d" * 4 * MIB, 0, sync=True)
    forget(path)
    assert pread(path, 4 * MIB, 0) == bytes(MIB) + b"a" * MIB + b"c" * MIB + bytes(MIB)
    assert 2 * MIB <= stored(rig, "one") < 3 * MIB


def test_rmdir_frees_the_space(rig: Rig) -> None:
    """An open clone can't be dropped; once it is, its files are gone, and so is the snapshot that kept its moment."""
    begun(rig)
    path = make(rig, "one")
    pwrite(path, random.Random(SEED).randbytes(8 * MIB), 0, sync=True)
    assert stored(rig, "one") >= 8 * MIB
    for _ in range(2):
        pwrite(rig.tap(), os.urandom(MIB), 0, sync=True)
        rig.dmafs("sync", rig.store)
    backward = rig.store / "disk" / "backward"
    run("sh", "-c", f"rmdir {rig.mnt}/snapshots/2*")
    assert os.listdir(backward), "what keeps the clone's moment"
    device = rig.attach(path)
    fails(errno.EBUSY, os.rmdir, path.parent)
    assert path.exists()
    rig.detach(device)
    drop(rig, "one")
    assert os.listdir(rig.store / "disk" / "clones") == []
    wait_until(lambda: not os.listdir(backward), "the drop of what was kept for the clone", seconds=20)


# -- durability ------------------------------------------------------------------------------------------------------


def test_clones_outlive_the_daemon(rig: Rig) -> None:
    """After SIGTERM all that was written is there, after SIGKILL all that was synced; the moment below stays too."""
    rig.allow(REDONE)
    rng = random.Random(SEED)
    begun(rig, content=rng.randbytes(4 * MIB))
    path = make(rig, "one")
    base = rig.root / "base"
    run("cp", "--sparse=always", rig.primary(), base)
    expected = bytearray(base.read_bytes())

    def scribble(*, sync: bool) -> None:
        with opened(path, os.O_RDWR) as fd:
            for _ in range(30):
                data, offset = rng.randbytes(rng.randrange(1, 30000)), rng.randrange(SIZE - 30000)
                os.pwrite(fd, data, offset)
                expected[offset : offset + len(data)] = data
            if sync:
                os.fsync(fd)

    def go_on() -> None:
        pwrite(rig.tap(), rng.randbytes(2 * MIB), rng.randrange(SIZE - 2 * MIB), sync=True)
        rig.dmafs("sync", rig.store)

    scribble(sync=False)
    go_on()
    rig.restart()
    assert path.read_bytes() == expected
    scribble(sync=True)
    go_on()
    rig.kill()
    rig.start()
    assert path.read_bytes() == expected
    scribble(sync=True)
    for name in [name for name in os.listdir(rig.mnt / "snapshots") if name != "latest"]:
        os.rmdir(rig.mnt / "snapshots" / name)
    go_on()
    rig.kill()
    rig.start()
    assert path.read_bytes() == expected
    run("cmp", rig.primary(), rig.live())
    assert os.getxattr(path, "user.dmafs.seq") == b"0"


def test_a_damaged_clone_hurts_nobody(rig: Rig) -> None:
    """The daemon starts, says which clone can't be used, and serves the rest; that one can be listed and dropped."""
    begun(rig, content=b"base")
    for name in ("bad", "good"):
        pwrite(make(rig, name), b"mine", 0, sync=True)
    rig.stop()
    pwrite(rig.store / "disk" / "clones" / "bad" / "overlay.ext", b"?", 100)
    rig.allow("clone bad can't be used", "clone bad of volume disk can't be used")
    rig.start()
    assert rig.log().count("clone bad can't be used: checksum of") == 1
    assert sorted(os.listdir(rig.mnt / "clones")) == ["bad", "good"]
    assert run("ls", "-l", rig.mnt / "clones" / "bad").stdout.endswith("disk.img\n")
    fails(errno.EIO, os.open, clone(rig, "bad"), os.O_RDONLY)
    fails(errno.EIO, os.getxattr, clone(rig, "bad"), "user.dmafs.seq")
    assert "checksum" in rig.dmafs("clone", "list", rig.store).stdout
    assert pread(clone(rig, "good"), 4, 0) == b"mine"
    pwrite(rig.tap(), b"on", 0, sync=True)
    drop(rig, "bad")
    assert os.listdir(rig.store / "disk" / "clones") == ["good"]


def test_two_volumes_at_one_instant(rig: Rig) -> None:
    """A clone has each volume as it was at the same moment, however they are written meanwhile."""
    for volume in ("a", "b"):
        rig.create(volume, size=MIB)
    rig.start()

    def write(number: int) -> None:
        for volume in ("a", "b"):
            pwrite(rig.tap(volume), number.to_bytes(8, "little"), 0, sync=True)

    moments = []
    with meanwhile(write) as done:
        for number in range(6):
            wait_until(lambda: done[-1] > 3, "some writes")
            moments.append(moment())
            os.mkdir(rig.mnt / "clones" / (f"c{number}" if number % 2 else f"c{number}@{spelled(moments[-1])}"))
    for number, when in enumerate(moments):
        a, b = (int.from_bytes(pread(clone(rig, f"c{number}", volume), 8, 0), "little") for volume in ("a", "b"))
        assert a - 1 <= b <= a
        if number % 2 == 0:
            for volume in ("a", "b"):
                assert_same(rig.at(when, volume), clone(rig, f"c{number}", volume))
    pwrite(clone(rig, "c0", "a"), b"mine", 0, sync=True)
    assert pread(clone(rig, "c1", "a"), 4, 0) != b"mine"
    fds = os.open(clone(rig, "c0", "b"), os.O_RDONLY)
    fails(errno.EBUSY, os.rmdir, rig.mnt / "clones" / "c0")
    assert pread(clone(rig, "c0", "a"), 4, 0) == b"mine", "dropped as a whole or not at all"
    os.close(fds)
    drop(rig, "c0")


# -- real programs ---------------------------------------------------------------------------------------------------


def needs_recovery(device: str) -> bool:
    return "needs_recovery" in run("dumpe2fs", "-h", device).stdout


def test_ext4_replays_its_journal(rig: Rig) -> None:
    """A moment in the middle of writing, without a freeze: mounting replays the journal, and e2fsck repairs another."""
    files, past = rig.folder("files"), rig.folder("past")
    rng = random.Random(SEED)
    begun(rig, size=128 * MIB)
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    contents = {f"kept.{number}": rng.randbytes(rng.randrange(1, MIB)) for number in range(10)}
    for name, content in contents.items():
        (files / name).write_bytes(content)
    run("sync", "-f", files)

    def write(number: int) -> None:
        path = files / f"busy.{number % 40}"
        path.unlink(missing_ok=True)
        path.write_bytes(rng.randbytes(rng.randrange(1, MIB // 2)))
        if number % 7 == 0:
            run("sync", "-f", files)

    with meanwhile(write) as done:
        wait_until(lambda: done[-1] > 30, "some writes")
        when = moment()
        wait_until(lambda: done[-1] > 60, "more writes")
        one, two = make(rig, "one", when), make(rig, "two", when)
        with rig.at(when).open("rb") as held:
            before = digest(held.fileno())
            clone_device = rig.attach(one)
            assert needs_recovery(clone_device), "the moment lies in the middle of the work"
            rig.mount(clone_device, past)
            for name, content in contents.items():
                assert (past / name).read_bytes() == content
            (past / "mine").write_bytes(b"mine" * 100_000)
            rig.dmafs("sync", rig.store)
            rig.umount(past)
            assert not needs_recovery(clone_device)
            run("e2fsck", "-fn", clone_device)
            rig.detach(clone_device)
            assert run("e2fsck", "-fy", two, code=None).returncode in {0, 1}
            run("e2fsck", "-fn", two)
            forget(one)
            rig.mount(second := rig.attach(one), past)
            assert (past / "mine").read_bytes() == b"mine" * 100_000
            rig.umount(past)
            rig.detach(second)
            assert digest(held.fileno()) == before, "the moment itself is as it was"
    rig.umount(files)
    rig.detach(device)
    assert_same(rig.primary(), rig.live())
    drop(rig, "one")
    drop(rig, "two")


class Postgres:
    """A server of its own over a data directory: as the user postgres, reachable by a socket in the scratch folder."""

    BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    USER = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--inh-caps=-all")

    def __init__(self, rig: Rig, name: str, data: Path, port: int) -> None:
        self._sockets = rig.folder(f"sockets.{name}")
        run("chown", "postgres:", self._sockets)
        self._data, self._port = data, port
        self._log = self._sockets / "log"

    def tool(self, name: str, *arguments: str | Path, code: int | None = 0) -> str:
        """Run one of PostgreSQL's programs; return what it prints."""
        env = {"LC_ALL": "C", "HOME": str(self._sockets), "PGHOST": str(self._sockets), "PGPORT": str(self._port)}
        return run(*self.USER, self.BIN / name, *arguments, code=code, env=env).stdout

    def sql(self, text: str) -> str:
        return self.tool("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-c", text).strip()

    def initialise(self) -> None:
        options = ("-A", "trust", "-E", "UTF8", "--locale=C", "--data-checksums", "--wal-segsize=1")
        self.tool("initdb", "-D", self._data, *options)

    def start(self) -> None:
        options = f"-k {self._sockets} -p {self._port} -c listen_addresses='' -c shared_buffers=16MB"
        self.tool("pg_ctl", "-D", self._data, "-l", self._log, "-w", "-t", "60", "-o", options, "start")

    def stop(self) -> None:
        self.tool("pg_ctl", "-D", self._data, "-w", "-m", "fast", "stop")

    def log(self) -> str:
        return self._log.read_text()


@contextlib.contextmanager
def running(server: Postgres) -> Iterator[Postgres]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


def test_postgresql_starts_on_a_moment(rig: Rig) -> None:
    """A second server starts on a clone of a moment under load: each row committed before is there, and all agrees."""
    rig.root.chmod(0o711)  # the servers aren't root's
    files, past = rig.folder("files"), rig.folder("past")
    begun(rig, size=320 * MIB)
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    (files / "data").mkdir(mode=0o700)
    run("chown", "postgres:", files / "data")
    first = Postgres(rig, "first", files / "data", 54321)
    first.initialise()
    with running(first):
        first.tool("pgbench", "-i", "-q", "postgres")
        first.sql("create table rows (id serial primary key, filler text)")

        def insert(_number: int) -> None:
            first.sql("insert into rows (filler) values (repeat('x', 2000))")

        def load(_number: int) -> None:
            first.tool("pgbench", "-c", "3", "-t", "100", "-n", "postgres")

        with meanwhile(insert) as committed, meanwhile(load) as loads:
            wait_until(lambda: committed[-1] >= 20 and loads[-1] >= 2, "some transactions")
            rows, when = committed[-1], moment()
            wait_until(lambda: committed[-1] >= rows + 20, "more transactions")
            with rig.at(when).open("rb") as held:
                before = digest(held.fileno())
                image = make(rig, "pg", when)
                _start_and_check(rig, image, past, rows, most=committed[-1])
                rig.dmafs("sync", rig.store)
                assert digest(held.fileno()) == before, "the moment itself is as it was"
        assert int(first.sql("select count(*) from rows")) >= rows + 20
    rig.umount(files)
    rig.detach(device)
    assert_same(rig.primary(), rig.live())
    drop(rig, "pg")


def _start_and_check(rig: Rig, image: Path, past: Path, rows: int, most: int) -> None:
    """Start a server on a clone, look at everything, write, and start it once more."""
    device = rig.attach(image)
    rig.mount(device, past)
    (past / "data" / "postmaster.pid").unlink()  # names a process that lives: the other server's
    second = Postgres(rig, "second", past / "data", 54322)
    with running(second):
        assert "automatic recovery in progress" in second.log()
        count, last = map(int, second.sql("select count(*), max(id) from rows").split("|"))
        assert rows <= count == last < most, "no committed row is missing, and none is from later"
        sums = (
            "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
            "(select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history)"
        )
        assert len(set(second.sql(sums).split("|"))) == 1, "transactions are there wholly or not at all"
        second.tool("pg_amcheck", "--install-missing", "-a")
        second.sql("insert into rows (filler) select 'clone' from generate_series(1, 1000)")
        second.tool("pgbench", "-c", "2", "-t", "50", "-n", "postgres")
    second.tool("pg_checksums", "--check", "-D", past / "data")
    rig.umount(past)
    run("e2fsck", "-fn", device)
    rig.mount(device, past)
    with running(second):
        assert second.sql("select count(*) from rows where filler = 'clone'") == "1000"
    rig.umount(past)
    rig.detach(device)
