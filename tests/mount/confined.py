"""Runs a command in the limits that a unit of ours sets, as far as they don't need systemd itself: UNIT COMMAND...

Capabilities, no_new_privs, the filter of system calls, no writable and executable memory, no other address families, no
namespaces, limits of resources, umask. Devices and memory are limited by control groups, which only systemd makes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

NUMBERS: Final = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
CAPABILITIES: Final = Path("/usr/include/linux/capability.h")
_CAPBSET_READ, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _SET_SECCOMP = 23, 24, 38, 22
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06  # BPF_LD|W|ABS, BPF_ALU|AND|K, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ARCH, _X86_64 = 4, 0xC000003E
_NAMESPACES: Final = {"unshare", "setns"}  # RestrictNamespaces=yes
_EXECUTABLE: Final = (
    ("mmap", mmap.PROT_WRITE | mmap.PROT_EXEC),
    ("mprotect", mmap.PROT_EXEC),
    ("pkey_mprotect", mmap.PROT_EXEC),
)
"""MemoryDenyWriteExecute=yes: no call has all of these bits."""
AF_UNIX: Final = 1

_libc: Final = ctypes.CDLL(None, use_errno=True)


def settings(unit: Path) -> list[tuple[str, str]]:
    """Return the keys and values of a unit."""
    return re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE)


def members(name: str) -> Iterator[str]:
    """Yield the system calls of a set of systemd's, or the one that is named."""
    if not name.startswith("@"):
        yield name
        return
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    for line in shown.stdout.splitlines()[1:]:
        if (word := line.strip()) and not word.startswith("#"):
            yield from members(word)


def allowed(values: list[str]) -> set[str]:
    """Return the names of the system calls that are left; systemd always lets those of @default."""
    names = set(members("@default"))
    for value in values:
        listed = {name for word in value.removeprefix("~").split() for name in members(word)}
        names = names - listed if value.startswith("~") else names | listed
    return names - _NAMESPACES


def filter_of(names: set[str]) -> bytes:
    """Return a filter program: EPERM for all but *names*, and as systemd does it for memory and other sockets."""
    numbers = dict(re.findall(r"#define __NR_(\w+) (\d+)", NUMBERS.read_text()))
    denied = _ERRNO | errno.EPERM
    program = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _X86_64), (_RETURN, 0, 0, denied), (_LOAD, 0, 0, 0)]
    program += [
        (_EQUAL, 0, 4, int(numbers["socket"])),
        (_LOAD, 0, 0, 16),  # its first argument
        (_EQUAL, 1, 0, AF_UNIX),
        (_RETURN, 0, 0, denied),
        (_RETURN, 0, 0, _ALLOW),
    ]
    for name, bits in _EXECUTABLE:
        program += [
            (_EQUAL, 0, 5, int(numbers[name])),
            (_LOAD, 0, 0, 32),  # its third argument
            (_AND, 0, 0, bits),
            (_EQUAL, 1, 0, bits),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, denied),
        ]
    for name in sorted(names & numbers.keys()):
        program += [(_EQUAL, 0, 1, int(numbers[name])), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, denied))
    return b"".join(struct.pack("<HBBI", *step) for step in program)


def confine(unit: Path) -> None:
    """Put this process into the limits."""
    found = settings(unit)
    values: dict[str, str] = dict(found)
    numbers = {name: int(number) for name, number in re.findall(r"#define (CAP_\w+)\s+(\d+)", CAPABILITIES.read_text())}
    keep = {numbers[name] for name in values["CapabilityBoundingSet"].split()}
    number = 0
    while (present := _libc.prctl(_CAPBSET_READ, number, 0, 0, 0)) >= 0:
        if present and number not in keep:
            _prctl(_CAPBSET_DROP, number)
        number += 1
    os.umask(int(values["UMask"], 8))
    core = int(values["LimitCORE"])
    resource.setrlimit(resource.RLIMIT_CORE, (core, core))
    assert [values[key] for key in ("NoNewPrivileges", "MemoryDenyWriteExecute", "RestrictNamespaces")] == ["yes"] * 3
    assert values["RestrictAddressFamilies"] == "AF_UNIX"
    program = filter_of(allowed([value for key, value in found if key == "SystemCallFilter"]))
    _prctl(_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(program)
    loaded = struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    if _libc.prctl(_SET_SECCOMP, 2, loaded, 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option} {argument}")


if __name__ == "__main__":
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - a list, without a shell
