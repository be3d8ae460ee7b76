"""When the machine stopped: a gap, a resync, and exact again."""

from __future__ import annotations

from uuid import UUID

import pytest

from dmafs.core.ondisk import Pointers
from dmafs.core.pointers import PointerFile
from dmafs.core.storage import RealStorage
from tests.mount.harness import MIB, REDONE, Rig, assert_same, moment, pread, pwrite

pytestmark = pytest.mark.mount

GAP_BEGINS = "a gap is open"
GAP_ENDS = "gap ended, .* of the source differed"
BLOCK = 4096


def pretend_other_boot(rig: Rig, volume: str = "disk") -> None:
    """Have the volume believe that it was open under an earlier boot of the kernel."""
    status = rig.dmafs("status", rig.store, "--json").stdout
    uuid = UUID(status.partition('"uuid": "')[2][:36])
    pointers = PointerFile(RealStorage(rig.store / volume), uuid)
    assert isinstance(pointers.now, Pointers)
    pointers.update(boot_id=UUID(int=7))
    pointers.close()


def test_after_a_power_cut_the_newest_image_is_the_primary_again(rig: Rig) -> None:
    """Writes that reached only the primary are journaled by a resync; a time inside the gap means its beginning."""
    rig.allow(REDONE, GAP_BEGINS, GAP_ENDS)
    rig.create(size=64 * MIB, content=b"old." * (2 * MIB // 4))
    rig.start()
    for number in range(64):
        pwrite(rig.tap(), bytes([number + 1]) * BLOCK, number * MIB)
    pwrite(rig.tap(), b"flushed".ljust(BLOCK), 0, sync=True)
    before = moment()
    rig.kill()
    pretend_other_boot(rig)
    pwrite(rig.primary(), b"only on the primary".ljust(BLOCK), 10 * MIB + BLOCK)  # what the journal has lost
    pwrite(rig.primary(), bytes(BLOCK), MIB + MIB // 2)
    rig.start()
    status = rig.status()
    assert status["state"] == "protected"
    (gap,) = status["gaps"]
    assert gap["end"]["seq"] == gap["begin"]["seq"] + 2
    assert_same(rig.live(), rig.primary())
    assert pread(rig.live(), BLOCK, 10 * MIB + BLOCK) == b"only on the primary".ljust(BLOCK)
    assert pread(rig.at(before), BLOCK, 0) == b"flushed".ljust(BLOCK)
    assert pread(rig.at(before), BLOCK, MIB + MIB // 2) == b"old." * (BLOCK // 4)
    assert pread(rig.at(f"seq:{gap['begin']['seq']}"), BLOCK, 10 * MIB + BLOCK) == bytes(BLOCK)
    assert not rig.at(f"seq:{gap['begin']['seq'] + 1}").exists()
    assert_same(rig.at(f"seq:{gap['end']['seq']}"), rig.primary())
    rig.dmafs("sync", rig.store)
    assert rig.status()["gaps"] == []
    assert_same(rig.live(), rig.primary())


def test_a_kill_of_the_daemon_alone_is_no_gap(rig: Rig) -> None:
    """Under the same boot the page cache has kept both sides: nothing is compared, nothing is missing."""
    rig.allow(REDONE)
    rig.create(size=16 * MIB)
    rig.start()
    pwrite(rig.tap(), b"not flushed".ljust(BLOCK), MIB)
    rig.kill()
    rig.start()
    assert rig.status()["gaps"] == []
    assert pread(rig.live(), BLOCK, MIB) == b"not flushed".ljust(BLOCK)
    assert_same(rig.live(), rig.primary())
