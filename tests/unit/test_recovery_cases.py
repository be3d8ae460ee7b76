"""Claims about dmafs.core.recovery: each row is reached by a store as it can be found, and does what it says."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import pytest

from dmafs.core.ondisk import HEADER_SIZE, POINTERS_SIZE, RECORD_SIZE, Flag
from dmafs.core.recovery import REFUSED
from dmafs.core.resync import begin_after_stop
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import CorruptionError
from dmafs.units import SECTOR
from tests.unit.recovery_states import Open, ext, journal, reaches, recover, scenarios
from tests.unit.test_recovery import labels
from tests.unit.tools import TINY, Ticking, copied_volume, fill, image_bytes, new_volume, segments_of, tree

# -- snapshots, pointers, and how the volume was left ----------------------------------------------------------------


def volume_opening(path: Path, look: Callable[[Volume], object] = lambda _volume: None) -> Open:
    def call() -> None:
        with contextlib.closing(open_volume(path, limits=TINY, clock=Ticking())) as volume:
            look(volume)
            volume.check()

    return call


def with_snapshot(path: Path) -> Path:
    """Make a volume with an open snapshot at seq 0 that holds something; return the path of its files, less suffix."""
    with contextlib.closing(copied_volume(path, fill(9, 16))) as volume:
        run(volume.take_snapshot())
        volume.write(3, fill(1))
        run(volume.flush())
        run(sync(volume))
    return path / "backward" / f"{0:020d}"


@reaches("R31", "R34", "R44")
def snapshot(path: Path) -> Open:
    with_snapshot(path)
    return volume_opening(path)


@reaches("R32")
def half_dropped(path: Path) -> Open:
    stem = with_snapshot(path)
    with contextlib.closing(open_volume(path, limits=TINY, clock=Ticking())) as volume:
        run(volume.take_snapshot(name="second"))
        volume.write(4, fill(1))
        run(volume.flush())
        run(sync(volume))
    stem.with_suffix(".ext").rename(stem.with_suffix(".gone"))
    return volume_opening(path)


@reaches("R33")
def half_made(path: Path) -> Open:
    stem = with_snapshot(path)
    stem.with_name(f"{7:020d}.new").write_bytes(b"x")
    return volume_opening(path)


@reaches("R35")
def data_without_a_snapshot(path: Path) -> Open:
    stem = with_snapshot(path)
    stem.with_name(f"{7:020d}.dat").write_bytes(b"x")
    return volume_opening(path)


@reaches("R36")
def pinned(path: Path) -> Open:
    with_snapshot(path).with_suffix(".pin").write_bytes(b"")
    return volume_opening(path)


@reaches("R37")
def pin_without_a_snapshot(path: Path) -> Open:
    with_snapshot(path).with_name(f"{7:020d}.pin").write_bytes(b"")
    return volume_opening(path)


@reaches("R38")
def foreign_file_among_snapshots(path: Path) -> Open:
    with_snapshot(path).with_name("notes.txt").write_text("mine")
    return volume_opening(path)


@reaches("R39")
def shortened_snapshot(path: Path) -> Open:
    with with_snapshot(path).with_suffix(".ext").open("r+b") as file:
        file.truncate(HEADER_SIZE)

    def call() -> None:
        with contextlib.closing(open_volume(path, limits=TINY, clock=Ticking())) as volume:
            assert image_bytes(volume, volume.journal.head)[3 * SECTOR : 4 * SECTOR] == fill(1)
            with pytest.raises(CorruptionError):
                image_bytes(volume, 0)

    return call


@reaches("R40")
def torn_snapshot(path: Path) -> Open:
    with with_snapshot(path).with_suffix(".ext").open("ab") as file:
        file.write(b"x" * 70)

    def look(volume: Volume) -> None:
        assert image_bytes(volume, 0) == fill(9, 16)

    return volume_opening(path, look)


@reaches("R41")
def no_pointers(path: Path) -> Open:
    with_snapshot(path)
    (path / "pointers").write_bytes(bytes(POINTERS_SIZE))
    return volume_opening(path)


@reaches("R42")
def open_snapshot_missing(path: Path) -> Open:
    with contextlib.closing(copied_volume(path, fill(9, 16))) as volume:
        volume.write(3, fill(1))
        run(volume.flush())
        run(sync(volume))
        volume.write(3, fill(2))
        run(volume.flush())
        run(sync(volume))
        seq = volume.pointers.now.open_snapshot
        assert seq
    for suffix in ("ext", "dat"):
        (path / "backward" / f"{seq:020d}.{suffix}").unlink()
    return volume_opening(path)


@reaches("R43")
def committed_sync(path: Path) -> Open:
    with contextlib.closing(copied_volume(path, fill(9, 16))) as volume:
        volume.write(3, fill(1))
        run(volume.flush())
        work = sync(volume)
        call = next(work)
        while not volume.pointers.now.sync_target:
            call = work.send(call())

    def look(volume: Volume) -> None:
        assert volume.pointers.now.sync_target == 0
        assert bytes(volume.live.read(3 * SECTOR, SECTOR)) == fill(1)

    return volume_opening(path, look)


def stopped(path: Path, volume: Volume, *, gap: bool = False) -> Open:
    """Leave a volume that was opened under kernel 1, and return what a daemon does under kernel 2."""
    volume.mark_open(UUID(int=1))
    if gap:
        run(volume.flush(flag=Flag.GAP))
    volume.close()

    def call() -> None:
        with contextlib.closing(open_volume(path, limits=TINY, clock=Ticking())) as again:
            run(begin_after_stop(again, UUID(int=2), lambda flag: again.flush(flag=flag)))
            again.mark_open(UUID(int=2))

    return call


@reaches("R45")
def closed_in_order(path: Path) -> Open:
    volume = copied_volume(path, fill(9, 16))
    opened = stopped(path, volume)
    with contextlib.closing(open_volume(path, limits=TINY, clock=Ticking())) as again:
        again.journal.durable = again.journal.head
        again.mark_clean()
    return opened


@reaches("R46")
def killed(path: Path) -> Open:
    volume = copied_volume(path, fill(9, 16))
    volume.mark_open(UUID(int=2))
    volume.close()

    def call() -> None:
        with contextlib.closing(open_volume(path, limits=TINY, clock=Ticking())) as again:
            run(begin_after_stop(again, UUID(int=2), lambda flag: again.flush(flag=flag)))
            assert again.journal.gaps == []

    return call


@reaches("R47")
def stopped_within_a_gap(path: Path) -> Open:
    return stopped(path, copied_volume(path, fill(9, 16)), gap=True)


@reaches("R48")
def power_cut(path: Path) -> Open:
    return stopped(path, copied_volume(path, fill(9, 16)))


@reaches("R49")
def power_cut_while_copying(path: Path) -> Open:
    new_volume(path, fill(9, 16))
    volume = open_volume(path, limits=TINY, clock=Ticking())
    volume.write(3, fill(1))
    run(volume.flush())
    return stopped(path, volume)


# -- what each of them does -----------------------------------------------------------------------------------------


@reaches("R50")
def index_beside_descriptors(path: Path) -> Open:
    stem = with_snapshot(path)
    stem.with_suffix(".idx").write_bytes(b"x")
    return volume_opening(path)


@reaches("R51")
def index_without_descriptors(path: Path) -> Open:
    with_snapshot(path)
    left = [path / directory / f"{7:020d}.idx" for directory in ("forward", "backward")]
    for one in left:
        one.write_bytes(b"x")

    def look(_: Volume) -> None:
        assert not any(one.exists() for one in left)

    return volume_opening(path, look)


def met(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    for record in caplog.records:
        if found := re.match(r"recovery (R\d+): ", record.getMessage()):
            yield found[1]


def test_every_row_has_a_scenario() -> None:
    """No row of the tables is left out."""
    assert sorted(scenarios, key=lambda label: int(label[1:])) == labels()


def without_pointers(found: dict[str, tuple[int, bytes]]) -> dict[str, tuple[int, bytes]]:
    """Return the rest; without what is written ahead of what was flushed, either."""
    return {name: (mode, content.rstrip(b"\0")) for name, (mode, content) in found.items() if name != "pointers"}


@pytest.mark.parametrize("label", labels())
def test_row_is_reached(label: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The state is taken for what the row says; a refusal changes no file; opening twice changes nothing more."""
    path = tmp_path / "disk"
    if scenarios[label].__name__ not in VOLUMES:
        path.mkdir()
    opened = scenarios[label](path)
    before = tree(path)
    with caplog.at_level(logging.DEBUG, "dmafs.core.recovery"):
        caplog.clear()
        if label in REFUSED:
            for _ in range(2):
                with pytest.raises(CorruptionError):
                    opened()
                assert tree(path) == before
        else:
            opened()
        assert label in met(caplog)
    if label not in REFUSED:
        before = tree(path)
        opened()
        assert without_pointers(tree(path)) == without_pointers(before)
        assert int(label[1:]) > 44 or tree(path) == before, "a daemon notes the kernel, others change nothing"


VOLUMES = {scenarios[label].__name__ for label in labels() if int(label[1:]) > 30}
"""Scenarios that make the directory themselves."""


def test_what_is_cut_off_is_what_was_not_durable(tmp_path: Path) -> None:
    """What the rows leave of a journal, by its events."""
    left = {
        "R5": 8,
        "R11": 5,
        "R14": 12,
        "R13": 12,
        "R22": 0,
        "R25": 8,
        "R27": 9,
        "R28": 6,
    }
    for label, count in left.items():
        path = tmp_path / label
        path.mkdir()
        scenarios[label](path)()
        windowed = label == "R28"
        tail = 8 if label == "R22" else 0
        with contextlib.closing(recover(path, tail=tail, durable=tail, windowed=windowed)) as found:
            assert sum(len(segment) for segment in segments_of(found)) == count, label


@pytest.mark.parametrize("records", [0, 4])
def test_a_segment_without_its_data_file(tmp_path: Path, records: int) -> None:
    """With nothing but a header the journal ends before it; what had records once is refused and stays as it is."""
    journal(tmp_path)
    ext(tmp_path, 9).with_suffix(".dat").unlink()
    with ext(tmp_path, 9).open("r+b") as file:
        file.truncate(HEADER_SIZE + records * RECORD_SIZE)
    kept = tree(tmp_path)
    if records:
        with pytest.raises(CorruptionError, match=f"file {tmp_path}/.*{9:020d}.dat is missing"):
            recover(tmp_path)
        assert tree(tmp_path) == kept
        return
    with contextlib.closing(recover(tmp_path)) as found:
        assert found.head == 8
    assert not ext(tmp_path, 9).exists()


@pytest.mark.parametrize("suffix", [".ext", ".dat"])
def test_a_link_in_the_place_of_a_segments_file(tmp_path: Path, suffix: str) -> None:
    """It isn't followed; of a segment that is long durable it is damage there, and nowhere else."""
    journal(tmp_path, sealed=True)
    path = ext(tmp_path, 5).with_suffix(suffix)
    path.rename(tmp_path / "away")
    path.symlink_to(tmp_path / "away")
    with contextlib.closing(recover(tmp_path)) as found:
        with pytest.raises(CorruptionError, match=f"file {path} can't be opened"):
            found.segment_of(5)
        assert found.segment_of(1).next_seq == 5
