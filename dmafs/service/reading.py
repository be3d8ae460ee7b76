"""What an engine does for readers of images: their bytes, and that they stay as they are while somebody holds them."""

from __future__ import annotations

from typing import Final

import trio
import xxhash

from dmafs.core.image import Image
from dmafs.core.volume import Volume
from dmafs.core.work import Work
from dmafs.errors import CorruptionError
from dmafs.service.driver import Driver, Result

DIGEST_CHUNK: Final = 1 << 20


class Reading(Driver):
    """The part of an engine that reads."""

    def __init__(self, volume: Volume, limiter: trio.CapacityLimiter) -> None:
        """Read images of *volume*; threads are taken from *limiter*."""
        super().__init__(limiter)
        self.volume = volume
        self.drop_wanted = trio.Event()
        """Something that nobody holds any more is to be dropped or closed."""

    async def read(self, image: Image, offset: int, length: int, *, ahead: int = 0) -> memoryview:
        """Return bytes of an image, fewer at its end: at once from the page cache, else from a thread.

        In that case what the next *ahead* bytes need is prefetched, as far as it is known where that is.
        """
        length = max(0, min(length, image.size - offset))
        if not length:
            return memoryview(b"")
        try:
            return await self._read(image, offset, length, ahead)
        except CorruptionError:
            self.volume.statistics.damaged_reads += 1
            raise

    async def _read(self, image: Image, offset: int, length: int, ahead: int) -> memoryview:
        statistics = self.volume.statistics
        pieces = image.resolve_nowait(offset, length)
        if pieces is None:
            pieces = await self.answer(image.locate(offset, length))
        try:
            data = image.read_pieces(pieces, offset, length, nowait=True)
        except BlockingIOError:
            statistics.by_thread.add(length)
        else:
            statistics.at_once.add(length)
            return data
        behind = min(ahead, image.size - offset - length)
        further = (behind and image.resolve_nowait(offset + length, behind)) or []

        def read() -> memoryview:
            image.prefetch([*pieces, *further])
            return image.read_pieces(pieces, offset, length)

        with self.reading():
            return await trio.to_thread.run_sync(read, limiter=self.limiter)

    async def answer(self, work: Work[Result]) -> Result:
        """Do work that changes nothing; who waits for it may give up."""
        found = await self.drive(work, stoppable=True)
        self.mind_excess()
        return found

    def mind_excess(self) -> None:
        """Have journals closed in the background when too many are in memory."""
        if self.volume.excess():
            self.drop_wanted.set()

    async def digest(self, image: Image) -> str:
        """Return the xxh3-128 digest of a whole image."""
        digest = xxhash.xxh3_128()
        for offset in range(0, image.size, DIGEST_CHUNK):
            digest.update(await self.read(image, offset, DIGEST_CHUNK))
            await trio.lowlevel.checkpoint()
        return digest.hexdigest()

    def hold(self, image: Image) -> None:
        """Keep an image readable and unchanged (promise 4)."""
        image.pins += 1

    def release(self, image: Image) -> None:
        """Undo one hold; what was kept only for it is dropped in the background."""
        image.pins -= 1
        assert image.pins >= 0
        if not image.pins:
            self.drop_wanted.set()
