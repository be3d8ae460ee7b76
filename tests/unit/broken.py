"""Small stores as a daemon leaves them, and all that can be seen of them from outside."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dmafs.core.ondisk import Flag
from dmafs.core.store import Store, create_volume
from dmafs.core.sync import sync
from dmafs.core.volume import Volume
from dmafs.core.work import run
from tests.unit.tools import TINY, Ticking, copy_all, fill

SECTORS = 40


def everything(path: Path) -> dict[str, tuple[int, ...] | bytes]:
    """Return all that can be seen below a directory and of itself: what stat says but for access, and the content."""
    found: dict[str, tuple[int, ...] | bytes] = {}
    for entry in [path, *sorted(path.rglob("*"))]:
        info = entry.lstat()
        found[f"{entry} stat"] = (
            info.st_mode, info.st_ino, info.st_nlink, info.st_uid, info.st_size, info.st_blocks, info.st_mtime_ns,
            info.st_ctime_ns,
        )  # fmt: skip
        if entry.is_symlink():
            found[str(entry)] = os.fsencode(entry.readlink())
        elif entry.is_file():
            found[str(entry)] = entry.read_bytes()
    return found


def write(volume: Volume, start: int, value: int) -> None:
    """Capture a write, as the volume's tap does."""
    if volume.info.tap == "fuse":
        volume.write(start, fill(value))
        return
    window = volume.begin_window()
    window.write([(start, 1, fill(value)), (start + 1, 1, fill(value))])
    window.close(Flag.FLUSH, position=4096 * value, retained=0)
    volume.publish(window)


def live(volume: Volume) -> None:
    """Give a volume snapshots that hold something, two of them at one seq, a clone, and a journal of many segments."""
    for value in range(1, 4):
        run(volume.take_snapshot(name=f"s{value}"))
        for start in range(4):
            write(volume, 3 * start, 10 * value + start)
        run(volume.flush())
        run(sync(volume, open_snapshot=False))
    run(volume.take_snapshot(name="pinned"))
    run(volume.pin(volume.snapshots.find("pinned") or next(iter(volume.snapshots))))
    for start in range(20):
        write(volume, start, 100 + start)
        if start % 5 == 4:
            run(volume.flush())
    run(volume.take_snapshot(name="ahead"))
    write(volume, 30, 7)
    run(volume.flush())
    clone = run(volume.clones.create(volume.image(volume.journal.head), "scratch"))
    run(clone.write(5000, b"written to the clone"))
    run(clone.flush())


def closed(volume: Volume) -> None:
    """Leave a volume in order."""
    live(volume)
    run(volume.flush())
    volume.mark_clean()


def killed(volume: Volume) -> None:
    """Leave behind a volume that had writes which nobody flushed."""
    live(volume)
    for start in range(9):
        write(volume, start, 50 + start)


def half_synced(volume: Volume) -> None:
    """Leave a volume right after a sync was committed."""
    live(volume)
    work = sync(volume, open_snapshot=False)
    call = next(work)
    while not volume.pointers.now.sync_target:
        call = work.send(call())


ENDS: dict[str, Callable[[Volume], None]] = {"closed": closed, "killed": killed, "half synced": half_synced}


def make_store(path: Path, *, tap: str = "fuse", end: str = "closed") -> Path:
    """Make a store with the volumes one and two, left in that way, below *path*; return its directory."""
    store = path / "store"
    for value, name in enumerate(("one", "two"), 1):
        source = path / f"{name}.raw"
        source.write_bytes(fill(value, SECTORS))
        create_volume(store, name, source=source, tap=tap, clock=lambda: 1000)
    opened = Store(store, limits=TINY, clock=Ticking())
    try:
        for name, volume in opened.volumes.items():
            copy_all(volume, path / f"{name}.raw")
            ENDS[end](volume)
    finally:
        opened.close()
    return store
