"""Read-around: what lies around a small read of the past is put into the kernel's page cache before it is asked for.

A request costs as much as some pages that are stored unasked, and who reads many small files of an image asks for its
neighbourhood bit by bit: the kernel's own readahead only sees one file at a time. So requests are watched that come
near one of the last few. In each *area* of 1 MiB the second one has a small *window* around it stored with
``notify_store``, and each further one a wider one, up to the whole area. Where neighbours aren't asked for soon, as by
random reads, nothing is done. What was stored and is asked for nevertheless has left the page cache: soon after, and
storing it was in vain, so that more requests are wanted the next time; later, and the area is as if it were new.

Only what never changes is stored. Everything is bounded: areas that are remembered, windows that wait (more are left
out), buffers. A window is read between two requests, when none waits, and stored by a thread: ``notify_store`` waits
for pages that are being read, thus for requests under way. So the session must not end before ``close`` returns.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from time import monotonic
from typing import Final, NamedTuple

import pyfuse3
import trio

from dmafs.core.image import Image
from dmafs.errors import DmafsError

log = logging.getLogger(__name__)

AREA: Final = 1 << 20
WINDOWS: Final = (1 << 16, 1 << 18, AREA)
"""What is stored at one request after the other, each aligned to its length."""
SMALL_MAX: Final = 1 << 16
"""Longer requests come from the kernel's readahead, which knows better."""
AREAS_MAX: Final = 4096
"""Areas remembered, some 300 bytes each: the least recently used are forgotten."""
WISHES_MAX: Final = 16
"""Windows that wait to be read."""
BUFFERS: Final = 4
"""Windows that are being stored."""
LATE_S: Final = 0.1
"""Requests that come so soon after were under way when it was stored."""
VAIN_S: Final = 5.0
"""What leaves the page cache within this time was stored in vain."""
WANTED_MIN: Final = 2
WANTED_MAX: Final = 32
"""Requests in an area, near others, before anything of it is stored, at first and at most."""
NEAR: Final = 1 << 16
"""What is near is in the same or the next piece of this length."""
RECENT: Final = 16
"""So many pieces have been asked for lately: of random reads in 1 GiB one in 340 is near one of them."""


class Area:
    """What is known of an area: requests near others, and which range of bytes was stored."""

    __slots__ = ("begin", "end", "requests", "stored_s", "wanted")

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self.requests = 0
        self.wanted = WANTED_MIN
        self.begin = self.end = 0
        self.stored_s = math.inf  # when, or infinite while it is waiting to be


class Wish(NamedTuple):
    """A window to be stored: bytes of a file, which begins at *start* in an image, and the inode that it is for."""

    inode: int
    image: Image
    start: int
    begin: int
    end: int
    area: Area


Reading = Callable[[Image, int, int], Awaitable[memoryview]]


class ReadAround:
    """See the module."""

    def __init__(self, read: Reading) -> None:
        """*read* reads bytes of an image that aren't in memory."""
        self._read_slowly = read
        self._areas: OrderedDict[tuple[int, int], Area] = OrderedDict()  # least recently used first
        self._recent: OrderedDict[int, None] = OrderedDict()  # likewise
        self._wishes: deque[Wish] = deque()
        self._slow: deque[Wish] = deque()
        self._slow_wished = trio.lowlevel.ParkingLot()
        self._buffers = deque(memoryview(bytearray(AREA)) for _ in range(BUFFERS))
        self._filled: SimpleQueue[tuple[Wish, memoryview, memoryview] | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._store, name="read-around", daemon=True)
        self._thread.start()

    def missed(self, inode: int, image: Image, offset: int, length: int, *, start: int = 0, size: int = 0) -> None:
        """Take note of a request for bytes of an image; maybe wish for those around them.

        The file may be a part of the image: *size* bytes from *start* on, in which the offset counts.
        """
        if length > SMALL_MAX or not self._is_near(inode, offset // NEAR):
            return
        key = inode, offset // AREA
        area = self._areas.get(key)
        if area is None:
            area = self._areas[key] = Area()
            if len(self._areas) > AREAS_MAX:
                self._areas.popitem(last=False)
        else:
            self._areas.move_to_end(key)
        if area.begin <= offset < area.end:
            age_s = monotonic() - area.stored_s
            if age_s < LATE_S:
                return  # it is on its way, or was when this was asked for
            area.wanted = min(2 * area.wanted, WANTED_MAX) if age_s < VAIN_S else WANTED_MIN
            area.requests = area.begin = area.end = 0
        area.requests += 1
        if area.requests >= area.wanted and len(self._wishes) < WISHES_MAX and not self._closed:
            width = WINDOWS[min(area.requests - area.wanted, len(WINDOWS) - 1)]
            begin = offset // width * width
            area.begin, area.end = begin, min(begin + width, size or image.size)
            area.stored_s = math.inf
            self._wishes.append(Wish(inode, image, start, area.begin, area.end, area))

    def _is_near(self, inode: int, piece: int) -> bool:
        """Say whether a piece, or one next to it, was asked for lately; from now on it was."""
        recent, key = self._recent, inode << 64 | piece
        if key in recent:
            recent.move_to_end(key)
            return True
        recent[key] = None
        if len(recent) > RECENT:
            recent.popitem(last=False)
        return key - 1 in recent or key + 1 in recent

    def step(self) -> bool:
        """Read a window that is wished for and have it stored, if there is a buffer; say whether that was done.

        To be called between requests, which it keeps waiting. What isn't in memory is left to ``run``.
        """
        if not self._wishes or not self._buffers or self._closed:
            return False
        wish, buffer = self._wishes.popleft(), self._buffers.popleft()
        try:
            data = wish.image.read_nowait(wish.start + wish.begin, wish.end - wish.begin, buffer)
        except (DmafsError, OSError) as error:
            self._buffers.append(buffer)
            _tell(wish, error)
            return True
        if data is not None:
            self._filled.put((wish, data, buffer))
            return True
        self._buffers.append(buffer)
        if len(self._slow) < WISHES_MAX:
            self._slow.append(wish)
            self._slow_wished.unpark()
        else:
            wish.area.begin = wish.area.end = 0  # given up: else it would be waited for in vain
        return True

    async def run(self) -> None:
        """Read the windows that aren't in memory, one by one, until cancelled."""
        while True:
            while not self._slow:
                await self._slow_wished.park()
            wish = self._slow.popleft()
            try:
                data = await self._read_slowly(wish.image, wish.start + wish.begin, wish.end - wish.begin)
            except (DmafsError, OSError) as error:
                _tell(wish, error)
            else:
                if not self._closed:
                    self._filled.put((wish, data, memoryview(b"")))

    def _store(self) -> None:
        """Store what was read, in a thread, until closed."""
        while (item := self._filled.get()) is not None:
            wish, data, buffer = item
            try:
                pyfuse3.notify_store(pyfuse3.InodeT(wish.inode), wish.begin, data)  # type: ignore[arg-type]
            except OSError as error:  # the kernel has forgotten the inode, or has no memory
                _tell(wish, error)
            wish.area.stored_s = monotonic()
            if buffer:
                self._buffers.append(buffer)

    async def close(self) -> None:
        """Store nothing more; return when nothing is under way. A second call does nothing."""
        self._closed = True
        self._filled.put(None)
        await trio.to_thread.run_sync(self._thread.join)


def _tell(wish: Wish, error: Exception) -> None:
    """Take note that a window isn't stored: nobody has asked for it, and who does is told himself."""
    log.debug("bytes %d+%d of inode %d not stored: %s", wish.begin, wish.end - wish.begin, wish.inode, error)
