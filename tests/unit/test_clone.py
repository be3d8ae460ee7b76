"""Claims about dmafs.core.clone: copy-on-write, the hold on the base, quota, and what is left by cuts and damage."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from dmafs.core import clone as module
from dmafs.core import overlay
from dmafs.core.clone import Clone
from dmafs.core.limits import VolumeLimits
from dmafs.core.moments import clone_group, require_clone
from dmafs.core.ondisk import HEADER_SIZE
from dmafs.core.overlay import BLOCK, DAT, EXT
from dmafs.core.storage import RealFile, RealStorage
from dmafs.core.store import open_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import (
    CloneBusyError,
    CorruptionError,
    ExistsError,
    NoSuchCloneError,
    ReadOnlyError,
    StoreError,
    StoreFullError,
)
from dmafs.units import SECTOR
from tests.model.cuts import Disk
from tests.unit.tools import TINY, Ticking, copied_volume, files, fill, flip, image_bytes, tree

CONTENT = b"".join(fill(value) for value in range(1, 36))  # four blocks and a short one
SIZE = len(CONTENT)


def make(volume: Volume, name: str = "one", seq: int | None = None) -> Clone:
    """Make a clone of a seq, by default the newest, as the daemon does: durable first."""
    run(volume.flush())
    return run(volume.clones.create(volume.image(volume.journal.head if seq is None else seq), name))


def whole(clone: Clone) -> bytes:
    return bytes(run(clone.read(0, SIZE)))


def reopened(volume: Volume, limits: VolumeLimits = TINY) -> Volume:
    path = Path(volume.mirror.file.name).parent
    volume.close()
    return open_volume(path, limits=limits, clock=Ticking())


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    volume = copied_volume(tmp_path / "disk", CONTENT)
    yield volume
    volume.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk" / module.DIRECTORY


# -- reading and writing ---------------------------------------------------------------------------------------------


def test_a_new_clone_is_its_base(volume: Volume) -> None:
    """Every byte of a clone that nobody wrote to is that of its moment, also when the volume goes on."""
    seq = volume.write(3, fill(90))
    clone = make(volume)
    volume.write(3, fill(91))
    assert whole(clone) == image_bytes(volume, seq)
    assert (clone.seq, clone.time_ns, clone.written_ns, clone.stored_bytes) == (
        seq, volume.time_of(seq), volume.time_of(seq), 0,
    )  # fmt: skip


@pytest.mark.parametrize("stop", [1, 511, 512, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7, SIZE - 1, SIZE])
@pytest.mark.parametrize("begin", [0, 1, 500, BLOCK - 1, BLOCK, 3 * BLOCK + 5, 4 * BLOCK, SIZE - 1])
def test_a_write_of_any_bytes_changes_these_only(volume: Volume, begin: int, stop: int) -> None:
    """Whatever part of whichever blocks is written, the rest of the clone and all of the base stay."""
    if begin >= stop:
        begin, stop = stop - 1, begin + 1
    clone, data = make(volume), bytes(range(256)) * (SIZE // 256 + 1)
    run(clone.write(begin, data[: stop - begin]))
    expected = CONTENT[:begin] + data[: stop - begin] + CONTENT[stop:]
    assert whole(clone) == expected
    assert clone.stored_bytes == (-(-stop // BLOCK) - begin // BLOCK) * BLOCK
    run(clone.write(begin // 2, b"again"))
    expected = expected[: begin // 2] + b"again" + expected[begin // 2 + 5 :]
    assert whole(clone) == expected[:SIZE]
    assert image_bytes(volume, clone.seq) == CONTENT
    volume.check()


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (SIZE, 5), (SIZE - 3, 9), (7, BLOCK), (2 * BLOCK, SIZE)])
def test_reads_are_clipped(volume: Volume, offset: int, length: int) -> None:
    """A read gives the bytes there are, of the base and the overlay in one."""
    clone = make(volume)
    run(clone.write(BLOCK, b"x" * BLOCK))
    expected = CONTENT[:BLOCK] + b"x" * BLOCK + CONTENT[2 * BLOCK :]
    assert run(clone.read(offset, length)) == expected[offset : offset + length]


def test_waiting_reads_are_done_by_whoever_drives(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't in the page cache is yielded as one call, and gives the same bytes."""
    clone = make(volume)
    run(clone.write(5, b"five"))

    def blocks(_file: RealFile, _buffer: object, _offset: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(RealFile, "read_into_nowait", blocks)
    work = clone.read(0, SIZE)
    answer = next(work)()
    assert answer == CONTENT[:5] + b"five" + CONTENT[9:]
    with pytest.raises(StopIteration):
        work.send(answer)
    run(clone.write(BLOCK + 5, b"six"))
    assert whole(clone) == CONTENT[:5] + b"five" + CONTENT[9 : BLOCK + 5] + b"six" + CONTENT[BLOCK + 8 :]


def test_clones_of_one_moment_are_apart(volume: Volume) -> None:
    """Each clone has its own bytes; the base is held once for each."""
    one, two = make(volume, "one"), make(volume, "two")
    run(one.write(0, b"1"))
    run(two.write(0, b"2"))
    assert (whole(one)[:1], whole(two)[:1]) == (b"1", b"2")
    assert volume.image(one.seq).pins == 2
    assert one.serial != two.serial
    assert [clone.name for clone in volume.clones] == ["one", "two"]


def test_too_many_waiting_runs_are_flushed(volume: Volume, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Writes that nobody flushes can't fill the memory: at the limit they are flushed."""
    monkeypatch.setattr(overlay, "PENDING_RUNS", 2)
    clone = make(volume)
    run(clone.write(0, b"1"))
    assert (folder / "one" / EXT).stat().st_size == HEADER_SIZE
    run(clone.write(3 * BLOCK, b"2"))
    assert (folder / "one" / EXT).stat().st_size > HEADER_SIZE


# -- space -----------------------------------------------------------------------------------------------------------


def test_quota(tmp_path: Path) -> None:
    """Blocks beyond the quota are refused and nothing changes; those that are there can be overwritten for ever."""
    volume = copied_volume(tmp_path / "disk", CONTENT, limits=replace(TINY, clone_bytes=2 * BLOCK))
    clone = make(volume)
    run(clone.write(0, b"a"))
    with pytest.raises(StoreFullError, match=f"clone one of volume disk has reached its quota of {2 * BLOCK} bytes"):
        run(clone.write(BLOCK, b"b" * 2 * BLOCK))
    assert whole(clone) == b"a" + CONTENT[1:]
    run(clone.write(BLOCK, b"b"))
    run(clone.write(0, b"c" * 2 * BLOCK))
    with pytest.raises(StoreFullError):
        run(clone.write(4 * BLOCK, b"d"))
    assert whole(clone) == b"c" * 2 * BLOCK + CONTENT[2 * BLOCK :]
    assert not clone.failure
    volume.close()


def test_capture_has_space_when_clones_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clones stop growing when twice the reserve is left; capture goes on."""
    volume = copied_volume(tmp_path / "disk", CONTENT, limits=replace(TINY, reserve_bytes=10**6))
    clone = make(volume)
    monkeypatch.setattr(RealStorage, "free_bytes", lambda _self: 2 * 10**6 + BLOCK)
    run(clone.write(0, b"a"))
    with pytest.raises(StoreFullError, match="less than 2000000 bytes of the store would be left"):
        run(clone.write(0, b"b" * (BLOCK + BLOCK + 1)))
    run(clone.write(0, b"c"))
    volume.write(0, fill(1))
    volume.close()


# -- durability ------------------------------------------------------------------------------------------------------


def test_what_was_flushed_is_there_after_opening_anew(volume: Volume) -> None:
    """Flushed writes stay, later ones are as they were before, and the clone goes on."""
    clone = make(volume)
    run(clone.write(10, b"kept"))
    run(clone.flush())
    run(clone.write(BLOCK + 10, b"lost"))
    volume = reopened(volume)
    found = volume.clones.find("one")
    assert found is not None
    assert whole(found) == CONTENT[:10] + b"kept" + CONTENT[14:]
    run(found.write(BLOCK + 10, b"more"))
    run(found.flush())
    volume = reopened(volume)
    assert whole(clone_group({"disk": volume}, "one")["disk"]) == (
        CONTENT[:10] + b"kept" + CONTENT[14 : BLOCK + 10] + b"more" + CONTENT[BLOCK + 14 :]
    )
    volume.close()


def test_a_flush_with_nothing_to_do_costs_nothing(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write since the last flush, no fdatasync."""
    clone = make(volume)
    run(clone.write(10, b"kept"))
    run(clone.flush())
    monkeypatch.setattr(RealFile, "datasync", mock.Mock(side_effect=AssertionError))
    run(clone.flush())


def test_after_a_failed_fsync_a_clone_is_read_only(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fdatasync isn't retried; the clone can be read and dropped, and the volume isn't touched by it."""
    clone = make(volume)
    run(clone.write(0, b"new"))
    with monkeypatch.context() as patch:
        patch.setattr(RealFile, "datasync", mock.Mock(side_effect=OSError(errno.EIO, "broken")))
        with pytest.raises(StoreError, match=r"clone one of volume disk: broken"):
            run(clone.flush())
    for work in (clone.flush(), clone.write(0, b"x")):
        with pytest.raises(ReadOnlyError, match="clone one of volume disk is read-only: broken"):
            run(work)
    assert whole(clone)[:3] == b"new"
    assert not volume.failure
    volume.write(0, fill(1))
    run(volume.clones.drop(clone))


def test_a_full_disk_under_a_write_is_no_failure(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC of a write is passed on, and the next write may succeed."""
    clone = make(volume)
    with monkeypatch.context() as patch:
        patch.setattr(RealFile, "write", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(StoreFullError):
            run(clone.write(0, b"x"))
    assert whole(clone) == CONTENT
    run(clone.write(0, b"x"))
    assert whole(clone) == b"x" + CONTENT[1:]


# -- the hold --------------------------------------------------------------------------------------------------------


def test_the_base_outlives_syncs_drops_and_restarts(volume: Volume) -> None:
    """A clone's moment stays readable, as a snapshot nobody sees, until the clone is dropped; then it goes."""
    seq = volume.write(0, fill(70))
    clone = make(volume)
    run(clone.write(BLOCK, b"mine"))
    run(clone.flush())
    expected = fill(70) + CONTENT[SECTOR:BLOCK] + b"mine" + CONTENT[BLOCK + 4 :]
    for value in range(71, 75):
        volume.write(0, fill(value, 9))
        run(volume.flush())
        run(sync(volume))
        assert whole(clone) == expected
    volume = reopened(volume)
    assert seq in {snapshot.seq for snapshot in volume.snapshots.all()}
    assert seq not in {snapshot.seq for snapshot in volume.snapshots}
    for snapshot in list(volume.snapshots):
        run(volume.drop_snapshot(snapshot))
    volume = reopened(volume)
    clone = clone_group({"disk": volume}, "one")["disk"]
    assert whole(clone) == expected
    run(volume.clones.drop(clone))
    run(volume.drop_unheld())
    assert not volume.snapshots.all()
    assert not volume.recoverable(seq)
    volume = reopened(volume)
    assert not list(volume.clones)
    volume.close()


def test_a_snapshot_dropped_under_a_clone_stays_over_a_restart(volume: Volume) -> None:
    """Its name is free at once, its bytes stay for the clone."""
    run(volume.take_snapshot(name="base"))
    clone = make(volume)
    seq = clone.seq
    for value in (50, 51):
        volume.write(0, fill(value, 20))
        run(volume.flush())
        run(sync(volume))
    found = volume.snapshots.find("base")
    assert found is not None
    run(volume.drop_snapshot(found))
    volume = reopened(volume)
    assert volume.snapshots.find("base") is None
    clone = clone_group({"disk": volume}, "one")["disk"]
    assert clone.seq == seq
    assert whole(clone) == CONTENT
    volume.check()
    volume.close()


def test_a_failed_creation_holds_nothing(volume: Volume, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """After an error there is no clone, no file, no hold, and the name is free."""
    with monkeypatch.context() as patch:
        patch.setattr(RealStorage, "rename", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        with pytest.raises(StoreFullError, match="clone one of volume disk: the store is full"):
            make(volume)
    assert volume.image(volume.journal.head).pins == 0
    assert files(folder) == []
    assert whole(make(volume)) == CONTENT


def test_names_are_taken_once(volume: Volume) -> None:
    """A second clone of a name is refused, also while the first is being made, and names are free after the drop."""
    work = volume.clones.create(volume.image(0), "one")
    next(work)
    with pytest.raises(ExistsError, match="clone one already exists"):
        volume.clones.require_free("one")
    work.close()
    clone = make(volume)
    with pytest.raises(ExistsError):
        make(volume)
    run(volume.clones.drop(clone))
    assert make(volume).serial != clone.serial


def test_there_are_not_too_many(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit no other clone is made."""
    monkeypatch.setattr("dmafs.core.moments.CLONES_MAX", 2)
    for name in ("one", "two"):
        require_clone({"disk": volume}, name)
        make(volume, name)
    with pytest.raises(StoreFullError, match="clone three can't be made: there are 2"):
        require_clone({"disk": volume}, "three")
    with pytest.raises(ExistsError):
        require_clone({"disk": volume}, "two")


def test_an_open_clone_cannot_be_dropped(volume: Volume) -> None:
    """CloneBusyError while it is open; afterwards it is gone with its files."""
    clone = make(volume)
    clone.opens += 1
    with pytest.raises(CloneBusyError, match="clone one of volume disk is in use"):
        run(volume.clones.drop(clone))
    assert volume.clones.find("one") is clone
    clone.opens -= 1
    run(volume.clones.drop(clone))
    assert volume.clones.find("one") is None
    with pytest.raises(NoSuchCloneError, match="no clone named one"):
        clone_group({"disk": volume}, "one")


def test_a_failed_drop_leaves_the_clone(volume: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it can't be renamed, it is there as before."""
    clone = make(volume)
    with monkeypatch.context() as patch:
        patch.setattr(RealStorage, "rename", mock.Mock(side_effect=OSError(errno.EIO, "broken")))
        with pytest.raises(StoreError, match="broken"):
            run(volume.clones.drop(clone))
    assert volume.clones.find("one") is clone
    assert whole(clone) == CONTENT
    run(volume.clones.drop(clone))


# -- cuts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk()
    disk.enter()
    yield disk
    disk.leave()


def cut_everywhere(volume: Volume, disk: Disk, act: Callable[[Volume], object], states: list[bytes | None]) -> int:
    """Cut *act* at every file operation; after opening anew (twice) the clone has to be in one of *states*."""
    path = Path(volume.mirror.file.name).parent
    volume.close()
    before = tree(path)
    for changes in range(100):
        for entry in sorted((path / module.DIRECTORY).rglob("*"), reverse=True):
            entry.rmdir() if entry.is_dir() else entry.unlink()
        for name, (mode, content) in before.items():
            if mode & 0o040000:
                (path / name).mkdir(exist_ok=True)
            else:
                (path / name).write_bytes(content)
        done = False
        opened = open_volume(path, limits=TINY, clock=Ticking())
        with disk.fused(changes):
            act(opened)
            done = True
        opened.close()
        for _ in range(2):
            opened = open_volume(path, limits=TINY, clock=Ticking())
            found = opened.clones.find("one")
            state = None if found is None else whole(found)
            assert state == states[-1] if done else state in states, changes
            assert files(path / module.DIRECTORY) == ([] if found is None else ["one"])
            opened.check()
            opened.close()
        if done:
            return changes
    raise AssertionError("it never came to an end")


def test_a_creation_is_atomic(volume: Volume, disk: Disk) -> None:
    """Cut at any file operation, the clone is there wholly or not at all, and nothing is left over."""
    assert cut_everywhere(volume, disk, make, [None, CONTENT]) >= 7


def test_a_drop_is_atomic(volume: Volume, disk: Disk) -> None:
    """Cut at any file operation, the clone is there wholly or not at all, and nothing is left over."""
    make(volume)

    def drop(opened: Volume) -> None:
        run(opened.clones.drop(clone_group({"disk": opened}, "one")["disk"]))

    assert cut_everywhere(volume, disk, drop, [CONTENT, None]) >= 4


def test_a_flush_is_old_or_new(volume: Volume, disk: Disk) -> None:
    """Cut at any file operation of a write of new blocks and its flush, all of it is there or nothing."""
    make(volume)

    def write(opened: Volume) -> None:
        clone = clone_group({"disk": opened}, "one")["disk"]
        run(clone.write(BLOCK + 3, b"new"))
        run(clone.flush())

    new = CONTENT[: BLOCK + 3] + b"new" + CONTENT[BLOCK + 6 :]
    assert cut_everywhere(volume, disk, write, [CONTENT, new]) >= 3


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_clone_is_logged_and_can_be_dropped(
    volume: Volume, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The volume opens; the clone is listed and gives errors; others are well."""
    make(volume, "one")
    make(volume, "two")
    flip(folder / "one" / EXT, 100)
    with caplog.at_level(logging.ERROR):
        volume = reopened(volume)
    assert "clone one can't be used: checksum of" in caplog.text
    one, two = volume.clones
    assert whole(two) == CONTENT
    for work in (one.read(0, 1), one.write(0, b"x"), one.flush()):
        with pytest.raises(CorruptionError, match="clone one of volume disk can't be used"):
            run(work)
    assert one.allocated_sectors() == 0
    run(volume.clones.drop(one))
    assert files(folder) == ["two"]
    volume.close()


def test_a_clone_over_a_damaged_base_is_an_error(volume: Volume, tmp_path: Path) -> None:
    """The volume opens although what keeps the clone's moment is damaged, and throws none of it away."""
    clone = make(volume)
    for value in (50, 51):
        volume.write(0, fill(value, 20))
        run(volume.flush())
        run(sync(volume))
    flip(tmp_path / "disk" / "backward" / f"{clone.seq:020d}.ext", HEADER_SIZE + 16)
    volume = reopened(volume)
    with pytest.raises(CorruptionError, match=f"{clone.seq:020d}.ext or its data ends at entry 0"):
        run(clone_group({"disk": volume}, "one")["disk"].read(0, 1))
    assert clone.seq in {snapshot.seq for snapshot in volume.snapshots.all()}
    volume.close()


def test_a_clone_whose_base_is_gone_shows_nothing_wrong(
    volume: Volume, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When the files that keep its moment were removed, later ones aren't taken for them."""
    volume.write(0, fill(49))
    clone = make(volume)
    for value in (50, 51):
        volume.write(0, fill(value, 20))
        run(volume.flush())
        run(sync(volume))
    for path in (tmp_path / "disk" / "backward").glob(f"{clone.seq:020d}.*"):
        path.unlink()
    with caplog.at_level(logging.ERROR):
        volume = reopened(volume)
    assert "clone one can't be used: volume disk has no recoverable point at seq 1" in caplog.text
    volume.close()


def test_foreign_files_are_left_alone(volume: Volume, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of another name in the folder of clones is logged, and a foreign one in a leftover isn't removed."""
    (folder / "notes.img").write_bytes(b"")
    (folder / ".one.gone").mkdir()
    (folder / ".one.gone" / DAT).write_bytes(b"")
    (folder / ".one.gone" / "mine").write_bytes(b"")
    with caplog.at_level(logging.ERROR):
        volume = reopened(volume)
    assert "clones/notes.img is no file of ours" in caplog.text
    assert "clones/.one.gone can't be removed" in caplog.text
    assert files(folder / ".one.gone") == ["mine"]
    volume.close()
