"""A volume: one primary's whole recent history, put together from journals, mirror, snapshots and pointers.

Where things go:

- a write: ``write`` or ``discard`` -> ``ForwardJournal.append`` -> the live image's map;
- a flush: ``flush`` (an indicator, then journal and primary durable);
- a read: ``image`` (a map built from descriptors) -> ``Image.resolve`` -> ``Image.read_pieces``;
- a sync: ``sync.py``; the initial copy: ``copy.py``; which moments there are: ``points.py``.

Invariants:

1. The image at seq s is the initial copy plus events 1..s, bit for bit, as long as s is *recoverable*: at or past both
   the origin and the floor, or a snapshot's.
2. The *floor* is the mirror's seq, and from the moment a sync begins to commit the seq that it leads to.
3. Nothing is written after a failed write or fsync (the *gate*): the volume is read-only until it is opened anew. Only
   "no space" leaves it writable, since then nothing was appended.
4. All methods are called on one thread; only what work yields runs on others.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

from dmafs.core import clone as writable
from dmafs.core import recovery as forward
from dmafs.core import snapshot as backward
from dmafs.core.clone import Allowance, Clones
from dmafs.core.columns import Indicator
from dmafs.core.files import write_whole
from dmafs.core.gate import Gate
from dmafs.core.image import Image
from dmafs.core.journal import ForwardJournal
from dmafs.core.layers import STACK_WARM, Selectable
from dmafs.core.limits import VolumeLimits
from dmafs.core.mirror import Mirror
from dmafs.core.ondisk import RECORD_SIZE, VOLUME_JSON_LIMIT, Flag, Pointers, VolumeInfo
from dmafs.core.pointers import PointerFile
from dmafs.core.segment import Segment
from dmafs.core.snapshot import Snapshot
from dmafs.core.snapshots import Snapshots
from dmafs.core.statistics import Statistics
from dmafs.core.storage import File, Storage
from dmafs.core.vrmo import BACKWARD, ZERO, Stack
from dmafs.core.window import Window
from dmafs.core.work import Work
from dmafs.errors import CorruptionError, NoSuchPointError, StoreFullError

log = logging.getLogger(__name__)

INFO_NAME = "volume.json"


class Volume:
    """One volume of a store. Made by ``create`` once, then opened; the caller has locked the store."""

    def __init__(
        self, storage: Storage, *, limits: VolumeLimits | None = None, clock: Callable[[], int] = time.time_ns
    ) -> None:
        """Open the volume in *storage* and recover what an unclean stop left. *clock* returns UTC nanoseconds."""
        self.limits = limits or VolumeLimits()
        self.clock = clock
        self.storage = storage
        self.info = VolumeInfo.decode(storage.read_bytes(INFO_NAME, VOLUME_JSON_LIMIT), storage.path(INFO_NAME))
        self.gate = Gate(self.info.name, clock)
        with contextlib.ExitStack() as undo:
            self.pointers = PointerFile(storage, self.info.uuid)
            undo.callback(self.pointers.close)
            self.mirror = Mirror(storage, self.info)
            undo.callback(self.mirror.close)
            self.snapshots = Snapshots(storage, self.info.uuid, self.limits.indexes)
            undo.callback(self.snapshots.close)
            self.journal = ForwardJournal(
                storage,
                self.info.uuid,
                self.limits.segments,
                clock,
                index=self.limits.indexes,
                windowed=self.info.tap != "fuse",
            )
            undo.callback(self.journal.close)
            now = self.pointers.now
            self.journal.recover(
                tail=now.mirror_seq,
                tail_time_ns=max(now.mirror_time_ns, now.origin_time_ns),
                durable=max(now.durable, now.mirror_seq),
            )
            reserve = self.limits.reserve_bytes * writable.RESERVES
            allowance = Allowance(storage, quota=self.limits.clone_bytes, reserve=reserve)
            self.clones = Clones(storage, self.info, allowance, clock)
            undo.callback(self.clones.close)
            self.snapshots.require_open(now.open_snapshot, target=bool(now.sync_target))
            undo.pop_all()
        self.floor = max(now.mirror_seq, now.sync_target)
        self.statistics = Statistics()
        self._images: dict[int, Image] = {}  # least recently used first
        self._reserved: Counter[int] = Counter()  # seqs that are about to become snapshots
        self._garbage: list[Segment] = []
        self._allowance = 0
        self.live = Image(self, self.journal.head, self.journal.head_time_ns)
        self.clones.hold_all(self)

    @staticmethod
    def create(
        storage: Storage, *, name: str, size_sectors: int, source: Path, tap: str, created_ns: int, log_path: str = ""
    ) -> VolumeInfo:
        """Make the files of a new volume in an empty directory; volume.json, written last, makes it one."""
        info = VolumeInfo(uuid4(), name, size_sectors, str(source), tap, created_ns, log_path)
        for directory in (forward.DIRECTORY, backward.DIRECTORY, writable.DIRECTORY):
            storage.make_directory(directory)
        Mirror.create(storage, info)
        PointerFile.create(storage, Pointers(info.uuid, clean=True))
        storage.sync_directory("")
        write_whole(storage, INFO_NAME, info.encode())
        return info

    # -- capture ------------------------------------------------------------------------------------------------

    def write(self, start: int, data: memoryview | bytes) -> int:
        """Journal a write of whole sectors at sector *start*; return its seq. Not durable before ``flush``."""
        length, rest = divmod(len(data), 512)
        assert rest == 0
        return self._capture(start, length, data)

    def discard(self, start: int, length: int) -> int:
        """Journal a discard: *length* sectors that read as zeros from now on."""
        return self._capture(start, length, None)

    def _capture(self, start: int, length: int, data: memoryview | bytes | None) -> int:
        assert start >= 0
        assert 0 < length <= self.info.size_sectors - start, "a write within the volume"
        self.require_space(0 if data is None else len(data))
        with self.gate():
            seq = self.journal.append(start, length, data)
        counted = self.statistics.zeros if data is None else self.statistics.data
        counted.events, counted.sectors = counted.events + 1, counted.sectors + length
        self.live.vrmo.overwrite(start, start + length, seq if data is not None else seq | ZERO)
        self.live.seq, self.live.time_ns = seq, self.journal.head_time_ns
        return seq

    def begin_window(self) -> Window:
        """Return a window for what was captured together; while it is open nothing else is journaled."""
        with self.gate():
            return self.journal.begin_window()

    def publish(self, window: Window) -> None:
        """Have the events of a closed window count; see ``ForwardJournal.publish``."""
        self.journal.publish(window)
        window.count_into(self.statistics)
        for starts, stops in window.extents():
            self.live.vrmo.forget(starts, stops)
        self.live.seq, self.live.time_ns = self.journal.head, self.journal.head_time_ns

    def abandon(self, window: Window) -> None:
        """Take away what a window has written. Where that fails nothing is journaled any more: it might count later."""
        with self.gate(fatal=True):
            self.journal.abandon(window)

    def require_space(self, needed: int) -> None:
        """Refuse a write that would take the space reserved for syncs; asks the filesystem once per some MiB."""
        self._allowance -= needed + RECORD_SIZE
        if self._allowance >= 0:
            return
        free = self.storage.free_bytes() - self.limits.reserve_bytes - needed
        if free < 0:
            raise StoreFullError(
                f"store of volume {self.info.name} is full: less than {self.limits.reserve_bytes} bytes would be left",
                hint="make space, sync, or drop old snapshots",
            )
        self._allowance = min(free, self.limits.reserve_bytes) // 4

    def flush(self, primary: File | None = None, *, flag: Flag = Flag.FLUSH, name: str = "") -> Work[Indicator]:
        """Make all events until now durable, in the journal and on *primary*; return the sync indicator for them.

        One flush at a time: a second one would find nothing left to sync and return before the first.
        """
        indicator = self.indicate(flag, name)
        yield from self.settle(primary)
        return indicator

    def settle(self, primary: File | None = None) -> Work[None]:
        """Make durable what ``indicate`` stands behind; see ``flush``."""
        if self.journal.is_clean():
            return
        upto = self.journal.head
        work = self.journal.take_dirty(*([] if primary is None else [primary]))
        with self.gate(fatal=True):
            yield from work
        self.journal.durable = max(self.journal.durable, upto)

    def indicate(self, flag: Flag = Flag.FLUSH, name: str = "") -> Indicator:
        """Set a sync indicator at the newest event, or return the one that stands there; durable after ``flush``."""
        with self.gate():
            self.journal.indicate(flag, name)
        indicator = self.journal.last_indicator(self.journal.head)
        assert indicator is not None
        return indicator

    @property
    def failure(self) -> str:
        """Return why the volume is read-only, empty if it isn't."""
        return self.gate.failure

    # -- images -------------------------------------------------------------------------------------------------

    def recoverable(self, seq: int) -> bool:
        """Say whether the image at *seq* can be had (invariant 1)."""
        now = self.pointers.now
        if not now.copied or seq < now.origin_seq:
            return False
        if seq >= self.floor:
            points = seq <= self.journal.head and not self.journal.splits_window(seq)
            return points and self.journal.gap_around(seq) is None
        if self.snapshots.visible_at(seq) is not None:
            return True
        return self.is_held(seq) and self.snapshots.at(seq) is not None

    def is_held(self, seq: int) -> bool:
        """Say whether somebody needs the image at *seq* to stay as it is: who has it open, or a clone."""
        return (seq in self._images and self._images[seq].pins > 0) or self.clones.holds(seq)

    @contextlib.contextmanager
    def reserved(self, seq: int) -> Iterator[None]:
        """Have syncs not pass a seq that is about to become a snapshot."""
        self._reserved[seq] += 1
        try:
            yield
        finally:
            self._reserved[seq] -= 1
            self._reserved += Counter()  # forget what is zero

    @property
    def sync_limit(self) -> int:
        """Return the seq that a sync may not pass now."""
        return min((seq for seq, count in self._reserved.items() if count), default=self.journal.head)

    def is_exact(self, seq: int) -> bool:
        """Say whether the image at a recoverable *seq* ends at a sync indicator."""
        now = self.pointers.now
        if seq < self.floor:
            return self.snapshots.visible_at(seq) is not None
        return seq in {now.origin_seq, now.mirror_seq} or self.journal.is_indicated(seq)

    def time_of(self, seq: int) -> int:
        """Return the canonical time of the image at *seq*: of its last event, or of the origin."""
        now = self.pointers.now
        if seq == now.origin_seq:
            return now.origin_time_ns
        if seq == now.mirror_seq:
            return now.mirror_time_ns
        snapshot = self.snapshots.at(seq) if seq < now.mirror_seq else None
        return snapshot.time_ns if snapshot else self.journal.time_of(seq)

    def image(self, seq: int) -> Image:
        """Return the image at *seq*; NoSuchPointError if it isn't recoverable.

        The same object for the same seq as long as somebody holds it. Its map is made where it is looked at.
        """
        self.require_point(seq)
        image = self._images.pop(seq, None) or Image(self, seq, self.time_of(seq), exact=self.is_exact(seq))
        self._images[seq] = image
        self._evict()
        return image

    def require_point(self, seq: int) -> None:
        """Raise NoSuchPointError unless the image at *seq* can be had."""
        if not self.recoverable(seq):
            raise NoSuchPointError(
                f"volume {self.info.name} has no recoverable point at seq {seq}",
                hint="list the points with: dmafs ls STORE",
            )

    def _evict(self) -> None:
        """Forget the images that nobody holds, least recently used first, down to the limit."""
        idle = [seq for seq, image in self._images.items() if not image.pins]
        for seq in idle[: max(0, len(idle) - self.limits.images)]:
            del self._images[seq]

    def keeps(self, image: Image) -> bool:
        """Say whether an image's map is kept up to date: the live one's, of held ones and of some looked at lately."""
        return image is self.live or self._images.get(image.seq) is image

    def stack(self, image: Image) -> Work[Stack]:
        """Return what an image is, the live one then, once all of it is in memory. O(log n) when it is there already.

        NoSuchPointError when the image can't be had, or a sync passes it meanwhile.
        """
        while True:
            seq = image.seq
            if seq < self.floor:
                self.require_point(seq)
            mirror_seq = self.pointers.now.mirror_seq
            if (layers := self._layers_nowait(seq, mirror_seq)) is not None:
                return Stack(layers, mirror_seq)
            if seq < self.floor:
                yield from self.snapshots.prepare(seq, mirror_seq)
            else:
                yield from self.journal.prepare(seq)

    def warm(self) -> Work[None]:
        """Make the layers that opening images needs, those of the oldest one too."""
        yield from self.journal.prepare(self.journal.head, most=STACK_WARM)
        oldest = next(iter(self.snapshots), None)
        if oldest is not None:
            yield from self.snapshots.prepare(oldest.seq, self.pointers.now.mirror_seq, most=STACK_WARM)

    def _layers_nowait(self, seq: int, mirror_seq: int) -> list[Selectable] | None:
        below = seq < self.floor
        return self.snapshots.layers_nowait(seq, mirror_seq) if below else self.journal.layers_nowait(seq)

    def rebuilt(self, seq: int) -> Stack:
        """Return what the image at *seq* is, made from descriptors alone (promise 9)."""
        mirror_seq = self.pointers.now.mirror_seq
        if seq < self.floor:
            return Stack(self.snapshots.rebuilt(seq, mirror_seq), mirror_seq)
        return Stack(self.journal.rebuilt(seq), mirror_seq)

    def descriptor_nowait(self, reference: int) -> tuple[Segment | None, int]:
        """Return the journal (None if it isn't in memory) and the entry number that a reference with data means."""
        if reference >= BACKWARD:
            return self.snapshots.descriptor_nowait(reference)
        return self.journal.descriptor_nowait(reference)

    def load(self, reference: int) -> Work[None]:
        """Bring the journal that a reference names into memory, if it still means anything."""
        if reference >= BACKWARD:
            yield from self.snapshots.load_of(reference)
        else:
            yield from self.journal.load_of(reference)

    def images(self) -> list[Image]:
        """Return all images in memory but the live one."""
        return list(self._images.values())

    def pinned_between(self, after: int, before: int) -> list[int]:
        """Return the seqs of held images with *after* < seq < *before*, ascending."""
        return sorted(seq for seq in self._images if after < seq < before and self.is_held(seq))

    def rebuild_images(self, seqs: range) -> None:
        """Let go of the images in *seqs* that nobody holds; the maps of those held are made anew where looked at."""
        for seq, image in list(self._images.items()):
            if seq in seqs and image.pins:
                image.vrmo.reset()
            elif seq in seqs:
                del self._images[seq]

    # -- snapshots ----------------------------------------------------------------------------------------------

    def take_snapshot(self, primary: File | None = None, name: str = "") -> Work[Snapshot]:
        """Flush, and make the newest durable moment a snapshot."""
        self.require_snapshot(name)
        indicator = yield from self.flush(primary)
        return (yield from self.snapshot_at(indicator.seq, name))

    def require_snapshot(self, name: str) -> None:
        """Raise what taking a snapshot of that name would raise, before anything is done for it."""
        self.snapshots.require_free(name)
        if not self.pointers.now.copied:
            raise NoSuchPointError(
                f"volume {self.info.name} has no recoverable point yet: the initial copy isn't complete",
                hint="wait until dmafs status says protected",
            )

    def snapshot_at(
        self, seq: int, name: str, *, instant_ns: int | None = None, frozen: bool = False
    ) -> Work[Snapshot]:
        """Make the moment of a durable sync indicator a snapshot; *instant_ns* is that of all volumes taken with it.

        Without a name there is one snapshot at most of an instant: if it is there already, it is returned.
        """
        if seq < self.floor or not self.recoverable(seq):  # a twin of an old one would lack what that holds
            raise NoSuchPointError(
                f"volume {self.info.name} can't be kept at seq {seq}: a gap lasts, or a sync has passed",
                hint="see dmafs status, and try again later",
            )
        time_ns = self.time_of(seq)
        instant_ns = time_ns if instant_ns is None else instant_ns
        found = None if name else self.snapshots.taken_at(instant_ns)
        if found is not None:
            return found
        with self.gate():
            work = self.snapshots.create(seq, time_ns, name, frozen=frozen, instant_ns=instant_ns)
            return (yield from work)

    def drop_snapshot(self, snapshot: Snapshot) -> Work[None]:
        """Hide a snapshot and, unless its image is held, merge its entries into the next older one."""
        yield from self.hide_snapshot(snapshot)
        yield from self.drop_unheld()

    def hide_snapshot(self, snapshot: Snapshot) -> Work[None]:
        """Begin to drop a snapshot, durably, also during a sync; ``drop_unheld`` finishes it. PinnedError if pinned."""
        with self.gate():
            yield from self.snapshots.doom(snapshot)

    def pin(self, snapshot: Snapshot) -> Work[None]:
        """Have a snapshot not be dropped, durably."""
        with self.gate():
            yield from self.snapshots.pin(snapshot)

    def unpin(self, snapshot: Snapshot) -> Work[None]:
        """Let a snapshot be dropped again, durably."""
        with self.gate():
            yield from self.snapshots.unpin(snapshot)

    def drop_unheld(self) -> Work[None]:
        """Finish dropping the hidden snapshots whose images nobody holds any more.

        Not those that are still being hidden, whose files aren't renamed yet: who does that calls this then.
        """
        for snapshot in self.snapshots.hidden():
            if snapshot.busy or self.is_held(snapshot.seq):
                continue
            try:
                yield from self._drop(snapshot)
            except CorruptionError as error:  # it stays hidden: what an older image may need of it isn't thrown away
                log.error("volume %s: snapshot %s can't be dropped: %s", self.info.name, snapshot.seq, error.message)

    def _drop(self, snapshot: Snapshot) -> Work[None]:
        try:
            with self.gate():
                yield from self.snapshots.doom(snapshot)
                if self.pointers.now.open_snapshot == snapshot.seq:
                    yield lambda: self.pointers.update(open_snapshot=0)
                self._garbage.append((yield from self.snapshots.merge(snapshot)))
        finally:  # done or not, an older snapshot has taken entries over
            self.rebuild_images(range(self.floor))

    # -- housekeeping -------------------------------------------------------------------------------------------

    def excess(self) -> bool:
        """Say whether more journals are in memory than the limits allow."""
        return self.snapshots.excess() or self.journal.excess()

    def take_garbage(self) -> list[Segment]:
        """Return the journals that needn't be in memory any more, for the caller to close when all readers are done.

        No sync is under way then.
        """
        opened = self.snapshots.open_at(self.pointers.now.mirror_seq)
        self._garbage += self.snapshots.unload(keep=opened, everything=False)
        self._garbage += self.journal.unload()
        garbage, self._garbage = self._garbage, []
        return garbage

    def release(self, tail: int) -> Work[None]:
        """Let go of the forward journal up to *tail*, which the pointers say durably."""
        released = self.journal.release(tail)
        self._garbage += [part.segment for part in released if part.segment is not None]

        def remove() -> None:
            for part in released:
                part.remove(self.storage)

        with self.gate():
            yield remove

    def mark_open(self, boot_id: UUID) -> None:
        """Record durably that the volume is in use under this boot of the kernel."""
        with self.gate(fatal=True):
            self.pointers.update(clean=False, boot_id=boot_id)

    def note_durable(self) -> None:
        """Record durably up to where the journal is: a daemon that follows one that was killed redoes nothing of it."""
        with self.gate(fatal=True):
            self.pointers.update(durable=self.journal.durable)

    def mark_clean(self) -> None:
        """Record durably that journal and primary agree up to the head: an orderly stop."""
        assert self.journal.durable == self.journal.head
        with self.gate(fatal=True):
            self.journal.trim()
            self.pointers.update(clean=True, durable=self.journal.durable)

    def close(self) -> None:
        """Close all files."""
        for segment in self.take_garbage():
            segment.close()
        self.clones.close()
        self.journal.close()
        self.snapshots.close()
        self.mirror.close()
        self.pointers.close()

    def check(self) -> None:
        """Assert the invariants of every structure (each is described where it is defined)."""
        self.journal.check()
        self.snapshots.check()
        self.mirror.check()
        assert self.pointers.now.mirror_seq <= self.floor <= self.journal.head
        assert self.live.seq == self.journal.head
        self.live.check()
        self.clones.check()
        for image in [one for one in self._images.values() if one.pins or self.recoverable(one.seq)]:
            image.check()
