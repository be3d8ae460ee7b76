"""What is in memory of the backward journal: descriptors of some snapshots, and merged layers of all.

Descriptors are loaded when they are needed, and forgotten, those used least recently first, when there are too many.
A snapshot that the mirror has reached has a *slot* in the tree of layers, and its layer in a file beside it
(``index``); the last of them is the open one, which still grows and stands beside the tree.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from uuid import UUID

from sortedcontainers import SortedDict

from dmafs.core.extent import Ints
from dmafs.core.index import keep_index, read_index, snapshot_owner
from dmafs.core.layers import Growing, Layer, LayerTree, Selectable, entries, net_layer, stacked
from dmafs.core.limits import IndexLimits
from dmafs.core.ondisk import Kind
from dmafs.core.recovery import case, entries_case
from dmafs.core.segment import Segment
from dmafs.core.snapshot import Snapshot
from dmafs.core.storage import Storage
from dmafs.core.vrmo import backward_reference, split_reference
from dmafs.core.work import Work, run
from dmafs.errors import CorruptionError

Entries = tuple[Ints, Ints, Ints]


class SnapshotMaps:
    """Snapshots by key and serial, and what is in memory of them. Called on one thread."""

    def __init__(self, storage: Storage, uuid: UUID, limits: IndexLimits) -> None:
        """Begin without snapshots."""
        self._storage = storage
        self._uuid = uuid
        self._limits = limits
        self._by_key: SortedDict = SortedDict()
        self._by_serial: dict[int, Snapshot] = {}
        self._loaded: OrderedDict[int, Snapshot] = OrderedDict()  # by serial, least recently used first
        self._by_slot: SortedDict = SortedDict()
        self._slots = 0
        self._tree = LayerTree(self._leaf, later_wins=False, limit_bytes=limits.bytes)

    # -- descriptors in memory ----------------------------------------------------------------------------------

    def segment(self, snapshot: Snapshot) -> Segment:
        """Return the snapshot's journal, opened if need be; blocks then."""
        return run(self.load(snapshot))

    def load(self, snapshot: Snapshot) -> Work[Segment]:
        """Return the snapshot's journal, once its descriptors are in memory. What work does meanwhile comes first.

        If the snapshot is dropped meanwhile, that is what was in it.
        """
        while snapshot.segment is None:
            version = snapshot.version
            try:
                segment = yield partial(self._open, snapshot.stem, _suffix(snapshot))
            except (CorruptionError, OSError):
                if _untouched(snapshot, version):
                    raise
                continue
            if _untouched(snapshot, version):
                self.keep(snapshot, segment)
            else:
                segment.close()
        if snapshot.serial in self._loaded:  # it may have been dropped while it was loaded
            self._loaded.move_to_end(snapshot.serial)
        return snapshot.segment

    def _open(self, stem: str, suffix: str) -> Segment:
        segment = Segment.open(self._storage, stem, Kind.BACKWARD, self._uuid, suffix=suffix)
        fewer = len(segment) < segment.header.sealed
        if case(entries_case(readable="fewer" if fewer else "all"), stem) == "R39":
            segment.close()
            raise CorruptionError(
                f"{segment.ext.name} or its data ends at entry {len(segment)}, "
                f"but {segment.header.sealed} had been made durable",
                hint="the storage below the store is damaged; moments that need this file can't be read",
            )
        return segment

    def keep(self, snapshot: Snapshot, segment: Segment) -> None:
        """Have the descriptors of a snapshot in memory."""
        snapshot.segment = segment
        snapshot.growing = Growing(segment, base=backward_reference(snapshot.serial, 0))
        self._loaded[snapshot.serial] = snapshot

    def descriptor_nowait(self, reference: int) -> tuple[Segment | None, int]:
        """Return the journal (None if it isn't in memory) and the entry number that a backward reference means."""
        serial, index = split_reference(reference)
        return self._by_serial[serial].segment, index

    def load_of(self, reference: int) -> Work[None]:
        """Bring the journal that a backward reference means into memory, unless its snapshot has been dropped."""
        snapshot = self._by_serial.get(split_reference(reference)[0])
        if snapshot is not None:
            yield from self.load(snapshot)

    def excess(self) -> bool:
        """Say whether there are more journals in memory than the limits allow. O(journals in memory)."""
        return len(self._loaded) > self._limits.journals or self._records() > self._limits.records

    def _records(self) -> int:
        return sum(snapshot.segment.records for snapshot in self._loaded.values() if snapshot.segment is not None)

    def unload(self, *, keep: Snapshot | None, everything: bool) -> list[Segment]:
        """Forget journals, those used least recently first, down to the limits or all, for the caller to close.

        Not that of *keep*, nor those of work under way.
        """
        released, records = [], self._records()
        for serial, snapshot in list(self._loaded.items()):
            if not everything and len(self._loaded) <= self._limits.journals and records <= self._limits.records:
                break
            if snapshot.segment is not None and snapshot is not keep and not snapshot.busy:
                released.append(snapshot.segment)
                records -= snapshot.segment.records
                snapshot.segment = snapshot.growing = None
                del self._loaded[serial]
        return released

    # -- layers -------------------------------------------------------------------------------------------------

    def _reach(self, mirror_seq: int) -> None:
        """Give slots to the snapshots that the mirror has reached since the last call.

        They come in order, since one that is taken later is never before the mirror.
        """
        last = self._by_slot.peekitem()[1].key if self._by_slot else (-1, 0)
        for key in list(self._by_key.irange(last, (mirror_seq + 1, 0), inclusive=(False, False))):
            snapshot: Snapshot = self._by_key[key]
            snapshot.slot = self._slots
            self._by_slot[snapshot.slot] = snapshot
            self._tree.add(snapshot.slot)
            self._slots += 1

    def _span(self, seq: int, mirror_seq: int, before: int | None) -> tuple[int, int, Snapshot | None]:
        """Return the slots ``[low, high)`` of the closed snapshots with *seq* <= s.seq < *before*, and the open one.

        The latter only if it is one of them. None for *before* is no bound.
        """
        self._reach(mirror_seq)
        end = mirror_seq + 1 if before is None else min(before, mirror_seq + 1)
        keys = self._by_key.irange((seq, 0), (end, 0), inclusive=(True, False))
        low = next((self._by_key[key].slot for key in keys), None)
        if low is None:
            return 0, 0, None
        last = self._by_key[next(self._by_key.irange(maximum=(end, 0), inclusive=(True, False), reverse=True))]
        opened = last.slot == self._by_slot.peekitem()[0]
        return low, last.slot + (not opened), last if opened else None

    def layers_nowait(self, seq: int, mirror_seq: int, *, before: int | None = None) -> list[Selectable] | None:
        """Return layers that hold what the snapshots from *seq* to the mirror hold; None if one isn't made yet.

        Later ones in the list win: those of older snapshots. With *before* only snapshots before that seq.
        """
        low, high, opened = self._span(seq, mirror_seq, before)
        layers = self._tree.layers_nowait(low, high)
        if opened is None or layers is None:
            return layers  # type: ignore[return-value]  # a list of what is selectable, which nobody changes
        return None if opened.growing is None else [opened.growing, *layers]

    def prepare(self, seq: int, mirror_seq: int, *, before: int | None = None, most: int | None = None) -> Work[None]:
        """Make the layers that ``layers_nowait`` returns; *most* is how many these should be."""
        low, high, opened = self._span(seq, mirror_seq, before)
        if opened is not None:
            yield from self.load(opened)
        yield from self._tree.prepare(low, high, most=most)

    def _leaf(self, slot: int) -> Work[Layer]:
        """Make the layer of a closed snapshot; its journal isn't kept in memory for that, since many may be asked."""
        while (snapshot := self._by_slot.get(slot)) is not None:
            base, version, segment = backward_reference(snapshot.serial, 0), snapshot.version, snapshot.segment
            held = None if segment is None else (segment.records, entries(segment, base, 0, len(segment)))
            try:
                layer: Layer = yield partial(self._layer, snapshot.stem, _suffix(snapshot), base, held)
            except (CorruptionError, OSError):
                if _untouched(snapshot, version):
                    raise
            else:
                if held is not None or _untouched(snapshot, version):
                    return layer
        return net_layer(*stacked([]))  # dropped meanwhile

    def _layer(self, stem: str, suffix: str, base: int, held: tuple[int, Entries] | None) -> Layer:
        """Return the layer of a closed snapshot, of its index if that is right. Runs in a thread.

        *held* are records and entries that are in memory. They don't change any more, but more may follow meanwhile: an
        index is of them only if its owner has as many.
        """
        owner = snapshot_owner(self._storage, stem + suffix, self._uuid)
        if owner and owner.records >= self._limits.indexed and (held is None or held[0] == owner.records):
            found = read_index(self._storage, stem, owner, base=base)
            if found is not None:
                return found
        records, own = held or self._read_entries(stem, suffix, base)
        layer = net_layer(*own)
        owner = snapshot_owner(self._storage, stem + suffix, self._uuid, events=len(own[0]))
        if owner is None or owner.records != records:
            return layer
        return keep_index(self._storage, stem, owner, layer, self._limits, base=base, beside=(".ext", ".gone"))

    def _read_entries(self, stem: str, suffix: str, base: int) -> tuple[int, Entries]:
        segment = self._open(stem, suffix)
        try:
            return segment.records, entries(segment, base, 0, len(segment))
        finally:
            segment.close()

    def changed(self, snapshot: Snapshot) -> None:
        """Take note that entries were added to a snapshot."""
        if snapshot.slot >= 0:
            self._tree.changed(snapshot.slot)

    def rebuilt(self, seq: int, mirror_seq: int) -> list[Selectable]:
        """Return layers that hold what the snapshots from *seq* to the mirror hold, from their descriptors alone."""
        keys = self._by_key.irange((seq, 0), (mirror_seq + 1, 0), inclusive=(True, False), reverse=True)
        snapshots: list[Snapshot] = [self._by_key[key] for key in keys]
        return [Growing(self.segment(one), base=backward_reference(one.serial, 0)) for one in snapshots]

    def leave(self, snapshot: Snapshot) -> None:
        """Forget what is in memory of a snapshot that is removed."""
        self._loaded.pop(snapshot.serial, None)
        if snapshot.slot >= 0:
            del self._by_slot[snapshot.slot]
            self._tree.remove(snapshot.slot)

    def check_maps(self) -> None:
        """Assert that slots are in the order of keys without leaving one out, and who is loaded."""
        loaded = {serial for serial, snapshot in self._by_serial.items() if snapshot.segment is not None}
        assert loaded == self._loaded.keys()
        slotted = [snapshot.key for snapshot in self._by_slot.values()]
        assert slotted == list(self._by_key)[: len(slotted)], "slots are those of the oldest snapshots"
        self._tree.check()


def _suffix(snapshot: Snapshot) -> str:
    """Return how the name of its descriptors' file ends now."""
    return ".gone" if snapshot.gone else ".ext"


def _untouched(snapshot: Snapshot, version: int) -> bool:
    """Say whether no work has begun on a snapshot's files since *version*, and nobody else has loaded them."""
    return snapshot.segment is None and snapshot.version == version
