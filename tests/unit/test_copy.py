"""Claims about dmafs.core.copy: the mirror becomes the primary, sparse, and an interruption costs a bounded part."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from dmafs.core import copy
from dmafs.core.copy import initial_copy
from dmafs.core.mirror import NAME as MIRROR
from dmafs.core.ondisk import Flag
from dmafs.core.storage import open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import NoSuchPointError
from dmafs.units import SECTOR
from tests.unit.tools import TINY, Ticking, copied_volume, copy_all, fill, image_bytes, new_volume

MEBI = 1 << 20
NOISE = Random(7).randbytes(64 * SECTOR)


def opened(path: Path) -> Volume:
    return open_volume(path, limits=TINY, clock=Ticking())


def test_mirror_equals_the_primary(tmp_path: Path) -> None:
    """After the copy mirror and newest image are the primary, also where that doesn't fill the last part."""
    content = NOISE + bytes(300 * SECTOR) + NOISE[:-SECTOR]
    volume = copied_volume(tmp_path / "v", content)
    assert (tmp_path / "v" / MIRROR).read_bytes() == content
    assert bytes(volume.live.read(0, len(content))) == content
    volume.close()


def test_nothing_is_recoverable_before_the_end(tmp_path: Path) -> None:
    """Until the copy is complete there is no point in time; then there is the origin."""
    primary = new_volume(tmp_path / "v", NOISE)
    volume = opened(tmp_path / "v")
    volume.write(0, fill(1))
    run(volume.flush())
    assert not any(volume.recoverable(seq) for seq in range(3))
    with pytest.raises(NoSuchPointError):
        volume.image(0)
    copy_all(volume, primary)
    assert [volume.recoverable(seq) for seq in range(3)] == [False, True, False]
    volume.close()


def test_origin_is_the_first_indicator_after_the_end(tmp_path: Path) -> None:
    """Writes during the copy are in the journal, so the image at the origin is exact though the copy was fuzzy."""
    primary = new_volume(tmp_path / "v", NOISE)
    volume = opened(tmp_path / "v")
    source = open_source(primary, writable=True)
    work = initial_copy(volume, source, lambda flag: volume.flush(source, flag=flag), lambda _: None)
    call = next(work)
    for seq in range(1, 4):
        source.write([fill(seq)], seq * SECTOR)
        volume.write(seq, fill(seq))
        call = work.send(call())
    run_rest(work, call)
    now = volume.pointers.now
    assert (now.copied, now.copied_sectors, now.origin_seq) == (True, 64, 3)
    indicator = volume.journal.last_indicator(3)
    assert indicator is not None
    assert (indicator.flag, indicator.time_ns) == (Flag.COPIED, now.origin_time_ns)
    assert now.durable == volume.journal.durable == 3
    assert image_bytes(volume, 3) == primary.read_bytes()
    source.close()
    volume.close()
    again = opened(tmp_path / "v")
    assert image_bytes(again, 3) == primary.read_bytes()
    again.close()


def run_rest(work: object, call: object) -> None:
    """Drive work to its end from a call on."""
    try:
        while True:
            call = work.send(call())  # type: ignore[attr-defined,operator]
    except StopIteration:
        return


@pytest.mark.parametrize("sparse", [True, False], ids=["holes", "zeros"])
def test_mirror_of_an_empty_primary_takes_no_space(tmp_path: Path, *, sparse: bool) -> None:
    """Holes and zeros of the primary are holes of the mirror; data in between is copied."""
    size = 16 * MEBI
    primary = new_volume(tmp_path / "v", bytes(size))
    if sparse:
        primary.write_bytes(b"")
        with primary.open("r+b") as file:
            file.truncate(size)
    with primary.open("r+b") as file:
        file.seek(5 * MEBI)
        file.write(NOISE)
    volume = opened(tmp_path / "v")
    copy_all(volume, primary)
    assert (tmp_path / "v" / MIRROR).read_bytes() == primary.read_bytes()
    assert volume.mirror.file.allocated() <= 256 * 1024
    assert volume.live.allocated_sectors() * SECTOR <= 256 * 1024
    volume.close()


def test_interrupted_copy_resumes_at_the_saved_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that was cut off goes on from the position saved last, and forgets what it had copied behind that."""
    monkeypatch.setattr(copy, "CHUNK_SECTORS", 8)
    monkeypatch.setattr(copy, "SAVE_SECTORS", 16)
    primary = new_volume(tmp_path / "v", NOISE)
    volume = opened(tmp_path / "v")
    source = open_source(primary, writable=False)
    done: list[int] = []
    work = initial_copy(volume, source, lambda flag: volume.flush(source, flag=flag), done.append)
    call = next(work)
    while done[-1:] != [40]:
        call = work.send(call())
    volume.close()
    source.close()
    changed = NOISE[: 32 * SECTOR] + bytes(32 * SECTOR)
    primary.write_bytes(changed)  # behind the position what had been copied is out of date

    again = opened(tmp_path / "v")
    assert again.pointers.now.copied_sectors == 32
    rest: list[int] = []
    copy_all(again, primary, rest)
    assert rest == [40, 48, 56, 64]
    assert (tmp_path / "v" / MIRROR).read_bytes() == changed
    nothing: list[int] = []
    copy_all(again, primary, nothing)
    assert nothing == []
    again.close()


def test_saved_position_has_all_events_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a position is saved the events until then are made durable, since the copied part may hold them."""
    monkeypatch.setattr(copy, "CHUNK_SECTORS", 8)
    monkeypatch.setattr(copy, "SAVE_SECTORS", 16)
    primary = new_volume(tmp_path / "v", NOISE)
    volume = opened(tmp_path / "v")
    source = open_source(primary, writable=False)
    flags: list[Flag] = []

    def flush(flag: Flag) -> object:
        flags.append(flag)
        assert volume.pointers.now.copied_sectors == 16 * (len(flags) - 1)
        return volume.flush(source, flag=flag)

    work = initial_copy(volume, source, flush, lambda _: volume.write(0, fill(1)) and None)  # type: ignore[arg-type]
    call = next(work)
    try:
        while True:
            call = work.send(call())
            if volume.pointers.now.copied_sectors and not volume.pointers.now.copied:
                assert volume.pointers.now.durable >= volume.pointers.now.copied_sectors // 8
    except StopIteration:
        pass
    assert flags == [*[Flag.TICK] * 4, Flag.COPIED]
    source.close()
    volume.close()
