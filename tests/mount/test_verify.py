"""Verify and resync of a disk in use: what was written past the tap is named, and mended."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dmafs.client import connect
from dmafs.errors import CheckBusyError
from tests.mount.harness import DMAFS, MIB, STOP_S, Rig, assert_same, pwrite, wait_until

pytestmark = pytest.mark.mount

BLOCK = 4096
RESYNCED = "resynced, .* of the source differed"


@contextlib.contextmanager
def load(rig: Rig) -> Iterator[None]:
    """Write through the tap all the time, to the first half of the disk."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            at = number * 7919 % 4000 * 2048
            pwrite(rig.tap(), number.to_bytes(8, "little") * 512, at, sync=number % 50 == 0)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(STOP_S)


def asked(rig: Rig, what: str, *options: str, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rig.dmafs(what, rig.store, "--json", *options, code=code).stdout)["volumes"][0]
    return found


def test_what_was_written_past_the_tap_is_named_and_mended(rig: Rig) -> None:
    """Under load a verify is clean, names exactly what was written past the tap, and is clean after a resync."""
    rig.allow(RESYNCED)
    rig.create(size=32 * MIB)
    rig.start()
    damage = [(20 * MIB, 1), (21 * MIB, 3), (32 * MIB - BLOCK, 1)]
    with load(rig):
        wait_until(lambda: rig.status()["newest"]["seq"] > 100, "some writes")
        assert asked(rig, "verify")["count"] == 0
        for at, blocks in damage:
            pwrite(rig.primary(), b"past" * (BLOCK * blocks // 4), at)
        expected = [{"offset": at, "length": BLOCK * blocks} for at, blocks in damage]
        found = asked(rig, "verify", code=26)
        assert found["extents"] == expected
        assert rig.status()["gaps"] == [], "a verify changes nothing"
        assert asked(rig, "resync")["extents"] == expected
        (gap,) = rig.status()["gaps"]
        assert gap["end"]["seq"] - gap["begin"]["seq"] >= 3
        assert asked(rig, "verify")["count"] == 0
    status = rig.status()
    assert (status["check"], status["last_check"]["kind"], status["last_check"]["bytes"]) == (None, "verify", 0)
    assert "(verify): no differences" in rig.dmafs("status", rig.store).stdout
    assert_same(rig.live(), rig.primary())


def test_one_at_a_time_and_an_interrupt_ends_it(rig: Rig) -> None:
    """A second check is refused, status shows the first, Ctrl-C ends it; the daemon's end doesn't wait for one."""
    rig.create(size=16 * MIB)
    rig.start()
    command = [str(DMAFS), "verify", str(rig.store), "--rate", "1K"]  # some hours

    def begun() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_until(lambda: rig.status()["check"], "the verify")
        return process

    with begun() as first:
        check = rig.status()["check"]
        assert (check["kind"], check["fraction"] < 1) == ("verify", True)
        assert "verify" in rig.dmafs("status", rig.store).stdout
        rig.dmafs("resync", rig.store, code=CheckBusyError.exit_code)
        with connect(rig.store) as another, pytest.raises(CheckBusyError, match="a verify is under way already"):
            another.verify("disk", None, lambda _done, _total: None)
        first.send_signal(signal.SIGINT)
        assert first.wait(STOP_S) == 128 + signal.SIGINT
    wait_until(lambda: rig.status()["check"] is None, "the verify to be given up")
    assert rig.status()["last_check"] is None
    with begun() as second:
        rig.stop()
        assert second.wait(STOP_S) == 31
