"""Claims about dmafs.taps.kernellog: failed writes of the devices in question are noticed, and nothing else is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dmafs.errors import TapError
from dmafs.taps.kernellog import KernelLog, devices_under, is_failure

DEVICES = frozenset({"sda", "dm-1"})


@pytest.mark.parametrize(
    "message",
    [
        "I/O error, dev sda, sector 34816 op 0x1:(WRITE) flags 0x8800 phys_seg 16 prio class 2",
        "critical space allocation error, dev sda, sector 16384 op 0x1:(WRITE) flags 0x8800 phys_seg 16 prio class 2",
        "critical medium error, dev sda, sector 8 op 0x3:(DISCARD) flags 0x0 phys_seg 1 prio class 2",
        "Buffer I/O error on dev dm-1, logical block 0, lost async page write",
        "blk_update_request: I/O error, dev sda, sector 8 op 0x1:(WRITE) flags 0x0 phys_seg 1 prio class 0",
    ],
)
def test_failed_writes_are_noticed(message: str) -> None:
    """Whatever kind of error it is, and of another device it is none."""
    assert is_failure(f"3,1021,5140900,-;{message}\n SUBSYSTEM=block\n", DEVICES)
    assert not is_failure(f"3,1021,5140900,-;{message}", frozenset({"sdb"}))


@pytest.mark.parametrize(
    "message",
    [
        "I/O error, dev sda, sector 34816 op 0x0:(READ) flags 0x0 phys_seg 16 prio class 2",
        "EXT4-fs (sda): mounted filesystem without journal",
        "sda: detected capacity change from 0 to 8",
        "",
    ],
)
def test_other_messages_are_not(message: str) -> None:
    """Reads that fail don't change anything."""
    assert not is_failure(f"6,1,2,-;{message}", DEVICES)


def test_messages_before_the_beginning_do_not_count(tmp_path: Path) -> None:
    """The log is read from where it ends when it is opened; each message once."""
    fifo = tmp_path / "kmsg"
    fifo.write_text("3,1,1,-;I/O error, dev sda, sector 1 op 0x1:(WRITE) flags\n")
    log = KernelLog(fifo)
    assert os.read(log.fileno(), 100) == b""
    log.close()


def test_a_log_that_is_not_there_is_told(tmp_path: Path) -> None:
    """What is missing, and what that means."""
    with pytest.raises(TapError, match="kmsg can't be read"):
        KernelLog(tmp_path / "kmsg")


def test_devices_under_one_have_its_own_name() -> None:
    """Of whatever block device this machine has."""
    for entry in Path("/sys/block").iterdir():
        major, minor = (int(part) for part in (entry / "dev").read_text().split(":"))
        assert entry.name in devices_under(os.makedev(major, minor))
