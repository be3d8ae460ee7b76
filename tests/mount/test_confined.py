"""The daemon does all its work within what its unit for systemd lets it do; and why some settings aren't in there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.harness import DMAFS, MIB, Rig, is_mounted, pread, pwrite, run, wait_until

pytestmark = [pytest.mark.mount]

SYSTEMD = Path(__file__).parents[2] / "contrib" / "systemd"
CONFINED = [sys.executable, str(Path(__file__).with_name("confined.py")), str(SYSTEMD / "dmafs@.service")]


class ConfinedRig(Rig):
    """A rig whose daemon has the limits of its unit."""

    def program(self) -> list[str]:
        return [*CONFINED, *super().program()]


def test_the_limits_are_there(tmp_path: Path) -> None:
    """What the unit forbids is refused: namespaces, network, other owners, modules, code that is made as it runs."""
    refused = run(*CONFINED, "unshare", "--mount", "true", code=1)
    assert "Operation not permitted" in refused.stderr
    for program in (
        "import socket; socket.socket(socket.AF_INET)",
        f"import os; os.chown({str(tmp_path)!r}, 0, 0)",
        "import os; os.chroot('/')",
        "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))",
        "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)",
    ):
        done = run(*CONFINED, sys.executable, "-c", program, code=1)
        assert "PermissionError" in done.stderr, (program, done.stderr)


def test_everything_works_within_the_limits() -> None:
    """Tap, loop device, file system, hooks that freeze it, snapshots, clones, syncs, checks, and an end in order."""
    with ConfinedRig() as rig:
        rig.allow("hook fsfreeze", "isn't frozen")  # while there is no file system
        files = rig.folder("files")
        rig.create(size=64 * MIB)
        rig.configure(f"""[snapshots]
every = "1s"
before = ["fsfreeze", "--freeze", "{files}"]
after = ["fsfreeze", "--unfreeze", "{files}"]
""")
        rig.start()
        device = rig.attach(rig.tap())
        rig.mkfs(device)
        rig.mount(device, files)

        def frozen() -> bool:
            (files / "file").write_bytes(os.urandom(100))
            return "frozen" in rig.dmafs("ls", rig.store).stdout

        wait_until(frozen, "a snapshot between two hooks", every=0.5)
        rig.configure("")
        # A umount between the two hooks finds the file system frozen.
        wait_until(lambda: run("umount", files, code=None).returncode == 0, "the file system to be let go")
        rig._mounts.remove(files)
        rig.detach(device)
        rig.restart()
        rig.dmafs("mark", rig.store, "a-mark")
        rig.dmafs("snapshot", "create", rig.store, "a-snapshot")
        pwrite(rig.tap(), b"after", 1000, sync=True)
        rig.dmafs("clone", "create", rig.store, "scratch", "--at", "a-mark")
        pwrite(rig.mnt / "clones" / "scratch" / "disk.img", b"clone", 1000, sync=True)
        rig.dmafs("sync", rig.store)
        rig.dmafs("verify", rig.store)
        rig.dmafs("resync", rig.store)
        assert pread(rig.live(), 5, 1000) == b"after"
        assert pread(rig.snapshot("a-snapshot"), 5, 1000) == bytes(5)
        assert pread(rig.mnt / "clones" / "scratch" / "disk.img", 5, 1000) == b"clone"
        rig.dmafs("clone", "drop", rig.store, "scratch")
        rig.kill()
        rig.start()
        rig.stop()


def test_a_tree_in_mounts_of_ones_own_is_seen_by_nobody(rig: Rig) -> None:
    """What ProtectSystem and its like do: mounts get in, but not out. So the unit can't have them."""
    rig.create()
    command = ["unshare", "--mount", "--propagation", "slave", str(DMAFS), "serve", str(rig.store), str(rig.mnt)]
    log = rig.root / "own.log"
    with log.open("wb") as output:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait_until(lambda: "dmafs: serving" in log.read_text(), "the daemon to serve")
        inside = Path(f"/proc/{daemon.pid}/mountinfo").read_text()
        assert f" {rig.mnt} " in inside
        assert not is_mounted(rig.mnt)
        assert os.listdir(rig.mnt) == []
    finally:
        daemon.terminate()
        assert daemon.wait(30) == 0
