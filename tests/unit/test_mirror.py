"""Claims about dmafs.core.mirror and dmafs.core.digests: no damaged block is served, whatever happens to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dmafs.core import digests as tables
from dmafs.core.digests import BLOCK, CHUNK_BLOCKS, HOLE, TABLE_OFFSET, Digests, Verdicts, digest_of, partial_blocks
from dmafs.core.mirror import Mirror
from dmafs.core.ondisk import LOST
from dmafs.core.store import open_volume
from dmafs.core.sync import finish, sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError, VersionError
from dmafs.units import SECTOR
from tests.unit.tools import TINY, Ticking, copied_volume, fill, flip

SIZE = 45  # five blocks and a short one
CONTENT = b"".join(fill(value + 1) for value in range(SIZE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def volume(path: Path) -> Iterator[Volume]:
    found = copied_volume(path, CONTENT)
    yield found
    found.close()


def reopened(volume: Volume, path: Path) -> Volume:
    volume.close()
    return open_volume(path, limits=TINY, clock=Ticking())


def readable(volume: Volume, seq: int) -> list[int | None]:
    """Return what each sector of an image is filled with, None where it can't be read."""
    found: list[int | None] = []
    image = volume.image(seq)
    for sector in range(SIZE):
        try:
            data = bytes(image.read(sector * SECTOR, SECTOR))
        except CorruptionError:
            found.append(None)
        else:
            assert data == data[:1] * SECTOR
            found.append(data[0])
    return found


def expected(**changed: int | None) -> list[int | None]:
    """Return the first content, changed where the names ``s<first>_<stop>`` say."""
    found: list[int | None] = [value + 1 for value in range(SIZE)]
    for name, value in changed.items():
        first, stop = (int(number) for number in name[1:].split("_"))
        found[first:stop] = [value] * (stop - first)
    return found


def test_the_copy_gives_every_block_a_digest(volume: Volume) -> None:
    """The short last block has one, too, and all are what the data says."""
    table = volume.mirror.digests.read(0, 6).tolist()
    assert table == [digest_of(CONTENT[at : at + BLOCK]) for at in range(0, len(CONTENT), BLOCK)]
    volume.mirror.check()


def test_holes_have_none(tmp_path: Path) -> None:
    """A block of zeros has no digest, and is still checked."""
    volume = copied_volume(tmp_path / "disk", bytes(4 * BLOCK))
    assert volume.mirror.digests.read(0, 4).tolist() == [HOLE] * 4
    flip(tmp_path / "disk" / "mirror.img", 2 * BLOCK + 17)
    with pytest.raises(CorruptionError, match=r"block 2 of .*mirror.img doesn't match"):
        volume.live.read(2 * BLOCK, SECTOR)
    assert volume.live.read(BLOCK, BLOCK) == bytes(BLOCK)
    volume.close()


@pytest.mark.parametrize("sector", [0, 11, 39, 44])
def test_a_flipped_bit_is_an_error_in_its_block_only(volume: Volume, path: Path, sector: int) -> None:
    """All other blocks can be read, and what touches the block can't; the message names file and extent."""
    flip(path / "mirror.img", sector * SECTOR + 100)
    begin, end = sector // 8 * 8, min(sector // 8 * 8 + 8, SIZE)
    assert readable(volume, 0) == expected(**{f"s{begin}_{end}": None})
    with pytest.raises(CorruptionError, match=rf"mirror.img doesn't match \(extent {begin}\+{end - begin} sectors\)"):
        volume.live.read(0, SIZE * SECTOR)


def test_a_damaged_digest_is_an_error(volume: Volume, path: Path) -> None:
    """Data that its digest doesn't confirm isn't served."""
    flip(path / "digests", TABLE_OFFSET + 8 * 3 + 2)
    assert readable(volume, 0) == expected(s24_32=None)


def test_what_was_verified_is_not_read_again(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests of a block are asked for once, until a sync has changed it."""
    volume.live.read(0, SIZE * SECTOR)
    asked: list[tuple[int, int]] = []
    plain = Digests.read_few

    def read(self: Digests, first: int, last: int, *, nowait: bool = False) -> tuple[int, ...]:
        asked.append((first, last))
        return plain(self, first, last, nowait=nowait)

    monkeypatch.setattr(Digests, "read_few", read)
    volume.live.read(5, SIZE * SECTOR - 5)
    assert asked == []
    volume.write(8, fill(99, 8))
    run(volume.flush())
    run(sync(volume))
    asked.clear()
    volume.live.read(0, SIZE * SECTOR)
    assert asked == [(0, 6)]
    asked.clear()
    volume.live.read(0, SIZE * SECTOR)
    assert asked == []


def test_digests_follow_a_sync(volume: Volume) -> None:
    """Whole blocks, parts of blocks, seams of several writes within one, discards, the short end: all have digests."""
    rng = Random(5)
    for _ in range(60):
        start = rng.randrange(SIZE)
        length = rng.randrange(1, min(20, SIZE - start) + 1)
        if rng.random() < 0.3:
            volume.discard(start, length)
        else:
            volume.write(start, rng.randbytes(length * SECTOR))
        if rng.random() < 0.5:
            run(volume.flush())
            run(sync(volume, open_snapshot=rng.random() < 0.5))
            volume.check()
            blocks = range(0, SIZE * SECTOR, BLOCK)
            content = Path(volume.mirror.file.name).read_bytes()
            assert LOST not in volume.mirror.digests.read(0, len(blocks)).tolist()
            assert bytes(volume.live.read(0, SIZE * SECTOR)) == content


def test_eight_sectors_at_the_end_are_two_blocks(volume: Volume) -> None:
    """An event as long as a block, whose checksum is no block's digest because it begins inside of one."""
    volume.write(SIZE - 8, fill(99) * 8)
    run(volume.flush())
    run(sync(volume))
    volume.mirror.check()
    assert readable(volume, 1) == expected(s37_45=99)


def test_a_damaged_event_is_lost_where_it_went(volume: Volume, path: Path) -> None:
    """A sync goes on past a journal entry that doesn't match its checksum; its blocks can't be read any more."""
    volume.write(8, fill(100, 8))
    volume.write(17, fill(101, 2))
    volume.write(32, fill(102, 1))
    run(volume.flush())
    for seq in (1, 2):
        segment = volume.journal.segment_of(seq)
        flip(Path(segment.dat.name), segment.physicals[seq - segment.header.first] * SECTOR)
    run(sync(volume))
    lost = {"s8_16": None, "s16_24": None}
    assert readable(volume, 3) == expected(**lost, s32_33=102)
    before = {"s16_17": None, "s19_24": None}  # what was overwritten had been saved
    assert readable(volume, 0) == expected(**before)
    volume = reopened(volume, path)
    assert readable(volume, 3) == expected(**lost, s32_33=102)
    volume.write(16, fill(103, 8))
    volume.write(8, fill(104, 4))
    run(volume.flush())
    run(sync(volume))
    assert readable(volume, 5) == expected(s8_16=None, s16_24=103, s32_33=102)
    assert readable(volume, 3) == expected(**lost, s32_33=102)
    volume.close()


def test_damage_is_lost_when_it_is_saved(volume: Volume, path: Path) -> None:
    """Of a damaged block nothing gets a checksum that matches: not in the snapshot, not what stays on the mirror."""
    flip(path / "mirror.img", 9 * SECTOR)
    flip(path / "mirror.img", 33 * SECTOR)
    volume = reopened(volume, path)
    volume.write(4, fill(100, 6))
    volume.write(32, fill(101, 8))
    run(volume.flush())
    run(sync(volume))
    assert readable(volume, 0) == expected(s8_16=None, s32_40=None)
    assert readable(volume, 2) == expected(s4_8=100, s8_16=None, s32_40=101)
    volume = reopened(volume, path)
    volume.check()
    assert readable(volume, 0) == expected(s8_16=None, s32_40=None)
    snapshot = volume.snapshots.at(0)
    assert snapshot is not None
    volume.write(0, fill(102, 8))
    run(volume.flush())
    run(sync(volume))
    assert readable(volume, 0) == expected(s8_16=None, s32_40=None)
    newer = volume.snapshots.at(2)
    assert newer is not None
    run(volume.drop_snapshot(newer))
    assert readable(volume, 0) == expected(s8_16=None, s32_40=None)
    volume.close()


def test_a_merge_takes_damage_along(volume: Volume, path: Path) -> None:
    """What a dropped snapshot held damaged can't be read in the older one that it is merged into, and only that."""
    first = run(volume.take_snapshot())
    run(volume.flush())
    volume.write(0, fill(100))
    run(volume.flush())
    run(sync(volume))
    volume.write(8, fill(101, 8))
    volume.write(24, fill(102, 8))
    run(volume.flush())
    run(sync(volume))
    newer = volume.snapshots.at(1)
    assert newer is not None
    segment = volume.snapshots.segment(newer)
    flip(Path(segment.dat.name), 3 * SECTOR)
    assert segment.starts[0] == 8
    run(volume.drop_snapshot(newer))
    assert readable(volume, first.seq) == expected(s8_16=None)
    volume = reopened(volume, path)
    assert readable(volume, first.seq) == expected(s8_16=None)
    volume.close()


@pytest.mark.parametrize("when", ["committed", "half overwritten", "overwritten"])
def test_a_sync_that_is_done_again_keeps_what_is_lost(volume: Volume, path: Path, when: str) -> None:
    """A block that is lost and overwritten in part stays so, wherever the sync was cut off."""
    flip(path / "mirror.img", 15 * SECTOR)
    volume.write(9, fill(100, 2))
    volume.write(16, fill(101, 8))
    run(volume.flush())
    work = sync(volume)
    call = next(work)
    while volume.pointers.now.sync_target == 0:
        call = work.send(call())
    if when != "committed":
        answer = call()
        if when == "overwritten":
            work.send(answer)()
    work.close()
    volume = reopened(volume, path)
    assert readable(volume, 2) == expected(s8_16=None, s16_24=101)
    assert readable(volume, 0) == expected(s8_16=None)
    volume.check()
    volume.close()


def test_readers_of_blocks_in_flux_are_served(volume: Volume) -> None:
    """While a sync overwrites part of a block the rest of it can be read, and isn't taken for verified afterwards."""
    volume.write(9, fill(100, 2))
    run(volume.flush())
    work = sync(volume)
    call = next(work)
    while volume.pointers.now.sync_target == 0:
        call = work.send(call())
    call()  # the mirror has the new data, the table the old digest
    part = bytearray(SECTOR)
    volume.mirror.read_into(part, 12)
    assert part == fill(13)
    while True:
        try:
            call = work.send(None)
        except StopIteration:
            break
        call()
    flip(Path(volume.mirror.file.name), 12 * SECTOR)
    with pytest.raises(CorruptionError):
        volume.mirror.read_into(part, 12)


def test_finishing_begins_from_any_state_of_the_table(volume: Volume) -> None:
    """Digests that were torn when a committed sync was cut off are written again."""
    volume.write(9, fill(100, 2))
    volume.write(16, fill(101, 8))
    run(volume.flush())
    work = sync(volume)
    call = next(work)
    while volume.pointers.now.sync_target == 0:
        call = work.send(call())
    work.close()
    volume.mirror.digests.file.write([b"\x55" * 16], TABLE_OFFSET + 8)
    run(finish(volume))
    volume.check()
    assert readable(volume, 2) == expected(s9_11=100, s16_24=101)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "digests is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "has 4136 bytes instead of 4144"),
        (lambda path: flip(path, 8), "format version"),
        (lambda path: flip(path, 0), "doesn't begin with DMAFSDIG"),
        (lambda path: flip(path, 20), "checksum of .*digests doesn't match"),
    ],
)
def test_a_table_that_is_none_is_refused(volume: Volume, path: Path, damage: object, message: str) -> None:
    """A missing, foreign or damaged table is an error that names it."""
    assert callable(damage)
    damage(path / "digests")
    volume.close()
    with pytest.raises((CorruptionError, VersionError), match=message):
        open_volume(path, limits=TINY, clock=Ticking())


def test_a_table_of_another_volume_is_refused(volume: Volume, path: Path, tmp_path: Path) -> None:
    """A table from another store is an error."""
    other = copied_volume(tmp_path / "other", CONTENT)
    other.close()
    (path / "digests").write_bytes((tmp_path / "other" / "digests").read_bytes())
    volume.close()
    with pytest.raises(CorruptionError, match="belongs to volume"):
        open_volume(path, limits=TINY, clock=Ticking())


def test_partial_blocks_are_those_with_an_end_inside() -> None:
    """The end of the volume is no end inside of a block."""
    starts, stops = np.array([0, 10, 24, 42]), np.array([8, 16, 30, 45])
    assert partial_blocks(starts, stops, 45).tolist() == [1, 3, 5]
    assert partial_blocks(np.array([40]), np.array([45]), 45).tolist() == []
    assert partial_blocks(np.array([40]), np.array([44]), 45).tolist() == [5]


def test_flushed_digests_are_what_was_put(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is put, in any order, over any number of windows: the last digest of each block is in the table."""
    monkeypatch.setattr(tables, "_WINDOW", 2)
    monkeypatch.setattr(tables, "PENDING_DIGESTS", 4)
    rng, digests = Random(1), volume.mirror.digests
    shown = digests.read(0, 6).tolist()
    for _ in range(200):
        block = rng.randrange(6)
        if rng.random() < 0.1:
            end = rng.randrange(block, 6) + 1
            digests.put_holes(block, end)
            shown[block:end] = [HOLE] * (end - block)
        else:
            shown[block] = rng.randrange(2**64)
            digests.put(block, shown[block])
    digests.flush()
    assert digests.read(0, 6).tolist() == shown


def test_verdicts_are_a_set_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was added and not forgotten is held, over chunks; of too many the oldest chunk goes."""
    rng, verdicts = Random(2), Verdicts()
    held = np.zeros(3 * CHUNK_BLOCKS, bool)
    for _ in range(300):
        first = rng.randrange(len(held) - 1)
        last = min(len(held), first + rng.choice([1, 5, 40000]))
        if rng.random() < 0.5:
            verdicts.add(first, last)
            held[first:last] = True
        else:
            verdicts.forget(np.array([first]), np.array([last]))
            held[first:last] = False
        first = rng.randrange(len(held) - 1)
        last = min(len(held), first + rng.choice([1, 100, 30000]))
        assert verdicts.hold(first, last) == bool(held[first:last].all())
    monkeypatch.setattr(tables, "VERDICT_CHUNKS", 2)
    small = Verdicts()
    for number in range(3):
        small.add(number * CHUNK_BLOCKS, number * CHUNK_BLOCKS + 1)
    assert [small.hold(number * CHUNK_BLOCKS, number * CHUNK_BLOCKS + 1) for number in range(3)] == [False, True, True]


def test_a_large_hole_is_punched_out_of_the_table(tmp_path: Path) -> None:
    """A discard of much takes one call, and the digests around it stay."""
    blocks = 2000
    volume = copied_volume(tmp_path / "disk", b"\x07" * (blocks * BLOCK))
    volume.discard(8 * 3, 8 * 1900)
    run(volume.flush())
    run(sync(volume))
    volume.check()
    full = digest_of(b"\x07" * BLOCK)
    assert volume.mirror.digests.read(0, blocks).tolist() == [full] * 3 + [HOLE] * 1900 + [full] * 97
    volume.close()


def test_parts_tell_good_from_damaged(volume: Volume, path: Path) -> None:
    """An extent falls into runs of blocks that can be read and that can't, cut to the extent."""
    flip(path / "mirror.img", 17 * SECTOR)
    mirror: Mirror = volume.mirror
    found = [(start, stop, data and bytes(data)) for start, stop, data in mirror.read_run([(3, 43)])]
    assert found == [
        (3, 16, CONTENT[3 * SECTOR : 16 * SECTOR]),
        (16, 24, None),
        (24, 43, CONTENT[24 * SECTOR : 43 * SECTOR]),
    ]
