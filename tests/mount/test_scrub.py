"""Damage in the store of a disk in use: an I/O error in its page and nowhere else, found and repaired by a scrub."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dmafs.errors import CorruptionError
from tests.mount.harness import DMAFS, MIB, STOP_S, Rig, assert_same, forget, pread, pwrite, wait_until

pytestmark = pytest.mark.mount

PAGE = 4096
DAMAGE = "is damaged|doesn't match|wrong checksum|damage that a scrub has found"


def damaged_pages(image: Path) -> list[int]:
    """Return the numbers of the pages that can't be read; any other error fails."""
    forget(image)
    found = []
    descriptor = os.open(image, os.O_RDONLY)
    try:
        for page in range(os.fstat(descriptor).st_size // PAGE):
            try:
                assert len(os.pread(descriptor, PAGE, page * PAGE)) == PAGE
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                found.append(page)
    finally:
        os.close(descriptor)
    return found


def scrubbed(rig: Rig, *options: str, code: int = 0) -> dict[str, Any]:
    command = ["scrub", str(rig.store), "--json", *options]
    found: dict[str, Any] = json.loads(rig.dmafs(*command, code=code).stdout)["volumes"][0]
    return found


def damage(path: Path, offset: int) -> None:
    (byte,) = pread(path, 1, offset)
    pwrite(path, bytes([byte ^ 0x10]), offset, sync=True)


def segment_with(rig: Rig, content: bytes) -> tuple[Path, int]:
    """Return the file of the forward journal that has *content*, and where."""
    for path in (rig.store / "disk" / "forward").glob("*.dat"):
        at = path.read_bytes().find(content)
        if at >= 0:
            return path, at
    raise AssertionError


def test_damage_is_an_error_in_its_page_until_it_is_repaired(rig: Rig) -> None:
    """Of mirror and journal; a scrub repairs what the primary still has, and says what else shows where."""
    rig.allow(DAMAGE)
    rig.create(size=4 * MIB, content=os.urandom(4 * MIB))
    rig.start()
    old, new = os.urandom(PAGE), os.urandom(PAGE)
    pwrite(rig.tap(), os.urandom(PAGE), 64 * PAGE, sync=True)
    before = rig.status()["newest"]["seq"]
    pwrite(rig.tap(), old, 100 * PAGE, sync=True)
    shown = rig.status()["newest"]["seq"]
    pwrite(rig.tap(), new, 100 * PAGE, sync=True)
    mirror = rig.store / "disk" / "mirror.img"
    damage(mirror, 7 * PAGE + 11)
    damage(mirror, 64 * PAGE)  # the newest image doesn't show that
    path, at = segment_with(rig, old)
    damage(path, at + 99)
    assert damaged_pages(rig.at(f"seq:{before}")) == [7]
    assert damaged_pages(rig.at(f"seq:{shown}")) == [7, 100]
    assert damaged_pages(rig.live()) == [7]
    found = scrubbed(rig, code=CorruptionError.exit_code)
    assert [(one["place"], one["offset"] // PAGE, one["repaired"]) for one in found["damage"]] == [
        ("mirror", 7, True),
        ("mirror", 64, False),
        ("forward", 100, False),
    ]
    event = found["damage"][2]
    assert (event["first"]["seq"], event["last"]["seq"], event["newest"]) == (shown, shown, False)
    assert damaged_pages(rig.at(f"seq:{shown}")) == [100]
    assert damaged_pages(rig.live()) == []
    assert_same(rig.live(), rig.primary())
    text = rig.dmafs("status", rig.store, code=1).stdout
    assert "damage that a scrub has found is not repaired; places: 2" in text
    assert "3 damaged, 2 of them not repaired" in text
    rig.restart()
    assert "3 damaged, 2 of them not repaired" in rig.dmafs("status", rig.store, code=1).stdout


def test_a_resync_heals_what_the_newest_image_shows(rig: Rig) -> None:
    """The primary's bytes are journaled where the image can't be read; the damage stays in the moments before."""
    rig.allow(DAMAGE, "resynced, .* of the source differed")
    rig.create(size=4 * MIB, content=os.urandom(4 * MIB))
    rig.start()
    pwrite(rig.tap(), b"x" * PAGE, 0, sync=True)
    table = rig.store / "disk" / "digests"
    damage(table, PAGE + 8 * 9)  # the data is whole, and nobody can know
    before = rig.status()["newest"]["seq"]
    assert damaged_pages(rig.live()) == [9]
    assert scrubbed(rig, code=CorruptionError.exit_code)["count"] == 1
    rig.dmafs("verify", rig.store, code=26)
    rig.dmafs("resync", rig.store)
    assert damaged_pages(rig.live()) == []
    assert_same(rig.live(), rig.primary())
    assert damaged_pages(rig.at(f"seq:{before}")) == [9]
    rig.dmafs("verify", rig.store)
    rig.dmafs("sync", rig.store)
    assert scrubbed(rig, code=CorruptionError.exit_code)["damage"][0]["place"] == "backward"


def test_a_scrub_goes_on_after_a_kill(rig: Rig) -> None:
    """What is killed in the middle of it, or interrupted, is taken up where it was; without a daemon, too."""
    rig.allow(DAMAGE)
    rig.create(size=8 * MIB, content=os.urandom(8 * MIB))
    rig.start()
    damage(rig.store / "disk" / "mirror.img", 3 * PAGE)
    pwrite(rig.primary(), b"other" + bytes(PAGE), 3 * PAGE)
    command = [str(DMAFS), "scrub", str(rig.store), "--rate", "512K"]
    state = rig.store / "disk" / "scrub"

    def walked() -> bool:
        return state.exists() and json.loads(state.read_bytes())["position"][0] > 0

    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(walked, "the scrub's position to be written down", seconds=60)
        assert rig.status()["check"]["kind"] == "scrub"
        rig.kill()
        assert process.wait(STOP_S) == 31
    begun = json.loads(state.read_bytes())["begun_ns"]
    rig.start()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: rig.status()["check"], "the scrub to go on")
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 128 + signal.SIGINT
    wait_until(lambda: rig.status()["check"] is None, "the scrub to be given up")
    assert rig.status()["last_scrub"]["ended"] is False
    assert "dmafs scrub goes on with it" in rig.dmafs("status", rig.store, code=1).stdout
    rig.stop()
    found = scrubbed(rig, code=CorruptionError.exit_code)
    assert json.loads(state.read_bytes())["begun_ns"] == begun
    assert [(one["offset"] // PAGE, one["newest"]) for one in found["damage"]] == [(3, True)]
    text = rig.dmafs("scrub", str(rig.store), code=CorruptionError.exit_code)
    assert "1 place damaged in" in text.stdout
    assert "now" in text.stdout
    assert "can't be repaired" in text.stderr
