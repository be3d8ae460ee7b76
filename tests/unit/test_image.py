"""Claims about dmafs.core.image: a map is never made from what has changed since, whatever happens at a yield."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmafs.core import layers
from dmafs.core.columns import Columns
from dmafs.core.volume import Volume
from dmafs.core.work import Result, Work
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill

SIZE = 64


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    volume = copied_volume(tmp_path / "disk", fill(0, SIZE))
    yield volume
    volume.close()


def disturbed(work: Work[Result], disturb: Callable[[], Any]) -> Result:
    """Do work, and something else once, while its first call is under way."""
    call = next(work)
    answer = call()
    disturb()
    try:
        while True:
            call = work.send(answer)
            answer = call()
    except StopIteration as stop:
        result: Result = stop.value
        return result


def test_a_write_while_the_live_map_is_made_is_in_it(volume: Volume) -> None:
    """Layers of finished segments are made in a thread; what is captured meanwhile belongs to the live image."""
    for number in range(30):
        volume.write(number % SIZE, fill(number + 1))
    disturbed(volume.live.locate(0, SIZE * SECTOR), lambda: volume.write(5, fill(0xEE)))
    assert volume.live.read(5 * SECTOR, SECTOR) == fill(0xEE)
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
