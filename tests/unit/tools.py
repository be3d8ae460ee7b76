"""What several unit tests share: a clock that stands still, stores in miniature, and damage."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from dmafs.core.copy import initial_copy
from dmafs.core.journal import ForwardJournal
from dmafs.core.limits import IndexLimits, SegmentLimits, VolumeLimits
from dmafs.core.segment import Segment
from dmafs.core.storage import RealFile, RealStorage, open_source
from dmafs.core.store import open_volume
from dmafs.core.volume import Volume
from dmafs.core.work import run
from dmafs.units import SECTOR

OURS = UUID(int=0xD3AF5)
FOREIGN = UUID(int=0xF0)
TINY = VolumeLimits(segments=SegmentLimits(data_sectors=8, records=6), index=IndexLimits(indexed=1), reserve_bytes=0)


class Clock:
    """A clock that stands still until it is set, backwards too."""

    def __init__(self, now: int = 1_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class Ticking(Clock):
    """A clock that goes on by ten nanoseconds at each look."""

    def __call__(self) -> int:
        self.now += 10
        return self.now


def fill(value: int, count: int = 1) -> bytes:
    """Return *count* sectors of one byte."""
    return bytes([value]) * (SECTOR * count)


def flip(path: Path, offset: int, mask: int = 0x40) -> None:
    """Flip bits of one byte; a negative offset counts from the end."""
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def files(path: Path) -> list[str]:
    """Return the names in a directory."""
    return sorted(entry.name for entry in path.iterdir())


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Return everything below a directory: mode and content by relative name."""
    return {
        str(entry.relative_to(path)): (entry.stat().st_mode, entry.read_bytes() if entry.is_file() else b"")
        for entry in sorted(path.rglob("*"))
    }


def new_volume(path: Path, content: bytes) -> Path:
    """Make the files of a volume in *path* and a primary beside it with *content*; return the primary's path."""
    primary = path.with_name(path.name + ".primary")
    primary.write_bytes(content)
    path.mkdir()
    size = len(content) // SECTOR
    Volume.create(RealStorage(path), name="disk", size_sectors=size, source=primary, tap="fuse", created_ns=1)
    return primary


def segments_of(journal: ForwardJournal) -> list[Segment]:
    """Return all segments of a journal, in memory."""
    return [journal.segment_of(part.first) if part.segment is None else part.segment for part in journal.parts]


def copied_volume(path: Path, content: bytes, *, limits: VolumeLimits = TINY) -> Volume:
    """Make a volume with a complete initial copy, and open it."""
    primary = new_volume(path, content)
    volume = open_volume(path, limits=limits, clock=Ticking())
    copy_all(volume, primary)
    return volume


def copy_all(volume: Volume, primary: Path, progress: list[int] | None = None) -> None:
    """Do what is left of the initial copy."""
    source: RealFile = open_source(primary, writable=False)
    done = progress if progress is not None else []
    try:
        run(initial_copy(volume, source, lambda flag: volume.flush(source, flag=flag), done.append))
    finally:
        source.close()


def image_bytes(volume: Volume, seq: int) -> bytes:
    """Return the image at *seq*."""
    image = volume.image(seq)
    return bytes(image.read(0, image.size))


def all_images(volume: Volume) -> dict[int, bytes]:
    """Return every recoverable image by its seq."""
    return {seq: image_bytes(volume, seq) for seq in range(volume.journal.head + 1) if volume.recoverable(seq)}
