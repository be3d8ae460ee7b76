"""Several files made durable at once, without threads: by the kernel's asynchronous I/O, io_submit(2).

A commit is three files, on one file system most often, which then makes one transaction of them; and a thread that
calls fdatasync for them takes as long to be woken, and to wake the loop, as that takes.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Self

import trio

from dmafs.core.storage import File, RealFile
from dmafs.service.turns import Turns

log = logging.getLogger(__name__)

EVENTS: Final = 32
"""So many files at once at the most; a journal that many segments were added to at once has more."""

_CALLS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""The numbers of io_setup, io_destroy, io_getevents, io_submit: the C library has no functions for them."""
_IOCB: Final = struct.Struct("<QIIHhiQQqQII")
_IO_EVENT: Final = struct.Struct("<QQqq")
_FDSYNC: Final = 3  # IOCB_CMD_FDSYNC
_RESFD: Final = 1  # IOCB_FLAG_RESFD: the eventfd is told

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Datasyncs:
    """A context of the kernel's. Made by ``open``."""

    def __init__(self, calls: tuple[int, int, int, int]) -> None:
        """Make it by the system calls of these numbers; OSError if the kernel has none, or none left."""
        self._setup, self._destroy, self._getevents, self._submit = calls
        self._context = ctypes.c_ulong(0)
        _call(self._setup, EVENTS, ctypes.byref(self._context))
        self._told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events = ctypes.create_string_buffer(EVENTS * _IO_EVENT.size)
        self._turns = Turns()

    @classmethod
    def open(cls) -> Self | None:
        """Return one, or None where there is no such thing: threads do as well."""
        calls = _CALLS.get(platform.machine())
        try:
            return cls(calls) if calls else None
        except OSError as error:
            log.info("no asynchronous fdatasync: %s", error)
            return None

    async def __call__(self, files: Sequence[File]) -> Sequence[File]:
        """Make files durable; return those that the kernel doesn't take this way. Not to be cancelled.

        OSError with the file's name for the first one that failed; all others are done then, too.
        """
        if len(files) > EVENTS or not all(isinstance(file, RealFile) for file in files):
            return files
        async with self._turns:
            begun = self._begin([file.fileno() for file in files if isinstance(file, RealFile)])
            left = begun
            while left:
                await trio.lowlevel.wait_readable(self._told)
                with suppress(BlockingIOError):
                    left -= os.eventfd_read(self._told)
            results = self._results(begun)
        for number in sorted(results):
            if results[number] < 0:
                raise OSError(-results[number], os.strerror(-results[number]), files[number].name)
        return files[begun:]

    def _begin(self, descriptors: list[int]) -> int:
        """Hand over fdatasyncs; return how many the kernel has taken."""
        blocks = [
            ctypes.create_string_buffer(
                _IOCB.pack(number, 0, 0, _FDSYNC, 0, descriptor, 0, 0, 0, 0, _RESFD, self._told), _IOCB.size
            )
            for number, descriptor in enumerate(descriptors)
        ]
        pointers = (ctypes.c_void_p * len(blocks))(*map(ctypes.addressof, blocks))
        try:
            return _call(self._submit, self._context, ctypes.c_long(len(blocks)), pointers)
        except OSError as error:
            if error.errno in {errno.EINVAL, errno.EAGAIN}:  # a kernel before 4.18, or one that has no more
                return 0
            raise

    def _results(self, count: int) -> dict[int, int]:
        """Return what has become of so many fdatasyncs, all of which are done: 0, or -errno."""
        found: dict[int, int] = {}
        while len(found) < count:
            least = ctypes.c_long(count - len(found))
            got = _call(self._getevents, self._context, least, ctypes.c_long(EVENTS), self._events, None)
            for at in range(got):
                number, _, result, _ = _IO_EVENT.unpack_from(self._events, at * _IO_EVENT.size)
                found[number] = result
        return found

    def close(self) -> None:
        """Give it back."""
        _call(self._destroy, self._context)
        os.close(self._told)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
