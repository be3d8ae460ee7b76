"""Claims about dmafs.tree.around: what is stored unasked, and what isn't."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import cast

import pyfuse3
import pytest
import trio
import trio.lowlevel
import trio.testing

from dmafs.core.image import Image
from dmafs.errors import CorruptionError
from dmafs.tree import around
from dmafs.tree.around import AREA, AREAS_MAX, BUFFERS, NEAR, RECENT, WANTED_MAX, WINDOWS, WISHES_MAX, ReadAround

SIZE = 5 * AREA + 4096
KIB = 1024


class Picture:
    """Of an image what read-around asks: every byte is the number of its MiB."""

    size = SIZE

    def __init__(self) -> None:
        self.in_memory = True
        self.damaged = False

    def content(self, offset: int, length: int) -> memoryview:
        return memoryview(bytearray((offset + at) // AREA + 1 for at in range(length)))

    def read_nowait(self, offset: int, length: int, scratch: memoryview) -> memoryview | None:
        assert length <= len(scratch)
        if self.damaged:
            raise CorruptionError("damaged", hint="")
        if not self.in_memory:
            return None
        scratch[:length] = self.content(offset, length)
        return scratch[:length]


class Kernel:
    """Stands for the page cache: what was stored, and how many may be at once."""

    def __init__(self) -> None:
        self.stored: list[tuple[int, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: OSError | None = None
        self.start = 0
        """Where the file begins in the picture."""

    def notify_store(self, inode: int, offset: int, data: memoryview) -> None:
        self.gate.wait()
        if self.error is not None:
            raise self.error
        assert data == Picture().content(self.start + offset, len(data))
        self.stored.append((inode, offset, len(data)))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(pyfuse3, "notify_store", kernel.notify_store)
    return kernel


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [1000.0]
    monkeypatch.setattr(around, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
async def made(kernel: Kernel, nursery: trio.Nursery) -> AsyncIterator[ReadAround]:
    async def read(image: Image, offset: int, length: int) -> memoryview:
        await trio.lowlevel.checkpoint()
        if cast("Picture", image).damaged:
            raise CorruptionError("damaged", hint="")
        return cast("Picture", image).content(offset, length)

    made = ReadAround(read)
    nursery.start_soon(made.run)
    yield made
    kernel.gate.set()
    await made.close()
    nursery.cancel_scope.cancel()


def ask(made: ReadAround, *offsets: int, length: int = 4096, inode: int = 7, picture: Picture | None = None) -> None:
    """Have a client ask for bytes, and wait while it thinks about them."""
    for offset in offsets:
        made.missed(inode, cast("Image", picture or Picture()), offset, length)
        while made.step():
            pass


async def settled(made: ReadAround, kernel: Kernel, count: int) -> list[tuple[int, int, int]]:
    """Wait until so many windows were stored, and return them."""
    with trio.fail_after(10):
        while len(kernel.stored) < count or len(made._buffers) < BUFFERS:  # noqa: ASYNC110 - a thread is waited for
            await trio.sleep(0.001)
    return kernel.stored


async def test_the_window_grows_with_each_request_nearby(made: ReadAround, kernel: Kernel) -> None:
    ask(made, 0, 40 * KIB)
    assert not made._wishes
    ask(made, 100 * KIB, 150 * KIB, 300 * KIB)
    first, second, third = WINDOWS
    assert await settled(made, kernel, 2) == [(7, 64 * KIB, first), (7, 0, second)]
    ask(made, 260 * KIB)
    assert await settled(made, kernel, 3) == [(7, 64 * KIB, first), (7, 0, second), (7, 0, third)]


async def test_a_part_of_an_image_is_read_where_it_is(
    made: ReadAround, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets are those of the file; windows end where it does, and aren't what is behind it in the image."""
    read: list[tuple[int, int]] = []
    kernel.start = AREA + 512
    picture = Picture()

    def read_nowait(offset: int, length: int, scratch: memoryview) -> memoryview | None:
        read.append((offset, length))
        return Picture().read_nowait(offset, length, scratch)

    monkeypatch.setattr(picture, "read_nowait", read_nowait)
    for offset in (0, 40 * KIB, 80 * KIB, 20 * KIB):
        made.missed(7, cast("Image", picture), offset, 4096, start=AREA + 512, size=100 * KIB)
        while made.step():
            pass
    assert await settled(made, kernel, 2) == [(7, 64 * KIB, 36 * KIB), (7, 0, 100 * KIB)]
    assert read == [(AREA + 512 + 64 * KIB, 36 * KIB), (AREA + 512, 100 * KIB)]


async def test_near_is_what_is_in_the_next_piece_in_either_direction(made: ReadAround, kernel: Kernel) -> None:
    ask(made, 3 * AREA, 3 * AREA - 4096, 3 * AREA - NEAR - 4096)
    assert await settled(made, kernel, 1) == [(7, 3 * AREA - 2 * WINDOWS[0], WINDOWS[0])]
    ask(made, AREA, AREA + 2 * NEAR, AREA + 4 * NEAR, AREA + 6 * NEAR, inode=8)
    for inode in range(9, 13):
        ask(made, 4 * AREA, inode=inode)
    await settled(made, kernel, 1)
    assert len(kernel.stored) == 1, "neither what is farther off nor another image's"


async def test_near_is_what_was_asked_for_lately(made: ReadAround, kernel: Kernel) -> None:
    for _ in range(4):
        ask(made, 0)
        for inode in range(20, 20 + RECENT):
            ask(made, 0, inode=inode)
    await settled(made, kernel, 0)
    assert kernel.stored == []


async def test_a_request_for_what_is_on_its_way_changes_nothing(made: ReadAround, kernel: Kernel) -> None:
    ask(made, 0, 4096, 8192, 12288, 60 * KIB)
    assert await settled(made, kernel, 1) == [(7, 0, WINDOWS[0])]


async def test_requests_far_from_each_other_are_left_alone(made: ReadAround, kernel: Kernel) -> None:
    ask(made, *range(0, SIZE, AREA))
    ask(made, *range(0, SIZE, AREA), inode=8)
    await settled(made, kernel, 0)
    assert kernel.stored == []


async def test_long_requests_are_left_to_the_kernels_readahead(made: ReadAround, kernel: Kernel) -> None:
    ask(made, *range(0, AREA, 128 * KIB), length=128 * KIB)
    await settled(made, kernel, 0)
    assert kernel.stored == []


async def test_nothing_is_stored_behind_the_end(made: ReadAround, kernel: Kernel) -> None:
    """The kernel would make the file longer."""
    ask(made, 5 * AREA, 5 * AREA, 5 * AREA)
    assert await settled(made, kernel, 1) == [(7, 5 * AREA, 4096)]


async def test_what_left_the_cache_soon_was_stored_in_vain(
    made: ReadAround, kernel: Kernel, clock: list[float]
) -> None:
    wanted = 2
    ask(made, 0)
    for number in range(1, 7):
        for _ in range(wanted):
            assert len(await settled(made, kernel, number - 1)) == number - 1
            ask(made, 0)
        await settled(made, kernel, number)
        clock[0] += 1
        wanted = min(2 * wanted, WANTED_MAX)
    clock[0] += 60
    ask(made, 0, 0)
    assert len(await settled(made, kernel, 7)) == 7, "later it is as if it were new"


async def test_who_asked_before_it_was_stored_is_no_sign(made: ReadAround, kernel: Kernel, clock: list[float]) -> None:
    ask(made, 0, 0, 0)
    await settled(made, kernel, 1)
    clock[0] += 0.05
    ask(made, 0, 4096, 8192)
    ask(made, 64 * KIB)
    assert await settled(made, kernel, 2) == [(7, 0, WINDOWS[0]), (7, 0, WINDOWS[1])]


async def test_what_waits_is_bounded(made: ReadAround, kernel: Kernel) -> None:
    kernel.gate.clear()
    for inode in range(1, 100):
        ask(made, 0, 0, 0, inode=inode)
    assert len(made._wishes) == WISHES_MAX
    assert not made._buffers
    kernel.gate.set()
    while len(kernel.stored) < BUFFERS + WISHES_MAX:
        made.step()
        await trio.lowlevel.checkpoint()
    assert [inode for inode, _, _ in kernel.stored] == list(range(1, BUFFERS + WISHES_MAX + 1))


async def test_what_is_remembered_is_bounded(made: ReadAround, kernel: Kernel) -> None:
    kernel.error = FileNotFoundError()
    for inode in range(AREAS_MAX + 10):
        ask(made, 0, 0, inode=inode)
    assert len(made._areas) == AREAS_MAX
    assert len(made._recent) == RECENT


async def test_what_is_not_in_memory_is_read_by_a_task(made: ReadAround, kernel: Kernel) -> None:
    picture = Picture()
    picture.in_memory = False
    ask(made, 0, 0, 0, picture=picture)
    assert await settled(made, kernel, 1) == [(7, 0, WINDOWS[0])]


async def test_what_finds_no_place_among_what_is_read_slowly_may_be_wished_for_again(
    made: ReadAround, kernel: Kernel
) -> None:
    picture = Picture()
    picture.in_memory = False
    for inode in range(WISHES_MAX + 1):
        ask(made, 0, 0, 0, inode=inode, picture=picture)
    assert len(made._slow) == WISHES_MAX
    await settled(made, kernel, WISHES_MAX)
    ask(made, 0, inode=WISHES_MAX, picture=picture)
    assert WISHES_MAX in {inode for inode, _, _ in await settled(made, kernel, WISHES_MAX + 1)}


@pytest.mark.parametrize("in_memory", [True, False])
async def test_damage_is_not_stored_and_ends_nothing(made: ReadAround, kernel: Kernel, *, in_memory: bool) -> None:
    picture = Picture()
    picture.in_memory, picture.damaged = in_memory, True
    ask(made, 0, 0, 0, picture=picture)
    await trio.testing.wait_all_tasks_blocked()
    ask(made, AREA, AREA, AREA)
    assert await settled(made, kernel, 1) == [(7, AREA, WINDOWS[0])]


async def test_an_inode_that_the_kernel_has_forgotten_ends_nothing(made: ReadAround, kernel: Kernel) -> None:
    kernel.error = FileNotFoundError()
    ask(made, 0, 0, 0)
    await settled(made, kernel, 0)
    kernel.error = None
    ask(made, AREA, AREA, AREA)
    assert await settled(made, kernel, 1) == [(7, AREA, WINDOWS[0])]


async def test_once_closed_nothing_is_under_way(made: ReadAround, kernel: Kernel) -> None:
    kernel.gate.clear()
    ask(made, 0, 0, 0)
    closed = trio.Event()

    async def close() -> None:
        await made.close()
        closed.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        await trio.testing.wait_all_tasks_blocked()
        assert not closed.is_set(), "it waits for what is being stored"
        kernel.gate.set()
    ask(made, AREA, AREA, AREA)
    await made.close()
    assert kernel.stored == [(7, 0, WINDOWS[0])]
