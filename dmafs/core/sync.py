"""Sync: the mirror moves forward to a sync indicator, and what it loses is kept in the open snapshot (fig. 9, 10, 15).

A sync goes in *legs*: it stops at each snapshot and each held image on its way, so that these become the open snapshot
there, and where the space that is free wouldn't do for more. A leg is one transaction (promise 3):

save       The sectors that the leg will overwrite and the open snapshot lacks are copied from the mirror to its
           backward journal: data, then descriptors, both durable, and sealed. After a cut here: forgotten. Entries
           saved already stay, and are true, since the mirror is unchanged.
prove      Blocks of the mirror that the leg will overwrite in part are verified. What is damaged, here or in the
           forward journal, becomes lost where it goes: marked so, durably, and can't be read there.
commit     The pointers say durably: a sync to this seq is in progress. After a cut here: done again from overwrite on.
switch     In memory only: the mirror's own moment is shown through the open snapshot from now on, and readers that
           resolved before are waited for.
overwrite  The net change is copied from the forward journal to the mirror, with its digests, durably. After a cut here:
           done again, the same bytes to the same places.
advance    The pointers say durably: mirror and tail are at this seq. After a cut here: segments behind the tail are
           unlinked when the store is opened.

Each overwritten sector that a snapshot needs is copied once, each changed sector is copied once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from dmafs.core.batch import Extent, Lost
from dmafs.core.digests import any_set
from dmafs.core.extent import Ints, chop, join, net_change, subtract
from dmafs.core.forward import Reader
from dmafs.core.layers import entries
from dmafs.core.mirror import Mirror
from dmafs.core.ondisk import Records
from dmafs.core.segment import Segment, parts
from dmafs.core.snapshot import Snapshot
from dmafs.core.volume import Volume
from dmafs.core.vrmo import backward_reference
from dmafs.core.work import Work
from dmafs.errors import NoSuchPointError
from dmafs.units import SECTOR


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """One leg: from the mirror's seq to *target*. *moves* are (starts, stops, seqs of the winning events)."""

    base: int
    target: int
    target_time_ns: int
    snapshot: Snapshot | None
    save_starts: Ints
    save_stops: Ints
    moves: tuple[Ints, Ints, Ints]


class Stops(NamedTuple):
    """The sync indicators that a sync may go to, ascending: seqs, times, and the bytes of data behind each."""

    seqs: Ints
    times: Ints
    left_bytes: Ints


def sync_target(volume: Volume) -> int | None:
    """Return the newest sync indicator that a sync may go to: durable in the journal and on the primary, or None."""
    now = volume.pointers.now
    found = volume.journal.last_indicator(volume.journal.durable)
    if not now.copied or found is None or found.seq < max(now.origin_seq, now.mirror_seq):
        return None
    gap = volume.journal.gap_around(found.seq)
    return gap.begin if gap else found.seq


def sync(volume: Volume, *, target: int | None = None, open_snapshot: bool = True) -> Work[int]:
    """Move the mirror to a durable sync indicator, by default the newest one; return the mirror's new seq.

    *target* is the seq of one outside of gaps; if the mirror has passed it nothing is done. With *open_snapshot* the
    mirror's present moment becomes a snapshot first; otherwise the open snapshot goes on being fed and the moments
    since then are given up. NoSuchPointError while the initial copy isn't complete. When an earlier sync was cut off in
    this process (the store was full), it is finished first.
    """
    now = volume.pointers.now
    if not now.copied:
        raise NoSuchPointError(
            f"volume {volume.info.name} can't be synced: the initial copy isn't complete",
            hint="wait until dmafs status says protected",
        )
    if now.sync_target:
        yield from finish(volume)
    newest = sync_target(volume)
    if target is None or newest is None:
        target = newest
    assert target is None or target <= volume.pointers.now.mirror_seq or _may_stop_at(volume, target)
    opens = open_snapshot
    while target is not None and volume.pointers.now.mirror_seq < min(target, volume.sync_limit):
        seq = volume.pointers.now.mirror_seq
        if seq >= volume.pointers.now.origin_seq:
            yield from _open_snapshot(volume, seq, automatic=opens)
        plan = yield from plan_leg(volume, next_stop(volume, min(target, volume.sync_limit)))
        yield from _leg(volume, plan)
        opens = open_snapshot and volume.pointers.now.mirror_seq == volume.pointers.now.origin_seq
    yield from volume.drop_unheld()
    return volume.pointers.now.mirror_seq


def _may_stop_at(volume: Volume, seq: int) -> bool:
    journal, now = volume.journal, volume.pointers.now
    durable_point = now.origin_seq <= seq <= journal.durable and journal.gap_around(seq) is None
    return durable_point and (journal.is_indicated(seq) or seq == now.origin_seq)


def _open_snapshot(volume: Volume, seq: int, *, automatic: bool) -> Work[None]:
    """Make the mirror's moment a snapshot if the policy or a held image asks for it and it isn't one yet.

    A hidden snapshot is enough for a held image, but not for the policy, since it goes away with the last close.
    """
    held = bool(volume.pinned_between(seq - 1, seq + 1))
    found = volume.snapshots.visible_at(seq) if automatic else volume.snapshots.at(seq)
    if found is None and (automatic or held):
        with volume.gate():
            yield from volume.snapshots.create(seq, volume.time_of(seq), temporary=not automatic)


def next_stop(volume: Volume, target: int) -> int:
    """Return where the next leg to *target* ends: the first origin, snapshot or held image on the way, or *target*.

    Before that where space is short, so that a sync of much frees space while it goes on.
    """
    now = volume.pointers.now
    stops = volume.snapshots.seqs_between(now.mirror_seq, target)[:1]
    stops += volume.pinned_between(max(now.mirror_seq, now.origin_seq - 1), target)[:1]
    if now.mirror_seq < now.origin_seq:
        stops.append(now.origin_seq)
    return _with_room(volume, min([*stops, target]))


def stops_of(volume: Volume) -> Stops:
    """Return the sync indicators that a sync of *volume* may go to. O(indicators)."""
    journal, now = volume.journal, volume.pointers.now
    if not now.copied or volume.failure:
        return Stops(*(np.empty(0, np.int64) for _ in range(3)))
    after = max(volume.floor, now.origin_seq - 1)
    found = Stops(*journal.indicators(after, min(journal.durable, volume.sync_limit)))
    outside = np.ones(len(found.seqs), bool)
    for gap in journal.gaps:
        inside = found.seqs > gap.begin
        outside &= ~(inside if gap.end is None else inside & (found.seqs < gap.end))
    return Stops(*(column[outside] for column in found))


def room(volume: Volume) -> int:
    """Return how many bytes of data the events of a leg may have.

    A leg takes as much space as that at most before it frees any. Three times as much are left for capture meanwhile,
    and for the other volumes' syncs.
    """
    return volume.storage.free_bytes() // 4


def _with_room(volume: Volume, stop: int) -> int:
    """Return *stop*, or the last sync indicator before it that there is room for; the first one if there is none."""
    most, behind = room(volume), volume.journal.data_after(volume.floor)
    if behind <= most:
        return stop
    found = stops_of(volume)
    few = int(np.searchsorted(-found.left_bytes, most - behind, "right"))
    return min(stop, int(found.seqs[max(few - 1, 0)])) if len(found.seqs) else stop


def plan_leg(volume: Volume, target: int) -> Work[SyncPlan]:
    """Return what a leg to *target* has to do; changes nothing. O(n log n) of its events and the open snapshot."""
    base = volume.pointers.now.mirror_seq
    starts, stops = yield from volume.journal.gather(base, target)
    snapshot = volume.snapshots.open_at(base) if base >= volume.pointers.now.origin_seq else None
    held = (yield from volume.snapshots.load(snapshot)).extents() if snapshot else None
    time_ns = volume.time_of(target)
    save, moves = yield partial(movelists, starts, stops, held)
    return SyncPlan(base, target, time_ns, snapshot, save[0], save[1], (moves[0], moves[1], moves[2] + base + 1))


def movelists(
    starts: Ints, stops: Ints, held: tuple[Ints, Ints] | None
) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints, Ints]]:
    """Return the backward movelist and the net change of events, given what the open snapshot holds (fig. 12, 15).

    The net change, joined, is put through the open snapshot's map: what is still on the mirror there has to be saved.
    That is Table I for all moves at once. The moves come in the order of the events that they are of, so that the
    forward journal is read from one end to the other. *held* is None without a snapshot: nothing is saved.
    """
    change = net_change(starts, stops)
    nothing = np.empty(0, np.int64)
    save = (nothing, nothing) if held is None else chop(*subtract(*join(change.starts, change.stops), *held))
    order = np.argsort(change.winner, kind="stable")
    return save, (change.starts[order], change.stops[order], change.winner[order])


def _leg(volume: Volume, plan: SyncPlan) -> Work[None]:
    """Carry out a plan, or give it up before the commit if an image on the way was opened meanwhile."""
    if plan.snapshot is not None:
        yield from _save(volume, plan, plan.snapshot)
    with volume.gate():
        yield partial(volume.mirror.prove, *plan.moves[:2])
    if volume.pinned_between(plan.base, plan.target) or volume.snapshots.seqs_between(plan.base, plan.target):
        return  # the next leg will stop there
    if plan.target > volume.sync_limit:
        return  # somebody is about to take a snapshot on the way
    held = volume.pinned_between(plan.base - 1, plan.base + 1)
    if held and (plan.snapshot is None or plan.snapshot.seq != plan.base):
        return  # opened at the mirror's own moment meanwhile; the next leg makes that a snapshot
    opened = plan.snapshot.seq if plan.snapshot else 0
    with volume.gate(fatal=True):
        volume.floor = plan.target  # from here on nobody can open what is on the way
        yield lambda: volume.pointers.update(
            durable=volume.journal.durable,
            sync_target=plan.target,
            sync_time_ns=plan.target_time_ns,
            open_snapshot=opened,
        )
    volume.rebuild_images(range(plan.base, plan.target))  # switch: the mirror's moment is a snapshot's from now on
    yield from _apply(volume, plan)


def _save(volume: Volume, plan: SyncPlan, snapshot: Snapshot) -> Work[None]:
    """Copy what the leg will overwrite to the open snapshot, and have the images in memory use the copies at once.

    The copies are true as long as the mirror is unchanged, so giving up afterwards does no harm.
    """
    segment = volume.snapshots.segment(snapshot)
    extents = list(zip(plan.save_starts.tolist(), plan.save_stops.tolist(), strict=True))
    for begin, end in parts(plan.save_starts, plan.save_stops):

        def write(part: list[tuple[int, int]] = extents[begin:end]) -> Records:
            return segment.write_batch(_saved(volume.mirror, part), plan.target_time_ns)

        with volume.gate():
            batch: Records = yield write
        first = len(segment)
        segment.publish(batch)
        volume.snapshots.changed(snapshot)
        added = entries(segment, backward_reference(snapshot.serial, 0), first, len(segment))
        for image in volume.images():
            if image.seq < volume.floor:
                for start, stop, reference in zip(*(column.tolist() for column in added), strict=True):
                    image.vrmo.absorb(start, stop, reference)
    if segment.unsealed:
        with volume.gate():
            segment.seal()
            yield segment.datasync


def finish(volume: Volume) -> Work[None]:
    """Do a committed sync again from its overwriting on: after a cut, or when the store was full."""
    now = volume.pointers.now
    extents = yield from volume.journal.gather(now.mirror_seq, now.sync_target)
    save, moves = yield partial(movelists, *extents, None)
    moves = moves[0], moves[1], moves[2] + now.mirror_seq + 1
    plan = SyncPlan(now.mirror_seq, now.sync_target, now.sync_time_ns, None, save[0], save[1], moves)
    yield partial(volume.mirror.prepare, *moves[:2])
    yield from _apply(volume, plan)


def _apply(volume: Volume, plan: SyncPlan) -> Work[None]:
    """Overwrite the mirror, advance the pointers, and let go of what is behind the tail."""
    volume.mirror.begin()
    reader = volume.journal.reader()
    try:
        for first, last in parts(plan.moves[0], plan.moves[1]):
            moves = [column[first:last].tolist() for column in plan.moves]
            with volume.gate():
                yield partial(_overwrite, volume, reader, moves)
    finally:
        reader.close()
    with volume.gate(fatal=True):
        yield volume.mirror.finish
    with volume.gate(fatal=True):
        yield lambda: volume.pointers.update(
            mirror_seq=plan.target, mirror_time_ns=plan.target_time_ns, sync_target=0, sync_time_ns=0
        )
    volume.mirror.end()
    volume.live.vrmo.reset()
    for image in volume.images():
        if image.seq >= plan.target:
            image.vrmo.reset()
    volume.statistics.syncs += 1
    volume.statistics.saved_sectors += int((plan.save_stops - plan.save_starts).sum())
    volume.statistics.applied_sectors += int((plan.moves[1] - plan.moves[0]).sum())
    yield from volume.release(plan.target)


def _saved(mirror: Mirror, extents: list[tuple[int, int]]) -> list[Extent]:
    """Read extents of the mirror; zeros are kept as an extent without data, what is damaged as lost."""
    return [
        (start, stop - start, Lost((stop - start) * SECTOR) if data is None else data if any_set(data) else None)
        for start, stop, data in mirror.read_run(extents)
    ]


def _overwrite(volume: Volume, reader: Reader, moves: list[list[int]]) -> None:
    """Copy moves (starts, stops, seqs) from the forward journal to the mirror, each event's data checked once."""
    segment: Segment | None = None
    for start, stop, seq in zip(*moves, strict=True):
        if segment is None or seq >= segment.next_seq:
            segment = reader.segment_of(seq)
            run, current = _data_of(segment, moves[2]), -1
        index = seq - segment.header.first
        if segment.is_zero(index):
            volume.mirror.zero(start, stop)
            continue
        if index != current:
            data, current = next(run), index
        if data is None:
            volume.mirror.lose(start, stop)
        elif stop - start == segment.lengths[index]:
            volume.mirror.write(data, start, digest=segment.checksums[index])
        else:
            skip = (start - segment.starts[index]) * SECTOR
            volume.mirror.write(data[skip : skip + (stop - start) * SECTOR], start)


def _data_of(segment: Segment, seqs: list[int]) -> Iterator[memoryview | None]:
    """Yield the data, or None where it is damaged, of those of *seqs* that a segment has with data, each once.

    They ascend.
    """
    first, end = segment.header.first, segment.next_seq
    indexes = dict.fromkeys(seq - first for seq in seqs[bisect_left(seqs, first) : bisect_left(seqs, end)])
    return segment.read_run([index for index in indexes if not segment.is_zero(index)])
