"""Claims about dmafs.core.pointers: an update is there wholly or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmafs.core.ondisk import POINTERS_SIZE, SLOT_OFFSETS, Pointers
from dmafs.core.pointers import NAME, PointerFile
from dmafs.core.storage import RealStorage
from dmafs.errors import CorruptionError, VersionError
from tests.unit.tools import FOREIGN, OURS, flip


@pytest.fixture
def storage(tmp_path: Path) -> RealStorage:
    storage = RealStorage(tmp_path)
    PointerFile.create(storage, Pointers(OURS, clean=True))
    return storage


def read(storage: RealStorage) -> Pointers:
    file = PointerFile(storage, OURS)
    try:
        return file.now
    finally:
        file.close()


def update(storage: RealStorage, **changes: int) -> None:
    file = PointerFile(storage, OURS)
    try:
        file.update(**changes)
    finally:
        file.close()


def test_new_file_has_both_slots(storage: RealStorage, tmp_path: Path) -> None:
    """A new pointer file has its full size and the same pointers in both slots."""
    content = (tmp_path / NAME).read_bytes()
    assert len(content) == POINTERS_SIZE
    assert {content[offset : offset + 512] for offset in SLOT_OFFSETS} == {Pointers(OURS, clean=True).encode()}
    assert read(storage) == Pointers(OURS, clean=True)


def test_update_changes_fields_and_counts_generations(storage: RealStorage) -> None:
    """Fields not named keep their value over updates and reopening; each update is one generation."""
    file = PointerFile(storage, OURS)
    file.update(durable=5)
    file.update(mirror_seq=3, clean=False)
    expected = Pointers(OURS, 2, clean=False, durable=5, mirror_seq=3)
    assert file.now == expected
    file.close()
    assert read(storage) == expected


def test_updates_alternate_between_the_slots(storage: RealStorage, tmp_path: Path) -> None:
    """An update leaves the slot of the generation before it alone."""
    for durable in range(1, 5):
        before = (tmp_path / NAME).read_bytes()
        update(storage, durable=durable)
        after = (tmp_path / NAME).read_bytes()
        changed = [offset for offset in SLOT_OFFSETS if before[offset : offset + 512] != after[offset : offset + 512]]
        assert changed == [SLOT_OFFSETS[durable % 2]]


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_torn_newest_slot_gives_the_one_before(storage: RealStorage, tmp_path: Path, updates: int) -> None:
    """After a torn update the pointers are those before it, and the next update goes into the torn slot."""
    for durable in range(1, updates + 1):
        update(storage, durable=durable)
    flip(tmp_path / NAME, SLOT_OFFSETS[updates % 2] + 40)
    assert read(storage).durable == updates - 1
    update(storage, durable=99)
    assert read(storage) == Pointers(OURS, updates, clean=True, durable=99)


def test_damaged_older_slot_does_not_matter(storage: RealStorage, tmp_path: Path) -> None:
    """A bad older slot changes nothing."""
    update(storage, durable=1)
    flip(tmp_path / NAME, SLOT_OFFSETS[0] + 100)
    assert read(storage).durable == 1


def test_both_slots_bad_is_corruption(storage: RealStorage, tmp_path: Path) -> None:
    """With no valid slot left the error names the file."""
    for offset in SLOT_OFFSETS:
        flip(tmp_path / NAME, offset + 200)
    with pytest.raises(CorruptionError, match="pointers at byte 0"):
        PointerFile(storage, OURS)


def test_pointers_of_another_volume_are_refused(storage: RealStorage) -> None:
    """A pointer file copied from another volume isn't taken for this one's."""
    with pytest.raises(CorruptionError, match=f"belongs to volume {OURS}, not to {FOREIGN}"):
        PointerFile(storage, FOREIGN)


def test_truncated_file_is_corruption(storage: RealStorage, tmp_path: Path) -> None:
    """A pointer file that is too short is damage."""
    (tmp_path / NAME).write_bytes(b"x" * 600)
    with pytest.raises(CorruptionError, match="pointers"):
        PointerFile(storage, OURS)


def test_newer_format_is_refused(storage: RealStorage, tmp_path: Path) -> None:
    """A slot of a later format isn't taken for a torn one."""
    flip(tmp_path / NAME, SLOT_OFFSETS[1] + 8, 0x07)
    with pytest.raises(VersionError, match=r"pointers at byte 4096 has format version"):
        PointerFile(storage, OURS)
