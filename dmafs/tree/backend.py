"""What the tree asks of whoever serves it: moments, images and taps of all volumes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from dmafs.core.clone import Clone
from dmafs.core.image import Image
from dmafs.core.statistics import Statistics
from dmafs.units import TimeNs


class Space(NamedTuple):
    """The store's filesystem, in bytes."""

    total: int
    free: int
    available: int


class Backend(Protocol):
    """All methods that take a volume's name raise NotFoundError if there is none of it."""

    def volume_names(self) -> list[str]:
        """Return the names of all volumes."""

    def size(self, volume: str) -> int:
        """Return the size of a volume in bytes."""

    def resolve(self, text: str) -> TimeNs:
        """Return the canonical time of the moment that a spelling means; NotFoundError if there is none."""

    def seqs_at(self, time_ns: int) -> dict[str, int]:
        """Return the seq of each volume at a time; NotFoundError if none has a point there."""

    def landmarks(self) -> tuple[list[TimeNs], dict[str, TimeNs]]:
        """Return the canonical times to list, and those of named marks and snapshots."""

    def snapshot_ids(self) -> list[str]:
        """Return the ids of all snapshots, oldest first."""

    def snapshot_seqs(self, identifier: str) -> dict[str, int]:
        """Return the seq of each volume in a snapshot; NotFoundError if there is none of that id."""

    def snapshot_time(self, identifier: str) -> TimeNs:
        """Return the time of a snapshot."""

    async def take_snapshot(self, name: str) -> None:
        """Take a snapshot of all volumes now."""

    async def drop_snapshot(self, identifier: str) -> None:
        """Drop a snapshot of all volumes; PinnedError if it is pinned."""

    async def rename_snapshot(self, identifier: str, name: str) -> None:
        """Give a snapshot of all volumes another name; it is durable when this returns.

        NoSuchSnapshotError, ExistsError, InputError for a name that can't be one.
        """

    def clone_names(self) -> list[str]:
        """Return the names of all clones, sorted."""

    def clones(self, name: str) -> dict[str, Clone]:
        """Return the clone of each volume of that name; NotFoundError if there is none."""

    async def create_clone(self, name: str, at: str | None) -> None:
        """Make a clone of all volumes at the moment that a spelling means, or now."""

    async def drop_clone(self, name: str) -> None:
        """Drop a clone of all volumes; CloneBusyError while one is open."""

    async def read_clone(self, clone: Clone, offset: int, length: int) -> memoryview:
        """Return bytes of a clone, fewer at its end."""

    async def write_clone(self, clone: Clone, offset: int, data: bytes) -> None:
        """Write within a clone."""

    async def flush_clone(self, clone: Clone) -> None:
        """Make all writes to a clone durable."""

    def image(self, volume: str, seq: int) -> Image:
        """Return the image at a seq; NotFoundError if it isn't recoverable any more."""

    def live(self, volume: str) -> Image:
        """Return the image that follows the primary; NotFoundError before the first recoverable point."""

    def consistency(self, image: Image) -> str:
        """Return ``frozen``, ``exact`` or ``crash``; see ``core.points.consistency``."""

    async def measure(self, image: Image) -> None:
        """Count the bytes of an image that hold data, so that ``allocated`` knows at once."""

    def allocated(self, image: Image) -> int:
        """Return how many bytes of an image hold data."""

    def hold(self, image: Image) -> None:
        """Keep an image readable and unchanged until it is released as often as it was held."""

    def release(self, image: Image) -> None:
        """Undo one hold."""

    async def read(self, image: Image, offset: int, length: int, *, ahead: int = 0) -> memoryview:
        """Return bytes of an image, fewer at its end; if the disk is waited for, *ahead* bytes more are prefetched."""

    async def digest(self, image: Image) -> str:
        """Return the xxh3-128 digest of an image's bytes as hex digits. Reads all of it."""

    def has_tap(self, volume: str) -> bool:
        """Say whether the primary can be written through the tree."""

    def tap_allocated(self, volume: str) -> int:
        """Return how many bytes the primary occupies."""

    def tap_time(self, volume: str) -> TimeNs:
        """Return the time of the last write or flush of the primary."""

    async def read_tap(self, volume: str, offset: int, length: int) -> bytearray:
        """Return bytes of the primary, fewer at its end."""

    async def write_tap(self, volume: str, offset: int, data: bytes) -> None:
        """Write within the primary, captured. In a full store it waits for what can be dropped."""

    async def flush_tap(self, volume: str) -> None:
        """Make all writes durable."""

    def statistics(self, volume: str) -> Statistics:
        """Return where a volume's reads are counted."""

    def space(self) -> Space:
        """Return the space of the store."""
