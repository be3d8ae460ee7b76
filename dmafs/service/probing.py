"""What is on an image: file systems and partitions, as libblkid finds them, and whether a journal wants a replay."""

from __future__ import annotations

import os
import struct
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from dmafs.core.partitions import Partition, find_partitions
from dmafs.errors import InputError, MountError
from dmafs.units import format_bytes

_SUPERBLOCK: Final = 1024  # of ext2, ext3 and ext4, and where fields are in it
_MAGIC: Final = (0x38, 0xEF53)
_INCOMPATIBLE: Final = 0x60
_NEEDS_RECOVERY: Final = 4
_AMBIVALENT: Final = 8
_NOTHING: Final = 2


@dataclass(frozen=True)
class Content:
    """What a range of an image holds: the type and UUID of a file system or of something else, or nothing."""

    offset: int
    length: int
    type: str = ""
    usage: str = ""
    uuid: str = ""


def find(image: Path, size: int, number: int | None) -> tuple[Content, int | None]:
    """Return the file system on an image and its partition's number, None if it is on all of the image.

    *number* None takes the only partition. InputError if there is no such one, or several and none is named;
    MountError if what is there is no file system.
    """
    whole = probe(image, 0, size)
    if whole.type and number is None:
        return _mountable(whole, "the image"), None
    parts = partitions(image, size)
    if not parts:
        if number is not None:
            raise InputError(f"the image has no partition {number}: it has none", hint="leave --partition out")
        raise MountError("nothing that is known is on the image", hint="look at it: losetup -r, blkid -p, fdisk -l")
    chosen = [part for part in parts if number in {None, part.number}]
    if len(chosen) != 1:
        listed = "; ".join(_described(image, part) for part in parts)
        what = "several partitions" if number is None else f"no partition {number}"
        raise InputError(f"the image has {what}: {listed}", hint="choose one with --partition N")
    [part] = chosen
    content = probe(image, part.start, part.length)
    return _mountable(content, f"partition {part.number}"), part.number


def _mountable(content: Content, where: str) -> Content:
    if content.usage == "filesystem":
        return content
    if not content.type:
        raise MountError(f"nothing that is known is on {where}", hint="look at it: losetup -r, blkid -p")
    raise MountError(
        f"what is on {where} is no file system but {content.type}",
        hint="make a clone of the moment (dmafs clone) and a loop device over it, and use the tools for that",
    )


def _described(image: Path, part: Partition) -> str:
    kind = probe(image, part.start, part.length).type or "unknown"
    return f"{part.number} ({kind}, {format_bytes(part.length)})"


def probe(image: Path, offset: int, length: int) -> Content:
    """Return what is on a range of an image."""
    area = ["--offset", str(offset), "--size", str(length)]
    done = run("blkid", "-p", "-o", "export", *area, str(image))
    if done.returncode == _AMBIVALENT:
        raise MountError(
            f"signatures of several file systems are on {image} at {offset}", hint="mount it by hand: mount -t TYPE"
        )
    if done.returncode not in {0, _NOTHING}:
        raise MountError(f"{image} can't be looked at: {done.stderr.strip()}", hint="look at the daemon's log")
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return Content(offset, length, found.get("TYPE", ""), found.get("USAGE", ""), found.get("UUID", ""))


def partitions(image: Path, size: int) -> list[Partition]:
    """Return the partitions on an image of *size* bytes, but for those that only hold others."""
    return find_partitions(partial(_read, image), size)


def needs_recovery(image: Path, offset: int) -> bool:
    """Say whether the journal of an ext2, ext3 or ext4 file system wants a replay."""
    block = _read(image, offset + _SUPERBLOCK, 1024)
    place, magic = _MAGIC
    if struct.unpack_from("<H", block, place)[0] != magic:
        raise MountError(
            f"{image} has no superblock of ext4 at {offset + _SUPERBLOCK}", hint="look at it with dumpe2fs"
        )
    return bool(struct.unpack_from("<I", block, _INCOMPATIBLE)[0] & _NEEDS_RECOVERY)


def _read(image: Path, offset: int, length: int) -> bytes:
    try:
        with image.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise MountError(
            f"{image} can't be looked at: {(error.strerror or '').lower()}", hint="look at the daemon's log"
        ) from error


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of util-linux, which speaks English then; MountError if it is missing."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    except FileNotFoundError as error:
        raise MountError(f"{command[0]} is missing", hint="install the packages mount and util-linux") from error
