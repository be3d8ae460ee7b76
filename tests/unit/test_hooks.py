"""Claims about dmafs.service.hooks: commands of the administrator's, bounded in time and output."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import trio

from dmafs.service import hooks
from dmafs.service.hooks import OUTPUT_BYTES_MAX, run_hook


async def run(*command: str, timeout_s: float = 20, **environment: str) -> bool:
    return await run_hook(command, timeout_s=timeout_s, environment=environment)


def gone(pid: int) -> bool:
    """Say whether a process has ended, if only its parent doesn't know yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def named_is_gone(path: Path) -> bool:
    return path.exists() and gone(int(path.read_text()))


async def until_gone(path: Path) -> None:
    with trio.fail_after(10):
        while not named_is_gone(path):  # noqa: ASYNC110 - it is no child of ours
            await trio.sleep(0.01)


async def test_success_and_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Exit status 0 is success; anything else, and a program that isn't there, is a warning and nothing worse."""
    caplog.set_level(logging.INFO)
    assert await run("sh", "-c", "echo said; echo $WHERE-$PPID; echo more >&2", WHERE="here")
    assert [record.message.partition("more >&2: ")[2] for record in caplog.records] == [
        "said",
        f"here-{os.getpid()}",
        "more",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    caplog.clear()
    assert not await run("sh", "-c", "echo because; exit 3")
    assert not await run("/nonexistent/program")
    assert not await run("sh", "-c", "kill -TERM $$")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    for text in ("because", "ended with 3", "/nonexistent/program can't be run: no such file", "ended with -15"):
        assert text in caplog.text


async def test_no_shell_and_no_input() -> None:
    """Arguments are arguments, and standard input is closed."""
    assert await run("test", "$HOME; false", "=", "$HOME; false")
    assert await run("sh", "-c", "! read line")


async def test_time_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the limit the whole group is killed, children too, whatever they ignore."""
    script = (
        f"trap '' TERM; sh -c 'trap \"\" TERM; echo $$ >{tmp_path}/child; sleep 1000' & echo begun; wait; sleep 1000"
    )
    begun = time.monotonic()
    assert not await run("sh", "-c", script, timeout_s=0.5)
    assert time.monotonic() - begun < 5
    await until_gone(tmp_path / "child")
    assert "begun" in caplog.text
    assert "took longer than 0.5 s and was killed" in caplog.text


async def test_cancelling(tmp_path: Path) -> None:
    """When the daemon ends the hook does."""
    with trio.move_on_after(0.5) as scope:
        await run("sh", "-c", f"echo $$ >{tmp_path}/pid; sleep 1000; true")
    assert scope.cancelled_caught
    await until_gone(tmp_path / "pid")


async def test_output_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """A hook that prints without end is read, so that it doesn't block, but not remembered."""
    caplog.set_level(logging.INFO)
    assert await run("sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' 'x'; echo; echo end")
    assert len(caplog.text) < 2 * OUTPUT_BYTES_MAX
    assert "end" not in caplog.records[-1].message.partition("echo end")[2]


async def test_what_a_hook_leaves_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A background process that keeps the output open is neither waited for nor killed."""
    monkeypatch.setattr(hooks, "GRACE_S", 0.3)
    script = f"sleep 1000 & echo $! >{tmp_path}/pid; echo done"
    begun = time.monotonic()
    assert await run("sh", "-c", script)
    assert 0.2 < time.monotonic() - begun < 5
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    os.kill(pid, 9)
