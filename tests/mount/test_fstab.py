"""``mount.fuse.dmafs``, as mount(8) calls it. tests/package has mount(8) itself call it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dmafs.cli.fstab import FAILED, USAGE
from dmafs.service.background import LOG_BYTES
from tests.mount.harness import MIB, Rig, is_mounted, pread, pwrite, run, wait_until

pytestmark = pytest.mark.mount

HELPER: Final = (
    sys.executable,
    "-c",
    """\
import pathlib, sys
from dmafs.service import background
background.JOURNAL_STDOUT = pathlib.Path(sys.argv.pop(1))
from dmafs.cli.fstab import entry
entry()
""",
)


class Mounter:
    """Mounts the store of a rig, whose daemon isn't the rig's child then."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.log = rig.root / "log"
        self.journal = rig.root / "journal"

    def command(self, *options: str) -> list[str]:
        """Return the words of a mount with *options*, as mount(8) gives them."""
        return [
            *(*HELPER, str(self.journal), str(self.rig.store), str(self.rig.mnt)),
            *("-t", "fuse.dmafs", "-o", ",".join(("rw", f"log={self.log}", *options))),
        ]

    def mount(self, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return run(*self.command(*options), code=code)

    def umount(self) -> None:
        """Unmount, and wait until the daemon is gone, which has the store until then."""
        run("umount", self.rig.mnt)
        self.wait_ended()

    def wait_ended(self) -> None:
        wait_until(lambda: not self.daemons(), "the daemon to end")

    def daemons(self) -> list[int]:
        """Return the processes that have the store's path in their command line."""
        return [
            int(folder.name)
            for folder in Path("/proc").iterdir()
            if folder.name.isdigit() and f"\0{self.rig.store}\0" in words_of(folder) and int(folder.name) != os.getpid()
        ]


def words_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.fixture
def mounter(rig: Rig) -> Iterator[Mounter]:
    """One whose daemons are ended."""
    made = Mounter(rig)
    yield made
    for daemon in made.daemons():
        os.kill(daemon, signal.SIGTERM)
    made.wait_ended()


def test_the_tree_is_there_when_mount_returns(mounter: Mounter) -> None:
    """Nothing is printed, though all output is waited for; umount ends the daemon, and the next mount has it all."""
    rig = mounter.rig
    rig.create(size=MIB)
    done = mounter.mount("nofail", "_netdev", "nosuid", "nodev", "x-systemd.automount")
    assert (done.stdout, done.stderr) == ("", "")
    assert is_mounted(rig.mnt)
    rig.wait_protected()
    pwrite(rig.tap(), b"written", 0, sync=True)
    assert pread(rig.live(), 7, 0) == b"written"
    mounter.umount()
    assert mounter.log.read_text() == ""
    mounter.mount()
    assert pread(rig.live(), 7, 0) == b"written"
    mounter.umount()


def test_a_failure_is_told_with_mounts_statuses(mounter: Mounter) -> None:
    """The daemon's error and hint are on stderr; a store that is served already isn't served twice."""
    rig = mounter.rig
    done = mounter.mount(code=FAILED)
    assert done.stderr.startswith(f"dmafs: error: store {rig.store} can't be opened")
    rig.create(size=MIB)
    (rig.mnt / "foreign").touch()
    assert f"{rig.mnt} is not empty: it has foreign\n" in mounter.mount(code=FAILED).stderr
    (rig.mnt / "foreign").unlink()
    mounter.mount()
    assert mounter.mount(code=FAILED).stderr.startswith("dmafs: error: ")
    mounter.umount()


def test_options_that_can_not_be_had_are_named(mounter: Mounter) -> None:
    """Before anything is done; but for those that only mount understands, and with -s."""
    mounter.rig.create(size=MIB)
    for option in ("ro", "remount", "allow_other", "uid=0", "config=x", "log=", "sync", "auto_unmount"):
        assert f"option {option} " in mounter.mount(option, code=USAGE).stderr
    assert not is_mounted(mounter.rig.mnt)
    run(*mounter.command("uid=0"), "-s", "-f", "-n", "-v")
    run(*mounter.command("user=somebody", "comment=x"), "-f")
    run(*mounter.command(), "-x", code=USAGE)
    assert not mounter.daemons()


def test_settings_may_be_in_another_file(mounter: Mounter) -> None:
    """The machine's file is the one that the option names."""
    rig = mounter.rig
    primary = rig.primary()
    primary.write_bytes(bytes(MIB))
    file = rig.root / "machine.toml"
    file.write_text(f'[[store]]\npath = "{rig.store}"\n[[store.volume]]\nname = "made"\nsource = "{primary}"\n')
    mounter.mount(f"config={file}")
    rig.wait_protected()
    assert rig.live("made").stat().st_size == MIB
    mounter.umount()


def test_the_log_is_a_file_without_a_journal(mounter: Mounter) -> None:
    """What comes after the mount is in it; a large file makes room, once."""
    mounter.rig.create(size=MIB)
    mounter.log.write_text("x" * (LOG_BYTES + 1))
    run(*mounter.command(), "-v")
    [daemon] = mounter.daemons()
    os.kill(daemon, signal.SIGHUP)
    wait_until(lambda: " loaded again" in mounter.log.read_text(), "the daemon's word in its log")
    mounter.umount()
    assert mounter.log.with_name("log.old").stat().st_size == LOG_BYTES + 1
    assert mounter.log.stat().st_mode & 0o777 == 0o600
