"""Clients that mean harm, or know no better: they get an error of the file system's, and nobody else notices.

After each of them the mount is there, the live image is what it has to be, and the tap still captures (``unharmed``).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from dmafs.tree.operations import DIGESTS_MAX, HANDLES_MAX
from tests.mount.harness import MIB, Rig, fails, forget, is_mounted, opened, pread, pwrite, spelled, wait_until

pytestmark = [pytest.mark.mount]

SIZE: Final = 16 * MIB
SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
EVENTS: Final = 3000
GROWTH_MAX: Final = 48 * MIB
"""What one of these clients may cost the daemon while it is at it."""

REFUSALS: Final = {
    errno.ENOENT,
    errno.EROFS,
    errno.EINVAL,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EISDIR,
    errno.EEXIST,
    errno.EPERM,
    errno.ENOTEMPTY,
    errno.EXDEV,
    errno.EBUSY,
    errno.ENODATA,
    errno.EOPNOTSUPP,
    errno.ELOOP,
}
"""What an operation on a name may be answered; EIO isn't among them."""


class Attacked:
    """A rig with a history of thousands of writes, and what its disk has to be."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.random = random.Random(SEED)
        self.model = bytearray(SIZE)
        self.times: list[int] = []

    def prepare(self) -> None:
        rig = self.rig
        rig.create(size=SIZE)
        rig.start()
        for number in range(EVENTS):
            self.write(number.to_bytes(4, "big") * 128, number * 4096 % SIZE)
            if number % 500 == 0:
                (rig.mnt / "snapshots" / f"kept{number}").mkdir()
        self.write(b"last", 0, sync=True)
        self.kept = rig.snapshot("kept500").read_bytes()

    def write(self, data: bytes, offset: int, *, sync: bool = False) -> None:
        pwrite(self.rig.tap(), data, offset, sync=sync)
        self.model[offset : offset + len(data)] = data

    def memory(self) -> int:
        """Return the bytes of memory that the daemon has in use."""
        assert self.rig.daemon is not None
        lines = Path(f"/proc/{self.rig.daemon.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))

    @contextlib.contextmanager
    def unharmed(self, *, growth: int = GROWTH_MAX) -> Iterator[None]:
        """Whatever happens within: afterwards all is there, in bounded memory."""
        before = self.memory()
        yield
        assert self.memory() - before < growth
        assert self.rig.daemon is not None
        assert self.rig.daemon.poll() is None
        assert is_mounted(self.rig.mnt)
        self.write(self.random.randbytes(512), self.random.randrange(SIZE // 512) * 512, sync=True)
        assert self.rig.live().read_bytes() == self.model
        forget(self.rig.snapshot("kept500"))
        assert self.rig.snapshot("kept500").read_bytes() == self.kept
        assert self.rig.status()["state"] == "protected"
        assert not self.rig.trouble()


@pytest.fixture(scope="module")
def attacked() -> Iterator[Attacked]:
    """One daemon for all: it has to survive all of them, one after the other."""
    with Rig() as rig:
        attacked = Attacked(rig)
        attacked.prepare()
        yield attacked


def attempt(operation: Callable[..., object], *arguments: object) -> int:
    """Return the errno that something ends with, or 0."""
    try:
        operation(*arguments)
    except OSError as error:
        return error.errno or 0
    return 0


# --- names


GOOD: Final = [b"@1785249005.25", b"2026-07-28T143005.123456789Z", b"seq:7", b"2h ago", b"kept0~5min", b"today 14:00"]


def noise(rng: random.Random) -> bytes:
    name = bytearray(rng.choice(GOOD))
    for _ in range(rng.randrange(1, 4)):
        name[rng.randrange(len(name))] = rng.randrange(1, 256)
    return bytes(name)


NAMES: Final[list[Callable[[random.Random], bytes]]] = [
    noise,
    lambda rng: rng.randbytes(rng.randrange(1, 256)),
    lambda rng: rng.choice([b"x", b"9", b"\xff", "é".encode(), b" ", b"."]) * rng.randrange(200, 1100),
    lambda rng: b"/".join(rng.choice([b"..", b".", b"", b"...", b"kept0", b"disk.img", b"x"]) for _ in range(9)),
    lambda rng: b"%s%d%s" % (rng.choice([b"@", b"seq:", b"", b"-"]), 10 ** rng.randrange(240), rng.choice(GOOD)),
    lambda rng: b"%dw%dd ago" % (10 ** rng.randrange(100), rng.getrandbits(200)),
    lambda rng: "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(rng.randrange(1, 85))).encode(),
    lambda rng: rng.choice(GOOD) + b"~" * rng.randrange(3) + b"%dh" % rng.getrandbits(rng.randrange(1, 400)),
]
"""Names, or several in one, that nobody would use: noise, too long, dots, slashes, other scripts, huge numbers."""


def hostile_name(rng: random.Random) -> bytes:
    return rng.choice(NAMES)(rng)


def test_thousands_of_hostile_names(attacked: Attacked) -> None:
    """In every folder, with everything that takes a name: a refusal, and nothing is made, changed or remembered."""
    rng, mnt = attacked.random, os.fsencode(attacked.rig.mnt)
    folders = [b"", b"/at", b"/snapshots", b"/clones", b"/live", b"/tap", b"/at/kept0", b"/snapshots/kept0"]
    operations: list[Callable[[bytes], object]] = [
        os.lstat,
        os.stat,
        os.readlink,
        os.listdir,
        os.unlink,
        os.mkdir,
        os.mkfifo,
        lambda path: os.rmdir(path + b"\xff"),
        lambda path: os.close(os.open(path, os.O_RDONLY)),
        lambda path: os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR),
        lambda path: os.rename(path, path + b"x"),
        lambda path: os.rename(mnt + b"/snapshots/kept0", path),
        lambda path: os.symlink(b"/etc/passwd", path),
        lambda path: os.link(mnt + b"/tap/disk.img", path),
        lambda path: os.chmod(path + b"\xff", 0o777),
        lambda path: os.chown(path + b"\xff", 1, 1),
        lambda path: os.truncate(path + b"\xff", 0),
        lambda path: os.utime(path + b"\xff"),
        lambda path: os.setxattr(path + b"\xff", b"user.x", b"y"),
        lambda path: os.getxattr(path, path[-200:].replace(b"/", b"_")),
    ]
    seen: dict[int, int] = {}
    with attacked.unharmed():
        for number in range(12_000):
            path = mnt + rng.choice(folders) + b"/" + hostile_name(rng).replace(b"\0", b"_")
            if b"/.." in path or b"../" in path:
                operation = operations[number % 4]  # it may lead out of the tree: only looked at
            else:
                operation = operations[number % len(operations)]
            code = attempt(operation, path)
            seen[code] = seen.get(code, 0) + 1
        assert set(seen) - {0} <= REFUSALS, {errno.errorcode[code] for code in set(seen) - REFUSALS - {0}}
        assert seen[errno.ENOENT] > 1000
        for made in os.listdir(mnt + b"/snapshots"):  # noise may be a good name by chance
            if not made.startswith(b"kept") and made != b"latest":
                os.rmdir(mnt + b"/snapshots/" + made)
        for made in os.listdir(mnt + b"/clones"):
            os.rmdir(mnt + b"/clones/" + made)


def test_thousands_of_spellings_are_not_remembered(attacked: Attacked) -> None:
    """Each time a look-up finds a moment by another spelling: the daemon forgets it when the kernel has."""
    at = attacked.rig.mnt / "at"
    now = time.time_ns()
    with attacked.unharmed():
        for number in range(10_000):
            os.lstat(at / spelled(now - number))


# --- offsets and sizes

NUMBERS: Final = sorted(
    {sign * (1 << bit) + near for bit in (0, 9, 12, 24, 31, 32, 62, 63) for near in (-1, 0, 1) for sign in (1, -1)}
    | {SIZE, SIZE - 1, SIZE + 1, SIZE - 4096, (1 << 63) - 4096}
)
IN_RANGE: Final = [number for number in NUMBERS if -(1 << 63) <= number < 1 << 63]


FIBMAP = 1
NUMBER_REFUSALS: Final = REFUSALS | {
    0,
    errno.EACCES,
    errno.EBADF,
    errno.EFBIG,
    errno.ENODEV,
    errno.ENOSPC,
    errno.ENOTTY,
    errno.ENXIO,
    errno.EOVERFLOW,
    errno.ERANGE,
}


def check_reads(fd: int, content: bytes, offset: int) -> None:
    """Read what is there and nothing else, from anywhere."""
    for length in (0, 1, 511, 4097, MIB + 1):
        code = attempt(os.pread, fd, length, offset)
        if code == 0:
            assert offset >= 0
            assert os.pread(fd, length, offset) == content[offset : offset + length]
        else:
            assert code in {errno.EINVAL, errno.EOVERFLOW}, (offset, length)


def test_odd_offsets_and_sizes(attacked: Attacked) -> None:
    """Reads give what is there, and nothing behind the end; all else is refused or does nothing."""
    rig = attacked.rig
    tap = bytes(attacked.model)
    places = {rig.snapshot("kept500"): attacked.kept, rig.live(): tap, rig.tap(): tap}
    with attacked.unharmed():
        for path, content in places.items():
            with opened(path, os.O_RDONLY) as fd:
                for offset in IN_RANGE:
                    check_reads(fd, content, offset)
                    codes = [attempt(os.lseek, fd, offset, how) for how in range(5)]
                    codes.append(attempt(os.posix_fallocate, fd, offset, 4096))
                    codes.append(attempt(os.truncate, path, offset))
                    codes.append(attempt(os.posix_fadvise, fd, max(offset, 0), 4096, os.POSIX_FADV_WILLNEED))
                    assert set(codes) <= NUMBER_REFUSALS, (path, offset, codes)
                assert attempt(fcntl.ioctl, fd, FIBMAP, bytes(64)) in NUMBER_REFUSALS  # a kernel may say: nowhere
                for request in (0, 0x1261, 0x4C00, 0x5401, 0x80081272, 0xC0045878):
                    assert attempt(fcntl.ioctl, fd, request, bytes(64)) in NUMBER_REFUSALS - {0}
        with opened(rig.tap(), os.O_RDWR) as fd:
            for offset in (SIZE, SIZE + 1, 1 << 32, (1 << 62), (1 << 63) - 4096, (1 << 63) - 1, -1):
                assert attempt(os.pwrite, fd, b"beyond", offset) in {errno.ENOSPC, errno.EFBIG, errno.EINVAL}, offset
            assert attempt(os.pwrite, fd, b"", SIZE) == 0


def test_odd_attributes(attacked: Attacked) -> None:
    """Extended attributes of any name and length are neither there nor taken, nor taken away."""
    rig = attacked.rig
    names = [
        "user.dmafs.",
        "user.dmafs.seq.",
        "user." + "x" * 250,
        "security.x",
        "trusted.x",
        "system.posix_acl_access",
    ]
    with attacked.unharmed():
        for path in (rig.mnt, rig.mnt / "at", rig.snapshot("kept500"), rig.live(), rig.tap()):
            for name in names:
                codes = [attempt(os.getxattr, path, name), attempt(os.removexattr, path, name)]
                codes += [attempt(os.setxattr, path, name, b"v" * length) for length in (0, 1, 60_000)]
                assert set(codes) <= NUMBER_REFUSALS - {0}, (path, name, codes)


# --- many at once


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Let this process have as many open files as the daemon gives, and more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    assert before[1] > HANDLES_MAX + 1000, "the limit of open files (ulimit -Hn) is too low for this test"
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_open_handles_are_bounded(attacked: Attacked) -> None:
    """Every moment there is, open many times over: at the limit it is ENFILE, but not for the disk itself."""
    rig = attacked.rig
    fds: list[int] = []
    newest = rig.status()["newest"]["seq"]
    with attacked.unharmed(growth=4 * GROWTH_MAX), many_files():
        before = attacked.memory()
        try:
            code = 0
            for number in range(HANDLES_MAX + 1):
                path = rig.at(f"seq:{1 + number % newest}") if number % 4 else rig.snapshot("kept500")
                try:
                    fds.append(os.open(path, os.O_RDONLY))
                except OSError as error:
                    code = error.errno or 0
                    break
            assert code == errno.ENFILE
            assert HANDLES_MAX - 10 <= len(fds) <= HANDLES_MAX
            for fd in attacked.random.sample(fds, 200):
                assert len(os.pread(fd, 4096, attacked.random.randrange(SIZE // 4096) * 4096)) == 4096
            print(f"{len(fds)} handles of {newest} images: {(attacked.memory() - before) >> 20} MiB")
            fails(errno.ENFILE, os.listdir, rig.mnt / "at")
            attacked.write(b"the disk goes on", 8192, sync=True)
            assert pread(rig.tap(), 16, 8192) == b"the disk goes on"
        finally:
            for fd in fds:
                os.close(fd)
        wait_until(lambda: attempt(os.listdir, rig.mnt / "at") == 0, "handles to be free again")


def test_open_listings_are_bounded(attacked: Attacked) -> None:
    """A folder that is opened again and again without being closed costs no more than a limit of entries."""
    rig = attacked.rig
    fds: list[int] = []
    code = 0
    with attacked.unharmed(growth=2 * GROWTH_MAX), many_files():
        try:
            while not code and len(fds) <= HANDLES_MAX:
                try:
                    fds.append(os.open(rig.mnt / "at", os.O_RDONLY | os.O_DIRECTORY))
                except OSError as error:
                    code = error.errno or 0
            assert code == errno.ENFILE
            assert rig.live().stat().st_size == SIZE
        finally:
            for fd in fds:
                os.close(fd)
        wait_until(lambda: attempt(os.listdir, rig.mnt / "at") == 0, "listings to be free again")


def test_digests_do_not_hold_up_others(attacked: Attacked) -> None:
    """Dozens who ask for digests: some get one, the others are told to come again, and the disk answers meanwhile."""
    rig = attacked.rig
    codes: list[int] = []

    def ask(number: int) -> None:
        codes.append(attempt(os.getxattr, rig.at(f"seq:{1 + number}"), "user.dmafs.digest"))

    with attacked.unharmed():
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
        for thread in threads:
            thread.start()
        for number in range(20):
            attacked.write(b"meanwhile", number * 4096, sync=True)
        for thread in threads:
            thread.join(60)
        assert len(codes) == 64
        assert set(codes) <= {0, errno.EBUSY}
        assert codes.count(0) >= DIGESTS_MAX


def test_readers_that_are_killed(attacked: Attacked) -> None:
    """Processes that read, list and write everywhere are killed in the midst of it, again and again."""
    rig = attacked.rig
    program = """
        import os, random, sys
        rng, mnt = random.Random(int(sys.argv[2])), sys.argv[1]
        fds = [os.open(f"{mnt}/{name}", os.O_RDONLY) for name in ("live/disk.img", "snapshots/kept500/disk.img")]
        print("begun", flush=True)
        while True:
            os.preadv(rng.choice(fds), [bytearray(rng.choice([512, 4096, 1 << 20]))], rng.randrange(1 << 24))
            os.listdir(mnt + "/at")
            fd = os.open(f"{mnt}/at/seq:{rng.randrange(1, 3000)}/disk.img", os.O_RDONLY)
            os.pread(fd, 1 << 20, rng.randrange(1 << 24))
            os.close(fd)
    """
    with attacked.unharmed():
        for round_ in range(6):
            readers = [
                subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(program), rig.mnt, str(round_ * 8 + number)],
                    stdout=subprocess.PIPE,
                )
                for number in range(4)
            ]
            for reader in readers:
                assert reader.stdout is not None
                assert reader.stdout.readline() == b"begun\n"
            attacked.write(b"beside them", round_ * 4096, sync=True)
            for reader in readers:
                reader.kill()
                assert reader.wait(30) == -signal.SIGKILL
                assert reader.stdout is not None
                reader.stdout.close()


# --- changes everywhere


def test_every_change_of_every_node(attacked: Attacked) -> None:
    """What isn't meant to be changed can't be, whichever way it is tried; the errno is a refusal's."""
    rig = attacked.rig
    mnt = rig.mnt
    (mnt / "clones" / "one").mkdir()
    nodes = [mnt, *(mnt / top for top in os.listdir(mnt)), mnt / "at/kept0", mnt / "at/kept0/disk.img"]
    nodes += [mnt / "snapshots/latest", mnt / "snapshots/kept0/disk.img", rig.live(), rig.tap()]
    nodes += [mnt / "clones/one", mnt / "clones/one/disk.img"]
    changes: list[Callable[[Path], object]] = [
        lambda path: os.mkdir(path / "a b"),
        os.rmdir,
        lambda path: os.rename(path, mnt / "moved"),
        lambda path: os.rename(path, rig.root / "moved"),
        lambda path: os.rename(rig.tap(), path),
        os.unlink,
        lambda path: os.symlink("/etc/passwd", path / "link"),
        lambda path: os.link(rig.live(), path / "link"),
        lambda path: os.chmod(path, 0o4777),
        lambda path: os.chown(path, 1, 1),
        lambda path: os.setxattr(path, "user.dmafs.seq", b"1"),
        lambda path: os.removexattr(path, "user.dmafs.seq"),
        lambda path: os.truncate(path, 1),
        lambda path: os.mknod(path / "node"),
        lambda path: os.open(path / "file", os.O_CREAT | os.O_RDWR),
        lambda path: os.open(path, os.O_TMPFILE | os.O_RDWR),
    ]
    with attacked.unharmed():
        for node in nodes:
            for number, change in enumerate(changes):
                if (number, node) in {(1, mnt / "clones/one"), (4, rig.tap())}:
                    continue  # that is how a clone is dropped; and to rename a file to itself does nothing
                code = attempt(change, node)
                assert code in REFUSALS, (number, node, errno.errorcode.get(code))
        assert sorted(os.listdir(mnt)) == ["at", "clones", "live", "snapshots", "tap"]
        (mnt / "clones" / "one").rmdir()
