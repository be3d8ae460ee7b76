"""What capture costs: bytes written, commits, memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.mount.harness import MIB, Rig, moment, pread, run, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

GIB = 1 << 30


def process_file(rig: Rig, name: str) -> dict[str, int]:
    """Return the numbers in a file of the daemon's in /proc."""
    assert rig.daemon is not None
    lines = Path(f"/proc/{rig.daemon.pid}/{name}").read_text().splitlines()
    fields = (line.partition(":") for line in lines)
    return {key: int(value.split()[0]) for key, _, value in fields if value.split() and value.split()[0].isdigit()}


def test_a_byte_written_is_written_twice(rig: Rig, record_property: pytest.RecordProperty) -> None:
    """1 GiB through the tap costs 2 GiB of writes, journal and primary, and at most a tenth more; a sync one more GiB."""
    rig.create(size=GIB)
    rig.start()
    before = process_file(rig, "io")
    run("dd", "if=/dev/urandom", f"of={rig.tap()}", "bs=1M", "count=1024", "conv=notrunc,fsync", "iflag=fullblock")
    cost = {key: (value - before[key]) / GIB for key, value in process_file(rig, "io").items()}
    record_property("cost", cost)
    print(f"wchar {cost['wchar']:.4f} GiB, write_bytes {cost['write_bytes']:.4f} GiB")
    for key in ("wchar", "write_bytes"):
        assert 2.0 <= cost[key] <= 2.2, cost


def test_concurrent_flushes_share_commits(rig: Rig) -> None:
    """32 writers who each flush 10 times need far fewer than 320 commits, and each flush covers its own write."""
    writers, rounds = 32, 10
    rig.create(size=64 * MIB)
    rig.start()
    gate = threading.Barrier(writers)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            fd = os.open(rig.tap(), os.O_WRONLY | os.O_CLOEXEC)
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
    after = rig.status()
    commits = after["commits"] - before["commits"]
    print(f"{commits} commits for {writers * rounds} flushes")
    assert after["newest"]["seq"] - before["newest"]["seq"] == writers * rounds
    assert after["durable_seq"] == after["newest"]["seq"]
    assert 0 < commits <= writers * rounds // 2
    expected = b"".join(bytes([n + 1, r + 1]) * 2048 for n in range(writers) for r in range(rounds))
    assert pread(rig.live(), len(expected), 0) == expected


def test_memory_stays_bounded(rig: Rig) -> None:
    """200,000 events of 20 KiB, 4 GB, leave the daemon below 200 MiB, also with an image from their midst open."""
    events, length = 200_000, 20_480
    size = 6 * 10**9 // MIB * MIB
    rig.create(size=size)
    rig.start()
    block = os.urandom(length + 512)
    before = rig.status()["newest"]["seq"]
    stride = 7919 * 24_576  # 24 KiB pieces in an order that is not theirs; 7919 is prime
    middle, middle_event = 0, events // 2
    with rig.tap().open("r+b", buffering=0) as tap:
        for number in range(events):
            if number == middle_event:
                middle = moment()
            offset = number * stride % (size // 24_576 * 24_576)
            shift = number % 512
            os.pwrite(tap.fileno(), block[shift : shift + length], offset)
        os.fsync(tap.fileno())
    status = rig.status()
    assert status["newest"]["seq"] - before >= events
    assert status["forward"]["bytes"] >= events * length
    written = process_file(rig, "status")
    with rig.at(middle).open("rb", buffering=0) as held:
        for number in range(0, events, 997):
            offset = number * stride % (size // 24_576 * 24_576)
            expected = block[number % 512 :][:length] if number < middle_event else bytes(length)
            assert os.pread(held.fileno(), length, offset) == expected, number
        held.seek(0)
        while held.read(64 * MIB) and held.tell() < GIB:
            pass
        wait_until(lambda: rig.status()["durable_seq"] == status["newest"]["seq"], "the flush")
        read = process_file(rig, "status")
    print(
        f"VmHWM {written['VmHWM'] // 1024} MiB and VmRSS {written['VmRSS'] // 1024} MiB after writing,"
        f" VmHWM {read['VmHWM'] // 1024} MiB after reading"
    )
    assert 10 * 1024 < read["VmRSS"] <= read["VmHWM"] < 200 * 1024
