"""What capture costs: bytes written, commits, memory."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.mount import tiny_writes
from tests.mount.disks import Disk
from tests.mount.harness import MIB, Rig, assert_same, moment, opened, pread, run, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

GIB = 1 << 30


def process_file(rig: Rig, name: str) -> dict[str, int]:
    """Return the numbers in a file of the daemon's in /proc."""
    assert rig.daemon is not None
    lines = Path(f"/proc/{rig.daemon.pid}/{name}").read_text().splitlines()
    fields = (line.partition(":") for line in lines)
    return {key: int(value.split()[0]) for key, _, value in fields if value.split() and value.split()[0].isdigit()}


def test_a_byte_written_is_written_twice(rig: Rig) -> None:
    """1 GiB through the tap costs 2 GiB of writes, journal and primary, and at most a tenth more."""
    rig.create(size=GIB)
    rig.start()
    before = process_file(rig, "io")
    run("dd", "if=/dev/urandom", f"of={rig.tap()}", "bs=1M", "count=1024", "conv=notrunc,fsync", "iflag=fullblock")
    cost = {key: (value - before[key]) / GIB for key, value in process_file(rig, "io").items()}
    print(f"wchar {cost['wchar']:.4f} GiB, write_bytes {cost['write_bytes']:.4f} GiB")
    for key in ("wchar", "write_bytes"):
        assert 2.0 <= cost[key] <= 2.2, cost


def test_concurrent_flushes_share_commits(rig: Rig) -> None:
    """32 writers on a disk who each flush 10 times need far fewer than 320 commits.

    Through a loop device, as disks are used: of a FUSE file itself the kernel lets only one fsync at a time through.
    """
    writers, rounds = 32, 10
    rig.create(size=64 * MIB)
    rig.start()
    device = rig.attach(rig.tap())
    gate = threading.Barrier(writers)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
            gate.wait(30)
            for round_ in range(rounds):
                data = bytes([number + 1, round_ + 1]) * 2048
                assert os.pwrite(fd, data, (number * rounds + round_) * 4096) == 4096
                os.fsync(fd)
            os.close(fd)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    before = rig.status()
    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors
    rig.detach(device)
    after = rig.status()
    commits = after["commits"] - before["commits"]
    print(f"{commits} commits for {writers * rounds} flushes")
    assert after["durable_seq"] == after["newest"]["seq"]
    assert 0 < commits <= writers * rounds // 3
    expected = b"".join(bytes([n + 1, r + 1]) * 2048 for n in range(writers) for r in range(rounds))
    assert pread(rig.live(), len(expected), 0) == expected


def test_memory_stays_bounded(rig: Rig) -> None:
    """200,000 events of 20 KiB, 4 GB, leave the daemon below 200 MiB, also with an image from their midst open."""
    events, length, streams = 200_000, 20_480, 64
    rig.create(size=events * length)
    rig.start()
    block = os.urandom(length + 512)
    before = rig.status()["newest"]["seq"]

    def place_of(number: int) -> int:
        """Return where an event goes: many streams side by side, so that no neighbours come one after the other."""
        return (number % streams * (events // streams) + number // streams) * length

    middle, middle_event = 0, events // 2
    with rig.tap().open("r+b", buffering=0) as tap:
        for number in range(events):
            if number == middle_event:
                middle = moment()
            os.pwrite(tap.fileno(), block[number % 512 :][:length], place_of(number))
        os.fsync(tap.fileno())
    status = rig.status()
    assert status["newest"]["seq"] - before == status["forward"]["events"] == events
    assert status["forward"]["bytes"] == events * length
    written = process_file(rig, "status")
    with rig.at(middle).open("rb", buffering=0) as held:
        for number in range(0, events, 997):
            expected = block[number % 512 :][:length] if number < middle_event else bytes(length)
            assert os.pread(held.fileno(), length, place_of(number)) == expected, number
        while held.tell() < GIB:
            assert held.read(64 * MIB)
    read = process_file(rig, "status")
    print(
        f"VmHWM {written['VmHWM'] // 1024} MiB and VmRSS {written['VmRSS'] // 1024} MiB after writing,"
        f" VmHWM {read['VmHWM'] // 1024} MiB after reading"
    )
    assert 10 * 1024 < read["VmRSS"] <= read["VmHWM"] < 200 * 1024


class Flusher(threading.Thread):
    """Writes blocks to places of its own and flushes each; *took* are the seconds of each flush."""

    def __init__(self, rig: Rig, number: int) -> None:
        super().__init__(daemon=True)
        self._path, self._number = rig.tap(), number
        self.took: list[float] = []
        self.end = threading.Event()

    def run(self) -> None:
        with opened(self._path, os.O_WRONLY) as fd:
            while not self.end.is_set():
                data = bytes([self._number + 1, len(self.took) % 256]) * (1 << 15)
                assert os.pwrite(fd, data, (self._number * 64 + len(self.took) % 64) * len(data)) == len(data)
                begun = time.monotonic()
                os.fsync(fd)
                self.took.append(time.monotonic() - begun)


def test_a_slow_store_holds_writers_back(rig: Rig) -> None:
    """Each flush waits for the store's disk, and each writer for its flush; the daemon's memory doesn't grow meanwhile.

    Nor does it when somebody writes without ever flushing: what the disk hasn't yet is the kernel's to hold.
    """
    delay, writers = 0.02, 4
    disk = Disk(rig)
    rig.create(size=64 * MIB)
    rig.start()
    flushers = [Flusher(rig, number) for number in range(writers)]
    for flusher in flushers:
        flusher.start()
    wait_until(lambda: all(len(flusher.took) >= 10 for flusher in flushers), "quick flushes")
    disk.slow_down(delay)
    begun = [len(flusher.took) + 2 for flusher in flushers]  # of those under way one may have been quick
    wait_until(lambda: all(len(flusher.took) >= first for flusher, first in zip(flushers, begun, strict=True)), "it")
    before = process_file(rig, "status")["VmRSS"]
    run("dd", "if=/dev/urandom", f"of={rig.tap()}", "bs=1M", "count=16", "seek=32", "conv=notrunc")
    wait_until(lambda: all(len(one.took) >= first + 5 for one, first in zip(flushers, begun, strict=True)), "slow ones")
    after = process_file(rig, "status")["VmRSS"]
    slow = [took for flusher, first in zip(flushers, begun, strict=True) for took in flusher.took[first:]]
    print(f"{len(slow)} slow flushes of {min(slow):.3f} s and more, memory grew by {after - before} KiB")
    assert min(slow) >= delay
    assert after - before < 16 * 1024
    disk.mend()
    for flusher in flushers:
        flusher.end.set()
    for flusher in flushers:
        flusher.join(60)
        assert not flusher.is_alive()
    assert_same(rig.primary(), rig.live())
    rig.stop()
    disk.end()


def test_millions_of_tiny_writes(tmp_path: Path) -> None:
    """Memory doesn't grow with them: of full segments of the forward journal the descriptors are forgotten.

    Neither do the maps, the layers and the lists of what is to be flushed grow, nor what is kept of its data.
    Indexes do, 24 bytes a write, but they are files: the kernel takes their memory back when it likes. What threads
    that make layers need for a moment differs by more than 10 MiB from time to time: whatever kept as little as an
    index entry of each write would show behind it.
    """
    few, many = 500_000, 2_000_000
    done = run(sys.executable, tiny_writes.__file__, tmp_path, str(1 << 16), str(few), str(many), seconds=300)
    resident = {int(line.split()[0]): [int(word) for word in line.split()[1:]] for line in done.stdout.splitlines()}
    own, mapped = ((after - before) * 1024 / (many - few) for before, after in zip(*resident.values(), strict=True))
    print(
        f"{resident} KiB after so many writes; each has {own:.1f} B of memory, and {mapped:.1f} B of files are mapped"
    )
    assert own < 16
    assert mapped < 26
