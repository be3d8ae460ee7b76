"""What can be asked of a store, be it served by a daemon or not.

``connect(store)`` yields a ``Session``. A store whose lock is free is opened by this process (``local``); otherwise the
daemon is asked through its control socket (``remote``). Each of the two is imported when it is needed: commands start
quickly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from dmafs import answers
from dmafs.core.storage import lock_directory
from dmafs.errors import StoreBusyError

Show = Callable[[int, int], None]
"""Is told the bytes done and the total."""


def unseen(_done: int, _total: int) -> None:
    """Show nothing."""


class Session(Protocol):
    """What can be asked; the answers are described in ``dmafs.answers``, the errors in ``dmafs.errors``."""

    def status(self) -> answers.Status:
        """Return the state of all volumes, and of the daemon if there is one."""

    def points(self) -> answers.Points:
        """Return the recoverable points."""

    def moment(self, at: str, volume: str | None = None) -> answers.Moment:
        """Return what a time means in all volumes or one, and why."""

    def snapshots(self) -> answers.Snapshots:
        """Return all snapshots, oldest first."""

    def take_snapshot(self, name: str) -> answers.Named:
        """Take a snapshot of all volumes."""

    def drop_snapshot(self, identifier: str) -> answers.Dropped:
        """Drop a snapshot of all volumes, by its name or its canonical time."""

    def rename_snapshot(self, identifier: str, name: str) -> answers.Renamed:
        """Give a snapshot of all volumes another name."""

    def mark(self, name: str) -> answers.Named:
        """Set a mark on all volumes."""

    def sync(self) -> answers.Syncs:
        """Sync all volumes."""

    def pin(self, identifier: str) -> answers.Pinned:
        """Have a snapshot not be dropped."""

    def unpin(self, identifier: str) -> answers.Pinned:
        """Let a snapshot be dropped again."""

    def thin(self, *, dry_run: bool = False) -> answers.Thinned:
        """Drop the snapshots that no rule keeps, or only say which."""

    def clones(self) -> answers.Clones:
        """Return all clones."""

    def create_clone(self, name: str, at: str | None = None) -> answers.Named:
        """Make a clone of all volumes at a moment, or now."""

    def drop_clone(self, name: str) -> answers.Named:
        """Drop a clone of all volumes."""

    def read(self, volume: str, *, at: str, offset: int, length: int) -> Iterator[bytes]:
        """Yield the bytes of a volume at a moment."""

    def diff(self, volume: str, a: str, b: str) -> answers.Difference:
        """Return which extents of a volume were written between two moments."""

    def tap(self, action: str, volume: str | None = None) -> answers.Taps:
        """Attach or detach mapped devices, or only report them."""

    def verify(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Differences:
        """Return where a volume's source and newest image differ; *show* is told how far it is."""

    def resync(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Differences:
        """Journal that, too; return what it was."""

    def scrub(self, volume: str, bytes_per_s: int | None = None, show: Show = unseen) -> answers.Scrubbed:
        """Compare all that has a checksum with it, and repair what can be; return what was damaged."""


@contextlib.contextmanager
def connect(store: Path) -> Iterator[Session]:
    """Yield a session with the daemon that serves a store, or with the store itself.

    NoStoreError if there is none, StoreBusyError or ControlError if another process has it that can't be asked.
    """
    with contextlib.ExitStack() as opened:
        try:
            os.close(lock_directory(store))  # a daemon reads its own configuration, so ask it without
            from dmafs.service.local import open_store  # noqa: PLC0415 - see the module

            found: Session = opened.enter_context(open_store(store))
        except StoreBusyError:
            from dmafs.service.remote import RemoteSession  # noqa: PLC0415 - see the module

            found = RemoteSession(store)
        yield found
