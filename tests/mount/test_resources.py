"""What capture costs: bytes written, commits, memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.mount.harness import MIB, Rig, moment, pread, run

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
