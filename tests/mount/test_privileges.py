"""What a real daemon may still do, and who may ask it: looked up in /proc, tried out, and asked as somebody else."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dmafs.service.privileges import NEEDS
from tests.mount.harness import Rig, pread, pwrite, run, wait_until

pytestmark = [pytest.mark.mount]

NOBODY = 65534
ALWAYS = {"CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"}
WITH_HOOKS = ALWAYS | {"CAP_KILL", "CAP_SETGID", "CAP_SETUID"}


def mask(names: set[str]) -> int:
    return sum(1 << need.number for need in NEEDS if need.name in names)


def rights(pid: int | str) -> dict[str, int]:
    """Return the capability sets and no_new_privs of a process or thread, as the kernel shows them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t") for line in lines if ":\t" in line)
    return {key: int(value, 16) for key, value in fields.items() if key.startswith("Cap") or key == "NoNewPrivs"}


def assert_has_only(names: set[str], pid: int | str) -> None:
    keep = mask(names)
    assert rights(pid) == {
        "CapInh": 0,
        "CapPrm": keep,
        "CapEff": keep,
        "CapBnd": keep,
        "CapAmb": 0,
        "NoNewPrivs": 1,
    }, pid


def as_nobody(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python code as a user who is nobody."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *(str(word) for word in arguments)],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_every_thread_has_what_is_needed_and_no_more(rig: Rig) -> None:
    """After all kinds of work; the process that stays to unmount has no more either, and that goes in order."""
    rig.create()
    rig.start()
    pwrite(rig.tap(), b"x" * 4096, 0, sync=True)
    rig.dmafs("snapshot", "create", rig.store, "one")
    rig.dmafs("verify", rig.store)
    rig.dmafs("sync", rig.store)
    assert pread(rig.snapshot("one"), 4096, 0) == b"x" * 4096
    assert rig.daemon is not None
    pid = rig.daemon.pid
    tasks = os.listdir(f"/proc/{pid}/task")
    assert len(tasks) > 1
    for task in tasks:
        assert_has_only(ALWAYS, f"{pid}/task/{task}")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        assert_has_only(ALWAYS, child)
    rig.stop()


def test_hooks_have_what_they_need_and_no_more(rig: Rig) -> None:
    """A hook can become another user, and is ended as such; it can't load a module or make a setuid program's gain."""
    seen = rig.root / "seen"
    script = f"cat /proc/self/status > {seen}; exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups sleep 100"
    rig.create()
    rig.configure(f"[snapshots]\nevery = '1s'\nbefore = ['/bin/sh', '-c', {script!r}]\nhook_timeout = '1s'")
    rig.allow("hook .*", "but isn't frozen")
    rig.start()
    assert rig.daemon is not None
    assert_has_only(WITH_HOOKS, rig.daemon.pid)
    wait_until(lambda: "was killed" in rig.log(), "the hook to take too long")
    fields = dict(line.split(":\t") for line in seen.read_text().splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == mask(WITH_HOOKS)
    assert fields["NoNewPrivs"] == "1"
    sleeping = f"sleep\0{100}"
    wait_until(lambda: not alive(sleeping, NOBODY), "the hook that became nobody to be ended")


def alive(command: str, user: int) -> bool:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid == user and (folder / "cmdline").read_text().rstrip("\0") == command:
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def test_what_was_dropped_is_refused_by_the_kernel(rig: Rig) -> None:
    """The daemon's rights, in a program of ours: no raw socket, no other owner, no clock."""
    bounding = ",".join(f"+{need.name.lower().removeprefix('cap_')}" for need in NEEDS if need.name in ALWAYS)
    program = """
        import os, socket, sys, time
        for attempt in (
            lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
            lambda: os.chown(sys.argv[1], 12345, 12345),
            lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
        ):
            try:
                attempt()
            except PermissionError:
                continue
            sys.exit("that was allowed")
    """
    file = rig.root / "file"
    file.touch()
    run(
        "setpriv", "--bounding-set", f"-all,{bounding}", "--inh-caps", "-all", "--no-new-privs",
        sys.executable, "-c", textwrap.dedent(program), file,
    )  # fmt: skip


def test_nobody_else_gets_at_anything(rig: Rig) -> None:
    """Without being asked for, neither store nor tree nor socket is open to another user."""
    rig.create()
    rig.start()
    os.chmod(rig.root, 0o755)
    tried = as_nobody(
        """
        import os, socket, sys
        for path in sys.argv[1:]:
            for attempt in (os.listdir, os.stat, lambda path: os.open(path, os.O_RDONLY)):
                try:
                    attempt(path + "/disk")
                except PermissionError:
                    continue
                sys.exit(f"{path} is open")
        try:
            socket.socket(socket.AF_UNIX).connect(sys.argv[1] + "/control.sock")
        except PermissionError:
            sys.exit(0)
        sys.exit("connected")
        """,
        rig.store,
        rig.mnt,
    )
    assert tried.returncode == 0, tried.stderr
    assert stat.S_IMODE(rig.store.stat().st_mode) == 0o700


def test_another_user_is_refused_even_if_the_socket_is_open_to_all(rig: Rig) -> None:
    """The kernel says who asks. The answer says who may, and nothing of what was asked is done."""
    rig.allow("may not ask the daemon")
    rig.create()
    rig.start()
    os.chmod(rig.root, 0o755)
    os.chmod(rig.store, 0o755)
    os.chmod(rig.store / "control.sock", 0o666)
    for request in ("POST /snapshots?name=theirs", "GET /status", "nonsense"):
        asked = as_nobody(
            """
            import socket, sys
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(20)
            connection.connect(sys.argv[1])
            try:
                connection.sendall(sys.argv[2].encode() + b" HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
            except BrokenPipeError:
                pass
            print(connection.recv(4096).decode())
            """,
            rig.store / "control.sock",
            request,
        )
        assert asked.stdout.startswith("HTTP/1.1 403 "), asked
        assert f"user {NOBODY} may not ask the daemon of user 0" in asked.stdout
        assert "DeniedError" in asked.stdout
    assert rig.status()["snapshots"] == 0
    os.chmod(rig.store, 0o700)
    assert "DeniedError" not in rig.dmafs("status", rig.store).stderr


def test_the_command_line_says_whom_the_daemon_serves(rig: Rig) -> None:
    """A user who isn't served sees why, and the exit status of that error."""
    rig.allow("may not ask the daemon")
    rig.create()
    rig.start()
    os.chmod(rig.root, 0o755)
    os.chmod(rig.store, 0o755)
    os.chmod(rig.store / "control.sock", 0o666)
    program = """
        import encodings.idna, os, sys
        from dmafs.cli.main import main
        os.setgroups([])
        os.setgid(int(sys.argv[2]))
        os.setuid(int(sys.argv[2]))
        sys.exit(main(["status", sys.argv[1]]))
    """
    asked = run(sys.executable, "-c", textwrap.dedent(program), rig.store, str(NOBODY), code=35)
    assert "dmafs: error: process " in asked.stderr
    assert "may not ask the daemon" in asked.stderr
    assert "hint: run the command as root" in asked.stderr
    os.chmod(rig.store, 0o700)


@pytest.mark.parametrize("place", [".", "dmafs.conf", "disk", "disk/mirror.img"])
def test_the_daemon_refuses_what_others_can_write(rig: Rig, place: str) -> None:
    """It names path and remedy, and doesn't mount; with the remedy it serves."""
    rig.create()
    path = rig.store / place
    path = path.resolve()
    mode = stat.S_IMODE(path.stat().st_mode)
    os.chmod(path, mode | 0o022)
    done = rig.dmafs("serve", rig.store, rig.mnt, code=17)
    assert f"dmafs: error: {path} can be written by others: mode {mode | 0o022:04o}" in done.stderr
    [remedy] = [line for line in done.stderr.splitlines() if line.startswith("hint: ")]
    run(*shlex.split(remedy.rpartition(": ")[2]))
    rig.start()


@pytest.mark.parametrize("allowed", [False, True])
def test_other_users_see_the_tree_only_on_request(rig: Rig, allowed: bool) -> None:  # noqa: FBT001
    """With allow_other they get as far as the modes say, which is not into an image."""
    rig.create()
    rig.configure("allow_other = true" if allowed else "")
    rig.start()
    os.chmod(rig.root, 0o755)
    options = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(rig.mnt) in line)
    assert ("allow_other" in options) is allowed
    assert stat.S_IMODE(rig.live().stat().st_mode) == 0o440
    tried = as_nobody("import os, sys; os.stat(sys.argv[1]); os.listdir(sys.argv[1])", rig.mnt)
    assert "Permission" in tried.stderr
    tried = as_nobody("import os, sys; os.stat(sys.argv[1])", rig.mnt)
    assert (tried.returncode == 0) is allowed
    tried = as_nobody("import os, sys; os.open(sys.argv[1], os.O_RDONLY)", rig.live())
    assert "Permission" in tried.stderr
