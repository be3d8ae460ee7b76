"""Claim 4 where a sync is under way: an image that is opened between any two of its steps stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import NoSuchPointError
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill

SIZE = 24


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("seq", [0, 1, 2, 3])
def test_an_image_that_is_opened_during_a_sync_never_changes(tmp_path: Path, seq: int, opens: bool) -> None:  # noqa: FBT001
    """Whenever it is opened, what it shows is what it showed before, also after this sync and the next one."""
    opened = step = 0
    done = False
    while not done:
        step += 1
        volume = copied_volume(tmp_path / f"disk{step}", fill(7, SIZE))
        for at in range(4):
            volume.write(at, fill(at + 1, 12))
            run(volume.flush())
        before = bytes(volume.image(seq).read(0, SIZE * SECTOR))
        done, image = _synced(volume, step, seq, opens=opens)
        if image:
            opened += 1
            volume.write(0, fill(9, SIZE))
            run(volume.flush())
            for _ in range(2):
                assert bytes(volume.image(seq).read(0, SIZE * SECTOR)) == before, f"opened before step {step}"
                run(sync(volume))
        volume.close()
    assert opened >= (8 if opens and not seq else 4 if opens else 2)


def _synced(volume: Volume, step: int, seq: int, *, opens: bool) -> tuple[bool, bool]:
    """Sync, and hold an image before a step; say whether there was no such step, and whether it could be held."""
    work = sync(volume, open_snapshot=opens)
    number, held, reached = 0, False, False
    try:
        call = next(work)
        while True:
            number += 1
            if number == step:
                reached = True
                try:
                    volume.image(seq).pins += 1
                    held = True
                except NoSuchPointError:
                    held = False
            call = work.send(call())
    except StopIteration:
        return not reached, held
