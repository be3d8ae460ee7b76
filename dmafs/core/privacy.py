"""Whom a store listens to: what others can write to isn't taken as what an administrator has said, or as history.

The configuration names programs that the daemon runs, and the journals are what an image is made of. So whoever can
write there can do as the daemon does. Reading is kept from others by the modes that everything is made with.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dmafs.errors import UnsafeError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def require_private(path: Path) -> None:
    """Raise UnsafeError if somebody else than root and this process's user can write to what *path* leads to."""
    info = path.stat()
    if info.st_uid not in {0, os.geteuid()}:
        raise UnsafeError(
            f"{path} belongs to user {info.st_uid}, who could change it",
            hint=f"if nobody else has: chown {os.geteuid()} {path}; or work on it as that user",
        )
    if info.st_mode & _OTHERS:
        raise UnsafeError(
            f"{path} can be written by others: mode {stat.S_IMODE(info.st_mode):04o}",
            hint=f"if nobody else has: chmod go-w {path}",
        )


def require_private_volume(path: Path) -> None:
    """Likewise, of a volume's directory and what is in it; what its subdirectories have is guarded by them."""
    require_private(path)
    for entry in sorted(path.iterdir()):
        if not entry.is_symlink():  # which is never followed
            require_private(entry)
