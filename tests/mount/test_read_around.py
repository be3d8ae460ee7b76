"""Read-around in the kernel's page cache: what is stored unasked is right, and the daemon ends in order meanwhile."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.mount.harness import MIB, Rig, assert_same, cached_bytes, forget, opened, pwrite, wait_until

pytestmark = pytest.mark.mount

SIZE = 16 * MIB + 512 * 3
PAGE = 4096


def is_cached(path: Path, most: int) -> bool:
    return cached_bytes(path) > most


def read_here_and_there(path: Path, expected: bytes, random: Random, count: int) -> int:
    """Read pages in places, several in each MiB, and compare; return the bytes read."""
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(count):
            offset = random.randrange(len(expected) // PAGE) * PAGE
            assert os.pread(fd, PAGE, offset) == expected[offset : offset + PAGE], f"at byte {offset}"
    return count * PAGE


@pytest.fixture
def moments(rig: Rig) -> dict[str, bytes]:
    """Make a disk with a history: what is in each of its snapshots, and in between."""
    random = Random(5)
    content = bytearray(random.randbytes(SIZE))
    rig.create(size=SIZE, content=bytes(content))
    rig.start()
    found = {}
    for name in ("one", "two", "three"):
        found[name] = bytes(content)
        (rig.mnt / "snapshots" / name).mkdir()
        for _ in range(300):
            offset = random.randrange(SIZE // PAGE) * PAGE
            data = random.randbytes(random.choice([512, PAGE, 3 * PAGE]))[: SIZE - offset]
            pwrite(rig.tap(), data, offset)
            content[offset : offset + len(data)] = data
        if name != "three":
            rig.dmafs("sync", rig.store)
    rig.dmafs("mark", rig.store, "end")
    return {**found, "end": bytes(content)}


def test_what_is_stored_unasked_is_right(rig: Rig, moments: dict[str, bytes]) -> None:
    """After some small reads all of the image is in the page cache, and each byte is that moment's."""
    for name, expected in moments.items():
        path = rig.at(name)
        forget(path)
        read = read_here_and_there(path, expected, Random(6), 400)
        wait_until(partial(is_cached, path, 3 * read), "the rest to be stored")
        copy = rig.root / f"{name}.img"
        copy.write_bytes(expected)
        assert_same(path, copy)
        assert path.stat().st_size == SIZE


def test_an_image_that_is_read_once_in_each_place_is_left_alone(rig: Rig, moments: dict[str, bytes]) -> None:
    path = rig.at("two")
    forget(path)
    with opened(path, os.O_RDONLY) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, SIZE - PAGE, MIB):
            assert os.pread(fd, PAGE, offset) == moments["two"][offset : offset + PAGE]
    assert cached_bytes(path) == 16 * PAGE


def test_the_daemon_ends_while_images_are_read(rig: Rig, moments: dict[str, bytes]) -> None:
    """What waits for pages that are being read is over before the session is."""
    for round_number in range(3):
        over = threading.Event()

        def read(seed: int, over: threading.Event = over) -> None:
            random = Random(seed)
            while not over.is_set():
                for name, expected in moments.items():
                    path = rig.at(name)
                    try:
                        read_here_and_there(path, expected, random, 50)
                        with opened(path, os.O_RDONLY) as fd:
                            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    except OSError:
                        return

        readers = [threading.Thread(target=read, args=(100 * round_number + number,)) for number in range(4)]
        for reader in readers:
            reader.start()
        wait_until(lambda: sum(cached_bytes(rig.at(name)) for name in moments) > MIB, "reading to begin")
        rig.stop()
        over.set()
        for reader in readers:
            reader.join(60)
            assert not reader.is_alive()
        rig.start()
    assert not rig.trouble()
