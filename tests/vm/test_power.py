"""Power cuts of guests whose primary is protected with the dm tap, and orderly ends beside them."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Final

import pytest

from tests.vm.guest.survivor import SIZE
from tests.vm.harness import Guest

SEED: Final = int(os.environ.get("DMAFS_TEST_SEED", "1"))
STORE_BYTES: Final = 1 << 30


class Machine:
    """A machine with two disks that is switched on again and again."""

    def __init__(self, folder: Path) -> None:
        print(f"DMAFS_TEST_SEED={SEED}")
        self.random = random.Random(SEED)
        self.folder = folder / "notes"
        self.folder.mkdir()
        self.disks = [folder / "primary.img", folder / "store.img"]
        self.disks[0].write_bytes(self.random.randbytes(SIZE))
        with self.disks[1].open("wb") as file:
            file.truncate(STORE_BYTES)

    def on(self, *words: str) -> Guest:
        options = [part for disk in self.disks for part in ("--disk", disk)]
        return Guest(
            self.folder, sys.executable, "-m", "tests.vm.guest.survivor", self.folder, *words, options=tuple(options)
        )

    def cut(self, guest: Guest, text: str, seconds: float) -> None:
        """Cut the power at a random moment after the guest has said something."""
        guest.wait_for(text, seconds=90)
        after = self.random.uniform(0, seconds)
        time.sleep(after)
        guest.cut_power()
        print(f"power cut {after:.2f} s after {text!r}; {guest.output().count('noted')} snapshots noted")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_power_cuts_lose_nothing_that_was_acknowledged(machine: Machine) -> None:
    """Cut in the initial copy, under load, in a sync: each is a gap that ends, and every snapshot stays as it was."""
    with machine.on("create", "load") as guest:
        machine.cut(guest, "begin load", 0.3)
    with machine.on("resume", "load") as guest:
        machine.cut(guest, "noted", 2)
    with machine.on("resume", "gap", "sync") as guest:
        machine.cut(guest, "synced", 2)
    with machine.on("resume", "gap", "load") as guest:
        machine.cut(guest, "noted", 2)
    with machine.on("resume", "gap") as guest:
        print(guest.wait())


def test_after_an_orderly_end_nothing_is_compared(machine: Machine) -> None:
    """The device is detached, the machine is switched on again: no gap, no resync, and all history is there."""
    with machine.on("create", "detach") as guest:
        guest.wait_for("ended in order", seconds=90)
        guest.wait()
    with machine.on("resume", "whole", "detach") as guest:
        said = guest.wait()
    assert "checked 3 snapshots; []" in said, said
