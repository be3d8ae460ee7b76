"""The log in a real journal: systemd-journald runs for a test in a session's mount namespace, with a /run of its own.

What goes over the wire in odd cases is tested in tests/unit, against a socket of the test's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

import pytest

from tests.cli.terminal import SCRATCH, Terminal
from tests.mount.harness import wait_until

pytestmark = pytest.mark.mount

JOURNALD: Final = "/lib/systemd/systemd-journald"
MACHINE: Final = "0123456789abcdef0123456789abcdef"
INFO: Final = 6


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """A session with a journal, a small disk and a store for it."""
    with Terminal() as session:
        session.run("mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal")
        session.run("mount -t cgroup2 none /sys/fs/cgroup")  # it looks there, and machines differ
        session.run(f": >>/etc/machine-id && echo {MACHINE} >/run/machine-id")
        session.run("mount --bind /run/machine-id /etc/machine-id")
        session.run(f"{JOURNALD} >/dev/null 2>&1 &")
        wait_until(session.path("/run/systemd/journal/socket").exists, "the journal")
        session.run(f"cd {SCRATCH} && truncate -s 1M disk && mkdir mnt && dmafs create store --source disk -q")
        yield session


def entries(session: Terminal, *matches: str) -> list[dict[str, str]]:
    """Return what the journal has of dmafs."""
    session.run("journalctl --sync")
    command = ["journalctl", "--directory=/run/log/journal", "--output=json", "--all", "--no-pager", *matches]
    session.run(f"{' '.join(command)} SYSLOG_IDENTIFIER=dmafs >found")
    return [json.loads(line) for line in session.path(f"{SCRATCH}/found").read_text().splitlines()]


def test_a_daemon_of_mount_logs_with_fields(terminal: Terminal) -> None:
    """Its stderr is the journal's from the mount on; messages have priority, place and store."""
    terminal.run(f"mount.fuse.dmafs store mnt -o rw,log={SCRATCH}/log -v")
    daemon = json.loads("\n".join(terminal.run("dmafs status store --json")))["daemon"]
    terminal.run(f"kill {daemon['pid']}")
    wait_until(lambda: not terminal.path(f"{SCRATCH}/store/control.sock").exists(), "the daemon to end")
    [ending] = entries(terminal, f"DMAFS_STORE={SCRATCH}/store", "LOGGER=dmafs.service.daemon")
    assert ending["MESSAGE"] == "ending on SIGTERM"
    assert ending["PRIORITY"] == str(INFO)
    assert ending["_TRANSPORT"] == "journal"
    assert not terminal.path(f"{SCRATCH}/log").exists()


def test_a_service_logs_with_fields(terminal: Terminal) -> None:
    """Whose stderr is the journal's from its beginning."""
    stream = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)"  # as the service manager would set it
    terminal.run(f"systemd-cat sh -c '{stream} exec dmafs serve store mnt -v' &")
    wait_until(terminal.path(f"{SCRATCH}/store/control.sock").exists, "the daemon")
    wait_until(lambda: ": protected, " in "\n".join(terminal.run("dmafs status store")), "the initial copy")
    terminal.run("kill -TERM %2 && wait %2")
    messages = [entry["MESSAGE"] for entry in entries(terminal, f"DMAFS_STORE={SCRATCH}/store", "DMAFS_VOLUME=disk")]
    assert any(message.startswith("volume disk: initial copy complete, ") for message in messages), messages
