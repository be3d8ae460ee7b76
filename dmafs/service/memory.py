"""What the daemon's memory allocator is told before there are threads.

glibc gives each thread that allocates an arena of its own, and what is freed in one isn't used by another. Here one
thread does nearly everything, and the others make layers and read descriptors now and then: large arrays, whichever
thread's turn it is. Each arena would come to be as large as the largest of these.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8  # malloc.h

_libc: Final = ctypes.CDLL(None)


def share_arena() -> bool:
    """Have all threads that are yet to be started allocate from one arena; False where the C library has none."""
    mallopt = getattr(_libc, "mallopt", None)
    return mallopt is not None and mallopt(_M_ARENA_MAX, 1) == 1
