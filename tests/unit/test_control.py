"""Claims about dmafs.service.control: its socket, and what it answers when nothing else does."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from unittest import mock

import httpx
import trio
import trio.testing

from dmafs.service.appliance import Appliance
from dmafs.service.control import application, serve_control
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


async def test_a_bug_is_told_as_an_error_is() -> None:
    """An exception that isn't of the tree is one of the daemon's own; it goes on to the server, which logs it."""
    appliance = mock.Mock(Appliance)
    appliance.status.side_effect = ZeroDivisionError("secret")
    transport = httpx.ASGITransport(application(appliance, mock.Mock(Exposition)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://dmafs") as client:
        answer = await client.get("/status")
    assert answer.status_code == 500
    assert answer.json() == {
        "error": "DmafsError",
        "message": "bug: ZeroDivisionError",
        "hint": "the daemon's log has it, please report this",
    }


def test_a_daemon_has_its_document_only_when_it_is_asked_for() -> None:
    """Neither the daemon nor a client imports what makes it."""
    program = "import sys, dmafs.client, dmafs.service.daemon; sys.exit('dmafs.service.openapi' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
