"""The package for Debian: built, installed in a fresh Debian 12, used there, and purged.

The system is made by debootstrap and has nothing but what the package depends on. It has its own mounts and processes,
which end with the test, whatever goes wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dmafs.cli.fstab import FAILED, USAGE
from tests.mount.harness import wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow]

ROOT: Final = Path(__file__).parents[2]
RELEASE: Final = "bookworm"
SECONDS: Final = 300
CONTENT: Final = b"what the disk has"
ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
BEGIN: Final = """\
mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && mount -t sysfs sysfs "$1/sys" &&
echo begun && exec sleep infinity
"""


def run(*command: str | Path, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run a command, which has to end with *code*; return all that it says."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
        env=env,
    )
    assert done.returncode == code, f"{' '.join(words)} -> {done.returncode}\n{done.stdout}"
    return done.stdout


class System:
    """A system in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", BEGIN, "sh", str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "begun\n"
        task = Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children")
        self.first = task.read_text().split()[0]

    def words(self, *command: str) -> list[str]:
        return ["nsenter", "-t", self.first, "-m", "-p", "chroot", str(self.folder), *command]

    def run(self, *command: str, code: int = 0) -> str:
        return run(*self.words(*command), code=code, env=ENVIRONMENT)

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(self.words(*command), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    def path(self, name: str) -> Path:
        """Return where a file is for those outside, who don't see its mounts."""
        return self.folder / name.lstrip("/")

    def wait_protected(self, store: str) -> None:
        """Wait until the initial copy is there, with which the images are."""
        wait_until(lambda: ": protected, " in self.run("dmafs", "status", store), "the initial copy", seconds=SECONDS)

    def wait_free(self, store: str) -> None:
        """Wait until no daemon has a store any more."""
        socket = self.path(store) / "control.sock"
        wait_until(lambda: not socket.exists(), "the daemon to end", seconds=SECONDS)

    def end(self) -> None:
        os.kill(self.holder.pid, signal.SIGKILL)
        self.holder.communicate()


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A fresh system with the package, which is built at the same time."""
    folder = Path(tempfile.mkdtemp(prefix="dmafs-package.", dir=os.environ.get("TMPDIR", "/var/tmp"))).resolve()  # noqa: S108
    try:
        root = folder / "root"
        log = folder / "debootstrap.log"
        with log.open("wb") as output:
            making = subprocess.Popen(
                ["debootstrap", "--variant=minbase", RELEASE, str(root)], stdout=output, stderr=output
            )
        [package] = run(ROOT / "contrib/debian/build", folder).split()
        assert making.wait(SECONDS) == 0, log.read_text()
        (root / "etc/dpkg/dpkg.cfg.d/quick").write_text("force-unsafe-io\n")
        shutil.move(package, root / "root")
        made = System(root)
        try:
            made.run("apt-get", "-q", "update")
            made.run("apt-get", "-qy", "--no-install-recommends", "install", f"/root/{Path(package).name}")
            yield made
        finally:
            made.end()
    finally:
        shutil.rmtree(folder)


def make_store(system: System, name: str) -> str:
    """Make a store for a small disk that begins with some content; return its path."""
    system.path(f"/srv/{name}.img").write_bytes(CONTENT.ljust(1 << 20, b"\0"))
    system.path(f"/srv/{name}.mnt").mkdir()
    system.run("dmafs", "create", f"/srv/{name}", "--source", f"/srv/{name}.img")
    return f"/srv/{name}"


def test_the_program_runs_and_is_the_packages(system: System) -> None:
    """Its modules and libraries are the package's, whatever the environment says."""
    assert system.run("dmafs", "--version").startswith("dmafs 0.")
    system.path("/root/trio.py").write_text("raise SystemExit(99)")
    assert "error: store /nowhere " in system.run(
        "env", "PYTHONPATH=/root", "dmafs", "serve", "/nowhere", "/mnt", code=11
    )
    listed = system.run("dpkg", "--verify", "dmafs")
    assert listed == ""


def test_units_completions_and_pages_are_where_they_are_looked_for(system: System) -> None:
    """The units run the package's program."""
    for unit in ("dmafs@.service", "dmafs-tap@.service"):
        text = system.path(f"/lib/systemd/system/{unit}").read_text()
        assert "/usr/bin/dmafs " in text
        assert "/usr/local" not in text
    assert system.path("/usr/lib/tmpfiles.d/dmafs.conf").read_text().endswith("d /run/dmafs 0755 root root -\n")
    for name in ("bash-completion/completions/dmafs", "zsh/vendor-completions/_dmafs"):
        assert "serve" in system.path(f"/usr/share/{name}").read_text()
    system.run("bash", "-n", "/usr/share/bash-completion/completions/dmafs")
    status = system.run("dpkg-query", "--listfiles", "dmafs").splitlines()
    assert "/usr/share/fish/vendor_completions.d/dmafs.fish" in status


def test_a_disk_is_served_in_the_foreground(system: System) -> None:
    """Its bytes are in the tree, and SIGTERM ends the daemon in order."""
    store = make_store(system, "one")
    with system.start("sh", "-c", f"echo $$ >/root/pid; exec dmafs serve {store} {store}.mnt") as daemon:
        try:
            assert daemon.stderr is not None
            assert daemon.stderr.readline() == f"dmafs: serving {store} at {store}.mnt\n"
            system.wait_protected(store)
            assert system.run("head", "-c", str(len(CONTENT)), f"{store}.mnt/live/disk.img") == CONTENT.decode()
            system.run("sh", "-c", "kill $(cat /root/pid)")
            assert daemon.wait(SECONDS) == 0
        except BaseException:
            system.run("sh", "-c", "kill -9 $(cat /root/pid)")  # or it would be waited for
            raise
    assert system.run("dmafs", "check", store).startswith("volume disk: no errors")


def test_mount_mounts_a_line_of_fstab(system: System) -> None:
    """mount(8) finds the helper by the type, passes its errors and its status on; umount(8) ends the daemon."""
    store = make_store(system, "two")
    point = f"{store}.mnt"
    system.path("/etc/fstab").write_text(
        f"{store} {point} fuse.dmafs _netdev,nofail,user,x-systemd.requires-mounts-for=/srv 0 0\n"
    )
    assert system.run("mount", point) == ""
    system.wait_protected(store)
    assert system.run("head", "-c", str(len(CONTENT)), f"{point}/live/disk.img") == CONTENT.decode()
    assert f"{store} on {point} type fuse.dmafs" in system.run("mount")
    system.run("umount", point)
    system.wait_free(store)
    assert "option uid=0 isn't known" in system.run(
        "mount", "-t", "fuse.dmafs", "-o", "uid=0", store, point, code=USAGE
    )
    assert "error: " in system.run("mount", "-t", "fuse.dmafs", "/nowhere", point, code=FAILED)
    assert system.path("/var/log/dmafs.log").read_text() == ""
    system.path("/etc/fstab").unlink()


def test_a_purge_leaves_the_stores_and_nothing_else(system: System) -> None:
    """While a tree is mounted it is refused; stores, and settings that aren't the package's, stay as they are."""
    store = make_store(system, "three")
    point = f"{store}.mnt"
    system.run("mount", "-t", "fuse.dmafs", store, point)
    assert f"a tree is mounted at {point}" in system.run("dpkg", "--purge", "dmafs", code=1)
    system.wait_protected(store)
    assert system.run("head", "-c", "4", f"{point}/live/disk.img") == CONTENT[:4].decode()
    system.run("umount", point)
    system.wait_free(store)
    wants = system.path("/etc/systemd/system/multi-user.target.wants")
    wants.mkdir(parents=True, exist_ok=True)
    (wants / "dmafs@srv-three.service").symlink_to("/lib/systemd/system/dmafs@.service")
    system.path("/etc/dmafs/other.toml").write_text("# somebody's\n")
    before = sorted(path.relative_to(system.folder) for path in system.path("/srv").rglob("*"))
    system.run("dpkg", "--purge", "dmafs")
    assert sorted(path.relative_to(system.folder) for path in system.path("/srv").rglob("*")) == before
    assert (system.path(store) / "disk/volume.json").is_file()
    left = system.run("find", "/", "-xdev", "-name", "*dmafs*", "-not", "-path", "/root/*").split()
    assert left == ["/etc/dmafs"]
    assert [path.name for path in system.path("/etc/dmafs").iterdir()] == ["other.toml"]
    assert not os.path.lexists(wants / "dmafs@srv-three.service")
    system.run("sh", "-c", "! command -v dmafs")
