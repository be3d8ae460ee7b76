"""Claims about reading an image at once: what is there is right, what isn't there is said to be missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from dmafs.core.digests import BLOCK, HOLE, digest_of, matches, unequal
from dmafs.core.image import ZEROS, Image
from dmafs.core.ondisk import LOST
from dmafs.core.storage import RealFile
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.vrmo import MIRROR
from dmafs.core.work import run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill, flip

SIZE = 67


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    volume = copied_volume(tmp_path / "disk", Random(1).randbytes(SIZE * SECTOR))
    yield volume
    volume.close()


def scratch() -> memoryview:
    return memoryview(bytearray(b"\xaa" * (SIZE * SECTOR)))


def at_once(image: Image, start: int = 0, stop: int = SIZE) -> bytes | None:
    """Read sectors at once, after what they need has been brought into memory."""
    image.resolve(start * SECTOR, (stop - start) * SECTOR)
    data = image.read_nowait(start * SECTOR, (stop - start) * SECTOR, scratch())
    return None if data is None else bytes(data)


def test_any_range_of_any_moment_is_as_it_was(volume: Volume) -> None:
    random = Random(2)
    now = bytearray(volume.live.read(0, SIZE * SECTOR))
    history = {0: bytes(now)}
    for number in range(120):
        start = random.randrange(SIZE)
        length = min(random.choice([1, 1, 2, 8]), SIZE - start)
        if random.random() < 0.2:
            volume.discard(start, length)
            data = bytes(length * SECTOR)
        else:
            data = random.randbytes(length * SECTOR)
            volume.write(start, data)
        now[start * SECTOR : (start + length) * SECTOR] = data
        history[volume.journal.head] = bytes(now)
        if number % 10 == 9:
            run(volume.flush())
            if number % 20 == 19:
                run(sync(volume))
    kinds = set()
    for seq in [seq for seq in history if seq >= volume.floor or volume.snapshots.visible_at(seq)]:
        image = volume.image(seq)
        image.pins += 1
        for _ in range(20):
            start = random.randrange(SIZE)
            stop = random.randrange(start, SIZE) + 1
            assert at_once(image, start, stop) == history[seq][start * SECTOR : stop * SECTOR]
            kinds |= {min(piece.entry, 0) for piece in image.resolve(0, SIZE * SECTOR)}
        image.pins -= 1
    assert kinds == {0, MIRROR, ZEROS}
    volume.check()


@pytest.mark.parametrize(
    ("offset", "length"), [(1, SECTOR), (SECTOR, 1), (SIZE * SECTOR, SECTOR), (0, (SIZE + 1) * SECTOR)]
)
def test_what_is_not_whole_sectors_within_is_left_to_others(volume: Volume, offset: int, length: int) -> None:
    assert volume.live.read_nowait(offset, length, memoryview(bytearray(length))) is None


def test_more_than_the_buffer_holds_is_left_to_others(volume: Volume) -> None:
    run(volume.live.locate(0, 2 * SECTOR))
    assert volume.live.read_nowait(0, 2 * SECTOR, memoryview(bytearray(SECTOR))) is None


def test_what_is_not_in_memory_is_missing(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    image = volume.image(0)
    assert image.read_nowait(0, SECTOR, scratch()) is None, "no page is made"
    assert at_once(image, 0, 1) is not None

    def uncached(_self: RealFile, _buffer: object, _offset: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(RealFile, "read_into_nowait", uncached)
    assert image.read_nowait(0, SECTOR, scratch()) is None, "it isn't in the page cache"


def test_an_image_that_is_not_kept_up_to_date_is_missing(volume: Volume) -> None:
    image = Image(volume, 0, 1)
    assert image.read_nowait(0, SECTOR, scratch()) is None


def overwritten(volume: Volume, *starts: int) -> Image:
    """Overwrite blocks, sync, and return the image before, held: between those blocks it is on the mirror."""
    image = volume.image(0)
    image.pins += 1
    for start in starts:
        volume.write(start, fill(7, 8))
    run(volume.flush())
    run(sync(volume))
    return image


def test_the_mirror_is_read_once_for_all_that_is_on_it(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bytes(volume.live.read(0, SIZE * SECTOR))
    image = overwritten(volume, 8, 32)
    assert at_once(image) == before
    reads = []
    read = volume.mirror.read_into

    def counted(buffer: memoryview, start: int, *, nowait: bool = False) -> None:
        reads.append((start, len(buffer) // SECTOR))
        read(buffer, start, nowait=nowait)

    monkeypatch.setattr(volume.mirror, "read_into", counted)
    assert at_once(image) == before
    assert reads == [(0, SIZE)]


def test_damage_between_what_is_read_does_no_harm(volume: Volume) -> None:
    before = bytes(volume.live.read(0, SIZE * SECTOR))
    image = overwritten(volume, 8, 32)
    flip(Path(volume.mirror.file.name), 33 * SECTOR)
    assert at_once(image) == before
    with pytest.raises(CorruptionError, match="block 4"):
        at_once(volume.live, 32, 40)


def test_damage_in_what_is_read_is_an_error(volume: Volume) -> None:
    image = overwritten(volume, 8, 32)
    flip(Path(volume.mirror.file.name), 20 * SECTOR)
    with pytest.raises(CorruptionError, match="block 2"):
        at_once(image)
    segment = volume.snapshots.segment(next(iter(volume.snapshots)))
    flip(Path(segment.dat.name), segment.physicals[segment.starts.index(32)] * SECTOR)
    for start, stop in ((32, 40), (33, 35)):
        with pytest.raises(CorruptionError, match="checksum"):
            at_once(image, start, stop)


def test_blocks_are_compared_with_their_digests() -> None:
    random = Random(3)
    data = bytearray(random.randbytes(5 * BLOCK) + bytes(2 * BLOCK) + random.randbytes(SECTOR))
    view = memoryview(data)
    blocks = [view[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    digests = [digest_of(block) if any(block) else HOLE for block in blocks]
    assert unequal(view, digests) == []
    digests[1], digests[3] = LOST, HOLE
    digests[6] = digest_of(bytes(BLOCK))
    data[2 * BLOCK] ^= 1
    data[6 * BLOCK - 1] ^= 1
    assert unequal(view, digests) == [1, 2, 3, 5]
    assert [number for number, block in enumerate(blocks) if not matches(block, digests[number])] == [1, 2, 3, 5]


def test_a_digest_that_nothing_has_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even that of data whose plain checksum it would be."""
    monkeypatch.setattr("xxhash.xxh3_64_intdigest", lambda _data: LOST)
    assert unequal(memoryview(bytearray(b"x" * BLOCK)), [LOST]) == [0]
