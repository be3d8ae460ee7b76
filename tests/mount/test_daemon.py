"""The daemon's life: ending, being killed, starting again, one per store, and what it and the commands refuse."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.mount.harness import (
    DMAFS,
    MIB,
    REDONE,
    Rig,
    assert_same,
    is_mounted,
    moment,
    pread,
    pwrite,
    run,
    spelled,
    wait_until,
)

pytestmark = pytest.mark.mount

SIZE = 16 * MIB
BLOCK = 4096
SEED = 11


class Loader(threading.Thread):
    """Writes numbered blocks through the tap, each to its own place; *flushed* are those whose fsync has returned."""

    def __init__(self, rig: Rig, *, blocks: int, flush_every: int) -> None:
        super().__init__(daemon=True)
        self._path = rig.tap()
        self._flush_every = flush_every
        self._blocks = blocks
        self._order = random.Random(SEED).sample(range(blocks), blocks)
        self.flushed: list[int] = []
        self.error: OSError | None = None
        self._asked_to_end = threading.Event()

    @staticmethod
    def block(number: int) -> bytes:
        return (f"block {number} ".encode() * 600)[:BLOCK]

    def run(self) -> None:
        """Write until the daemon is gone or all is written."""
        pending: list[int] = []
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for number in self._order:
                    os.pwrite(fd, self.block(number), number * BLOCK)
                    pending.append(number)
                    if len(pending) == self._flush_every:
                        os.fsync(fd)
                        self.flushed += pending
                        pending = []
                    if self._asked_to_end.is_set():
                        return
            finally:
                os.close(fd)
        except OSError as error:
            self.error = error

    def wait_flushed(self, count: int) -> None:
        """Wait until at least so many blocks are flushed."""
        wait_until(lambda: len(self.flushed) >= count, "flushed writes")

    def end(self) -> None:
        """Wait until it has ended."""
        self._asked_to_end.set()
        self.join(30)
        assert not self.is_alive()

    def assert_kept(self, *places: Path) -> None:
        """Assert that all that was flushed is in each file."""
        assert self.flushed
        for place in places:
            with place.open("rb") as file:
                for number in self.flushed:
                    assert os.pread(file.fileno(), BLOCK, number * BLOCK) == self.block(number), (place, number)


# --- ending


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_daemon_in_order(rig: Rig, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end with exit code 0, unmounted, without socket, with every write on the primary."""
    rig.create()
    rig.start()
    assert stat.S_IMODE((rig.store / "control.sock").stat().st_mode) == 0o600
    pwrite(rig.tap(), b"unflushed", 1000)
    rig.stop(number)
    assert not (rig.store / "control.sock").exists()
    assert pread(rig.primary(), 9, 1000) == b"unflushed"
    assert (
        rig.dmafs("read", rig.store, "disk", "--at", "0s ago", "--offset", "1000", "--length", "9").stdout
        == "unflushed"
    )


def test_unmounting_ends_the_daemon(rig: Rig) -> None:
    """Umount from outside ends the daemon like a signal."""
    rig.create()
    rig.start()
    daemon = rig.daemon
    assert daemon is not None
    run("umount", rig.mnt)
    assert daemon.wait(30) == 0
    rig.daemon = None
    rig.start()


def test_a_loop_device_does_not_keep_the_daemon(rig: Rig) -> None:
    """With a loop device, a filesystem and an open file still on it, the daemon ends in order; the next one serves."""
    rig.create(size=64 * MIB)
    rig.start()
    files, past = rig.folder("files"), rig.folder("past")
    device = rig.attach(rig.tap())
    rig.mkfs(device)
    rig.mount(device, files)
    (files / "content").write_bytes(b"content")
    run("sync", "-f", files)
    when = moment()
    past_device = rig.attach(rig.at(when), "-r")
    rig.mount(past_device, past, "ro,noload")
    held = os.open(rig.at(when), os.O_RDONLY)
    try:
        rig.stop()
    finally:
        with contextlib.suppress(OSError):
            os.close(held)
    for folder in (past, files):
        rig.umount(folder, "-l")
    for name in (past_device, device):
        rig.detach(name)
    rig.start()
    assert_same(rig.primary(), rig.live())
    run("e2fsck", "-fy", rig.primary(), code=None)
    run("e2fsck", "-fn", rig.primary())


def test_mounts_of_any_name_do_not_matter(rig: Rig) -> None:
    """A mount elsewhere on the machine whose name isn't UTF-8, or has line breaks in it, hinders nothing."""
    folder = Path(os.fsdecode(os.fsencode(rig.root) + b"/\xff\xfe \xe2\x80\xa8\x0c\n\\"))
    folder.mkdir()
    rig.mkfs(device := rig.attach(source(rig, "other", 16 * MIB)))
    rig.mount(device, folder)
    done = rig.dmafs("create", rig.store, "--source", device, code=5)
    assert "is mounted read-write" in done.stderr
    rig.create()
    rig.start()
    rig.kill()
    rig.start()
    rig.stop()
    rig.umount(folder)
    rig.detach(device)


# --- being killed


def test_a_killed_daemon_loses_nothing_flushed(rig: Rig) -> None:
    """Kill -9 under load, three times: the next daemon clears the stale mount, and what was flushed is everywhere."""
    rig.allow(REDONE)
    rig.create(size=64 * MIB)
    for _ in range(3):
        rig.start()
        loader = Loader(rig, blocks=SIZE // BLOCK, flush_every=3)
        loader.start()
        loader.wait_flushed(60)
        rig.kill()
        loader.end()
        assert loader.error is not None, "the daemon was killed while it was written to"
        rig.start()
        assert_same(rig.primary(), rig.live())
        loader.assert_kept(rig.live(), rig.primary(), rig.at("0s ago"))
        pwrite(rig.tap(), b"\xff" * SIZE, 0)
        rig.stop()


def test_unflushed_writes_are_written_to_the_primary_again(rig: Rig) -> None:
    """What was in the journal and not yet flushed when the daemon was killed is on the primary after the next start."""
    rig.allow(REDONE)
    primary = rig.create()
    rig.configure("tick_s = 1000\n")
    rig.start()
    pwrite(rig.tap(), b"new" * 1000, 5000)
    rig.kill()
    # As if the machine's cache had not got it to the primary: the journal alone has it.
    pwrite(primary, bytes(3000), 5000)
    rig.start()
    assert "events written to its source again" in rig.log()
    assert pread(primary, 3000, 5000) == b"new" * 1000
    assert_same(primary, rig.live())


def test_a_dead_mount_is_cleared(rig: Rig) -> None:
    """A mount left by a killed daemon, with a user still in it, doesn't hinder the next daemon."""
    rig.create()
    rig.start()
    held = os.open(rig.live(), os.O_RDONLY)
    rig.kill()
    rig.start()
    with contextlib.suppress(OSError):
        os.close(held)
    assert sum(line.split()[4] == str(rig.mnt) for line in Path("/proc/self/mountinfo").read_text().splitlines()) == 1
    assert rig.live().stat().st_size == SIZE


def without_daemon(rig: Rig) -> dict[str, Any]:
    """Ask for the status of the only volume while no daemon runs."""
    report: dict[str, Any] = json.loads(rig.dmafs("status", rig.store, "--json").stdout)
    assert report["daemon"] is None
    volume: dict[str, Any] = report["volumes"][0]
    return volume


def wait_copied(rig: Rig, fraction: float) -> None:
    """Wait until so much of the initial copy is done."""
    wait_until(lambda: rig.status()["copy_fraction"] >= fraction, "the copy to go on", every=0.005)


@pytest.mark.slow
def test_an_interrupted_initial_copy_goes_on(rig: Rig) -> None:
    """Kill -9 and then SIGTERM in the midst of the copy of a full source: it goes on where it was, and ends exact.

    Meanwhile the tap is written to; nothing of the past can be had before the copy's end.
    """
    rig.allow(REDONE)
    size = 1024 * MIB
    primary = rig.primary()
    rng = random.Random(SEED)
    part = rng.randbytes(MIB)
    with primary.open("wb") as file:
        for number in range(size // MIB):
            file.write(number.to_bytes(8, "little") + part[8:])
    rig.dmafs("create", rig.store, "--source", primary)
    loaders = []
    positions = [0.0]
    for end in (rig.kill, rig.stop):
        rig.start(protected=False)
        loader = Loader(rig, blocks=200 * MIB // BLOCK, flush_every=8)
        loader.start()
        loaders.append(loader)
        wait_copied(rig, positions[-1] + 0.3)  # a position is saved every 256 MiB
        shown = os.listdir(rig.mnt / "live"), os.listdir(rig.mnt / "at")
        end()  # at once: the copy goes on, and takes a second or two
        loader.end()
        assert shown == ([], [])
        assert loader.flushed
        stopped = without_daemon(rig)
        assert stopped["state"] == "copying"
        assert stopped["copy_fraction"] > positions[-1], "something of the copy was kept"
        positions.append(stopped["copy_fraction"])
    assert positions[-1] < 1
    rig.start(protected=False)
    assert rig.status()["copy_fraction"] >= positions[-1]
    loader = Loader(rig, blocks=200 * MIB // BLOCK, flush_every=8)
    loader.start()
    rig.wait_protected()
    loader.end()
    assert loader.error is None
    for one in [*loaders, loader]:
        one.assert_kept(primary)
    assert_same(primary, rig.live())
    assert_same(primary, rig.at(moment()))
    assert pread(rig.live(), MIB, size - MIB) == (size // MIB - 1).to_bytes(8, "little") + part[8:]


# --- one daemon, and the commands with and without it


def test_one_daemon_per_store(rig: Rig) -> None:
    """A second daemon on a store ends with code 12 and says why; the first one goes on."""
    rig.create()
    rig.start()
    other = rig.folder("other")
    done = rig.dmafs("serve", rig.store, other, code=12)
    assert done.stderr.startswith(f"dmafs: error: store {rig.store} ")
    assert "\nhint: " in done.stderr
    assert not is_mounted(other)
    assert rig.status()["state"] == "protected"
    assert rig.live().stat().st_size == SIZE


def test_commands_answer_alike_with_and_without_a_daemon(rig: Rig) -> None:
    """Status, ls and read give the same with the daemon and without it; snapshot and sync work both ways."""
    content = random.Random(SEED).randbytes(3 * MIB)
    rig.create(content=content)
    rig.start()
    pwrite(rig.tap(), b"one" * 5000, 12_345)
    rig.dmafs("snapshot", "create", rig.store, "kept")
    first_ns = moment()
    pwrite(rig.tap(), b"two" * 5000, 12_345, sync=True)

    ranges = ((12_000, 20_000), (0, 5 * MIB), (SIZE - 1, 1), (7, 0))

    def answers() -> tuple[dict[str, Any], str, list[bytes]]:
        status = json.loads(rig.dmafs("status", rig.store, "--json").stdout)
        points = rig.dmafs("ls", rig.store, "--json").stdout
        found = []
        for at in ("kept", spelled(first_ns), "0s ago", "latest"):
            for offset, length in ranges if at == "kept" else ranges[:1]:
                where = ["--at", at, "--offset", str(offset), "--length", str(length)]
                done = subprocess.run(
                    [DMAFS, "read", rig.store, "disk", *where], capture_output=True, timeout=60, check=True
                )
                assert len(done.stdout) == length
                found.append(done.stdout)
        return status, points, found

    served, served_points, served_bytes = answers()
    image = rig.at("kept").read_bytes()
    assert served_bytes[0] == image[12_000:32_000]
    assert served_bytes[1] == image[: 5 * MIB]
    dd = run("dd", f"if={rig.at('kept')}", f"of={rig.root}/dd", "bs=1M", "count=5")
    assert "5242880 bytes" in dd.stderr
    assert (rig.root / "dd").read_bytes() == served_bytes[1]
    rig.stop()
    alone, alone_points, alone_bytes = answers()
    assert alone_bytes == served_bytes
    assert alone_points == served_points
    (one,), (other,) = served["volumes"], alone["volumes"]
    assert served["daemon"] is not None
    assert alone["daemon"] is None
    assert set(one) == set(other), "the same keys"
    for key in ("name", "uuid", "size_bytes", "state", "oldest", "newest", "mirror", "forward", "snapshots"):
        assert one[key] == other[key], key

    rig.dmafs("snapshot", "create", rig.store, "alone")
    rig.dmafs("sync", rig.store)
    assert without_daemon(rig)["forward"]["events"] == 0
    rig.start()
    assert sorted(os.listdir(rig.mnt / "snapshots"))[-3:] == ["alone", "kept", "latest"]
    assert rig.snapshot("kept").read_bytes() == image
    assert_same(rig.primary(), rig.snapshot("alone"))


# --- what is refused: no command below may change anything

Refused = Callable[[Rig], tuple[list[str | Path], int, list[str]]]


def source(rig: Rig, name: str, size: int) -> Path:
    path = rig.root / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def new_store(rig: Rig, path: Path) -> list[str | Path]:
    return ["create", rig.root / "new", "--source", path]


def missing_source(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return new_store(rig, rig.root / "nowhere"), 4, [f"source {rig.root}/nowhere"]


def folder_as_source(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return new_store(rig, rig.folder("folder")), 4, [f"source {rig.root}/folder"]


def odd_source(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return new_store(rig, source(rig, "odd", 1000)), 4, [f"source {rig.root}/odd", "1000 bytes", "512"]


def empty_source(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return new_store(rig, source(rig, "empty", 0)), 4, [f"source {rig.root}/empty", "0 bytes"]


def foreign_store(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    (rig.folder("new") / "letter").write_text("mine")
    return new_store(rig, rig.primary()), 7, [f"store {rig.root}/new", "letter"]


def file_as_store(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    source(rig, "new", 512)
    return new_store(rig, rig.primary()), 3, [f"store {rig.root}/new"]


def source_in_store(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["create", rig.root, "--source", rig.primary()], 6, [str(rig.primary()), str(rig.root)]


def volume_exists(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["create", rig.store, "disk", "--source", rig.primary()], 7, ["volume disk", str(rig.store)]


def bad_volume_name(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["create", rig.store, "a b", "--source", rig.primary()], 3, ["volume name 'a b'"]


def mounted_source(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    rig.mkfs(device := rig.attach(source(rig, "mounted", 16 * MIB)))
    rig.mount(device, rig.folder("files"))
    return new_store(rig, Path(device)), 5, [f"source {device}", f"{rig.root}/files"]


def no_store(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["status", rig.root / "nowhere"], 11, [f"{rig.root}/nowhere"]


def empty_folder_as_store(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["serve", rig.folder("folder"), rig.mnt], 11, [f"{rig.root}/folder"]


def mount_point_in_store(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    (rig.store / "mnt").mkdir()
    return ["serve", rig.store, rig.store / "mnt"], 6, [f"store {rig.store}", f"mount point {rig.store}/mnt"]


def store_in_mount_point(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["serve", rig.store, rig.root], 30, [f"mount point {rig.root}", "not empty"]


def mount_point_not_empty(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    (rig.mnt / "letter").write_text("mine")
    return ["serve", rig.store, rig.mnt], 30, [f"mount point {rig.mnt}", "letter"]


def mount_point_missing(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["serve", rig.store, rig.root / "nowhere"], 30, [f"mount point {rig.root}/nowhere"]


def file_as_mount_point(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    return ["serve", rig.store, source(rig, "file", 512)], 30, [f"mount point {rig.root}/file"]


def source_gone(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    rig.primary().rename(rig.root / "moved")
    return ["serve", rig.store, rig.mnt], 4, [f"source {rig.primary()}"]


def source_of_other_size(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
    os.truncate(rig.primary(), 2 * SIZE)
    return ["serve", rig.store, rig.mnt], 4, [f"source {rig.primary()}", str(2 * SIZE), str(SIZE)]


def configuration(text: str, *shown: str) -> Refused:
    def refused(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
        (rig.store / "dmafs.conf").write_text(text)
        return ["serve", rig.store, rig.mnt], 3, [f"configuration {rig.store}/dmafs.conf", *shown]

    return refused


def read(at: str, code: int, *shown: str, offset: int = 0, length: int = 512, volume: str = "disk") -> Refused:
    def refused(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
        where = ["--at", at, "--offset", str(offset), "--length", str(length)]
        return ["read", rig.store, volume, *where], code, list(shown)

    return refused


def snapshot(name: str, code: int) -> Refused:
    def refused(rig: Rig) -> tuple[list[str | Path], int, list[str]]:
        return ["snapshot", "create", rig.store, name], code, ["snapshot", name]

    return refused


ANY_TIME: dict[str, Refused] = {
    "unknown-volume": read("kept", 22, "volume other", "disk", volume="other"),
    "future": read("2200-01-01T00:00Z", 21, "2200-01-01T00:00:00.000000000Z", "future"),
    "before-the-beginning": read("2020-01-01T00:00Z", 21, "2020-01-01T00:00:00.000000000Z", "disk"),
    "no-point": read("gibberish%", 21, "'gibberish%'"),
    "no-snapshot-of-that-name": read("never", 21, "never"),
    "seq-too-high": read("seq:999", 21, "seq 999", "disk"),
    "beyond-the-end": read("kept", 3, str(SIZE), f"range {SIZE - 1}+2", offset=SIZE - 1, length=2),
    "negative-offset": read("kept", 3, "size '-1' not understood", offset=-1, length=2),
    "negative-length": read("kept", 3, "size '-1' not understood", offset=5, length=-1),
    "snapshot-exists": snapshot("kept", 7),
    "snapshot-latest": snapshot("latest", 3),
    "snapshot-of-spaces": snapshot("a b", 3),
    "snapshot-like-a-date": snapshot("2026-07-28", 3),
    "snapshot-too-long": snapshot("x" * 65, 3),
    "snapshot-without-name": snapshot("", 3),
    "volume-name": bad_volume_name,
    "missing-source": missing_source,
}
STOPPED: dict[str, Refused] = {
    "folder-as-source": folder_as_source,
    "odd-source": odd_source,
    "empty-source": empty_source,
    "foreign-store": foreign_store,
    "file-as-store": file_as_store,
    "source-in-store": source_in_store,
    "volume-exists": volume_exists,
    "mounted-source": mounted_source,
    "no-store": no_store,
    "empty-folder-as-store": empty_folder_as_store,
    "mount-point-in-store": mount_point_in_store,
    "store-in-mount-point": store_in_mount_point,
    "mount-point-not-empty": mount_point_not_empty,
    "mount-point-missing": mount_point_missing,
    "file-as-mount-point": file_as_mount_point,
    "source-gone": source_gone,
    "source-of-other-size": source_of_other_size,
    "configuration-no-toml": configuration("tick_s = = 1"),
    "configuration-binary": configuration("\0\1\2"),
    "configuration-unknown-key": configuration("colour = 'red'\n", "colour"),
    "configuration-wrong-type": configuration("threads = 'many'\n", "threads", "many"),
    "configuration-out-of-range": configuration("threads = 0\n", "threads", "0", "2"),
    "configuration-size": configuration("reserve = '1 potato'\n", "potato"),
}


def contents(rig: Rig) -> dict[str, tuple[int, str]]:
    """Return mode and digest of all files below the scratch folder, but for the mount and the daemons' logs."""
    found = {}
    for folder, folders, names in os.walk(rig.root):
        folders[:] = [name for name in folders if not is_mounted(Path(folder) / name)]
        for name in [*names, *folders]:
            path = Path(folder) / name
            mode = path.lstat().st_mode
            digest = xxhash.xxh3_128_hexdigest(path.read_bytes()) if stat.S_ISREG(mode) else ""
            found[str(path)] = mode, digest
    return found


def assert_refused(rig: Rig, case: Refused) -> None:
    """Run a bad command: it ends with its code, names object and value and a remedy, and changes nothing."""
    command, code, shown = case(rig)
    before = contents(rig)
    done = rig.dmafs(*command, code=code)
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("dmafs: error: ")
    for text in shown:
        assert text in " ".join([first, *rest]), done.stderr
    assert len(rest) == 1, done.stderr
    assert rest[0].startswith("hint: ")
    assert not first.endswith(".")
    assert contents(rig) == before


@pytest.fixture(scope="module")
def served() -> Iterator[Rig]:
    """A running daemon with a snapshot, for commands that are refused."""
    with Rig() as made:
        made.create()
        made.start()
        made.dmafs("snapshot", "create", made.store, "kept")
        yield made


@pytest.mark.parametrize("name", ANY_TIME)
def test_bad_input_is_refused_by_the_daemon(served: Rig, name: str) -> None:
    """Wrong input to a command that asks the daemon: exit code, message and hint; nothing changes."""
    assert_refused(served, ANY_TIME[name])
    assert served.status()["state"] == "protected"


@pytest.fixture(scope="module")
def stopped() -> Iterator[Rig]:
    """A store with a snapshot, at rest."""
    with Rig() as made:
        made.create()
        made.start()
        made.dmafs("snapshot", "create", made.store, "kept")
        made.stop()
        yield made


@pytest.mark.parametrize("name", ANY_TIME)
def test_bad_input_is_refused_without_a_daemon(stopped: Rig, name: str) -> None:
    """Wrong input to a command that works on the store itself: exit code, message and hint; nothing changes."""
    assert_refused(stopped, ANY_TIME[name])


@pytest.mark.parametrize("name", STOPPED)
def test_bad_circumstances_are_refused(rig: Rig, name: str) -> None:
    """A store, source, mount point or configuration that can't be: exit code, message and hint; nothing changes."""
    rig.create()
    assert_refused(rig, STOPPED[name])


def test_usage(rig: Rig) -> None:
    """Every command has a help text, and wrong usage is exit code 2."""
    for command in ("create", "serve", "status", "ls", "read", "snapshot", "mark", "sync"):
        assert rig.dmafs(command, "--help").stdout.startswith(f"usage: dmafs {command}")
        rig.dmafs(command, "--no-such-option", code=2)
    rig.dmafs("no-such-command", code=2)
