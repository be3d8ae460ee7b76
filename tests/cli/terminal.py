"""A terminal as a person has one: bash on a pseudo-terminal, in a mount namespace whose /var/tmp is a disk of its own.

So commands can be run as a text prints them, with the folders it names, and neither what is in the machine's /var/tmp
nor how full that is makes a difference; and whatever they leave behind can be found, and is taken away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, Self

import pexpect

from tests.mount.harness import DMAFS, run, wait_until

SCRATCH: Final = "/var/tmp"  # noqa: S108 - that is where the text works
_SCRATCH_BYTES: Final = 16 << 30
_COMMAND_S: Final = 60
_PROMPT: Final = "<ready {}>"
_LEFT_S: Final = 30


def _programs() -> list[Path]:
    """Return the folders of the program, and of what runs it, as far as they would be hidden."""
    return [path for path in (Path(__file__).parents[2], Path(sys.prefix)) if path.is_relative_to(SCRATCH)]


class Terminal:
    """See the module. A context manager, which takes everything away at its end."""

    def __init__(self, zone: str = "UTC") -> None:
        """Begin a session; local times are in *zone*."""
        self._home = Path(tempfile.mkdtemp(prefix="dmafs-terminal.", dir=os.environ.get("TMPDIR", SCRATCH)))
        image = self._home / "scratch.img"
        with image.open("wb") as file:
            file.truncate(_SCRATCH_BYTES)
        run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", image)
        environment = {
            "PATH": f"{DMAFS.parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HOME": "/root",
            "TERM": "dumb",  # no colours, no bars
            "TZ": zone,
            "LC_ALL": "C.UTF-8",
            "PS1": _PROMPT.format("$?"),
            "PS2": "",
        }
        words = ["--mount", "--propagation", "private", "bash", "--norc", "--noprofile", "--noediting", "-i"]
        self._shell = pexpect.spawn(
            "unshare",
            words,
            env=environment,
            cwd="/",
            encoding="utf-8",
            echo=False,
            dimensions=(50, 250),
            timeout=_COMMAND_S,
        )
        self._devices: set[str] = set()
        self._theirs: set[str] = set()
        self.status = 0  # of the last command
        self._answer()
        rows = Path(f"/proc/{self._shell.pid}/mountinfo").read_text().splitlines()
        self._theirs = {row.split()[2] for row in rows}  # the machine's mounts; loop devices over their files stay
        kept = list(enumerate(_programs(), 10))
        for number, path in kept:
            self.run(f"exec {number}<{path}")
        self.run(f"mount -o loop {image} {SCRATCH}")
        self.run(f"rmdir {SCRATCH}/lost+found")
        for number, path in kept:
            bind = f"mount --no-canonicalize --bind /proc/self/fd/{number} {path}"  # by the descriptor, not its name
            self.run(f"mkdir -p {path} && {bind} && exec {number}<&-")

    def path(self, name: str) -> Path:
        """Return where a file of the session's namespace can be seen from outside."""
        return Path(f"/proc/{self._shell.pid}/root{name}")

    def run(self, command: str, *, lines: int = 0, code: int | None = 0) -> list[str]:
        """Type a command, and return what it prints; it has to end with *code*, unless that is None.

        One that goes into the background may print later: then as many *lines* are waited for.
        """
        self._shell.sendline(command)
        printed, self.status = self._answer()
        while command.endswith("&") and len(printed) < lines:
            self._shell.expect("([^\r\n]*)\r\n")
            printed.append(self._shell.match[1])
        self._devices |= {device for _, device in self._mounts()} - self._theirs
        shown = "\n".join(printed)
        assert code is None or self.status == code, f"$ {command}\n{shown}\nended with {self.status}"
        return printed

    def _answer(self) -> tuple[list[str], int]:
        self._shell.expect(_PROMPT.format(r"(\d+)"))
        return self._shell.before.replace("\r\n", "\n").splitlines(), int(self._shell.match[1])

    # -- the end -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._take_down()
        finally:
            shutil.rmtree(self._home)

    def _take_down(self) -> None:
        """End all that the session has begun, by force if it doesn't go otherwise."""
        pid = self._shell.pid
        for point in sorted({point for point, _ in self._mounts()}, key=len, reverse=True):
            if point != SCRATCH:
                self._inside("umount", "-l", point)
        try:
            wait_until(self._detach, "the session's loop devices to be detached", seconds=_LEFT_S)
        finally:
            self._inside("umount", "-l", SCRATCH)
            namespace = Path(f"/proc/{pid}/ns/mnt").readlink()
            self._shell.close(force=True)
            wait_until(lambda: not _end_processes(namespace), "the session's processes to end", seconds=_LEFT_S)

    def _detach(self) -> bool:
        """Detach the loop devices over files of the session, and return whether there were none."""
        loops = [loop for loop, device in _loops() if device in self._devices]
        for loop in loops:
            self._inside("losetup", "-d", loop)
        return not loops

    def _mounts(self) -> list[tuple[str, str]]:
        rows = [line.split() for line in Path(f"/proc/{self._shell.pid}/mountinfo").read_text().splitlines()]
        return [(row[4], row[2]) for row in rows if row[4] == SCRATCH or row[4].startswith(f"{SCRATCH}/")]

    def _inside(self, *words: str) -> None:
        subprocess.run(["nsenter", "-m", "-t", str(self._shell.pid), *words], check=False, capture_output=True)


def _loops() -> list[tuple[str, str]]:
    """Return all loop devices, each with the number of the device that its file is on."""
    rows = run("losetup", "--list", "--noheadings", "--output", "NAME,BACK-MAJ:MIN").stdout.splitlines()
    return [(words[0], words[1]) for words in map(str.split, rows) if len(words) == 2]


def _end_processes(namespace: Path) -> bool:
    """Kill all processes in a mount namespace, and return whether there were any."""
    found = False
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/mnt").readlink() == namespace:
                found = True
                os.kill(int(entry.name), 9)
    return found
