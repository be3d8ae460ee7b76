"""A program: writes single sectors through the engine of a volume, as the daemon does, and prints its memory.

``python tiny_writes.py FOLDER SECTORS COUNT...``: random sectors of a volume of SECTORS are written, and flushed every
ten thousand writes; at each COUNT of writes a line ``events RssAnon RssFile`` is printed, the most that these have been
since the last line, in KiB. It has a process of its own, so that its memory is what the engine needs. The configuration
is the default one.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import trio

from dmafs.core.storage import boot_id, open_source
from dmafs.core.store import create_volume, open_volume
from dmafs.service.configuration import Configuration
from dmafs.service.memory import share_arena
from dmafs.service.passing import PassThroughEngine
from dmafs.taps.passthrough import PassThroughTap
from dmafs.units import SECTOR

FLUSH_EVERY = 10_000


def resident_kib() -> tuple[int, int]:
    """Return the resident memory of this process: ``RssAnon``, its own, and ``RssFile``, what it has mapped."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    values = {words[0]: int(words[1]) for words in lines if words[0].startswith("Rss")}
    return values["RssAnon:"], values["RssFile:"]


async def write(folder: Path, sectors: int, counts: list[int]) -> None:
    """See the module."""
    source = folder / "primary"
    with source.open("wb") as file:
        file.truncate(sectors * SECTOR)
    create_volume(folder / "store", "disk", source=source, tap="fuse")
    volume = open_volume(folder / "store" / "disk", limits=Configuration().volume_limits())
    tap = PassThroughTap(volume, open_source(source, writable=True))
    engine = PassThroughEngine(volume, tap, tick_s=Configuration().tick_s, limiter=trio.CapacityLimiter(8))
    rng = random.Random(1)
    peak = (0, 0)
    async with trio.open_nursery() as nursery:
        await engine.recover(boot_id())
        await nursery.start(engine.run)
        while not volume.pointers.now.copied:  # noqa: ASYNC110 - what is waited for has no event
            await trio.sleep(0.01)
        for number in range(1, counts[-1] + 1):
            await engine.write_tap(rng.randrange(sectors) * SECTOR, number.to_bytes(8, "little") * (SECTOR // 8))
            if number % FLUSH_EVERY == 0:
                await engine.flush()
                own, mapped = resident_kib()
                peak = max(own, peak[0]), max(mapped, peak[1])
            if number in counts:
                print(number, *peak, flush=True)
                peak = (0, 0)
        nursery.cancel_scope.cancel()
    await engine.close()


if __name__ == "__main__":
    share_arena()
    trio.run(write, Path(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3:]])
