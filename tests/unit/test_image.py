"""Claims about dmafs.core.image: a map is never made from what has changed since, whatever happens at a yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmafs.core import layers
from dmafs.core.columns import Columns
from dmafs.core.ondisk import Flag
from dmafs.core.points import landmarks, point_named, seq_at
from dmafs.core.snapshot import Snapshot
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import Result, Work, run
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill

SIZE = 64


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    volume = copied_volume(tmp_path / "disk", fill(0, SIZE))
    yield volume
    volume.close()


def disturbed(work: Work[Result], disturb: Callable[[], Any]) -> Result:
    """Do work, and something else while each of its calls is under way."""
    try:
        call = next(work)
        while True:
            answer = call()
            disturb()
            call = work.send(answer)
    except StopIteration as stop:
        result: Result = stop.value
        return result


def test_a_write_while_the_live_map_is_made_is_in_it(volume: Volume) -> None:
    """Layers of finished segments are made in a thread; what is captured meanwhile belongs to the live image."""
    for number in range(30):
        volume.write(number % SIZE, fill(number + 1))
    values = iter(range(0xE0, 0xFF))
    disturbed(volume.live.locate(0, SIZE * SECTOR), lambda: volume.write(5, fill(next(values))))
    assert volume.live.read(5 * SECTOR, SECTOR) == fill(next(values) - 1)
    volume.check()


def test_the_live_image_is_there_while_syncs_pass(volume: Volume) -> None:
    """What is waited for is the live image as it is then, not that of the beginning, which a sync may have passed."""
    for number in range(30):
        volume.write(number, fill(number + 1))

    def advance() -> None:
        volume.write(40, fill(0xEE))
        run(volume.flush())
        run(sync(volume))

    disturbed(volume.live.locate(0, SIZE * SECTOR), advance)
    assert volume.live.read(40 * SECTOR, SECTOR) == fill(0xEE)
    volume.check()


def test_counting_allocated_sectors_asks_nothing_that_grows(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a write that comes meanwhile fails: an array can't grow while a thread looks into it."""
    volume.write(5, fill(0xEE))
    work = volume.image(volume.journal.head).measure()
    call = next(work)
    monkeypatch.setattr(Columns, "select", None)
    monkeypatch.setattr(layers, "references", None)
    with pytest.raises(StopIteration) as done:
        work.send(call())
    assert done.value.value == 1


def with_snapshots(volume: Volume, count: int) -> list[Snapshot]:
    """Take snapshots, each with a sector of its own in its journal, and forget all journals."""
    taken = []
    for number in range(count):
        taken.append(run(volume.take_snapshot()))
        volume.write(number, fill(0x10 + number))
        run(volume.flush())
        run(sync(volume))
    for segment in volume.snapshots.unload(keep=None, everything=True):
        segment.close()
    return taken


@pytest.mark.parametrize("victim", [1, 2, 3])
@pytest.mark.parametrize("at", range(8))
def test_snapshots_are_dropped_while_an_image_is_opened(volume: Volume, victim: int, at: int) -> None:
    """Whichever goes away, at whichever call: the image is what it was."""
    volume.write(0, fill(1, 8))
    taken = with_snapshots(volume, 4)
    image = volume.image(taken[0].seq)
    image.pins += 1
    work, calls = image.locate(0, 8 * SECTOR), 0

    def drop_when_due() -> None:
        nonlocal calls
        if calls == at:
            run(volume.drop_snapshot(taken[victim]))
        calls += 1

    disturbed(work, drop_when_due)
    assert image.read(0, 8 * SECTOR) == fill(1, 8)
    volume.check()


def test_opening_an_image_keeps_the_journals_that_it_reads_only(volume: Volume) -> None:
    """With 10,000 snapshots there would be 20,000 open files."""
    taken = with_snapshots(volume, 20)
    run(volume.warm())
    image = volume.image(taken[0].seq)
    run(volume.stack(image))
    loaded = [one for one in volume.snapshots.all() if one.segment is not None]
    assert loaded == volume.snapshots.all()[-1:]


def test_what_was_asked_of_the_mirror_while_it_was_written_is_not_kept(
    volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync writes in a thread; what was allocated before isn't what is."""
    write = volume.mirror.file.write

    def asked(buffers: list[bytes], offset: int) -> None:
        volume.mirror.allocated()
        write(buffers, offset)

    monkeypatch.setattr(volume.mirror.file, "write", asked)
    before = volume.mirror.allocated()[0].size
    volume.mirror.write(fill(1), 5)
    assert volume.mirror.allocated()[0].size == before + 1


def test_a_mark_that_only_a_held_image_keeps_is_not_found(volume: Volume) -> None:
    """Its time means the snapshot before it: under the mark's name that would be another moment."""
    volume.write(1, fill(1))
    run(volume.flush(flag=Flag.MARK, name="m"))
    image = volume.image(1)
    image.pins += 1
    assert point_named(volume, "m") is not None
    volume.write(2, fill(2))
    run(volume.flush())
    run(sync(volume))
    assert volume.recoverable(1)
    assert point_named(volume, "m") is None
    assert [point for point in landmarks(volume) if point.kind == "mark"] == []
    assert seq_at(volume, image.time_ns) == 0
