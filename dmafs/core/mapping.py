"""Files mapped into memory for reading. Unlike ``mmap.mmap`` a mapping here keeps no descriptor open."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED: Final = ctypes.c_void_p(-1).value


def mapped(fd: int, size: int, name: str) -> memoryview:
    """Map the first *size* bytes of a file, which it has; they are unmapped when the last view of them is gone.

    The view is read-only. OSError if the file can't be mapped.
    """
    if not size:
        return memoryview(b"")
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number or errno.ENOMEM, os.strerror(number or errno.ENOMEM), name)
    array = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(array, _libc.munmap, address, size).atexit = False
    return memoryview(array).cast("B").toreadonly()
