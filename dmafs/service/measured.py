"""The metrics of a daemon, for a command."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from dmafs.core.storage import lock_directory
from dmafs.errors import ControlError, StoreBusyError
from dmafs.service.remote import RemoteSession


def metrics_of(path: Path) -> str:
    """Return the metrics of the daemon that serves the store in *path*; ControlError if none does."""
    with contextlib.suppress(StoreBusyError):
        os.close(lock_directory(path))
        raise ControlError(f"no daemon serves store {path}", hint=f"start one: dmafs serve {path} MOUNTPOINT")
    return RemoteSession(path).metrics()
