"""Claims about dmafs.core.scrub: all damage is found, where it shows is told exactly, and what can be is repaired."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from dmafs.core import copy
from dmafs.core import scrub as scrubs
from dmafs.core.digests import BLOCK, TABLE_OFFSET
from dmafs.core.ondisk import HEADER_SIZE, LOST
from dmafs.core.scrub import NAME, Damage, Rest, Scrubbed, last_scrub, scope_sectors, scrub
from dmafs.core.storage import open_source
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.throttle import Throttle
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.tools import TINY, Ticking, all_images, copied_volume, fill, flip, segments_of

SIZE = 45
CONTENT = bytes(BLOCK) + b"".join(fill(value + 1) for value in range(8, SIZE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture(autouse=True)
def small_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_HOLE_GRAIN", BLOCK)


@pytest.fixture
def volume(path: Path) -> Iterator[Volume]:
    found = copied_volume(path, CONTENT)
    yield found
    found.close()


def grow(volume: Volume, rng: Random, events: int) -> None:
    """Write here and there, and sync now and then."""
    for _ in range(events):
        start = rng.randrange(SIZE)
        volume.write(start, rng.randbytes(rng.randrange(1, min(12, SIZE - start) + 1) * SECTOR))
        if rng.random() < 0.5:
            run(volume.flush())
        if rng.random() < 0.15:
            run(volume.flush())
            run(sync(volume))
    run(volume.flush())


def scrubbed(volume: Volume, primary: Path | None = None) -> Scrubbed:
    if primary is None:
        return run(scrub(volume, None, Rest(), lambda _done: None))
    source = open_source(primary, writable=False)
    try:
        return run(scrub(volume, source, Rest(), lambda _done: None))
    finally:
        source.close()


def unreadable(volume: Volume, seq: int) -> set[int]:
    """Return the sectors of a moment that can't be read."""
    found = set()
    for sector in range(SIZE):
        try:
            volume.image(seq).read(sector * SECTOR, SECTOR)
        except CorruptionError:
            found.add(sector)
    return found


def moments(volume: Volume) -> list[int]:
    return [seq for seq in range(volume.journal.head + 1) if volume.recoverable(seq)]


def shown_by(damage: Damage, seq: int) -> bool:
    assert (damage.first is None) == (damage.last is None)
    return damage.first is not None and damage.last is not None and damage.first[0] <= seq <= damage.last[0]


def test_what_is_whole_is_found_whole(volume: Volume) -> None:
    """Everything is gone through, nothing is found, and the state says so, until the next scrub begins anew."""
    grow(volume, Random(1), 60)
    done: list[int] = []
    found = run(scrub(volume, None, Rest(), done.append))
    assert (found.count, found.left, found.damage) == (0, 0, [])
    assert done == sorted(done)
    assert 0.9 * scope_sectors(volume) < done[-1] <= scope_sectors(volume)
    assert found.read_bytes > SIZE * SECTOR
    assert last_scrub(volume) == found
    assert found.ended_ns > found.begun_ns
    again = run(scrub(volume, None, Rest(), done.append))
    assert again.begun_ns > found.ended_ns


def test_what_the_mirror_has_already_is_not_looked_at(volume: Volume) -> None:
    """The rest of a segment is needed, the data before it may be gone: that is no damage, and it shows nowhere."""
    for sector in (1, 2, 3):
        volume.write(sector, fill(sector))
        run(volume.flush())
    run(sync(volume, target=2))
    segment = volume.journal.segment_of(3)
    assert segment.header.first == 1
    for seq in (1, 2):
        flip(Path(segment.dat.name), segment.physicals[seq - 1] * SECTOR)
    assert scrubbed(volume).count == 0
    flip(Path(segment.dat.name), segment.physicals[2] * SECTOR)
    assert [one.first and one.first[0] for one in scrubbed(volume).damage] == [3]


def damage_one(volume: Volume, path: Path, rng: Random) -> tuple[str, int, int]:
    """Flip a bit of some data; return place, and the sectors that are damaged by that."""
    mirror = path / "mirror.img"
    places = [("mirror", mirror, start * SECTOR, start, min(start + 8, SIZE)) for start in range(0, SIZE, 8)]
    journal = [("forward", segment) for segment in segments_of(volume.journal)]
    snapshots = [run(volume.snapshots.load(snapshot)) for snapshot in volume.snapshots.all()]
    for kind, segment in journal + [("backward", segment) for segment in snapshots]:
        for index in range(len(segment)):
            if not segment.is_zero(index) and (
                kind == "backward" or segment.header.first + index <= volume.journal.head
            ):
                at, start = segment.physicals[index] * SECTOR, segment.starts[index]
                places.append((kind, Path(segment.dat.name), at, start, start + segment.lengths[index]))
    kind = rng.choice(sorted({place[0] for place in places}))
    _, file, offset, start, stop = rng.choice([place for place in places if place[0] == kind])
    flip(file, offset + rng.randrange((stop - start) * SECTOR), 1 << rng.randrange(8))
    return kind, start, stop


@pytest.mark.parametrize("seed", range(24))
def test_damage_is_found_and_shows_where_it_is_told(path: Path, seed: int) -> None:
    """Each damaged place is found once; the moments that show it are those where it can't be read, and no others."""
    rng = Random(seed)
    volume = copied_volume(path, CONTENT)
    grow(volume, rng, 40)
    volume.close()
    volume = open_volume(path, limits=TINY, clock=Ticking(10**6))
    kind, start, stop = damage_one(volume, path, rng)
    found = scrubbed(volume)
    assert [(one.place, one.start, one.stop, one.repaired) for one in found.damage] == [(kind, start, stop, False)]
    assert (path / found.damage[0].file).is_file()
    (damage,) = found.damage
    for seq in moments(volume):
        bad = unreadable(volume, seq)
        assert bad <= set(range(start, stop))
        assert bool(bad) == shown_by(damage, seq), f"the moment at {seq}"
        assert damage.newest == (bool(unreadable(volume, volume.journal.head)))
    for moment in (damage.first, damage.last):
        assert moment is None or moment[1] == volume.time_of(moment[0])
    volume.close()


def test_cached_verdicts_are_forgotten(volume: Volume, path: Path) -> None:
    """What was verified before is an error once the scrub has found it damaged."""
    volume.write(20, fill(9))
    run(volume.flush())
    before = all_images(volume)
    flip(path / "mirror.img", 3 * BLOCK)
    flip(Path(segments_of(volume.journal)[0].dat.name), 5)
    assert all_images(volume)[0][:BLOCK] == before[0][:BLOCK]
    assert scrubbed(volume).count == 2
    assert unreadable(volume, 1) == {20, *range(24, 32)}


def test_the_primary_repairs_what_it_has(volume: Volume, path: Path, tmp_path: Path) -> None:
    """Blocks of the mirror and events that the primary still has are as before; what it hasn't stays an error."""
    primary = tmp_path / "disk.primary"
    volume.write(20, fill(9))
    volume.write(30, fill(10))
    run(volume.flush())
    content = bytearray(CONTENT)
    content[20 * SECTOR : 21 * SECTOR] = fill(9)
    content[30 * SECTOR : 31 * SECTOR] = fill(11)  # written again since
    content[33 * SECTOR : 34 * SECTOR] = fill(12)
    primary.write_bytes(content)
    before = all_images(volume)
    for offset in (10, BLOCK + 1, 4 * BLOCK + 2):  # zeros, what the primary has, what it hasn't
        flip(path / "mirror.img", offset)
    segment = segments_of(volume.journal)[0]
    for index in range(2):
        flip(Path(segment.dat.name), segment.physicals[index] * SECTOR)
    damaged = path.joinpath("mirror.img").read_bytes()[4 * BLOCK : 5 * BLOCK]
    found = scrubbed(volume, primary)
    assert path.joinpath("mirror.img").read_bytes()[4 * BLOCK : 5 * BLOCK] == damaged, "nobody knows better"
    assert [(one.place, one.start, one.stop, one.repaired) for one in found.damage] == [
        ("mirror", 0, 16, True),
        ("mirror", 32, 40, False),
        ("forward", 20, 21, True),
        ("forward", 30, 31, False),
    ]
    assert (found.count, found.repaired, found.left) == (4, 2, 2)
    assert unreadable(volume, 2) == {30, *range(32, 40)}
    assert volume.image(2).read(0, 30 * SECTOR) == before[2][: 30 * SECTOR]
    assert scrubbed(volume, primary).count == 2


def test_without_a_primary_only_zeros_are_repaired(volume: Volume, path: Path) -> None:
    flip(path / "mirror.img", 10)
    flip(path / "mirror.img", BLOCK + 10)
    found = scrubbed(volume)
    assert [(one.start, one.stop, one.repaired) for one in found.damage] == [(0, 8, True), (8, 16, False)]
    assert path.joinpath("mirror.img").read_bytes()[:BLOCK] == bytes(BLOCK)


def test_nothing_repairs_what_is_lost(volume: Volume, path: Path, tmp_path: Path) -> None:
    """Of a lost block nobody knows what it was, whatever the primary has."""
    table = bytearray((path / "digests").read_bytes())
    table[TABLE_OFFSET + 8 : TABLE_OFFSET + 16] = LOST.to_bytes(8, "little")
    (path / "digests").write_bytes(table)
    found = scrubbed(volume, tmp_path / "disk.primary")
    assert [(one.start, one.stop, one.repaired) for one in found.damage] == [(8, 16, False)]


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_damaged_descriptors_are_found(volume: Volume, path: Path, kind: str) -> None:
    """Of a file whose descriptors aren't what was written all is damaged, also while the right ones are in memory."""
    grow(volume, Random(3), 60)
    snapshot = volume.snapshots.all()[0]
    run(volume.snapshots.load(snapshot))
    stem = segments_of(volume.journal)[0].stem if kind == "forward" else snapshot.stem
    flip(path / f"{stem}.ext", HEADER_SIZE + 20)
    found = scrubbed(volume)
    assert [(one.place, one.file, one.start, one.stop) for one in found.damage] == [(kind, f"{stem}.ext", 0, SIZE)]


def steps_of(work: Work[Scrubbed], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do some calls of a scrub that writes its position down at each look, and give it up."""
    monkeypatch.setattr(scrubs, "SAVED_NS", 0)
    monkeypatch.setattr(scrubs, "STEP_BLOCKS", 1)
    monkeypatch.setattr(scrubs, "STEP_EVENTS", 1)
    try:
        call = next(work)
        for _ in range(count):
            call = work.send(call())
    except StopIteration:
        return
    work.close()


@pytest.mark.parametrize("count", [3, 11, 30, 50])
def test_who_begins_goes_on(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrub that was cut off anywhere is taken up by the next one, which finds what is left, each place once."""
    volume = copied_volume(path, CONTENT)
    grow(volume, Random(5), 40)
    flip(path / "mirror.img", BLOCK)
    flip(path / "mirror.img", 5 * BLOCK)
    volume.close()
    volume = open_volume(path, limits=TINY, clock=Ticking(10**6))
    whole = scrubbed(volume)
    (path / NAME).unlink()
    steps_of(scrub(volume, None, Rest(), lambda _done: None), count, monkeypatch)
    cut = last_scrub(volume)
    assert cut is not None
    assert not cut.ended_ns
    volume.close()
    volume = open_volume(path, limits=TINY, clock=Ticking(10**7))
    found = scrubbed(volume)
    assert found.begun_ns == cut.begun_ns
    assert [(one.place, one.start) for one in found.damage] == [(one.place, one.start) for one in whole.damage]
    assert found.read_bytes == whole.read_bytes
    assert found.done_sectors == whole.done_sectors
    volume.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b'{"format": 999, "begun_ns": 1}', b"\xff", b'{"format": 4, "begun_ns": "x"}'],
)
def test_a_position_that_is_none_is_forgotten(
    volume: Volume, path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """The scrub begins anew, and says so."""
    (path / NAME).write_bytes(content)
    assert scrubbed(volume).ended_ns
    assert "the next scrub begins anew" in caplog.text
    assert json.loads((path / NAME).read_bytes())["walk"] == 3


def test_between_two_steps_the_volume_may_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncs, drops and writes between any two steps: nothing whole is found damaged, and the scrub ends."""
    monkeypatch.setattr(scrubs, "STEP_BLOCKS", 1)
    monkeypatch.setattr(scrubs, "STEP_EVENTS", 2)
    rng = Random(8)
    volume = copied_volume(path, CONTENT)
    grow(volume, rng, 30)
    changes = 0

    def at_rest(work: Work[int]) -> Work[int]:
        nonlocal changes
        if changes < 60:
            changes += 1
            grow(volume, rng, 2)
            snapshots = list(volume.snapshots)
            if len(snapshots) > 2 and rng.random() < 0.5:
                run(volume.drop_snapshot(rng.choice(snapshots)))
            for garbage in volume.take_garbage():
                garbage.close()
        return (yield from work)

    found = run(scrub(volume, None, Rest(at_rest), lambda _done: None))
    assert found.count == 0
    assert changes > 10
    volume.check()
    volume.close()


def test_the_rate_is_kept(volume: Volume) -> None:
    """What is read is taken from the throttle, and its pauses are made."""
    grow(volume, Random(2), 20)
    pauses: list[float] = []

    def pause(seconds: float) -> Work[object]:
        pauses.append(seconds)
        yield lambda: None
        return None

    now = [0.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731 - a clock that stands still
    found = run(scrub(volume, None, Rest(pause=pause, throttle=Throttle(1000, clock)), lambda _done: None))
    assert pauses[-1] == pytest.approx((found.read_bytes - 250) / 1000)
