"""Claims about dmafs.core.diff: which moments it compares, what it lists, and what it leaves behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dmafs.core.diff import diff
from dmafs.core.extent import united
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError, NoSuchPointError, NoSuchVolumeError
from dmafs.service.report import diff_of
from dmafs.units import SECTOR
from tests.unit.tools import copied_volume, fill, flip

SIZE = 64


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    volume = copied_volume(tmp_path / "v", fill(7, SIZE))
    yield volume
    volume.close()


def write(volume: Volume, start: int, length: int) -> int:
    seq = volume.write(start, fill(start + 1, length))
    run(volume.flush())
    return seq


def listed(volume: Volume, a: int, b: int) -> list[tuple[int, int]]:
    starts, stops = run(diff(volume, a, b))
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def driven(work: Work[int]) -> Iterator[None]:
    """Drive work, and stop before each of its calls."""
    with contextlib.suppress(StopIteration):
        call = next(work)
        while True:
            yield
            call = work.send(call())


def test_union_is_joined() -> None:
    """Extents that overlap, touch or lie in each other become one; the others stay apart."""
    starts, stops = np.array([10, 0, 4, 20, 12, 30]), np.array([15, 4, 6, 21, 13, 31])
    assert [column.tolist() for column in united(starts, stops)] == [[0, 10, 20, 30], [6, 15, 21, 31]]
    assert [len(column) for column in united(starts[:0], stops[:0])] == [0, 0]


def test_events_of_the_forward_journal_are_told_exactly(volume: Volume) -> None:
    """From the mirror on each write counts, one that changed nothing too, in both directions."""
    seqs = [write(volume, start, 4) for start in (0, 4, 20, 20)]
    origin = seqs[0] - 1
    assert listed(volume, origin, seqs[1]) == listed(volume, seqs[1], origin) == [(0, 8)]
    assert listed(volume, seqs[0], seqs[2]) == [(4, 8), (20, 24)]
    assert listed(volume, seqs[2], seqs[3]) == [(20, 24)]
    assert listed(volume, seqs[3], seqs[3]) == []


def test_snapshots_and_events_are_put_together(volume: Volume) -> None:
    """From a snapshot over others and the mirror to a write: all that lies between, and nothing else."""
    points = [0]
    for start in (0, 8, 16):
        points.append(write(volume, start, 2))
        run(sync(volume))
    newest = write(volume, 24, 2)
    assert [snapshot.seq for snapshot in volume.snapshots] == points[:3]
    assert listed(volume, points[0], newest) == [(0, 2), (8, 10), (16, 18), (24, 26)]
    assert listed(volume, points[1], points[2]) == [(8, 10)]
    assert listed(volume, points[1], points[3]) == [(8, 10), (16, 18)]
    run(volume.drop_snapshot(list(volume.snapshots)[1]))
    assert listed(volume, points[0], points[2]) == [(0, 2), (8, 10)]


def test_a_hidden_snapshot_counts(volume: Volume) -> None:
    """What a dropped snapshot of a held image has saved lies between its neighbours as before."""
    points = [0]
    for start in (0, 8, 16):
        points.append(write(volume, start, 2))
        run(sync(volume))
    volume.image(points[1]).pins += 1
    run(volume.drop_snapshot(list(volume.snapshots)[1]))
    assert [snapshot.seq for snapshot in volume.snapshots] == [points[0], points[2]]
    assert listed(volume, points[0], points[2]) == [(0, 2), (8, 10)]
    assert listed(volume, points[1], points[2]) == [(8, 10)]


def test_moments_that_can_not_be_had_are_refused(volume: Volume) -> None:
    """Neither end may be a moment that a sync has passed or that is still to come."""
    write(volume, 0, 1)
    write(volume, 1, 1)
    run(sync(volume))
    for a, b in ((0, 1), (1, 2), (2, 3), (-1, 2)):
        with pytest.raises(NoSuchPointError, match="no recoverable point at seq"):
            run(diff(volume, a, b))
    assert listed(volume, 0, 2) == [(0, 2)]


def test_at_each_step_of_a_sync_the_answer_is_the_same(volume: Volume) -> None:
    """Neither what a sync has saved ahead nor what it has overwritten already shows."""
    first = write(volume, 0, 2)
    run(sync(volume))
    write(volume, 8, 2)
    last = write(volume, 1, 2)
    steps = 0
    for _ in driven(sync(volume)):
        assert listed(volume, 0, first) == [(0, 2)]
        assert listed(volume, 0, last) == [(0, 3), (8, 10)]
        if volume.recoverable(first):
            assert listed(volume, first, last) == [(1, 3), (8, 10)]
        steps += 1
    assert volume.pointers.now.mirror_seq == last
    assert steps > 6


def test_what_a_given_up_sync_saved_ahead_is_listed_too_early(volume: Volume) -> None:
    """An image opened on the way makes the sync stop there; what it had saved for the whole way is listed up to there.

    That is the exception of the module's docstring. Nothing is missed by it.
    """
    first = write(volume, 0, 2)
    last = write(volume, 8, 2)
    image = volume.image(first)
    for _ in driven(sync(volume)):
        snapshot = volume.snapshots.at(0)
        if snapshot and snapshot.segment and len(snapshot.segment):
            image.pins = 1
    assert image.pins
    assert [snapshot.seq for snapshot in volume.snapshots.all()] == [0, first]
    assert listed(volume, 0, first) == [(0, 2), (8, 10)]
    assert listed(volume, first, last) == [(8, 10)]
    assert listed(volume, 0, last) == [(0, 2), (8, 10)]


def forget_journals(volume: Volume) -> None:
    for segment in volume.snapshots.unload(keep=None, everything=True):
        segment.close()


def test_merged_layers_are_enough(volume: Volume) -> None:
    """A second diff needs no journal of a closed snapshot in memory."""
    for start in range(8):
        write(volume, start, 1)
        run(sync(volume))
    assert listed(volume, 0, 7) == [(0, 7)]
    forget_journals(volume)
    assert listed(volume, 0, 7) == [(0, 7)]
    assert [snapshot.seq for snapshot in volume.snapshots if snapshot.segment] == []


def test_a_damaged_journal_is_an_error(volume: Volume, tmp_path: Path) -> None:
    """Where descriptors are missing nobody knows what differs."""
    for start in range(3):
        write(volume, start, 1)
        run(sync(volume))
    forget_journals(volume)
    flip(tmp_path / "v" / "backward" / f"{0:020d}.ext", -100)
    with pytest.raises(CorruptionError, match="had been made durable"):
        run(diff(volume, 0, 3))
    assert listed(volume, 1, 3) == [(1, 3)]


def test_report_is_in_bytes_and_names_both_moments(volume: Volume) -> None:
    """Spellings are resolved each for itself; the report has what they mean, and totals."""
    seq = write(volume, 1, 2)
    run(volume.take_snapshot(name="kept"))
    write(volume, 8, 1)
    report = run(diff_of({"disk": volume}, "disk", f"seq:{seq + 1}", "kept"))
    assert report["extents"] == [[8 * SECTOR, SECTOR]]
    assert report["bytes"] == SECTOR
    assert (report["a"]["seq"], report["b"]["seq"]) == (seq + 1, seq)
    assert report["volume"] == "disk"
    with pytest.raises(NoSuchVolumeError):
        run(diff_of({"disk": volume}, "other", "kept", "kept"))
    with pytest.raises(NoSuchPointError):
        run(diff_of({"disk": volume}, "disk", "kept", "nothing"))
