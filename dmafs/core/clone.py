"""Clones: writable images of one moment. What is written goes to an overlay, the moment itself never changes.

``clones/<name>/`` holds the overlay of one volume. A clone of a store has one in each of its volumes, at one instant.

Invariants:

1. A clone *holds* the image at its seq, its *base*, from before its first file is made until its drop is durable, and
   again from when the volume is opened on. So syncs stop at it, and the snapshot that keeps it, though perhaps a
   temporary or a dropped one, stays over restarts.
2. The base is durable in the journal before the clone is.
3. A clone is there wholly or not at all: it is made as ``.<name>.new`` and renamed; to drop it, it is renamed to
   ``.<name>.gone``, then removed. What is left of either is removed when the volume is opened.
4. What goes wrong with a clone stays with it: a clone whose files or base are damaged answers with errors and can be
   dropped, one whose write or fsync failed is read-only until it is opened anew; the volume goes on.
5. Writes and flushes of one clone exclude each other: the caller sees to it. Reads may come at any time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from dmafs.core.image import Image, Piece
from dmafs.core.ondisk import Header, Kind, VolumeInfo, new_salt
from dmafs.core.overlay import BLOCK, BLOCK_SECTORS, DAT, EXT, Overlay
from dmafs.core.storage import Buffer, Storage
from dmafs.core.work import Work
from dmafs.errors import (
    CloneBusyError,
    CorruptionError,
    DmafsError,
    ExistsError,
    ReadOnlyError,
    StoreError,
    StoreFullError,
)
from dmafs.units import valid_name

if TYPE_CHECKING:
    from dmafs.core.volume import Volume

log = logging.getLogger(__name__)

DIRECTORY: Final = "clones"
CLONES_MAX: Final = 64
"""Clones of a store, at most."""
RESERVES: Final = 2
"""Clones leave twice the space that capture leaves, so that scratch work alone never stops capture."""

Part = tuple[int, int, list[Piece] | None]


class Allowance:
    """The space that the clones of a volume may take."""

    def __init__(self, storage: Storage, *, quota: int, reserve: int) -> None:
        """Allow *quota* bytes to each of them, and keep *reserve* bytes of the filesystem free."""
        self._storage = storage
        self.quota = quota
        self._reserve = reserve

    def require(self, label: str, taken: int, more: int) -> None:
        """Raise StoreFullError unless a clone that has *taken* blocks may take *more*."""
        if not more:
            return
        if (taken + more) * BLOCK > self.quota:
            raise StoreFullError(
                f"{label} has reached its quota of {self.quota} bytes", hint="raise clone_quota, or drop the clone"
            )
        if self._storage.free_bytes() - more * BLOCK < self._reserve:
            raise StoreFullError(
                f"{label} can't grow: less than {self._reserve} bytes of the store would be left",
                hint="make space, sync, or drop clones and old snapshots",
            )


class Clone:
    """One volume's image in a clone."""

    def __init__(
        self, volume: str, name: str, overlay: Overlay | None, allowance: Allowance, clock: Callable[[], int]
    ) -> None:
        """Show *overlay*, None if it can't be read; without a base until ``hold``."""
        self._allowance = allowance
        self._clock = clock
        self.volume = volume
        self.name = name
        self.base: Image | None = None
        self.failure = ""
        self.opens = 0  # by whoever reads or writes it over time
        self.gone = False
        self.seq = overlay.header.snapshot_seq if overlay else -1
        self.time_ns = self.written_ns = overlay.header.snapshot_time_ns if overlay else 0
        self.serial = overlay.header.salt if overlay else new_salt()  # tells it from another one of the same name
        self._overlay = overlay
        self._base_sectors: int | None = None

    @property
    def _label(self) -> str:
        return f"clone {self.name} of volume {self.volume}"

    def hold(self, base: Image) -> None:
        """Take *base* and hold it; ``release`` lets go."""
        base.pins += 1
        self.base = base

    def release(self) -> None:
        """Close the files and let go of the base."""
        if self._overlay is not None:
            self._overlay.close()
        if self.base is not None:
            self.base.pins -= 1
            self.base = None

    def parts(self) -> tuple[Overlay, Image]:
        """Return overlay and base; CorruptionError if either can't be had."""
        if self._overlay is None or self.base is None:
            raise CorruptionError(f"{self._label} can't be used: {self.failure}", hint="drop it, or repair the store")
        return self._overlay, self.base

    @property
    def stored_bytes(self) -> int:
        """Return the bytes of the blocks written since it was made."""
        return self._overlay.blocks * BLOCK if self._overlay else 0

    def allocated_sectors(self) -> int:
        """Return how many sectors hold data, at most: those of the base and those written; 0 if it can't be used."""
        overlay, base = self._overlay, self.base
        if overlay is None or base is None:
            return 0
        if self._base_sectors is None:
            self._base_sectors = base.allocated_sectors()
        return min(self._base_sectors + overlay.blocks * BLOCK_SECTORS, overlay.size_sectors)

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> Work[memoryview]:
        """Return the bytes ``[offset, offset + length)``, clipped; yields only to wait for the disk."""
        overlay, base = self.parts()
        if offset >= base.size or not length:
            return memoryview(b"")
        stop = min(offset + length, base.size)
        while base.resolve_nowait(offset, stop - offset) is None:
            yield from base.locate(offset, stop - offset)
        parts: list[Part] = []
        for first, end, is_held in overlay.runs(offset // BLOCK, -(-stop // BLOCK)):
            begin, end_byte = max(first * BLOCK, offset), min(end * BLOCK, stop)
            parts.append((begin, end_byte, None if is_held else base.resolve_nowait(begin, end_byte - begin)))
        try:
            return _read_parts(overlay, base, parts, nowait=True)
        except BlockingIOError:
            answer: memoryview = yield partial(_read_parts, overlay, base, parts)
            return answer

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: Buffer) -> Work[None]:
        """Write within the image; of blocks that aren't in the overlay yet the rest is read from the base.

        StoreFullError when quota or free space end; durable after ``flush``.
        """
        overlay, base = self.parts()
        stop = offset + len(data)
        assert 0 <= offset < stop <= base.size
        self._require_writable()
        first, last = offset // BLOCK, -(-stop // BLOCK) - 1
        held = overlay.held(first, last + 1)
        self._allowance.require(self._label, overlay.blocks, int((~held).sum()))
        begin = offset if held[0] else first * BLOCK
        end = stop if held[-1] else min((last + 1) * BLOCK, base.size)
        lead: Buffer = b""
        tail: Buffer = b""
        if begin < offset:
            lead = yield from _read_base(base, begin, offset)
        if stop < end:
            tail = yield from _read_base(base, stop, end)
        with self._gate():
            overlay.write([lead, data, tail], begin)
        self.written_ns = self._clock()
        if overlay.is_crowded:
            yield from self.flush()

    def flush(self) -> Work[None]:
        """Make all writes until now durable."""
        overlay, _ = self.parts()
        if not overlay.dirty:
            return
        self._require_writable()
        with self._gate(fatal=True):
            yield from overlay.flush(self._clock())

    def _require_writable(self) -> None:
        if self.failure:
            raise ReadOnlyError(
                f"{self._label} is read-only: {self.failure}", hint="look at the store's disk, or drop the clone"
            )

    @contextlib.contextmanager
    def _gate(self, *, fatal: bool = False) -> Iterator[None]:
        """Translate the errors of a change; after one that leaves unknown what is on the disk nothing is written."""
        try:
            yield
        except OSError as error:
            if fatal or error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                self.failure = (error.strerror or str(error)).lower()
            raise _translated(error, self._label) from error

    def check(self) -> None:
        """Assert that the base is held, and the overlay's invariants."""
        overlay, base = self.parts()
        assert base.pins > 0
        assert base.seq == self.seq
        overlay.check()


def is_leftover(name: str) -> bool:
    """Say whether a directory of that name is what a creation or a drop that was cut off has left."""
    return name.startswith(".") and name.endswith((".new", ".gone"))


class Clones:
    """All clones of a volume."""

    def __init__(self, storage: Storage, info: VolumeInfo, allowance: Allowance, clock: Callable[[], int]) -> None:
        """Open every clone, and remove what creations and drops that were cut off have left. O(their records)."""
        self._storage = storage
        self._volume = info.name
        self._uuid = info.uuid
        self._size_sectors = info.size_sectors
        self.allowance = allowance
        self._clock = clock
        self._by_name: dict[str, Clone] = {}
        self._making: set[str] = set()
        for name in storage.names(DIRECTORY):
            if valid_name(name):
                self._by_name[name] = self._open(name)
            elif is_leftover(name):
                self._try_to_remove(name)
            else:
                path = storage.path(f"{DIRECTORY}/{name}")
                log.error("volume %s: %s is no file of ours; move it out of the store", info.name, path)

    def _open(self, name: str) -> Clone:
        try:
            overlay = Overlay.open(self._storage, f"{DIRECTORY}/{name}", self._uuid, self._size_sectors)
        except (DmafsError, OSError) as error:
            clone = Clone(self._volume, name, None, self.allowance, self._clock)
            self._fail(clone, error)
            return clone
        return Clone(self._volume, name, overlay, self.allowance, self._clock)

    def _fail(self, clone: Clone, error: DmafsError | OSError) -> None:
        clone.failure = error.message if isinstance(error, DmafsError) else str(error)
        log.error("volume %s: clone %s can't be used: %s", self._volume, clone.name, clone.failure)

    def hold_all(self, volume: Volume) -> None:
        """Hold the base of every clone (invariant 1); one whose base is damaged is of no use from now on."""
        for clone in self._by_name.values():
            if clone.failure:
                continue
            try:
                clone.hold(volume.image(clone.seq))
            except (DmafsError, OSError) as error:
                self._fail(clone, error)

    # -- looking up ---------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Clone]:
        """Yield all clones, sorted by name."""
        return iter([clone for _, clone in sorted(self._by_name.items()) if not clone.gone])

    def find(self, name: str) -> Clone | None:
        """Return the clone of that name, or None."""
        clone = self._by_name.get(name)
        return None if clone is None or clone.gone else clone

    def holds(self, seq: int) -> bool:
        """Say whether a clone needs the image at *seq*, also one that can't be used now."""
        return any(clone.seq == seq for clone in self._by_name.values())

    # -- changing -----------------------------------------------------------------------------------------------

    def require_free(self, name: str) -> None:
        """Raise ExistsError if a clone has that name."""
        if name in self._by_name or name in self._making:
            raise ExistsError(f"clone {name} already exists", hint="take another name, or drop that one first")

    def create(self, base: Image, name: str) -> Work[Clone]:
        """Make a clone of an image that is durable in the journal. It is durable, and holds it, when this returns."""
        self.require_free(name)
        assert base.seq <= base.volume.journal.durable, "the base is durable before the clone is (invariant 2)"
        header = Header(Kind.CLONE, self._uuid, new_salt(), 1, base.seq, base.time_ns, name=name)
        self._making.add(name)
        base.pins += 1
        try:
            overlay = yield partial(self._make, name, header)
            clone = self._by_name[name] = Clone(self._volume, name, overlay, self.allowance, self._clock)
            clone.hold(base)
        except OSError as error:
            raise _translated(error, f"clone {name} of volume {self._volume}") from error
        finally:
            self._making.discard(name)
            base.pins -= 1
        return clone

    def _make(self, name: str, header: Header) -> Overlay:
        """Make the files under a temporary name, then rename (invariant 3). May run in a thread."""
        temporary, final = f"{DIRECTORY}/.{name}.new", f"{DIRECTORY}/{name}"
        self._try_to_remove(f".{name}.new")
        self._storage.make_directory(temporary)
        try:
            Overlay.create(self._storage, temporary, header, self._size_sectors)
            self._storage.rename(temporary, final)
            self._storage.sync_directory(DIRECTORY)
            return Overlay.open(self._storage, final, self._uuid, self._size_sectors)
        except (DmafsError, OSError) as error:
            if self._storage.exists(final):
                with contextlib.suppress(OSError):
                    self._hide(name)
            if self._storage.exists(final):  # it stays as a whole: then somebody has to hold its base
                log.warning(
                    "clone %s of volume %s was made, though not for sure durably: %s", name, self._volume, error
                )
                return Overlay.open(self._storage, final, self._uuid, self._size_sectors)
            for leftover in (f".{name}.new", f".{name}.gone"):
                self._try_to_remove(leftover)
            raise

    def _hide(self, name: str) -> None:
        """Begin to drop a clone, durably; go on with it where that failed half-way."""
        if self._storage.exists(f"{DIRECTORY}/{name}"):
            self._try_to_remove(f".{name}.gone")
            self._storage.rename(f"{DIRECTORY}/{name}", f"{DIRECTORY}/.{name}.gone")
        self._storage.sync_directory(DIRECTORY)

    def drop(self, clone: Clone) -> Work[None]:
        """Drop a clone and let go of its base; CloneBusyError while somebody has it open."""
        self.require_idle(clone)
        name = clone.name
        clone.gone = True
        try:
            yield partial(self._hide, name)
        except BaseException as error:
            clone.gone = False
            if isinstance(error, OSError):
                raise _translated(error, f"clone {name} of volume {self._volume}") from error
            raise
        clone.release()
        del self._by_name[name]
        yield partial(self._try_to_remove, f".{name}.gone")

    def require_idle(self, clone: Clone) -> None:
        """Raise CloneBusyError while somebody has a clone open, or drops it already."""
        if clone.opens or clone.gone:
            raise CloneBusyError(
                f"clone {clone.name} of volume {self._volume} is in use",
                hint="unmount it, detach its loop devices and close its files first",
            )

    def _try_to_remove(self, name: str) -> None:
        """Remove a clone's files and directory, if they are there; otherwise the next opening tries again."""
        directory = f"{DIRECTORY}/{name}"
        try:
            if self._storage.exists(directory):
                self._storage.sync_directory(DIRECTORY)  # with its proper name it would be a clone that lacks files
                for file in (EXT, DAT):
                    with contextlib.suppress(FileNotFoundError):
                        self._storage.unlink(f"{directory}/{file}")
                self._storage.remove_directory(directory)
                self._storage.sync_directory(DIRECTORY)
        except OSError as error:
            log.error("volume %s: %s can't be removed: %s", self._volume, directory, (error.strerror or "").lower())

    # -- housekeeping -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all files and let go of all bases."""
        for clone in self._by_name.values():
            clone.release()
        self._by_name = {}

    def check(self) -> None:
        """Assert the invariants of each clone that can be used."""
        for clone in self:
            if not clone.failure:
                clone.check()


def _read_base(base: Image, begin: int, end: int) -> Work[memoryview]:
    """Return bytes of the base; yields only to wait for the disk."""
    pieces = yield from base.locate(begin, end - begin)
    try:
        return base.read_pieces(pieces, begin, end - begin, nowait=True)
    except BlockingIOError:
        answer: memoryview = yield partial(base.read_pieces, pieces, begin, end - begin)
        return answer


def _read_parts(overlay: Overlay, base: Image, parts: list[Part], *, nowait: bool = False) -> memoryview:
    """Read neighbouring parts: those with pieces from the base, the others from the overlay. May run in a thread."""
    if not parts:
        return memoryview(b"")
    offset = parts[0][0]
    buffer = memoryview(bytearray(parts[-1][1] - offset))
    for begin, end, pieces in parts:
        into = buffer[begin - offset : end - offset]
        if pieces is None:
            overlay.read_into(into, begin, nowait=nowait)
        else:
            into[:] = base.read_pieces(pieces, begin, end - begin, nowait=nowait)
    return buffer


def _translated(error: OSError, label: str) -> StoreError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StoreFullError(f"{label}: the store is full", hint="make space, sync, or drop old snapshots")
    text = f"{error.strerror or error}".lower()
    return StoreError(f"{label}: {text} ({error.filename or DIRECTORY})", hint="look at the store's disk")
