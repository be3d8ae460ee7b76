"""What the daemon keeps of root's rights, and why; everything else is dropped before it serves anything.

1. ``NEEDS`` is the whole list. A right that only some taps or hooks need is kept only where there are such.
2. What is dropped is gone for good: it isn't in the bounding set either, so nothing that the daemon starts has it.
3. A daemon that root runs starts nothing that would gain rights (no_new_privs). Any other needs fusermount3, which is
   setuid root, to mount and unmount; it has no capabilities to begin with.
4. These are rights of threads, which new threads inherit: so it is done while there is only one, before trio runs.

It doesn't make the daemon harmless: CAP_SYS_ADMIN is most of root. What is gone is, say, loading modules, opening raw
sockets, changing the clock, tracing processes, and setting an owner or a setuid bit on a file.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Collection
from typing import Final, NamedTuple


class Need(NamedTuple):
    """A capability that is kept."""

    name: str
    number: int
    """As in linux/capability.h."""
    when: str
    """``always``, the name of a tap, or ``hooks``: if any are configured."""
    reason: str


ALWAYS: Final = "always"
HOOKS: Final = "hooks"
NEEDS: Final = (
    Need("CAP_DAC_OVERRIDE", 1, ALWAYS, "open sources, logs and mount points that aren't root's"),
    Need("CAP_KILL", 5, HOOKS, "end a hook that has become another user and takes too long"),
    Need("CAP_SETGID", 6, HOOKS, "let hooks become another user: runuser, su"),
    Need("CAP_SETUID", 7, HOOKS, "likewise"),
    Need("CAP_SYS_ADMIN", 21, ALWAYS, "mount and unmount the tree; loop devices, device-mapper; fsfreeze in hooks"),
    Need("CAP_MKNOD", 27, "dm", "make the nodes of mapped devices where there is no udev"),
    Need("CAP_SYSLOG", 34, "dm", "read of failed writes in the kernel's log, where dmesg is restricted"),
)

_CAPBSET_READ, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL = 23, 24, 38, 47, 4
_VERSION_3: Final = 0x20080522
_HEADER: Final = struct.pack("<Ii", _VERSION_3, 0)  # 0: this thread
_SETS: Final = struct.Struct("<6I")  # effective, permitted, inheritable: the lower halves, then the upper ones

_libc: Final = ctypes.CDLL(None, use_errno=True)


def needed(taps: Collection[str], *, hooks: bool) -> int:
    """Return the mask of the capabilities that volumes with these *taps* need."""
    given = {ALWAYS, *taps, *([HOOKS] if hooks else [])}
    return sum(1 << need.number for need in NEEDS if need.when in given)


def drop_privileges(keep: int) -> None:
    """Give up all capabilities that aren't in the mask *keep*; those that it hasn't it doesn't get."""
    _drop_from_bounding_set(keep)
    _prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL)
    if os.geteuid() == 0:
        _prctl(_SET_NO_NEW_PRIVS, 1)
    sets = ctypes.create_string_buffer(_SETS.size)
    _checked(_libc.capget(_HEADER, sets))
    _, low, _, _, high, _ = _SETS.unpack(sets.raw)
    kept = (high << 32 | low) & keep
    low, high = kept & 0xFFFFFFFF, kept >> 32
    _checked(_libc.capset(_HEADER, _SETS.pack(low, low, 0, high, high, 0)))


def _drop_from_bounding_set(keep: int) -> None:
    number = 0
    while (present := _libc.prctl(_CAPBSET_READ, number, 0, 0, 0)) >= 0:  # -1 behind the last that the kernel knows
        if present and not keep >> number & 1:
            try:
                _prctl(_CAPBSET_DROP, number)
            except PermissionError:  # without CAP_SETPCAP whoever has started us decides
                return
        number += 1


def _prctl(option: int, argument: int) -> None:
    _checked(_libc.prctl(option, argument, 0, 0, 0))


def _checked(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
