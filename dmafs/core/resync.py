"""Resync: journal and primary are made to agree again, while the tap captures.

When the kernel itself stopped (a power cut, a crash), writes that nobody had flushed may have reached the primary's
disk but not the journal's. Nothing acknowledged is lost by that, but the newest image no longer is the primary. So the
volume records a gap, the primary is compared with the newest image (verify.py), what differs is journaled as new
events, and the gap ends with a sync indicator. A moment inside the gap can't be had: its image would mix old and new.

On demand, where no gap is known, a verify comes first: only where that finds differences is there a gap at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal
from uuid import UUID

from dmafs.core.digests import any_set
from dmafs.core.ondisk import Flag
from dmafs.core.recovery import case, stop_case
from dmafs.core.storage import File
from dmafs.core.verify import Differences, Found, Steps, compare, everything
from dmafs.core.volume import Volume
from dmafs.core.work import Work

NO_BOOT: Final = UUID(int=0)
"""No kernel has this boot id."""

Flush = Callable[[Flag], Work[object]]
"""Makes events durable with an indicator of the given kind."""


def needs_resync(volume: Volume) -> bool:
    """Say whether a gap has begun and not ended."""
    return bool(volume.journal.gaps) and volume.journal.gaps[-1].end is None


def begin_after_stop(volume: Volume, boot_id: UUID, flush: Flush) -> Work[None]:
    """Begin a gap if the kernel stopped while the volume was open; an initial copy then starts again from nothing.

    The primary has been brought up to the journal before (redo), which made both durable up to the head. *boot_id* is
    the running kernel's. After a mere kill of the process the page cache has kept journal and primary.
    """
    now = volume.pointers.now
    kernel: Literal["same", "other"] = "same" if now.boot_id == boot_id else "other"
    found = stop_case(clean=now.clean, kernel=kernel, gap=needs_resync(volume), copied=now.copied)
    label = case(found, f"volume {volume.info.name}")
    if label == "R48":
        yield from flush(Flag.GAP)
    elif label == "R49":
        yield from start_again(volume)


def distrust(volume: Volume) -> None:
    """Have the next start begin a gap, as after a stop of the kernel: a failed disk may lack what the primary has.

    This goes past the gate, which is shut. OSError if it can't be written either. A log is simply read again.
    """
    assert volume.failure
    if not volume.journal.windowed:
        volume.pointers.update(boot_id=NO_BOOT)


def start_again(volume: Volume) -> Work[None]:
    """Have the initial copy begin anew, without the events until now: the copy will hold what they left."""
    seq, time_ns = volume.journal.head, volume.journal.head_time_ns
    with volume.gate(fatal=True):
        yield lambda: volume.pointers.update(copied_sectors=0, mirror_seq=seq, mirror_time_ns=time_ns, durable=seq)
    volume.floor = seq
    volume.live.vrmo.reset()
    yield from volume.release(seq)


def resync(
    volume: Volume, primary: File, flush: Flush, steps: Steps, progress: Callable[[int], None]
) -> Work[Differences]:
    """Journal what the primary has and the newest image doesn't, then end the gap; return what differed.

    *progress* is told the sectors done so far.
    """
    return (yield from _end_gap(volume, primary, flush, steps, progress, found=None))


def mend(
    volume: Volume,
    primary: File,
    flush: Flush,
    steps: Steps,
    progress: Callable[[int], None],
    *,
    found: Differences,
) -> Work[Differences]:
    """Begin a gap for the differences that a verify has found, journal them, and end it; return what still differed."""
    assert found.sectors
    yield from flush(Flag.GAP)
    return (yield from _end_gap(volume, primary, flush, steps, progress, found=found))


def _end_gap(
    volume: Volume,
    primary: File,
    flush: Flush,
    steps: Steps,
    progress: Callable[[int], None],
    *,
    found: Differences | None,
) -> Work[Differences]:
    """Journal what differs, of what was found before if all of that is known; then end the gap.

    The tap settles once more before that: then the end is a moment at which the journal lacks nothing that was complete
    when the last difference was journaled.
    """
    assert needs_resync(volume)
    extents = everything(volume) if found is None or found.cut else found.columns

    def take(part: Found) -> Work[object]:
        return steps.append(lambda: journal_found(volume, part))

    differing = yield from compare(volume, primary, extents, steps, progress=progress, take=take)
    yield from steps.settle()
    yield from flush(Flag.RESYNCED)
    return differing


def journal_found(volume: Volume, found: Found) -> None:
    """Journal a part as the primary had it, but for what newer events cover. All appends of a resync are here.

    Nothing else happens on the volume meanwhile. No sync passes the gap's beginning, so the events are all there.
    """
    for start, stop in found.still(volume):
        data = found.bytes_of(start, stop)
        if any_set(data):
            volume.write(start, data)
        else:
            volume.discard(start, stop - start)
