"""What the allocator is told holds in a process of its own, since it can't be taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, threading
from dmafs.service.memory import share_arena
assert not {shared} or share_arena()
libc = ctypes.CDLL(None)
def allocate():
    for _ in range(100):
        libc.free(ctypes.c_void_p(malloc(10_000)))
malloc = libc.malloc
malloc.restype = ctypes.c_size_t
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_stats()
"""


@pytest.mark.parametrize("shared", [False, True])
def test_threads_share_one_arena(shared: bool) -> None:  # noqa: FBT001
    """Without it each thread that allocates has one."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(shared=shared)], capture_output=True, text=True, check=True, timeout=60
    )
    assert (done.stderr.count("Arena ") == 1) is shared, done.stderr
