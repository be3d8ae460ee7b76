"""Claims about dmafs.core.forecast: what drops copy and free is known before, to the byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dmafs.core.forecast import Forecast
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from tests.unit.tools import copied_volume, fill

SECTORS = 48


def history(path: Path, seed: int) -> Volume:
    """Return a volume with six snapshots, the last of them ahead of the mirror; some of what they hold is zeros."""
    rng = random.Random(seed)
    volume = copied_volume(path, b"".join(fill(rng.choice([0, 1])) for _ in range(SECTORS)))
    for number in range(6):
        run(volume.take_snapshot(name=f"{number}"))
        if number < 5:
            for _ in range(rng.randrange(4)):
                start = rng.randrange(SECTORS)
                volume.write(start, fill(rng.randrange(3), rng.randrange(1, min(9, SECTORS - start) + 1)))
            run(volume.flush())
            run(sync(volume, open_snapshot=False))
    return volume


def held(volume: Volume) -> list[int]:
    return [volume.snapshots.held_bytes(snapshot) for snapshot in volume.snapshots]


@pytest.mark.parametrize("seed", range(6))
def test_each_run_frees_what_was_forecast(tmp_path: Path, seed: int) -> None:
    """From each snapshot on and of each length, step by step."""
    for first in range(5):
        volume = history(tmp_path / f"{first}", seed)
        for segment in volume.snapshots.unload(keep=None, everything=True):
            segment.close()
        chosen = list(volume.snapshots)[first:]
        forecast = Forecast(volume.snapshots)
        expected = [forecast.drop(snapshot) for snapshot in chosen]
        for snapshot, (copied, freed) in zip(chosen, expected, strict=True):
            before = held(volume)
            run(volume.drop_snapshot(snapshot))
            after = held(volume)
            assert sum(before) - sum(after) == freed
            assert (after[first - 1] - before[first - 1] if first else 0) == copied
        volume.close()


def test_it_begins_anew_behind_what_is_kept(tmp_path: Path) -> None:
    """A snapshot that stays after all is what the next ones merge into."""
    volume = history(tmp_path / "disk", 1)
    first, second, *rest = volume.snapshots
    forecast = Forecast(volume.snapshots)
    forecast.drop(first)
    forecast.drop(second)
    forecast.keep(second)
    fresh = Forecast(volume.snapshots)
    assert [forecast.drop(one) for one in rest] == [fresh.drop(one) for one in rest]
    volume.close()
