"""The initial copy: the primary's content into the mirror, while the tap already captures.

A copy begun at t1 and ended at t2 is *fuzzy*: each sector is as it was at some time between. Together with all events
from t1 on it is exact at any t3 >= t2, since whatever was written meanwhile is in the journal. So capture begins first,
and the first recoverable point, the *origin*, is the first sync indicator after the end.

The position is saved from time to time. Before that all events until then are made durable: otherwise the copied part
could hold a write that an unclean stop takes back from journal and primary. What lies behind the saved position is
forgotten when the copy resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from dmafs.core.digests import BLOCK, BLOCK_SECTORS, any_set
from dmafs.core.ondisk import Flag
from dmafs.core.storage import File
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import SourceError
from dmafs.units import SECTOR

CHUNK_SECTORS: Final = (4 << 20) // SECTOR
"""What is read at once."""
SAVE_SECTORS: Final = (256 << 20) // SECTOR
"""How much of a copy an interruption can cost."""

_HOLE_GRAIN: Final = 128 * 1024
"""Zeros are left out in runs of this many bytes: smaller ones wouldn't make the mirror much smaller."""


def initial_copy(
    volume: Volume, primary: File, flush: Callable[[Flag], Work[object]], progress: Callable[[int], None]
) -> Work[None]:
    """Copy what is left to be copied; *flush* makes events durable, *progress* is told the sectors done so far."""
    if volume.pointers.now.copied:
        return
    at = volume.pointers.now.copied_sectors
    size = volume.info.size_sectors
    with volume.gate():
        yield lambda: volume.mirror.forget_from(at)
    saved = at
    while at < size:
        stop = min(at + CHUNK_SECTORS, size)

        def copy(start: int = at, stop: int = stop) -> None:
            _copy_chunk(volume, primary, start, stop)

        with volume.gate():
            yield copy
        at = stop
        progress(at)
        if at - saved >= SAVE_SECTORS:
            yield from flush(Flag.TICK)
            with volume.gate(fatal=True):
                yield partial(_save_position, volume, at)
            saved = at
    yield from complete_copy(volume, flush)


def complete_copy(volume: Volume, flush: Callable[[Flag], Work[object]]) -> Work[None]:
    """Have the mirror, together with the events until now, count as the whole primary: the first recoverable point."""
    with volume.gate(fatal=True):
        yield volume.mirror.datasync
    yield from flush(Flag.COPIED)
    origin = volume.journal.last_indicator(volume.journal.durable)
    assert origin is not None
    with volume.gate(fatal=True):
        yield lambda: volume.pointers.update(
            copied=True,
            copied_sectors=volume.info.size_sectors,
            durable=volume.journal.durable,
            origin_seq=origin.seq,
            origin_time_ns=origin.time_ns,
        )


def _save_position(volume: Volume, sectors: int) -> None:
    volume.mirror.datasync()
    volume.pointers.update(copied_sectors=sectors, durable=volume.journal.durable)


def _copy_chunk(volume: Volume, primary: File, start: int, stop: int) -> None:
    """Copy sectors, leaving out holes and zeros: behind the position the mirror is a hole."""
    if primary.size() != volume.info.size_sectors * SECTOR:
        raise SourceError(
            f"source {primary.name} has {primary.size()} bytes instead of {volume.info.size_sectors * SECTOR}",
            hint="a source must keep its size",
        )
    assert start % BLOCK_SECTORS == _HOLE_GRAIN % BLOCK == 0, "whole blocks: they get digests"
    for first, last in primary.data_ranges(start * SECTOR, stop * SECTOR):
        begin, end = first // BLOCK * BLOCK, min(-(-last // BLOCK) * BLOCK, stop * SECTOR)  # blocks have digests
        data = bytearray(end - begin)
        primary.read_into(data, begin)
        for at in range(0, len(data), _HOLE_GRAIN):
            part = memoryview(data)[at : at + _HOLE_GRAIN]
            if any_set(part):
                volume.mirror.write(part, (begin + at) // SECTOR)
