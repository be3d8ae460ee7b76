"""Claims about dmafs.core.snapshots: whatever end of a snapshot's files is lost, the mirror never stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Header
from dmafs.core.snapshot import DIRECTORY
from dmafs.core.storage import RealStorage
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.tools import TINY, Ticking, all_images, copied_volume, fill, flip, image_bytes, tree

Damage = Callable[[Path], None]


def truncate(path: Path, lost: int) -> None:
    """Cut bytes off the end of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - lost)


def emptied(path: Path) -> None:
    """Leave of a descriptor file its header, of a data file nothing."""
    with path.open("r+b") as file:
        file.truncate(HEADER_SIZE if path.suffix == ".ext" else 0)


def flipped(path: Path) -> None:
    flip(path, -RECORD_SIZE - 10)  # in the last entry: behind it stands a marker


def synced(path: Path) -> tuple[Volume, dict[str, int]]:
    """Return a volume with a closed snapshot and an open one, both fed; the seqs of them."""
    volume = copied_volume(path, fill(9, 16))
    seqs = {}
    for name, value in (("closed", 1), ("open", 2)):
        seqs[name] = run(volume.take_snapshot(name=name)).seq
        for start in (0, 3, 6):
            volume.write(start, fill(value))
        run(volume.flush())
        run(sync(volume, open_snapshot=False))
    return volume, seqs


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        *(
            pytest.param(suffix, partial(truncate, lost=lost), id=f"{suffix}-{lost}")
            for suffix, unit in ((".ext", RECORD_SIZE), (".dat", SECTOR))
            for lost in (2 * unit - 1, 2 * unit, 3 * unit)
        ),
        *((suffix, one) for suffix in (".ext", ".dat") for one in (emptied, flipped)),
    ],
)
@pytest.mark.parametrize("which", ["closed", "open"])
def test_a_lost_end_is_damage(tmp_path: Path, which: str, suffix: str, damage: Damage) -> None:
    """Reads of the moment fail each time, no file is changed, and the moments that don't need it are as they were."""
    volume, seqs = synced(tmp_path / "disk")
    before = all_images(volume)
    run(volume.flush())
    volume.close()
    damage(tmp_path / "disk" / DIRECTORY / f"{seqs[which]:020d}{suffix}")
    kept = tree(tmp_path / "disk" / DIRECTORY)
    for _ in range(2):
        again = open_volume(tmp_path / "disk", limits=TINY, clock=Ticking())
        with pytest.raises(CorruptionError, match=f"{seqs[which]:020d}{suffix}|or its data ends at entry"):
            image_bytes(again, seqs[which])
        for seq, content in before.items():
            if seq > seqs[which]:
                assert image_bytes(again, seq) == content
        assert tree(tmp_path / "disk" / DIRECTORY) == kept
        again.close()


def test_the_header_says_how_much_is_durable(tmp_path: Path) -> None:
    """It counts the entries of each leg of a sync, and of what a dropped snapshot left to the next older one."""
    volume, seqs = synced(tmp_path / "disk")

    def sealed(name: str) -> int:
        path = tmp_path / "disk" / DIRECTORY / f"{seqs[name]:020d}.ext"
        return Header.decode(path.read_bytes()[:HEADER_SIZE], "x").sealed

    assert (sealed("closed"), sealed("open")) == (3, 3)
    volume.write(9, fill(3))
    run(volume.flush())
    run(sync(volume, open_snapshot=False))
    assert (sealed("closed"), sealed("open")) == (3, 4)
    dropped = volume.snapshots.find("open")
    assert dropped is not None
    run(volume.drop_snapshot(dropped))
    assert sealed("closed") == 4
    volume.close()


def test_what_a_merge_has_added_is_noticed_when_it_is_lost(tmp_path: Path) -> None:
    """A closed snapshot that took over another's entries is damaged where exactly these are cut off."""
    volume, seqs = synced(tmp_path / "disk")
    volume.write(9, fill(3))
    run(volume.flush())
    run(sync(volume, open_snapshot=False))
    dropped = volume.snapshots.find("open")
    assert dropped is not None
    run(volume.drop_snapshot(dropped))
    volume.close()
    truncate(tmp_path / "disk" / DIRECTORY / f"{seqs['closed']:020d}.ext", 2 * RECORD_SIZE)
    again = Volume(RealStorage(tmp_path / "disk"), limits=TINY, clock=Ticking())
    with pytest.raises(CorruptionError, match="ends at entry 3, but 4"):
        image_bytes(again, seqs["closed"])
    again.close()
