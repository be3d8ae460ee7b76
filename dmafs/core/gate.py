"""The gate that every change of a volume goes through: shut after the first one that failed."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from dmafs.errors import ReadOnlyError, StoreError, StoreFullError


class Gate:
    """See the module; calling it is passing it."""

    def __init__(self, name: str) -> None:
        """Begin open; *name* is the volume's."""
        self._name = name
        self.failure = ""

    @contextlib.contextmanager
    def __call__(self, *, fatal: bool = False) -> Iterator[None]:
        """Let a change through, or refuse it since an earlier one failed; translate the errors of this one.

        With *fatal* even "no space" ends all writing: after a failed fsync nobody knows what is on the disk.
        """
        if self.failure:
            raise ReadOnlyError(
                f"volume {self._name} is read-only: {self.failure}",
                hint="look at the store's disk, then start the daemon again",
            )
        try:
            yield
        except OSError as error:
            text = f"{error.strerror or error} ({error.filename or self._name})".lower()
            if error.errno in {errno.ENOSPC, errno.EDQUOT} and not fatal:
                raise StoreFullError(
                    f"store of volume {self._name} is full", hint="make space, sync, or drop old snapshots"
                ) from error
            if error.errno not in {errno.EMFILE, errno.ENFILE} or fatal:
                self.failure = text
            raise StoreError(f"volume {self._name}: {text}", hint="look at the disk it is on") from error
