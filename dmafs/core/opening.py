"""Opening files that have to be there: what is in their place instead is damage, not a bug."""

from __future__ import annotations

import errno
from typing import Final

from dmafs.core.storage import File, Storage
from dmafs.errors import CorruptionError

NOT_OURS: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What opening a file says that is missing, or that something else is in the place of."""


def open_ours(storage: Storage, name: str, *, needed: str) -> File:
    """Open a file that has to be there; CorruptionError, with what it is *needed* for, if something else is."""
    try:
        return storage.open(name)
    except FileNotFoundError:
        raise CorruptionError(f"file {storage.path(name)} is missing", hint=f"restore it: {needed}") from None
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        text = (error.strerror or "").lower()
        raise CorruptionError(
            f"file {storage.path(name)} can't be opened: {text}", hint=f"put back the file that was there: {needed}"
        ) from error
