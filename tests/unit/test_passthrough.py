"""The pass-through tap: journal first, then primary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmafs.core.limits import VolumeLimits
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.errors import SourceError, StoreError
from dmafs.taps.passthrough import PassThroughTap

SIZE = 5000 * 512


@pytest.fixture
def tap(tmp_path: Path) -> Iterator[PassThroughTap]:
    source = tmp_path / "primary.img"
    source.write_bytes(bytes(SIZE))
    folder = tmp_path / "disk"
    folder.mkdir()
    Volume.create(RealStorage(folder), name="disk", size_sectors=5000, source=source, tap="fuse", created_ns=1)
    volume = open_volume(folder, limits=VolumeLimits(reserve_bytes=0))
    tap = PassThroughTap(volume, open_source(source, writable=True))
    yield tap
    volume.close()
    tap.primary.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(offset=st.integers(0, SIZE - 1), length=st.integers(1, 3000), value=st.integers(1, 255))
def test_any_range_is_captured_exactly(tap: PassThroughTap, offset: int, length: int, value: int) -> None:
    """Unaligned writes change just their bytes, on the primary and in the newest image alike."""
    length = min(length, SIZE - offset)
    expected = bytearray(tap.read(0, SIZE))
    expected[offset : offset + length] = bytes([value]) * length
    tap.write(offset, bytes([value]) * length)
    assert tap.read(0, SIZE) == expected
    assert tap._volume.live.read(0, SIZE) == expected


def test_a_long_write_becomes_several_events(tap: PassThroughTap) -> None:
    """A write longer than an extent may be is captured in parts, each of them on the primary too."""
    data = bytes(range(256)) * (2 * (1 << 20) // 256) + b"tail"
    tap.write(3, data)
    assert tap._volume.journal.head == 3
    assert tap.read(0, len(data) + 3)[3:] == data
    assert tap._volume.live.read(3, len(data)) == data


def test_what_the_journal_refuses_never_reaches_the_primary(
    tap: PassThroughTap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Journal first: if it can't take a write, the primary doesn't get it, and nothing counts as captured."""
    tap.write(0, b"a" * 512)
    segment = tap._volume.journal.newest
    assert segment is not None

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    for file in (segment.dat, segment.ext):
        monkeypatch.setattr(file, "write", full)
        with pytest.raises(StoreError, match="full"):
            tap.write(0, b"b" * 512)
        monkeypatch.undo()
        assert tap.read(0, 512) == b"a" * 512
        assert tap._volume.live.read(0, 512) == b"a" * 512
    tap.write(0, b"c" * 512)
    assert tap._volume.live.read(0, 512) == b"c" * 512
    tap._volume.check()


def test_a_primary_that_fails_ends_all_writing(tap: PassThroughTap, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the primary refuses what is journaled, the volume is read-only: they would differ from then on."""
    with monkeypatch.context() as patch:
        patch.setattr(tap.primary, "write", _fail)
        with pytest.raises(StoreError):
            tap.write(0, b"x" * 512)
    with pytest.raises(StoreError, match="read-only"):
        tap.write(0, b"y" * 512)


def _fail(*_args: object) -> None:
    raise OSError(5, "Input/output error")


def test_redo_twice_changes_nothing(tap: PassThroughTap) -> None:
    """Events since the last durable flush are written again, zeros too; a second time nothing is left to do."""
    tap.write(0, b"a" * 1024)
    tap._volume.discard(1, 1)
    tap.primary.write([bytes([9]) * 2048], 0)
    assert run(tap.redo()) == 2
    assert tap.read(0, 2048) == b"a" * 512 + bytes(512) + bytes([9]) * 1024
    assert run(tap.redo()) == 0


def test_a_source_of_another_size_is_refused(tap: PassThroughTap, tmp_path: Path) -> None:
    """A primary that was resized isn't written."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    file: RealFile = open_source(other, writable=True)
    with pytest.raises(SourceError, match="512 bytes"):
        PassThroughTap(tap._volume, file)
    file.close()
