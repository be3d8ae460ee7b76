"""Resync: after a gap, journal and primary are made to agree again, while the tap captures.

When the kernel itself stopped (a power cut, a crash), writes that nobody had flushed may have reached the primary's
disk but not the journal's. Nothing acknowledged is lost by that, but the newest image no longer is the primary. So the
volume records a gap, the primary is compared with the newest image, what differs is journaled as new events, and the
gap ends with a sync indicator. A moment inside the gap can't be had: its image would mix old and new.

Reading both sides takes place in a thread, while writes go on; only where they differ are they read again without
anything in between, and that decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from uuid import UUID

import numpy as np

from dmafs.core.extent import MAX_EXTENT_SECTORS, Ints, chop, join
from dmafs.core.image import Piece
from dmafs.core.ondisk import Flag
from dmafs.core.storage import File
from dmafs.core.sync import any_set
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.units import SECTOR

CHUNK_SECTORS: Final = MAX_EXTENT_SECTORS
GRAIN_SECTORS: Final = 8
"""Differences are journaled in units of 4 KiB, the block size of most filesystems."""


def needs_resync(volume: Volume) -> bool:
    """Say whether a gap has begun and not ended."""
    return bool(volume.journal.gaps) and volume.journal.gaps[-1].end is None


def begin_after_stop(volume: Volume, boot_id: UUID, flush: Callable[[Flag], Work[object]]) -> Work[None]:
    """Begin a gap if the kernel stopped while the volume was open; an initial copy then starts again from nothing.

    The primary has been brought up to the journal before (redo), which made both durable up to the head. *boot_id* is
    the running kernel's. After a mere kill of the process the page cache has kept journal and primary.
    """
    now = volume.pointers.now
    if now.clean or now.boot_id == boot_id or needs_resync(volume):
        return
    if now.copied:
        yield from flush(Flag.GAP)
    else:
        yield from _start_again(volume)


def _start_again(volume: Volume) -> Work[None]:
    """Have the initial copy begin anew, without the events until now: the copy will hold what they left."""
    seq, time_ns = volume.journal.head, volume.journal.head_time_ns
    with volume.gate(fatal=True):
        yield lambda: volume.pointers.update(copied_sectors=0, mirror_seq=seq, mirror_time_ns=time_ns, durable=seq)
    volume.floor = seq
    volume.live.vrmo.reset()
    yield from volume.release(seq)


def resync(
    volume: Volume, primary: File, flush: Callable[[Flag], Work[object]], progress: Callable[[int], None]
) -> Work[int]:
    """Journal what the primary has and the newest image doesn't, then end the gap; return the sectors that differed.

    *flush* makes events durable with an indicator of the given kind, *progress* is told the sectors done so far.
    """
    assert needs_resync(volume)
    differing = 0
    for start in range(0, volume.info.size_sectors, CHUNK_SECTORS):
        stop = min(start + CHUNK_SECTORS, volume.info.size_sectors)
        pieces = volume.live.resolve(start * SECTOR, (stop - start) * SECTOR)

        def compare(start: int = start, stop: int = stop, pieces: list[Piece] = pieces) -> tuple[Ints, Ints]:
            return _differences(volume, primary, start, stop, pieces)

        starts, stops = yield compare
        for begin, end in zip(*(column.tolist() for column in chop(starts, stops)), strict=True):
            differing += _journal(volume, primary, begin, end)
        progress(stop)
    yield from flush(Flag.RESYNCED)
    return differing


def _differences(volume: Volume, primary: File, start: int, stop: int, pieces: list[Piece]) -> tuple[Ints, Ints]:
    """Return where primary and pieces differ, as a disjoint joined list of sectors."""
    theirs = bytearray((stop - start) * SECTOR)
    primary.read_into(theirs, start * SECTOR)
    mine = volume.live.read_pieces(pieces, start * SECTOR, len(theirs))
    grain = GRAIN_SECTORS * SECTOR
    found = [
        start + offset // SECTOR
        for offset in (range(0, len(theirs), grain) if theirs != mine else ())
        if theirs[offset : offset + grain] != mine[offset : offset + grain]
    ]
    starts = np.array(found, np.int64)
    return join(starts, np.minimum(starts + GRAIN_SECTORS, stop))


def _journal(volume: Volume, primary: File, start: int, stop: int) -> int:
    """Journal an extent as the primary has it, if it still differs; return the number of sectors."""
    data = bytearray((stop - start) * SECTOR)
    primary.read_into(data, start * SECTOR)
    if data == volume.live.read(start * SECTOR, len(data)):
        return 0
    if any_set(data):
        volume.write(start, memoryview(data))
    else:
        volume.discard(start, stop - start)
    return stop - start
