"""The backward journal: snapshots, each with what syncs overwrote in the mirror while it was the open one (fig. 13-16).

A snapshot is a pair of files ``backward/<seq>.ext .dat``; a second one at the same seq is ``<seq>-1`` and so on. It may
be taken ahead of the mirror and is then empty until a sync passes it. The *open* snapshot is the last one that the
mirror has reached. The image of snapshot s is: the first among s and all later ones that holds an address, else the
mirror (fig. 16: an older snapshot relies on younger ones' copies of what the mirror lost).

Dropping one merges into the next older one what that doesn't hold itself; with none older its entries are just freed:

1. ``.ext`` is renamed to ``.gone``: from here on the drop will be finished, whatever happens;
2. its entries that the next older snapshot lacks are appended to that one, durably;
3. its files are unlinked.

Entries are *sealed* when all of a merge or of a leg of a sync are durable: the header says how many. If one of them is
missing that is damage and an error, since without it wrong data from the mirror would be served, also where the end of
a file is missing; what is missing behind them had not been needed yet.

Doing step 2 twice adds nothing, since the first time's entries are held then. An image that is held open keeps its
snapshot in state ``.gone`` until the last close. Snapshots marked temporary exist only for a held image, and are
dropped at the last close or when the store is opened next.

An index of a snapshot's layer is beside the pair, and goes with it (``index``).

A snapshot's name is in the header of its descriptors, one sector, which is overwritten when it gets another one.

A *pinned* snapshot isn't dropped: an empty file ``<stem>.pin`` stands beside the pair. Without a snapshot that users
see it means nothing, and is unlinked when the store is opened.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, Literal
from uuid import UUID

import numpy as np

from dmafs.core.backward import SnapshotMaps
from dmafs.core.extent import Ints, lacking
from dmafs.core.files import INDEX, discard_files, discard_index
from dmafs.core.limits import IndexLimits
from dmafs.core.ondisk import HEADER_SIZE, RECORD_SIZE, Header, Kind, Records, new_salt
from dmafs.core.opening import open_ours
from dmafs.core.recovery import SUFFIXES, Refuse, Suffix, case, index_case, pointers_case, refuse, snapshot_case
from dmafs.core.segment import Segment, parts, read_header
from dmafs.core.snapshot import DIRECTORY, Snapshot, entry_of, require_unpinned, undo_renaming
from dmafs.core.storage import Storage
from dmafs.core.work import Work
from dmafs.errors import CorruptionError, ExistsError, NoSuchSnapshotError, StoreError
from dmafs.units import SECTOR

log = logging.getLogger(__name__)

SEQ_END: Final = 2**63
_STEM: Final = re.compile(r"[0-9]{20}(-[0-9]+)?")


class Snapshots(SnapshotMaps):
    """All snapshots of a volume, in the order of their seqs."""

    def __init__(self, storage: Storage, uuid: UUID, limits: IndexLimits, *, refuse: Refuse = refuse) -> None:
        """Read the header of every snapshot. O(snapshots). What isn't ours or is damaged is told *refuse*."""
        super().__init__(storage, uuid, limits)
        self._names: dict[str, Snapshot] = {}
        self._hidden: dict[int, Snapshot] = {}  # by serial
        self._serials = 0
        names = sorted(storage.names(DIRECTORY), key=lambda name: name.endswith(".pin"))  # pins last
        stems = {name.rpartition(".")[0] for name in names if name.endswith((".ext", ".gone"))}
        leftovers = []
        for path in (f"{DIRECTORY}/{name}" for name in names):
            try:
                leftovers += [path] if self._is_leftover(path, stems) else []
            except StoreError as error:
                refuse(path, error)
        for path in leftovers:
            storage.unlink(path)

    def _is_leftover(self, path: str, stems: set[str]) -> bool:
        """Take in a file, or say that it is left over; *stems* are those of files of descriptors."""
        stem, _, suffix = path.removeprefix(f"{DIRECTORY}/").rpartition(".")
        if f".{suffix}" == INDEX and _STEM.fullmatch(stem):
            return case(index_case(beside=stem in stems), path) == "R51"
        pinned = next((one for one in self._twins(stem) if one.pin == path), None) if suffix == "pin" else None
        kind: Suffix = suffix if suffix in SUFFIXES else "foreign"  # type: ignore[assignment]  # it is one of them
        label = case(snapshot_case(suffix=kind, beside=pinned is not None if kind == "pin" else stem in stems), path)
        if label == "R38":
            raise CorruptionError(f"{self._storage.path(path)} is no file of ours", hint="move it out of the store")
        if label in {"R31", "R32"}:
            self._enter(stem, suffix)
        if label == "R36" and pinned is not None:
            pinned.pinned = True
        return label in {"R33", "R35", "R37"}

    def _twins(self, stem: str) -> Iterator[Snapshot]:
        """Yield the visible snapshots at the seq that a stem names."""
        seq = stem.partition("-")[0]
        return self._visible_twins(int(seq)) if seq.isascii() and seq.isdigit() else iter(())

    def require_open(self, seq: int, *, target: bool) -> None:
        """Raise CorruptionError if the open snapshot that the pointers name, unless that is 0, is missing.

        *target* is whether a sync had been committed.
        """
        missing = bool(seq) and self.at(seq) is None
        snapshot: Literal["missing", "whole"] = "missing" if missing else "whole"
        if case(pointers_case(slots="some", snapshot=snapshot, target=target), f"open snapshot {seq}") == "R42":
            raise CorruptionError(
                f"files {self._storage.path(f'{DIRECTORY}/{seq:020d}')}.ext and .dat, the open snapshot, are missing",
                hint="restore them; the history before the mirror needs them",
            )

    def _enter(self, stem: str, suffix: str) -> None:
        """Add the snapshot whose descriptors are in ``stem.suffix``."""
        path = f"{DIRECTORY}/{stem}.{suffix}"
        file = open_ours(self._storage, path, needed="it is a snapshot")
        try:
            header = read_header(file, Kind.BACKWARD, self._uuid)
        finally:
            file.close()
        number = stem.partition("-")[2]
        twin = int(number) if number.isascii() and number.isdigit() else 0
        snapshot = self._add(header, twin, gone=suffix == "gone")
        if f"{DIRECTORY}/{stem}" != snapshot.stem:
            raise CorruptionError(
                f"{self._storage.path(path)} holds the snapshot {snapshot.stem}",
                hint=f"the file was renamed; give it back its name, which ends in {snapshot.stem}.{suffix}",
            )

    def _add(self, header: Header, twin: int, *, gone: bool = False) -> Snapshot:
        self._serials += 1
        snapshot = Snapshot(
            header.snapshot_seq,
            twin,
            header.snapshot_time_ns,
            header.instant_ns,
            header.name,
            header.temporary,
            header.frozen,
            self._serials,
            gone,
        )
        self._by_key[snapshot.key] = snapshot
        self._by_serial[snapshot.serial] = snapshot
        if header.name and not gone:
            self._names[header.name] = snapshot
        if snapshot.hidden:
            self._hidden[snapshot.serial] = snapshot
        return snapshot

    # -- looking up ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Snapshot]:
        """Yield the snapshots that users see, oldest first."""
        return (snapshot for snapshot in self._by_key.values() if not snapshot.hidden)

    def __len__(self) -> int:
        """Return the number of snapshots that users see."""
        return sum(1 for _ in self)

    def all(self) -> list[Snapshot]:
        """Return all snapshots, hidden ones too, oldest first."""
        return list(self._by_key.values())

    def hidden(self) -> list[Snapshot]:
        """Return the snapshots that users don't see."""
        return list(self._hidden.values())

    def find(self, name: str) -> Snapshot | None:
        """Return the snapshot of that name, or None."""
        return self._names.get(name)

    def at(self, seq: int) -> Snapshot | None:
        """Return the first snapshot at exactly *seq*. O(log snapshots)."""
        for key in self._by_key.irange((seq, 0), (seq + 1, 0), inclusive=(True, False)):
            found: Snapshot = self._by_key[key]
            return found
        return None

    def visible_at(self, seq: int) -> Snapshot | None:
        """Return a snapshot at exactly *seq* that users see."""
        return next(self._visible_twins(seq), None)

    def open_at(self, mirror_seq: int) -> Snapshot | None:
        """Return the open snapshot: the last one that the mirror has reached. O(log snapshots)."""
        for key in self._by_key.irange(maximum=(mirror_seq + 1, 0), inclusive=(True, False), reverse=True):
            found: Snapshot = self._by_key[key]
            return found
        return None

    def seqs_between(self, after: int, before: int) -> list[int]:
        """Return the seqs of snapshots with *after* < seq < *before*, ascending."""
        keys = self._by_key.irange((after + 1, 0), (before, 0), inclusive=(True, False))
        return sorted({seq for seq, _ in keys})

    def newest_before(self, time_ns: int, seq: int) -> Snapshot | None:
        """Return the visible snapshot with a seq below *seq* that is the last not after *time_ns*. O(log snapshots).

        Times never decrease along seqs.
        """
        places = range(self._by_key.bisect_left((seq, 0)))
        behind = bisect_right(places, time_ns, key=lambda place: self._by_key.peekitem(place)[1].time_ns)
        for place in range(behind - 1, -1, -1):
            snapshot: Snapshot = self._by_key.peekitem(place)[1]
            if not snapshot.hidden:
                return snapshot
        return None

    def older(self, snapshot: Snapshot) -> Snapshot | None:
        """Return the next older snapshot, hidden or not: what dropping this one merges into."""
        index = self._by_key.index(snapshot.key)
        return self._by_key.peekitem(index - 1)[1] if index else None

    def taken_at(self, instant_ns: int) -> Snapshot | None:
        """Return the visible snapshot without a name that was taken at that instant. O(log snapshots).

        No event follows its seq up to the instant, so it is among those at the newest seq not after that.
        """
        newest = self.newest_before(instant_ns, SEQ_END)
        for snapshot in self._visible_twins(newest.seq) if newest else ():
            if snapshot.instant_ns == instant_ns and not snapshot.name:
                return snapshot
        return None

    def covers(self, seq: int) -> bool:
        """Say whether a snapshot that users see stands at *seq* or later. O(1) unless many are hidden."""
        return any(not self._by_key[key].hidden for key in self._by_key.irange(minimum=(seq, 0)))

    def is_frozen(self, seq: int) -> bool:
        """Say whether a snapshot at exactly *seq* that users see was taken of a disk at rest."""
        return any(snapshot.frozen for snapshot in self._visible_twins(seq))

    def _visible_twins(self, seq: int) -> Iterator[Snapshot]:
        for key in self._by_key.irange((seq, 0), (seq + 1, 0), inclusive=(True, False)):
            if not self._by_key[key].hidden:
                yield self._by_key[key]

    def held_bytes(self, snapshot: Snapshot) -> int:
        """Return how many bytes of descriptors and data a snapshot has: 0 if no sync has fed it yet. O(1)."""
        if snapshot.segment is not None:
            return snapshot.segment.records * RECORD_SIZE + snapshot.segment.data_sectors * SECTOR
        suffix = ".gone" if snapshot.gone else ".ext"
        sizes = [self._storage.size(snapshot.stem + one) for one in (suffix, ".dat")]
        return max(0, sum(sizes) - HEADER_SIZE)

    @contextlib.contextmanager
    def _working_on(self, *snapshots: Snapshot) -> Iterator[None]:
        """Keep journals in memory: whoever reads a file while it grows would take its end for damage."""
        for snapshot in snapshots:
            self.segment(snapshot)
        for snapshot in snapshots:
            snapshot.version += 1
            snapshot.busy += 1
        try:
            yield
        finally:
            for snapshot in snapshots:
                snapshot.busy -= 1

    # -- changing -----------------------------------------------------------------------------------------------

    def create(
        self,
        seq: int,
        time_ns: int,
        name: str = "",
        *,
        temporary: bool = False,
        frozen: bool = False,
        instant_ns: int | None = None,
    ) -> Work[Snapshot]:
        """Make a snapshot at *seq*; it is durable when this returns. ExistsError if the name is taken.

        *instant_ns* is the canonical time of the moment across volumes, unless it is taken of this one alone.
        """
        self.require_free(name)
        keys = list(self._by_key.irange((seq, 0), (seq + 1, 0), inclusive=(True, False)))
        twin = keys[-1][1] + 1 if keys else 0
        instant_ns = time_ns if instant_ns is None else instant_ns
        header = Header(Kind.BACKWARD, self._uuid, new_salt(), 1, seq, time_ns, temporary, name, frozen, instant_ns)
        snapshot = self._add(header, twin)

        def settle(segment: Segment) -> None:
            segment.datasync()
            self._storage.rename(snapshot.stem + ".new", snapshot.stem + ".ext")
            self._storage.sync_directory(DIRECTORY)

        try:
            segment = Segment.create(self._storage, snapshot.stem, header, suffix=".new")
            self.keep(snapshot, segment)
            with self._working_on(snapshot):
                yield lambda: settle(segment)
        except BaseException:
            self._remove(snapshot)
            self._undo_creation(snapshot)
            raise
        return snapshot

    def _undo_creation(self, snapshot: Snapshot) -> None:
        """Leave no files behind, durably: once a sync has passed its seq, they would show a later moment.

        Where that fails the error is none that the volume goes on after.
        """
        if snapshot.segment is not None:
            snapshot.segment.close()
        discard_files(self._storage, snapshot.stem, ".new", ".ext", ".pin")
        try:
            self._storage.sync_directory(DIRECTORY)
        except OSError as error:
            raise OSError(errno.EIO, error.strerror, f"{DIRECTORY}/") from error

    def require_free(self, name: str) -> None:
        """Raise ExistsError if a snapshot has that name."""
        if name and name in self._names:
            raise ExistsError(f"snapshot {name} already exists", hint="take another name, or drop that one first")

    def _remove(self, snapshot: Snapshot) -> None:
        del self._by_key[snapshot.key]
        del self._by_serial[snapshot.serial]
        self._hidden.pop(snapshot.serial, None)
        self.leave(snapshot)
        if self._names.get(snapshot.name) is snapshot:
            del self._names[snapshot.name]

    def doom(self, snapshot: Snapshot) -> Work[None]:
        """Begin to drop a snapshot: hide it and free its name, durably (step 1).

        PinnedError if it is pinned, NoSuchSnapshotError if its files aren't made yet, or couldn't be.
        """
        if snapshot.gone:
            return
        require_unpinned(snapshot)
        if snapshot.busy or snapshot.serial not in self._by_serial:
            raise NoSuchSnapshotError(
                f"snapshot {snapshot.name or snapshot.seq} is just being taken or changed",
                hint="try again in a moment",
            )

        def rename() -> None:
            self._storage.rename(snapshot.stem + ".ext", snapshot.stem + ".gone")
            self._storage.sync_directory(DIRECTORY)

        with self._working_on(snapshot):
            snapshot.gone = True
            self._hidden[snapshot.serial] = snapshot
            if self._names.get(snapshot.name) is snapshot:
                del self._names[snapshot.name]
            try:
                yield rename
            except BaseException:
                if self._storage.exists(snapshot.stem + ".ext"):  # not even the rename was done
                    snapshot.gone = False
                    if not snapshot.hidden:
                        del self._hidden[snapshot.serial]
                    if snapshot.name:
                        self._names.setdefault(snapshot.name, snapshot)
                raise

    def pin(self, snapshot: Snapshot) -> Work[None]:
        """Have a snapshot not be dropped; durable when this returns. NoSuchSnapshotError if it is being dropped.

        It counts from the beginning on, so no drop can begin meanwhile. Pinning and unpinning exclude each other.
        """
        if snapshot.hidden:
            raise NoSuchSnapshotError(
                f"snapshot {snapshot.name or snapshot.seq} is being dropped", hint="list them with: dmafs ls STORE"
            )
        snapshot.pinned = True

        def create() -> None:
            if not self._storage.exists(snapshot.pin):
                self._storage.create(snapshot.pin).close()
            self._storage.sync_directory(DIRECTORY)

        try:
            yield create
        except BaseException:
            snapshot.pinned = self._storage.exists(snapshot.pin)
            raise

    def unpin(self, snapshot: Snapshot) -> Work[None]:
        """Let a snapshot be dropped again; durable when this returns."""

        def unlink() -> None:
            if self._storage.exists(snapshot.pin):
                self._storage.unlink(snapshot.pin)
            self._storage.sync_directory(DIRECTORY)

        try:
            yield unlink
        finally:
            snapshot.pinned = self._storage.exists(snapshot.pin)

    def rename(self, snapshot: Snapshot, name: str) -> Work[None]:
        """Give a snapshot another name; durable when this returns. After a cut it has the old one or the new one.

        Until then both are taken. ExistsError if another one has it, NoSuchSnapshotError as with a drop.
        """
        old = snapshot.name
        if name == old:
            return
        self.require_free(name)
        if snapshot.hidden or not self._storage.exists(snapshot.stem + ".ext"):
            raise NoSuchSnapshotError(
                f"snapshot {old or snapshot.seq} is just being taken or dropped", hint="try again in a moment"
            )
        with self._working_on(snapshot):
            segment = self.segment(snapshot)
            self._names[name] = snapshot
            try:
                segment.rename(name)
                yield segment.ext.datasync
                snapshot.name = name
            except BaseException:
                undo_renaming(segment, old)
                raise
            finally:
                for one in {old, name} - {snapshot.name}:
                    self._names.pop(one, None)

    def merge(self, snapshot: Snapshot) -> Work[Segment]:
        """Finish dropping a doomed snapshot (steps 2 and 3); return its journal, for the caller to close.

        References to it mean nothing any more: the caller builds the maps anew before it yields.
        """
        assert snapshot.gone
        assert not snapshot.busy, "its file has the name of what is dropped"
        older = [found for found in [self.older(snapshot)] if found is not None]

        def unlink() -> None:
            self._storage.unlink(snapshot.stem + ".gone")
            self._storage.unlink(snapshot.stem + ".dat")
            for one in (snapshot, *older):
                discard_index(self._storage, one.stem)
            self._storage.sync_directory(DIRECTORY)

        with self._working_on(snapshot, *older):
            segment = self.segment(snapshot)
            for target in older:
                yield from self._move_entries(segment, target)
            yield unlink
        self._remove(snapshot)
        return segment

    def _move_entries(self, source: Segment, older: Snapshot) -> Work[None]:
        """Append the entries of *source* that an older snapshot doesn't hold to that one."""
        target = self.segment(older)
        change = lacking(*source.extents(), *target.extents())
        pieces = list(zip(*(column.tolist() for column in change), strict=True))
        time_ns = source.header.snapshot_time_ns if not target.times else target.times[-1]
        for first, last in parts(change.starts, change.stops):

            def move(part: list[tuple[int, int, int]] = pieces[first:last]) -> Records:
                return target.write_batch([entry_of(source, *piece) for piece in part], time_ns)

            target.publish((yield move))
            self.changed(older)
        if target.unsealed:
            target.seal()
            yield target.datasync

    def close(self) -> None:
        """Close all open journals."""
        for segment in self.unload(keep=None, everything=True):
            segment.close()

    def check(self) -> None:
        """Assert that names, serials and keys agree, and the invariants of each open journal."""
        assert len(self._by_key) == len(self._by_serial)
        assert all(self._by_key[snapshot.key] is snapshot for snapshot in self._by_serial.values())
        for snapshot in self._by_key.values():
            assert not snapshot.name or snapshot.gone or self._names[snapshot.name] is snapshot
            assert not snapshot.pinned or not snapshot.hidden
            assert snapshot.pinned is self._storage.exists(snapshot.pin)
            if snapshot.segment is not None:
                snapshot.segment.check()
                starts, stops = _sorted(*snapshot.segment.extents())
                assert np.all(starts[1:] >= stops[:-1]), "a snapshot holds each address once"
        assert self._hidden == {serial: snapshot for serial, snapshot in self._by_serial.items() if snapshot.hidden}
        self.check_maps()


def _sorted(starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    order = np.argsort(starts, kind="stable")
    return starts[order], stops[order]
