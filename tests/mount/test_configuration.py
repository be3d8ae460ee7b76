"""The configuration of a running daemon: loaded again on SIGHUP, and one file for a machine's stores."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dmafs.client import connect
from tests.mount.harness import DMAFS, MIB, Rig, assert_same, is_mounted, pwrite, run, wait_until

pytestmark = pytest.mark.mount


KEEPS_ONE = """[retention]
minimum = 1
within = "0s"
hourly = 0
daily = 0
weekly = 0
monthly = 0
yearly = 0
"""


def told(rig: Rig) -> Any:
    """Return what the daemon says of itself."""
    with connect(rig.store) as asked:
        return asked.status()["daemon"]


def snapshots(rig: Rig) -> list[str]:
    return sorted(set(os.listdir(rig.mnt / "snapshots")) - {"latest"})


def hang_up(rig: Rig) -> None:
    """Have the configuration loaded again, and wait until that was tried."""
    before = told(rig)["configuration"]
    assert rig.daemon is not None
    rig.daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: told(rig)["configuration"] != before, "the configuration")


def test_sighup_loads_the_configuration_again(rig: Rig) -> None:
    """Schedule and retention of a running daemon are others then; what needs a restart is told, and as it was."""
    rig.allow("needs a restart of the daemon: reserve, threads$")
    rig.create(size=MIB)
    rig.start()
    tap = os.open(rig.tap(), os.O_WRONLY)  # stays open all the time
    assert (told(rig)["schedule"]["snapshots"]["next"], snapshots(rig)) == (None, [])
    rig.configure('threads = 4\nreserve = "1MiB"\n[snapshots]\nevery = "1s"\n')
    hang_up(rig)
    configuration = told(rig)["configuration"]
    assert (configuration["file"], configuration["problem"]) == (f"{rig.store}/dmafs.conf", "")
    assert configuration["after_restart"] == ["reserve", "threads"]
    assert told(rig)["schedule"]["snapshots"]["next"]
    number = 0

    def has_snapshots() -> bool:
        nonlocal number
        number += 1
        os.pwrite(tap, number.to_bytes(8, "little") * 512, 0)
        return len(snapshots(rig)) >= 4

    wait_until(has_snapshots, "snapshots by schedule", every=0.2)
    rig.configure(f"[snapshots]\nevery = 0\n{KEEPS_ONE}")
    hang_up(rig)
    newest = snapshots(rig)[-1]
    rig.dmafs("thin", rig.store)  # the daemon's own rules, now and not in a minute
    assert snapshots(rig) == [newest]
    shown = rig.dmafs("config", "show", rig.store).stdout.splitlines()
    assert re.match(rf"process \d+ goes by: {rig.store}/dmafs.conf, loaded 20", shown[0])
    assert [line.split()[1:] for line in shown if line.startswith("retention.minimum ")] == [
        ["1", f"{rig.store}/dmafs.conf:4"]
    ]
    assert "configuration " in rig.dmafs("status", rig.store).stdout
    os.close(tap)
    rig.stop()


def test_a_bad_file_leaves_all_as_it_was(rig: Rig) -> None:
    """It is told in the log and by status, as often as it is tried; mended, it counts."""
    rig.allow("unknown key evry", "stays in effect")
    rig.create(size=MIB)
    rig.configure('[snapshots]\nevery = "1h"\n')
    rig.start()
    planned = told(rig)["schedule"]["snapshots"]["next"]
    assert planned
    rig.configure('[snapshots]\nevery = 0\nevry = "1s"\n')
    hang_up(rig)
    assert told(rig)["schedule"]["snapshots"]["next"] == planned
    shown = rig.dmafs("status", rig.store, code=1).stdout
    assert f"alarm     configuration {rig.store}/dmafs.conf:3, [snapshots]: unknown key evry" in shown
    assert "stays in effect" in rig.log()
    assert "every" in rig.dmafs("config", "check", rig.store, code=3).stdout
    rig.configure("[snapshots]\nevery = 0\n")
    hang_up(rig)
    assert told(rig)["schedule"]["snapshots"]["next"] is None
    assert "alarm" not in rig.dmafs("status", rig.store).stdout
    rig.stop()


def test_many_signals_while_it_is_used_end_nothing(rig: Rig) -> None:
    """Each write is there, whatever is loaded meanwhile."""
    rig.create(size=4 * MIB)
    rig.start()
    daemon = rig.daemon
    assert daemon is not None
    for number in range(200):
        if number % 10 == 0:
            sync = f"[sync]\njournal = {number * 1000}\nage = 0\nexact = 0\n"
            rig.configure(f"tick_s = {0.01 if number % 20 else 5}\n{sync}")
        daemon.send_signal(signal.SIGHUP)
        pwrite(rig.tap(), number.to_bytes(8, "little") * 512, number % 64 * 4096, sync=number % 9 == 0)
    assert_same(rig.live(), rig.primary())
    rig.stop()


@pytest.mark.parametrize("words", [[], ["nohup"]], ids=["plain", "nohup"])
def test_with_a_terminal_a_hang_up_is_the_end(rig: Rig, words: list[str]) -> None:
    """In order: what was written before is flushed. Unless it was started with nohup: then it goes on."""
    rig.create(size=4 * MIB)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(rig.root)  # nohup writes there
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started to outlive a terminal
        os.execvp("env", ["env", *words, str(DMAFS), "serve", str(rig.store), str(rig.mnt)])  # noqa: S606
    try:
        wait_until(lambda: is_mounted(rig.mnt), "the mount")
        wait_until(lambda: '"protected"' in rig.dmafs("status", rig.store, "--json").stdout, "the initial copy")
        pwrite(rig.tap(), b"not flushed".ljust(4096), MIB)
        loaded = told(rig)["configuration"]["loaded"]
    finally:
        os.close(terminal)  # the kernel sends the signal
    if words:
        wait_until(lambda: told(rig)["configuration"]["loaded"] != loaded, "the configuration")
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), "its end")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not is_mounted(rig.mnt)
    rig.start()
    assert_same(rig.live(), rig.primary())


MACHINE = """[[store]]
path = "{root}/store"
mount = "{root}/tree"
tick_s = 0.5
[store.snapshots]
every = 0
[store.sync]
age = "0s"
free = "0%"
[[store.volume]]
name = "one"
source = "{root}/one.primary"
[[store.volume]]
name = "two"
source = "{root}/two.primary"
"""


def serve(rig: Rig, machine: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a daemon by the machine's file, and wait for its mount."""
    command = [str(DMAFS), "--config", str(machine), "serve", *arguments]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        # A killed daemon's mount isn't one; it may stay: fusermount3 may look before the kernel has let go of it.
        wait_until(lambda: daemon.poll() is not None or os.path.isdir(rig.mnt / "live"), "the mount")
        assert daemon.poll() is None, daemon.communicate()
    except BaseException:
        daemon.kill()
        daemon.wait()
        raise
    return daemon


def ended(daemon: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> str:
    """Have it end, and return what it said."""
    daemon.send_signal(number)
    said = daemon.communicate(timeout=30)[1]
    assert daemon.returncode == (0 if number == signal.SIGTERM else -number), said
    return said


def test_one_file_makes_and_serves_a_store(rig: Rig) -> None:
    """Volumes and mount point are made from the file; a second start finds them, also after a kill; all is checked."""
    rig.mnt = rig.root / "tree"
    machine = rig.root / "dmafs.toml"
    machine.write_text(MACHINE.replace("{root}", str(rig.root)))
    for name in ("one", "two"):
        with rig.primary(name).open("wb") as file:
            file.truncate(MIB)
    assert rig.dmafs("config", "check", machine).stdout == f"configuration {machine}: no errors\n"
    daemon = serve(rig, machine)
    wait_until(lambda: rig.dmafs("status", rig.store).stdout.count(": protected") == 2, "the initial copies")
    pwrite(rig.tap("one"), b"one".ljust(4096), 0, sync=True)
    report = json.loads(rig.dmafs("status", "--json", rig.store).stdout)["daemon"]["configuration"]
    assert (report["file"], report["settings"]["tick_s"]) == (str(machine), {"value": 0.5, "origin": f"{machine}:4"})
    ended(daemon, signal.SIGKILL)
    daemon = serve(rig, machine, str(rig.store))
    assert rig.live("one").read_bytes()[:3] == b"one"
    machine.write_text(machine.read_text().replace("tick_s = 0.5", "tick_s = 0.25"))
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: told(rig)["configuration"]["settings"]["tick_s"]["value"] == 0.25, "the configuration")
    assert "ERROR" not in ended(daemon)
    machine.write_text(machine.read_text().replace("two.primary", "one.primary"))
    refused = run(DMAFS, "--config", machine, "serve", code=3)
    assert f"{machine}:15, [[store.volume]]: source {rig.primary('one')} is in line 12 already" in refused.stderr
    machine.write_text(machine.read_text().rpartition("[[store.volume]]")[0].replace("one.primary", "two.primary"))
    refused = run(DMAFS, "--config", machine, "serve", code=3)
    assert f"volume one of store {rig.store} has source '{rig.primary('one')}'" in refused.stderr
    machine.write_text(machine.read_text().replace("two.primary", "one.primary"))
    daemon = serve(rig, machine)
    assert f"volume two of store {rig.store} isn't named in {machine}" in ended(daemon)
