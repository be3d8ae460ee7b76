"""Claims about dmafs.service.control: its socket."""

from __future__ import annotations

import errno
from pathlib import Path
from unittest import mock

import trio
import trio.testing

from dmafs.service.appliance import Appliance
from dmafs.service.control import serve_control
from dmafs.service.exposition import Exposition


async def test_a_socket_that_cannot_be_removed_is_left_behind(tmp_path: Path) -> None:
    """A file system that has failed is read-only: the daemon ends in order nevertheless, and the next one goes on."""
    path = tmp_path / "control.sock"
    for _ in range(2):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                await inner.start(serve_control, mock.Mock(Appliance), path, mock.Mock(Exposition))
                with mock.patch.object(Path, "unlink", side_effect=OSError(errno.EROFS, "Read-only file system")):
                    scope.cancel()
                    with trio.CancelScope(shield=True):
                        await trio.testing.wait_all_tasks_blocked()
        assert path.is_socket()
