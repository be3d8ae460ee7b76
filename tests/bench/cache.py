"""What of files is in the page cache: brought there, or taken out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.bench.system import wait_until
from tests.mount.harness import cached_bytes, opened

COLD_BYTES: Final = 256 << 10
"""As much of a file may be in the page cache when it counts as cold."""

_CHUNK: Final = 8 << 20


def settle(paths: Iterable[Path]) -> None:
    """Have files on disk and, as far as memory goes, in the page cache."""
    buffer = bytearray(_CHUNK)
    for path in paths:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            end = 0
            while (begin := _next_data(file.fileno(), end)) is not None:
                end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
                for at in range(begin, end, _CHUNK):
                    os.preadv(file.fileno(), [memoryview(buffer)[: end - at]], at)


def _next_data(file: int, at: int) -> int | None:
    try:
        return os.lseek(file, at, os.SEEK_DATA)
    except OSError:  # nothing but a hole behind it
        return None


def drop(path: Path) -> None:
    """Have nothing of a file in the page cache, or next to nothing, and make sure of it; nobody may have it open."""

    def is_cold() -> bool:
        with opened(path, os.O_RDONLY) as file:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return cached_bytes(path) <= COLD_BYTES

    wait_until(is_cold, f"the page cache to have nothing of {path}")


def require_cold(path: Path) -> None:
    """Error unless next to nothing of a file is in the page cache."""
    if (cached := cached_bytes(path)) > COLD_BYTES:
        sys.exit(f"bench: {cached} bytes of {path} are in the page cache before they were read")
