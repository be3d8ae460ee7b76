"""The gate that every change of a volume goes through: shut after the first one that failed."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from types import TracebackType
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
        self._passages = Passage(self, fatal=False), Passage(self, fatal=True)
        self.failure = ""
        """What has failed, and on which file."""
        self.failed_ns = 0
        """When it did."""

    def __call__(self, *, fatal: bool = False) -> Passage:
        """Let a change through, or refuse it since an earlier one failed; translate the errors of this one.

        With *fatal* even "no space" ends all writing: after a failed fsync nobody knows what is on the disk.
        """
        return self._passages[fatal]

    def refuse(self) -> None:
        """Raise why nothing is changed any more."""
        raise ReadOnlyError(f"volume {self._name} is read-only: {self.failure}", hint=FAILED_HINT)

    def translate(self, error: OSError, *, fatal: bool) -> None:
        """Raise what an error of a change means, and shut the gate if nothing may be changed after it."""
        text = f"{error.strerror or error} ({error.filename or self._name})".lower()
        if error.errno in {errno.ENOSPC, errno.EDQUOT} and not fatal:
            raise StoreFullError(
                f"store of volume {self._name} is full", hint="make space, sync, or drop old snapshots"
            ) from error
        if error.errno not in {errno.EMFILE, errno.ENFILE} or fatal:
            self.failure, self.failed_ns = text, self._clock()
        raise StoreError(f"volume {self._name}: {text}", hint="look at the disk it is on") from error


class Passage:
    """What is done within ``with``. It has no state of its own, since every write passes, some within others."""

    __slots__ = ("_fatal", "_gate")

    def __init__(self, gate: Gate, *, fatal: bool) -> None:
        """See ``Gate.__call__``."""
        self._gate = gate
        self._fatal = fatal

    def __enter__(self) -> None:
        """Refuse if the gate is shut."""
        if self._gate.failure:
            self._gate.refuse()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Translate the error."""
        if isinstance(error, OSError):
            self._gate.translate(error, fatal=self._fatal)
