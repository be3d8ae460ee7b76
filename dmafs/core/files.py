"""Small files that are written whole, and files that a change which failed has made."""

from __future__ import annotations

import contextlib
import errno
from typing import Final

from dmafs.core.storage import Storage
from dmafs.errors import ExistsError

INDEX: Final = ".idx"
"""Of a pair of files, beside ``.ext`` and ``.dat``; see ``index``."""


def write_whole(storage: Storage, name: str, content: bytes) -> None:
    """Create a small file durably and at once: a temporary name, datasync, rename, directory sync."""
    if storage.exists(name):
        raise ExistsError(f"file {name} already exists", hint="remove it if it isn't needed")
    replace_whole(storage, name, content)


def replace_whole(storage: Storage, name: str, content: bytes) -> None:
    """Write a small file likewise, in the place of another one if there is one."""
    directory = name.rpartition("/")[0]
    temporary = f"{name}.new"
    unlink_if_there(storage, temporary)
    file = storage.create(temporary)
    try:
        file.write([content], 0)
        file.datasync()
    finally:
        file.close()
    storage.rename(temporary, name)
    storage.sync_directory(directory)


def unlink_if_there(storage: Storage, name: str) -> None:
    """Unlink a file that may be missing."""
    with contextlib.suppress(FileNotFoundError):
        storage.unlink(name)


def discard_index(storage: Storage, stem: str) -> None:
    """Unlink an index, if there is one; where that fails it is left behind, and means nothing."""
    with contextlib.suppress(OSError):
        storage.unlink(stem + INDEX)


def discard_files(storage: Storage, stem: str, *suffixes: str) -> None:
    """Unlink what there is of the files that a change which failed has made: descriptors first, then data.

    Where that fails the error is none that a volume goes on after: what is left might count later.
    """
    discard_index(storage, stem)
    for suffix in (*suffixes, ".dat"):
        try:
            unlink_if_there(storage, stem + suffix)
        except OSError as error:
            raise OSError(errno.EIO, f"{error.strerror or error}, so it is left behind", stem + suffix) from error
