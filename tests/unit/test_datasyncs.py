"""Files are made durable by the kernel's asynchronous I/O where that is possible; what isn't taken is told."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from dmafs.core.ondisk import Flag
from dmafs.core.storage import File, RealFile, RealStorage
from dmafs.errors import StoreError
from dmafs.service import datasyncs as module
from dmafs.service.datasyncs import EVENTS, Datasyncs
from tests.crash.disk import SimulatedDisk, SimulatedStorage
from tests.unit.test_engine import BOOT, make_engine, sector


@pytest.fixture
def datasyncs() -> Iterator[Datasyncs]:
    opened = Datasyncs.open()
    assert opened is not None
    yield opened
    opened.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[RealFile]]:
    storage = RealStorage(tmp_path)
    made = [storage.create(str(number)) for number in range(3)]
    for file in made:
        file.write([b"x" * 4096], 0)
    yield made
    for file in made:
        file.close()


async def test_all_are_taken(datasyncs: Datasyncs, files: list[RealFile]) -> None:
    """Nothing is left to do, as often as it is asked for."""
    for _ in range(3 * EVENTS):
        assert not await datasyncs(files)
    assert not await datasyncs([])


async def test_many_ask_at_once(datasyncs: Datasyncs, files: list[RealFile]) -> None:
    """Each gets the answer to what it has asked."""
    left = 0

    async def ask(count: int) -> None:
        nonlocal left
        assert not await datasyncs(files[:count])
        left -= 1

    async with trio.open_nursery() as nursery:
        for number in range(50):
            left += 1
            nursery.start_soon(ask, number % 4)
    assert left == 0


async def test_what_the_kernel_refuses_is_left(datasyncs: Datasyncs, files: list[RealFile]) -> None:
    """A pipe can't be synced: it and what stands behind it are the caller's."""
    reader, writer = os.pipe()
    pipe = RealFile(writer, "pipe")
    try:
        assert await datasyncs([files[0], pipe, files[1]]) == [pipe, files[1]]
        assert await datasyncs([pipe, files[1]]) == [pipe, files[1]]
    finally:
        pipe.close()
        os.close(reader)


async def test_what_is_no_file_of_the_kernels_is_left(datasyncs: Datasyncs, files: list[RealFile]) -> None:
    """Nothing is begun then, nor when there are too many."""
    mixed: list[File] = [*files, SimulatedStorage(SimulatedDisk()).create("a")]
    assert await datasyncs(mixed) == mixed
    many = files * EVENTS
    assert await datasyncs(many) == many


async def test_a_file_that_is_closed_is_an_error(datasyncs: Datasyncs, files: list[RealFile]) -> None:
    """Not something to be tried otherwise."""
    files[0].close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await datasyncs(files)


async def test_the_first_failure_is_told(
    datasyncs: Datasyncs, files: list[RealFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the name of the file, once all are done; and the next ones go on."""
    plain = datasyncs._results

    def failing(count: int) -> dict[int, int]:
        return {**plain(count), 2: -errno.ENOSPC, 1: -errno.EIO}

    with monkeypatch.context() as patch:
        patch.setattr(datasyncs, "_results", failing)
        with pytest.raises(OSError, match="Input/output error") as caught:
            await datasyncs(files)
    assert caught.value.filename == files[1].name
    assert not await datasyncs(files)


def test_without_such_calls_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other machines, or where the kernel has no more."""
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "vax")
        assert Datasyncs.open() is None

    def refuse(number: int, *_arguments: object) -> int:
        raise OSError(errno.EAGAIN, f"no call {number}")

    monkeypatch.setattr(module, "_call", refuse)
    assert Datasyncs.open() is None


@pytest.mark.parametrize("taken", [0, 1, 3])
async def test_an_engine_makes_the_rest_durable_in_a_thread(
    tmp_path: Path, datasyncs: Datasyncs, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """All of journal and primary is durable after a flush, however much the kernel takes."""
    engine = make_engine(tmp_path)
    engine.datasyncs = datasyncs
    await engine.recover(BOOT)
    begin, plain = datasyncs._begin, RealFile.datasync
    asked: list[int] = []
    others: list[str] = []

    def some(descriptors: list[int]) -> int:
        asked.append(len(descriptors))
        return begin(descriptors[:taken]) if taken else 0

    def datasync(file: RealFile) -> None:
        others.append(file.name)
        plain(file)

    with monkeypatch.context() as patch:
        patch.setattr(datasyncs, "_begin", some)
        patch.setattr(RealFile, "datasync", datasync)
        engine.through.write(0, sector("x"))
        await engine.flush()
    names = [*(file.name for file in engine.volume.journal.parts[-1].segment.files), engine.tap.primary.name]  # type: ignore[union-attr]
    assert asked == [3]
    assert others == names[taken:]
    assert engine.volume.journal.durable == engine.volume.journal.head == 1
    await engine.close()


async def test_a_failed_datasync_ends_all_writing(
    tmp_path: Path, datasyncs: Datasyncs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with threads: read-only, and nothing counts as durable."""
    engine = make_engine(tmp_path)
    engine.datasyncs = datasyncs
    await engine.recover(BOOT)
    engine.through.write(0, sector("x"))
    plain = datasyncs._results
    with monkeypatch.context() as patch:
        patch.setattr(datasyncs, "_results", lambda count: {**plain(count), 1: -errno.EIO})
        with pytest.raises(StoreError, match="input/output error"):
            await engine.flush()
    assert engine.volume.journal.durable == 0
    with pytest.raises(StoreError, match="read-only"):
        await engine.flush(Flag.TICK)
    engine.volume.close()
    engine.tap.close()
