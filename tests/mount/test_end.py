"""The daemon ends in order, whatever others do: flushed, marked clean, unmounted."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess

import pytest

from tests.mount.harness import DMAFS, MIB, Rig, assert_same, is_mounted, pwrite, wait_until

pytestmark = pytest.mark.mount

SIZE = 32 * MIB


def restarted_clean(rig: Rig) -> None:
    """Assert that a next daemon finds nothing to redo: the harness fails on its warning."""
    rig.start()
    assert_same(rig.live(), rig.primary())


def test_a_client_that_does_not_read_holds_up_nothing(rig: Rig) -> None:
    """A connection that asks for much and takes nothing is cut when the daemon ends."""
    rig.create(size=SIZE)
    rig.start()
    pwrite(rig.tap(), os.urandom(8 * MIB), 0, sync=True)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(rig.store / "control.sock"))
        query = f"/read?volume=disk&at=0s+ago&offset=0&length={SIZE}"
        client.sendall(f"GET {query} HTTP/1.1\r\nhost: dmafs\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 200"
        pwrite(rig.tap(), b"not flushed".ljust(4096), 9 * MIB)
        rig.stop()
    restarted_clean(rig)


def test_further_signals_change_nothing(rig: Rig) -> None:
    """Whoever is impatient doesn't keep the daemon from flushing: one signal or six, the end is the same."""
    rig.create(size=SIZE)
    rig.start()
    pwrite(rig.tap(), b"not flushed".ljust(4096), MIB)
    daemon = rig.daemon
    assert daemon is not None
    for _ in range(5):
        daemon.send_signal(signal.SIGINT)
    rig.stop(signal.SIGTERM)
    restarted_clean(rig)


def test_a_closed_terminal_is_no_end(rig: Rig) -> None:
    """The terminal on which the progress bar was shown may go; the disk stays."""
    rig.create(size=256 * MIB, content=os.urandom(256 * MIB))
    ours, theirs = pty.openpty()
    command = [str(DMAFS), "serve", str(rig.store), str(rig.mnt)]
    with subprocess.Popen(command, stderr=theirs, stdin=subprocess.DEVNULL, start_new_session=True) as daemon:
        try:
            os.close(theirs)
            wait_until(lambda: is_mounted(rig.mnt), "the mount")
            os.close(ours)
            wait_until(lambda: '"protected"' in rig.dmafs("status", rig.store, "--json").stdout, "the initial copy")
            pwrite(rig.tap(), b"still there".ljust(4096), 0, sync=True)
        finally:
            daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(30) == 0
    restarted_clean(rig)
