"""Locating what an image is made of, while syncs and drops change it between two steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmafs.core.image import Image
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import NoSuchPointError
from tests.unit.tools import TINY, copied_volume, fill

SIZE = 8


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """A volume with snapshots at 0, 1, 2 and the mirror at 3; event n + 1 overwrote sector n."""
    made = copied_volume(tmp_path / "disk", fill(9, SIZE), limits=dataclasses.replace(TINY, images=1))
    for sector in range(3):
        write(made, sector)
        run(sync(made))
    yield made
    made.close()


def write(volume: Volume, sector: int) -> None:
    volume.write(sector, fill(1))
    run(volume.flush())


def drop(volume: Volume, seq: int) -> None:
    snapshot = volume.snapshots.visible_at(seq)
    assert snapshot is not None
    run(volume.drop_snapshot(snapshot))


def unload(volume: Volume) -> None:
    for segment in volume.snapshots.unload(keep=None, everything=True):
        segment.close()


def located(image: Image, meanwhile: Callable[[int], None]) -> bytes:
    """Locate and read a whole image; *meanwhile* gets the number of each call, once it is done and not told yet."""
    work = image.locate(0, image.size)
    calls, answer = 0, None
    while True:
        try:
            call: Callable[[], Any] = work.send(answer)
        except StopIteration as stop:
            return bytes(image.read_pieces(stop.value, 0, image.size))
        answer = call()
        calls += 1
        meanwhile(calls)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("dropped", [1, 2])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_drop_between_two_steps_changes_nothing(volume: Volume, *, when: int, dropped: int, held: bool) -> None:
    """What a younger snapshot had for an older image is found where it was merged to, also if that one was loading."""
    image = volume.image(0)
    image.pins += held
    assert image.read(0, image.size) == fill(9, SIZE)
    unload(volume)  # the map is made, and the three journals that it names have to be loaded one after the other
    seen = []

    def meanwhile(calls: int) -> None:
        seen.append(calls)
        if calls == when:
            drop(volume, dropped)

    assert located(image, meanwhile) == fill(9, SIZE)
    assert when in seen
    volume.check()


def test_an_image_that_was_let_go_is_not_read_by_its_old_map(volume: Volume) -> None:
    """Nobody holds it and others were looked at since: what a sync then takes from the mirror is found all the same."""
    image = volume.image(0)
    assert image.read(0, image.size) == fill(9, SIZE)
    volume.image(1)
    assert not volume.keeps(image)
    write(volume, 5)
    run(sync(volume))
    assert image.resolve_nowait(0, image.size) is None
    assert image.read(0, image.size) == fill(9, SIZE)


def test_an_image_that_a_sync_has_passed_is_gone(volume: Volume) -> None:
    """Nobody holds it and no snapshot keeps it: that there is no such point is said, and no byte is shown."""
    write(volume, 5)
    image = volume.image(4)
    assert image.read(0, image.size) == fill(1, 3) + fill(9, 2) + fill(1) + fill(9, 2)
    write(volume, 6)
    run(sync(volume))
    with pytest.raises(NoSuchPointError):
        image.read(0, image.size)
