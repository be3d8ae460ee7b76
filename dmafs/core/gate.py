"""The gate that every change of a volume goes through: shut after the first one that failed."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator
from typing import Final

from dmafs.errors import ReadOnlyError, StoreError, StoreFullError

FAILED_HINT: Final = "look at that disk, start the daemon again, then run: dmafs resync STORE"
"""What to do about a volume that is read-only."""


class Gate:
    """See the module; calling it is passing it."""

    def __init__(self, name: str, clock: Callable[[], int] = time.time_ns) -> None:
        """Begin open; *name* is the volume's, *clock* returns UTC nanoseconds."""
        self._name = name
        self._clock = clock
        self.failure = ""
        """What has failed, and on which file."""
        self.failed_ns = 0
        """When it did."""

    @contextlib.contextmanager
    def __call__(self, *, fatal: bool = False) -> Iterator[None]:
        """Let a change through, or refuse it since an earlier one failed; translate the errors of this one.

        With *fatal* even "no space" ends all writing: after a failed fsync nobody knows what is on the disk.
        """
        if self.failure:
            raise ReadOnlyError(
                f"volume {self._name} is read-only: {self.failure}",
                hint=FAILED_HINT,
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
                self.failure, self.failed_ns = text, self._clock()
            raise StoreError(f"volume {self._name}: {text}", hint="look at the disk it is on") from error
