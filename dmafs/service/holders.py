"""Who keeps a mount busy: processes, mounts on top of it, loop devices over its files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dmafs.core.mounts import mounts

_PROC: Final = Path("/proc")
_BLOCK: Final = Path("/sys/block")
SHOWN_MAX: Final = 8


def holders(point: Path) -> list[str]:
    """Return who keeps what is mounted at *point* busy, as text. Only names are read: nothing there is touched."""
    found = [f"mount {mount.point}" for mount in mounts() if Path(mount.point) != point and _below(mount.point, point)]
    for backing in _BLOCK.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if _below(os.fsdecode(backing.read_bytes()).removesuffix("\n"), point):
                found.append(f"loop device {backing.parts[-3]}")
    for process in sorted(_PROC.glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):  # it may be gone meanwhile
            if any(_below(name, point) for name in _used(process)):
                found.append(f"process {process.name} ({(process / 'comm').read_text(errors='replace').strip()})")
    return found


def _used(process: Path) -> Iterator[str]:
    """Yield the names of what a process uses."""
    for link in ("cwd", "root", "exe"):
        with contextlib.suppress(OSError):
            yield os.readlink(process / link)  # noqa: PTH115 - text, not a path
    with contextlib.suppress(OSError):
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield os.readlink(entry)  # noqa: PTH115 - likewise
    with contextlib.suppress(OSError):
        for line in (process / "maps").read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            yield from fields[5:]


def _below(name: str, point: Path) -> bool:
    return name == str(point) or name.startswith(f"{point}/")
